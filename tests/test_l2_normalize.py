"""l2_normalize is RMS norm without eps, times 1 / sqrt(n), where norms are above its own eps: the reference of that and
its bounds serve. Where n is a power of four that factor is exact, and both have the same bits."""

import math

import normkit as nk
import numpy as np
import pytest
from bounds import dx as bound_of_dx
from bounds import excess
from bounds import rstd as bound_of_rnorm
from bounds import y as bound_of_y
from cases import DTYPES, INTEGERS, LAYOUTS, bits, lay, uniform
from checks import result_dtype, same_order, unchanged
from reference import compute, over_axes

AXES = {"last": (-1,), "last-two": (-2, -1), "channels": (1,), "all": (0, 1, 2, 3)}


def check(dy, x, axis, **options):
    op = over_axes("rms", lambda ndim: axis, center=False)
    root = math.sqrt(math.prod(x.shape[a] for a in axis))
    weight = np.array(1 / root, np.longdouble)
    with unchanged(x):
        y, rnorm = nk.l2_normalize(x, axis=axis, return_stats=True, **options)
    assert (y.shape, y.dtype, rnorm.dtype) == (x.shape, result_dtype(x), compute(x.dtype))
    assert rnorm.shape == op.statistics_shape(x.shape)
    f = op.reference(x, weight, eps=0)
    assert excess(y, f.y, bound_of_y(f, x.dtype, y.dtype)) <= 1
    assert excess(rnorm.reshape(f.rstd.shape), f.rstd / root, bound_of_rnorm(f, x.dtype) / root) <= 1
    if dy is None:
        return y
    with unchanged(dy, x, rnorm):
        dx = nk.l2_normalize_backward(dy, x, rnorm, axis=axis, **options)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    b = op.reference_backward(dy, x, None, rnorm.astype(np.longdouble) * root, weight)
    assert excess(dx, b.dx, bound_of_dx(b, x.dtype)) <= 1
    return y, dx


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
def test_layouts(axis, layout, dtype, isa, rng):
    dy, x = (lay(uniform(rng, (3, 5, 4, 7), dtype), layout) for _ in range(2))
    for result in check(dy, x, axis):
        assert layout in ("same-images", "same-columns") or same_order(x, result)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
def test_every_dtype_of_integers(dtype, isa, rng):
    check(None, uniform(rng, (3, 5, 4, 7), dtype), (-1,))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(9, 4), (300, 16), (5, 64), (3, 1024), (2, 16384), (1, 262144)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
def test_options_of_rms_norm_give_the_same_bits(last, shape, dtype, isa, rng):
    """Short rows and long ones, side by side and apart."""
    axis, root = (0, math.isqrt(shape[1])) if last else (1, math.isqrt(shape[1]))
    dy, x = (uniform(rng, shape[::-1] if last else shape, dtype) for _ in range(2))
    dtype = compute(x.dtype)
    wide = {"out_dtype": dtype}  # no subnormal halves
    y, rstd = nk.normalize(x, axis=axis, center=False, eps=0, return_stats=True, **wide)
    found, rnorm = nk.l2_normalize(x, axis=axis, return_stats=True)
    assert bits(found) == bits((y / dtype.type(root)).astype(x.dtype))
    assert bits(rnorm) == bits(rstd / dtype.type(root))
    if x.dtype != dtype:
        return
    dx, *_ = nk.normalize_backward(dy, x, None, rstd, axis=axis, center=False, need=("dx",))
    assert bits(nk.l2_normalize_backward(dy, x, rnorm, axis=axis)) == bits(dx / dtype.type(root))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_options_eps_is_the_least_divisor(dtype, isa, rng):
    """Rows have norms of 0, below eps, and above it. Below eps the gradient is that of a constant divisor."""
    x, dy = (uniform(rng, (4, 300), dtype) for _ in range(2))
    x[0], x[2] = 0, x[2] * 4
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(1))
    eps = 2.0 ** math.ceil(math.log2(norms[[1, 3]].max()))
    assert norms[2] > eps
    y, rnorm = nk.l2_normalize(x, eps=eps, return_stats=True)
    dx = nk.l2_normalize_backward(dy, x, rnorm, eps=eps)
    for k in (0, 1, 3):
        assert rnorm[k] == 1 / eps
        assert bits(y[k]) == bits((x[k].astype(np.float64) / eps).astype(x.dtype))
        assert bits(dx[k]) == bits((dy[k].astype(np.float64) / eps).astype(x.dtype))
    own, rnorm_2 = nk.l2_normalize(x[2], return_stats=True)
    assert bits(y[2]) == bits(own)
    assert bits(dx[2]) == bits(nk.l2_normalize_backward(dy[2], x[2], rnorm_2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options_eps_of_nothing(dtype, rng):
    zero, x = np.zeros((2, 5), dtype), uniform(rng, (2, 5), dtype)
    y, rnorm = nk.l2_normalize(zero, eps=0, return_stats=True)
    assert (y == 0).all()
    assert (rnorm == 0).all()
    assert (nk.l2_normalize_backward(x, zero, rnorm, eps=0) == 0).all()
    least = np.finfo(dtype).tiny
    y, rnorm = nk.l2_normalize(zero, eps=least, return_stats=True)
    assert (y == 0).all()
    assert (rnorm == 1 / least).all()
    assert bits(nk.l2_normalize(x, eps=least)) == bits(nk.l2_normalize(x, eps=0))
    with pytest.raises(ValueError, match=r"^eps is .*, expected 0 or at least .*: 1 / eps is to be finite$"):
        nk.l2_normalize(x, eps=float(least) / 2)


def test_bad_values_stay_in_their_row(isa, rng):
    x = uniform(rng, (3, 40))
    x[1, 7] = np.nan
    y = nk.l2_normalize(x)
    assert np.isnan(y[1]).all()
    assert bits(y[::2]) == bits(nk.l2_normalize(x[::2].copy()))


def test_out(isa, rng):
    x, dy = uniform(rng, (2, 5, 40)), uniform(rng, (2, 5, 40))
    y, rnorm = nk.l2_normalize(x, axis=1, return_stats=True)
    dx = nk.l2_normalize_backward(dy, x, rnorm, axis=1)
    out = np.full_like(x, np.nan)
    assert nk.l2_normalize_backward(dy, x, rnorm, axis=1, out=out) is out
    assert bits(out) == bits(dx)
    assert nk.l2_normalize(x, axis=1, out=x) is x
    assert bits(x) == bits(y)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)], ids=str)
def test_empty(shape):
    x = np.zeros(shape, np.float32)
    y, rnorm = nk.l2_normalize(x, return_stats=True)
    assert (y.shape, rnorm.shape) == (shape, shape[:-1])
    assert nk.l2_normalize_backward(x, x, rnorm).shape == shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, r: nk.l2_normalize_backward(x, x, None), r"^rnorm is None, expected an array: one element per stat"),
        (lambda x, r: nk.l2_normalize_backward(x, x, r[:1]), r"^rnorm has shape \(1,\), expected \(2,\)"),
        (lambda x, r: nk.l2_normalize_backward(x, x, r.astype(int)), r"^rnorm has dtype int64, expected float32"),
        (lambda x, r: nk.l2_normalize_backward(x, x, [1, 2]), r"^rnorm is a list"),
        (lambda x, r: nk.l2_normalize_backward(x, x, x[:, 0], out=x.T[:5].T), r"^out overlaps rnorm, expected memory"),
        (lambda x, r: nk.l2_normalize_backward(x, x, r, eps=-1), r"^eps is -1.0, expected a finite number"),
        (lambda x, r: nk.l2_normalize(x, eps=None), r"^eps is None, expected a number"),
        (lambda x, r: nk.l2_normalize(x, axis=2), r"^axis is 2, expected -2 to 1"),
        (lambda x, r: nk.l2_normalize(x.astype(complex)), r"^x has dtype complex128, expected float32"),
    ],
)
def test_errors(call, message, rng):
    x = uniform(rng, (2, 5))
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, nk.l2_normalize(x, return_stats=True)[1])
