"""The gradient of a backward: what a gradient penalty needs.

Arrays are seen with their kept axes first and their normalized axes last, whatever normalization it is, and a block of
statistics at a time: its intermediate results are float64 and stay in cache, or take a bounded part of a GPU's memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from . import _core as _typed_core
from ._arrays import views_of
from ._memory import BFLOAT16_BITS, Memory, NDArray

_core: Any = _typed_core  # it takes and gives arrays of any library, which no stub can say

_LINE = 64  # bytes
Block: TypeAlias = tuple[slice, ...]


def _backward(
    memory: Memory, kind: int, axes: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, use_input_stats: bool,
    need: Any, weight_offset: float = 0.0,
) -> Any:  # fmt: skip
    """The one call of the core, without where, bias, activation and dresidual."""
    options = None, None, None, weight_offset, None
    return memory.run(_core.backward, kind, axes, dy, x, mean, rstd, weight, use_input_stats, need, None, *options)


# ---- views -------------------------------------------------------------------------------------------------------


class _Frame:
    """Where the axes of x go: those that are kept first, those that are normalized last. All of it is views."""

    def __init__(self, kind: int, axes: Any, x: NDArray) -> None:
        self.shape, ndim = x.shape, x.ndim
        self.channels: list[int] = []  # the axes that (C,) and (N, C) lie along, where weights belong to channels
        self.by_extents = kind in (_core.LAYER, _core.LAYER_RMS)  # weights have the normalized axes alone
        self.channel, self.groups = -1, 1  # the axis that is two to a statistic: groups, channels of a group
        if kind in (_core.INSTANCE, _core.GROUP):
            channel = axes[0] if kind == _core.GROUP else axes
            kept = self.channels = [0, channel % ndim]
        elif kind == _core.BATCH:
            kept = self.channels = [axes % ndim]
        else:
            reduced = {axis % ndim for axis in (axes if isinstance(axes, tuple | list) else (axes,))}
            kept = [axis for axis in range(ndim) if axis not in reduced]
        self.reduced = [axis for axis in range(ndim) if axis not in kept]
        if kind == _core.GROUP:
            self.channel, self.groups = self.channels[1], axes[1]
            # The channels of a group stand behind the groups, and are normalized.
            moved = [axis + (axis > self.channel) for axis in range(ndim)]
            self.order = [moved[a] for a in kept] + sorted([*(moved[a] for a in self.reduced), self.channel + 1])
        else:
            self.order = kept + self.reduced
        seen = self.data(x).shape
        self.kept, self.members = seen[: len(kept)], math.prod(seen[len(kept) :])
        self.statistics_shape = self.kept + (1,) * (len(seen) - len(kept))

    def data(self, array: NDArray) -> NDArray:
        """An array with the axes of x, some of them perhaps of extent 1."""
        shape = array.shape
        if self.channel >= 0:
            groups = self.groups if shape[self.channel] > 1 else 1
            split = groups, shape[self.channel] // groups
            array = array.reshape(*shape[: self.channel], *split, *shape[self.channel + 1 :])
        return array.transpose(self.order)

    def statistics(self, array: NDArray) -> NDArray:
        return array[(..., *(None for _ in self.statistics_shape[len(self.kept) :]))]

    def absent(self) -> tuple[int, ...]:
        """The shape of the gradient of a weight that is not there."""
        return tuple(self.shape[axis] for axis in self.channels[-1:] or self.reduced)

    def param(self, array: NDArray, *, like_absent: bool) -> NDArray:
        """A weight, or what has its shape; `like_absent`: there is no weight."""
        ndim, shape = len(self.shape), array.shape
        along: Sequence[int] = range(ndim - len(shape), ndim)  # as broadcasting has it
        if self.channels and len(shape) < ndim:
            along = self.channels[-len(shape) :]
        elif not self.channels and (self.by_extents or like_absent):
            along = self.reduced
        extents = dict(zip(along, shape, strict=True))
        return self.data(array.reshape([extents.get(axis, 1) for axis in range(ndim)]))

    def blocks(self, x: NDArray, elements: int) -> Iterator[Block]:
        """Blocks of whole statistics, of about so many elements."""
        last = self.data(x).strides[: len(self.kept)][-1:]
        # Where neighbors in memory belong to different statistics, a block of few would read every line many times.
        least = _LINE // x.itemsize if last == (x.itemsize,) else 1
        rows = max(least, elements // self.members)
        steps = []
        for extent in reversed(self.kept):
            steps.append(min(extent, rows))
            rows //= extent
            rows = max(rows, 1)
        starts = (range(0, extent, step) for extent, step in zip(self.kept, reversed(steps), strict=True))
        for at in itertools.product(*starts):
            yield tuple(slice(start, start + step) for start, step in zip(at, reversed(steps), strict=True))


def _part(array: NDArray, block: Block) -> NDArray:
    """The part of a view that belongs to a block. What does not vary along an axis belongs to every part of it."""
    return array[tuple(slice(None) if extent == 1 else cut for cut, extent in zip(block, array.shape, strict=False))]


def _load(memory: Memory, array: NDArray | None, block: Block) -> Any:
    return None if array is None else memory.wide(_part(array, block), np.float64)


# ---- one block ---------------------------------------------------------------------------------------------------


def _of_block(
    memory: Memory, x: Any, mean: Any, rstd: Any, dy: Any, w: Any, v: Any, ddw: Any, ddb: Any, frozen: bool
) -> tuple[Any, Any, Any]:
    """d_dy, d_x and the terms of d_weight, all in float64; w is 1 where there is no weight.

    A statistic is a row to the core. Its backward with respect to rows of weight 1 gives

        rp(u) = rstd * (u - mean(u) - x_hat * mean(u * x_hat))      and the sum of u * x_hat,

    and the rest is made of that. Nothing divides by rstd, which is 0 for constant data without eps.
    """
    rows = math.prod(rstd.shape)
    members = math.prod(x.shape) // rows

    def average(u: Any) -> Any:
        """By the core, whose sums do not depend on how many rows there are."""
        u = memory.view_of(u.reshape(rows, members))
        moments = memory.array_of(memory.run(_core.moments, _core.NORMALIZE, 1, u, None))
        return moments[..., 0].reshape(rstd.shape)

    def constant(shape: tuple[int, ...], value: float) -> NDArray:
        filled = memory.empty(shape, np.float64)
        memory.put(filled, value)
        return filled

    if mean is not None:
        x = x - mean
        if not frozen:
            x = x - average(x)  # a mean is rounded: the rest of it is in the data
    x_hat = x * rstd
    # About zero from here on: a mean far from it would round once more.
    kind = _core.NORMALIZE_RMS if mean is None else _core.NORMALIZE
    zero = None if mean is None else constant((rows,), 0.0)
    seen, scale = memory.view_of(x.reshape(rows, members)), memory.view_of(rstd.reshape(rows))
    data = seen, zero, scale, constant((rows, 1), 1.0), not frozen

    def projected(u: Any) -> tuple[Any, Any]:
        """rp(u) and the mean of u * x_hat."""
        u = memory.view_of(u.reshape(rows, members))
        rp, sums, _ = _backward(memory, kind, 1, u, *data, ("dx", "dweight"))
        return memory.array_of(rp).reshape(x.shape), memory.array_of(sums).reshape(rstd.shape) / members

    d_dy: Any = 0.0
    d_x: Any = 0.0
    terms = None
    if v is not None:
        rp_v, b = projected(v)
        d_dy = w * rp_v
        terms = dy * rp_v
        if not frozen:
            g = dy * w
            rp_g, a = projected(g)
            d_x = -rstd * (average(rp_v * g) * x_hat + b * rp_g + a * rp_v)
    if ddw is not None:
        d_dy = d_dy + ddw * x_hat
        d_x = d_x + projected(dy * ddw)[0]
    if ddb is not None:
        d_dy = d_dy + ddb
    return d_dy, d_x, terms


# ---- a call ------------------------------------------------------------------------------------------------------


def _name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16_BITS else dtype.name


def _check_dtype(name: str, array: NDArray, x: NDArray, *, wide: bool) -> None:
    """`wide`: float32 and float64 will do, whatever x is."""
    if not array.dtype.isnative:
        raise TypeError(f"{name} has dtype {array.dtype.str}, expected native byte order")
    dtypes = [np.dtype(np.float32), np.dtype(np.float64)] if wide else []
    only_wide = x.dtype in dtypes
    if array.dtype in dtypes or (array.dtype == x.dtype and not only_wide):
        return
    expected = "float32 or float64" if only_wide else f"{'float32, float64 or ' * wide}{_name(x.dtype)}, the dtype of x"
    raise TypeError(f"{name} has dtype {_name(array.dtype)}, expected {expected}")


def _check_shape(name: str, array: NDArray, shape: tuple[int, ...], whose: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}: the shape of {whose}")


def double_backward(
    kind: int, axes: Any, ddx: Any, ddweight: Any, ddbias: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any,
    use_input_stats: bool, weight_offset: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(d_dy, d_x, d_weight) of any normalization, for any library and layout."""
    if ddx is None and ddweight is None and ddbias is None:
        raise ValueError("ddx, ddweight and ddbias are None, expected an array for at least one of them")
    v, memory = views_of(x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, ddx=ddx, ddweight=ddweight, ddbias=ddbias)
    if kind in (_core.NORMALIZE_RMS, _core.LAYER_RMS):
        v["mean"] = None  # whatever was passed for it
    x, weight = v["x"], v["weight"]
    with memory:
        # Nothing is needed of it but that it judges what a backward takes.
        _backward(memory, kind, axes, v["dy"], x, v["mean"], v["rstd"], weight, use_input_stats, (), weight_offset)
        frame = _Frame(kind, axes, x)
        shape, whose = (frame.absent(), "dweight") if weight is None else (weight.shape, "weight")
        for name, wanted, of in (("ddx", x.shape, "x"), ("ddweight", shape, whose), ("ddbias", shape, whose)):
            if v[name] is not None:
                _check_dtype(name, v[name], x, wide=name != "ddx")
                _check_shape(name, v[name], wanted, of)

        d_dy, d_x, d_weight = memory.empty_like(x), memory.empty_like(x), None
        total = None
        if weight is not None:
            total, d_weight = memory.empty(weight.shape, np.float64), memory.empty(weight.shape, weight.dtype)
            memory.put(total, 0.0)
        with np.errstate(all="ignore"):  # NaN, infinity and what overflows go where they belong, as in the backward
            if x.size:
                _over_blocks(memory, frame, v, float(weight_offset), not use_input_stats, (d_dy, d_x), total)
            if total is not None and d_weight is not None:
                memory.put(d_weight, memory.array_of(total))
        return memory.give_back(d_dy), memory.give_back(d_x), memory.give_back(d_weight)


def _over_blocks(
    memory: Memory, frame: _Frame, v: dict[str, Any], weight_offset: float, frozen: bool,
    outputs: tuple[NDArray, NDArray], total: NDArray | None,
) -> None:  # fmt: skip
    """Fills the outputs, and adds d_weight up in `total`."""

    def see(name: str, view: Callable[..., NDArray], **options: bool) -> NDArray | None:
        return None if v[name] is None else view(v[name], **options)

    data = [see(name, frame.data) for name in ("x", "dy", "ddx")]
    mean, rstd = (see(name, frame.statistics) for name in ("mean", "rstd"))
    like_absent = v["weight"] is None
    params = [see(name, frame.param, like_absent=like_absent) for name in ("weight", "ddweight", "ddbias")]
    places = [frame.data(output) for output in outputs]
    sums = None if total is None else frame.param(total, like_absent=False)
    for block in frame.blocks(v["x"], memory.block):
        x, dy, ddx = (_load(memory, array, block) for array in data)
        w, ddweight, ddbias = (_load(memory, array, block) for array in params)
        w = 1.0 if w is None else w + weight_offset
        statistics = _load(memory, mean, block), _load(memory, rstd, block)
        *found, terms = _of_block(memory, x, *statistics, dy, w, ddx, ddweight, ddbias, frozen)
        for place, values in zip(places, found, strict=True):
            memory.put(_part(place, block), values)
        if sums is not None and terms is not None:
            part = _part(sums, block)
            shared = tuple(axis for axis in range(part.ndim) if part.shape[axis] == 1)
            so_far = memory.array_of(part)
            so_far += terms.sum(axis=shared, keepdims=True) if shared else terms
