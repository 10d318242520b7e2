"""Arrays of a GPU: how the compiled core sees them, and what their library does for it.

Kernels go to the stream that is current in the library of the arrays, on their device; outputs and workspace come from
its allocator. Nothing is waited for, and nothing copied but what the geometry cannot hold as it lies. Libraries are
recognized by their arrays and never imported first, with one exception: what is neither CuPy's nor PyTorch's is taken
through DLPack, ordered before CuPy's current stream, and CuPy makes its outputs, which are handed back the same way.
Who passes an `out` there has to see to it that its library waits for CuPy's stream.
"""

import importlib
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import _core as _typed_core
from ._memory import BFLOAT16_BITS, Memory, NDArray, imported, library_of, namespace_of, refuse_gradients

_core: Any = _typed_core

_CUDA, _MANAGED = 2, 13  # DLPack device types
_LEGACY = 1  # what DLPack calls the stream whose handle is 0


class _Root(NamedTuple):
    """Whose memory a view shows a part of: what is at the end of its bases."""

    owner: Any
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _dense_strides(shape: tuple[int, ...], itemsize: int, order: Any = None) -> tuple[int, ...]:
    """Those of axes that lie in `order`, the slowest first."""
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(order or range(len(shape))):
        strides[axis], step = step, step * max(shape[axis], 1)
    return tuple(strides)


class _Device(Memory):
    """That of a GPU. The core calls empty(), copy(), put() and workspace()."""

    block = 1 << 22  # the fewer, the fewer launches

    def __init__(self, xp: Any, device: int, stream: int) -> None:
        super().__init__()
        self.xp, self.device, self.stream = xp, device, stream

    # What a library has for it.

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]) -> Any:
        raise NotImplementedError

    def part(self, owner: Any, offset: int, view: NDArray) -> Any:
        """An array of the memory of `owner` that lies as `view`, `offset` bytes from the first element."""
        raise NotImplementedError

    # The rest follows.

    def run(self, core: Callable[..., Any], *arguments: Any) -> Any:
        return _core.on_device(self, self.device, self.stream, core, arguments)

    def stand_in(
        self, owner: Any, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any],
        frozen: bool = False,
    ) -> NDArray:  # fmt: skip
        root = _Root(owner, pointer, shape, strides)
        view: NDArray = _core.stand_in(root, pointer, shape, strides, dtype, not frozen)
        return view

    def array_of(self, view: NDArray) -> Any:
        root: Any = view
        while isinstance(root, np.ndarray):
            root = root.base
        offset = view.__array_interface__["data"][0] - root.pointer if view.size else 0
        if offset == 0 and (view.shape, view.strides) == (root.shape, root.strides):
            return root.owner
        return self.part(root.owner, offset, view)

    def empty(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> NDArray:
        dtype = np.dtype(dtype)
        return self.view_of(self.allocate(shape, dtype, strides or _dense_strides(shape, dtype.itemsize)))

    def empty_like(self, x: NDArray, dtype: Any = None) -> NDArray:
        dtype = np.dtype(dtype or x.dtype)
        order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
        return self.empty(x.shape, dtype, _dense_strides(x.shape, dtype.itemsize, order))

    def copy(self, target: NDArray, source: NDArray) -> None:
        self.put(target, self.array_of(source))

    def put(self, target: NDArray, values: Any) -> None:
        self.array_of(target)[...] = values

    def merged(self, a: Any, b: Any) -> Any:
        """As merge() of formula.hpp, rounded once more where it fuses."""
        n = a[..., 2] + b[..., 2]
        share, delta = b[..., 2] / (n + (n == 0)), b[..., 0] - a[..., 0]
        m2 = a[..., 1] + (delta * (delta * (a[..., 2] * share)) + b[..., 1])
        return self.xp.stack((a[..., 0] + delta * share, m2, n), -1)

    def deviation(self, triples: Any, eps: float, *, inverse: bool) -> Any:
        super().deviation(np.empty((0, 3)), eps, inverse=inverse)  # it judges eps
        n, xp = triples[..., 2], self.xp
        sums = triples[..., 1] / (n + (n == 0)) + eps
        return xp.where((n == 0) | (sums == 0), 0.0, 1 / xp.sqrt(sums)) if inverse else xp.sqrt(sums)


class _CuPy(_Device):
    def __init__(self, device: int) -> None:
        cupy = sys.modules["cupy"]
        super().__init__(cupy, device, cupy.cuda.get_current_stream(device).ptr)
        self._current = cupy.cuda.Device(device)

    def __enter__(self) -> Memory:
        self._current.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._current.__exit__(*error)

    def view_of(self, array: Any, name: str = "x") -> NDArray:
        return self.stand_in(array, array.data.ptr, array.shape, tuple(array.strides), array.dtype)

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]) -> Any:
        memory = self.xp.cuda.alloc(max(math.prod(shape), 1) * dtype.itemsize)
        return self.xp.ndarray(shape, dtype, memory, strides)

    def part(self, owner: Any, offset: int, view: NDArray) -> Any:
        return self.xp.ndarray(view.shape, view.dtype, owner.data + offset, view.strides)

    def wide(self, view: NDArray, dtype: Any) -> Any:
        return self.array_of(view).astype(dtype, order="C")

    def workspace(self, size: int) -> int:
        """The pool takes it back after the call, and gives it anew only to what comes later on the same stream."""
        self._workspace = self.xp.cuda.alloc(size)
        return int(self._workspace.ptr)


class _ThroughCuPy(_CuPy):
    """That of any library that speaks DLPack."""

    def __init__(self, first: Any, device: int) -> None:
        try:
            importlib.import_module("cupy")
        except ImportError:
            raise TypeError(
                f"arrays of {library_of(first)} on a GPU want CuPy, which makes their outputs: install cupy-cuda13x"
            ) from None
        super().__init__(device)
        self._namespace = namespace_of(first)
        if hasattr(self._namespace, "from_dlpack"):
            self.hand_over = self._namespace.from_dlpack

    def view_of(self, array: Any, name: str = "x") -> NDArray:
        if is_cupy(array):
            return super().view_of(array)
        found = imported(name, array, stream=self.stream or _LEGACY)
        low, high = np.lib.array_utils.byte_bounds(found)
        cuda, pointer = self.xp.cuda, found.__array_interface__["data"][0]
        memory = cuda.MemoryPointer(cuda.UnownedMemory(low, high - low, found, self.device), pointer - low)
        dtype = self.dtype_named("bfloat16") if found.dtype == BFLOAT16_BITS else found.dtype
        owner = self.xp.ndarray(found.shape, dtype, memory, found.strides)
        frozen = library_of(array) == "jax" or not found.flags.writeable  # arrays of JAX never change
        return self.stand_in(owner, pointer, found.shape, found.strides, dtype, frozen)


@cache
def _name_of(dtype: Any) -> str:
    return "bfloat16" if dtype == BFLOAT16_BITS else np.dtype(dtype).name


class _Torch(_Device):
    def __init__(self, first: Any, device: int) -> None:
        torch = sys.modules["torch"]
        super().__init__(torch, device, torch.cuda.current_stream(device).cuda_stream)
        self.shows_bits, self._place = True, first.device

    def view_of(self, array: Any, name: str = "x") -> NDArray:
        refuse_gradients(name, array)
        if array.is_neg():  # its memory holds other numbers
            raise TypeError(f"{name} is negated lazily, expected a tensor that is not: pass {name}.resolve_neg()")
        word = str(array.dtype).rpartition(".")[2]
        try:
            dtype = self.dtype_named(word)
        except TypeError:  # one that NumPy does not know
            dtype = np.dtype([(word, f"V{array.element_size()}")])
        strides = tuple(step * dtype.itemsize for step in array.stride())
        return self.stand_in(array, array.data_ptr(), tuple(array.shape), strides, dtype)

    def _dtype(self, dtype: Any) -> Any:
        return getattr(self.xp, _name_of(dtype))

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any], strides: tuple[int, ...]) -> Any:
        steps = [stride // dtype.itemsize for stride in strides]
        return self.xp.empty_strided(shape, steps, dtype=self._dtype(dtype), device=self._place)

    def part(self, owner: Any, offset: int, view: NDArray) -> Any:
        steps = [stride // view.itemsize for stride in view.strides]
        return owner.as_strided(view.shape, steps, owner.storage_offset() + offset // view.itemsize)

    def wide(self, view: NDArray, dtype: Any) -> Any:
        return self.array_of(view).to(self._dtype(dtype))

    def workspace(self, size: int) -> int:
        """As with CuPy's pool."""
        self._workspace = self.xp.empty(size, dtype=self.xp.uint8, device=self._place)
        return int(self._workspace.data_ptr())


# ---- whose memory it is ------------------------------------------------------------------------------------------


def is_cupy(array: Any) -> bool:
    return library_of(array) == "cupy"


def device_of(array: Any) -> int | None:
    """The number of the GPU that an array is on; None for the CPU, and for what is no array."""
    if is_cupy(array):
        return int(array.device.id)
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack_device__"):
        return None
    kind, number = array.__dlpack_device__()
    return int(number) if int(kind) in (_CUDA, _MANAGED) else None


def entered(array: Any, device: int) -> Memory:
    """What the core does by itself with arrays that it reads is between this and __exit__()."""
    memory = memory_of(array, device)
    memory.__enter__()
    return memory


def memory_of(array: Any, device: int) -> Memory:
    if is_cupy(array):
        return _CuPy(device)
    return _Torch(array, device) if library_of(array) == "torch" else _ThroughCuPy(array, device)
