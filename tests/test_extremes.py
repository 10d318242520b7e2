"""Extremes for every operation: far from zero, at the limits of float16, constant, alone; a hundred million members."""

import itertools
import math

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, MASKS, bits, lay, uniform
from checks import check_backward, check_forward, check_sample, statistics_of
from reference import REGISTRY

SMALL = (3, 5, 4, 7)
LONG = (4, 6, 33, 20)
CENTERED = [op for op in REGISTRY if op.center]


FAR = {"float32": 1e6, "float64": 1e8}


@pytest.mark.parametrize("dtype", FAR)
@pytest.mark.parametrize("shape", [SMALL, LONG], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_mean_of_a_million(op, layout, shape, dtype, isa, rng):
    """The data have a standard deviation of 1, with a mean of a million in float32, of a hundred in float64: forward,
    backward, with and without a mask."""
    dy, x = uniform(rng, shape, dtype), (FAR[dtype] + rng.standard_normal(shape)).astype(dtype)
    dy, x = lay(dy, layout), lay(x, layout)
    check_forward(op, x)
    check_backward(op, dy, x)
    where = MASKS["random"](rng, shape)
    check_forward(op, x, where=where)
    check_backward(op, dy, x, where=where)


@pytest.mark.parametrize("dtype", FAR)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_a_mean_of_a_million_costs_few_ulp(op, layout, dtype, isa, rng):
    """The promise of the contract: near zero an ulp is that of 1, the spread of the answer. Statistics of float64 have
    no wider type: a square is rounded with up to 24 sums that it goes into, of which the root keeps half, and an ulp is
    at least as much as a rounding. A mean that were rounded to one number would cost up to 2^26."""
    x = lay((FAR[dtype] + rng.standard_normal(LONG)).astype(dtype), layout)
    y, truth = op.forward(x), op.reference(x).y.reshape(LONG)
    ulp = np.spacing(np.maximum(np.abs(truth), 1).astype(dtype)).astype(truth.dtype)
    cost = 12 if dtype == "float64" else 4
    assert bounds.excess(y, truth, cost * ulp + bounds.stored(truth, dtype)) <= 1


@pytest.mark.parametrize("kind", ["both-limits", "one-limit-and-noise", "all-but-one"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_float16_at_its_limits(op, layout, kind, isa, rng):
    """Squares and sums far beyond float16."""
    x = rng.choice([-60000.0, 60000.0], LONG)
    if kind == "one-limit-and-noise":
        x = 60000 + 64 * rng.integers(-8, 8, LONG)
    if kind == "all-but-one":
        x = np.where(rng.random(LONG) < 0.9, 60000.0, 1.0)
    x, dy = lay(x.astype(np.float16), layout), lay(uniform(rng, LONG, np.float16), layout)
    check_forward(op, x)
    check_backward(op, dy, x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.7, -1e-4, 6e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_constants(op, layout, value, dtype, isa, rng):
    """y is exactly the bias where there is a mean to subtract, whatever eps is, and gradients are finite."""
    dy, x = lay(uniform(rng, SMALL, dtype), layout), lay(np.full(SMALL, value).astype(dtype), layout)
    bias = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32)
    if op.center:
        expected = op.reference(x, None, bias).bias.reshape(SMALL).astype(dtype)
        for eps in (0.0, 1e-5):
            assert bits(op.forward(x, None, bias, eps=eps)) == bits(expected)
    check_forward(op, x, None, bias)
    check_backward(op, dy, x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_one_member(op, dtype, isa, rng):
    """Every shape of few axes that leaves each statistic alone with itself."""
    seen = 0
    for shape in itertools.product((1, 3), (1, 5), (1, 4), (1, 7)):
        if math.prod(op.blocks(shape)[a] for a in op.reduced(shape)) != 1:
            continue
        seen += 1
        dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=2)
        bias = rng.standard_normal(op.weight_shape(shape, "channel")).astype(np.float32)
        y = check_forward(op, x, None, bias)
        check_backward(op, dy, x)
        if op.center:
            assert bits(y) == bits(op.reference(x, None, bias).bias.reshape(shape).astype(dtype))
            assert not op.forward(x, eps=0.0).any()
    assert seen


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e18, 1e37])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_squares_beyond_float32(op, scale, isa, rng):
    x = uniform(rng, SMALL, std=scale, offset=scale)
    y, truth = op.forward(x, eps=0.0), op.reference(x, eps=0.0)
    # A subnormal has fewer digits than u promises: its distance to the next, seen through rstd.
    bound = bounds.y(truth, x.dtype) + 2 * bounds.SMALLEST["float32"] * np.abs(truth.rstd)
    assert np.isfinite(y).all()
    assert bounds.excess(y.reshape(truth.y.shape), truth.y, bound) <= 1


HUGE = 100_000_000
CHUNK = 1 << 20


@pytest.fixture(scope="module")
def huge():
    """A hundred million float32 from 1000 to 1001, and an output as large."""
    rng = np.random.default_rng(8)
    x, y = np.empty(HUGE, np.float32), np.empty(HUGE, np.float32)
    for k in range(0, HUGE, CHUNK):
        part = x[k : k + CHUNK]
        rng.random(dtype=np.float32, out=part)
        part += 1000
    return x, y


def truth_of(x, columns, *, center=True):
    """Mean and variance of every column, from sums about a number near all of them."""
    rows = x.reshape(-1, columns)
    step = max(CHUNK // columns, 1)
    pivot = 1000.5 if center else 0.0
    total, squares = np.zeros(columns), np.zeros(columns)
    for k in range(0, len(rows), step):
        d = rows[k : k + step].astype(np.float64) - pivot
        total += d.sum(0)
        squares += np.einsum("ij,ij->j", d, d)
    mean, var = total / len(rows), squares / len(rows)
    if not center:
        return statistics_of(mean=np.zeros(columns), var=var, members=len(rows), farthest=1001.0, largest=1001.0)
    return statistics_of(mean=pivot + mean, var=var - mean**2, members=len(rows), farthest=0.6, largest=1001.0)


HUGE_CALLS = {
    "instance": ((1, 1, HUGE), 1, lambda x, out: normkit.instance_norm(x, out=out, return_stats=True)),
    "batch-across-lanes": (
        (HUGE // 64, 64),
        64,
        lambda x, out: normkit.batch_norm(x, training=True, channel_axis=-1, out=out, return_stats=True),
    ),
    "layer-over-all-axes": (
        (10_000, 10_000),
        1,
        lambda x, out: normkit.layer_norm(x, axis=(0, 1), out=out, return_stats=True),
    ),
    "rms": ((1, HUGE), 1, lambda x, out: normkit.rms_norm(x, eps=1e-5, out=out, return_stats=True)),
}


@pytest.mark.parametrize(("shape", "columns", "call"), HUGE_CALLS.values(), ids=HUGE_CALLS)
def test_a_hundred_million_members(shape, columns, call, huge):
    """Long sums lose nothing: the bounds do not grow with the members, beyond a rounding of doubles for every chunk."""
    x, y = (a.reshape(shape) for a in huge)
    found, *mean, rstd = call(x, y)
    assert found is y
    f = truth_of(huge[0], columns, center=bool(mean))
    assert bounds.excess(rstd.ravel(), f.rstd, bounds.rstd(f, x.dtype)) <= 1
    if mean:
        assert bounds.excess(mean[0].ravel(), f.mean, bounds.mean(f, x.dtype)) <= 1
    rows = slice(0, None, 9973 // columns)
    check_sample(f, huge[0].reshape(-1, columns)[rows], huge[1].reshape(-1, columns)[rows])
