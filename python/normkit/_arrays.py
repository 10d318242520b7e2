"""Arrays that the compiled core does not take as they come: other libraries, and layouts that its geometry cannot hold.

Another library's arrays are viewed as NumPy arrays without a copy, and the results handed back to it. What does not fit
the geometry is packed once into dense arrays whose normalized axes are the fastest, which always fits.
"""

import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from . import _core as _typed_core
from . import _cuda

_core: Any = _typed_core  # it takes and gives arrays of any library, which no stub can say

NDArray: TypeAlias = np.ndarray[Any, Any]
# An array is whatever NumPy, or a library that speaks DLPack, calls one; outputs are of the same kind.
Array: TypeAlias = Any
Activation: TypeAlias = str | tuple[str, float] | None

_CPU, _PINNED = 1, 3  # DLPack device types whose memory the CPU reads


def share_memory(a: NDArray, b: NDArray) -> bool:
    """True unless it is certain that two interleaving views share no element."""
    effort: Any = 100_000
    try:
        return np.shares_memory(a, b, max_work=effort)
    except np.exceptions.TooHardError:
        return True


@contextmanager
def called(name: str) -> Iterator[None]:
    """Errors that name an argument x name it as the caller does."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError, np.exceptions.AxisError):  # not of this library
            raise
        raise type(error)(re.sub(r"\bx\b", name, str(error))) from None


# ---- libraries ---------------------------------------------------------------------------------------------------


def _library(array: Any) -> str:
    """The library that an array belongs to, by the root of its type's module."""
    root = type(array).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(root, root)


def _as_numpy(name: str, array: Any) -> NDArray:
    """A view of `array` as exactly a NumPy array."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, expected a plain one: a mask would be ignored")
    if isinstance(array, np.ndarray):
        return array.view(np.ndarray)
    if _cuda.is_cupy(array):
        raise TypeError(f"{name} is a CuPy array, expected a NumPy array in this call: pass {name}.get()")
    if getattr(array, "requires_grad", False):
        raise TypeError(
            f"{name} requires grad, expected a tensor that does not: normkit records no gradients, pass {name}.detach()"
        )
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        article = "an" if type(array).__name__[0] in "aeiou" else "a"
        raise TypeError(
            f"{name} is {article} {type(array).__name__}, expected a NumPy array or an object with __dlpack__"
        )
    device, _ = array.__dlpack_device__()
    if int(device) not in (_CPU, _PINNED):
        expected = f"the CPU, or CUDA by way of CuPy: pass cupy.from_dlpack({name})"
        raise TypeError(f"{name} is on DLPack device type {int(device)}, expected {expected}")
    try:
        capsule = array.__dlpack__(max_version=(1, 1))
    except TypeError:  # a producer older than DLPack 1
        capsule = array.__dlpack__()
    view: NDArray = _core.from_capsule(name, capsule)
    return view


def _give_back(library: Any) -> Callable[[Any], Any]:
    """How a NumPy result becomes an array of the library of `library`, an array."""
    if isinstance(library, np.ndarray):
        return as_numpy
    if hasattr(library, "__array_namespace__"):
        namespace = library.__array_namespace__()
    else:
        namespace = sys.modules.get(_library(library))
    if not hasattr(namespace, "from_dlpack"):  # a producer that takes nothing back
        return lambda result: result
    return lambda result: None if result is None else namespace.from_dlpack(_core.to_dlpack(result))


_REQUIRED = ("x", "dy", "content", "style")


def views_of(*, cuda: bool = False, **arrays: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The arrays of a call as NumPy arrays, and the way back. The first one says which library it is.

    With `cuda`, CuPy arrays stay what they are: the call is one of those that take them.
    """
    first = next(iter(arrays.values()))
    if cuda and _cuda.is_cupy(first):
        _cuda.check_together(arrays)
        return arrays, as_numpy
    views: dict[str, Any] = {}
    for name, array in arrays.items():
        views[name] = None if array is None and name not in _REQUIRED else _as_numpy(name, array)
        if array is None or (isinstance(array, np.ndarray) and isinstance(first, np.ndarray)):
            continue
        if _library(array) != _library(first):
            raise TypeError(
                f"{name} is a {_library(array)} array, expected {_library(first)}: all arrays of a call share a library"
            )
        if _library(array) == "jax":  # its arrays never change
            views[name].flags.writeable = False
    return views, _give_back(first)


def hand_back(result: Any, give_back: Callable[[Any], Any], out: Any) -> Any:
    """What a call on views returned as the caller's library has it; its first array is `out`, where one was given."""
    first, *others = result if isinstance(result, tuple) else (result,)
    first = first if first is None else give_back(first) if out is None else out
    return (first, *map(give_back, others)) if isinstance(result, tuple) else first


def _dtype_name(dtype: Any) -> str | None:
    """'float32' for np.float32, np.dtype('float32'), 'float32', torch.float32 and the like."""
    if dtype is None:
        return None
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rpartition(".")[2]


def as_numpy(result: NDArray) -> NDArray:
    """The way back to NumPy, which is no way at all."""
    return result


# ---- dtypes that NumPy does not compute with ---------------------------------------------------------------------

_BFLOAT16_BITS = np.dtype([("bfloat16", "<u2")])  # how from_capsule() shows bfloat16


def _widen(array: NDArray, x: NDArray) -> NDArray:
    """Parameters in the dtype that calls on x compute in."""
    if array.dtype == _BFLOAT16_BITS:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64 if np.float64 in (array.dtype, x.dtype) else np.float32)


def _narrow(values: NDArray, dtype: np.dtype[Any]) -> NDArray:
    """float32 or float64 values in any floating dtype, rounded once."""
    if dtype != _BFLOAT16_BITS:
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(_BFLOAT16_BITS)


def _sum_of(x: NDArray, residual: NDArray) -> NDArray:
    """x + residual where x lies, in its dtype, rounded once."""
    total: NDArray = _cuda.namespace_of(x).empty_like(x, order="K")
    total[...] = _narrow(_widen(x, x) + _widen(residual, x), x.dtype)
    return total


def _dtype_named(name: str, *, numpy: bool) -> Any:
    """The NumPy dtype that stands for `name` in an array of NumPy, or in one of another library."""
    if name != "bfloat16":
        return np.dtype(name)
    if not numpy:
        return _BFLOAT16_BITS
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


# ---- packing -----------------------------------------------------------------------------------------------------


class _Packing:
    """x with its kept axes first and its normalized axes last, and the way back."""

    def __init__(self, kind: int, axes: Any, x: NDArray) -> None:
        self.kind, self.x, self.xp = kind, x, _cuda.namespace_of(x)
        self.channels: list[int] = []  # the axes that (C,) and (N, C) lie along, where weights belong to channels
        if kind in (_core.INSTANCE, _core.GROUP):
            channel = axes[0] if kind == _core.GROUP else axes
            self.channels = kept = [0, channel % x.ndim]
            self.axes: Any = (1, axes[1]) if kind == _core.GROUP else 1
        elif kind == _core.BATCH:
            self.channels = kept = [axes % x.ndim]
            self.axes = 0
        else:
            reduced = {a % x.ndim for a in (axes if isinstance(axes, tuple | list) else (axes,))}
            kept = [a for a in range(x.ndim) if a not in reduced]
            self.axes = tuple(range(len(kept), x.ndim))
        self.order = kept + [a for a in range(x.ndim) if a not in kept]

    def data(self, array: NDArray) -> NDArray:
        packed: NDArray = array.transpose(self.order).copy(order="C")
        return packed

    def optional(self, array: NDArray | None) -> NDArray | None:
        """A mask, which broadcasts against x, or a companion of x."""
        return None if array is None else self.data(self.xp.broadcast_to(array, self.x.shape))

    def back(self, packed: NDArray) -> NDArray:
        return packed.transpose(np.argsort(self.order))

    def _aligned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape` with one extent for each axis of x, so that it broadcasts against x."""
        if self.channels and len(shape) < self.x.ndim:
            along = self.channels[-len(shape) :]
            return tuple(self.x.shape[a] if a in along else 1 for a in range(self.x.ndim))
        return (1,) * (self.x.ndim - len(shape)) + shape

    def _stays(self, shape: tuple[int, ...]) -> bool:
        """True where the packed call takes a parameter of this shape as it is."""
        layer = self.kind in (_core.LAYER, _core.LAYER_RMS)
        return layer or (bool(self.channels) and len(shape) < self.x.ndim)

    def absent(self) -> tuple[int, ...]:
        """The shape of the gradients of a weight that is not there."""
        reduced = sorted(self.order[self.x.ndim - len(self.axes) :]) if not self.channels else self.channels[-1:]
        return tuple(self.x.shape[axis] for axis in reduced)

    def ones(self) -> Any:
        """The weight that a missing one stands for."""
        dtype = np.float64 if self.x.dtype == np.float64 else np.float32
        if self.channels or self.kind in (_core.LAYER, _core.LAYER_RMS):
            return self.xp.ones(self.absent(), dtype)
        kept = self.order[: self.x.ndim - len(self.axes)]
        return self.xp.ones([1 if axis in kept else extent for axis, extent in enumerate(self.x.shape)], dtype)

    def param(self, param: NDArray | None, *, expand: bool) -> NDArray | None:
        if param is None or (self._stays(param.shape) and not expand):
            return param
        aligned = param.reshape(self._aligned(param.shape))
        if expand:
            aligned = self.xp.broadcast_to(_widen(aligned, self.x), self.x.shape)
        return self.data(aligned)

    def gradient(self, gradient: NDArray | None, like: NDArray | None, *, expanded: bool) -> NDArray | None:
        """The gradient of a parameter `like`; that of an expanded one is summed over what it was repeated along."""
        if gradient is None or like is None or (self._stays(like.shape) and not expanded):
            return gradient
        full = self.back(gradient)
        if expanded:
            target = self._aligned(like.shape)
            repeated = tuple(a for a in range(full.ndim) if target[a] == 1)
            full = _narrow(full.sum(axis=repeated, dtype=np.float64, keepdims=True), like.dtype)
        return full.reshape(like.shape).copy()

    def like_x(self, packed: NDArray, out: NDArray | None = None) -> NDArray:
        """A packed result where x lies, or in `out`; rounded, where `out` has another dtype."""
        target = self.xp.empty_like(self.x, dtype=packed.dtype, order="K") if out is None else out
        self.xp.copyto(target, self.back(packed if packed.dtype == target.dtype else _narrow(packed, target.dtype)))
        return target

    def call(self, core: Callable[..., Any], weight: NDArray | None, bias: NDArray | None) -> tuple[Any, bool]:
        """core(weight, bias) with packed parameters, and whether they had to be expanded to the shape of x to fit."""
        result = core(self.param(weight, expand=False), self.param(bias, expand=False))
        if result is not NotImplemented:
            return result, False
        return core(self.param(weight, expand=True), self.param(bias, expand=True)), True


def forward_anywhere(
    kind: int, axes: Any, x: Any, weight: Any, bias: Any, eps: float | None, running_mean: Any, running_var: Any,
    use_input_stats: bool, momentum: float, out: Any, out_dtype: Any, return_stats: bool, where: Any, residual: Any,
    return_residual: bool, activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.forward` for any library, layout and output dtype."""
    v, give_back = views_of(
        x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, out=out, where=where,
        residual=residual, cuda=True,
    )  # fmt: skip
    run = _cuda.runner_for(x)
    running = v["running_mean"], v["running_var"], use_input_stats, momentum
    name = _dtype_name(out_dtype)

    def core(axes: Any, x: Any, weight: Any, bias: Any, out: Any, name: str | None, where: Any, residual: Any) -> Any:
        options = where, residual, return_residual, activation, weight_offset
        return run(_core.forward, kind, axes, x, weight, bias, eps, *running, out, name, return_stats, *options)

    result = core(axes, v["x"], v["weight"], v["bias"], v["out"], name, v["where"], v["residual"])
    if result is NotImplemented and residual is not None:
        # The sum where x lies, so that its statistics are summed in the order that they would be without a residual.
        total = _sum_of(v["x"], v["residual"])
        y, *others = forward_anywhere(
            kind, axes, total, v["weight"], v["bias"], eps, *running, None, name, True, v["where"], None, False,
            activation, weight_offset,
        )  # fmt: skip
        if v["out"] is not None:
            _cuda.namespace_of(y).copyto(v["out"], y)
            y = v["out"]
        result = (y, *others[: len(others) * return_stats], *[total][: int(return_residual)])
        result = result if len(result) > 1 else y
    elif result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        data, mask = packing.data(v["x"]), packing.optional(v["where"])
        result, _ = packing.call(
            lambda w, b: core(packing.axes, data, w, b, None, _wide(name, v["x"]), mask, None), v["weight"], v["bias"]
        )
        y, *others = result if return_stats else (result,)
        y = packing.like_x(y, _target(v["x"], v["out"], name, numpy=isinstance(v["x"], type(x))))
        result = (y, *others) if return_stats else y
    return hand_back(result, give_back, out)


def _target(x: NDArray, out: NDArray | None, name: str | None, *, numpy: bool) -> NDArray | None:
    """Where y goes: `out`, or a new array where a dtype is named."""
    if out is not None or name is None:
        return out
    target: NDArray = _cuda.namespace_of(x).empty_like(x, dtype=_dtype_named(name, numpy=numpy), order="K")
    return target


def _wide(name: str | None, x: NDArray) -> str | None:
    """What a packed call gives where a dtype is named: the compute type, which is then rounded to that dtype."""
    return None if name is None else "float64" if x.dtype == np.float64 else "float32"


def apply_anywhere(
    kind: int, axes: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, out: Any, out_dtype: Any,
    activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.apply` for any library, layout and output dtype."""
    v, give_back = views_of(x=x, mean=mean, rstd=rstd, weight=weight, bias=bias, out=out)
    name = _dtype_name(out_dtype)

    def core(axes: Any, x: Any, weight: Any, bias: Any, out: Any, name: str | None) -> Any:
        return _core.apply(kind, axes, x, v["mean"], v["rstd"], weight, bias, out, name, activation, weight_offset)

    result = core(axes, v["x"], v["weight"], v["bias"], v["out"], name)
    if result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        packed = packing.data(v["x"])
        result, _ = packing.call(
            lambda w, b: core(packing.axes, packed, w, b, None, _wide(name, v["x"])), v["weight"], v["bias"]
        )
        result = packing.like_x(result, _target(v["x"], v["out"], name, numpy=isinstance(x, np.ndarray)))
    return give_back(result) if out is None else out


def moments_anywhere(kind: int, axes: Any, x: Any, where: Any) -> tuple[NDArray, Callable[[Any], Any]]:
    """`_core.moments` for any library and layout, as a NumPy array, and the way back to the library of x."""
    v, give_back = views_of(x=x, where=where)
    result = _core.moments(kind, axes, v["x"], v["where"])
    if result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        result = _core.moments(kind, packing.axes, packing.data(v["x"]), packing.optional(v["where"]))
    return result, give_back


def backward_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, use_input_stats: bool,
    need: Collection[str], out: Any, where: Any, bias: Any, activation: Any, weight_offset: float, dresidual: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`_core.backward` for any library and layout."""
    v, give_back = views_of(
        x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, out=out, where=where, bias=bias, dresidual=dresidual, cuda=True
    )
    run = _cuda.runner_for(x)

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, out: Any, where: Any, dresidual: Any) -> Any:
        statistics, options = (v["mean"], v["rstd"]), (where, bias, activation, weight_offset, dresidual)
        return run(_core.backward, kind, axes, dy, x, *statistics, weight, use_input_stats, need, out, *options)

    result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["out"], v["where"], v["dresidual"])
    if result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        dy, x = packing.data(v["dy"]), packing.data(v["x"])
        options = packing.optional(v["where"]), packing.optional(v["dresidual"])
        weight = v["weight"]
        result, expanded = packing.call(lambda w, b: core(packing.axes, dy, x, w, b, None, *options), weight, v["bias"])
        if result is NotImplemented:  # gradients of weights that are not there, but would not fit
            weight = packing.ones()
            result, expanded = packing.call(
                lambda w, b: core(packing.axes, dy, x, w, b, None, *options), weight, v["bias"]
            )
        dx, *gradients = result
        dx = None if dx is None else packing.like_x(dx, v["out"])
        gradients = [packing.gradient(g, weight, expanded=expanded) for g in gradients]
        if weight is not v["weight"]:
            gradients = [None if g is None else g.reshape(packing.absent()) for g in gradients]
        result = (dx, *gradients)
    dx, dweight, dbias = hand_back(result, give_back, out)
    return dx, dweight, dbias


def backward_sums_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, where: Any, bias: Any,
    activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.backward_sums` for any library and layout."""
    v, give_back = views_of(x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, where=where, bias=bias)

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, where: Any) -> Any:
        options = where, bias, activation, weight_offset
        return _core.backward_sums(kind, axes, dy, x, v["mean"], v["rstd"], weight, *options)

    result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["where"])
    if result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        data = packing.data(v["dy"]), packing.data(v["x"])
        mask = packing.optional(v["where"])
        result, _ = packing.call(lambda w, b: core(packing.axes, *data, w, b, mask), v["weight"], v["bias"])
    return give_back(result)


def apply_backward_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, sums: Any, count: Any, weight: Any, out: Any,
    where: Any, bias: Any, activation: Any, weight_offset: float, dresidual: Any,
) -> Any:  # fmt: skip
    """`_core.apply_backward` for any library and layout; `count` may be a number."""
    numbers = {} if isinstance(count, int | float | np.number) else {"count": count}
    v, give_back = views_of(
        x=x, dy=dy, mean=mean, rstd=rstd, sums=sums, weight=weight, out=out, where=where, bias=bias,
        dresidual=dresidual, **numbers,
    )  # fmt: skip
    shape = v["rstd"].shape if v["rstd"] is not None else ()
    counts = v["count"] if numbers else np.full(shape, count, np.float64)

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, out: Any, where: Any, dresidual: Any) -> Any:
        options = where, bias, activation, weight_offset, dresidual
        return _core.apply_backward(kind, axes, dy, x, v["mean"], v["rstd"], v["sums"], counts, weight, out, *options)

    result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["out"], v["where"], v["dresidual"])
    if result is NotImplemented:
        packing = _Packing(kind, axes, v["x"])
        data = packing.data(v["dy"]), packing.data(v["x"])
        options = packing.optional(v["where"]), packing.optional(v["dresidual"])
        result, _ = packing.call(lambda w, b: core(packing.axes, *data, w, b, None, *options), v["weight"], v["bias"])
        result = packing.like_x(result, v["out"])
    return give_back(result) if out is None else out
