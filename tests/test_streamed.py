"""Outputs so large that stores go past the caches: the same bits as the same images one by one, which stay in them."""

import normkit
import numpy as np
import pytest
from cases import uniform

# Above 4 MB of x and y for every dtype; rows begin and end anywhere in a line of memory.
SHAPES = {"rows": (24, 9, 5003), "lines": (24, 8, 8192), "register-rows": (300, 64, 64), "volume": (2, 1, 1200007)}


def poisoned(shape, dtype, offset):
    """An output `offset` elements into a larger buffer of NaNs, and that buffer."""
    buffer = np.full(int(np.prod(shape)) + 128, np.nan, dtype)
    return buffer[64 + offset : 64 + offset + int(np.prod(shape))].reshape(shape), buffer


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_streamed_outputs(shape, dtype, offset, isa, rng):
    x, dy = uniform(rng, shape, np.dtype(dtype)), uniform(rng, shape, np.dtype(dtype))
    y, y_buffer = poisoned(shape, dtype, offset)
    dx, dx_buffer = poisoned(shape, dtype, offset)
    _, mean, rstd = normkit.instance_norm(x, out=y, return_stats=True)
    normkit.instance_norm_backward(dy, x, mean, rstd, out=dx)
    for n in range(0, shape[0], 5):
        for c in range(0, shape[1], 5):
            one = np.s_[n : n + 1, c : c + 1]
            found = normkit.instance_norm_backward(dy[one].copy(), x[one].copy(), mean[one].copy(), rstd[one].copy())[0]
            assert normkit.instance_norm(x[one].copy()).tobytes() == y[one].tobytes()
            assert found.tobytes() == dx[one].tobytes()
    for buffer in (y_buffer, dx_buffer):
        assert np.isnan(buffer[: 64 + offset]).all()
        assert np.isnan(buffer[64 + offset + x.size :]).all()


# Rows of one line, of many, and such as end within a line; slabs that are fetched ahead, and one of several spans.
LAST = {"lines": (40, 450, 64), "wide": (9, 100, 1200), "within-lines": (12, 900, 100), "few": (7, 50001, 3)}


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", LAST.values(), ids=LAST)
def test_streamed_channels_last(shape, dtype, offset, isa, rng):
    x, dy = uniform(rng, shape, np.dtype(dtype)), uniform(rng, shape, np.dtype(dtype))
    weight, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    y, y_buffer = poisoned(shape, dtype, offset)
    dx, dx_buffer = poisoned(shape, dtype, offset)
    last = {"channel_axis": -1}
    _, mean, rstd = normkit.instance_norm(x, weight, bias, out=y, return_stats=True, **last)
    normkit.instance_norm_backward(dy, x, mean, rstd, weight, out=dx, **last)
    for n in range(0, shape[0], 5):
        one = np.s_[n : n + 1]
        alone = normkit.instance_norm(x[one].copy(), weight, bias, **last)
        found = normkit.instance_norm_backward(
            dy[one].copy(), x[one].copy(), mean[one].copy(), rstd[one].copy(), weight, **last
        )[0]
        assert alone.tobytes() == y[one].tobytes()
        assert found.tobytes() == dx[one].tobytes()
    for buffer in (y_buffer, dx_buffer):
        assert np.isnan(buffer[: 64 + offset]).all()
        assert np.isnan(buffer[64 + offset + x.size :]).all()


@pytest.mark.parametrize("columns", [3, 64, 100])
def test_frozen_channels_last_goes_round_the_table(columns, isa, rng):
    """Every element meets the parameters of its own channel, wherever the vectors begin."""
    shape = (2, 200000 // columns + 1, columns)
    x = rng.integers(-8, 8, shape).astype(np.float32)
    weight, bias, mean = rng.integers(-8, 8, (3, columns)).astype(np.float32)
    out = poisoned(shape, "float32", 1)[0]
    running = {"running_mean": mean, "running_var": np.ones(columns, np.float32), "eps": 0}
    y = normkit.batch_norm(x, weight, bias, **running, channel_axis=-1, out=out)
    assert np.array_equal(y, (x - mean) * weight + bias)
