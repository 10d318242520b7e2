"""Every named normalization and its backward: signature and docstring. C++ is the body.

Nothing below this file is named after a normalization: all of them are statistics over some axes, then a scale and a
shift.
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import _core
from ._compiled import body, compiled
from ._memory import Memory, library_of, views_of, views_or_numbers
from ._types import (
    Activation,
    AdaptiveGradients,
    Array,
    Axes,
    Flag,
    Float,
    Gradients,
    Integer,
    Mask,
    Number,
    Statistics,
)
from .phases import Moments

__all__ = [
    "adaptive_instance_norm",
    "adaptive_instance_norm_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "group_norm",
    "group_norm_backward",
    "group_norm_double_backward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_double_backward",
    "l2_normalize",
    "l2_normalize_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "normalize",
    "normalize_backward",
    "normalize_double_backward",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_double_backward",
]

_ALL: Gradients = ("dx", "dweight", "dbias")
# What gradients of content and of style are made of: always the same tuples, by which calls are known again.
_WANTED: dict[tuple[bool, bool], Any] = {
    (True, True): _ALL,
    (True, False): ("dx",),
    (False, True): ("dweight", "dbias"),
    (False, False): (),
}


@compiled("forward", "instance")
def instance_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: Number = 1e-5,
    channel_axis: Integer = 1,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    use_input_stats: Flag = True,
    momentum: Number = 0.1,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize each channel of each image by its own mean and variance.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    `mean` and `var` are taken over every axis but the first and the channels; `var` divides by the number of members.
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016.

    Parameters
    ----------
    x : (N, C, ...), or with C at `channel_axis`
        Of float32, float64, float16, bfloat16, bool or an integer of 8 to 64 bits, with any strides. Integers of 32 and
        64 bits are rounded to float32 first.
    weight, bias : (C,), (N, C) or the shape of x, optional
        Of float32, float64 or the dtype of x. (N, C) is conditional instance norm, the shape of x one pair per pixel.
        (N, C, 1, 1) and alike, which broadcast against x in NumPy, stand for the same without the ones.
    eps
        Added to the variance; finite, at least 0. Where var + eps is 0, y is bias.
    channel_axis
        The axis of the channels, from -x.ndim to x.ndim - 1.
    running_mean, running_var : (C,) of float32, float64, float16 or bfloat16, optional
        Updated in place: r <- (1 - momentum) * r + momentum * s, where s is the mean over N, of the unbiased variance
        for `running_var`; in float64, rounded when stored.
    use_input_stats
        False: x is normalized by the running statistics, which stay as they are.
    momentum
        The share of the new statistics in the running ones, from 0 to 1.
    out
        Where to write y: the shape of x, the dtype of y. May be x itself; any other overlap is refused.
    out_dtype
        The dtype of y: float32, float64, float16 or bfloat16. Without it that of x, or float32 for integers.
    return_stats
        Also return the statistics, which `instance_norm_backward` needs.
    where : bool, broadcasts against x, optional
        The members of the statistics: the others count neither in mean nor in var, and may be NaN. All outputs are
        normalized. Without any member mean and rstd are 0, so that y is bias; running statistics leave out what has
        fewer than two. No part of the backward of such an instance is NaN.
    activation
        Applied to y before it is rounded: "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "elu", "sigmoid",
        "tanh", "relu6", "hardswish", "mish" or "softplus", as PyTorch defines them, or a pair: ("leaky_relu", slope),
        ("elu", alpha) or ("prelu", slopes). Slopes have a shape that weight may have, and its dtypes, or are one
        element or a number, for all. softplus is log(1 + exp(y)) beyond 20 too, where PyTorch has y.
    residual : the shape and dtype of x, optional
        Added to x before the statistics, with the bits of ``x + residual`` in the dtype of x.
    return_residual
        Also return that sum, the last of the results.
    weight_offset
        ``weight + weight_offset`` is used, such as 1.0 for weights that are stored as gamma - 1. Without a weight it
        stays 1.

    Returns
    -------
    y, or (y, mean, rstd), and x + residual with `return_residual`
        Here y is like x in library, shape and memory layout. mean and rstd = 1 / sqrt(var + eps) are (N, C), of
        float32, or of float64 where x is.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Naming the argument, before anything is written.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.arange(8.0).reshape(1, 2, 4)
    >>> nk.instance_norm(x).round(3).tolist()
    [[[-1.342, -0.447, 0.447, 1.342], [-1.342, -0.447, 0.447, 1.342]]]
    """
    body()


@compiled("backward", "instance")
def instance_norm_backward(
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    channel_axis: Integer = 1,
    use_input_stats: Flag = True,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `instance_norm`.

        dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),    g = dy * weight,    x_hat = (x - mean) * rstd
        dweight = sum(dy * x_hat),    dbias = sum(dy),          over all elements that share the parameter

    With ``use_input_stats=False`` the statistics are constants: dx = rstd * g.

    Parameters
    ----------
    dy, x : the same shape
        Of float32, float64, float16 or bfloat16, with any strides.
    mean, rstd : (N, C) of float32 or float64, or numbers
        As the forward returned them. `mean` is rounded; it is corrected from x, so that dx is as exact far from zero as
        near it. A number stands for all statistics.
    weight : as in the forward, optional
        That of the forward.
    use_input_stats
        False: the statistics are constants.
    need
        Names of the gradients that are wanted; the others are None and cost nothing. "dslopes" too, where activation is
        ("prelu", slopes): the sum of ``dy * min(z, 0)``, where z is what prelu was applied to. It walks over dy and x
        once more.
    out
        Where to write dx. May be dy or x itself; any other overlap is refused.
    where : bool, broadcasts against x, optional
        As in the forward: the averages are sums over all elements, divided by the number of members, and only members
        have them in their dx. Where dy is 0, x may be NaN.
    bias : as in the forward, optional
        Gives dbias its shape, and an activation depends on it.
    activation
        As in the forward: dy is the gradient of what it gave, and ``dy * slope`` stands for dy in the formulas.
    dresidual : like dx, optional
        The gradient of the sum that the forward returned with `return_residual`, added to dx.

    Returns
    -------
    (dx, dweight, dbias)
        Here dx is like x, dweight like weight. dbias has the shape of bias where it is passed, else that of weight, and
        the dtype of weight. Without weight they are (C,), of the dtype of the statistics. With "dslopes" in `need` that
        is the last, like slopes.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x, dy = np.array([[[0.0, 1.0, 5.0]]]), np.array([[[1.0, 0.0, 0.0]]])
    >>> _, mean, rstd = nk.instance_norm(x, return_stats=True)
    >>> dx, dweight, dbias = nk.instance_norm_backward(dy, x, mean, rstd)
    >>> dx.round(3).tolist(), dweight.round(3).tolist(), dbias.tolist()
    ([[[0.176, -0.22, 0.044]]], [-0.926], [1.0])
    """
    body()


@compiled("double_backward", "instance")
def instance_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    channel_axis: Integer = 1,
    use_input_stats: Flag = True,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `instance_norm_backward`, as a penalty on gradients needs it.

        P(u) = u - mean(u) - x_hat * mean(u * x_hat),    x_hat = (x - mean) * rstd
        g = dy * w,    q = dy * ddweight,                w = weight + weight_offset

        d_dy     = w * rstd * P(ddx) + ddweight * x_hat + ddbias
        d_x      = rstd * P(q) - rstd**2 * (c * x_hat + b * P(g) + a * P(ddx))
        d_weight = sum(dy * rstd * P(ddx))               over all elements that share the parameter

        a = mean(g * x_hat),    b = mean(ddx * x_hat),    c = mean(P(ddx) * g)

    `mean` and `rstd` are functions of x here: d_x is the whole derivative. With ``use_input_stats=False`` they are
    constants: P(u) = u and d_x = rstd * q.

    Through an activation f of z = x_hat * w + bias, ``f'(z) * dy`` stands for dy above, and what reaches z is added:

        D        = w * rstd * P(ddx) + ddweight * x_hat + ddbias,    d_dy = f'(z) * D,    dz = f''(z) * dy * D
        d_x      += rstd * P(w * dz),    d_weight += sum(dz * x_hat),    d_bias = sum(dz)

    Parameters
    ----------
    ddx : the shape of x, or None
        The gradient of the scalar with respect to dx, of the dtype of x. None stands for zeros; not all three of these
        may be.
    ddweight, ddbias : the shapes of weight and bias, or None
        Those with respect to dweight and dbias. Without a bias ddbias is like weight, without both (C,).
    where : bool, broadcasts against x, optional
        As in the forward: of ddx averages are over members alone, else sums over all elements, divided by the number of
        members, and only members have them in their d_x.
    bias : as in the forward, optional
        Gives ddbias its shape, and an activation depends on it.
    activation
        As in the forward, but not ("prelu", slopes), which is refused: `normkit.torch` differentiates that twice. At a
        kink the derivative is that of the backward, and what jumps has no second one.

    Returns
    -------
    (d_dy, d_x, d_weight), and d_bias with an activation
        Like dy, x, weight and bias; d_weight is None without a weight, d_bias without a bias, and d_bias has the dtype
        of weight where there is one. Sums over elements are taken in float64; what each element then gets is computed
        in float32, or in float64 where x is of that, and rounded to the dtype of x.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x, dy = np.array([[[0.0, 1.0, 5.0]]]), np.array([[[1.0, 0.0, 0.0]]])
    >>> _, mean, rstd = nk.instance_norm(x, return_stats=True)
    >>> dx, _, _ = nk.instance_norm_backward(dy, x, mean, rstd)
    >>> d_dy, d_x, _ = nk.instance_norm_double_backward(2 * dx, None, None, dy, x, mean, rstd)  # of sum(dx**2)
    >>> d_dy.round(4).tolist()
    [[[0.1633, -0.2041, 0.0408]]]
    """
    body()


@compiled("forward", "group")
def group_norm(
    x: Array,
    num_groups: Integer,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: Number = 1e-5,
    channel_axis: Integer = 1,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize each image over groups of channels.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    `mean` and `var` are taken over the channels of one group and every position of one image; `var` divides by the
    number of members. Wu and He, "Group Normalization", 2018.

    Parameters
    ----------
    num_groups
        The number of groups; divides C.

    Returns
    -------
    y, or (y, mean, rstd), and x + residual with `return_residual`
        As `instance_norm`, but the statistics are (N, num_groups).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.arange(8.0).reshape(1, 4, 2)
    >>> nk.group_norm(x, num_groups=2).round(3).tolist()
    [[[-1.342, -0.447], [0.447, 1.342], [-1.342, -0.447], [0.447, 1.342]]]
    """
    body()


@compiled("backward", "group")
def group_norm_backward(
    dy: Array,
    x: Array,
    num_groups: Integer,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    channel_axis: Integer = 1,
    use_input_stats: Flag = True,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `group_norm`, by the formulas of `instance_norm_backward`.

    Its averages are those over the members of a group.

    Parameters
    ----------
    num_groups
        As in the forward.
    mean, rstd : (N, num_groups) of float32 or float64, or numbers
        As the forward returned them.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.arange(8.0).reshape(1, 4, 2)
    >>> y, mean, rstd = nk.group_norm(x, 2, return_stats=True)
    >>> dx, dweight, dbias = nk.group_norm_backward(np.ones_like(x), x, 2, mean, rstd)
    >>> dweight.round(3).tolist(), dbias.tolist()
    ([-1.789, 1.789, -1.789, 1.789], [2.0, 2.0, 2.0, 2.0])
    """
    body()


@compiled("double_backward", "group")
def group_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    num_groups: Integer,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    channel_axis: Integer = 1,
    use_input_stats: Flag = True,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `group_norm_backward`.

    The formulas are those of `instance_norm_double_backward`.

    Parameters
    ----------
    num_groups
        As in the forward.
    mean, rstd : (N, num_groups) of float32 or float64, or numbers
        As the forward returned them.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.arange(4.0).reshape(1, 2, 2)
    >>> y, mean, rstd = nk.group_norm(x, 1, return_stats=True)
    >>> d_dy, d_x, d_weight = nk.group_norm_double_backward(x**2, None, None, y, x, 1, mean, rstd)
    >>> d_dy.round(2).tolist()
    [[[0.89, -0.89], [-0.89, 0.89]]]
    """
    body()


@compiled("forward", "layer")
def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    eps: Number = 1e-5,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize over the given axes, which need not be the last ones.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Ba, Kiros and Hinton, "Layer Normalization", 2016.

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    weight, bias : the extents of the normalized axes, in the order they have in x, optional
        Of float32, float64 or the dtype of x.
    axis
        One axis or several, each from -x.ndim to x.ndim - 1; None: all of them.

    Returns
    -------
    y, or (y, mean, rstd), and x + residual with `return_residual`
        As `instance_norm`, but the statistics have the shape of x without `axis`.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.layer_norm(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]])).round(3).tolist()
    [[-1.225, 0.0, 1.225], [-0.707, -0.707, 1.414]]
    """
    body()


@compiled("backward", "layer")
def layer_norm_backward(
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes = -1,
    use_input_stats: Flag = True,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `layer_norm`, by the formulas of `instance_norm_backward`.

    Its averages are those over `axis`.

    Parameters
    ----------
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As the forward returned them.

    Returns
    -------
    (dx, dweight, dbias)
        Here dx is like x; dweight and dbias have the extents of the normalized axes.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0, 1.0, 5.0]])
    >>> _, mean, rstd = nk.layer_norm(x, return_stats=True)
    >>> dx, dweight, dbias = nk.layer_norm_backward(np.array([[1.0, 0.0, 0.0]]), x, mean, rstd)
    >>> dx.round(3).tolist(), dbias.tolist()
    ([[0.176, -0.22, 0.044]], [1.0, 0.0, 0.0])
    """
    body()


@compiled("double_backward", "layer")
def layer_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes = -1,
    use_input_stats: Flag = True,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `layer_norm_backward`.

    The formulas are those of `instance_norm_double_backward`.

    Parameters
    ----------
    ddweight, ddbias : the extents of the normalized axes, or None
        The gradients of the scalar with respect to dweight and dbias.
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As the forward returned them.
    weight : the extents of the normalized axes, optional
        That of the forward.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0, 1.0, 5.0]])
    >>> y, mean, rstd = nk.layer_norm(x, return_stats=True)
    >>> d_dy, d_x, d_weight = nk.layer_norm_double_backward(x, None, np.ones(3), y, x, mean, rstd)
    >>> d_dy.round(3).tolist()
    [[1.0, 1.0, 1.0]]
    """
    body()


@compiled("forward", "layer", center=False)
def rms_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes = -1,
    eps: Number | None = None,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Divide by the root mean square over the given axes.

        y = x / sqrt(mean(x**2) + eps) * weight + bias

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    weight, bias : the extents of the normalized axes, in the order they have in x, optional
        Of float32, float64 or the dtype of x.
    eps
        Added to the mean square; None: that of float32, 2**-23, or of float64, 2**-52, where x is.

    Returns
    -------
    y, or (y, rstd), and x + residual with `return_residual`
        As `instance_norm`; rstd = 1 / sqrt(mean(x**2) + eps) has the shape of x without `axis`.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.rms_norm(np.array([[3.0, 4.0], [6.0, 8.0]])).round(3).tolist()
    [[0.849, 1.131], [0.849, 1.131]]
    """
    body()


@compiled("backward", "layer", center=False)
def rms_norm_backward(
    dy: Array,
    x: Array,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes = -1,
    use_input_stats: Flag = True,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `rms_norm`.

        dx = rstd * (g - x_hat * mean(g * x_hat)),    g = dy * weight,    x_hat = x * rstd
        dweight = sum(dy * x_hat),    dbias = sum(dy),    over all elements that share the parameter

    Parameters
    ----------
    rstd : the shape of x without `axis`, of float32 or float64, or a number
        As the forward returned it.

    Returns
    -------
    (dx, dweight, dbias)
        Here dx is like x; dweight and dbias have the extents of the normalized axes.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[3.0, 4.0]])
    >>> _, rstd = nk.rms_norm(x, return_stats=True)
    >>> dx, dweight, dbias = nk.rms_norm_backward(np.array([[1.0, 0.0]]), x, rstd)
    >>> dx.round(3).tolist(), dweight.round(3).tolist()
    ([[0.181, -0.136]], [0.849, 0.0])
    """
    body()


@compiled("double_backward", "layer", center=False)
def rms_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes = -1,
    use_input_stats: Flag = True,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `rms_norm_backward`.

    The formulas are those of `instance_norm_double_backward` with x_hat = x * rstd and
    P(u) = u - x_hat * mean(u * x_hat).

    Parameters
    ----------
    ddweight, ddbias : the extents of the normalized axes, or None
        The gradients of the scalar with respect to dweight and dbias.
    rstd : the shape of x without `axis`, of float32 or float64, or a number
        As the forward returned it.
    weight : the extents of the normalized axes, optional
        That of the forward.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[3.0, 4.0]])
    >>> y, rstd = nk.rms_norm(x, return_stats=True)
    >>> d_dy, d_x, d_weight = nk.rms_norm_double_backward(None, None, np.ones(2), y, x, rstd)
    >>> d_dy.tolist(), d_x.tolist()
    ([[1.0, 1.0]], [[0.0, 0.0]])
    """
    body()


@compiled("forward", "batch")
def batch_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: Flag = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
    channel_axis: Integer = 1,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize each channel over the batch, or by its running statistics.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training, `mean` and `var` are taken over every axis but the channels, and the running statistics follow them as
    in `instance_norm`; else they are `running_mean` and `running_var`, which stay as they are.
    Ioffe and Szegedy, "Batch Normalization", 2015.

    Parameters
    ----------
    weight, bias : (C,), optional
        Of float32, float64 or the dtype of x.
    running_mean, running_var : (C,) of float32, float64, float16 or bfloat16
        Optional in training.
    training
        Normalize by the statistics of x, and let the running ones follow.

    Returns
    -------
    y, or (y, mean, rstd), and x + residual with `return_residual`
        As `instance_norm`, but the statistics are (C,).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x, mean, var = np.array([[1.0], [2.0], [6.0]]), np.zeros(1), np.ones(1)
    >>> nk.batch_norm(x, running_mean=mean, running_var=var, training=True).round(3).tolist()
    [[-0.926], [-0.463], [1.389]]
    >>> mean.round(3).tolist(), var.round(3).tolist()
    ([0.3], [1.6])
    """
    body()


@compiled("backward", "batch")
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    training: Flag = True,
    channel_axis: Integer = 1,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `batch_norm`, by the formulas of `instance_norm_backward`.

    With ``training=False`` the statistics are constants: dx = rstd * dy * weight.

    Parameters
    ----------
    mean, rstd : (C,) of float32 or float64, or numbers
        As the forward returned them.
    training
        As in the forward.

    Returns
    -------
    (dx, dweight, dbias)
        Here dx is like x; dweight and dbias are (C,).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> _, mean, rstd = nk.batch_norm(x, training=True, return_stats=True)
    >>> dx, dweight, dbias = nk.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, mean, rstd)
    >>> dx.round(3).tolist(), dbias.tolist()
    ([[0.176], [-0.22], [0.044]], [1.0])
    """
    body()


@compiled("double_backward", "batch")
def batch_norm_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    training: Flag = True,
    channel_axis: Integer = 1,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `batch_norm_backward`.

    The formulas are those of `instance_norm_double_backward`. With ``training=False`` the statistics are constants.

    Parameters
    ----------
    mean, rstd : (C,) of float32 or float64, or numbers
        As the forward returned them.
    training
        As in the forward.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0], [1.0], [5.0]])
    >>> y, mean, rstd = nk.batch_norm(x, training=True, return_stats=True)
    >>> d_dy, d_x, d_weight = nk.batch_norm_double_backward(None, None, np.ones(1), y, x, mean, rstd)
    >>> d_dy.tolist()
    [[1.0], [1.0], [1.0]]
    """
    body()


def adaptive_instance_norm(
    content: Array,
    style: Array,
    *,
    eps: Number = 1e-5,
    channel_axis: Integer = 1,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
) -> Any:
    """Give each channel of each image the mean and deviation that it has in another image (AdaIN).

        y = (content - mean) / sqrt(var + eps) * sqrt(style_var + eps) + style_mean

    Statistics are those of `instance_norm`, and so is `var`: biased.
    Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization", 2017.

    Parameters
    ----------
    content : (N, C, ...), or with C at `channel_axis`
        The images, of any dtype that `instance_norm` takes.
    style : the same N and C, other extents at will
        The images whose statistics content gets, of any dtype that `instance_norm` takes. One may serve all of content.
    eps
        Added to both variances.
    where : bool, broadcasts against content, optional
        The members of the statistics of content.

    Returns
    -------
    y, or (y, mean, rstd), and content + residual with `return_residual`
        As `instance_norm`: y is like content, and the statistics (N, C) are those of content.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> content, style = np.arange(4.0).reshape(1, 1, 4), np.array([[[10.0, 30.0]]])
    >>> nk.adaptive_instance_norm(content, style).round(2).tolist()
    [[[6.58, 15.53, 24.47, 33.42]]]
    """
    if library_of(content) == "dask":
        return _of_dask("adaptive_instance_norm", locals())
    slopes = _slopes_of(activation)
    v, memory = views_of(content=content, style=style, out=out, where=where, residual=residual, slopes=slopes)
    with memory:
        _, std, mean_of_style = _style_of(v["content"], v["style"], channel_axis, eps)
        with _called("content"):
            result = instance_norm(
                v["content"], std, mean_of_style, eps=eps, channel_axis=channel_axis, out=v["out"],
                out_dtype=out_dtype, return_stats=return_stats, where=v["where"],
                activation=activation if slopes is None else ("prelu", v["slopes"]),
                residual=v["residual"], return_residual=return_residual,
            )  # fmt: skip
        return _hand_back(result, memory, out)


def _adaptive_gradients(need: AdaptiveGradients) -> AdaptiveGradients:
    if isinstance(need, str) or not isinstance(need, Iterable):
        raise TypeError(f"need is {need!r}, expected a tuple of names from ('dcontent', 'dstyle')")
    names = tuple(need)
    for name in names:
        if not isinstance(name, str) or name not in ("dcontent", "dstyle"):
            raise ValueError(f"need has {name!r}, expected names from ('dcontent', 'dstyle')")
    return names


def adaptive_instance_norm_backward(
    dy: Array,
    content: Array,
    style: Array,
    mean: Statistics,
    rstd: Statistics,
    *,
    eps: Number = 1e-5,
    channel_axis: Integer = 1,
    need: AdaptiveGradients = ("dcontent", "dstyle"),
    out: Array | None = None,
    where: Mask | None = None,
    activation: Activation = None,
    dresidual: Array | None = None,
) -> tuple[Any, Any]:
    """The gradient of `adaptive_instance_norm`.

    That of `instance_norm` for content, and for each member of style

        dstyle = (sum(dy) + style_hat * sum(dy * x_hat)) / members of style

    Parameters
    ----------
    content : the shape of dy
        Of float32, float64, float16 or bfloat16.
    style : as in the forward
        Of float32, float64, float16 or bfloat16.
    eps
        As in the forward.
    need
        Names of the gradients that are wanted; the others are None and cost nothing.
    out
        Where to write dcontent. May be dy or content itself; any other overlap is refused.

    Returns
    -------
    (dcontent, dstyle)
        Like content and style.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> content, style = np.arange(4.0).reshape(1, 1, 4), np.array([[[10.0, 30.0]]])
    >>> y, mean, rstd = nk.adaptive_instance_norm(content, style, return_stats=True)
    >>> dcontent, dstyle = nk.adaptive_instance_norm_backward(np.ones_like(y), content, style, mean, rstd)
    >>> dstyle.round(3).tolist()
    [[[2.0, 2.0]]]
    """
    if library_of(content) == "dask":
        return _of_dask("adaptive_instance_norm_backward", locals())  # type: ignore[no-any-return]
    need = _adaptive_gradients(need)
    slopes = _slopes_of(activation)
    v, memory = views_or_numbers(
        "mean", "rstd", content=content, style=style, dy=dy, mean=mean, rstd=rstd, out=out, where=where,
        dresidual=dresidual, slopes=slopes,
    )  # fmt: skip
    kind = str(v["style"].dtype).rpartition(".")[2]
    if kind.startswith(("bool", "int", "uint")):
        raise TypeError(f"style has dtype {kind}, expected float32, float64, float16 or bfloat16")
    wanted = _WANTED["dcontent" in need, "dstyle" in need]
    with memory, np.errstate(all="ignore"):
        of_style, std, mean_of_style = _style_of(v["content"], v["style"], channel_axis, eps)
        with _called("content"):
            dcontent, dweight, dbias = instance_norm_backward(
                v["dy"], v["content"], v["mean"], v["rstd"], std, channel_axis=channel_axis, need=wanted,
                out=v["out"], where=v["where"], bias=mean_of_style, dresidual=v["dresidual"],
                activation=activation if slopes is None else ("prelu", v["slopes"]),
            )  # fmt: skip
        dstyle = None
        if "dstyle" in need:  # sqrt(var + eps) and mean of style are weight and bias of content
            statistics, params = (of_style.mean, of_style.rstd(eps)), (g / of_style.count for g in (dweight, dbias))
            with _called("style"):
                dstyle = _apply_channels(v["style"], *statistics, *params, channel_axis=channel_axis)
        gradients: tuple[Any, Any] = _hand_back((dcontent, dstyle), memory, out)
        return gradients


def _of_dask(name: str, given: dict[str, Any]) -> Any:
    """The call of a function in Python with arrays of dask, to which the core hands those of the others."""
    return getattr(importlib.import_module("normkit.dask"), name)(**given)


@compiled("moments", "instance")
def _moments_of_channels(x: Array, *, channel_axis: Integer) -> Any:
    """Mean, m2 and count of each, and their memory."""
    body()


@compiled("apply", "instance")
def _apply_channels(
    x: Array,
    mean: Statistics,
    rstd: Statistics,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    channel_axis: Integer,
) -> Any:
    """`apply` over the axes of instance norm."""
    body()


def _slopes_of(activation: Any) -> Any:
    """The slopes of an activation that is prelu; None where they are a number, or it has none."""
    is_pair = isinstance(activation, tuple | list) and len(activation) == 2 and isinstance(activation[0], str)
    if not is_pair or activation[0] != "prelu" or _core.is_number(activation[1]):
        return None
    return activation[1]


def _style_of(content: Any, style: Any, channel_axis: Integer, eps: Any) -> tuple[Any, Any, Any]:
    """The moments of style, sqrt(var + eps) and the mean. Style has content's images and channels, or one image."""
    moments = _moments_of_style(style, channel_axis)
    shape: tuple[int, ...] = tuple(content.shape)
    if -len(shape) <= operator.index(channel_axis) < len(shape):  # else content is refused by its own call
        _check_style(tuple(moments.count.shape), (shape[0], shape[channel_axis]))
    std, mean = moments._deviation(eps), moments.mean
    return (moments, std[0], mean[0]) if std.shape[0] == 1 != shape[0] else (moments, std, mean)


def _moments_of_style(style: Any, channel_axis: Integer) -> Moments:
    with _called("style"):
        numbers, memory, twofold = _moments_of_channels(style, channel_axis=channel_axis)
    return Moments._of(numbers, memory, True, twofold)


def _check_style(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuses a style whose images and channels are neither those of content nor one image."""
    if found != expected and found != (1, expected[1]):
        raise ValueError(
            f"style has images and channels {found}, expected {expected}, those of content, or {(1, expected[1])}"
        )


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Errors that name an argument x name it as the caller does."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError, np.exceptions.AxisError):  # not of this library
            raise
        raise type(error)(re.sub(r"\bx\b", name, str(error))) from None


def _hand_back(result: Any, memory: Memory, out: Any) -> Any:
    """The caller's library has results as its arrays; the first is `out`, where one was given."""
    first, *others = result if isinstance(result, tuple) else (result,)
    first = memory.give_back(first) if out is None or first is None else out
    return (first, *map(memory.give_back, others)) if isinstance(result, tuple) else first


@compiled("forward", "l2", center=False)
def l2_normalize(
    x: Array,
    *,
    axis: Axes = -1,
    eps: Number = 1e-12,
    out: Array | None = None,
    return_stats: Flag = False,
) -> Any:
    """Divide by the Euclidean norm over the given axes.

        y = x / max(norm, eps),  norm = sqrt(sum(x**2))

    As torch.nn.functional.normalize does with p=2, for embeddings that are compared by their angles; Wang, Xiang, Cheng
    and Yuille, "NormFace: L2 Hypersphere Embedding for Face Verification", 2017.

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    eps
        The least that is divided by: 0, or a normal number of the dtype of rnorm. Where both it and the norm are 0,
        so is y.
    return_stats
        Also return what `l2_normalize_backward` needs.

    Returns
    -------
    y, or (y, rnorm)
        Here y is like x in library, shape and memory layout, float32 where x has integers. rnorm = 1 / max(norm, eps)
        has the shape of x without `axis`; it is of float32, or of float64 where x is.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.l2_normalize(np.float32([[3, 4], [0, 0]]))
    array([[0.6, 0.8],
           [0. , 0. ]], dtype=float32)
    """
    body()


@compiled("backward", "l2", center=False, need=("dx",))
def l2_normalize_backward(
    dy: Array,
    x: Array,
    rnorm: Statistics,
    *,
    axis: Axes = -1,
    eps: Number = 1e-12,
    out: Array | None = None,
) -> Any:
    """The gradient of `l2_normalize`.

        dx = rnorm * (dy - y * sum(dy * y)),  y = x * rnorm

    Where rnorm is 1 / eps, the norm is below eps and takes no part: dx = rnorm * dy.

    Parameters
    ----------
    rnorm : the shape of x without `axis`, of float32 or float64, or a number
        As the forward returned it.
    eps
        As in the forward.

    Returns
    -------
    dx
        Like x.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[3.0, 4.0]])
    >>> _, rnorm = nk.l2_normalize(x, return_stats=True)
    >>> nk.l2_normalize_backward(np.array([[1.0, 0.0]]), x, rnorm).round(3).tolist()
    [[0.128, -0.096]]
    """
    body()


@compiled("forward", "normalize")
def normalize(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    center: Flag = True,
    eps: Number = 1e-5,
    out: Array | None = None,
    out_dtype: Float = None,
    return_stats: Flag = False,
    where: Mask | None = None,
    activation: Activation = None,
    residual: Array | None = None,
    return_residual: Flag = False,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize x over any axes: the one operation beneath all the named ones.

        y = (x - mean) / sqrt(var + eps) * weight + bias        center=True
        y = x / sqrt(mean(x**2) + eps) * weight + bias          center=False

    The statistics are taken over `axis`; `var` divides by the number of members.

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    weight, bias : broadcast against x as in NumPy, optional
        Of float32, float64 or the dtype of x.
    axis
        One axis or several, each from -x.ndim to x.ndim - 1; None: all of them.
    center
        False: root mean square (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).

    Returns
    -------
    y, or (y, mean, rstd), or (y, rstd) without centering, and x + residual with `return_residual`
        As `instance_norm`, but the statistics have the shape of x without `axis`.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.normalize(np.array([[3.0, 4.0], [6.0, 8.0]]), axis=1, center=False).round(3).tolist()
    [[0.849, 1.131], [0.849, 1.131]]
    """
    body()


@compiled("backward", "normalize")
def normalize_backward(
    dy: Array,
    x: Array,
    mean: Statistics | None,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes,
    center: Flag = True,
    use_input_stats: Flag = True,
    need: Gradients = _ALL,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> tuple[Any, ...]:
    """The gradient of `normalize`, by the formulas of `instance_norm_backward`.

    Without centering dx = rstd * (g - x_hat * mean(g * x_hat)).

    Parameters
    ----------
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As the forward returned them; `mean` is None without centering.
    weight : broadcasts against x, optional
        That of the forward.

    Returns
    -------
    (dx, dweight, dbias)
        Here dx is like x, dweight like weight. dbias has the shape of bias where it is passed, else that of weight.
        Without weight they have the extents of the normalized axes.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0, 1.0, 5.0]])
    >>> _, mean, rstd = nk.normalize(x, axis=1, return_stats=True)
    >>> dx, _, _ = nk.normalize_backward(np.array([[1.0, 0.0, 0.0]]), x, mean, rstd, axis=1, need=("dx",))
    >>> dx.round(3).tolist()
    [[0.176, -0.22, 0.044]]
    """
    body()


@compiled("double_backward", "normalize")
def normalize_double_backward(
    ddx: Array | None,
    ddweight: Array | None,
    ddbias: Array | None,
    dy: Array,
    x: Array,
    mean: Statistics | None,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes,
    center: Flag = True,
    use_input_stats: Flag = True,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> tuple[Any, ...]:
    """The gradient of a scalar through `normalize_backward`.

    The formulas are those of `instance_norm_double_backward`; without centering, those of `rms_norm_double_backward`.

    Parameters
    ----------
    ddweight, ddbias : the shape of weight, without one the extents of the normalized axes, or None
        The gradients of the scalar with respect to dweight and dbias.
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As the forward returned them; `mean` is None without centering.
    weight : broadcasts against x, optional
        That of the forward.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[0.0, 1.0, 5.0]])
    >>> y, mean, rstd = nk.normalize(x, axis=1, return_stats=True)
    >>> d_dy, d_x, d_weight = nk.normalize_double_backward(None, None, np.ones(3), y, x, mean, rstd, axis=1)
    >>> d_dy.tolist()
    [[1.0, 1.0, 1.0]]
    """
    body()
