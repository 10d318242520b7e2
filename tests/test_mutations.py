"""The bounds bite: each formula, changed as one gets it wrong, is outside of them.

So do the tests: `mutants.py` shows that, and has to find the lines that it changes.
"""

import bounds
import mutants
import numpy as np
import pytest
import reference
from activations import activated, slope
from cases import MASKS, few_bits, uniform
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


def masked(rng, dtype="float32"):
    """Few bits, and a mask of whole sixteenths: what is no member is far away."""
    x, where = few_bits(rng, SHAPE, dtype), MASKS["random"](rng, SHAPE)
    x[~where] += 40
    return x, where


def over_members(x, where, count=None):
    count = where.sum(AXIS, keepdims=True) if count is None else count
    mean = np.where(where, x, 0).sum(AXIS, keepdims=True) / count
    return mean, (np.where(where, x - mean, 0) ** 2).sum(AXIS, keepdims=True) / count


MASKED = {
    "no-mask": lambda x, m: statistics(x),
    "mask-inverted": lambda x, m: over_members(x, ~m),
    "divides-by-all": lambda x, m: over_members(x, m, 256),
    "variance-divides-by-all": lambda x, m: (
        over_members(x, m)[0],
        over_members(x, m)[1] * m.sum(AXIS, keepdims=True) / 256,
    ),
    "unbiased": lambda x, m: (
        over_members(x, m)[0],
        over_members(x, m)[1] * m.sum(AXIS, keepdims=True) / (m.sum(AXIS, keepdims=True) - 1),
    ),
    "others-as-zeros": lambda x, m: statistics(np.where(m, x, 0)),
    "one-more": lambda x, m: over_members(x, m | (np.arange(256).reshape(16, 16) == np.argmin(m.reshape(6, 256)[0]))),
    "one-less": lambda x, m: over_members(x, m & (np.arange(256).reshape(16, 16) != np.argmax(m.reshape(6, 256)[0]))),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mutant", MASKED)
def test_members(mutant, dtype, rng):
    x, where = masked(rng, dtype)
    f = OPERATIONS["instance"].reference(x, where=where)
    bound = bounds.y(f, x.dtype, exact=dtype != "float16")
    assert bounds.excess(f.y, f.y, bound) == 0
    mean, var = MASKED[mutant](f.x, where)
    assert bounds.excess((f.x - mean) * rstd_of(var, f.eps), f.y, bound) > 1


def test_members_alone_are_normalized(rng):
    x, where = masked(rng)
    f = OPERATIONS["instance"].reference(x, where=where)
    assert bounds.excess(np.where(where, f.y, f.x), f.y, bounds.y(f, x.dtype)) > 1
    assert bounds.excess(np.where(where, f.y, 0), f.y, bounds.y(f, x.dtype)) > 1


def _term(b, where=None, mean_g=None, mean_gx=None):
    mean_g, mean_gx = b.mean_g if mean_g is None else mean_g, b.mean_gx if mean_gx is None else mean_gx
    return b.rstd * (b.g - np.where(b.where if where is None else where, mean_g + b.x_hat * mean_gx, 0))


def _averages(b, over, count):
    return [np.where(over, t, 0).sum(AXIS, keepdims=True) / count for t in (b.g, b.g * b.x_hat)]


MASKED_BACKWARD = {
    "term-on-all": lambda b: _term(b, True),
    "term-on-the-others": lambda b: _term(b, ~b.where),
    "sums-of-members": lambda b: _term(b, None, *_averages(b, b.where, b.members)),
    "mean-g-of-members": lambda b: _term(b, None, _averages(b, b.where, b.members)[0]),
    "mean-gx-of-members": lambda b: _term(b, None, None, _averages(b, b.where, b.members)[1]),
    "averages-over-all": lambda b: _term(b, None, *_averages(b, True, b.elements)),
    "others-without-gradient": lambda b: np.where(b.where, b.dx, 0),
    "recentered-from-all": lambda b: reference.backward(b.dy, b.x, b.weight, b.axis, rstd=b.rstd).dx,
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mutant", MASKED_BACKWARD)
def test_backward_of_members(mutant, dtype, rng):
    x, where = masked(rng, dtype)
    dy = few_bits(rng, SHAPE, dtype) + np.asarray(1, dtype)
    op = OPERATIONS["instance"]
    b = op.reference_backward(dy, x, None, op.reference(x, where=where).rstd, where=where)
    bound = bounds.dx(b, x.dtype)
    assert bounds.excess(b.dx, b.dx, bound) == 0
    assert bounds.excess(MASKED_BACKWARD[mutant](b), b.dx, bound) > 1


ACTIVATED = {
    "left-out": (("relu", "silu", "gelu", "elu", "tanh"), lambda f, a: f.z),
    "before-the-affine": (
        ("relu", "silu", "gelu", "elu", "tanh"),
        lambda f, a: activated(f.x_hat, a) * f.weight + f.bias,
    ),
    "before-the-bias": (
        ("relu", "silu", "gelu", "elu", "tanh"),
        lambda f, a: activated(f.x_hat * f.weight, a) + f.bias,
    ),
    "twice": (("silu", "gelu", "elu", "tanh", "hardswish", "mish", "softplus"), lambda f, a: activated(f.y, a)),
    "gelu-by-tanh": (("gelu",), lambda f, a: activated(f.z, "gelu_tanh")),
    "gelu-by-erf": (("gelu_tanh",), lambda f, a: activated(f.z, "gelu")),
    "gelu-by-sigmoid": (("gelu", "gelu_tanh"), lambda f, a: f.z / (1 + np.exp(-1.702 * f.z))),
    "another-slope": (("leaky_relu",), lambda f, a: activated(f.z, ("leaky_relu", 0.0101))),
    "another-alpha": (("elu",), lambda f, a: activated(f.z, ("elu", 1.01))),
    "relu-by-relu6": (("relu",), lambda f, a: activated(4 * f.z, "relu6") / 4),
    "softplus-by-relu": (("softplus",), lambda f, a: activated(f.z, "relu")),
    "mish-by-silu": (("mish",), lambda f, a: activated(f.z, "silu")),
    "hardswish-by-silu": (("hardswish",), lambda f, a: activated(f.z, "silu")),
    "in-float16": (("silu", "gelu", "elu", "tanh", "sigmoid"), lambda f, a: activated(f.z, a).astype(np.float16)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("mutant", "activation"), [(m, a) for m, (names, _) in ACTIVATED.items() for a in names])
def test_activations(mutant, activation, dtype, rng):
    x = few_bits(rng, SHAPE, dtype)
    weight, bias = rng.standard_normal((2, 3))
    f = OPERATIONS["instance"].reference(x, weight, bias, activation=activation)
    bound = bounds.y(f, x.dtype)
    assert bounds.excess(f.y, f.y, bound) == 0
    assert bounds.excess(ACTIVATED[mutant][1](f, activation), f.y, bound) > 1


def _of(b, dz):
    """dx of another dz."""
    return reference.backward(dz, b.x, b.weight, b.axis, rstd=b.rstd).dx


ACTIVATED_BACKWARD = {
    "left-out": lambda b, a: _of(b, b.dy),
    "at-y": lambda b, a: _of(b, b.dy * slope(activated(b.z, a), a)),
    "without-bias": lambda b, a: _of(b, b.dy * slope(b.z - b.bias, a)),
    "without-weight": lambda b, a: _of(b, b.dy * slope(b.x_hat + b.bias, a)),
    "twice": lambda b, a: _of(b, b.dz * slope(b.z, a)),
    "value": lambda b, a: _of(b, b.dy * activated(b.z, a)),
    "after-the-sums": lambda b, a: _of(b, b.dy) * slope(b.z, a),
}


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", ("elu", 0.5), "sigmoid", "tanh", "leaky_relu",
                                        "hardswish", "mish", "softplus"])  # fmt: skip
@pytest.mark.parametrize("mutant", ACTIVATED_BACKWARD)
def test_activations_backward(mutant, activation, rng):
    dy, x = few_bits(rng, SHAPE) + 1, few_bits(rng, SHAPE)
    weight, bias = rng.standard_normal((2, 3))
    op = OPERATIONS["instance"]
    stats = op.reference(x)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, weight, bias=bias, activation=activation)
    bound = bounds.dx(b, x.dtype)
    assert bounds.excess(b.dx, b.dx, bound) == 0
    if (mutant, activation) == ("at-y", "leaky_relu"):
        assert bounds.excess(ACTIVATED_BACKWARD[mutant](b, activation), b.dx, bound) <= 1  # of the same sign as z
        return
    assert bounds.excess(ACTIVATED_BACKWARD[mutant](b, activation), b.dx, bound) > 1


@pytest.mark.parametrize("mutant", ["dweight-of-dy", "dbias-of-dy", "dweight-scaled"])
def test_activated_parameters(mutant, rng):
    dy, x = few_bits(rng, SHAPE) + 3, few_bits(rng, SHAPE)
    weight, bias = rng.standard_normal((2, 3))
    op = OPERATIONS["instance"]
    stats = op.reference(x)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, weight, bias=bias, activation="gelu", weight_offset=1.0)
    truth, bound, found = {
        "dweight-of-dy": (b.dweight, bounds.dweight(b, x.dtype, 512), b.dy * b.x_hat),
        "dbias-of-dy": (b.dbias, bounds.dbias(b, x.dtype, 512), b.dy),
        "dweight-scaled": (b.dweight, bounds.dweight(b, x.dtype, 512), b.dweight * b.weight),
    }[mutant]
    truth, bound, found = (op.to_weight(t, SHAPE, weight) for t in (truth, bound, found))
    assert bounds.excess(found, truth, bound + bounds.stored(truth, F32)) > 1


@pytest.mark.parametrize("mutant", {
    "of-dz": lambda b: b.dz * np.minimum(b.z, 0),
    "of-all": lambda b: b.dy * b.z,
    "above": lambda b: b.dy * np.maximum(b.z, 0),
    "of-x-hat": lambda b: np.where(b.z > 0, 0, b.dy * b.x_hat),
    "without-bias": lambda b: b.dy * np.minimum(b.z - b.bias, 0),
    "where-z-without-bias-is": lambda b: np.where(b.z - b.bias > 0, 0, b.dy * b.z),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_gradients_of_slopes(mutant, rng):
    dy, x = few_bits(rng, SHAPE) + 3, few_bits(rng, SHAPE)
    weight, bias, slopes = rng.standard_normal((3, 3))
    op = OPERATIONS["instance"]
    stats = op.reference(x)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, weight, bias=bias, activation=("prelu", slopes))
    terms = b.dslopes, bounds.dslopes(b, x.dtype, 512), mutant[1](b)
    truth, bound, found = (op.to_weight(t, SHAPE, slopes) for t in terms)
    assert bounds.excess(found, truth, bound + bounds.stored(truth, F32)) > 1


def test_a_kink_excuses_no_more_than_its_own_elements(rng):
    """The derivative may be that of either side where z is within its error of 0; elsewhere the wrong side shows."""
    dy, x = few_bits(rng, SHAPE) + 1, uniform(rng, SHAPE)
    op = OPERATIONS["instance"]
    stats = op.reference(x)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, activation="relu")
    flipped = np.zeros(SHAPE, bool)
    flipped.reshape(-1)[np.argsort(np.abs(b.z).ravel())[:3]] = True
    wrong = _of(b, np.where(flipped, b.dy - b.dz, b.dz))
    assert bounds.excess(wrong, b.dx, bounds.dx(b, x.dtype)) > 1


@pytest.mark.parametrize("weight_offset", [1.0, 0.25])
@pytest.mark.parametrize(
    "mutant",
    {
        "left-out": lambda f, o: f.x_hat * (f.weight - o) + f.bias,
        "on-the-bias": lambda f, o: f.x_hat * (f.weight - o) + f.bias + o,
        "twice": lambda f, o: f.x_hat * (f.weight + o) + f.bias,
        "rounded-to-float16": lambda f, o: f.x_hat * f.weight.astype(np.float16) + f.bias,
    }.items(),
    ids=lambda item: item[0],
)
def test_weight_offsets(mutant, weight_offset, rng):
    x = few_bits(rng, SHAPE)
    weight, bias = rng.standard_normal((2, 3))
    f = OPERATIONS["instance"].reference(x, weight, bias, weight_offset=weight_offset)
    bound = bounds.y(f, x.dtype, exact=True)
    assert bounds.excess(f.y, f.y, bound) == 0
    assert bounds.excess(mutant[1](f, weight_offset), f.y, bound) > 1


def test_a_residual_gradient_added_after_rounding(rng):
    """Two roundings show in float16 where dx and dresidual nearly cancel: the first is of a larger number."""
    dy, x = uniform(rng, SHAPE, "float16"), uniform(rng, SHAPE, "float16")
    op = OPERATIONS["instance"]
    stats = op.reference(x)
    plain = op.reference_backward(dy, x, stats.mean, stats.rstd).dx
    dresidual = (-plain + 0.01).astype(np.float16)
    b = op.reference_backward(dy, x, stats.mean, stats.rstd, dresidual=dresidual)
    bound = bounds.dx(b, x.dtype)
    assert bounds.excess(b.dx.astype(np.float16), b.dx, bound) <= 1
    assert bounds.excess((plain.astype(np.float16) + dresidual).astype(np.float16), b.dx, bound) > 1
    assert bounds.excess(plain, b.dx, bound) > 1


@pytest.mark.skipif(not (mutants.ROOT / "CMakeLists.txt").exists(), reason="no sources beside the tests")
@pytest.mark.parametrize("file", sorted({mutant.file for mutant in mutants.MUTANTS}))
def test_every_mutant_has_its_place(file):
    text = (mutants.ROOT / file).read_text()
    for mutant in mutants.MUTANTS:
        if mutant.file == file:
            mutant.place(text)
