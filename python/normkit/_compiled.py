"""Functions whose signature and docstring are written in Python, and whose body is C++."""

from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex, TypeAlias, TypeVar

from . import _core

# An array is whatever NumPy, or a library that speaks DLPack, calls one; outputs are of the same kind.
Array: TypeAlias = Any
Axes: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | None
Activation: TypeAlias = str | tuple[str, float | Array] | None

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(op: str, kind: str, **fixed: Any) -> Callable[[_Function], _Function]:
    """A function of C++ with the signature of the one that it decorates, whose names and defaults it goes by.

    `op` is what it does and `kind` what is normalized; `fixed` are options that it does not have, and their values.
    """

    def decorated(function: _Function) -> _Function:
        result: Any = _core.function(function, op, kind, fixed)
        return result  # type: ignore[no-any-return]

    return decorated
