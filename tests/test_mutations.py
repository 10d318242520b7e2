"""The bounds bite: each formula, changed as one gets it wrong, is outside of them."""

import bounds
import numpy as np
import pytest
import reference
from cases import few_bits, uniform
from reference import OPERATIONS, rstd_of

AXIS = (2, 3)
SHAPE = (2, 3, 16, 16)
F32 = np.float32


def float32_statistics(x):
    """The textbook's E[x^2] - E[x]^2 in float32."""
    x = x.astype(F32)
    mean = x.mean(AXIS, keepdims=True)
    return mean.astype(np.float64), np.maximum((x * x).mean(AXIS, keepdims=True) - mean * mean, 0).astype(np.float64)


def statistics(x):
    mean = x.mean(AXIS, keepdims=True)
    return mean, ((x - mean) ** 2).mean(AXIS, keepdims=True)


FORWARD = {
    "unbiased-variance": lambda x, w, b, eps: (
        (x - x.mean(AXIS, keepdims=True)) * rstd_of(x.var(AXIS, ddof=1, keepdims=True), eps) * w + b
    ),
    "eps-outside-the-root": lambda x, w, b, eps: (x - statistics(x)[0]) / (np.sqrt(statistics(x)[1]) + eps) * w + b,
    "eps-twice": lambda x, w, b, eps: (x - statistics(x)[0]) * rstd_of(statistics(x)[1], 2 * eps) * w + b,
    "no-eps": lambda x, w, b, eps: (x - statistics(x)[0]) * rstd_of(statistics(x)[1], 0) * w + b,
    "not-centered": lambda x, w, b, eps: x * rstd_of((x**2).mean(AXIS, keepdims=True), eps) * w + b,
    "rms-variance": lambda x, w, b, eps: (
        (x - statistics(x)[0]) * rstd_of((x**2).mean(AXIS, keepdims=True), eps) * w + b
    ),
    "no-weight": lambda x, w, b, eps: (x - statistics(x)[0]) * rstd_of(statistics(x)[1], eps) + b,
    "no-bias": lambda x, w, b, eps: (x - statistics(x)[0]) * rstd_of(statistics(x)[1], eps) * w,
    "bias-scaled": lambda x, w, b, eps: ((x - statistics(x)[0]) * rstd_of(statistics(x)[1], eps) + b) * w,
    "next-weight": lambda x, w, b, eps: (x - statistics(x)[0]) * rstd_of(statistics(x)[1], eps) * np.roll(w, 1, 1) + b,
    "last-member-left-out": lambda x, w, b, eps: (
        (x - x.reshape(2, 3, -1)[..., :-1].mean(2)[..., None, None]) * rstd_of(statistics(x)[1], eps) * w + b
    ),
    "whole-batch": lambda x, w, b, eps: (
        (x - x.mean((0, 2, 3), keepdims=True)) * rstd_of(x.var((0, 2, 3), keepdims=True), eps) * w + b
    ),
    "rstd-in-float16": lambda x, w, b, eps: (
        (x - statistics(x)[0]) * rstd_of(statistics(x)[1], eps).astype(np.float16) * w + b
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mutant", FORWARD)
def test_forward(mutant, dtype, rng):
    x = few_bits(rng, SHAPE, dtype)
    weight, bias = rng.standard_normal((2, 3))
    f = OPERATIONS["instance"].reference(x, weight, bias, eps=0.1)
    # What differs by one part in a few thousand is within half a unit of float16 for most elements, but not for all.
    bound = bounds.y(f, x.dtype, exact=dtype != "float16")
    assert bounds.excess(f.y, f.y, bound) == 0
    assert bounds.excess(FORWARD[mutant](f.x, f.weight, f.bias, f.eps), f.y, bound) > 1


@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_squares_of_what_is_not_centered(offset, rng):
    """E[x^2] - E[x]^2: the formula that the offset cases are there to catch."""
    x = uniform(rng, SHAPE, offset=offset)
    f = OPERATIONS["instance"].reference(x)
    mean, var = float32_statistics(x)
    assert bounds.excess((f.x - mean) * rstd_of(var, f.eps), f.y, bounds.y(f, x.dtype)) > 1


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_mean_rounded_to_float32(offset, rng):
    """Statistics in double, handed on in float32: the digits that the mean loses are missed in y."""
    x = uniform(rng, SHAPE, offset=offset)
    f = OPERATIONS["instance"].reference(x)
    assert bounds.excess((f.x - f.mean.astype(F32)) * f.rstd, f.y, bounds.y(f, x.dtype, exact=True)) > 1


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_scale_and_shift_folded(offset, rng):
    """a x + b in float32, with b = bias - mean a: cancels."""
    x = uniform(rng, SHAPE, offset=offset)
    f = OPERATIONS["instance"].reference(x)
    a, b = f.rstd.astype(F32), (-f.mean * f.rstd).astype(F32)
    assert bounds.excess(x * a + b, f.y, bounds.y(f, x.dtype)) > 1


BACKWARD = {
    "no-mean-g": lambda b: b.rstd * (b.g - b.x_hat * b.mean_gx),
    "no-mean-gx": lambda b: b.rstd * (b.g - b.mean_g),
    "mean-gx-added": lambda b: b.rstd * (b.g - b.mean_g + b.x_hat * b.mean_gx),
    "unbiased-means": lambda b: b.rstd * (b.g - (b.mean_g + b.x_hat * b.mean_gx) * b.members / (b.members - 1)),
    "no-rstd": lambda b: b.g - b.mean_g - b.x_hat * b.mean_gx,
    "rstd-twice": lambda b: b.rstd**2 * (b.g - b.mean_g - b.x_hat * b.mean_gx),
    "no-weight": lambda b: reference.backward(b.dy, b.x, 1.0, b.axis, rstd=b.rstd).dx,
    "weight-outside": lambda b: b.rstd * (b.g - b.dy.mean(b.axis, keepdims=True) - b.x_hat * b.mean_gx),
    "frozen": lambda b: b.rstd * b.g,
    "not-centered": lambda b: reference.backward(b.dy, b.x, b.weight, b.axis, rstd=b.rstd, center=False).dx,
    "not-recentered": lambda b: (
        reference.backward(b.dy, b.x - 1e-3, b.weight, b.axis, rstd=b.rstd, center=False, mean=b.mean).dx
    ),
    "mean-gx-about-a-rounded-mean": lambda b: (
        b.rstd * (b.g - b.mean_g - b.x_hat * (b.g * (b.x_hat + 1e-3)).mean(b.axis, keepdims=True))
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mutant", BACKWARD)
def test_backward(mutant, dtype, rng):
    dy, x = few_bits(rng, SHAPE, dtype), few_bits(rng, SHAPE, dtype)
    dy += 1  # an average that is not nothing
    weight = rng.standard_normal(3) + 2
    op = OPERATIONS["instance"]
    b = op.reference_backward(dy, x, None, op.reference(x).rstd, weight)
    bound = bounds.dx(b, x.dtype, exact=dtype != "float16")
    assert bounds.excess(b.dx, b.dx, bound) == 0
    assert bounds.excess(BACKWARD[mutant](b), b.dx, bound) > 1


PARAMETERS = {
    "dweight-of-x": lambda b: b.dy * b.x,
    "dweight-weighted": lambda b: b.g * b.x_hat,
    "dweight-not-scaled": lambda b: b.dy * (b.x - b.mean),
    "dweight-about-a-rounded-mean": lambda b: b.dy * (b.x_hat + 1e-3),
    "dweight-without-the-first": lambda b: b.dy * b.x_hat * (np.arange(b.x.size).reshape(b.x.shape) > 0),
}


@pytest.mark.parametrize("mutant", PARAMETERS)
def test_parameters(mutant, rng):
    op = OPERATIONS["instance"]
    dy, x = few_bits(rng, SHAPE) + 3, few_bits(rng, SHAPE) + 3
    weight = rng.standard_normal(3) + 2
    b = op.reference_backward(dy, x, None, op.reference(x).rstd, weight)
    truth, found = (op.to_weight(terms, SHAPE, weight) for terms in (b.dweight, PARAMETERS[mutant](b)))
    bound = op.to_weight(bounds.dweight(b, x.dtype, 512, exact=True), SHAPE, weight) + bounds.stored(truth, F32)
    assert bounds.excess(found, truth, bound) > 1


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("float32", 2.0**-24)])
def test_half_the_bound_is_too_little(dtype, unit, rng):
    """Truth, rounded to storage alone, already takes more than half of the bound that a sharp case allows float16."""
    x = few_bits(rng, SHAPE, dtype)
    f = OPERATIONS["instance"].reference(x)
    used = bounds.excess(f.y.astype(dtype), f.y, bounds.y(f, x.dtype, exact=True))
    assert used > (0.5 if dtype == "float16" else 1 / 32)
    assert used <= 1
    assert bounds.UNIT[dtype] == unit
