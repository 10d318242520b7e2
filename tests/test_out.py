"""Outputs: given, in place, apart, between guards; nothing else is written."""

import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, POISON, SHAPES, SHARED_MEMORY, Guarded, bits, lay, uniform
from checks import check_backward, check_forward
from reference import OPERATIONS, REGISTRY

SMALL = (3, 5, 4, 7)
INSTANCE = OPERATIONS["instance"]
WRITABLE = [name for name in LAYOUTS if name not in SHARED_MEMORY]
# Lengths around a register, a vector, a block of vectors and a line of memory, where a store may reach too far.
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 4095, 4097]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_out_lies_like_x(op, layout, dtype, isa, rng):
    """The bits of a fresh result, and no byte beside them."""
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    stats = op.statistics(x)[1:]
    out, dout = Guarded(SMALL, dtype, layout), Guarded(SMALL, dtype, layout)
    assert op.forward(x, out=out.array) is out.array
    assert bits(out.array) == bits(op.forward(x))
    dx, dweight, dbias = op.backward(dy, x, *stats, out=dout.array)
    assert dx is dout.array
    assert [bits(a) for a in (dx, dweight, dbias)] == [bits(a) for a in op.backward(dy, x, *stats)]
    assert out.untouched()
    assert dout.untouched()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_out_lies_otherwise(op, layout, dtype, isa, rng):
    """Such an out changes the geometry, and so the bits, within the same bounds."""
    dy, x = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    out, dout = Guarded(SMALL, dtype, layout), Guarded(SMALL, dtype, layout)
    assert check_forward(op, x, out=out.array) is out.array
    assert check_backward(op, dy, x, out=dout.array)[0] is dout.array
    assert out.untouched()
    assert dout.untouched()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_nothing_past_the_end(length, channels_last, dtype, isa, rng):
    shape = (2, length, 3) if channels_last else (2, 3, length)
    layout = "channels-last" if channels_last else "contiguous"
    dy, x = (lay(uniform(rng, shape, dtype), layout) for _ in range(2))
    y, mean, rstd = INSTANCE.statistics(x)
    out, dout = Guarded(shape, dtype, layout), Guarded(shape, dtype, layout)
    INSTANCE.forward(x, out=out.array)
    dx = INSTANCE.backward(dy, x, mean, rstd, out=dout.array)[0]
    assert (bits(out.array), bits(dx)) == (bits(y), bits(INSTANCE.backward(dy, x, mean, rstd)[0]))
    assert out.untouched()
    assert dout.untouched()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_in_place(op, layout, dtype, rng):
    x = lay(uniform(rng, SMALL, dtype), layout)
    expected = bits(op.forward(x))
    assert op.forward(x, out=x) is x
    assert bits(x) == expected


@pytest.mark.parametrize("shape", ["three-chunks", "two-spans", "register-row"])
def test_long_runs_in_place(shape, isa, rng):
    x = uniform(rng, SHAPES[shape])
    expected = bits(INSTANCE.forward(x))
    assert bits(INSTANCE.forward(x, out=x)) == expected


@pytest.mark.parametrize("target", ["dy", "x"])
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_dx_in_place(op, layout, target, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    weight = rng.standard_normal(op.weight_shape(SMALL, "pixel")).astype(np.float32)
    stats = op.statistics(x)[1:]
    expected = [bits(a) for a in op.backward(dy, x, *stats, weight)]
    assert [bits(a) for a in op.backward(dy, x, *stats, weight, out={"dy": dy, "x": x}[target])] == expected


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_view_of_all_of_x_is_x(op, rng):
    x = uniform(rng, SMALL)
    expected = bits(op.forward(x))
    op.forward(x, out=x[...])
    assert bits(x) == expected


@pytest.mark.parametrize("shift", [(1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_partial_overlap(op, shift, rng):
    buffer = uniform(rng, (4, 6, 4, 7))
    x, out = buffer[:3, :5], buffer[shift[0] :, shift[1] :][:3, :5]
    before = bits(buffer)
    with pytest.raises(ValueError, match=r"^out overlaps x, expected x itself or memory apart$"):
        op.forward(x, out=out)
    assert bits(buffer) == before


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_the_same_memory_in_another_order_overlaps(op, rng):
    x = uniform(rng, (4, 4, 4))
    for out in (x[::-1], x.transpose(2, 1, 0)):
        with pytest.raises(ValueError, match=r"^out overlaps x, expected x itself or memory apart$"):
            op.forward(x, out=out)


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_interleaved_memory_is_apart(op, rng):
    """Bounds that overlap are no overlap: every second column is x, the others are out."""
    buffer = uniform(rng, (*SMALL[:3], 14))
    x, out = buffer[..., ::2], buffer[..., 1::2]
    expected, before = bits(op.forward(x)), bits(x)
    op.forward(x, out=out)
    assert (bits(out), bits(x)) == (expected, before)


@pytest.mark.parametrize("fill", [0x00, 0x7F, 0xFF])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_what_out_held_does_not_matter(op, dtype, fill, rng):
    """0xFF everywhere is a NaN in every type."""
    dy, x = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    stats = op.statistics(x)[1:]
    out = np.frombuffer(bytearray([fill]) * x.nbytes, dtype).reshape(SMALL)
    assert bits(op.forward(x, out=out)) == bits(op.forward(x))
    out.view(np.uint8)[...] = fill
    assert bits(op.backward(dy, x, *stats, out=out)[0]) == bits(op.backward(dy, x, *stats)[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_fresh_memory_may_hold_anything(op, kind, dtype, rng, monkeypatch):
    """Memory that the library allocates may hold NaNs: results have the same bits whatever np.empty returns."""
    dy, x = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    weight = rng.standard_normal(op.weight_shape(SMALL, kind)).astype(np.float32)

    def results():
        y, mean, rstd = op.statistics(x, weight=weight)
        return [bits(a) for a in (y, rstd, *op.backward(dy, x, mean, rstd, weight), *op.backward(dy, x, mean, rstd))]

    def poisoned(make):
        def allocate(*arguments, **options):
            array = make(*arguments, **options)
            array.view(np.uint8)[...] = 0xFF
            return array

        return allocate

    expected = results()
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, poisoned(getattr(np, name)))
    found = results()
    monkeypatch.undo()
    assert found == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=lambda d: d.__name__)
def test_out_with_out_dtype(dtype, rng):
    x, out = uniform(rng, SMALL, np.float16), np.empty(SMALL, dtype)
    assert INSTANCE.forward(x, out=out, out_dtype=dtype) is out
    assert bits(out) == bits(INSTANCE.forward(x, out_dtype=dtype))


def test_running_statistics_write_only_their_elements(rng):
    mean, var = (Guarded((5,), np.float32, "step") for _ in range(2))
    mean.array[...], var.array[...] = 0, 1
    INSTANCE.forward(uniform(rng, SMALL), running_mean=mean.array, running_var=var.array)
    assert mean.untouched()
    assert var.untouched()


def test_the_guards_notice():
    out = Guarded((3, 4), np.float32, "step")
    out.array[...] = 0
    assert out.untouched()
    assert not out.unwritten()
    out.buffer[np.flatnonzero(out.outside)[100]] = POISON ^ 1
    assert not out.untouched()
