"""The two phases: whole arrays, tiles, streams. Moments merge, sums add, and both give what one call gives."""

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import bounds
import normkit
import numpy as np
import pytest
from activations import ACTIVATIONS, name_of
from cases import DTYPES, INTEGERS, LAYOUTS, MASKS, SHAPES, Guarded, bits, lay, uniform
from checks import check_backward, check_sample, same_order, statistics_of, unchanged
from reference import REGISTRY

SMALL = (3, 5, 4, 7)
NORMALIZE = [op for op in REGISTRY if op.function == "normalize"]
CENTERED = [op for op in NORMALIZE if op.center]


def axis_of(op, shape):
    return op.options(shape)["axis"]


def moments(op, x, **options):
    return normkit.moments(x, axis=axis_of(op, x.shape), center=op.center, **options)


def mean_of(op, m):
    """The mean that apply and the backward take: None where nothing is centered."""
    return m.mean if op.center else None


def check_moments(op, m, x, where=None):
    f = op.reference(x, where=where, eps=0.0)
    kept = op.statistics_shape(x.shape)
    assert (m.mean is None) == (not op.center)
    for found in (m.count, m.m2, m.mean_low, *[m.mean] * op.center):
        assert isinstance(found, np.ndarray)
        assert (found.shape, found.dtype) == (kept, np.float64)
    members = np.broadcast_to(f.members, f.mean.shape)
    assert (m.count == members.reshape(kept)).all()
    if op.center:
        rest = (m.mean.reshape(f.mean.shape) - f.mean) + m.mean_low.reshape(f.mean.shape)
        assert bounds.excess(rest, f.rest, bounds.mean_error(f, x.dtype) + 1e-300) <= 1
    # What moves rstd by r moves var by 2 r.
    off = 2 * bounds.rstd_error(f, x.dtype) * f.var * members + 1e-300
    assert bounds.excess(m.m2.reshape(f.var.shape), f.var * members, off) <= 1
    return f


def check_y(y, f, x, **options):
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype, y.dtype, **options)) <= 1


def parameters(op, shape, rng, kind="channel"):
    return [np.asarray(rng.standard_normal(op.weight_shape(shape, kind))).astype(np.float32) for _ in range(2)]


def tiles(shape, axis, size):
    for first in range(0, shape[axis], size):
        yield (slice(None),) * (axis % len(shape)) + (slice(first, first + size),)


def backward(op, dy, x, mean, rstd, weight=None, *, count, parts=None, **options):
    """Both phases of the gradient, the sums of the tiles `parts` added."""
    options["axis"] = axis_of(op, x.shape)
    dresidual = options.pop("dresidual", None)
    summed = {**options}
    sums = []
    for part in parts or [...]:
        if options.get("where") is not None:
            summed["where"] = np.broadcast_to(options["where"], x.shape)[part]
        sums.append(normkit.backward_sums(dy[part], x[part], mean, rstd, weight, **summed))
    last = {} if dresidual is None else {"dresidual": dresidual}
    return normkit.apply_backward(dy, x, mean, rstd, sum(sums[1:], sums[0]), count, weight, **options, **last)


def check_dx(op, dx, dy, x, mean, rstd, weight=None, **options):
    b = op.reference_backward(dy, x, mean, rstd, weight, **options)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert bounds.excess(dx.reshape(b.dx.shape), b.dx, bounds.dx(b, x.dtype)) <= 1


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop", "step"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_whole_arrays(op, layout, dtype, isa, rng):
    x = lay(uniform(rng, SMALL, dtype, offset=0.25), layout)
    weight, bias = parameters(op, SMALL, rng)
    with unchanged(x, weight, bias):
        m = moments(op, x)
        y = normkit.apply(x, mean_of(op, m), m.rstd(), weight, bias, axis=axis_of(op, SMALL))
    check_moments(op, m, x)
    assert y.dtype == (dtype if dtype in DTYPES.values() else np.float32)
    assert same_order(x, y)
    check_y(y, op.reference(x, weight, bias), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_whole_arrays_have_the_bits_of_one_call(op, layout, isa, rng):
    """There are no weights, as weights of some shapes have x packed first, which sums in another order."""
    x = lay(uniform(rng, (3, 5, 6, 70), offset=0.25), layout)
    m = moments(op, x)
    y = normkit.apply(x, mean_of(op, m), m.rstd(1e-5), axis=axis_of(op, x.shape))
    found, mean, rstd = op.statistics(x)
    assert bits(m.rstd(1e-5).astype(np.float32)) == bits(rstd)
    assert mean is None or bits(m.mean.astype(np.float32)) == bits(mean)
    assert bits(y) == bits(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [op for op in CENTERED if op.name in ("over-last", "over-first")], ids=repr)
def test_every_length(op, shape, isa, rng):
    x = uniform(rng, SHAPES[shape])
    m = moments(op, x)
    check_moments(op, m, x)
    check_y(normkit.apply(x, m.mean, m.rstd(), axis=axis_of(op, x.shape)), op.reference(x), x)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_moments_of_members(op, mask, isa, rng):
    x, where = uniform(rng, SMALL), MASKS[mask](rng, SMALL)
    x[~np.broadcast_to(where, SMALL)] += 300
    m = moments(op, x, where=where)
    f = check_moments(op, m, x, where)
    rstd = m.rstd()
    assert (rstd[m.count == 0] == 0).all()
    assert np.isfinite(m.var()).all()
    f = op.reference(x, where=where)
    check_y(normkit.apply(x, mean_of(op, m), rstd, axis=axis_of(op, SMALL)), f, x)


@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_moments_of_nothing(op):
    x = np.full(SMALL, np.nan, np.float32)
    m = moments(op, x, where=np.zeros(SMALL, bool))
    for found in (m.count, *[m.mean] * op.center, m.m2, m.var(), m.var(correction=1), m.rstd(), m.rstd(eps=0.0)):
        assert found.shape == op.statistics_shape(SMALL)
        assert (found == 0).all()


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_nothing_changes_nothing(op, rng):
    """Moments stay as they are when they are merged with the moments of no members, from either side."""
    x = uniform(rng, SMALL)
    m, nothing = moments(op, x), moments(op, x, where=np.zeros(SMALL, bool))
    for found in (m.merge(nothing), nothing.merge(m), normkit.merge([nothing, m, nothing])):
        for name in ("count", "mean", "m2", "mean_low"):
            assert bits(getattr(found, name)) == bits(getattr(m, name))
    both = nothing.merge(nothing)
    assert not both.count.any()
    assert not both.mean.any()
    assert not both.m2.any()


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_merge_changes_neither(op, rng):
    a, b = (moments(op, uniform(rng, SMALL)) for _ in range(2))
    before = [bits(getattr(m, name)) for m in (a, b) for name in ("count", "mean", "m2")]
    a.merge(b)
    normkit.merge([a, b])
    assert [bits(getattr(m, name)) for m in (a, b) for name in ("count", "mean", "m2")] == before


@pytest.mark.skipif("NORMKIT_TEST_ARRAYS" in os.environ, reason="what mirrors Moments is no value")
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_moments_are_values(op, rng):
    """Moments are pickled and copied, are equal or not, and nobody reaches into them."""
    x = uniform(rng, SMALL)
    m = moments(op, x)
    before = bits(m.m2)
    for again in (pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)):
        assert again == m
        assert bits(again.m2) == before
    stored = normkit.Moments(m.count.astype(np.int64), m.mean, m.m2)
    assert stored == m
    assert normkit.Moments(m.count, m.mean, m.m2, m.m2) != m
    assert normkit.Moments(m.count.flat[0], m.mean, m.m2) == m  # all count the same
    assert bits(stored.merge(m).m2) == bits(m.merge(m).m2)
    more = m.m2.copy()
    more.flat[-1] += 1
    assert m != normkit.Moments(m.count, m.mean, more)
    assert m != normkit.Moments(m.count, np.zeros_like(more) if m.mean is None else None, m.m2)
    assert m != moments(op, x[:, :4, :3, :6])
    assert m != 3
    for array in (m.count, m.m2, m.m2 if m.mean is None else m.mean):
        array[...] = np.nan
    assert bits(m.m2) == before
    assert bits(m.std(1)) == bits(np.sqrt(m.var(1)))
    unhappy = normkit.Moments(m.count, m.mean, m.m2 * np.nan)
    assert unhappy == copy.copy(unhappy)
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"count": -1}, ValueError, "count has what is negative or NaN, expected the number of members"),
        ({"count": np.array([3.0, np.nan])}, ValueError, "count has what is negative or NaN"),
        ({"mean": np.timedelta64(1, "s")}, TypeError, "mean is a timedelta64, expected"),
        ({"m2": 1j}, TypeError, "m2 is a complex, expected"),
    ],
)
def test_what_are_no_moments(given, kind, message):
    good = {"count": np.array([0, 3]), "mean": np.array([0.0, 1.0]), "m2": np.array([0.0, 2.0])}
    normkit.Moments(**good)
    with pytest.raises(kind, match=f"^{message}"):
        normkit.Moments(**good | given)


@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_variance_and_rstd(op, rng):
    x = uniform(rng, SMALL, np.float64)
    m = moments(op, x)
    f = op.reference(x)
    off = 2 * bounds.rstd_error(f, x.dtype) * f.var
    kept = f.var.shape
    assert bounds.excess(m.var().reshape(kept), f.var, off + bounds.stored(f.var, "float64")) <= 1
    unbiased = f.var * f.members / (f.members - 1)
    assert bounds.excess(m.var(correction=1).reshape(kept), unbiased, 2 * off + 4 * bounds.DOUBLE * unbiased) <= 1
    assert bounds.excess(m.rstd().reshape(kept), f.rstd, bounds.rstd(f, x.dtype)) <= 1
    assert bits(m.rstd()) == bits(m.rstd(1e-5)) == bits(m.rstd(eps=1e-5))
    f = op.reference(x, eps=2.0)
    assert bounds.excess(m.rstd(eps=2.0).reshape(kept), f.rstd, bounds.rstd(f, x.dtype)) <= 1


def test_a_constant_has_no_variance_and_no_infinite_rstd():
    m = normkit.moments(np.full((3, 50), 0.7, np.float32), axis=1)
    assert (m.m2 == 0).all()
    assert (m.var() == 0).all()
    assert (m.rstd(eps=0.0) == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_tiles_merge(op, dtype, size, isa, rng):
    """Tiles along every reduced axis keep the bound of the whole, and a rounding of doubles for every merge."""
    x = uniform(rng, SMALL, dtype, offset=0.25)
    for axis in op.reduced(SMALL):
        parts = [moments(op, x[part]) for part in tiles(SMALL, axis, size)]
        m = normkit.merge(parts)
        check_moments(op, m, x)
        one_by_one = parts[0]
        for part in parts[1:]:
            one_by_one = one_by_one.merge(part)
        assert all(bits(getattr(m, n)) == bits(getattr(one_by_one, n)) for n in ("count", "mean", "m2"))
        for part in tiles(SMALL, axis, size):
            y = normkit.apply(x[part], mean_of(op, m), m.rstd(), axis=axis_of(op, SMALL))
            f = op.reference(x)
            bound = bounds.y(f, dtype).reshape(SMALL)[part]
            assert bounds.excess(y, f.y.reshape(SMALL)[part], bound) <= 1


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_tiles_far_from_each_other(offset, isa, rng):
    """Means that lie apart: what m2 gains from their distance, and none of its digits."""
    x = uniform(rng, (4, 3000), offset=offset)
    x[:, 1000:2000] += 50
    parts = [normkit.moments(x[:, k : k + 300], axis=1) for k in range(0, 3000, 300)]
    op = next(op for op in NORMALIZE if op.name == "over-last")
    check_moments(op, normkit.merge(parts), x)
    check_moments(op, normkit.merge(parts[::-1]), x)


@pytest.mark.parametrize("mask", ["random", "sparse", "lengths"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_masked_tiles_merge(op, mask, isa, rng):
    x, where = uniform(rng, SMALL), np.broadcast_to(MASKS[mask](rng, SMALL), SMALL)
    for axis in op.reduced(SMALL):
        parts = [moments(op, x[part], where=where[part]) for part in tiles(SMALL, axis, 2)]
        check_moments(op, normkit.merge(parts), x, where)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [16384, 3 * 16384, 3 * 16384 + 5000, 100_000])
@pytest.mark.parametrize("rows", [1, 3])
def test_tiles_that_are_spans_have_the_bits_of_the_whole(rows, length, dtype, isa, rng):
    """Tiles are merged from left to right, as one call merges its spans."""
    if isa == "shim" or "NORMKIT_TEST_ARRAYS" in os.environ:
        pytest.skip("spans are the CPU's: on a GPU tiles meet as a tree")
    x = uniform(rng, (rows, length), dtype, offset=0.3)
    whole = normkit.moments(x, axis=-1)
    m = normkit.merge([normkit.moments(x[part], axis=-1) for part in tiles(x.shape, 1, 16384)])
    for name in ("count", "mean", "m2", "mean_low"):
        assert bits(getattr(m, name)) == bits(getattr(whole, name))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [SMALL, (2, 3, 70, 300)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_moments_give_the_bits_of_one_call(op, layout, shape, dtype, isa, rng):
    """Far from zero, in the place of a mean. What a float64 mean has left over does count: without it bits differ."""
    offset = 2.0**24 if dtype == np.float64 else 8
    dy, x = lay(uniform(rng, shape, dtype), layout), lay(uniform(rng, shape, dtype, offset=offset), layout)
    weight, bias = parameters(op, shape, rng)
    axis, eps = axis_of(op, shape), 1e-3
    m = moments(op, x)
    low = m.mean_low
    assert (low.shape, low.dtype) == (m.count.shape, np.float64)
    assert (np.abs(low).max() > 0) == (op.center and dtype == np.float64)
    y, *stats = normkit.normalize(x, axis=axis, weight=weight, bias=bias, eps=eps, center=op.center, return_stats=True)
    assert bits(normkit.apply(x, m, m.rstd(eps), weight, bias, axis=axis)) == bits(y)
    alone = normkit.apply(x, m.mean, m.rstd(eps), weight, bias, axis=axis)
    assert (bits(alone) == bits(y)) == (not np.abs(low).max() > 0)
    mean, rstd = (stats if op.center else [None, *stats]) if dtype == np.float64 else (mean_of(op, m), m.rstd(eps))
    dx = normkit.normalize_backward(dy, x, mean, rstd, weight, axis=axis, center=op.center, need=("dx",))[0]
    sums = normkit.backward_sums(dy, x, m, rstd, weight, axis=axis)
    assert bits(normkit.apply_backward(dy, x, m, rstd, sums, m.count, weight, axis=axis)) == bits(dx)


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_a_mean_of_float64_is_two_numbers(op, isa, rng):
    """Of the whole, of tiles that are merged, and beside moments of nothing."""
    x = uniform(rng, SMALL, np.float64, offset=1e8)
    none = moments(op, x, where=np.zeros(SMALL, bool))
    whole = moments(op, x)
    for axis in op.reduced(SMALL):
        tiled = normkit.merge([none, *(moments(op, x[part]) for part in tiles(SMALL, axis, 2)), none])
        for m in (whole, tiled):
            assert (np.abs(m.mean_low) <= np.spacing(m.mean)).all()
            check_moments(op, m, x)
    for found in (none.merge(whole), whole.merge(none)):
        assert bits(found.mean_low) == bits(whole.mean_low)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("members", [16, 1000, 100_000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_moments_are_as_exact_as_they_say(layout, members, offset, isa, rng):
    x = lay((rng.standard_normal((32, members)) + offset).astype(np.float32), layout)
    m, wide = normkit.moments(x, axis=1), x.astype(np.longdouble)
    mean, var = wide.mean(1), wide.var(1)
    assert (np.abs(m.mean - mean) <= 1e-6 * np.sqrt(var)).all()
    assert (np.abs(m.m2 - members * var) <= 1e-5 * members * var).all()


@pytest.mark.parametrize("mean_dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_apply_takes_statistics_of_either_dtype(op, mean_dtype, isa, rng):
    """A float64 mean keeps its digits; a float32 one is taken at its word."""
    x = uniform(rng, SMALL, offset=1e4)
    kept = op.statistics_shape(SMALL)
    mean, rstd = (1e4 + rng.uniform(-1, 1, kept)).astype(mean_dtype), rng.uniform(0.5, 2, kept).astype(mean_dtype)
    weight, bias = parameters(op, SMALL, rng)
    y = normkit.apply(x, mean, rstd, weight, bias, axis=axis_of(op, SMALL))
    check_y(y, frozen(op, x, mean, rstd, weight, bias), x)


def frozen(op, x, mean, rstd, weight, bias, **options):
    """The reference for statistics that are given."""
    f = op.reference(x, weight, bias, **options)
    f.mean, f.rstd = (a.astype(f.x.dtype).reshape(f.mean.shape) for a in (mean, rstd))
    f.x_hat = (f.x - f.mean) * f.rstd
    f.z = f.y = f.x_hat * f.weight + f.bias
    f.var = None
    return f


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=name_of)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_activations_and_offsets(op, activation, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight, bias = parameters(op, SMALL, rng)
    options = {"activation": activation, "weight_offset": 1.0}
    m = moments(op, x)
    mean, rstd = mean_of(op, m), m.rstd()
    y = normkit.apply(x, mean, rstd, weight, bias, axis=axis_of(op, SMALL), **options)
    check_y(y, op.reference(x, weight, bias, **options), x)
    dx = backward(op, dy, x, mean, rstd, weight, count=m.count, bias=bias, **options)
    check_dx(op, dx, dy, x, mean, rstd, weight, bias=bias, **options)


@pytest.mark.parametrize("layout", ["contiguous", "crop", "step"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_apply_out(op, dtype, layout, rng):
    x = lay(uniform(rng, SMALL, dtype), layout)
    m = moments(op, x)
    given = mean_of(op, m), m.rstd()
    y = normkit.apply(x, *given, axis=axis_of(op, SMALL))
    out = Guarded(SMALL, dtype, layout)
    assert normkit.apply(x, *given, axis=axis_of(op, SMALL), out=out.array) is out.array
    assert bits(out.array) == bits(y)
    assert out.untouched()
    assert normkit.apply(x, *given, axis=axis_of(op, SMALL), out_dtype=np.float64).dtype == np.float64
    assert bits(normkit.apply(x, *given, axis=axis_of(op, SMALL), out=x)) == bits(y)


@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_backward_of_whole_arrays(op, layout, dtype, stats_dtype, rng):
    dy, x = lay(uniform(rng, SMALL, dtype), layout), lay(uniform(rng, SMALL, dtype, offset=3), layout)
    weight = parameters(op, SMALL, rng)[0]
    m = moments(op, x)
    mean, rstd = m.mean.astype(stats_dtype) if op.center else None, m.rstd().astype(stats_dtype)
    with unchanged(dy, x, weight, mean, rstd):
        dx = backward(op, dy, x, mean, rstd, weight, count=m.count)
    check_dx(op, dx, dy, x, mean, rstd, weight)
    members = int(m.count.ravel()[0])
    assert bits(backward(op, dy, x, mean, rstd, weight, count=members)) == bits(dx)
    check_backward(op, dy, x, weight, stats=(mean, rstd))


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float32", "float16", ">f8"])
def test_counts_of_any_dtype(dtype, rng):
    dy, x = uniform(rng, (3, 70)), uniform(rng, (3, 70))
    m = normkit.moments(x, axis=1)
    sums = normkit.backward_sums(dy, x, m.mean, m.rstd(), axis=1)
    dx = normkit.apply_backward(dy, x, m.mean, m.rstd(), sums, m.count, axis=1)
    found = normkit.apply_backward(dy, x, m.mean, m.rstd(), sums, m.count.astype(dtype), axis=1)
    assert bits(found) == bits(dx)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["channel", "kept"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_sums_of_tiles_add(op, kind, size, isa, rng):
    """Tiles lie along every reduced axis, and the mean is rounded, far from zero: together they find what it lacks."""
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL, offset=1e3)
    weight = parameters(op, SMALL, rng, kind)[0]
    m = moments(op, x)
    mean, rstd = m.mean.astype(np.float32) if op.center else None, m.rstd().astype(np.float32)
    for axis in op.reduced(SMALL):
        if weight.ndim and weight.shape[axis - x.ndim if axis - x.ndim >= -weight.ndim else 0] > 1:
            continue  # a weight along the tiles would be cut as well: the next test
        dx = backward(op, dy, x, mean, rstd, weight, count=m.count, parts=list(tiles(SMALL, axis, size)))
        check_dx(op, dx, dy, x, mean, rstd, weight)


def test_tiles_take_their_part_of_the_weight(isa, rng):
    """Both phases by tiles, each with the weight of its own elements."""
    dy, x = uniform(rng, (6, 1000)), uniform(rng, (6, 1000))
    weight = rng.standard_normal(1000).astype(np.float32)
    op = next(op for op in NORMALIZE if op.name == "over-last")
    m, rstd = normkit.moments(x, axis=1), normkit.moments(x, axis=1).rstd()
    parts = [slice(k, k + 300) for k in range(0, 1000, 300)]
    cut = [(dy[:, p], x[:, p], m.mean, rstd) for p in parts]
    sums = sum(normkit.backward_sums(*a, weight[p], axis=1) for a, p in zip(cut, parts, strict=True))
    dx = [normkit.apply_backward(*a, sums, m.count, weight[p], axis=1) for a, p in zip(cut, parts, strict=True)]
    check_dx(op, np.concatenate(dx, 1), dy, x, m.mean, rstd, weight)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_backward_of_members(op, mask, isa, rng):
    dy, x, where = uniform(rng, SMALL), uniform(rng, SMALL), MASKS[mask](rng, SMALL)
    weight, bias = parameters(op, SMALL, rng)
    m = moments(op, x, where=where)
    mean, rstd = mean_of(op, m), m.rstd()
    options = {"where": where, "bias": bias, "activation": "silu"}
    for axis in (None, *op.reduced(SMALL)):
        if axis is not None and weight.shape[axis - x.ndim if axis - x.ndim >= -weight.ndim else 0] > 1:
            continue
        options["bias"] = bias if axis is None else None
        parts = None if axis is None else list(tiles(SMALL, axis, 2))
        dx = backward(op, dy, x, mean, rstd, weight, count=m.count, parts=parts, **options)
        check_dx(op, dx, dy, x, mean, rstd, weight, **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", NORMALIZE, ids=repr)
def test_backward_out_and_residual(op, layout, isa, rng):
    dy, x, dresidual = (lay(uniform(rng, SMALL), layout) for _ in range(3))
    m = moments(op, x)
    mean, rstd, axis = mean_of(op, m), m.rstd(), axis_of(op, SMALL)
    dx = backward(op, dy, x, mean, rstd, count=m.count, dresidual=dresidual)
    check_dx(op, dx, dy, x, mean, rstd, dresidual=dresidual)
    sums = normkit.backward_sums(dy, x, mean, rstd, axis=axis)
    plain = normkit.apply_backward(dy, x, mean, rstd, sums, m.count, axis=axis)
    out = Guarded(SMALL, np.float32, layout)
    assert normkit.apply_backward(dy, x, mean, rstd, sums, m.count, axis=axis, out=out.array) is out.array
    assert bits(out.array) == bits(plain)
    assert out.untouched()


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_images_by_themselves(op, rng):
    """Tiles along a kept axis need no merging: the same bits."""
    kept = [a for a in range(4) if a not in op.reduced(SMALL)]
    x = uniform(rng, SMALL)
    m = moments(op, x)
    one = (slice(None),) * kept[0] + (slice(1, 2),)
    part = moments(op, np.ascontiguousarray(x[one]))
    f = op.reference(x)
    index = (slice(None),) * kept.index(kept[0]) + (slice(1, 2),)
    for name in ("count", "mean", "m2"):
        assert getattr(part, name).shape == getattr(m, name)[index].shape
    assert (part.count == m.count[index]).all()
    bound = 2 * bounds.mean_error(f, np.float32).reshape(m.mean.shape)[index] + 1e-300
    assert (np.abs(part.mean - m.mean[index]) <= bound).all()


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_thread_counts_agree(op, rng):
    dy, x = uniform(rng, (33, 3, 17, 100)), uniform(rng, (33, 3, 17, 100))
    found = []
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            m = moments(op, x)
            y = normkit.apply(x, m.mean, m.rstd(), axis=axis_of(op, x.shape))
            dx = backward(op, dy, x, m.mean, m.rstd(), count=m.count)
            found.append([bits(a) for a in (m.mean, m.m2, y, dx)])
    assert all(f == found[0] for f in found)


STREAM = """
import mmap, resource, sys
import numpy as np
import normkit as nk

source, target, rows, columns, step = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])

def tile(path, first, mode):
    shape = (min(step, rows - first), columns)
    return np.memmap(path, np.float32, mode, 4 * columns * first, shape)

warm = np.ones((4096, columns), np.float32)  # threads start, and take their stacks, before memory is counted
m = nk.moments(warm, axis=0)
nk.apply(warm, m.mean, m.rstd(), axis=0, out=warm)
del warm, m
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * mmap.PAGESIZE + (128 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

try:
    np.fromfile(source, np.float32)
except MemoryError:
    print("the limit is real")

def parts():
    for first in range(0, rows, step):
        yield nk.moments(tile(source, first, "r"), axis=0)

m = nk.merge(list(parts()))
for first in range(0, rows, step):
    nk.apply(tile(source, first, "r"), m.mean, m.rstd(), axis=0, out=tile(target, first, "r+"))
np.save(sys.argv[6], [m.count, m.mean, m.m2])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory as Linux does")
def test_a_file_larger_than_memory(tmp_path, rng):
    """256 MB, tile by tile, in a process that may take 128 MB; the truth in float64, tile by tile as well."""
    rows, columns, step = 1 << 20, 64, 1 << 14
    source, target, stats = (tmp_path / name for name in ("x", "y", "stats.npy"))
    truth = np.zeros((3, columns))  # count, sum, sum of squares about the offset of each column
    offset = np.linspace(-1000, 1000, columns)
    try:
        with source.open("wb") as file:
            for _ in range(0, rows, step):
                x = (rng.random((step, columns), np.float32) + offset).astype(np.float32)
                d = x - offset
                truth += np.stack([np.full(columns, step), d.sum(0), (d * d).sum(0)])
                file.write(x)
        with target.open("wb") as file:
            file.truncate(4 * rows * columns)
        arguments = [source, target, rows, columns, step, stats]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(STREAM), *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "the limit is real\n"

        count, mean, m2 = np.load(stats)
        average = truth[1] / rows
        var = truth[2] / rows - average**2
        assert (count == rows).all()
        # A column sums 2^20 deviations below 1 in chunks: as any other statistic of as many members.
        f = statistics_of(mean=average + offset, var=var, members=rows, farthest=1.0, largest=np.abs(offset) + 1)
        assert bounds.excess(mean, f.mean, bounds.mean_error(f, np.float32)) <= 1
        assert bounds.excess(m2 / rows, f.var, 2 * bounds.rstd_error(f, np.float32) * f.var) <= 1
        for first in range(0, rows, step):
            place = {"dtype": np.float32, "mode": "r", "offset": 4 * columns * first, "shape": (step, columns)}
            part = slice(first % 7, None, 7)
            x, y = (np.asarray(np.memmap(path, **place)[part]) for path in (source, target))
            check_sample(f, x, y)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


X = np.ones((2, 3, 8), np.float32)
STATS = np.ones((2, 3))
ERRORS = {
    "moments-axis": (lambda: normkit.moments(X, axis=3), np.exceptions.AxisError, "axis"),
    "moments-dtype": (lambda: normkit.moments(X.astype(complex), axis=2), TypeError, "^x has dtype complex128"),
    "moments-where": (lambda: normkit.moments(X, axis=2, where=np.ones(8)), TypeError, "^where has dtype float64"),
    "mean": (
        lambda: normkit.apply(X, np.ones((3, 2)), STATS, axis=2),
        ValueError,
        r"^mean has shape \(3, 2\), expected \(2, 3\)",
    ),
    "rstd": (
        lambda: normkit.apply(X, STATS, np.ones((3, 2)), axis=2),
        ValueError,
        r"^rstd has shape \(3, 2\), expected \(2, 3\)",
    ),
    "weight": (lambda: normkit.apply(X, STATS, STATS, np.ones(4), axis=2), ValueError, r"^weight has shape \(4,\)"),
    "sums": (
        lambda: normkit.apply_backward(X, X, STATS, STATS, np.ones(5), 8, axis=2),
        (TypeError, ValueError),
        "^sums ",
    ),
    "count": (
        lambda: normkit.apply_backward(
            X, X, STATS, STATS, normkit.backward_sums(X, X, STATS, STATS, axis=2), np.ones((3, 2)), axis=2
        ),
        ValueError,
        "^count has shape",
    ),
    **{
        f"moments-of-other-axes-{name}": (call, ValueError, r"^mean has shape \(2, 8\), expected \(2, 3\)")
        for name, call in (
            ("apply", lambda: normkit.apply(X, normkit.moments(X, axis=1), STATS, axis=2)),
            ("apply-float64", lambda: normkit.apply(X * 1.0, normkit.moments(X * 1.0, axis=1), STATS, axis=2)),
            ("backward", lambda: normkit.backward_sums(X, X, normkit.moments(X, axis=1), STATS, axis=2)),
        )
    },
    **{
        f"count-{count}": (
            lambda count=count: normkit.apply_backward(X, X, STATS, STATS, np.ones((2, 3, 3)), count, axis=2),
            ValueError,
            f"^count is {count}, expected the number of members of each statistic$",
        )
        for count in (-4, math.nan)
    },
    "moments-too-large": (
        lambda: normkit.Moments(10**400, 0, 0),
        ValueError,
        "^count is 10+, expected a number that float64 has$",
    ),
    "merge-other-shapes": (
        lambda: normkit.moments(X, axis=2).merge(normkit.moments(X, axis=1)),
        ValueError,
        "shape",
    ),
    "merge-nothing": (lambda: normkit.merge([]), ValueError, "moments"),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
