"""The reference itself: against differences of its own forward, and against NumPy's words for the same thing."""

import numpy as np
import pytest
from reference import OPERATIONS, REGISTRY, sum_to, wide

SHAPE, STEP = (3, 4, 2, 3), 1e-6


def central(f, at, rng):
    """The derivative of f along a random direction, and that direction. Third-order terms leave errors of STEP^2."""
    direction = rng.standard_normal(at.shape)
    return (f(at + STEP * direction) - f(at - STEP * direction)) / (2 * STEP), direction


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_backward_is_the_derivative_of_forward(op, kind, rng):
    shape = op.weight_shape(SHAPE, kind)
    x, dy = rng.standard_normal((2, *SHAPE))
    weight, bias = rng.standard_normal((2, *shape))

    def loss(x, weight, bias):
        return float((wide(dy).reshape(op.blocks(SHAPE)) * op.reference(x, weight, bias).y).sum())

    stats = op.reference(x)
    b = op.reference_backward(dy, x, None, stats.rstd, weight)
    gradients = b.dx.reshape(SHAPE), op.to_weight(b.dweight, SHAPE, weight), op.to_weight(b.dbias, SHAPE, weight)
    for argument, (at, gradient) in enumerate(zip((x, weight, bias), gradients, strict=True)):
        arguments = [x, weight, bias]
        slope, direction = central(lambda v: loss(*arguments[:argument], v, *arguments[argument + 1 :]), at, rng)  # noqa: B023
        # The difference of two sums of x.size terms, each rounded, over twice the step; and the third derivative.
        scale = np.abs(dy).sum() * (np.abs(weight).max() + 1) * float(np.abs(stats.x_hat).max() + 1)
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
