"""Arrays of a GPU: what their library does for calls.

Kernels go to the stream that is current in the library of the arrays, on their device; outputs and workspace come from
its allocator. Nothing is waited for, and nothing copied but what the geometry cannot hold as it lies. Libraries are
recognized by their arrays and never imported first, with one exception: what is neither CuPy's nor PyTorch's is taken
through DLPack, ordered before CuPy's current stream, and CuPy makes its outputs, which are handed back the same way.
Who passes an `out` there has to see to it that its library waits for CuPy's stream.
"""

import importlib
import math
import sys
from typing import Any

import numpy as np

from ._memory import Memory, dtype_named, handed_over, library_of, namespace_of


class Device(Memory):
    """The memory of a call on arrays of a GPU."""

    def __init__(self, xp: Any, device: int, stream: int) -> None:
        super().__init__()
        self.xp, self.device, self.stream = xp, device, stream

    def copy(self, into: Any, values: Any, axes: tuple[int, ...] | None) -> None:
        into[...] = values if axes is None else self.wide(values).sum(axis=axes, keepdims=True)

    def merged(self, a: Any, b: Any, twofold: bool) -> Any:
        """The moments of two sets as one, by merge() of formula.hpp, but rounded once more where that fuses."""
        (mean, m2, own, low), (other, more, others, other_low) = ([m[..., k] for k in range(4)] for m in (a, b))
        n = own + others
        share, delta = others / (n + (n == 0)), (other - mean) + (other_low - low)
        step = delta * share + low
        whole = mean + step
        of_step = whole - mean
        rest = (mean - (whole - of_step)) + (step - of_step)
        m2 = m2 + (delta * (delta * (own * share)) + more)
        where = self.xp.where
        rest = where(whole - whole == 0, rest, 0.0) if twofold else low
        return self.xp.stack((where(own == 0, other, whole), m2, n, where(own == 0, other_low, rest)), -1)

    def deviation(self, moments: Any, eps: Any, *, inverse: bool) -> Any:
        super().deviation(np.empty((0, 4)), eps, inverse=inverse)  # it judges eps
        n, xp = moments[..., 2], self.xp
        sums = moments[..., 1] / (n + (n == 0)) + eps
        return xp.where((n == 0) | (sums == 0), 0.0, 1 / xp.sqrt(sums)) if inverse else xp.sqrt(sums)


class CuPy(Device):
    def __init__(self, device: int) -> None:
        cupy = sys.modules["cupy"]
        super().__init__(cupy, device, cupy.cuda.get_current_stream(device).ptr)
        self.maker = cupy.ndarray
        self._current = cupy.cuda.Device(device)

    def __enter__(self) -> Memory:
        self._current.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._current.__exit__(*error)

    def empty(self, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]) -> Any:
        kind = dtype_named(dtype)
        memory = self.xp.cuda.alloc(max(math.prod(shape), 1) * kind.itemsize)
        return self.xp.ndarray(shape, kind, memory, strides)

    def seen(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return self.xp.ndarray(shape, array.dtype, array.data, strides)

    def workspace(self, size: int) -> int:
        """The address of a workspace. After the call the pool gives it to nothing but later work on the same stream."""
        self._workspace = self.xp.cuda.alloc(size)
        return int(self._workspace.ptr)


class ThroughCuPy(CuPy):
    """The memory of a call on arrays of any other library that speaks DLPack."""

    def __init__(self, first: Any, device: int) -> None:
        try:
            importlib.import_module("cupy")
        except ImportError:
            raise TypeError(
                f"arrays of {library_of(first)} on a GPU want CuPy, which makes their outputs: install cupy-cuda13x"
            ) from None
        super().__init__(device)
        namespace = namespace_of(first)
        if hasattr(namespace, "from_dlpack"):
            self.hand_over = lambda array: handed_over(namespace, array, array)

    def over(self, owner: Any, pointer: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]) -> Any:
        """An array of CuPy over memory that `owner` keeps alive."""
        reach = [(extent - 1) * step for extent, step in zip(shape, strides, strict=True)]
        kind, below = dtype_named(dtype), -sum(r for r in reach if r < 0)
        size, cuda = sum(map(abs, reach)) + kind.itemsize, self.xp.cuda
        memory = cuda.MemoryPointer(cuda.UnownedMemory(pointer - below, size, owner, self.device), below)
        return self.xp.ndarray(shape, kind, memory, strides)


class Torch(Device):
    def __init__(self, first: Any, device: int) -> None:
        torch = sys.modules["torch"]
        super().__init__(torch, device, torch.cuda.current_stream(device).cuda_stream)
        self._place = first.device

    def empty(self, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]) -> Any:
        size = dtype_named(dtype).itemsize
        steps = [stride // size for stride in strides]
        return self.xp.empty_strided(shape, steps, dtype=getattr(self.xp, dtype), device=self._place)

    def seen(self, array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return array.as_strided(shape, [step // array.element_size() for step in strides], array.storage_offset())

    def wide(self, array: Any) -> Any:
        return array.to(self.xp.float64, copy=True, memory_format=self.xp.contiguous_format)

    def workspace(self, size: int) -> int:
        """The address of a workspace. PyTorch's pool takes it back after the call, as CuPy's does."""
        self._workspace = self.xp.empty(size, dtype=self.xp.uint8, device=self._place)
        return int(self._workspace.data_ptr())


def entered(array: Any, device: int) -> Memory:
    """The memory of a call on arrays like this one, from here to its __exit__()."""
    library = library_of(array)
    memory = (
        CuPy(device)
        if library == "cupy"
        else Torch(array, device)
        if library == "torch"
        else ThroughCuPy(array, device)
    )
    return memory.__enter__()
