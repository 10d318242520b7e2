"""The normalizations of normkit as functions of JAX.

They take what the functions of the same names in `normkit` take, in the same order, but for `out`. What is no array is
known when a call is traced: numbers, axes and names. `axis_name` is for `jax.shard_map`: the axis of the mesh along
which arrays lie in parts, of all of which the statistics are taken.
"""

import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from .. import functional as core
from .._memory import dtype_named
from .._operations import Spec, axes_of, stand_in
from .._types import Activation
from ._sharded import normalized
from ._transforms import forward
from ._xla import RUNNING, Call, compute_dtype, describe, varying_alike

__all__ = ["adaptive_instance_norm", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_run = partial(jax.jit, static_argnums=0, inline=True)(forward)
# Not inlined: outside of the vmap that has an axis_name, JAX would not know that axis in the gradient.
_run_in_parts = partial(jax.jit, static_argnums=(0, 2))(normalized)


def _array(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"{name} is {type(value).__name__}, expected a jax.Array")
    return jnp.asarray(value)


def _call(
    spec: Spec, slopes: Any, x: Any, weight: Any, bias: Any, where: Any, residual: Any, return_stats: bool,
    return_residual: bool, axis_name: Any, **more: Any,
) -> Any:  # fmt: skip
    """`more`: a style, or running statistics."""
    if where is not None and not isinstance(where, jax.Array | np.ndarray):
        where = None if where else np.zeros((), np.bool_)
    if return_residual and residual is None:
        raise ValueError("residual is None, expected an array like x: return_residual is True")
    x = _array("x", x)
    if spec.activation == "prelu" and spec.slope is not None:
        slopes, spec = np.asarray(spec.slope, compute_dtype(x)), spec._replace(slope=None)
    given = {"x": x, "weight": weight, "bias": bias, "slopes": slopes, **more, "where": where, "residual": residual}
    arrays = {name: _array(name, a) for name, a in given.items() if a is not None}
    statistics = ("mean", "rstd") if spec.is_centered else ("rstd",)
    running = tuple(name for name in RUNNING if name in arrays and not spec.frozen)
    wants = ("out", *statistics * return_stats, *("sum",) * return_residual, *running)
    call = Call("forward", spec, wants)
    describe(call, {name: a for name, a in arrays.items() if name != "style"})  # judges what was given
    if axis_name is None or spec.frozen:
        found = _run(call, varying_alike(arrays))
    else:
        found = _run_in_parts(call, arrays, axis_name)
    results = [found[name] if name in ("out", "sum") else jax.lax.stop_gradient(found[name]) for name in wants]
    return results[0] if len(results) == 1 else tuple(results)


def _spec(
    kind: str, axes: tuple[int, ...], eps: Any, weight_offset: Any, activation: Any, *, groups: Any = 1,
    frozen: bool = False, momentum: Any = 0.0,
) -> tuple[Spec, Any]:  # fmt: skip
    """All of a call that is no array, and the slopes of an activation that is prelu."""
    slope = slopes = None
    if isinstance(activation, tuple | list) and len(activation) == 2:
        activation, slope = activation
        if activation == "prelu" and isinstance(slope, jax.Array | np.ndarray):
            slope, slopes = None, slope
    for name, number in (("eps", eps), ("weight_offset", weight_offset), ("momentum", momentum), ("slope", slope)):
        if isinstance(number, jax.core.Tracer):
            raise TypeError(f"{name} is a tracer, expected a number that is known when the call is traced")
    axes = tuple(map(operator.index, axes))
    spec = Spec(kind, axes, operator.index(groups), frozen, eps, momentum, weight_offset, activation or "", slope)
    return spec, slopes


def instance_norm(
    x: jax.Array,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    running_mean: Any = None,
    running_var: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    axis_name: Any = None,
) -> Any:
    """`normkit.instance_norm` in JAX: each channel of each image by its own mean and variance.

    Returns y, then what was asked for, in this order: mean and rstd; x + residual; running_mean and running_var as they
    become, where they were given and `use_input_stats` is true. To gradients all of these but the sum are constants.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> x = jnp.array([[[0.0, 1.0, 5.0]]])
    >>> dx = jax.jit(jax.grad(lambda x: nj.instance_norm(x)[0, 0, 0]))(x)
    >>> [round(value, 3) for value in dx.flatten().tolist()]
    [0.176, -0.22, 0.044]
    """
    spec, slopes = _spec(
        "instance", (channel_axis,), eps, weight_offset, activation, frozen=not use_input_stats, momentum=momentum
    )
    return _call(
        spec, slopes, x, weight, bias, where, residual, return_stats, return_residual, axis_name,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip


def group_norm(
    x: jax.Array,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    axis_name: Any = None,
) -> Any:
    """`normkit.group_norm` in JAX: each image over groups of channels.

    Returns y, then what was asked for: mean and rstd, constants to gradients; x + residual.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> x = jnp.arange(8.0).reshape(1, 4, 2)
    >>> jax.jit(nj.group_norm, static_argnums=1)(x, 2).shape
    (1, 4, 2)
    """
    spec, slopes = _spec("group", (channel_axis,), eps, weight_offset, activation, groups=num_groups)
    return _call(spec, slopes, x, weight, bias, where, residual, return_stats, return_residual, axis_name)


def layer_norm(
    x: jax.Array,
    weight: Any = None,
    bias: Any = None,
    *,
    axis: int | Iterable[int] | None = -1,
    eps: float = 1e-5,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    axis_name: Any = None,
) -> Any:
    """`normkit.layer_norm` in JAX, over any axes.

    Returns y, then what was asked for: mean and rstd, constants to gradients; x + residual.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> x = jax.random.normal(jax.random.key(0), (2, 6, 8, 8))
    >>> y, mean, rstd = nj.layer_norm(x, axis=1, return_stats=True)  # of the channels of each pixel
    >>> mean.shape
    (2, 8, 8)
    """
    spec, slopes = _spec("layer", axes_of(x, axis), eps, weight_offset, activation)
    return _call(spec, slopes, x, weight, bias, where, residual, return_stats, return_residual, axis_name)


def rms_norm(
    x: jax.Array,
    weight: Any = None,
    bias: Any = None,
    *,
    axis: int | Iterable[int] | None = -1,
    eps: float | None = None,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    axis_name: Any = None,
) -> Any:
    """`normkit.rms_norm` in JAX: by the root mean square over any axes.

    Returns y, then what was asked for: rstd, a constant to gradients; x + residual.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> float((nj.rms_norm(jnp.array([[3.0, 4.0]])) ** 2).mean())
    1.0
    """
    spec, slopes = _spec("rms", axes_of(x, axis), eps, weight_offset, activation)
    return _call(spec, slopes, x, weight, bias, where, residual, return_stats, return_residual, axis_name)


def batch_norm(
    x: jax.Array,
    weight: Any = None,
    bias: Any = None,
    *,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    axis_name: Any = None,
) -> Any:
    """`normkit.batch_norm` in JAX: each channel over the batch, or by its running statistics.

    ``y, mean, var = batch_norm(x, running_mean=mean, running_var=var, training=True)`` is a step of training.

    Returns y, then what was asked for, in this order: mean and rstd; x + residual; running_mean and running_var as they
    become, where they were given and `training` is true. To gradients all of these but the sum are constants.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> x, mean, var = jnp.array([[1.0], [3.0]]), jnp.zeros(1), jnp.ones(1)
    >>> y, mean, var = nj.batch_norm(x, running_mean=mean, running_var=var, training=True, momentum=0.5)
    >>> mean.tolist(), var.tolist()
    ([1.0], [1.5])
    """
    spec, slopes = _spec(
        "batch", (channel_axis,), eps, weight_offset, activation, frozen=not training, momentum=momentum
    )
    return _call(
        spec, slopes, x, weight, bias, where, residual, return_stats, return_residual, axis_name,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip


def adaptive_instance_norm(
    content: jax.Array,
    style: jax.Array,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    return_stats: bool = False,
    where: Any = None,
    activation: Activation = None,
    residual: Any = None,
    return_residual: bool = False,
) -> Any:
    """`normkit.adaptive_instance_norm` in JAX, with gradients of content and of style.

    Returns y, then what was asked for: mean and rstd of content, constants to gradients; content + residual.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, normkit.jax as nj
    >>> content, style = jnp.arange(4.0).reshape(1, 1, 4), jnp.array([[[10.0, 30.0]]])
    >>> round(float(nj.adaptive_instance_norm(content, style).mean()), 3)
    20.0
    """
    content, style = _array("content", content), _array("style", style)
    spec, slopes = _spec("instance", (channel_axis,), eps, 0.0, activation)
    with core._called("style"):
        judge: Any = core._moments_of_channels
        judge._description(stand_in(style.shape, dtype_named(str(style.dtype))), channel_axis=channel_axis)
    if -content.ndim <= channel_axis < content.ndim:
        found, expected = ((a.shape[0], a.shape[channel_axis]) for a in (style, content))
        core._check_style(found, expected)
    with core._called("content"):
        return _call(
            spec, slopes, content, None, None, where, residual, return_stats, return_residual, None, style=style
        )
