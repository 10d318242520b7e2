"""The phases of an operation under jit, grad and vmap.

A phase has a rule for vmap, where one more axis of all arrays is one more axis of one call, and a rule for its
gradient: that of a forward is a backward; that of a backward is made of jnp, which has all further ones.
"""

import math
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from .._operations import Frame, Spec, Words, composed, heard
from . import _xla
from ._xla import RUNNING, Arrays, Call, compute_dtype, execute, of_images

LIKE_X = ("x", "dy", "residual", "dresidual")
GRADIENTS = {"x": "out", "weight": "dweight", "bias": "dbias", "slopes": "dslopes"}


def eps_of(x: Any) -> float:
    """What rms norm adds where it is not told: PyTorch's choice too."""
    return float(jnp.finfo(compute_dtype(x)).eps)


# ---- vmap --------------------------------------------------------------------------------------------------------


class _Batch:
    """Arrays of a call of which some have one more axis, in front."""

    def __init__(self, call: Call, size: int, batched: dict[str, bool], arrays: Arrays) -> None:
        self.call, self.size, self.batched, self.arrays = call, size, batched, arrays
        self.frame = Frame(call.spec, self.own("x"))

    def own(self, name: str) -> tuple[int, ...]:
        """The shape without that axis."""
        return tuple(self.arrays[name].shape[int(self.batched[name]) :])

    def lead(self, name: str, always: bool) -> tuple[int, ...]:
        return (self.size,) if always or self.batched[name] else ()

    def each(self, name: str) -> Any:
        array = self.arrays[name]
        return array if self.batched[name] else jnp.broadcast_to(array, (self.size, *array.shape))

    def mask(self) -> Any:
        """Of the shape of x."""
        lead, own = self.lead("where", False), self.own("where")
        ones = (1,) * (len(self.frame.shape) - len(own))
        return jnp.broadcast_to(self.arrays["where"].reshape(lead + ones + own), (*lead, *self.frame.shape))

    def general(self) -> Arrays:
        """As `normalize` of an array with more axes, which every operation is."""
        frame = self.frame

        def seen(name: str) -> Any:
            if name in LIKE_X:
                return frame.data(self.each(name))
            if name == "where":
                return frame.data(self.mask())
            if name in ("mean", "rstd"):
                return self.each(name)
            varies = self.call.phase == "backward"  # its gradients do
            array = self.each(name) if varies else self.arrays[name]
            return array.reshape((*self.lead(name, varies), *frame.param_shape(self.own(name))))

        inner = self.call._replace(spec=frame.general(eps_of(self.arrays["x"])))
        found = run(inner, {name: seen(name) for name in self.arrays})

        def back(name: str, array: Any) -> Any:
            if name in ("out", "sum"):
                return frame.back(array)
            return array.reshape((self.size, *self.own(name[1:]))) if name in GRADIENTS.values() else array

        return {name: back(name, array) for name, array in found.items()}

    # ---- a style, which has images, and running statistics, which belong to the channels ----

    @property
    def channels(self) -> int:
        """The axis of x that they lie along."""
        return int(self.frame.kept[-1])

    def _aligned(self, name: str) -> list[int]:
        return self.frame.param_shape(self.own(name))

    def has_fixed_channels(self) -> bool:
        """True where the new axis is to channels as all others are: statistics are constants, and parameters shared."""
        others = [name for name in self.arrays if name not in LIKE_X]
        params = [name for name in others if name not in (*RUNNING, "where")]
        return (
            self.call.spec.frozen
            and not any(self.batched[name] for name in others)
            and all(math.prod(self._aligned(name)) == self._aligned(name)[self.channels] for name in params)
        )

    def fixed_channels(self) -> Arrays:
        spec = self.call.spec._replace(kind="batch", axes=(self.channels - len(self.frame.shape),))
        arrays = {name: self.each(name) if name in LIKE_X else array for name, array in self.arrays.items()}
        found = run(self.call._replace(spec=spec), arrays)
        shape = (self.size, *self.frame.statistics_shape())
        return {name: jnp.broadcast_to(a, shape) if name in ("mean", "rstd") else a for name, a in found.items()}

    def more_along(self, axis: int) -> Arrays:
        """Images are independent, and so are channels: along this axis of x, those of all are those of one call."""
        size, count = self.size, self.frame.shape[axis]

        def merged(array: Any, at: int) -> Any:
            array = jnp.moveaxis(array, 0, at)
            return array.reshape((*array.shape[:at], size * count, *array.shape[at + 2 :]))

        def parted(array: Any, at: int) -> Any:
            return jnp.moveaxis(array.reshape((*array.shape[:at], size, count, *array.shape[at + 1 :])), at, 0)

        def seen(name: str) -> Any:
            if name in RUNNING:
                return merged(self.each(name), 0)
            if name == "style":
                styles = self.each(name)
                return merged(jnp.broadcast_to(styles, (size, count, *styles.shape[2:])), 0)
            if name in LIKE_X:
                return merged(self.each(name), axis)
            if name == "where":
                return merged(jnp.broadcast_to(self.mask(), (size, *self.frame.shape)), axis)
            shape = self._aligned(name)
            array = self.arrays[name].reshape((*self.lead(name, False), *shape))
            shape[axis] = count
            return merged(jnp.broadcast_to(array, (size, *shape)), axis)

        found = run(self.call, {name: seen(name) for name in self.arrays})
        at = {"out": axis, "sum": axis, **dict.fromkeys(RUNNING, 0)}
        of_statistics = self.frame.kept.index(axis)
        return {name: parted(array, at.get(name, of_statistics)) for name, array in found.items()}


@lru_cache(1024)
def _mappable(call: Call) -> Any:
    @custom_vmap
    def run(arrays: Arrays) -> Arrays:
        return execute(call, arrays)

    @run.def_vmap
    def _(size: int, batched: Any, arrays: Arrays) -> Any:
        batch = _Batch(call, size, batched[0], arrays)
        if "style" in arrays:
            found = batch.more_along(0)
        elif not arrays.keys() & set(RUNNING):
            found = batch.general()
        else:
            found = batch.fixed_channels() if batch.has_fixed_channels() else batch.more_along(batch.channels)
        return found, dict.fromkeys(found, True)

    return run


def run(call: Call, arrays: Arrays) -> Arrays:
    """The call, which vmap knows how to map."""
    found: Arrays = _mappable(call)(arrays)
    return found


# ---- gradients ---------------------------------------------------------------------------------------------------


def _values(primals: Any) -> Arrays:
    return {name: primal.value for name, primal in primals.items()}


def _is_there(cotangent: Any) -> bool:
    return not (cotangent is None or isinstance(cotangent, SymbolicZero))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(call: Call, arrays: Arrays) -> Arrays:
    return run(call, arrays)


def _forward_kept(call: Call, primals: Any) -> Any:
    arrays = _values(primals)
    statistics = ("mean", "rstd") if call.spec.is_centered else ("rstd",)
    total = ("sum",) if "residual" in arrays else ()
    wants = (*call.wants, *(name for name in statistics + total if name not in call.wants))
    found = forward(call._replace(wants=wants), arrays)  # which is to have gradients of its own
    kept: Arrays = {name: arrays[name] for name in ("weight", "bias", "where", "slopes", "style") if name in arrays}
    kept |= {"x": found.get("sum", arrays["x"]), **{name: found[name] for name in statistics}}
    # Arrays of no elements, whose shape says it: JAX keeps one structure for all uses of a jitted call.
    needed = {name: np.empty((int(primal.perturbed), 0)) for name, primal in primals.items()}
    return {name: found[name] for name in call.wants}, (kept, needed)


def _forward_gradients(call: Call, saved: Any, cotangents: Arrays) -> Any:
    kept, needed = saved
    dy, dtotal = cotangents["out"], cotangents.get("sum")
    gradients: Arrays = dict.fromkeys(needed)
    wanted = {name for name, is_needed in needed.items() if is_needed.shape[0]}
    if "style" in kept and _is_there(dy):
        kept = dict(kept)
        params, pull = jax.vjp(partial(_of_style, call.spec, kept["x"]), kept.pop("style"))
        inner = needed | dict.fromkeys(params, needed["style"])
        (found,) = _forward_gradients(call, (kept | params, inner), cotangents)
        style = pull({name: found[name] for name in params})[0] if "style" in wanted else None
        return ({name: style if name == "style" else found[name] for name in needed},)
    if not _is_there(dy):
        found = {"out": dtotal} if _is_there(dtotal) else {}
    else:
        arrays = kept | {"dy": dy} | ({"dresidual": dtotal} if _is_there(dtotal) else {})
        names = [name for name in GRADIENTS if name in wanted or (name == "x" and "residual" in wanted)]
        found = backward(Call("backward", call.spec, tuple(GRADIENTS[name] for name in names)), arrays)
    for name in wanted:
        gradient = found.get("out" if name == "residual" else GRADIENTS.get(name, ""))
        if gradient is not None:  # that of bias has the dtype of weight
            gradients[name] = gradient.astype(kept["x" if name == "residual" else name].dtype)
    return (gradients,)


def _of_style(spec: Spec, x: Any, style: Any) -> Arrays:
    dtype = jnp.dtype(compute_dtype(x)).name
    return of_images(x.shape[0], deviation(spec.axes[0], spec.eps or 0.0, dtype, style))


forward.defvjp(_forward_kept, _forward_gradients, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def backward(call: Call, arrays: Arrays) -> Arrays:
    return run(call, arrays)


def _backward_kept(call: Call, primals: Any) -> Any:
    arrays = _values(primals)
    return backward(call, arrays), arrays


def _backward_gradients(call: Call, arrays: Arrays, seconds: Arrays) -> Any:
    """By jnp. mean and rstd are functions of x, and have their gradients there."""
    gradients: Arrays = dict.fromkeys(arrays)
    if not any(map(_is_there, seconds.values())):
        return (gradients,)
    x, own = heard(jnp, arrays["x"], arrays["dy"], arrays.get("where"))
    given, eps = {name: arrays[name] for name in GRADIENTS if name in arrays} | {"x": x}, eps_of(x)

    def first(dy: Any, given: Arrays) -> Any:
        y, pull = jax.vjp(lambda given: composed(_WORDS, call.spec, given, arrays, eps), given)
        return pull(dy.astype(y.dtype))[0]

    _, pull = jax.vjp(first, arrays["dy"], given)

    def second(name: str) -> Any:
        cotangent: Any = seconds.get(GRADIENTS[name])
        like = given[name]
        return cotangent.astype(like.dtype) if _is_there(cotangent) else jnp.zeros_like(like)

    d_dy, found = pull({name: second(name) for name in given})
    gradients |= {"dy": own(d_dy), **found}
    if "dresidual" in arrays and _is_there(seconds.get("out")):
        gradients["dresidual"] = seconds["out"]
    return (gradients,)


backward.defvjp(_backward_kept, _backward_gradients, symbolic_zeros=True)


# ---- the same in words of jnp ------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Any] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu6": jax.nn.relu6,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "softplus": jax.nn.softplus,
    "prelu": lambda y, slopes: jnp.where(y > 0, y, slopes * y),
}


_WORDS = Words(
    jnp, lambda a: a.astype(jnp.promote_types(a.dtype, jnp.result_type(float))), jnp.broadcast_to, _ACTIVATIONS
)


# ---- a style -----------------------------------------------------------------------------------------------------


@lru_cache(1024)
def _mappable_deviation(axis: int, eps: float, dtype: str) -> Any:
    @custom_vmap
    def run(style: Any) -> Any:
        return _xla.deviation(style, axis, eps, dtype)

    @run.def_vmap
    def _(size: int, batched: Any, style: Any) -> Any:
        """Images are independent: those of all are one batch."""
        found = _mappable_deviation(axis, eps, dtype)(style.reshape((-1, *style.shape[2:])))
        return tuple(s.reshape((size, -1, s.shape[-1])) for s in found), (True, True)

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def deviation(axis: int, eps: float, dtype: str, style: Any) -> Any:
    """`_xla.deviation`, which has a gradient here."""
    return _mappable_deviation(axis, eps, dtype)(style)


def _deviation_kept(axis: int, eps: float, dtype: str, style: Any) -> Any:
    return deviation(axis, eps, dtype, style), style


def _deviation_gradient(axis: int, eps: float, dtype: str, style: Any, cotangents: Any) -> Any:
    """dstyle = (dmean + style_hat * dstd) / members: an instance norm of style."""
    dstd, dmean = cotangents
    members = max(style.size // max(dstd.size, 1), 1)
    spec = Spec("instance", (axis,), eps=eps)
    arrays = {"x": style, "weight": dstd / members, "bias": dmean / members}
    return (forward(Call("forward", spec, ("out",)), arrays)["out"],)


deviation.defvjp(_deviation_kept, _deviation_gradient)
