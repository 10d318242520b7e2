"""Functions whose signature and docstring are written in Python, and whose body is C++."""

from collections.abc import Callable
from typing import Any, TypeVar

from . import _core

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _body() -> Any:
    """What those find who look into a function, as torch.compile does, in the place of calling it."""
    return _core.refuse(
        "this is a function of C++, expected one to look into: use normkit.torch in torch.compile and torch.export"
    )


_SIGNATURE = ("argcount", "posonlyargcount", "kwonlyargcount", "nlocals", "varnames", "flags")
_PLACE = ("name", "qualname", "filename", "firstlineno")


def _code_of(function: Any) -> Any:
    """The code of `_body` with the signature and the place of a function."""
    kept = {f"co_{part}": getattr(function.__code__, f"co_{part}") for part in _SIGNATURE + _PLACE}
    function.__globals__.setdefault("_core", _core)  # where the code looks for it
    return _body.__code__.replace(**kept)


def compiled(op: str, kind: str, **fixed: Any) -> Callable[[_Function], _Function]:
    """A function of C++ with the signature of the one that it decorates, whose names and defaults it goes by.

    `op` is what it does and `kind` what is normalized; `fixed` are options that it does not have, and their values.
    """

    def decorated(function: _Function) -> _Function:
        result: Any = _core.function(function, op, kind, fixed)
        # What tools look at, to whom it is like a function of Python.
        result.__code__ = _code_of(function)
        for name in ("__defaults__", "__kwdefaults__", "__globals__", "__closure__"):
            setattr(result, name, getattr(function, name))
        return result  # type: ignore[no-any-return]

    return decorated
