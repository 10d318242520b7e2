"""What a call has done to memory: of the CPU by NumPy, which is here; of a GPU by its arrays' library, in _cuda.py.

The rest of the package sees arrays of any library as NumPy arrays, its views. Those of a GPU only tell where and how
they lie. Shapes, strides and axes are NumPy's business there too; elements are not, and all that touches them is here.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from . import _core as _typed_core

_core: Any = _typed_core  # it takes and gives arrays of any library, which no stub can say

NDArray: TypeAlias = np.ndarray[Any, Any]


# ---- libraries ---------------------------------------------------------------------------------------------------


_library_of: dict[type, str] = {}  # for calls on small arrays: finding it takes as long as all else about one


def library_of(array: Any) -> str:
    """The library that an array belongs to, by the root of its type's module."""
    kind = type(array)
    if kind not in _library_of:
        root = kind.__module__.partition(".")[0]
        _library_of[kind] = {"jaxlib": "jax"}.get(root, root)
    return _library_of[kind]


def namespace_of(array: Any) -> Any:
    """Its functions, from_dlpack() among them; None where it has none."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(library_of(array))


def refuse_gradients(name: str, array: Any) -> None:
    if getattr(array, "requires_grad", False):
        raise TypeError(
            f"{name} requires grad, expected a tensor that does not: normkit records no gradients, pass {name}.detach()"
        )


def imported(name: str, array: Any, **stream: int) -> NDArray:
    """What an array exports by DLPack, as a NumPy array that keeps it alive. Where it is of a GPU, a stand-in.

    `stream` is the one that will work on it: the producer sees to it that what is still to be written comes first.
    """
    try:
        capsule = array.__dlpack__(max_version=(1, 1), **stream)
    except TypeError:  # a producer older than DLPack 1
        capsule = array.__dlpack__(**stream)
    view: NDArray = _core.from_capsule(name, capsule)
    return view


# ---- dtypes that NumPy does not compute with ---------------------------------------------------------------------

BFLOAT16_BITS = np.dtype([("bfloat16", "<u2")])  # how from_capsule() shows bfloat16


def _computable(array: NDArray) -> NDArray:
    if array.dtype == BFLOAT16_BITS:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def _rounded(values: NDArray, dtype: np.dtype[Any]) -> NDArray:
    """float32 or float64 values in any floating dtype, rounded once."""
    if dtype != BFLOAT16_BITS:
        return values.astype(dtype, copy=False)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(BFLOAT16_BITS)


# ---- the CPU -----------------------------------------------------------------------------------------------------


class Memory:
    """That of the CPU. A call works between `with memory:` and the end of that block.

    `xp` computes on what array_of() and wide() give; `hand_over` makes of that what the caller gets. `shows_bits`: in
    views bfloat16 is BFLOAT16_BITS, else the type of ml_dtypes.
    """

    xp: Any = np
    block = 1 << 14  # elements to compute with at a time: ten float64 arrays of that size fill a second-level cache

    def __init__(self, hand_over: Callable[[Any], Any] = lambda array: array, *, shows_bits: bool = False) -> None:
        self.hand_over, self.shows_bits = hand_over, shows_bits

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def run(self, core: Callable[..., Any], *arguments: Any) -> Any:
        """core(*arguments), of views and with views as its result."""
        return core(*arguments)

    def array_of(self, view: NDArray) -> Any:
        """The array of xp that a view shows, or the part of it."""
        return view

    def view_of(self, array: Any, name: str = "x") -> NDArray:
        view: NDArray = array
        return view

    def give_back(self, view: NDArray | None) -> Any:
        """A result, as the caller's library has it."""
        return None if view is None else self.hand_over(self.array_of(view))

    def dtype_named(self, name: str) -> np.dtype[Any]:
        if name != "bfloat16":
            return np.dtype(name)
        if self.shows_bits:
            return BFLOAT16_BITS
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype

    # New memory holds anything.

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray:
        return np.empty(shape, dtype)

    def empty_like(self, x: NDArray, dtype: Any = None) -> NDArray:
        """In the order of x, dense."""
        return np.empty_like(x, dtype=dtype, order="K")

    def copy(self, target: NDArray, source: NDArray) -> None:
        """Of one dtype, to the bit."""
        target[...] = source

    def put(self, target: NDArray, values: Any) -> None:
        """An array of xp, or a number, rounded once."""
        target[...] = _rounded(np.asarray(values), target.dtype)

    def wide(self, view: NDArray, dtype: Any) -> Any:
        """The same numbers in float32 or float64, as an array of xp."""
        return _computable(view).astype(dtype, order="C")

    def dense(self, view: NDArray) -> NDArray:
        """A copy in C order."""
        copied = self.empty(view.shape, view.dtype)
        self.copy(copied, view)
        return copied

    # Of moments: mean, m2 and count along the last axis.

    def merged(self, a: Any, b: Any) -> Any:
        return _core.merge_moments(np.ascontiguousarray(a), np.ascontiguousarray(b))

    def deviation(self, triples: Any, eps: float, *, inverse: bool) -> Any:
        """1 / sqrt(var + eps), or sqrt(var + eps)."""
        return _core.deviation_of_moments(np.ascontiguousarray(triples), eps, inverse)
