"""What calls have Python do to memory: memory of the CPU is NumPy's, here; of a GPU its arrays' library's, in _cuda.py.

The core reads arrays of any library as they are. Python sees those of the CPU as NumPy arrays where it computes with
them, and those of a GPU as their library's own.
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from . import _core as _typed_core

_core: Any = _typed_core  # it takes and gives arrays of any library, which no stub can say

NDArray: TypeAlias = np.ndarray[Any, Any]


# ---- libraries ---------------------------------------------------------------------------------------------------

_FROZEN = ("jax", "tensorflow")  # libraries whose arrays never change


def library_of_type(kind: type) -> tuple[str, bool, Any]:
    """The library that arrays of a type belong to, by the root of a module, whether they never change, and its table of
    DLPack's functions, of types of which tensors are no more than memory.

    A subclass belongs to the library of its base: of the class which speaks DLPack.
    """
    base = next((c for c in reversed(kind.__mro__) if "__dlpack__" in vars(c)), kind)
    root = base.__module__.partition(".")[0]
    name = {"jaxlib": "jax"}.get(root, root)
    table = getattr(kind, "__dlpack_c_exchange_api__", None) if name == "torch" else None
    if table is not None and kind not in (sys.modules["torch"].Tensor, sys.modules["torch"].nn.Parameter):
        table = None
    return name, name in _FROZEN, table


def library_of(array: Any) -> str:
    return library_of_type(type(array))[0]


def readable(name: str, array: Any, is_written: bool) -> Any:
    """The array, or another of its values, with memory that holds these; an array that has none is refused in words."""
    library = library_of(array)
    torch = sys.modules.get("torch")
    if library == "torch" and torch is not None:
        return _tensor(torch, name, array, is_written)
    jax = sys.modules.get("jax")
    if library == "jax" and jax is not None and isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{name} is a {type(array).__name__} of JAX, expected an array that holds values: use normkit.jax, "
            "whose functions jit, grad, vmap and shard_map know"
        )
    return array


_PLAIN = {"ADInplaceOrView", *(f"{kind}{place}" for kind in ("", "Autograd", "Autocast") for place in ("CPU", "CUDA"))}
_LAZY = {"Negative": "negated", "Conjugate": "conjugated"}


def _tensor(torch: Any, name: str, tensor: Any, is_written: bool) -> Any:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, expected a tensor that does not: use normkit.torch, whose functions record "
            f"gradients, or pass {name}.detach()"
        )
    forward_ad = getattr(getattr(torch, "autograd", None), "forward_ad", None)  # None of what only looks like PyTorch
    if forward_ad is not None and forward_ad.unpack_dual(tensor).tangent is not None:
        raise TypeError(
            f"{name} has a tangent, expected a tensor that has none: normkit has no derivatives in forward mode; pass "
            f"torch.autograd.forward_ad.unpack_dual({name}).primal"
        )
    for key in _keys(torch, tensor):
        if key in _LAZY:
            if is_written:
                raise TypeError(f"{name} is {_LAZY[key]} lazily, expected a tensor whose memory is its value")
            tensor = tensor.resolve_neg().resolve_conj()
        elif key not in _PLAIN:
            raise TypeError(
                f"{name} is a {type(tensor).__name__} of kind {key} on device {tensor.device}, expected a plain dense "
                "tensor that holds its elements: use normkit.torch in torch.compile, torch.func and modes of dispatch"
            )
    return tensor.detach() if tensor.requires_grad else tensor


def _keys(torch: Any, tensor: Any) -> list[str]:
    """The keys by which PyTorch dispatches calls: they tell where a tensor is more than dense memory."""
    try:
        keys = str(torch._C._dispatch_keys(tensor))
    except AttributeError:  # a private function that is gone
        return ["Negative"] * tensor.is_neg() + ["meta"] * getattr(tensor, "is_meta", False)
    return [key.strip() for key in keys.partition("(")[2].rstrip(")").split(",") if key.strip()]


# ---- dtypes that NumPy does not compute with ---------------------------------------------------------------------

BFLOAT16_BITS = np.dtype([("bfloat16", "<u2")])


@cache
def bfloat16_dtype() -> np.dtype[Any]:
    """The dtype of ml_dtypes, or where that is not installed two bytes that NumPy moves and never looks into."""
    try:
        import ml_dtypes
    except ImportError:
        return BFLOAT16_BITS
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def dtype_named(name: str) -> np.dtype[Any]:
    return bfloat16_dtype() if name == "bfloat16" else np.dtype(name)


def _computable(array: Any) -> Any:
    if getattr(array, "dtype", None) == BFLOAT16_BITS:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def _rounded(values: Any, dtype: np.dtype[Any]) -> Any:
    """float32 or float64 values in any floating dtype, rounded once."""
    if dtype != BFLOAT16_BITS or getattr(values, "dtype", None) == dtype:
        return values
    bits = np.asarray(values).astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(BFLOAT16_BITS)


# ---- the CPU -----------------------------------------------------------------------------------------------------


def share_memory(a: NDArray, b: NDArray) -> bool:
    """True unless it is certain that two interleaving views share no element."""
    effort: Any = 100_000
    try:
        return np.shares_memory(a, b, max_work=effort)
    except np.exceptions.TooHardError:
        return True


class Memory:
    """The memory of a call on arrays of the CPU. Python code works between `with memory:` and the end of that block.

    `xp` computes on its arrays; `hand_over` makes of them what the caller gets.
    """

    xp: Any = np

    def __init__(self, hand_over: Callable[[Any], Any] = lambda array: array) -> None:
        self.hand_over = hand_over

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def give_back(self, array: Any) -> Any:
        """A result, as the caller's library has it."""
        return None if array is None else self.hand_over(array)

    @np.errstate(all="ignore")  # as kernels: what overflows is infinite, whatever np.seterr says
    def copy(self, into: Any, values: Any, axes: tuple[int, ...] | None) -> None:
        """into[...] = values, each rounded once; values along `axes` are added up first."""
        if axes is not None:
            values = self.wide(values).sum(axis=axes, keepdims=True)
        if getattr(values, "dtype", None) != into.dtype:
            values = _rounded(_computable(values), into.dtype)
        into[...] = values

    def wide(self, array: Any) -> Any:
        """A copy of the array in float64, in C order."""
        return _computable(array).astype("float64", order="C")

    def put_running(self, mean: Any, rstd: Any, running_mean: Any, running_var: Any, eps: float) -> None:
        """Fills in the statistics that are wanted, where the running ones stand for them."""
        with np.errstate(all="ignore"):
            var = self.wide(running_var) + eps
            found = self.xp.where(var == 0, 0.0, 1 / self.xp.sqrt(var))
        for into, values in ((mean, running_mean), (rstd, found)):
            if into is not None:
                self.copy(into, values, None)

    # The arrays of these are moments: mean, m2, count and mean_low along the last axis.

    def merged(self, a: Any, b: Any, twofold: bool) -> Any:
        """The moments of two sets as one. `twofold`: their means are two numbers."""
        return _core.merge_moments(np.ascontiguousarray(a), np.ascontiguousarray(b), twofold)

    def deviation(self, moments: Any, eps: Any, *, inverse: bool) -> Any:
        """sqrt(var + eps) of each statistic, or, where `inverse` is true, 1 / sqrt(var + eps)."""
        return _core.deviation_of_moments(np.ascontiguousarray(moments), eps, inverse)


NUMPY = Memory()


def memory_of(first: Any) -> Memory:
    """The memory that makes results of NumPy arrays of the library of `first`."""
    namespace = namespace_of(first)
    if not hasattr(namespace, "from_dlpack"):  # a producer that takes nothing back
        return NUMPY
    return Memory(lambda array: handed_over(namespace, array, _core.to_dlpack(array)))


def handed_over(namespace: Any, array: Any, exported: Any) -> Any:
    """The array in a library's hands; the array itself where float64 is more than these hold, as in JAX by default."""
    given = namespace.from_dlpack(exported)
    return array if array.dtype == np.float64 and "float32" in str(getattr(given, "dtype", "")) else given


def namespace_of(array: Any) -> Any:
    """The module of an array's functions, from_dlpack() among them; None where the array has no such module."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules.get(library_of(array))


def views_of(**arrays: Any) -> tuple[dict[str, Any], Memory]:
    """The arrays of a call as arrays that Python computes with, and their memory. The first array says which library
    and device that is of."""
    found: tuple[dict[str, Any], Memory] = _core.views(**arrays)
    return found


def views_or_numbers(*names: str, **arrays: Any) -> tuple[dict[str, Any], Memory]:
    """views_of(), where the arrays of these names may be numbers, which they stay."""
    numbers = {name: arrays.pop(name) for name in names if _core.is_number(arrays[name])}
    views, memory = views_of(**arrays)
    return views | numbers, memory
