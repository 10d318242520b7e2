"""Errors that a correct kernel may make, as formulas. None of them is tuned.

u      unit roundoff of the compute type: 2^-24, or 2^-53 where x is float64
n      members of a statistic: those that a mask leaves. Zeros in the place of the others round nowhere
h      roundings that one term of a sum meets, see depth()
k      distance of a pivot from the mean of what is summed about it, in standard deviations, see _pivot()
e      distance of a statistic's mean from what it rounds to in the compute type

All bounds are of first order in u, with each count of roundings rounded up to cover the second order.
"""

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from activations import curvature, split
from activations import slope as activation_slope
from cases import DTYPES
from reference import compute, inside

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074, "float16": 2.0**-24, "bfloat16": 2.0**-133}
LARGEST = {
    "float32": 2.0**128 * (1 - 2.0**-24),
    "float64": np.inf,
    "float16": 65504.0,
    "bfloat16": 2.0**128 * (1 - 2.0**-8),
}
DOUBLE = UNIT["float64"]

# An activation: its value relative to itself, its derivative relative to the steepest one, in units of u. Below TINY,
# where exponentials run out, the error is absolute.
ACTIVATION = 16
GELU_TANH = 8
TINY = {"float32": 1e-37, "float64": 1e-300}
# The steepest derivative and the steepest of that between kinks, rounded up. Of those with a parameter, see steepest().
STEEPEST = {
    "relu": (1, 0),
    "leaky_relu": (1, 0),
    "silu": (1.1, 0.5),
    "gelu": (1.13, 0.8),
    "gelu_tanh": (1.13, 0.8),
    "elu": (1, 1),
    "sigmoid": (0.25, 0.0963),
    "tanh": (1, 0.77),
    "relu6": (1, 0),
    "hardswish": (1.5, 1 / 3),
    "mish": (1.09, 0.645),
    "softplus": (1, 0.25),
    "prelu": (1, 0),
}
# Where a derivative jumps, and by how much. That of an activation with a parameter jumps at 0.
KINKS = {"relu": {0: 1.0}, "relu6": {0: 1.0, 6: 1.0}, "hardswish": {-3: 0.5, 3: 0.5}}


def unit(dtype: Any) -> float:
    return UNIT[compute(dtype).name]


def evaluation(activation: Any, z: Any) -> Any:
    """Units of u, relative, that the value of an activation is off by itself: ACTIVATION. gelu_tanh is z * sigmoid(v)
    with a cubic v, and the sigmoid of a rounded v is off by |v| roundings of it."""
    if activation is None or split(activation)[0] != "gelu_tanh":
        return ACTIVATION
    v = 2 * math.sqrt(2 / math.pi) * np.abs(z) * (1 + 0.044715 * z * z)
    # Where the sigmoid has vanished nothing is left to be off.
    return GELU_TANH * (1 + np.minimum(v, 800))


def steepest(activation: Any) -> tuple[Any, Any, dict[float, Any]]:
    """The steepest derivative of an activation, the steepest of that, and by how much the derivative jumps where."""
    if activation is None:
        return 1.0, 0.0, {}
    name, parameter = split(activation)
    first, second = STEEPEST[name]
    if not parameter:
        return first, second, KINKS.get(name, {})
    parameter = parameter[0]  # of prelu an array
    return np.maximum(first, np.abs(parameter)), second * np.abs(parameter), {0: np.abs(1 - parameter)}


def depth(terms: Any, *, longest: int) -> Any:
    """Roundings that one term of a sum meets: those of its accumulator, which adds at most `longest` terms in a row,
    and ten more, of a difference, a product, a weight, a sum of sums, and the 2 + 4 additions that fold accumulators.

    Chunks of at most 4096 elements are summed in the compute type; the rest is added in double. Several rows of a chunk
    add up in the same accumulators, once for each row that is shorter than a vector: 2048 times for rows of 2.
    """
    return np.minimum(terms, longest) + 10


FORWARD = 16 + 2048 // 16  # sums of 16, and the sum of those
BACKWARD = 2048


def stored(y: Any, dtype: Any) -> Any:
    """Rounding to a storage type, subnormals included; without bound where the type ends."""
    name = np.dtype(dtype).name
    return np.where(np.abs(y) > LARGEST[name], np.inf, UNIT[name] * np.abs(y) + SMALLEST[name])


def _sum(x: Any, like: SimpleNamespace) -> Any:
    return np.abs(x).sum(like.axis, keepdims=True)


def _average(x: Any, like: SimpleNamespace) -> Any:
    """A sum over all elements, whose outputs all depend on the statistics, divided by the number of members."""
    return _sum(x, like) / np.maximum(like.members, 1)


def _pivot(f: SimpleNamespace) -> Any:
    """k: a pivot averages members, so it is no farther from the mean than the farthest of them; nor farther than 4,
    where the kernel starts again in double."""
    spread = np.sqrt(f.var)
    return np.clip(np.divide(f.farthest, spread, out=np.ones_like(f.farthest), where=spread > 0), 1, 4)


def mean_error(f: SimpleNamespace, dtype: Any, *, exact: bool = False) -> Any:
    """The error of the mean before it is rounded: h u times the average |x - pivot|, at most sqrt(1 + k^2) standard
    deviations; then one rounding of doubles for every merge, at most one for 128 elements and 18 more. Where x is
    float64 itself the mean has twice the digits, and a merge rounds the distance of two means. `exact`: the sums round
    nowhere."""
    h = 0 if exact else depth(f.members, longest=FORWARD)
    rounded = 2 * f.farthest + DOUBLE * f.largest if unit(dtype) == DOUBLE else f.largest
    merges = DOUBLE * (f.elements / 128 + 18) * rounded
    return h * unit(dtype) * np.sqrt((1 + _pivot(f) ** 2) * f.var) + merges


def rstd_error(f: SimpleNamespace, dtype: Any, *, exact: bool = False) -> Any:
    """The relative error of rstd before it is rounded.

    n var = sum of d^2 - (sum of d)^2 / n, with d = x - pivot. The first is n (1 + k^2) var with h roundings, the second
    n k^2 var with 2 h, where |sum of d| is at most sqrt(n sum of d^2). Merging chunks whose means are E off changes
    var by at most 2 std E + E^2. A relative change r of var + eps moves the root by r/2 (1 + 2 r).
    """
    h, k = 0 if exact else depth(f.members, longest=FORWARD), _pivot(f)
    off = mean_error(f, dtype, exact=exact)
    change = h * unit(dtype) * f.var * (1 + k**2 + 2 * k * np.sqrt(1 + k**2)) + 2 * np.sqrt(f.var) * off + off**2
    change = change + (f.elements / 128 + 18) * DOUBLE * (f.var + f.eps)
    total = f.var + f.eps
    r = np.divide(change, total, out=np.zeros_like(change), where=total > 0)
    return r / 2 * (1 + 2 * r) + 4 * DOUBLE


def mean(f: SimpleNamespace, dtype: Any) -> Any:
    return mean_error(f, dtype) + stored(f.mean, compute(dtype))


def rstd(f: SimpleNamespace, dtype: Any) -> Any:
    return f.rstd * rstd_error(f, dtype) + stored(f.rstd, compute(dtype))


def _offset(f: SimpleNamespace, dtype: Any) -> Any:
    """The error of weight + weight_offset: each is rounded to the compute type, and so is their sum."""
    if f.weight_offset == 0:
        return 0.0
    return unit(dtype) * (np.abs(f.weight - f.weight_offset) + np.abs(f.weight_offset) + np.abs(f.weight))


def z(f: SimpleNamespace, dtype: Any) -> Any:
    """The error of z = fma(x - mean, scale, shift), or of an fma of that with a weight and a bias that follow the
    elements. The errors of given statistics come on top.

    Relative to x_hat * weight: the difference, the scale, the weight, two products and two sums, 7 u. Bias: 2 u. The
    rounded mean is u |mean| off, which the shift makes good but for 4 more roundings of it.
    """
    u = unit(dtype)
    error = u * (7 * np.abs(f.x_hat * f.weight) + 2 * np.abs(f.bias) + np.abs(f.z))
    error = error + np.abs(f.weight) * f.rstd * 4 * u * u * np.abs(f.mean)
    return error + np.abs(f.x_hat) * _offset(f, dtype)


def y(
    f: SimpleNamespace,
    dtype: Any,
    out_dtype: Any = None,
    *,
    exact: bool = False,
    off_weight: Any = 0,
    off_bias: Any = 0,
) -> Any:
    """The error of y, the activation of z. Statistics that are not given (they have a var) add their errors, and so do
    weight and bias where they are off by `off_weight` and `off_bias`. The activation passes the error of z on, times
    its steepest derivative, and adds its own."""
    error = z(f, dtype) + np.abs(f.x_hat) * off_weight + off_bias
    if f.var is not None:
        error = error + np.abs(f.weight) * f.rstd * mean_error(f, dtype, exact=exact)
        error = error + np.abs(f.x_hat * f.weight) * rstd_error(f, dtype, exact=exact)
    if f.activation is not None:
        error = steepest(f.activation)[0] * error
        error = error + evaluation(f.activation, f.z) * unit(dtype) * (np.abs(f.y) + error) + TINY[compute(dtype).name]
    return error + stored(
        np.abs(f.y) + error, out_dtype or (dtype if np.dtype(dtype) in DTYPES.values() else np.float32)
    )


def _deviation(b: SimpleNamespace, dtype: Any) -> tuple[Any, Any]:
    """|x - mean| as the kernel meets it, about a rounded mean; and how far that mean is off. A kernel that is given the
    mean rounded by the caller finds the rest, e, in the data."""
    e = 2 * unit(dtype) * np.abs(b.mean)
    return np.abs(b.x - b.mean) + e, e


def _off_z(b: SimpleNamespace, dtype: Any) -> Any:
    """What backward's z is off, taken at the given mean or at that of the data."""
    return z(b, dtype) + np.abs(b.weight) * b.rstd * (2 * unit(dtype) * np.abs(b.mean) + np.abs(b.given - b.mean))


def dz(b: SimpleNamespace, dtype: Any) -> Any:
    """Of dz = dy * activation'(z), beyond what a dy has that is given: the derivative's own error and that of z, times
    the steepest second derivative; a product. Where z is nearer to a kink than its error, the derivative may be that of
    the other side."""
    if b.activation is None:
        return 0.0
    first, second, kinks = steepest(b.activation)
    u = unit(dtype)
    off = _off_z(b, dtype)
    jumps = sum(jump * (np.abs(b.z - kink) <= off) for kink, jump in kinks.items())
    derivative = second * off + jumps + ACTIVATION * u * first
    return np.abs(b.dy) * derivative + u * np.abs(b.dz) + TINY[compute(dtype).name]


def _through(b: SimpleNamespace, off_g: Any) -> Any:
    """The error of dx where g is off by off_g: dx is linear in g."""
    if b.frozen:
        return b.rstd * off_g
    averages = _average(off_g, b) * b.center + np.abs(b.x_hat) * _average(off_g * np.abs(b.x_hat), b)
    return b.rstd * (off_g + inside(averages, b.where))


def dx(b: SimpleNamespace, dtype: Any, *, exact: bool = False, off_weight: Any = 0) -> Any:
    """The error of dx = fma(g, a, fma(x - mean, b, c)), and of dresidual added to it.

    Roundings: 7 u of g * rstd and of (x - mean) * b, 4 u of c. The sums: mean(g) meets h roundings, mean(g (x - mean))
    too; taken about a mean that is e off, the latter is recentered with mean(x - mean), and both errors enter by e.
    What no member is has neither. A g that is off, by its weight or by an activation, passes that on.
    """
    u, h = unit(dtype), 0 if exact else depth(b.elements, longest=BACKWARD)
    far, e = _deviation(b, dtype)
    near = inside(far, b.where)
    slope = b.rstd**2 * np.abs(b.mean_gx)
    error = u * (7 * np.abs(b.g * b.rstd) + inside(7 * far * slope + 4 * np.abs(b.mean_g * b.rstd), b.where))
    if not b.frozen:
        off_g = h * u * _average(b.g, b)
        off_mean = h * u * _average(near, b) + 4 * DOUBLE * np.abs(b.mean) * (u if u == DOUBLE else 1)
        off_gx = h * u * _average(np.abs(b.g) * far, b) + e * off_g + off_mean * _average(b.g, b)
        sums = b.rstd**3 * far * off_gx + b.rstd * off_g * b.center + (off_mean * b.center + 4 * u * e) * slope
        error = error + inside(sums, b.where)
    if b.activation is not None or b.weight_offset != 0 or np.ndim(off_weight):
        off_weight = off_weight + _offset(b, dtype)
        error = error + _through(b, np.abs(b.weight) * dz(b, dtype) + np.abs(b.dz) * off_weight)
    if b.dresidual is not None:
        error = error + u * np.abs(b.dx)
    return error + stored(np.abs(b.dx) + error, dtype)


def dweight(b: SimpleNamespace, dtype: Any, count: int, *, exact: bool = False) -> Any:
    """The error of each term of dweight = sum of dz * x_hat, `count` terms to a parameter: h roundings, about a mean
    that is off by what the sums of the statistic leave. The caller adds the errors up as it adds the terms."""
    u, h = unit(dtype), 6 if exact else depth(max(b.elements, count), longest=BACKWARD)
    far, e = _deviation(b, dtype)
    off_mean = 0
    if not (b.frozen or exact):
        off_mean = h * u * _average(inside(far, b.where), b) * b.center + 4 * DOUBLE * np.abs(b.mean)
    error = b.rstd * np.abs(b.dz) * (h * u * (far + (e if not exact else 4 * u * e)) + off_mean)
    return error + np.abs(b.x_hat) * dz(b, dtype)


def dbias(b: SimpleNamespace, dtype: Any, count: int) -> Any:
    """The error of each term of dbias = sum of dz."""
    return depth(count, longest=BACKWARD) * unit(dtype) * np.abs(b.dz) + dz(b, dtype) + np.zeros_like(b.x)


def dslopes(b: SimpleNamespace, dtype: Any, count: int) -> Any:
    """Of the terms of dslopes = sum of dy * min(z, 0): h roundings each and one of the product, and what z is off."""
    n = depth(count, longest=BACKWARD) + 1
    return n * unit(dtype) * np.abs(b.dslopes) + np.abs(b.dy) * _off_z(b, dtype) + np.zeros_like(b.x)


def double_backward_roundings(elements: int, dtype: Any) -> float:
    """See double_backward()."""
    return (5 * depth(elements, longest=BACKWARD) + 40) * DOUBLE + 10 * unit(dtype)


def double_backward(d: SimpleNamespace, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """The errors of d_dy, d_x and the terms of d_weight and d_bias before they are rounded to their dtypes. `dtype` is
    that of x.

    Sums are in double, where every operation, on numbers that are taken for positive, makes a relative error of one
    unit: so the error is the formula of absolute values, with + for every -, times the most roundings that stand behind
    any of its terms. Sums meet h roundings, of all elements where there is a mask. There are h + 5 behind x_hat, which
    is recentered; 2 h + 12 behind a mean of u * x_hat, whose sum is recentered too; 3 h + 20 behind a projection;
    h + 2 more behind a mean of that, 5 in the rest: 5 h + 40, with 8 to spare. Results are in the compute type: there
    are 3 behind x_hat, 3 behind what is multiplied by it, of which 2 are those of a parameter and of what that is
    multiplied by, 2 in adding up, and 1 in multiplying by rstd: 10, with 1 to spare.

    Through an activation dy is e = f'(z) dy, and all is linear in that: what e is off by itself goes through the same
    formula. What f'' sends to z, dz = f''(z) dy D where D is d_dy before f'(z), goes through that of a backward.
    """
    elements = math.prod(d.x.shape[a] for a in d.axis)
    n = double_backward_roundings(elements, dtype)
    (v, ddw, ddb), w, rstd = map(np.abs, d.dds), np.abs(d.w), d.rstd
    x_hat = rstd * np.abs(d.x - d.mean)
    if not d.frozen and d.center:
        x_hat = x_hat + _average(inside(x_hat, d.where), d)

    def averages(u: Any) -> Any:
        return 0 if d.frozen else d.center * _average(u, d) + x_hat * _average(u * x_hat, d)

    def projected(u: Any) -> Any:
        return u + inside(averages(u), d.where)

    of_v = inside(v, d.where)
    along = v + averages(of_v)
    before = w * rstd * along + ddw * x_hat + ddb  # D

    def of_dy(e: Any) -> Any:
        g, q = e * w, e * ddw
        d_x = rstd * projected(q)
        if d.frozen:
            return d_x
        a, b, c = (_average(u, d) for u in (g * x_hat, of_v * x_hat, along * g))
        return d_x + rstd**2 * (inside(c * x_hat, d.where) + b * projected(g) + a * projected(of_v))

    if d.first.activation is None:
        e = np.abs(d.dy)
        return n * before, n * of_dy(e), n * e * rstd * along, np.zeros_like(d.x)
    dy, e, (slope_off, bend_off) = np.abs(d.dy), np.abs(d.first.dz), _derivatives(d.first, dtype)
    u = unit(dtype)
    off_e = dy * slope_off + u * e
    bend = dy * np.abs(curvature(d.first.z, d.first.activation))
    off_bend = dy * bend_off + u * bend
    dz, off_dz = bend * before, off_bend * before + (bend + off_bend) * (n + u) * before
    slope = np.abs(activation_slope(d.first.z, d.first.activation)) + np.zeros_like(d.x)
    d_x = n * of_dy(e + off_e) + of_dy(off_e) + rstd * projected(w * (n * dz + (1 + n) * off_dz))
    of_weight = (n * (e + off_e) + off_e) * rstd * along + (n * dz + (1 + n) * off_dz) * x_hat
    return (slope + slope_off) * (n + u) * before + slope_off * before, d_x, of_weight, n * dz + (1 + n) * off_dz


def _derivatives(b: SimpleNamespace, dtype: Any) -> tuple[Any, Any]:
    """What the first two derivatives of an activation are off: by themselves, relative to the steepest, and with z."""
    first, second, kinks = steepest(b.activation)
    off = _off_z(b, dtype) + np.zeros_like(b.x)
    name = split(b.activation)[0]
    jumps = BENDS.get(name, {}) if name != "elu" else {0: second}

    def jump(of: dict[float, Any]) -> Any:
        return sum(by * (np.abs(b.z - kink) <= off) for kink, by in of.items())

    own = ACTIVATION * unit(dtype)
    return (
        second * off + jump(kinks) + own * first,
        bending(b.activation) * off + jump(jumps) + own * second + TINY[compute(dtype).name],
    )


# Where a second derivative jumps, and by how much; that of elu jumps by its parameter, at 0.
BENDS = {"hardswish": {-3: 1 / 3, 3: 1 / 3}}


@functools.cache
def bending(activation: Any) -> float:
    """The steepest third derivative between kinks: the largest of those on a fine grid, and half as much again."""
    z = np.linspace(-30, 30, 60001, dtype=np.longdouble)
    step = np.longdouble(2.0**-9)
    third = (curvature(z + step, activation) - curvature(z - step, activation)) / (2 * step)
    name = split(activation)[0]
    if name in ("elu", "hardswish"):
        third = np.where((np.abs(z) < 0.1) | (np.abs(np.abs(z) - 3) < 0.1), 0, third)
    return 1.5 * float(np.abs(third).max())


def count_of(shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> int:
    """Elements of x that share one parameter."""
    return math.prod(shape) // max(math.prod(weight_shape), 1)


def excess(found: Any, truth: Any, bound: Any) -> float:
    """How far the error exceeds its bound, as a factor: at most 1 for a correct kernel."""
    found = np.asarray(found).astype(np.asarray(truth).dtype)
    error = np.abs(found - truth)
    if error.size == 0:
        return 0.0
    usable = (bound > 0) & np.isfinite(bound)
    ratio = np.divide(error, bound, out=np.where(error == 0, 0, np.inf).astype(error.dtype), where=usable)
    return float(np.where(np.isinf(bound), 0, np.where(np.isnan(error), np.inf, ratio)).max())
