"""Activations once more, in plain NumPy and a wider type, with their derivatives: too simple to be wrong.

A name, or a pair of one and its parameter, as the library takes it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def erfc(t: Any) -> Any:
    """1 - erf(t) for t >= 0, to the last digits of its type.

    Below 1.5, erf is 2 / sqrt(pi) exp(-t^2) times the sum of 2^n t^(2n+1) / (2n+1)!!, whose terms are all positive.
    Beyond, where its difference to 1 would cancel, erfc is exp(-t^2) / sqrt(pi) / (t + 1/2 / (t + 2/2 / (t + ...))).
    """
    t = np.asarray(t)
    scale = np.exp(-t * t) / np.sqrt(pi(t))
    small, large = np.minimum(t, 1.5), np.maximum(t, 1.5)
    term = total = small
    for n in range(1, 60):
        term = term * (2 * small * small / (2 * n + 1))
        total = total + term
    fraction = large
    for n in range(200, 0, -1):
        fraction = large + n / t.dtype.type(2) / fraction
    return np.where(t < 1.5, 1 - 2 * scale * total, scale / fraction)


def pi(like: Any) -> Any:
    return np.arccos(like.dtype.type(-1))


def normal_cdf(z: Any) -> Any:
    tail = erfc(np.abs(z) / np.sqrt(z.dtype.type(2))) / 2
    return np.where(z < 0, tail, 1 - tail)


def normal_density(z: Any) -> Any:
    return np.exp(-z * z / 2) / np.sqrt(2 * pi(z))


def sigmoid(z: Any) -> Any:
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1) / (1 + e)


def _mish_slope(z: Any) -> Any:
    gate = np.tanh(np.logaddexp(z, 0))
    return gate + z * (1 - gate**2) * sigmoid(z)


def _gelu_tanh(z: Any) -> tuple[Any, Any]:
    """With (1 + tanh(v)) / 2 = sigmoid(2 v)."""
    cubic, scale = z.dtype.type(44715) / 1000000, np.sqrt(8 / pi(z))
    v = scale * (z + cubic * z**3)
    gate = sigmoid(v)
    # Where the gate has closed to 0 its slope is 0 too, however large the polynomial.
    slope = np.where(gate == 0, 0, gate * sigmoid(-v) * scale * (1 + 3 * cubic * z**2))
    return z * gate, gate + z * slope


_VALUES: dict[str, Callable[..., Any]] = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z, slope: np.where(z > 0, z, slope * z),
    "silu": lambda z: z * sigmoid(z),
    "gelu": lambda z: z * normal_cdf(z),
    "gelu_tanh": lambda z: _gelu_tanh(z)[0],
    "elu": lambda z, alpha: np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0))),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu6": lambda z: np.clip(z, 0, 6),
    "hardswish": lambda z: z * (np.clip(z + 3, 0, 6) / 6),
    "mish": lambda z: z * np.tanh(np.logaddexp(z, 0)),
    "softplus": lambda z: np.logaddexp(z, 0),
    "prelu": lambda z, slopes: np.where(z > 0, z, slopes * z),
}
_SLOPES: dict[str, Callable[..., Any]] = {
    "relu": lambda z: np.where(z > 0, z.dtype.type(1), 0),
    "leaky_relu": lambda z, slope: np.where(z > 0, z.dtype.type(1), slope),
    "silu": lambda z: sigmoid(z) * (1 + z * sigmoid(-z)),
    "gelu": lambda z: normal_cdf(z) + z * normal_density(z),
    "gelu_tanh": lambda z: _gelu_tanh(z)[1],
    "elu": lambda z, alpha: np.where(z > 0, z.dtype.type(1), alpha * np.exp(np.minimum(z, 0))),
    "sigmoid": lambda z: sigmoid(z) * sigmoid(-z),
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "relu6": lambda z: np.where((z > 0) & (z < 6), z.dtype.type(1), 0),
    "hardswish": lambda z: np.where(np.abs(z) < 3, z / 3 + z.dtype.type(0.5), z > 0),
    "mish": _mish_slope,
    "softplus": sigmoid,
    "prelu": lambda z, slopes: np.where(z > 0, z.dtype.type(1), slopes),
}
DEFAULTS = {"leaky_relu": 0.01, "elu": 1.0}

# Every name but prelu, whose slopes are an array (test_prelu.py), and the two that take a parameter with others than
# their defaults, negative and beyond 1 among them.
ACTIVATIONS: list[Any] = [
    *(name for name in _VALUES if name != "prelu"),
    ("leaky_relu", 0.2),
    ("leaky_relu", -1.5),
    ("elu", 0.5),
    ("elu", 2.0),
]


def name_of(activation: Any) -> str:
    """An id for a test."""
    return activation if isinstance(activation, str) else "-".join(map(str, activation)) if activation else "none"


def split(activation: Any) -> tuple[str, tuple[float, ...]]:
    """The name, and the parameter of those that have one."""
    name, *parameter = (activation,) if isinstance(activation, str) else activation
    return name, tuple(parameter) or ((DEFAULTS[name],) if name in DEFAULTS else ())


def activated(z: Any, activation: Any) -> Any:
    if activation is None:
        return z
    name, parameter = split(activation)
    return _VALUES[name](z, *map(z.dtype.type, parameter))


def slope(z: Any, activation: Any) -> Any:
    """The derivative; at a kink, that of the side that PyTorch takes. A complex z steps along the imaginary axis."""
    if activation is None:
        return z.dtype.type(1)
    if np.iscomplexobj(z):
        return slope(z.real, activation) + 1j * z.imag * curvature(z.real, activation)
    name, parameter = split(activation)
    return _SLOPES[name](z, *map(z.dtype.type, parameter))


PIECEWISE_LINEAR = ("relu", "leaky_relu", "relu6")


def curvature(z: Any, activation: Any) -> Any:
    """The second derivative, in the type of z: of those without a kink the difference of slopes around z.

    The difference is that of six points 2^-11 apart, which leaves out terms in the sixth power of that.
    """
    name, parameter = split(activation)
    if name in PIECEWISE_LINEAR:
        return np.zeros_like(z)
    if name == "elu":
        return np.where(z < 0, z.dtype.type(parameter[0]) * np.exp(np.minimum(z, 0)), 0)
    if name == "hardswish":
        return np.where(np.abs(z) < 3, 1 / z.dtype.type(3), 0)
    step = z.dtype.type(2.0**-11)
    across = [_SLOPES[name](z + k * step) - _SLOPES[name](z - k * step) for k in (1, 2, 3)]
    return (45 * across[0] - 9 * across[1] + across[2]) / (60 * step)
