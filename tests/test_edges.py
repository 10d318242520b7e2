"""Every row of the contract's table of edges."""

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, INTEGERS, SHAPES, bits, lay, uniform
from checks import check_backward, check_forward
from reference import OPERATIONS, REGISTRY

INSTANCE = OPERATIONS["instance"]
CENTERED = [op for op in REGISTRY if op.center]
RUNS = ["contiguous", "channels-last"]
CONSTANTS = [0.0, 1.0, -0.1, 1e-30, 1e6, 3e4]


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 5, 5), (2, 17, 300), (1, 2, 9000), (1, 2, 70000)], ids=str)
@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_constant_gives_exactly_the_bias(eps, layout, shape, dtype, isa, rng):
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    for value in CONSTANTS if dtype in DTYPES.values() else [0, 1, 100]:
        if value > 65504 and dtype == np.float16:
            continue
        x = lay(np.full(shape, value).astype(dtype), layout)
        y = INSTANCE.forward(x, weight, bias, eps=eps)
        expected = np.broadcast_to(bias.reshape(-1, *[1] * (len(shape) - 2)), shape).astype(y.dtype)
        assert bits(y) == bits(expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_constant_gives_exactly_the_bias_of_each_element(op, kind, dtype, isa, rng):
    x = np.full((3, 5, 4, 7), 0.7).astype(dtype)
    weight, bias = rng.standard_normal((2, *op.weight_shape(x.shape, kind))).astype(np.float32)
    assert bits(op.forward(x, weight, bias)) == bits(
        np.broadcast_to(bias, x.shape).astype(dtype)
        if op.function == "normalize" or bias.shape == x.shape
        else op.reference(x, weight, bias).bias.astype(dtype)
    )


@pytest.mark.parametrize("op", CENTERED, ids=repr)
def test_constant_has_no_infinite_gradient(op, isa, rng):
    x = np.full((3, 5, 4, 7), 0.7, np.float32)
    dy = uniform(rng, x.shape)
    check_backward(op, dy, x)
    mean, rstd = op.statistics(x, eps=0.0)[1:]
    assert not rstd.any()
    assert not op.backward(dy, x, mean, rstd)[0].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_member_has_no_gradient_but_rounding(dtype, isa, rng):
    dy, x = uniform(rng, (3, 5, 1, 1), dtype), uniform(rng, (3, 5, 1, 1), dtype)
    check_backward(INSTANCE, dy, x)


EMPTY = [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_empty(op, shape, dtype):
    x = np.zeros(shape, dtype)
    y, mean, rstd = op.statistics(x)
    assert (y.shape, y.dtype) == (shape, dtype if dtype in DTYPES.values() else np.float32)
    assert rstd.shape == op.statistics_shape(shape)
    if dtype in DTYPES.values():
        dx, dweight, dbias = op.backward(x, x, mean, rstd)
        assert dx.shape == shape
        assert dweight.shape == dbias.shape == op.absent(shape)[0]
        assert not dweight.any()
        assert not dbias.any()
        out = np.zeros(shape, dtype)
        assert op.forward(x, out=out) is out


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_leaves_running_statistics_untouched(shape):
    mean, var = np.full(shape[1], 2.0, np.float32), np.full(shape[1], 3.0, np.float32)
    normkit.instance_norm(np.zeros(shape, np.float32), running_mean=mean, running_var=var)
    assert (mean == 2).all()
    assert (var == 3).all()


@pytest.mark.parametrize("running", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("name", ["instance", "batch"])
def test_empty_evaluation_returns_the_running_statistics(name, shape, dtype, running):
    """As an evaluation of anything else does."""
    kept = [2.0, -3.0, 0.5][: shape[1]], [3.0, 0.0, 8.0][: shape[1]]
    statistics = dict(zip(("running_mean", "running_var"), (np.array(a).astype(running) for a in kept), strict=True))
    function, frozen = {
        "instance": (normkit.instance_norm, {"use_input_stats": False}),
        "batch": (normkit.batch_norm, {"training": False}),
    }[name]
    found, wanted = (
        function(np.zeros(extents, dtype), **statistics, **frozen, eps=0.0, return_stats=True)[1:]
        for extents in (shape, (max(shape[0], 1), shape[1], 2))
    )
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert bits(a) == bits(b if shape[0] or name == "batch" else b[:0])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.25])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_norm_of_no_elements(dtype, eps):
    """It is that of zeros."""
    _, rnorm = normkit.l2_normalize(np.zeros((3, 0), dtype), eps=eps, return_stats=True)
    _, wanted = normkit.l2_normalize(np.zeros((3, 2), dtype), eps=eps, return_stats=True)
    assert bits(rnorm) == bits(wanted)


def poison(x, value):
    x = x.copy(order="K")
    x[1, 2, ..., -1] = value
    return x


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 5, 129), (2, 3, 5000), (2, 3, 70000), (3, 70, 9)], ids=str)
@pytest.mark.parametrize("layout", RUNS)
def test_nan_and_inf_poison_their_own_instance_only(layout, shape, value, dtype, isa, rng):
    """The others keep their bits, not only their values; the poisoned one does not pass for a number."""
    x = lay(uniform(rng, shape, dtype), layout)
    dy = lay(uniform(rng, shape, dtype), layout)
    weight = rng.standard_normal(shape[1]).astype(np.float32)
    others = np.ones(shape[:2], bool)
    others[1, 2] = False

    clean, dirty = (INSTANCE.statistics(a, weight=weight) for a in (x, poison(x, value)))
    for before, after in zip(clean, dirty, strict=True):
        assert bits(before[others]) == bits(after[others])
    assert np.isnan(dirty[0][1, 2].astype(np.float32)).all()
    assert not np.isfinite(dirty[1][1, 2])

    before = INSTANCE.backward(dy, x, *clean[1:], weight)[0]
    for bad_dy, bad_x, stats in ((dy, poison(x, value), dirty[1:]), (poison(dy, value), x, clean[1:])):
        after, dweight, _dbias = INSTANCE.backward(bad_dy, bad_x, *stats, weight)
        assert bits(before[others]) == bits(after[others])
        assert not np.isfinite(after[1, 2].astype(np.float32)).any()
        finite = np.isfinite(dweight)
        assert finite.sum() == shape[1] - 1
        assert not finite[2]


@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 3, 128), (2, 17, 40, 40), (1, 2, 70000)], ids=str)
def test_float16_at_its_limits(shape, layout, isa, rng):
    """Values up to 65504, whose squares are far beyond float16."""
    x = lay((65504 * rng.uniform(-1, 1, shape)).astype(np.float16), layout)
    x[:, :, 0], x[:, :, -1] = 65504, -65504
    check_forward(INSTANCE, x)
    check_backward(INSTANCE, lay(uniform(rng, shape, np.float16), layout), x)


@pytest.mark.parametrize(
    ("dtype", "scales"), [("float32", [1e-38, 1e-30, 1e-19, 1e18, 1e30, 1e37]), ("float64", [1e-140, 1e140])]
)
@pytest.mark.parametrize("shape", ["square-tail", "register-row-and-one", "three-chunks", "two-spans"])
@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("op", [INSTANCE, OPERATIONS["rms"]], ids=repr)
def test_squares_beyond_the_range(op, layout, shape, dtype, scales, isa, rng):
    """Data whose squares overflow or vanish in the compute type: the statistics do neither. Nothing is wider than a
    double, whose own limit is 1e154."""
    for scale in scales:
        x = lay(uniform(rng, SHAPES[shape], dtype, std=scale, offset=scale), layout)
        y = op.forward(x, eps=0.0)
        truth = op.reference(x, eps=0.0)
        # A subnormal has fewer digits than u promises: its distance to the next, seen through rstd.
        bound = bounds.y(truth, x.dtype) + 2 * bounds.SMALLEST[dtype] * np.abs(truth.rstd)
        assert np.isfinite(y).all()
        assert bounds.excess(y.reshape(truth.y.shape), truth.y, bound) <= 1


@pytest.mark.parametrize("scale", [1e-39, 1e-42])
@pytest.mark.parametrize("shape", ["square-tail", "register-row-and-one", "three-chunks", "two-spans"])
@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("op", [INSTANCE, OPERATIONS["rms"]], ids=repr)
def test_subnormal_numbers_are_as_far_apart_as_float32_can_say(op, layout, shape, scale, isa, rng):
    """Without eps their 1/std is beyond float32: it is the largest there is, in y as in what is returned."""
    x = lay(uniform(rng, SHAPES[shape], np.float32, std=scale, offset=scale), layout)
    y, *_, rstd = op.forward(x, eps=0.0, return_stats=True)
    truth = op.reference(x, eps=0.0)
    largest = bounds.LARGEST["float32"]
    assert (rstd == largest).all()
    assert (truth.rstd > largest).all()
    expected = (truth.x - truth.mean) * largest
    # The mean is rounded to a subnormal, and again where it is subtracted.
    bound = 4 * bounds.UNIT["float32"] * np.abs(expected) + 2 * bounds.SMALLEST["float32"] * largest
    assert bounds.excess(y.reshape(truth.y.shape), expected, bound) <= 1


@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("length", [2, 16, 128, 130, 9000])
def test_squares_that_vanish_are_no_constant(length, layout, isa):
    """Deviations of 1e-30 about a mean of exactly 0: their squares are 0 in float32, but they are there."""
    x = lay(np.tile(np.float32([1e-30, -1e-30]), (2, 3, length // 2)), layout)
    y = INSTANCE.forward(x, eps=0.0)
    assert bounds.excess(y, np.sign(x).astype(np.float64), 4 * 2.0**-24) <= 1


@pytest.mark.parametrize("layout", RUNS)
@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 3, 128), (2, 3, 129), (2, 17, 300), (1, 2, 70000)], ids=str)
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e18, 3e38])
def test_an_outlier_is_a_bad_pivot(outlier, shape, layout, isa, rng):
    """The first member, of which a kernel may make its pivot, far from all others."""
    x = lay(uniform(rng, shape), layout)
    x[:, :, 0] = outlier
    check_forward(INSTANCE, x)


@pytest.mark.parametrize("layout", RUNS)
def test_statistics_depend_on_no_neighbor(layout, isa, rng):
    """The values of a channel have no part in the bits of the next, even where that channel takes another path."""
    shape = (2, 40, 300)
    x = lay(uniform(rng, shape), layout)
    others = np.arange(40) != 7
    expected = [bits(a[:, others]) for a in INSTANCE.statistics(x)]
    for value in (0.0, 1e30, 1e-30):
        x[:, 7] = value
        x[:, 7, 0] = 3 * value
        assert [bits(a[:, others]) for a in INSTANCE.statistics(x)] == expected


def test_one_member_and_running_statistics():
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"^x has 1 member per statistic, "):
        normkit.instance_norm(np.ones((2, 3, 1, 1), np.float32), running_mean=mean, running_var=var)
    assert not mean.any()
    assert (var == 1).all()
    y = normkit.instance_norm(
        np.ones((2, 3, 1, 1), np.float32), running_mean=mean, running_var=var, use_input_stats=False
    )
    assert bounds.excess(y, np.float64(1 / np.sqrt(1 + 1e-5)), 4 * 2.0**-24) <= 1


def test_momentum_of_zero_takes_no_unbiased_variance_from_nan(rng):
    """(1 - 0) r + 0 s is r, to the bit."""
    mean, var = rng.standard_normal((2, 3)).astype(np.float32)
    before = bits(mean), bits(var)
    normkit.instance_norm(uniform(rng, (2, 3, 4)), running_mean=mean, running_var=var, momentum=0)
    assert (bits(mean), bits(var)) == before


def test_running_statistics_average_over_images(rng):
    """The mean is the same in another order of N, but for rounding; one image alone gives its own statistics."""
    x = uniform(rng, (1, 3, 8, 8))
    mean, var = np.zeros(3), np.ones(3)
    normkit.instance_norm(x, running_mean=mean, running_var=var, momentum=1.0)
    truth = INSTANCE.reference(x)
    assert bounds.excess(mean, truth.mean.ravel(), bounds.mean(truth, np.float32).ravel()) <= 1
    assert (
        bounds.excess(
            var * 63 / 64,
            truth.var.ravel(),
            2 * truth.var.ravel() * (bounds.rstd_error(truth, np.float32).ravel() + 2.0**-24),
        )
        <= 1
    )


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_one_axis_of_every_kind(op, isa, rng):
    """Extents of 1 anywhere: among the kept axes, among the reduced ones, in front and behind."""
    for shape in [(1, 5, 4, 7), (3, 1, 4, 7), (3, 5, 1, 7), (3, 5, 4, 1), (1, 1, 1, 7), (1, 5, 1, 1)]:
        dy, x = uniform(rng, shape), uniform(rng, shape)
        check_forward(op, x)
        check_backward(op, dy, x)


def test_many_axes(rng):
    x = uniform(rng, (2, 3, *[1] * 20, 2, 2, 2, *[1] * 5, 3))
    check_forward(INSTANCE, x)
    check_backward(INSTANCE, uniform(rng, x.shape), x)
