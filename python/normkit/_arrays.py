"""Arrays that the compiled core does not take as they come: other libraries, and layouts that its geometry cannot hold.

Another library's arrays are viewed as NumPy arrays without a copy, and the results handed back to it. What does not fit
the geometry is packed once into dense arrays whose normalized axes are the fastest, which always fits.
"""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from . import _core as _typed_core
from ._cuda import device_of, is_cupy, memory_of
from ._memory import Memory, NDArray, imported, library_of, namespace_of, refuse_gradients

_core: Any = _typed_core  # it takes and gives arrays of any library, which no stub can say

# An array is whatever NumPy, or a library that speaks DLPack, calls one; outputs are of the same kind.
Array: TypeAlias = Any
Activation: TypeAlias = str | tuple[str, float] | None
Views: TypeAlias = dict[str, Any]

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


def _require_array(name: str, array: Any) -> None:
    if not hasattr(array, "__dlpack__") or not hasattr(array, "__dlpack_device__"):
        article = "an" if type(array).__name__[0] in "aeiou" else "a"
        raise TypeError(
            f"{name} is {article} {type(array).__name__}, expected a NumPy array or an object with __dlpack__"
        )


def _as_numpy(name: str, array: Any) -> NDArray:
    """A view of `array` as exactly a NumPy array."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, expected a plain one: a mask would be ignored")
    if isinstance(array, np.ndarray):
        return array.view(np.ndarray)
    if is_cupy(array):
        raise TypeError(f"{name} is a CuPy array, expected a NumPy array in this call: pass {name}.get()")
    refuse_gradients(name, array)
    _require_array(name, array)
    device, _ = array.__dlpack_device__()
    if int(device) not in (_CPU, _PINNED):
        raise TypeError(f"{name} is on DLPack device type {int(device)}, expected the CPU, or CUDA for all of a call")
    return imported(name, array)


def _memory_of_cpu(first: Any) -> Memory:
    """How results of NumPy become arrays of the library of `first`."""
    if isinstance(first, np.ndarray):
        return Memory()
    namespace = namespace_of(first)
    if not hasattr(namespace, "from_dlpack"):  # a producer that takes nothing back
        return Memory(shows_bits=True)
    return Memory(lambda array: namespace.from_dlpack(_core.to_dlpack(array)), shows_bits=True)


_REQUIRED = ("x", "dy", "content", "style")


def views_of(**arrays: Any) -> tuple[Views, Memory]:
    """The arrays of a call as NumPy arrays, and their memory. The first one says which library and device it is."""
    first_name, first = next(iter(arrays.items()))
    device = device_of(first)
    if device is not None:
        return _views_of_device(arrays, first_name, device)
    views: Views = {}
    for name, array in arrays.items():
        views[name] = None if array is None and name not in _REQUIRED else _as_numpy(name, array)
        if array is None or (isinstance(array, np.ndarray) and isinstance(first, np.ndarray)):
            continue
        if library_of(array) != library_of(first):
            raise TypeError(
                f"{name} is a {library_of(array)} array, expected {library_of(first)}: "
                "all arrays of a call share a library"
            )
        if library_of(array) == "jax":  # its arrays never change
            views[name].flags.writeable = False
    return views, _memory_of_cpu(first)


def _views_of_device(arrays: Views, first_name: str, device: int) -> tuple[Views, Memory]:
    library = library_of(arrays[first_name])
    for name, array in arrays.items():
        if array is None and name not in _REQUIRED:
            continue
        _require_array(name, array)
        if library_of(array) != library:
            raise TypeError(
                f"{name} is a {library_of(array)} array, expected {library}, as {first_name} is: "
                "all arrays of a call share a library"
            )
        found = device_of(array)
        if found != device:
            place = "the CPU" if found is None else f"device {found}"
            raise TypeError(
                f"{name} is on {place}, expected device {device}, that of {first_name}: "
                "all arrays of a call share a device"
            )
    memory = memory_of(arrays[first_name], device)
    with memory:
        return {name: None if a is None else memory.view_of(a, name) for name, a in arrays.items()}, memory


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


def _compute(x: NDArray) -> Any:
    """The dtype that calls on x compute in."""
    return np.float64 if x.dtype == np.float64 else np.float32


# ---- packing -----------------------------------------------------------------------------------------------------


class _Packing:
    """x with its kept axes first and its normalized axes last, and the way back."""

    def __init__(self, memory: Memory, kind: int, axes: Any, x: NDArray) -> None:
        self.memory, self.kind, self.x = memory, kind, x
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
        return self.memory.dense(array.transpose(self.order))

    def optional(self, array: NDArray | None) -> NDArray | None:
        """A mask, which broadcasts against x, or a companion of x."""
        return None if array is None else self.data(np.broadcast_to(array, self.x.shape))

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

    def ones(self) -> NDArray:
        """The weight that a missing one stands for."""
        shape = self.absent()
        if not self.channels and self.kind not in (_core.LAYER, _core.LAYER_RMS):
            kept = self.order[: self.x.ndim - len(self.axes)]
            shape = tuple(1 if axis in kept else extent for axis, extent in enumerate(self.x.shape))
        ones = self.memory.empty(shape, _compute(self.x))
        self.memory.put(ones, 1)
        return ones

    def param(self, param: NDArray | None, *, expand: bool) -> NDArray | None:
        if param is None or (self._stays(param.shape) and not expand):
            return param
        aligned = param.reshape(self._aligned(param.shape))
        if not expand:
            return self.data(aligned)
        dtype = np.float64 if param.dtype == np.float64 else _compute(self.x)
        expanded = self.memory.empty(tuple(self.x.shape[axis] for axis in self.order), dtype)
        self.memory.put(expanded, self.memory.wide(aligned.transpose(self.order), dtype))
        return expanded

    def gradient(self, gradient: NDArray | None, like: NDArray | None, *, expanded: bool) -> NDArray | None:
        """The gradient of a parameter `like`; that of an expanded one is summed over what it was repeated along."""
        if gradient is None or like is None or (self._stays(like.shape) and not expanded):
            return gradient
        full = self.back(gradient)
        if not expanded:
            return self.memory.dense(full.reshape(like.shape))
        target = self._aligned(like.shape)
        repeated = tuple(a for a in range(full.ndim) if target[a] == 1)
        sums = self.memory.wide(full, np.float64)
        summed = self.memory.empty(target, like.dtype)
        self.memory.put(summed, sums.sum(axis=repeated, keepdims=True) if repeated else sums)
        return summed.reshape(like.shape)

    def like_x(self, packed: NDArray, out: NDArray | None = None) -> NDArray:
        """A packed result where x lies, or in `out`; rounded, where `out` has another dtype."""
        target = self.memory.empty_like(self.x, packed.dtype) if out is None else out
        if packed.dtype == target.dtype:
            self.memory.copy(target, self.back(packed))
        else:
            self.memory.put(target, self.memory.array_of(self.back(packed)))
        return target

    def call(self, core: Callable[..., Any], weight: NDArray | None, bias: NDArray | None) -> tuple[Any, bool]:
        """core(weight, bias) with packed parameters, and whether they had to be expanded to the shape of x to fit."""
        result = core(self.param(weight, expand=False), self.param(bias, expand=False))
        if result is not NotImplemented:
            return result, False
        return core(self.param(weight, expand=True), self.param(bias, expand=True)), True


def _target(memory: Memory, x: NDArray, out: NDArray | None, name: str | None) -> NDArray | None:
    """Where y goes: `out`, or a new array where a dtype is named."""
    return out if out is not None or name is None else memory.empty_like(x, memory.dtype_named(name))


def _wide(name: str | None, x: NDArray) -> str | None:
    """What a packed call gives where a dtype is named: the compute type, which is then rounded to that dtype."""
    return None if name is None else np.dtype(_compute(x)).name


# ---- calls -------------------------------------------------------------------------------------------------------


def forward_anywhere(
    kind: int, axes: Any, x: Any, weight: Any, bias: Any, eps: float | None, running_mean: Any, running_var: Any,
    use_input_stats: bool, momentum: float, out: Any, out_dtype: Any, return_stats: bool, where: Any, residual: Any,
    return_residual: bool, activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.forward` for any library, layout and output dtype."""
    v, memory = views_of(
        x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var, out=out, where=where,
        residual=residual,
    )  # fmt: skip
    name = _dtype_name(out_dtype)

    def core(
        axes: Any, x: Any, weight: Any, bias: Any, out: Any, name: str | None, where: Any, residual: Any = None,
        keep_sum: bool = False,
    ) -> Any:  # fmt: skip
        running = v["running_mean"], v["running_var"], use_input_stats, momentum
        options = where, residual, keep_sum, activation, weight_offset
        return memory.run(_core.forward, kind, axes, x, weight, bias, eps, *running, out, name, return_stats, *options)

    def packed(x: NDArray, out: NDArray | None) -> Any:
        packing = _Packing(memory, kind, axes, x)
        data, mask, wide = packing.data(x), packing.optional(v["where"]), _wide(name, x)
        params = v["weight"], v["bias"]
        result, _ = packing.call(lambda w, b: core(packing.axes, data, w, b, None, wide, mask), *params)
        y, *others = result if return_stats else (result,)
        y = packing.like_x(y, _target(memory, x, out, name))
        return (y, *others) if return_stats else y

    with memory:
        x, params, mask = v["x"], (v["weight"], v["bias"]), v["where"]
        result = core(axes, x, *params, v["out"], name, mask, v["residual"], return_residual)
        if result is NotImplemented and v["residual"] is None:
            result = packed(x, v["out"])
        elif result is NotImplemented:
            # The sum where x lies: its statistics are summed in the order that they would be without a residual.
            total, dtype = memory.empty_like(x), _compute(x)
            memory.put(total, memory.wide(x, dtype) + memory.wide(v["residual"], dtype))
            result = core(axes, total, *params, None, name, mask)
            if result is NotImplemented:
                result = packed(total, None)
            y, *others = result if return_stats else (result,)
            if v["out"] is not None:
                memory.copy(v["out"], y)
            result = (y, *others, *[total] * return_residual)
            result = result if len(result) > 1 else y
        return hand_back(result, memory.give_back, out)


def apply_anywhere(
    kind: int, axes: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, out: Any, out_dtype: Any,
    activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.apply` for any library, layout and output dtype."""
    v, memory = views_of(x=x, mean=mean, rstd=rstd, weight=weight, bias=bias, out=out)
    name = _dtype_name(out_dtype)

    def core(axes: Any, x: Any, weight: Any, bias: Any, out: Any, name: str | None) -> Any:
        options = out, name, activation, weight_offset
        return memory.run(_core.apply, kind, axes, x, v["mean"], v["rstd"], weight, bias, *options)

    with memory:
        x = v["x"]
        result = core(axes, x, v["weight"], v["bias"], v["out"], name)
        if result is NotImplemented:
            packing = _Packing(memory, kind, axes, x)
            data, wide = packing.data(x), _wide(name, x)
            result, _ = packing.call(lambda w, b: core(packing.axes, data, w, b, None, wide), v["weight"], v["bias"])
            result = packing.like_x(result, _target(memory, x, v["out"], name))
        return hand_back(result, memory.give_back, out)


def moments_anywhere(kind: int, axes: Any, x: Any, where: Any) -> tuple[Any, Memory]:
    """`_core.moments` for any library and layout, as an array that its memory computes with."""
    v, memory = views_of(x=x, where=where)
    with memory:
        result = memory.run(_core.moments, kind, axes, v["x"], v["where"])
        if result is NotImplemented:
            packing = _Packing(memory, kind, axes, v["x"])
            data, mask = packing.data(v["x"]), packing.optional(v["where"])
            result = memory.run(_core.moments, kind, packing.axes, data, mask)
        return memory.array_of(result), memory


def backward_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, use_input_stats: bool,
    need: Collection[str], out: Any, where: Any, bias: Any, activation: Any, weight_offset: float, dresidual: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`_core.backward` for any library and layout."""
    v, memory = views_of(
        x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, out=out, where=where, bias=bias, dresidual=dresidual
    )

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, out: Any, where: Any, dresidual: Any) -> Any:
        statistics, options = (v["mean"], v["rstd"]), (where, bias, activation, weight_offset, dresidual)
        return memory.run(_core.backward, kind, axes, dy, x, *statistics, weight, use_input_stats, need, out, *options)

    with memory:
        result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["out"], v["where"], v["dresidual"])
        if result is NotImplemented:
            packing = _Packing(memory, kind, axes, v["x"])
            data = packing.data(v["dy"]), packing.data(v["x"])
            options = packing.optional(v["where"]), packing.optional(v["dresidual"])
            weight = v["weight"]

            def call(weight: Any) -> Any:
                return packing.call(lambda w, b: core(packing.axes, *data, w, b, None, *options), weight, v["bias"])

            result, expanded = call(weight)
            if result is NotImplemented:  # gradients of weights that are not there, but would not fit
                weight = packing.ones()
                result, expanded = call(weight)
            dx, *gradients = result
            dx = None if dx is None else packing.like_x(dx, v["out"])
            gradients = [packing.gradient(g, weight, expanded=expanded) for g in gradients]
            if weight is not v["weight"]:
                gradients = [None if g is None else g.reshape(packing.absent()) for g in gradients]
            result = (dx, *gradients)
        dx, dweight, dbias = hand_back(result, memory.give_back, out)
        return dx, dweight, dbias


def backward_sums_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, where: Any, bias: Any,
    activation: Any, weight_offset: float,
) -> Any:  # fmt: skip
    """`_core.backward_sums` for any library and layout."""
    v, memory = views_of(x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, where=where, bias=bias)

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, where: Any) -> Any:
        options = where, bias, activation, weight_offset
        return memory.run(_core.backward_sums, kind, axes, dy, x, v["mean"], v["rstd"], weight, *options)

    with memory:
        result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["where"])
        if result is NotImplemented:
            packing = _Packing(memory, kind, axes, v["x"])
            data, mask = (packing.data(v["dy"]), packing.data(v["x"])), packing.optional(v["where"])
            result, _ = packing.call(lambda w, b: core(packing.axes, *data, w, b, mask), v["weight"], v["bias"])
        return memory.give_back(result)


def apply_backward_anywhere(
    kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, sums: Any, count: Any, weight: Any, out: Any,
    where: Any, bias: Any, activation: Any, weight_offset: float, dresidual: Any,
) -> Any:  # fmt: skip
    """`_core.apply_backward` for any library and layout; `count` may be a number."""
    numbers = {} if isinstance(count, int | float | np.number) else {"count": count}
    v, memory = views_of(
        x=x, dy=dy, mean=mean, rstd=rstd, sums=sums, weight=weight, out=out, where=where, bias=bias,
        dresidual=dresidual, **numbers,
    )  # fmt: skip

    def core(axes: Any, dy: Any, x: Any, weight: Any, bias: Any, out: Any, where: Any, dresidual: Any) -> Any:
        statistics, options = (v["mean"], v["rstd"], v["sums"], v["count"]), (where, bias, activation, weight_offset)
        return memory.run(_core.apply_backward, kind, axes, dy, x, *statistics, weight, out, *options, dresidual)

    with memory:
        if not numbers:
            v["count"] = memory.empty(v["rstd"].shape if v["rstd"] is not None else (), np.float64)
            memory.put(v["count"], count)
        result = core(axes, v["dy"], v["x"], v["weight"], v["bias"], v["out"], v["where"], v["dresidual"])
        if result is NotImplemented:
            packing = _Packing(memory, kind, axes, v["x"])
            data = packing.data(v["dy"]), packing.data(v["x"])
            options = packing.optional(v["where"]), packing.optional(v["dresidual"])
            params = v["weight"], v["bias"]
            result, _ = packing.call(lambda w, b: core(packing.axes, *data, w, b, None, *options), *params)
            result = packing.like_x(result, v["out"])
        return hand_back(result, memory.give_back, out)
