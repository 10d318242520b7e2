"""The suite of the CPU on arrays of a GPU: `NORMKIT_TEST_ARRAYS=cupy pytest tests/test_values.py ...`.

Functions of normkit that are given NumPy arrays work on CuPy arrays then, which lie as these do, in a copy of all the
memory around them. What is different in that memory afterwards is written back, results become NumPy arrays, and what
the library allocates holds NaNs. `NORMKIT_TEST_ARRAYS=fake` does the same in a build with NORMKIT_CUDA=shim, with
fake_gpu.py in the place of CuPy.

What a test says of guards, untouched inputs, layouts and bits therefore is said of the GPU. Not for tests of what a GPU
does not have: threads, instruction sets, other libraries.
"""

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import normkit
import numpy as np
import pytest

LINE = 64
PHASES = ("apply", "apply_backward", "backward_sums", "merge", "moments")


def bounds_of(a: np.ndarray) -> tuple[int, int]:
    """The memory that `a` is a part of, as far as NumPy knows."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return np.lib.array_utils.byte_bounds(a)


def bytes_at(low: int, high: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))


def address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def raw(cupy: Any, pointer: Any, size: int) -> Any:
    return cupy.ndarray((size,), np.dtype(np.uint8), pointer, (1,))


class Copied:
    """Pieces of this machine's memory, each copied to the device at a like address: misaligned stays misaligned."""

    def __init__(self, cupy: Any, arrays: list[np.ndarray]) -> None:
        self.cupy = cupy
        self.pieces: list[tuple[int, int, Any]] = []
        pieces: list[list[int]] = []
        for low, high in sorted(map(bounds_of, arrays)):
            if pieces and low <= pieces[-1][1]:
                pieces[-1][1] = max(pieces[-1][1], high)
            else:
                pieces.append([low, high])
        for low, high in pieces:
            memory = cupy.cuda.alloc(high - low + 2 * LINE)
            pointer = memory + (low - memory.ptr) % LINE
            if high > low:
                raw(cupy, pointer, high - low).set(bytes_at(low, high))
            self.pieces.append((low, high, pointer))

    def array(self, a: np.ndarray) -> Any:
        at = address(a)
        low, _, pointer = next(p for p in self.pieces if p[0] <= at <= p[1])
        return self.cupy.ndarray(a.shape, a.dtype, pointer + (at - low), a.strides)

    def write_back(self) -> None:
        for low, high, pointer in self.pieces:
            if high > low:
                here, there = bytes_at(low, high), raw(self.cupy, pointer, high - low).get()
                changed = here != there  # nothing else, as it may be read-only
                if changed.any():
                    here[changed] = there[changed]


def to_device(cupy: Any, a: np.ndarray) -> Any:
    return Copied(cupy, [a]).array(a)


def to_host(cupy: Any, a: Any) -> np.ndarray:
    """A copy that lies as `a`, which has no negative strides, does."""
    size = sum((extent - 1) * step for extent, step in zip(a.shape, a.strides, strict=True)) + a.dtype.itemsize
    if 0 in a.shape:
        return np.empty(a.shape, a.dtype)
    return np.ndarray(a.shape, a.dtype, raw(cupy, a.data, size).get(), 0, a.strides)


# ---- functions ---------------------------------------------------------------------------------------------------


class HostMoments:
    """Moments whose arrays are those of NumPy."""

    def __init__(self, moments: normkit.Moments, cupy: Any) -> None:
        self._moments, self._cupy = moments, cupy

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._moments, name)
        if callable(found):
            return mirrored(self._cupy, found)
        return None if found is None else to_host(self._cupy, found)


def _arrays_in(arguments: Any) -> list[np.ndarray]:
    """The arrays among arguments and in pairs among them, such as slopes of prelu."""
    inner = [b for a in arguments if isinstance(a, tuple | list) for b in a]
    return [a for a in [*arguments, *inner] if type(a) is np.ndarray]


@contextmanager
def refusal_of(arrays: list[np.ndarray]) -> Any:
    """Expects a refusal where arrays have elements that no GPU reads: the rest of the test is skipped then."""
    if all(a.flags.aligned for a in arrays):
        yield
        return
    with pytest.raises(ValueError, match=r"a GPU has .* nowhere else$"):
        yield
    pytest.skip("a GPU has no such elements, and they are refused")


def mirrored(cupy: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def on_device(*arguments: Any, **options: Any) -> Any:
        arrays = _arrays_in([*arguments, *options.values()])
        if any(not a.dtype.isnative or a.dtype.kind not in "fiubV" for a in arrays):
            pytest.skip("CuPy has no such dtype")
        written = (options.get(name) for name in ("out", "running_mean", "running_var"))
        if any(type(a) is np.ndarray and not a.flags.writeable for a in written):
            pytest.skip("arrays of CuPy can be written")
        with cupy.cuda.Device(0):
            copied = Copied(cupy, arrays)
            made = {id(a): copied.array(a) for a in arrays}

            def there(a: Any) -> Any:
                if isinstance(a, HostMoments):
                    return a._moments
                if isinstance(a, list | tuple):
                    return type(a)(map(there, a))
                return made.get(id(a), a)

            def here(result: Any) -> Any:
                if isinstance(result, tuple):
                    return tuple(map(here, result))
                if isinstance(result, normkit.Moments):
                    return HostMoments(result, cupy)
                if not isinstance(result, cupy.ndarray):
                    return result
                given = next((a for a in arrays if made[id(a)] is result), None)
                return to_host(cupy, result) if given is None else given

            try:
                with refusal_of(arrays):
                    found = function(*map(there, arguments), **{name: there(value) for name, value in options.items()})
                return here(found)
            finally:
                copied.write_back()

    return on_device


@contextmanager
def poisoned(cupy: Any) -> Any:
    """New memory holds NaNs, whatever the dtype. NORMKIT_TEST_POOL=off: each piece comes from the driver, so that
    compute-sanitizer knows where it ends."""
    pool = allocate = cupy.get_default_memory_pool().malloc
    if os.environ.get("NORMKIT_TEST_POOL") == "off":

        def allocate(size: int) -> Any:
            return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)

    def allocate_poisoned(size: int) -> Any:
        memory = allocate(size)
        memory.memset_async(0xFF, size)
        return memory

    cupy.cuda.set_allocator(allocate_poisoned)
    yield
    cupy.cuda.set_allocator(pool)


def cupy_or_fake(name: str) -> Any:
    if name == "fake":
        from fake_gpu import fake_cupy

        return fake_cupy()
    import cupy

    return cupy


def install(name: str) -> None:
    """Has every function of normkit work on arrays of a GPU, for the whole process."""
    cupy = sys.modules["cupy"] = cupy_or_fake(name)
    if name != "fake":
        poisoned(cupy).__enter__()
    for function in (*normkit.functional.__all__, *PHASES):
        setattr(normkit, function, mirrored(cupy, getattr(normkit, function)))
