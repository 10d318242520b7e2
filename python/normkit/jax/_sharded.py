"""Normalizations of arrays whose parts lie along an axis of a mesh: functions with `axis_name`, inside of shard_map.

The core takes the moments of a part, and one message joins those of all parts. What follows is jnp, of which XLA makes
a loop or two; so are gradients of any order, with one message for each order.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from .._operations import Frame, Spec, aligned, composed, heard, learnt, rstd_of
from ._transforms import _WORDS, eps_of, run
from ._xla import RUNNING, Arrays, Call, compute_dtype, vary, varying_along


def normalized(call: Call, arrays: Arrays, axis_name: Any) -> Arrays:
    """What the call gives of the part of this device. Statistics are those of all parts."""
    spec, x = call.spec, arrays["x"]
    total = x if "residual" not in arrays else x + arrays["residual"]
    frame = Frame(spec, x.shape)
    general = frame.general(eps_of(x))
    parts = {"x": frame.data(total)}
    if "where" in arrays:
        parts["where"] = frame.data(jnp.broadcast_to(arrays["where"], x.shape))
    found = _statistics(general, axis_name, parts)
    given: Arrays = {name: arrays[name] for name in ("weight", "bias", "slopes") if name in arrays}
    given = {name: array.reshape(frame.param_shape(array.shape)) for name, array in given.items()}
    given |= {"x": parts["x"], "found": vary(found, varying_along(total))}
    y = _masked(general, given, parts["where"]) if "where" in parts else _applied(general, given)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    results = {"out": frame.back(y).astype(dtype), "sum": total, "mean": found[0], "rstd": _rstd(general, found)}
    learnt = _learnt(found, spec.momentum, {name: arrays[name] for name in RUNNING if name in arrays})
    return {name: (results | learnt)[name] for name in call.wants}


def _unknown(axis_name: Any, array: Any) -> tuple[Any, ...]:
    """The axes along which an array is not known to vary: all of vmap, and of a shard_map that keeps no account."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return tuple(name for name in names if name not in varying_along(array))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(spec: Spec, axis_name: Any, parts: Arrays) -> Any:
    """The mean in two numbers, the variance and the count of each statistic, along a first axis."""
    dtype = compute_dtype(parts["x"])
    with jax.enable_x64(True):  # whatever JAX is told to have
        own = run(Call("moments", spec, ("moments",)), parts)["moments"]
        place, size = lax.axis_index(axis_name), lax.psum(1, axis_name)
        slots = jnp.zeros((size, *own.shape), own.dtype).at[place].set(own)
        # Of zeros and one number each this is no sum, but what all devices have, the same on each of them.
        mean, m2, count, low = jnp.moveaxis(lax.psum(slots, axis_name), -1, 0)
        members = count.sum(0)
        away = mean - mean[0] + (low - low[0])  # from the first part
        shift = (count * away).sum(0) / jnp.maximum(members, 1)
        var = (m2 + count * (away - shift) ** 2).sum(0) / jnp.maximum(members, 1)
        rest = low[0] + shift
        high = (mean[0] + rest).astype(dtype)
        found = jnp.stack([high, (mean[0] - high + rest).astype(dtype), var.astype(dtype), members.astype(dtype)])
    if unknown := _unknown(axis_name, place):  # to vmap what all parts share is one array, whose gradient is added up
        found += (0 * lax.axis_index(unknown)).astype(dtype)
    return found


def _kept(spec: Spec, axis_name: Any, parts: Arrays) -> Any:
    found = _statistics(spec, axis_name, parts)  # which is to have gradients of its own
    return found, (parts, found)


def _gradients(spec: Spec, axis_name: Any, kept: Any, cotangents: Any) -> Any:
    """d mean = sum(dx) / count, d var = 2 * sum((x - mean) * dx) / count."""
    parts, found = kept
    x, where = parts["x"], parts.get("where")
    if where is not None:  # what is no member may be NaN
        x = jnp.where(where, x, 0)
    if unknown := _unknown(axis_name, x):  # nobody has added them up
        cotangents = lax.psum(cotangents, unknown)
    by_mean, _, by_var, _ = vary(cotangents / jnp.maximum(found[3], 1), varying_along(x))
    centered = _centered(spec, x, vary(found, varying_along(x)))
    dx = aligned(by_mean, spec.axes, x.shape) + 2 * aligned(by_var, spec.axes, x.shape) * centered
    if where is not None:
        dx = jnp.where(where, dx, 0)
    return ({name: dx.astype(x.dtype) if name == "x" else None for name in parts},)


_statistics.defvjp(_kept, _gradients)


def _applied(spec: Spec, given: Arrays) -> Any:
    """y of x, of the statistics that were found, and of parameters."""
    given = dict(given)
    x, found = given.pop("x"), given.pop("found")
    frozen = spec._replace(kind="uncentered", frozen=True)
    return composed(_WORDS, frozen, {"x": _centered(spec, x, found), **given}, {"rstd": _rstd(spec, found)}, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _masked(spec: Spec, given: Arrays, where: Any) -> Any:
    """`_applied`, whose gradient is told what has a say."""
    return _applied(spec, given)


def _masked_gradients(spec: Spec, kept: Any, dy: Any) -> Any:
    given, where = kept
    x, _ = heard(jnp, given["x"], dy, where)
    return *jax.vjp(partial(_applied, spec), given | {"x": x})[1](dy), None


_masked.defvjp(lambda spec, *kept: (_masked(spec, *kept), kept), _masked_gradients)


def _centered(spec: Spec, x: Any, statistics: Any) -> Any:
    x = x.astype(statistics.dtype)
    if not spec.is_centered:
        return x
    mean, low = (aligned(s, spec.axes, x.shape) for s in statistics[:2])
    return x - mean - low


def _rstd(spec: Spec, statistics: Any) -> Any:
    return rstd_of(jnp, statistics[2] + spec.eps, statistics[3])


def _learnt(statistics: Any, momentum: float, running: Arrays) -> Arrays:
    mean, _, var, count = (jnp.atleast_2d(s) for s in statistics)
    found = {"running_mean": mean, "running_var": var * count / jnp.maximum(count - 1, 1)}
    return {
        name: learnt(jnp, old.astype(mean.dtype), found[name], count, momentum).astype(old.dtype)
        for name, old in running.items()
    }
