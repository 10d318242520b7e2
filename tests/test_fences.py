"""No byte beside an array is read: arrays begin behind memory that cannot be read, or end before it."""

import ctypes
import itertools
import mmap
import sys

import normkit
import numpy as np
import pytest
from cases import DTYPES, INTEGERS, LAYOUTS, MASKS, bits, lay, uniform
from reference import REGISTRY

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no mprotect")
SHAPES = [(3, 5, 4, 7), (2, 3, 40, 131), (5, 70, 3, 1)]


def fenced(a: np.ndarray, end: bool) -> np.ndarray:
    """A copy of an array, which lies as it does, at the end of memory that can be read, or at its beginning."""
    low, high = np.lib.array_utils.byte_bounds(a)
    inside = -(low - high) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, inside + 2 * mmap.PAGESIZE), np.uint8)
    for fence in (0, mmap.PAGESIZE + inside):
        protect = ctypes.CDLL(None).mprotect
        assert protect(ctypes.c_void_p(memory.ctypes.data + fence), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    start = mmap.PAGESIZE + (inside - (high - low) if end else 0)
    copy = np.ndarray(a.shape, a.dtype, memory, start + a.ctypes.data - low, a.strides)
    copy[...] = a
    return copy


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_nothing_beside_an_array_is_read(op, layout, dtype, mask, rng):
    for shape, end in itertools.product(SHAPES, (True, False)):
        dy, x, residual, ddx = (fenced(lay(uniform(rng, shape, dtype), layout), end) for _ in range(4))
        where = None if mask is None else fenced(np.asarray(MASKS[mask](rng, shape)), end)
        learnt = op.weight_shape(shape, "channel")
        weight, bias = (fenced(rng.standard_normal(learnt).astype(np.float32), end) for _ in range(2))
        _, *statistics = op.statistics(x, weight=weight, bias=bias, where=where)
        if dtype not in DTYPES.values():
            continue
        mean, rstd = (s if s is None or np.ndim(s) == 0 else fenced(s, end) for s in statistics)
        for options in ({"where": where}, {"where": where, "activation": "relu"}, {"activation": "silu"}):
            op.forward(x, weight, bias, residual=residual, **options)
            backward = (dy, x, mean, rstd, weight)
            op.backward(*backward, bias=bias, dresidual=residual, **options)
            op.backward(*backward, bias=bias, need=("dweight", "dbias"), **options)
        op.double_backward((ddx, weight, bias), *backward, where=where)


# Pixels of three channels, seen in arrays of this shape: rows of up to four elements are copied by more than one.
PIXELS = {
    "mirrored": ((2, 40, 37, 3), lambda a: a[:, :, ::-1]),
    "upside-down": ((2, 40, 37, 3), lambda a: a[:, ::-1, ::-1]),
    "first-three-of-four": ((2, 40, 37, 4), lambda a: a[..., :3]),
    "last-three-of-four": ((2, 40, 37, 4), lambda a: a[..., 1:]),
    "channels-turned-around": ((2, 40, 37, 3), lambda a: a[..., ::-1]),
    "same-columns": ((2, 40, 1, 3), lambda a: np.broadcast_to(a, (2, 40, 37, 3))),
}


@pytest.mark.parametrize("end", [True, False], ids=["end", "beginning"])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("pixels", PIXELS.values(), ids=PIXELS)
def test_nothing_beside_pixels_is_read_or_written(pixels, dtype, end, isa, rng):
    shape, seen = pixels
    x = seen(fenced(uniform(rng, shape, dtype), end))
    dense = normkit.instance_norm(np.copy(x, order="K"), channel_axis=-1)
    assert bits(normkit.instance_norm(x, channel_axis=-1)) == bits(dense)
    if dense.dtype == dtype and shape[2] > 1:
        whole = fenced(np.full(shape, np.nan, dtype), end)
        normkit.instance_norm(x, out=seen(whole), channel_axis=-1)
        assert bits(seen(whole)) == bits(dense)
        assert np.isnan(whole).sum() == whole.size - dense.size
