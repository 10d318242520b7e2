"""A module that looks like CuPy as far as normkit goes, with the memory of this machine behind it.

It counts what a real one would be asked for: allocations, the stream, the current device.
"""

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Memory:
    """A piece of memory, poisoned, with guards around it."""

    GUARD = 64

    def __init__(self, size: int) -> None:
        self.raw = np.full(size + 2 * self.GUARD + 64, 0xA5, np.uint8)
        start = -self.raw.ctypes.data % 64 + self.GUARD
        self.bytes = self.raw[start : start + size]
        self.ptr = self.raw.ctypes.data + start

    def untouched(self) -> bool:
        first = self.ptr - self.raw.ctypes.data
        return bool((self.raw[:first] == 0xA5).all() and (self.raw[first + self.bytes.size :] == 0xA5).all())


class ndarray:  # noqa: N801
    """As cupy.ndarray: NumPy can read it only through get()."""

    def __init__(self, shape: Any, dtype: Any, memptr: Memory, strides: Any = None):
        self._hold(np.ndarray(shape, dtype, memptr.bytes, 0, strides))

    def _hold(self, values: np.ndarray, device: int = 0) -> "ndarray":
        self._numpy = values
        self.dtype, self.shape, self.strides, self.ndim = values.dtype, values.shape, values.strides, values.ndim
        self.data = SimpleNamespace(ptr=values.ctypes.data)
        self.device = SimpleNamespace(id=device)
        return self

    def get(self) -> np.ndarray:
        return self._numpy.copy()

    def fill(self, value: Any) -> None:
        self._numpy.fill(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._numpy[index] = value._numpy

    def __array__(self, *_: Any, **__: Any) -> None:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


def of(values: Any, device: int = 0) -> ndarray:
    return ndarray.__new__(ndarray)._hold(values, device)


def _numpys(arguments: Any) -> list[Any]:
    return [a._numpy if isinstance(a, ndarray) else a for a in arguments]


def _method(name: str) -> Any:
    return lambda self, *a, **k: of(getattr(self._numpy, name)(*_numpys(a), **k))


def _function(name: str) -> Any:
    return lambda *a, **k: None if (found := getattr(np, name)(*_numpys(a), **k)) is None else of(found)


for method in ("transpose", "copy", "reshape", "astype", "sum", "__add__"):
    setattr(ndarray, method, _method(method))
ndarray.__module__ = "cupy"


class FakeCupy(ModuleType):
    """The module, and a log of what it was asked for."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.ndarray = ndarray
        for function in ("broadcast_to", "empty_like", "copyto", "ones"):
            setattr(self, function, _function(function))
        self.allocated: list[Memory] = []
        self.streams: list[int] = []
        self.current = 7
        module = self

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            def __enter__(self) -> None:
                self.before, module.current = module.current, self.number

            def __exit__(self, *_: Any) -> None:
                module.current = self.before

        def alloc(size: int) -> Memory:
            assert module.current == 0, "memory of another device than that of the arrays"
            module.allocated.append(Memory(size))
            return module.allocated[-1]

        def get_current_stream(device: int | None = None) -> Any:
            module.streams.append(module.current if device is None else device)
            return SimpleNamespace(ptr=0)

        self.cuda = SimpleNamespace(Device=Device, alloc=alloc, get_current_stream=get_current_stream)

    def array(self, values: np.ndarray, device: int = 0) -> ndarray:
        """A copy that keeps the memory layout."""
        return of(np.array(values, order="K", copy=True), device)
