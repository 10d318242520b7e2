"""Arrays of a GPU: what the compiled core must know of them, and what it has done for it on their side.

The core sees a CuPy array as a NumPy array that tells where and how it lies, and that nobody looks into. Outputs and
workspace come from CuPy's pool; kernels go to the stream that is current in CuPy on the device of the arrays. Nothing
is waited for, and nothing copied but what the geometry cannot hold as it lies. CuPy is recognized by its arrays and
never imported first.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core as _typed_core

_core: Any = _typed_core


def is_cupy(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "cupy"


class _Interface:
    """Memory as NumPy's array interface describes it."""

    def __init__(self, owner: Any, strides: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "data": (owner.data.ptr, False),
            "shape": owner.shape,
            "strides": strides,
            "typestr": f"|V{owner.dtype.itemsize}",
        }


class _DeviceArrays:
    """The arrays of one call, all of one device. The core calls empty(), copy(), clear() and workspace()."""

    def __init__(self, device: int) -> None:
        self.cupy: Any = sys.modules["cupy"]
        self.device = device
        self._owners: dict[int, tuple[Any, Any]] = {}  # by the id of what stands for it, which is kept alive too

    def standing_for(self, array: Any) -> Any:
        """The NumPy array that stands for a CuPy array."""
        opaque = np.asarray(_Interface(array, tuple(array.strides)))
        found = opaque.view(array.dtype)
        self._owners[id(found)] = (found, array)
        return found

    def owner(self, result: Any) -> Any:
        """The CuPy array that a result of the core stands for."""
        return None if result is None else self._owners[id(result)][1]

    def empty(self, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        elements = int(np.prod(shape, dtype=np.int64))
        memory = self.cupy.cuda.alloc(max(elements, 1) * dtype.itemsize)
        return self.standing_for(self.cupy.ndarray(shape, dtype, memory, strides))

    def copy(self, to: Any, source: Any) -> None:
        self.owner(to)[...] = self.owner(source)

    def clear(self, array: Any) -> None:
        self.owner(array).fill(0)

    def workspace(self, size: int) -> int:
        """The pool takes it back after the call, and gives it anew only to what comes later on the same stream."""
        self._workspace = self.cupy.cuda.alloc(max(size, 1))
        return int(self._workspace.ptr)

    def run(self, core: Callable[..., Any], *arguments: Any) -> Any:
        """core(*arguments) with stand-ins for CuPy arrays, and its result in CuPy arrays."""
        stand_ins = tuple(self.standing_for(a) if is_cupy(a) else a for a in arguments)
        with self.cupy.cuda.Device(self.device):
            stream = self.cupy.cuda.get_current_stream(self.device).ptr
            result = _core.on_device(self, self.device, stream, core, stand_ins)
        if result is NotImplemented:
            return result
        return tuple(map(self.owner, result)) if isinstance(result, tuple) else self.owner(result)


def runner_for(x: Any) -> Callable[..., Any]:
    """How functions of the core are called with arrays like x."""
    if not is_cupy(x):
        return lambda core, *arguments: core(*arguments)
    device: int = x.device.id
    return lambda core, *arguments: _DeviceArrays(device).run(core, *arguments)


def namespace_of(x: Any) -> Any:
    """NumPy, or CuPy for its arrays."""
    return sys.modules["cupy"] if is_cupy(x) else np


def check_together(arrays: dict[str, Any]) -> None:
    """All arrays of a call are of CuPy and of the device of the first."""
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if array is None:
            continue
        if not is_cupy(array):
            library = type(array).__module__.partition(".")[0]
            raise TypeError(
                f"{name} is a {library} array, expected cupy, as {first_name} is: all arrays of a call share a library"
            )
        if array.device.id != first.device.id:
            raise TypeError(
                f"{name} is on device {array.device.id}, expected {first.device.id}, that of {first_name}: "
                "all arrays of a call share a device"
            )
