"""Errors that a correct kernel may make, as formulas. None of them is tuned.

u      unit roundoff of the compute type: 2^-24, or 2^-53 where x is float64
h      roundings that one term of a sum meets, see depth()
k      distance of a pivot from the mean of what is summed about it, in standard deviations, see _pivot()
e      distance of a statistic's mean from what it rounds to in the compute type

All bounds are of first order in u, with each count of roundings rounded up to cover the second order.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from cases import DTYPES
from reference import compute

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}
DOUBLE = UNIT["float64"]


def unit(dtype: Any) -> float:
    return UNIT[compute(dtype).name]


def depth(terms: int, *, longest: int) -> int:
    """Roundings that one term of a sum meets: those of its accumulator, which adds at most `longest` terms in a row,
    and ten more, of a difference, a product, a weight, a sum of sums, and the 2 + 4 additions that fold accumulators.

    Chunks of at most 4096 elements are summed in the compute type; the rest is added in double. Several rows of a chunk
    add up in the same accumulators, once for each row that is shorter than a vector: 2048 times for rows of 2.
    """
    return min(terms, longest) + 10


FORWARD = 16 + 2048 // 16  # sums of 16, and the sum of those
BACKWARD = 2048


def stored(y: Any, dtype: Any) -> Any:
    """Rounding to a storage type, subnormals included."""
    name = np.dtype(dtype).name
    return UNIT[name] * np.abs(y) + SMALLEST[name]


def _average(x: Any, like: SimpleNamespace) -> Any:
    return np.abs(x).mean(like.axis, keepdims=True)


def _pivot(f: SimpleNamespace) -> Any:
    """k: a pivot averages members, so it is no farther from the mean than the farthest of them; nor farther than 4,
    where the kernel starts again in double."""
    far = np.abs(f.x - f.mean).max(f.axis, keepdims=True)
    spread = np.sqrt(f.var)
    return np.clip(np.divide(far, spread, out=np.ones_like(far), where=spread > 0), 1, 4)


def mean_error(f: SimpleNamespace, dtype: Any, *, exact: bool = False) -> Any:
    """Of the mean before it is rounded: h u times the average |x - pivot|, at most sqrt(1 + k^2) standard deviations;
    then one rounding of doubles for every merge, at most n / 128 + 18 of them. `exact`: the sums round nowhere."""
    h = 0 if exact else depth(f.members, longest=FORWARD)
    merges = DOUBLE * (f.members / 128 + 18) * np.abs(f.x).max(f.axis, keepdims=True)
    return h * unit(dtype) * np.sqrt((1 + _pivot(f) ** 2) * f.var) + merges


def rstd_error(f: SimpleNamespace, dtype: Any, *, exact: bool = False) -> Any:
    """Of rstd, relative, before it is rounded.

    n var = sum of d^2 - (sum of d)^2 / n, with d = x - pivot. The first is n (1 + k^2) var with h roundings, the second
    n k^2 var with 2 h, where |sum of d| is at most sqrt(n sum of d^2). Merging chunks whose means are E off changes
    var by at most 2 std E + E^2. A relative change r of var + eps moves the root by r/2 (1 + 2 r).
    """
    h, k = 0 if exact else depth(f.members, longest=FORWARD), _pivot(f)
    off = mean_error(f, dtype, exact=exact)
    change = h * unit(dtype) * f.var * (1 + k**2 + 2 * k * np.sqrt(1 + k**2)) + 2 * np.sqrt(f.var) * off + off**2
    change = change + (f.members / 128 + 18) * DOUBLE * (f.var + f.eps)
    total = f.var + f.eps
    r = np.divide(change, total, out=np.zeros_like(change), where=total > 0)
    return r / 2 * (1 + 2 * r) + 4 * DOUBLE


def mean(f: SimpleNamespace, dtype: Any) -> Any:
    return mean_error(f, dtype) + stored(f.mean, compute(dtype))


def rstd(f: SimpleNamespace, dtype: Any) -> Any:
    return f.rstd * rstd_error(f, dtype) + stored(f.rstd, compute(dtype))


def y(f: SimpleNamespace, dtype: Any, out_dtype: Any = None, *, exact: bool = False) -> Any:
    """Of y = fma(x - mean, scale, shift), or fma of that and of weight and bias that follow the elements.

    Relative to x_hat * weight: the difference, the scale, the weight, two products and two sums, 7 u. Bias: 2 u. The
    rounded mean is u |mean| off, which the shift makes good but for 4 more roundings of it. Given statistics (no var)
    make no errors of their own.
    """
    u = unit(dtype)
    scaled = np.abs(f.x_hat * f.weight)
    error = u * (7 * scaled + 2 * np.abs(f.bias) + np.abs(f.y)) + np.abs(f.weight) * f.rstd * 4 * u * u * np.abs(f.mean)
    if f.var is not None:
        error = error + np.abs(f.weight) * f.rstd * mean_error(f, dtype, exact=exact)
        error = error + scaled * rstd_error(f, dtype, exact=exact)
    return error + stored(
        np.abs(f.y) + error, out_dtype or (dtype if np.dtype(dtype) in DTYPES.values() else np.float32)
    )


def _deviation(b: SimpleNamespace, dtype: Any) -> tuple[Any, Any]:
    """|x - mean| as the kernel meets it, about a rounded mean; and how far that mean is off. A kernel that is given the
    mean rounded by the caller finds the rest, e, in the data."""
    e = 2 * unit(dtype) * np.abs(b.mean)
    return np.abs(b.x - b.mean) + e, e


def dx(b: SimpleNamespace, dtype: Any, *, exact: bool = False) -> Any:
    """Of dx = fma(g, a, fma(x - mean, b, c)).

    Roundings: 7 u of g * rstd and of (x - mean) * b, 4 u of c. The sums: mean(g) meets h roundings, mean(g (x - mean))
    too; taken about a mean that is e off, the latter is recentered with mean(x - mean), and both errors enter by e.
    """
    u, h = unit(dtype), 0 if exact else depth(b.members, longest=BACKWARD)
    far, e = _deviation(b, dtype)
    slope = b.rstd**2 * np.abs(b.mean_gx)
    parts = 7 * np.abs(b.g * b.rstd) + 7 * far * slope + 4 * np.abs(b.mean_g * b.rstd)
    error = u * parts
    if not b.frozen:
        off_g = h * u * _average(b.g, b)
        off_mean = h * u * _average(far, b) + 4 * DOUBLE * np.abs(b.mean)
        off_gx = h * u * _average(np.abs(b.g) * far, b) + e * off_g + off_mean * _average(b.g, b)
        error = error + b.rstd**3 * far * off_gx + b.rstd * off_g * b.center + (off_mean * b.center + 4 * u * e) * slope
    return error + stored(np.abs(b.dx) + error, dtype)


def dweight(b: SimpleNamespace, dtype: Any, count: int, *, exact: bool = False) -> Any:
    """Of the terms of dweight = sum of dy * x_hat, `count` of them to a parameter: h roundings each, about a mean that
    is off by what the sums of the statistic leave. For every element; the caller adds them up as it adds the terms."""
    u, h = unit(dtype), 6 if exact else depth(max(b.members, count), longest=BACKWARD)
    far, e = _deviation(b, dtype)
    off_mean = 0 if b.frozen or exact else h * u * _average(far, b) * b.center + 4 * DOUBLE * np.abs(b.mean)
    return b.rstd * np.abs(b.dy) * (h * u * (far + (e if not exact else 4 * u * e)) + off_mean)


def dbias(b: SimpleNamespace, dtype: Any, count: int) -> Any:
    """Of the terms of dbias = sum of dy."""
    return depth(count, longest=BACKWARD) * unit(dtype) * np.abs(b.dy) + np.zeros_like(b.x)


def double_backward(d: SimpleNamespace) -> tuple[Any, Any, Any]:
    """Of d_dy, d_x and the terms of d_weight, before they are rounded to their dtypes. All arithmetic is in double.

    Every operation, on numbers that are taken for positive, makes a relative error of one unit: so the error is the
    formula of absolute values, with + for every -, times the most roundings that stand behind any of its terms. Sums
    meet h roundings. There are h + 5 behind x_hat, which is recentered; 3 h + 20 behind a projection by the core, whose
    sums are recentered too; h + 2 more behind a mean of that, 5 in the rest: 5 h + 40, with 8 to spare.
    """
    n = (5 * depth(d.members, longest=BACKWARD) + 40) * DOUBLE
    (v, ddw, ddb), dy, w, rstd = map(np.abs, d.dds), np.abs(d.dy), np.abs(d.w), d.rstd
    x_hat = rstd * np.abs(d.x - d.mean)
    if not d.frozen and d.center:
        x_hat = x_hat + _average(x_hat, d)

    def projected(u: Any) -> Any:
        return u if d.frozen else u + d.center * _average(u, d) + x_hat * _average(u * x_hat, d)

    g, q, along = dy * w, dy * ddw, projected(v)
    d_x = rstd * projected(q)
    if not d.frozen:
        a, b, c = (_average(u, d) for u in (g * x_hat, v * x_hat, along * g))
        d_x = d_x + rstd**2 * (c * x_hat + b * projected(g) + a * along)
    return n * (w * rstd * along + ddw * x_hat + ddb), n * d_x, n * dy * rstd * along


def count_of(shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
    """Elements of x that share one parameter."""
    return math.prod(shape) // max(math.prod(weight_shape), 1)


def excess(found: Any, truth: Any, bound: Any) -> float:
    """How far the error exceeds its bound, as a factor: at most 1 for a correct kernel."""
    found = np.asarray(found).astype(np.asarray(truth).dtype)
    error = np.abs(found - truth)
    if error.size == 0:
        return 0.0
    ratio = np.divide(
        error, bound, out=np.where(error == 0, 0, np.inf).astype(error.dtype), where=np.asarray(bound) > 0
    )
    return float(np.where(np.isnan(error), np.inf, ratio).max())
