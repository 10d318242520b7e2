"""Outputs so large that stores go past the caches: the same bits as the same images one by one, which stay in them."""

import normkit
import numpy as np
import pytest
from cases import DTYPES, uniform

# Above 4 MB of x and y for every dtype; rows begin and end anywhere in a line of memory.
SHAPES = {"rows": (24, 9, 5003), "lines": (24, 8, 8192), "register-rows": (300, 64, 64), "volume": (2, 1, 1200007)}


def poisoned(shape, dtype, offset):
    """An output `offset` elements past the start of a line of memory, amid a larger buffer of NaNs, and that buffer."""
    size, line = int(np.prod(shape)), 64 // np.dtype(dtype).itemsize
    buffer = np.full(size + 192, np.nan, dtype)
    start = 64 + offset + -(buffer.ctypes.data // buffer.itemsize) % line
    return buffer[start : start + size].reshape(shape), buffer


def assert_written(out, buffer):
    """All of `out`, and nothing around it."""
    assert not np.isnan(out).any()
    assert np.isnan(buffer).sum() == buffer.size - out.size


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
    assert_written(y, y_buffer)
    assert_written(dx, dx_buffer)


# Larger arrays of which a part of this shape is seen. Members of a statistic lie together, or, over images too, apart;
# 9400 elements are no whole chunks.
PART = (5, 30, 94, 100)
PARTS = {
    "crop": ((5, 30, 99, 103), lambda a: a[:, :, 2:-3, 1:-2]),
    "rows-flipped": (PART, lambda a: a[:, :, ::-1]),
    "columns-flipped": (PART, lambda a: a[..., ::-1]),
    "every-second-column": ((5, 30, 94, 200), lambda a: a[..., ::2]),
    "channels-cropped": ((5, 34, 94, 101), lambda a: a[:, 1:-3, :, 1:]),
    "within-an-element": (
        (6, *PART[1:]),
        lambda a: a.reshape(-1).view("u1")[1 : -a[0].nbytes + 1].view(a.dtype).reshape(PART),
    ),
}


# Pictures whose channels lie last, of more than fits into a buffer.
PICTURES = (3, 310, 303, 3)
PICTURE_PARTS = {
    "crop": ((3, 313, 310, 3), lambda a: a[:, 1:-2, 2:-5]),
    "columns-flipped": (PICTURES, lambda a: a[:, :, ::-1]),
    "channels-flipped": (PICTURES, lambda a: a[..., ::-1]),
    "flipped-channels-of-four": ((*PICTURES[:-1], 4), lambda a: a[:, :, ::-1, 2::-1]),
    "every-second-column": ((3, 310, 606, 3), lambda a: a[:, :, ::2]),
}


@pytest.mark.parametrize("axis", [(2, 3), (0, 2, 3), (1, 2, 3)], ids=["instance", "batch", "layer"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int32"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_streamed_outputs_of_parts(part, dtype, axis, isa, rng):
    """Statistics are gathered while others are written."""
    check_part(*part, np.dtype(DTYPES.get(dtype, dtype)), axis, [(30, 1, 1), (94, 100)], rng)


@pytest.mark.parametrize("axis", [(1, 2), (0, 1, 2), (1, 2, 3)], ids=["instance", "batch", "layer"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("part", PICTURE_PARTS.values(), ids=PICTURE_PARTS)
def test_parts_of_pictures(part, dtype, axis, isa, rng):
    """Statistics are gathered span by span."""
    check_part(*part, np.dtype(dtype), axis, [(3,), (303, 1)], rng)


def check_part(shape, cut, dtype, axis, weight_shapes, rng):
    """A part of an array of this shape, and gradients that lie likewise, have the bits of their dense copies."""
    x, dy = (cut(uniform(rng, shape, dtype)) for _ in range(2))
    dense_x, dense_dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)
    for weight in (None, *(rng.standard_normal(s).astype(np.float32) for s in weight_shapes)):
        for threads in (1, 3):
            with normkit.num_threads(threads):
                y, mean, rstd = normkit.normalize(x, weight, weight, axis=axis, return_stats=True)
                same = normkit.normalize(dense_x, weight, weight, axis=axis, return_stats=True)
                assert [a.tobytes() for a in (y, mean, rstd)] == [a.tobytes() for a in same]
                if dtype.kind in "iu":
                    continue
                gradients = normkit.normalize_backward(dy, x, mean, rstd, weight, axis=axis)
                dense = normkit.normalize_backward(dense_dy, dense_x, mean, rstd, weight, axis=axis)
                assert [a.tobytes() for a in gradients] == [a.tobytes() for a in dense]


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
    assert_written(y, y_buffer)
    assert_written(dx, dx_buffer)


@pytest.mark.parametrize("columns", [3, 12, 48, 64, 100])
def test_frozen_channels_last_goes_round_the_table(columns, isa, rng):
    """Every element meets the parameters of its own channel, wherever the vectors begin."""
    shape = (2, 200000 // columns + 1, columns)
    x = rng.integers(-8, 8, shape).astype(np.float32)
    weight, bias, mean = rng.integers(-8, 8, (3, columns)).astype(np.float32)
    out = poisoned(shape, "float32", 1)[0]
    running = {"running_mean": mean, "running_var": np.ones(columns, np.float32), "eps": 0}
    y = normkit.batch_norm(x, weight, bias, **running, channel_axis=-1, out=out)
    assert np.array_equal(y, (x - mean) * weight + bias)


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LAST.values()], ids=[*SHAPES, *(f"last-{name}" for name in LAST)])
def test_streamed_double_backward(shape, isa, rng):
    last = {"channel_axis": -1 if shape in LAST.values() else 1}
    ddx, dy, x = (uniform(rng, shape, np.dtype("float32")) for _ in range(3))
    weight, ddweight, ddbias = rng.standard_normal((3, shape[last["channel_axis"]])).astype(np.float32)
    _, *statistics = normkit.instance_norm(x, return_stats=True, **last)

    def second(arrays, statistics):
        ddx, *arrays = arrays
        return normkit.instance_norm_double_backward(ddx, ddweight, ddbias, *arrays, *statistics, weight, **last)

    d_dy, d_x, _ = second((ddx, dy, x), statistics)
    for n in range(0, shape[0], 5):
        one = np.s_[n : n + 1]
        alone = second([a[one].copy() for a in (ddx, dy, x)], [s[one].copy() for s in statistics])
        assert alone[0].tobytes() == d_dy[one].tobytes()
        assert alone[1].tobytes() == d_x[one].tobytes()


# Written while the next is read, or side by side: pieces that end within a block or a line, runs of several steps,
# weights that must be converted, rows that a batch has an odd number of.
OVERLAPPED = {
    "instance": ((16, 41, 3001), lambda w: ("instance_norm", w((41,))), {}),
    "conditional": ((16, 40, 3008), lambda w: ("instance_norm", w((16, 40))), {}),
    "pixel": ((16, 40, 3008), lambda w: ("instance_norm", w((16, 40, 3008))), {}),
    "pieces": ((9, 64, 4001), lambda w: ("group_norm", (16, *w((64,)))), {}),
    "small-pieces": ((50, 960, 49), lambda w: ("group_norm", (32, *w((960,)))), {}),
    "steps": ((7, 33, 10007), lambda w: ("batch_norm", w((33,))), {"training": True}),
    "short-steps": ((40, 33, 2003), lambda w: ("batch_norm", w((33,))), {"training": True}),
    "rows": ((3001, 1024), lambda w: ("layer_norm", w((1024,))), {}),
    "long-rows": ((601, 4096), lambda w: ("layer_norm", w((4096,))), {}),
    "longer-rows": ((301, 8192), lambda w: ("layer_norm", w((8192,))), {}),
    "ragged-rows": ((2001, 1003), lambda w: ("layer_norm", w((1003,))), {}),
    "square-rows": ((4001, 400), lambda w: ("layer_norm", w((400,))), {}),
    "no-mean": ((3001, 768), lambda w: ("rms_norm", w((768,))[:1]), {}),
}


@pytest.mark.parametrize("weight_dtype", ["float32", "like x", None])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", OVERLAPPED)
def test_overlapped_has_the_bits_of_in_place(name, offset, dtype, weight_dtype, isa, rng):
    """A call in place stores nothing past the caches, so each statistic is read, solved and written before the next."""
    shape, arguments, options = OVERLAPPED[name]
    x, dy = uniform(rng, shape, np.dtype(dtype)), uniform(rng, shape, np.dtype(dtype))

    def parameters(shape):
        kind = dtype if weight_dtype == "like x" else weight_dtype
        return (None, None) if kind is None else tuple(rng.standard_normal((2, *shape)).astype(kind))

    function, given = arguments(parameters)
    forward, backward = getattr(normkit, function), getattr(normkit, f"{function}_backward")
    y, buffer = poisoned(shape, dtype, offset)
    _, *statistics = forward(x, *given, **options, out=y, return_stats=True)
    over = x.copy()
    forward(over, *given, **options, out=over)
    assert y.tobytes() == over.tobytes()
    assert_written(y, buffer)
    weight = given[-1] if function == "rms_norm" else given[-2]
    groups = given[:1] if function == "group_norm" else ()
    for need in (("dx",), ("dx", "dweight", "dbias")):
        dx, buffer = poisoned(shape, dtype, offset)
        found = backward(dy, x, *groups, *statistics, weight, **options, need=need, out=dx)
        assert_written(dx, buffer)
        over = dy.copy()
        expected = backward(over, x, *groups, *statistics, weight, **options, need=need, out=over)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or a.tobytes() == b.tobytes()
