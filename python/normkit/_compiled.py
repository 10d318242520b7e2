"""Functions whose signature and docstring are written in Python, and whose body is C++."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from . import _core

_Function = TypeVar("_Function", bound=Callable[..., Any])


def body() -> NoReturn:
    """What those find who look into a function, as torch.compile does, in the place of calling it."""
    _core.refuse(
        "a function of C++ is looked into, expected a call: use normkit.torch in torch.compile and torch.export"
    )
    raise AssertionError  # that has raised


def compiled(op: str, kind: str, **fixed: Any) -> Callable[[_Function], _Function]:
    """A function of C++ with the signature of the one that it decorates, whose names and defaults it goes by, and whose
    body is never run.

    `op` is what it does and `kind` what is normalized; `fixed` are options that it does not have, and their values.
    """

    def decorated(function: _Function) -> _Function:
        result: Any = _core.function(function, op, kind, fixed)
        # What tools look at, to whom it is like a function of Python.
        for name in ("__code__", "__defaults__", "__kwdefaults__", "__globals__", "__closure__"):
            setattr(result, name, getattr(function, name))
        return result  # type: ignore[no-any-return]

    return decorated
