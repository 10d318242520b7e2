"""The normalizations of normkit as functions of dask arrays.

They take what the functions of the same names in `normkit` take, but for `out`. A call judges its arguments and
computes nothing. Each is `normalize` of a view of x: of every chunk by itself where statistics lie within chunks, and
else in two phases.
"""

import inspect
import math
import operator
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import dask.array as da
import numpy as np

from .. import functional as _typed_core
from .._memory import dtype_named, library_of
from .._operations import OPERATIONS, Spec, axes_of, stand_in
from . import _chunks as chunks
from ._chunks import Arrays, again, each, tree
from ._view import View

core: Any = _typed_core  # it takes stand-ins too, which no type can say

__all__ = [
    "adaptive_instance_norm",
    "adaptive_instance_norm_backward",
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "l2_normalize",
    "l2_normalize_backward",
    "layer_norm",
    "layer_norm_backward",
    "normalize",
    "normalize_backward",
    "rms_norm",
    "rms_norm_backward",
]

KINDS = {
    "instance_norm": "instance", "group_norm": "group", "layer_norm": "layer", "rms_norm": "rms",
    "batch_norm": "batch", "normalize": "centered", "l2_normalize": "uncentered",
}  # fmt: skip
ARRAYS = (
    "x", "dy", "mean", "rstd", "rnorm", "weight", "bias", "running_mean", "running_var", "where", "residual",
    "dresidual", "slopes",
)  # fmt: skip


# ---- arguments ---------------------------------------------------------------------------------------------------


def _array(name: str, value: Any, x: Any = None) -> Any:
    """An argument as an array of dask, whose chunks are of the library that those of `x` are of."""
    if not isinstance(value, da.Array):
        if x is None:
            raise TypeError(f"{name} is {type(value).__name__}, expected a dask.array.Array")
        if not hasattr(value, "dtype") or not hasattr(value, "shape"):
            raise TypeError(f"{name} is {type(value).__name__}, expected an array of dask, or one that dask takes")
    if x is not None:
        found, expected = (library_of(getattr(a, "_meta", a)) for a in (value, x))
        if found != expected:
            raise TypeError(f"{name} has chunks of {found}, expected {expected}, as those of x")
    if not isinstance(value, da.Array):
        return da.from_array(value, chunks=-1)
    if any(map(math.isnan, value.shape)):
        raise ValueError(f"{name} has chunks of unknown sizes: call {name}.compute_chunk_sizes() before")
    return value


def _judged(function: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """What is no array and what is, by names. Raises what the call of the core would raise, in its words."""
    options = dict(given)
    if options.pop("out", None) is not None:
        raise TypeError("out is given, expected None: what is computed is a new array of dask")
    slopes, where = core._slopes_of(options.get("activation")), options.get("where")
    if slopes is not None:
        options |= {"slopes": slopes, "activation": None}
    if isinstance(where, bool | np.bool) and where:
        options["where"] = None
    arrays: Arrays = {}
    for name in ARRAYS:
        value = options.get(name)
        if value is not None and not isinstance(value, int | float | np.generic):
            arrays[name] = _array(name, options.pop(name), arrays.get("x"))
    stand_ins: Arrays = {name: stand_in(a.shape, a.dtype) for name, a in arrays.items()}
    if "slopes" in stand_ins:
        stand_ins["activation"] = "prelu", stand_ins.pop("slopes")
    function._description(**options | stand_ins)
    return {name: value for name, value in options.items() if name not in ARRAYS or value is not None}, arrays


class Call:
    """A call that was judged: what chunks are told, and the arrays of it beside the view of x."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.options, self.given = _judged(getattr(core, name), given)
        name, is_forward = name.removesuffix("_backward"), not name.endswith("_backward")
        self.of_norm = name == "l2_normalize"
        kind = KINDS[name] if self.options.get("center", True) else "uncentered"
        learns = OPERATIONS[kind].learns or "use_input_stats"
        self.frozen = not self.options.get(learns, True)
        x = self.given["x"]
        if "residual" in self.given:
            x = x + self.given["residual"].rechunk(x.chunks, method="tasks")
        self.total = x
        self.dtype = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)  # of statistics
        eps = self.options.get("eps")
        self.eps = float(np.finfo(self.dtype.type).eps if eps is None else eps)
        axes = axes_of(x, self.options.get("axis", self.options.get("channel_axis")))
        groups = operator.index(self.options.get("num_groups", 1))
        # Running statistics are those of channels, whatever the image.
        of_channels = self.frozen and is_forward
        spec = Spec("batch" if of_channels else kind, axes, groups, eps=self.eps)
        self.center, self.view = spec.is_centered, View(spec, x)
        self.axis = self.view.axis
        self.told: dict[str, Any] = {n: self.options[n] for n in ("activation", "weight_offset") if n in self.options}

    def arrays(self, *names: str) -> Arrays:
        """Those of these names that are there, beside the view."""
        found: Arrays = {}
        for name in names:
            array = self.given.get(name)
            if name in ("mean", "rstd", "rnorm"):
                array = self.options.get(name) if array is None else array
                found["mean" if name == "mean" else "rstd"] = None if array is None else self.view.statistics(array)
            elif array is not None:
                is_param = name in ("weight", "bias", "slopes", "running_mean", "running_var")
                found[name] = self.view.param(array) if is_param else self.view.of(array)
        return found


# ---- forward -----------------------------------------------------------------------------------------------------


def _moments(call: Call) -> Any:
    """The moments of each statistic, with the axes that they are taken over."""
    arrays = {"x": call.view.x, **call.arrays("where")}
    parts = each(chunks.moments, arrays, np.float64, single=call.axis, numbers=True, axis=call.axis, center=call.center)
    return call.view.joined(parts, chunks.merged)


def _forward(name: str, given: dict[str, Any]) -> Any:
    call = Call(name, given)
    options, view, x = call.options, call.view, call.view.x
    dtype = options.get("out_dtype")
    if dtype is None:
        dtype = np.dtype(np.float32) if x.dtype.kind in "bui" else x.dtype
    else:
        dtype = dtype_named(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    running = [key for key in ("running_mean", "running_var") if key in call.given]
    wants_moments = options.get("return_stats") or (running and not call.frozen)
    arrays = {"x": x, **call.arrays("weight", "bias", "slopes")}
    told: dict[str, Any] = call.told | {
        "axis": call.axis,
        "center": call.center,
        "eps": call.eps,
        "of_norm": call.of_norm,
    }
    moments = None
    if call.frozen:
        moments = each(chunks.constants, call.arrays(*running), np.float64, like="running_mean", numbers=True)
    elif wants_moments or not view.is_whole:
        moments = _moments(call)
    if moments is None:
        y = each(chunks.normalized, arrays | call.arrays("where"), dtype, out_dtype=dtype, **told)
    else:
        if not view.is_whole and not call.frozen:
            arrays |= again({"x": x}, moments)
        y = each(chunks.applied, arrays | {"moments": view.spread(moments)}, dtype, out_dtype=dtype, **told)
    results = [view.back(y)]
    if options.get("return_stats"):
        names = ("mean", "rstd") if call.center else ("rstd",)
        results += [_statistic(call, moments, name) for name in names]
    if options.get("return_residual"):
        results.append(call.total)
    if not call.frozen:
        results += [_learnt(call, moments, key) for key in running]
    return results[0] if len(results) == 1 else tuple(results)


def _statistic(call: Call, moments: Any, name: str) -> Any:
    found = each(
        chunks.statistic, {"moments": moments}, call.dtype, like="moments", name=name, eps=call.eps,
        of_norm=call.of_norm,
    ).squeeze(call.view.lacking)  # fmt: skip
    if "use_input_stats" in call.options and call.frozen:  # one for each image
        images = call.total.chunks[0]
        found = da.broadcast_to(found, (sum(images), *found.shape), chunks=(images, *found.chunks))
    return found


def _learnt(call: Call, moments: Any, name: str) -> Any:
    moments = moments.squeeze(call.axis)
    moments = moments[(None,) * (3 - moments.ndim)].rechunk({0: -1})  # (N, C) or (1, C), and numbers
    running = call.given[name].rechunk((moments.chunks[1],))
    return da.blockwise(
        partial(chunks.learned, name=name, momentum=float(call.options["momentum"])), "c", running, "c", moments, "nck",
        dtype=running.dtype, meta=running._meta, concatenate=True, align_arrays=False, token="normkit-learned",
    )  # fmt: skip


# ---- backward ----------------------------------------------------------------------------------------------------


def _backward(name: str, given: dict[str, Any]) -> Any:
    call = Call(name, given)
    view, x = call.view, call.view.x
    need = ("dx",) if call.of_norm else tuple(call.options["need"])
    params = call.arrays("weight", "bias", "slopes")
    if "weight" not in params and ("dweight" in need or ("dbias" in need and "bias" not in params)):
        params["weight"], call.told["weight_offset"] = view.ones(call.dtype), 0.0
    shapes, dtypes = {}, {}
    for gradient, of in (("dweight", "weight"), ("dbias", "bias"), ("dslopes", "slopes")):
        own, weight = call.given.get(of), call.given.get("weight")
        shapes[gradient] = own.shape if own is not None else view.absent() if weight is None else weight.shape
        like = own if of == "slopes" else weight
        dtypes[gradient] = call.dtype if like is None else like.dtype
    # Shares of half types would be rounded each.
    params = {name: a.astype(np.promote_types(a.dtype, np.float32)) for name, a in params.items()}
    data = {"x": x, **call.arrays("dy", "where", "dresidual")}
    statistics = call.arrays("rnorm" if call.of_norm else "rstd", *(("mean",) if call.center else ()))
    told: dict[str, Any] = call.told | {"axis": call.axis}
    if not view.is_whole and not call.frozen:
        beside = {key: a for key, a in data.items() if key != "dresidual"}
        sums = each(chunks.sums, beside | statistics | params, np.float64, single=call.axis, numbers=True, **told)
        sums = view.joined(sums)
        data, statistics["sums"] = again(data, sums), view.spread(sums)
    if call.of_norm:
        return view.back(each(chunks.gradient_of_norm, data | statistics, x.dtype, axis=call.axis, eps=call.eps))
    wanted = tuple(key for key in ("dx", "dweight", "dbias", "dslopes") if key in need)
    found = each(
        chunks.gradients, data | statistics | params, x.dtype, center=call.center, need=wanted,
        use_input_stats=not call.frozen, **told,
    )  # fmt: skip
    results: list[Any] = [None] * (4 if "dslopes" in need else 3)
    for k, key in enumerate(("dx", "dweight", "dbias", "dslopes")):
        if key == "dx" and key in need:
            results[k] = view.back(each(chunks.taken, {"x": found}, x.dtype, k=k))
        elif key in need:
            param = params[key[1:]] if key[1:] in params else params["weight"]
            shared = tuple(a for a, extent in enumerate(param.shape) if extent == 1)
            share = each(chunks.share, {"x": found}, np.float64, single=shared, k=k)
            results[k] = view.back(tree(share, shared), shapes[key]).astype(dtypes[key])
    return tuple(results)


# ---- a style -----------------------------------------------------------------------------------------------------


class _Style:
    """The style of a call, its moments, and its deviations and means, which are weights and biases of content."""

    def __init__(self, given: dict[str, Any], judge: Any) -> None:
        content = _array("content", given["content"])
        style = _array("style", given["style"], content)
        axis, eps = given["channel_axis"], given["eps"]
        with core._called("style"):
            judge(stand_in(style.shape, style.dtype), channel_axis=axis)
        spec = Spec("instance", (operator.index(axis),), eps=eps)
        self.view = View(spec, style)
        if -content.ndim <= axis < content.ndim:  # else content is refused by its own call
            core._check_style((style.shape[0], style.shape[axis]), (content.shape[0], content.shape[axis]))
        self.told: dict[str, Any] = {"axis": self.view.axis, "center": True}
        parts = each(chunks.moments, {"x": self.view.x}, np.float64, single=self.view.axis, numbers=True, **self.told)
        self.moments = tree(parts, self.view.axis, chunks.merged)
        statistics = [
            each(chunks.statistic, {"moments": self.moments}, np.float64, like="moments", name=name, eps=eps)
            for name in ("deviation", "mean")
        ]
        self.params = [s.squeeze(self.view.axis) for s in statistics]
        if style.shape[0] == 1 != content.shape[0]:
            self.params = [s[0] for s in self.params]


def _adaptive(name: str, given: dict[str, Any]) -> Any:
    style = _Style(given, core._moments_of_channels._description)
    with core._called("content"):
        return instance_norm(given.pop("content"), *style.params, **{k: v for k, v in given.items() if k != "style"})


def _adaptive_backward(name: str, given: dict[str, Any]) -> Any:
    need = core._adaptive_gradients(given.pop("need"))
    style = _Style(given, lambda s, **told: core.instance_norm_backward._description(s, s, 0.0, 1.0, **told))
    (std, mean), x, eps = style.params, given.pop("content"), given.pop("eps")
    given.pop("style")
    with core._called("content"):
        dcontent, dweight, dbias = instance_norm_backward(
            x=x, weight=std, bias=mean, need=core._WANTED["dcontent" in need, "dstyle" in need], **given
        )
    if "dstyle" not in need:
        return dcontent, None
    view = style.view
    members = max(math.prod(view.x.shape[a] for a in view.axis), 1)
    arrays = again({"x": view.x}, dweight)
    arrays |= {"moments": style.moments, "weight": view.param(dweight / members), "bias": view.param(dbias / members)}
    return dcontent, each(chunks.applied, arrays, view.x.dtype, eps=eps, **style.told)


# ---- the functions -----------------------------------------------------------------------------------------------


def _lazily(name: str, run: Callable[[str, dict[str, Any]], Any]) -> Callable[..., Any]:
    """The function of this name, with the signature of the core."""
    function = getattr(core, name)
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        return run(name, dict(bound.arguments))

    call.__module__, call.__doc__ = __name__, f"`normkit.{name}` of dask arrays: the same parameters, but for `out`."
    return call


instance_norm = _lazily("instance_norm", _forward)
group_norm = _lazily("group_norm", _forward)
layer_norm = _lazily("layer_norm", _forward)
rms_norm = _lazily("rms_norm", _forward)
batch_norm = _lazily("batch_norm", _forward)
normalize = _lazily("normalize", _forward)
l2_normalize = _lazily("l2_normalize", _forward)
adaptive_instance_norm = _lazily("adaptive_instance_norm", _adaptive)

instance_norm_backward = _lazily("instance_norm_backward", _backward)
group_norm_backward = _lazily("group_norm_backward", _backward)
layer_norm_backward = _lazily("layer_norm_backward", _backward)
rms_norm_backward = _lazily("rms_norm_backward", _backward)
batch_norm_backward = _lazily("batch_norm_backward", _backward)
normalize_backward = _lazily("normalize_backward", _backward)
l2_normalize_backward = _lazily("l2_normalize_backward", _backward)
adaptive_instance_norm_backward = _lazily("adaptive_instance_norm_backward", _adaptive_backward)
