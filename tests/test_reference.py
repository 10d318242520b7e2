"""The reference itself: against differences of its own forward, and against NumPy's words for the same thing."""

import math

import activations
import bounds
import numpy as np
import pytest
from activations import ACTIVATIONS, activated, erfc, name_of, slope
from cases import MASKS
from reference import OPERATIONS, REGISTRY, sum_to, wide

SHAPE, STEP = (3, 4, 2, 3), 1e-6


def central(f, at, rng):
    """The derivative of f along a random direction, and that direction. Third-order terms leave errors of STEP^2."""
    direction = rng.standard_normal(at.shape)
    return (f(at + STEP * direction) - f(at - STEP * direction)) / (2 * STEP), direction


OPTIONS = {
    "plain": lambda rng: {},
    "mask": lambda rng: {"where": MASKS["random"](rng, SHAPE)},
    "mask-of-positions": lambda rng: {"where": MASKS["image-and-position"](rng, SHAPE)},
    "weight-offset": lambda rng: {"weight_offset": 1.5},
    "everything": lambda rng: {"where": MASKS["random"](rng, SHAPE), "weight_offset": 1.5, "activation": "gelu"},
} | {name_of(a): lambda rng, a=a: {"activation": a} for a in ("silu", "gelu_tanh", "elu", "sigmoid", "tanh")}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_backward_is_the_derivative_of_forward(op, kind, options, rng):
    shape = op.weight_shape(SHAPE, kind)
    x, dy = rng.standard_normal((2, *SHAPE))
    weight, bias = rng.standard_normal((2, *shape))
    options = options(rng)

    def loss(x, weight, bias):
        return float((wide(dy).reshape(op.blocks(SHAPE)) * op.reference(x, weight, bias, eps=0.1, **options).y).sum())

    stats = op.reference(x, eps=0.1, where=options.get("where"))
    b = op.reference_backward(dy, x, None, stats.rstd, weight, bias=bias, **options)
    gradients = b.dx.reshape(SHAPE), op.to_weight(b.dweight, SHAPE, weight), op.to_weight(b.dbias, SHAPE, weight)
    for argument, (at, gradient) in enumerate(zip((x, weight, bias), gradients, strict=True)):
        arguments = [x, weight, bias]
        slope, direction = central(lambda v: loss(*arguments[:argument], v, *arguments[argument + 1 :]), at, rng)  # noqa: B023
        # The difference of two sums of x.size terms, each rounded, over twice the step; and the third derivative.
        scale = np.abs(dy).sum() * (np.abs(weight).max() + 3) * float(np.abs(stats.x_hat).max() + 1)
        error = 8 * 2.0**-52 * scale / STEP + 100 * scale * float(stats.rstd.max()) ** 3 * STEP**2
        assert abs(slope - (gradient * direction).sum()) <= error


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_gradient_is_that_of_an_affine_map(op, rng):
    dy, x = rng.standard_normal((2, *SHAPE))
    stats = op.reference(x)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, None, use_input_stats=False)
    assert (b.dx == dy.reshape(op.blocks(SHAPE)) * stats.rstd).all()


def test_sum_to_is_the_adjoint_of_broadcasting():
    ones = np.ones((2, 3, 4))
    assert sum_to(ones, (3, 1)).tolist() == [[8.0], [8.0], [8.0]]
    assert sum_to(ones, ()) == 24


def test_registry_names_are_unique():
    assert len(OPERATIONS) == len(REGISTRY)


@pytest.mark.parametrize("t", [0.0, 1e-9, 0.3, 1.4999, 1.5, 1.5001, 3.0, 9.0, 26.0])
def test_erfc(t):
    """erfc is compared with the C library's, which is exact to a few roundings of a double."""
    for dtype in (np.float64, np.longdouble):
        assert abs(float(erfc(dtype(t))) - math.erfc(t)) <= 2.0**-48 * math.erfc(t)


def test_erfc_is_smooth_where_its_formulas_meet():
    """The formulas meet smoothly in long double, with which the last digits of a double are compared."""
    t = np.longdouble(1.5) + np.arange(-4, 5) * np.longdouble(1e-6)
    third = np.diff(erfc(t), 3)
    # The third derivative there is 0.83; a jump of d would show in two of the differences, three times.
    assert np.abs(third / 1e-18).max() < 1 + 8 * np.finfo(np.longdouble).eps / 1e-18


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_an_activation_and_its_derivative(activation):
    """Central differences, away from the kinks, and the bounds on how steep either is."""
    z = np.arange(-20, 20, 1 / 64) + 1 / 128
    step = 2.0**-16
    difference = (activated(z + step, activation) - activated(z - step, activation)) / (2 * step)
    assert np.abs(difference - slope(z, activation)).max() <= step**2 * 2 + 40 * 2.0**-52 / step
    first, second, kinks = bounds.steepest(activation)
    assert np.abs(slope(z, activation)).max() <= first
    change = np.abs(np.diff(slope(z, activation)))
    jumps = sum(jump * ((z[:-1] - kink) * (z[1:] - kink) < 0) for kink, jump in kinks.items())
    assert (change <= second / 64 + jumps + 1e-12).all()
    # Neither is loose: the steepest is found, the bound is not twice that.
    assert np.abs(slope(z, activation)).max() >= first / 2
    assert change.max() >= (second / 64 + max(kinks.values(), default=0)) / 2.2


def test_activations_by_another_formula():
    z = np.linspace(-8, 8, 161)
    expected = {
        "silu": z / (1 + np.exp(-z)),
        "gelu": z * (1 + np.array([math.erf(v / math.sqrt(2)) for v in z])) / 2,
        "gelu_tanh": z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
        "sigmoid": (1 + np.tanh(z / 2)) / 2,
        "leaky_relu": np.maximum(z, 0) + 0.01 * np.minimum(z, 0),
        "elu": np.maximum(z, 0) + np.exp(np.minimum(z, 0)) - 1,
        "relu6": np.maximum(z, 0) - np.maximum(z - 6, 0),
        "hardswish": np.where(z < -3, 0, np.where(z > 3, z, z * (z + 3) / 6)),
        "mish": z * ((1 + np.exp(z)) ** 2 - 1) / ((1 + np.exp(z)) ** 2 + 1),
        "softplus": np.log(1 + np.exp(z)),
    }
    for name, y in expected.items():
        assert np.abs(activated(z, name) - y).max() <= 1e-14
    assert activations.split(("elu", 2)) == ("elu", (2,))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_statistics_of_members_by_another_way(op, mask, rng):
    """Statistics are taken once more, member by member, statistic by statistic."""
    x, where = rng.standard_normal(SHAPE), MASKS[mask](rng, SHAPE)
    f = op.reference(x, where=where)
    reduced = op.reduced(SHAPE)
    kept = [a for a in range(len(op.blocks(SHAPE))) if a not in reduced]
    seen = [np.broadcast_to(a, SHAPE).reshape(op.blocks(SHAPE)).transpose(*kept, *reduced) for a in (x, where)]
    count = math.prod(f.mean.shape)
    for values, flags, mean, rstd in zip(
        *(a.reshape(count, -1) for a in seen), f.mean.ravel(), f.rstd.ravel(), strict=True
    ):
        chosen = values[flags]
        assert abs(mean - (chosen.mean() if chosen.size and op.center else 0)) < 1e-14
        spread = (chosen.var() if op.center else (chosen**2).mean()) if chosen.size else 0
        assert abs(rstd - (1 / math.sqrt(spread + 1e-5) if chosen.size else 0)) < 1e-9
