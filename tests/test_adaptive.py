"""Adaptive instance norm: the statistics of one array on another, and gradients of both."""

import math
from types import SimpleNamespace

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, SHARED_MEMORY, Guarded, bits, lay, uniform
from checks import same_order, unchanged
from reference import OPERATIONS, compute, sum_to

CHANNEL = {"instance": 1, "instance-last": -1}
SHAPES = {
    "small": ((3, 5, 4, 7), (3, 5, 3, 2)),
    "same-extents": ((2, 3, 7, 7), (2, 3, 7, 7)),
    "one-style": ((3, 5, 4, 7), (1, 5, 3, 2)),
    "fewer-axes": ((2, 3, 4, 6), (2, 3, 9)),
    "one-pixel-of-style": ((2, 3, 5, 5), (2, 3, 1, 1)),
    "one-pixel-of-content": ((2, 3, 1, 1), (2, 3, 5, 5)),
    "long": ((1, 2, 70000), (1, 2, 5001)),
    "many-channels": ((2, 65, 9, 9), (2, 65, 5, 5)),
}


def place(shape, op):
    """The channels where the operation has them."""
    return shape if op.name == "instance" else (shape[0], *shape[2:], shape[1])


def spread(stat, op, shape):
    """A statistic of style, so that it broadcasts against an array of `shape`."""
    n, c = stat.shape[0], stat.size // stat.shape[0]
    return stat.reshape((n, c, *[1] * (len(shape) - 2)) if op.name == "instance" else (n, *[1] * (len(shape) - 2), c))


def truth(op, content, style, eps):
    """Content, normalized, with the spread and the mean of style; what both are off in the compute type."""
    s = op.reference(style, eps=eps)
    weight, bias = (spread(a, op, content.shape) for a in (np.sqrt(s.var + eps), s.mean))
    u = bounds.unit(style.dtype)
    off_weight = weight * spread(bounds.rstd_error(s, style.dtype), op, content.shape) + u * weight
    off_bias = spread(bounds.mean_error(s, style.dtype), op, content.shape) + u * np.abs(bias)
    return s, weight, bias, SimpleNamespace(off_weight=off_weight, off_bias=off_bias)


def check(op, content, style, *, eps=1e-5, **options):
    channel = CHANNEL[op.name]
    with unchanged(content, style):
        y, mean, rstd = normkit.adaptive_instance_norm(
            content, style, eps=eps, channel_axis=channel, return_stats=True, **options
        )
    _, weight, bias, off = truth(op, content, style, eps)
    plain = op.reference(content, eps=eps)
    f = SimpleNamespace(**{**vars(plain), "weight": weight, "bias": bias})
    f.z = f.y = f.x_hat * weight + bias
    kept = op.statistics_shape(content.shape)
    assert (y.shape, y.dtype) == (content.shape, options.get("out_dtype", content.dtype))
    for found, name in ((mean, "mean"), (rstd, "rstd")):
        assert (found.shape, found.dtype) == (kept, compute(content.dtype))
        expected = getattr(plain, name)
        error = getattr(bounds, name)(plain, content.dtype)
        assert bounds.excess(found.reshape(expected.shape), expected, error) <= 1
    assert bounds.excess(y, f.y, bounds.y(f, content.dtype, y.dtype, **vars(off))) <= 1
    return y, mean, rstd


def check_backward(op, dy, content, style, *, eps=1e-5, **options):
    channel, dtype = CHANNEL[op.name], content.dtype
    mean, rstd = op.statistics(content, eps=eps)[1:]
    with unchanged(dy, content, style, mean, rstd):
        dcontent, dstyle = normkit.adaptive_instance_norm_backward(
            dy, content, style, mean, rstd, eps=eps, channel_axis=channel, **options
        )
    s, weight, _, off = truth(op, content, style, eps)
    b = op.reference_backward(dy, content, mean, rstd)
    b = op_backward(b, weight)
    assert (dcontent.shape, dcontent.dtype) == (content.shape, dtype)
    assert bounds.excess(dcontent, b.dx, bounds.dx(b, dtype, off_weight=off.off_weight)) <= 1

    kept = weight.shape
    members = math.prod(content.shape) // math.prod(kept)
    u = bounds.unit(dtype)
    sums = {}
    for name in ("dweight", "dbias"):
        total, error = (sum_to(t, kept) for t in (getattr(b, name), getattr(bounds, name)(b, dtype, members)))
        sums[name] = [spread(a, op, style.shape) for a in (total, error + u * np.abs(total))]
    (dweight, off_dweight), (dbias, off_dbias) = sums.values()
    terms = np.abs(dweight * s.x_hat) + np.abs(dbias)
    off_x_hat = bounds.y(s, dtype, np.float64)  # of style, normalized; not stored
    error = np.abs(s.x_hat) * off_dweight + (np.abs(dweight) + off_dweight) * off_x_hat + off_dbias + 6 * u * terms
    expected, error = (dweight * s.x_hat + dbias) / s.members, error / s.members
    assert (dstyle.shape, dstyle.dtype) == (style.shape, dtype)
    assert bounds.excess(dstyle, expected, error + bounds.stored(np.abs(expected) + error, dtype)) <= 1
    return dcontent, dstyle


def op_backward(b, weight):
    """The gradient `b` of the reference, but with one weight for each statistic."""
    g = b.g * weight
    mean_g, mean_gx = (t.mean(b.axis, keepdims=True) for t in (g, g * b.x_hat))
    dx = b.rstd * (g - mean_g - b.x_hat * mean_gx)
    return SimpleNamespace(**{**vars(b), "weight": weight, "g": g, "mean_g": mean_g, "mean_gx": mean_gx, "dx": dx})


@pytest.fixture(params=CHANNEL)
def op(request):
    return OPERATIONS[request.param]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_matches_the_reference(shapes, dtype, op, isa, rng):
    content, style = (place(s, op) for s in SHAPES[shapes])
    dy, content = uniform(rng, content, dtype), uniform(rng, content, dtype, offset=0.25)
    style = uniform(rng, style, dtype, offset=-0.5, std=2)
    check(op, content, style)
    check_backward(op, dy, content, style)


def test_one_style_has_the_bits_of_copies(op, isa, rng):
    content, style = (place(s, op) for s in SHAPES["one-style"])
    dy, content, style = uniform(rng, content), uniform(rng, content), uniform(rng, style)
    axis = {"channel_axis": CHANNEL[op.name]}
    y, mean, rstd = normkit.adaptive_instance_norm(content, style, return_stats=True, **axis)
    given = dy, content, np.repeat(style, 3, 0)
    assert bits(y) == bits(normkit.adaptive_instance_norm(*given[1:], **axis))
    found, expected = (
        normkit.adaptive_instance_norm_backward(dy, content, s, mean, rstd, **axis)[0] for s in (style, given[2])
    )
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("style_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, style_layout, op, rng):
    content, style = (place(s, op) for s in SHAPES["small"])
    dy, content = (lay(uniform(rng, content), layout) for _ in range(2))
    style = lay(uniform(rng, style, offset=1), style_layout)
    y, *_ = check(op, content, style)
    dcontent, dstyle = check_backward(op, dy, content, style)
    assert same_order(content, y)
    assert same_order(content, dcontent)
    assert same_order(style, dstyle)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 2.0])
def test_eps(eps, op, isa, rng):
    content, style = (uniform(rng, place(s, op)) for s in SHAPES["small"])
    check(op, content, style, eps=eps)
    check_backward(op, uniform(rng, content.shape), content, style, eps=eps)


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_offsets_cost_no_digits(offset, op, isa, rng):
    content, style = (uniform(rng, place(s, op), offset=offset) for s in SHAPES["small"])
    check(op, content, style)
    check_backward(op, uniform(rng, content.shape), content, style)


def test_constant_content_is_the_mean_of_style(op, isa, rng):
    content, style = (place(s, op) for s in SHAPES["small"])
    style = uniform(rng, style, offset=3)
    y = normkit.adaptive_instance_norm(np.full(content, 0.7, np.float32), style, channel_axis=CHANNEL[op.name])
    s = op.reference(style)
    expected = np.broadcast_to(spread(s.mean, op, content), content)
    assert bounds.excess(y, expected, spread(bounds.mean(s, style.dtype), op, content)) <= 1


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_constant_style_has_no_infinite_gradient(eps, op, isa, rng):
    content, style = (place(s, op) for s in SHAPES["small"])
    dy, content, style = uniform(rng, content), uniform(rng, content), np.full(style, 0.7, np.float32)
    check(op, content, style, eps=eps)
    check_backward(op, dy, content, style, eps=eps)


def test_its_own_style_changes_nothing(op, rng):
    """Content in the statistics of content."""
    x = uniform(rng, place((2, 3, 16, 16), op), offset=0.5)
    y = normkit.adaptive_instance_norm(x, x, eps=0.0, channel_axis=CHANNEL[op.name])
    # x_hat * std + mean: the bound of y, at the values of x.
    _, weight, bias, off = truth(op, x, x, 0.0)
    f = op.reference(x, eps=0.0)
    f = SimpleNamespace(**{**vars(f), "weight": weight, "bias": bias, "z": f.x, "y": f.x})
    assert bounds.excess(y, f.x, bounds.y(f, x.dtype, **vars(off))) <= 1


def test_moves_the_statistics(op, rng):
    """The mean and the variance of y are those of style: what it is for."""
    content, style = (uniform(rng, place(s, op)) for s in ((2, 3, 40, 40), (2, 3, 30, 30)))
    style = style * np.float32(3) + np.float32(2)
    y = normkit.adaptive_instance_norm(content, style, channel_axis=CHANNEL[op.name])
    found, expected = op.reference(y), op.reference(style)
    # A thousand roundings of float32, and eps against a variance of 1 and of 9.
    assert np.abs(found.mean - expected.mean).max() < 1000 * 2.0**-24
    assert np.abs(found.var / expected.var - 1).max() < 1000 * 2.0**-24 + 2e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in SHARED_MEMORY])
def test_out(layout, dtype, op, isa, rng):
    content, style = (place(s, op) for s in SHAPES["small"])
    dy, content = (lay(uniform(rng, content, dtype), layout) for _ in range(2))
    style = uniform(rng, style, dtype)
    y, mean, rstd = check(op, content, style)
    options = {"channel_axis": CHANNEL[op.name]}
    out = Guarded(content.shape, dtype, layout)
    assert normkit.adaptive_instance_norm(content, style, out=out.array, **options) is out.array
    assert bits(out.array) == bits(y)
    backward = normkit.adaptive_instance_norm_backward
    dcontent = backward(dy, content, style, mean, rstd, **options)[0]
    assert backward(dy, content, style, mean, rstd, out=out.array, **options)[0] is out.array
    assert bits(out.array) == bits(dcontent)
    assert out.untouched()
    assert bits(normkit.adaptive_instance_norm(content, style, out=content, **options)) == bits(y)


@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_out_dtype(dtype, out_dtype, op, rng):
    content, style = (uniform(rng, place(s, op), dtype) for s in SHAPES["small"])
    check(op, content, style, out_dtype=out_dtype)


@pytest.mark.parametrize("need", [(), ("dcontent",), ("dstyle",), ("dstyle", "dcontent")], ids=str)
def test_need_leaves_out_what_is_not_named(need, op, rng):
    content, style = (uniform(rng, place(s, op)) for s in SHAPES["small"])
    dy = uniform(rng, content.shape)
    stats = op.statistics(content)[1:]
    options = {"channel_axis": CHANNEL[op.name]}
    everything = normkit.adaptive_instance_norm_backward(dy, content, style, *stats, **options)
    found = normkit.adaptive_instance_norm_backward(dy, content, style, *stats, need=need, **options)
    for name, part, whole in zip(("dcontent", "dstyle"), found, everything, strict=True):
        assert (part is not None) == (name in need)
        assert part is None or bits(part) == bits(whole)


@pytest.mark.parametrize("need", ["dstyle", None, 1], ids=repr)
def test_need_is_a_tuple_of_names(need, op, rng):
    content, style = (uniform(rng, place(s, op)) for s in SHAPES["small"])
    stats = op.statistics(content)[1:]
    expected = r"a tuple of names from \('dcontent', 'dstyle'\)"
    with pytest.raises(TypeError, match=rf"^need is {need!r}, expected {expected}$"):
        normkit.adaptive_instance_norm_backward(content, content, style, *stats, need=need)
    with pytest.raises(ValueError, match=r"^need has array\(\[1\., 1\.\]\), expected names from "):
        normkit.adaptive_instance_norm_backward(content, content, style, *stats, need=np.ones((2, 2)))


def test_gradients_are_differences(op, rng):
    """The gradients are compared with differences of the function itself, in float64: no reference is between."""
    content, style = (uniform(rng, place(s, op), np.float64) for s in SHAPES["small"])
    dy, options = uniform(rng, content.shape, np.float64), {"channel_axis": CHANNEL[op.name]}
    gradients = normkit.adaptive_instance_norm_backward(dy, content, style, *op.statistics(content)[1:], **options)
    step = 1e-6
    for argument, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            at = [content, style]
            at[argument] = at[argument] + sign * step * direction
            ends.append(float((dy * normkit.adaptive_instance_norm(*at, **options)).sum()))
        # Roundings of two sums over twice the step; third derivatives of a root near 1.
        scale = np.abs(dy).sum() * 10
        error = 8 * 2.0**-52 * scale / step + 100 * scale * step**2
        assert abs((ends[0] - ends[1]) / (2 * step) - (gradient * direction).sum()) <= error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_style_stays_in_its_channel(value, op, rng):
    content, style = (uniform(rng, place(s, op)) for s in SHAPES["small"])
    options = {"channel_axis": CHANNEL[op.name]}
    clean = np.moveaxis(normkit.adaptive_instance_norm(content, style, **options), CHANNEL[op.name], 1)
    np.moveaxis(style, CHANNEL[op.name], 1)[1, 2, 0, 0] = value
    y = np.moveaxis(normkit.adaptive_instance_norm(content, style, **options), CHANNEL[op.name], 1)
    others = np.ones((3, 5), bool)
    others[1, 2] = False
    assert bits(y[others]) == bits(clean[others])
    assert not np.isfinite(y[1, 2]).any()


X = np.ones((2, 3, 4, 4), np.float32)
ERRORS = {
    "images": (np.ones((3, 3, 4, 4), np.float32), ValueError),
    "channels": (np.ones((2, 4, 4, 4), np.float32), ValueError),
    "too-few-axes": (np.ones(3, np.float32), ValueError),
    "complex": (np.ones((2, 3, 4, 4), complex), TypeError),
    "object": (np.ones((2, 3, 4, 4), object), TypeError),
}


@pytest.mark.parametrize(("style", "kind"), ERRORS.values(), ids=ERRORS)
def test_errors(style, kind):
    """Errors name the argument, and come before anything is written."""
    out, stats = Guarded(X.shape, np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(kind, match=r"^style has "):
        normkit.adaptive_instance_norm(X, style, out=out.array)
    with pytest.raises(kind, match=r"^style has "):
        normkit.adaptive_instance_norm_backward(X, X, style, stats, stats, out=out.array)
    assert out.unwritten()
