"""Libraries that look like those of a GPU as far as normkit goes, with memory of this machine behind their arrays.

Nobody can look into that memory but these libraries and the kernels: it is closed while neither is at work, and who
reads or writes it then ends the process, as it does with a GPU. What is asked of a library is counted: allocations,
streams, the current device.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from normkit import _core

ROOM = 1 << 28
GUARD = 64
CLOSED = 0  # PROT_NONE
PROTECT = ctypes.CDLL(None).mprotect
PROTECT.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Memory:
    """The memory of a device: poisoned, with guards around each piece, and closed but within `with memory:`."""

    def __init__(self) -> None:
        self.bytes = np.frombuffer(mmap.mmap(-1, ROOM), np.uint8)
        self.address = self.bytes.ctypes.data
        self.used, self.depth = 0, 0
        self.pieces: list[slice] = []
        self._protect(CLOSED)

    def _protect(self, how: int) -> None:
        assert PROTECT(self.address, ROOM, how) == 0

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self._protect(mmap.PROT_READ | mmap.PROT_WRITE)

    def __exit__(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._protect(CLOSED)

    def take(self, size: int) -> "Pointer":
        start = -(-(self.used + GUARD) // GUARD) * GUARD
        self.used = start + size + GUARD
        with self:
            self.bytes[start - GUARD : self.used] = 0xA5
        self.pieces.append(slice(start, start + size))
        return self.pointer(self.address + start)

    def pointer(self, address: int) -> "Pointer":
        return Pointer(self.bytes, address)

    def untouched(self) -> bool:
        """True where nothing beside the pieces was written."""
        beside = np.ones(self.used, bool)
        for piece in self.pieces:
            beside[piece] = False
        with self:
            known = self.bytes[: self.used]
            return all(
                (known[piece.start - GUARD : piece.start] == 0xA5).all()
                and (known[piece.stop : piece.stop + GUARD] == 0xA5).all()
                for piece in self.pieces
            )

    def holds(self, values: np.ndarray) -> bool:
        return self.address <= values.__array_interface__["data"][0] < self.address + ROOM


class Piece(np.ndarray):
    """An array over a piece of OpenMemory."""


class OpenMemory(Memory):
    """Memory for whole suites: poisoned and never closed; a piece goes when nobody has it any more."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass

    def take(self, size: int) -> "Pointer":
        piece = Piece(size + GUARD, np.uint8)
        piece.fill(0xFF)
        return Pointer(piece, piece.ctypes.data)

    def holds(self, values: np.ndarray) -> bool:
        root: Any = values
        while type(root) is np.ndarray:
            root = root.base
        return isinstance(root, Piece)


class Pointer:
    """A stand-in for cupy.cuda.MemoryPointer."""

    def __init__(self, memory: np.ndarray, address: int, device_id: int = 0) -> None:
        self.memory, self.ptr, self.device_id = memory, address, device_id

    def __add__(self, offset: int) -> "Pointer":
        return Pointer(self.memory, self.ptr + offset, self.device_id)

    def show(self, shape: Any, dtype: Any, strides: Any) -> np.ndarray:
        offset = self.ptr - self.memory.ctypes.data if np.prod(shape) else 0
        return np.ndarray(shape, dtype, self.memory, offset, strides)


class Array:
    """What the arrays of all these libraries can do. NumPy reads them through `library.get(array)` alone."""

    library: "Library"

    def __init__(self, values: np.ndarray, device: int = 0) -> None:
        self._numpy, self._device = values, device
        self.shape, self.ndim = values.shape, values.ndim

    def __array__(self, *_: Any, **__: Any) -> None:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._device

    def __setitem__(self, index: Any, value: Any) -> None:
        self.library.compute(lambda: self._numpy.__setitem__(index, _numpy(value)))


def _numpy(a: Any) -> Any:
    return a._numpy if isinstance(a, Array) else tuple(map(_numpy, a)) if isinstance(a, tuple) else a


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Array, *arguments: Any, **options: Any) -> Any:
        def compute() -> Any:
            return getattr(np.ndarray, name)(self._numpy, *_numpy(arguments), **options)

        found = self.library.compute(compute)
        return self if found._numpy is self._numpy else found

    return operator


ARITHMETIC = ["add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "eq", "gt", "or"]
for name in [*(f"__{word}__" for word in ARITHMETIC), "__getitem__", "reshape", "sum", "transpose"]:
    setattr(Array, name, _operator(name))


class Library(ModuleType):
    """A module, its memory, and a log of what it was asked for."""

    functions = ("where", "sqrt", "stack")

    def __init__(self, name: str, memory: Memory, array: type) -> None:
        super().__init__(name)
        self.memory = memory
        self.Array = type(array.__name__, (array,), {"library": self, "__module__": name})
        self.allocations = 0
        self.streams: list[Any] = []
        for function in self.functions:
            setattr(self, function, partial(self._function, getattr(np, function)))

    def _function(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.compute(lambda: function(*_numpy(arguments)))

    def compute(self, function: Callable[[], Any]) -> Any:
        """An array of what a function of NumPy gives. Its own memory, if it is not a view of some of ours."""
        with self.memory, np.errstate(all="ignore"):
            found = function()
            if found is None:
                return None
            found = np.asarray(found)
            return self.Array(found) if self.memory.holds(found) else self.array(found)

    def array(self, values: np.ndarray, device: int = 0) -> Any:
        """A copy that lies as `values` do, to the byte."""
        low, high = np.lib.array_utils.byte_bounds(values)
        place = self.memory.take(high - low + GUARD) + low % GUARD
        first = values.__array_interface__["data"][0] - low
        seen = (place + first).show(values.shape, values.dtype, values.strides)
        with self.memory:
            seen[...] = values
        return self.Array(seen, device)

    def get(self, array: Any) -> np.ndarray:
        with self.memory:
            return np.array(array._numpy, order="K", copy=True)

    def pointer_of(self, values: np.ndarray) -> Pointer:
        """The pointer of an array that is in this memory."""
        root: Any = values
        while type(root) is np.ndarray and isinstance(root.base, np.ndarray):
            root = root.base
        return Pointer(root, values.__array_interface__["data"][0])

    def alloc(self, size: int) -> Pointer:
        self.allocations += 1
        return self.memory.take(size)


# ---- CuPy --------------------------------------------------------------------------------------------------------


class ndarray(Array):  # noqa: N801
    """A stand-in for cupy.ndarray."""

    __module__ = "cupy"

    def __new__(cls, *arguments: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, shape: Any, dtype: Any = 0, memptr: Any = None, strides: Any = None) -> None:
        if isinstance(shape, np.ndarray):
            super().__init__(shape, dtype)
            self.data = self.library.pointer_of(shape)
            self.data.device_id = self._device
        else:
            super().__init__(memptr.show(shape, dtype, strides))
            self.data = memptr
        self.dtype, self.strides = self._numpy.dtype, self._numpy.strides
        self.device = SimpleNamespace(id=self._device)

    def astype(self, dtype: Any, order: str = "K") -> Any:
        return self.library.compute(lambda: self._numpy.astype(dtype, order=order))

    def set(self, values: np.ndarray) -> None:
        self[...] = values

    def get(self) -> np.ndarray:
        return self.library.get(self)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        self.library.exported.append(stream)
        return capsule_of(self._numpy)


def capsule_of(values: np.ndarray) -> Any:
    exporter = _core.to_dlpack(values) if values.dtype.name == "bfloat16" else values
    return exporter.__dlpack__()


class FakeCupy(Library):
    def __init__(self, memory: Memory) -> None:
        super().__init__("cupy", memory, ndarray)
        self.ndarray = self.Array
        self.current, self.stream = 7, 0
        self.exported: list[Any] = []
        module = self

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            def __enter__(self) -> None:
                self.before, module.current = module.current, self.number

            def __exit__(self, *_: Any) -> None:
                module.current = self.before

        def alloc(size: int) -> Pointer:
            assert module.current == 0, "memory of another device than that of the arrays"
            return self.alloc(size)

        def get_current_stream(device: int | None = None) -> Any:
            module.streams.append(module.current if device is None else device)
            return SimpleNamespace(ptr=module.stream)

        def unowned(address: int, size: int, owner: Any, device: int) -> Any:
            return SimpleNamespace(address=address, size=size, owner=owner)

        self.cuda = SimpleNamespace(
            Device=Device,
            alloc=alloc,
            get_current_stream=get_current_stream,
            UnownedMemory=unowned,
            MemoryPointer=lambda memory, offset: self.memory.pointer(memory.address + offset),
        )


def fake_cupy() -> FakeCupy:
    return FakeCupy(OpenMemory())


# ---- PyTorch -----------------------------------------------------------------------------------------------------


class Tensor(Array):
    """A stand-in for torch.Tensor."""

    __module__ = "torch"

    requires_grad = negated = False
    is_cuda = True

    def __init__(self, values: np.ndarray, device: int = 0) -> None:
        super().__init__(values, device)
        self.dtype = self.library.dtype_of(values.dtype)
        self.device = f"cuda:{device}"

    def is_neg(self) -> bool:
        return self.negated

    def resolve_neg(self) -> Any:
        return -self if self.negated else self

    def resolve_conj(self) -> Any:
        return self

    def permute(self, order: Any) -> Any:
        return self.transpose(order)

    def get_device(self) -> int:
        return self._device

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._numpy.itemsize for step in self._numpy.strides)

    def storage_offset(self) -> int:
        return (self.data_ptr() - self.library.memory.address) // self._numpy.itemsize

    def data_ptr(self) -> int:
        return int(self._numpy.__array_interface__["data"][0])

    def element_size(self) -> int:
        return self._numpy.itemsize

    def as_strided(self, shape: Any, steps: Any, offset: int) -> Any:
        size, memory = self._numpy.itemsize, self.library.memory
        place = memory.pointer(memory.address + offset * size)
        return type(self)(place.show(shape, self._numpy.dtype, [step * size for step in steps]))

    def to(self, dtype: Any, copy: bool, memory_format: str) -> Any:
        assert memory_format == "contiguous"
        return self.library.compute(lambda: self._numpy.astype(dtype.numpy, copy=copy, order="C"))

    def __dlpack__(self, **_: Any) -> None:
        raise AssertionError("not asked of a tensor, which tells all itself")


class Dtype:
    def __init__(self, values: Any) -> None:
        self.numpy = np.dtype(values)

    def __repr__(self) -> str:
        return f"torch.{self.numpy.name}"


class FakeTorch(Library):
    def __init__(self, memory: Memory) -> None:
        super().__init__("torch", memory, Tensor)
        for name in ("float64", "float32", "float16", "uint8", "int8", "uint16", "int16", "int64", "bool"):
            setattr(self, name, Dtype(name))
        try:
            import ml_dtypes

            self.bfloat16 = Dtype(ml_dtypes.bfloat16)
        except ImportError:
            pass
        self.contiguous_format = "contiguous"
        self.stream = 0
        self.cuda = SimpleNamespace(current_stream=self._current_stream)

    def is_grad_enabled(self) -> bool:
        return True

    def dtype_of(self, dtype: np.dtype) -> Dtype:
        return getattr(self, dtype.name)

    def _current_stream(self, device: int) -> Any:
        self.streams.append(device)
        return SimpleNamespace(cuda_stream=self.stream)

    def empty(self, size: int, *, dtype: Dtype, device: str) -> Tensor:
        return self.empty_strided((size,), (1,), dtype=dtype, device=device)

    def empty_strided(self, shape: Any, steps: Any, *, dtype: Dtype, device: str) -> Tensor:
        assert device == "cuda:0"
        size = dtype.numpy.itemsize
        memory = self.alloc(int(np.prod(shape)) * size)
        return self.Array(memory.show(shape, dtype.numpy, [step * size for step in steps]))


# ---- any other ---------------------------------------------------------------------------------------------------


class Exporter(Array):
    """An array that says nothing but DLPack."""

    __module__ = "other"

    def __init__(self, values: np.ndarray, device: int = 0) -> None:
        super().__init__(values, device)
        self.dtype = values.dtype

    @classmethod
    def __array_namespace__(cls, **_: Any) -> Any:
        return cls.library

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.library.streams.append(stream)
        return capsule_of(self._numpy)


class FakeOther(Library):
    STREAM = 5

    def __init__(self, memory: Memory) -> None:
        super().__init__("other", memory, Exporter)

    def from_dlpack(self, array: Any) -> Exporter:
        array.__dlpack__(stream=self.STREAM)
        return self.Array(array._numpy)
