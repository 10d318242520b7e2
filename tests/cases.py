"""Named shapes, memory layouts and dtypes. Every shape says which path it is there for."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from reference import Shape

try:
    import ml_dtypes

    BFLOAT16 = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
except ImportError:
    BFLOAT16 = {}

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | BFLOAT16
INTEGERS = {name: np.dtype(name) for name in ("uint8", "int8", "uint16", "int16")}
# The dtypes of arrays that are converted to float32 before a kernel reads them.
CONVERTED = {name: np.dtype(name) for name in ("bool", "int32", "uint32", "int64", "uint64")}

# The reduced run of instance norm is what follows the second axis.
SHAPES = {
    "one-element": (1, 1, 1, 1),
    "one-member": (3, 5, 1, 1),
    "tail": (2, 3, 7),
    "square-tail": (2, 3, 7, 7),
    "vector": (2, 3, 16),
    "vector-and-one": (2, 3, 17),
    "register-row": (2, 3, 128),
    "register-row-and-one": (2, 3, 129),
    "chunk-less-one": (1, 2, 4095),
    "chunk": (1, 2, 4096),
    "chunk-and-one": (1, 2, 4097),
    "three-chunks": (1, 2, 3, 4099),
    "two-spans": (1, 2, 70000),
    "volume": (2, 3, 4, 5, 6),
    "rows": (37, 1, 65),
    "wide-rows": (70, 2, 33),
    "long-batch": (300, 2, 19),
}
MATRIX = (37, 65)  # nothing for instance norm, which has no axis of space then
CHANNELS_LAST = {
    "one-channel": (2, 1, 5, 5),
    "three-channels": (2, 3, 5, 5),
    "one-vector": (2, 16, 5, 5),
    "vector-and-one": (2, 17, 5, 5),
    "one-tile": (2, 64, 3, 5),
    "tile-and-one": (2, 65, 3, 5),
    "tile-and-tail": (2, 100, 3, 5),
    "chunk-and-one-step": (2, 16, 129),
    "many-chunks": (1, 18, 700),
    "two-spans": (1, 17, 2100),
}


@dataclass(frozen=True)
class Place:
    """The place of an array in its buffer, in bytes: `size` of them from the first to the last that it touches."""

    size: int
    first: int
    strides: Shape


def _place(shape: Shape, itemsize: int, steps: Shape) -> Place:
    strides = tuple(step * itemsize for step in steps)
    reach = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    low = sum(r for r in reach if r < 0)
    return Place(sum(map(abs, reach)) + itemsize, -low, strides)


def dense(shape: Shape, order: tuple[int, ...]) -> Shape:
    """Strides in elements of a dense array whose axes lie in `order`, the slowest first."""
    steps, step = [0] * len(shape), 1
    for axis in reversed(order):
        steps[axis], step = step, step * shape[axis]
    return tuple(steps)


def _axes(shape: Shape) -> tuple[int, ...]:
    return tuple(range(len(shape)))


# Strides in elements, by the name of a layout.
LAYOUTS: dict[str, Callable[[Shape], Shape]] = {
    "contiguous": lambda s: dense(s, _axes(s)),
    "channels-last": lambda s: dense(s, (0, *_axes(s)[2:], 1)),
    "fortran": lambda s: dense(s, _axes(s)[::-1]),
    "rolled": lambda s: dense(s, (*_axes(s)[1:], 0)),
    "transposed": lambda s: dense(s, (*_axes(s)[:-2], *_axes(s)[:-3:-1])),
    "crop": lambda s: dense(tuple(e + 3 for e in s), _axes(s)),
    "channels-last-crop": lambda s: dense(tuple(e + 3 for e in s), (0, *_axes(s)[2:], 1)),
    "step": lambda s: tuple(2 * d for d in dense(s, _axes(s))),
    "wide-step": lambda s: (*dense(tuple(3 * e for e in s), _axes(s))[:-1], 3),
    "reversed": lambda s: tuple(-d for d in dense(s, _axes(s))),
    "flipped": lambda s: (-dense(s, _axes(s))[0], *dense(s, _axes(s))[1:]),
    "same-images": lambda s: (0, *dense(s, _axes(s))[1:]),
    "same-columns": lambda s: (*dense(s, _axes(s))[:-1], 0),
    "misaligned": lambda s: dense(s, _axes(s)),
}
SHARED_MEMORY = {"same-images", "same-columns"}

ON_GPU = bool(os.environ.get("NORMKIT_TEST_ARRAYS"))  # see mirrored.py
GUARD, POISON = 64 if ON_GPU else 72, 0xA5  # there kernels ask whether whole vectors lie at a line of memory


def misalignment(dtype: Any) -> int:
    """The fewest bytes that an array may be out of line by. On a GPU an element lies at a multiple of its size."""
    return np.dtype(dtype).itemsize if ON_GPU else 1


def _view(buffer: np.ndarray, place: Place, shape: Shape, dtype: Any, offset: int) -> np.ndarray:
    return np.ndarray(shape, dtype, buffer, offset + place.first, place.strides)


class Guarded:
    """An array of some layout inside a poisoned buffer, which knows whether anything beside it was written."""

    def __init__(self, shape: Shape, dtype: Any, layout: str = "contiguous"):
        dtype = np.dtype(dtype)
        place = _place(shape, dtype.itemsize, LAYOUTS[layout](shape))
        raw = np.full(place.size + 2 * GUARD + 128, POISON, np.uint8)
        start = -raw.ctypes.data % 64  # a buffer at a full line, so that only "misaligned" is misaligned
        self.buffer = raw[start:]
        offset = GUARD - GUARD % dtype.itemsize + (layout == "misaligned") * misalignment(dtype)
        self.array = _view(self.buffer, place, shape, dtype, offset)
        self.outside = np.ones(self.buffer.shape, bool)
        if math.prod(shape):
            bytes_of = Place(place.size, place.first, (*place.strides, 1))
            _view(self.outside, bytes_of, (*shape, dtype.itemsize), np.bool_, offset)[...] = False

    def untouched(self) -> bool:
        """True where no byte outside the array was written."""
        return bool((self.buffer[self.outside] == POISON).all())

    def unwritten(self) -> bool:
        """True where no byte at all was written."""
        return bool((self.buffer == POISON).all())


def lay(values: np.ndarray, layout: str) -> np.ndarray:
    """The values in another layout; where elements share memory the last value wins."""
    guarded = Guarded(values.shape, values.dtype, layout)
    guarded.array[...] = values
    return guarded.array


def uniform(
    rng: np.random.Generator, shape: Shape, dtype: Any = np.float32, *, offset: float = 0.0, std: float = 1.0
) -> np.ndarray:
    """Uniform values of a given mean and standard deviation; the whole range for integers and truth values."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return (offset + std * math.sqrt(3) * rng.uniform(-1, 1, shape)).astype(dtype)


def few_bits(rng: np.random.Generator, shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    """Whole numbers from -2 to 2. Sums of up to 4096 of them, of their differences to a mean of sixteen, and of the
    squares of those fit the 24 bits of a float: exact, whatever the order."""
    return rng.integers(-2, 2, shape, endpoint=True).astype(dtype)


def bits(x: np.ndarray) -> bytes:
    """The bytes that two arrays share where they are the same to the last bit."""
    return np.ascontiguousarray(x).tobytes()


def _lengths(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    lengths = rng.integers(1, shape[-1], shape[0], endpoint=True)
    return np.arange(shape[-1]) < lengths.reshape(-1, *[1] * (len(shape) - 1))


def _single(shape: Shape) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[(-1,) * len(shape)] = True
    return mask


def _random(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return rng.random(shape) < 0.7


# Which elements are members, by the name of a mask; all of them broadcast against x.
MASKS: dict[str, Callable[[np.random.Generator, Shape], np.ndarray]] = {
    "random": _random,
    "sparse": lambda rng, shape: rng.random(shape) < 0.1,
    "all": lambda rng, shape: np.ones(shape, bool),
    "none": lambda rng, shape: np.zeros(shape, bool),
    "one-flag": lambda rng, shape: np.array(True),
    "single-member": lambda rng, shape: _single(shape),
    "image-and-position": lambda rng, shape: _random(rng, (shape[0], 1, *shape[2:])),
    "position": lambda rng, shape: _random(rng, shape[2:]),
    "channel": lambda rng, shape: _random(rng, (shape[1], *[1] * (len(shape) - 2))),
    "lengths": _lengths,
    "tokens": lambda rng, shape: _random(rng, (*shape[:-1], 1)),
    "no-first-image": lambda rng, shape: np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) > 0,
    "transposed": lambda rng, shape: _random(rng, shape[::-1]).T,
    "stepped": lambda rng, shape: _random(rng, (*shape[:-1], 2 * shape[-1]))[..., ::2],
    "reversed": lambda rng, shape: _random(rng, shape)[..., ::-1],
}
