"""The gradient of a backward: what a gradient penalty needs.

Arrays are seen with their kept axes first and their normalized axes last, whatever normalization it is, and a block of
statistics at a time: its intermediate results are float64 and stay in cache, or take a bounded part of a GPU's memory.
"""

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ._compiled import body, compiled
from ._memory import Memory, dtype_name, views_or_numbers

_LINE = 64  # bytes
Block: TypeAlias = tuple[slice, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def double_backward(kind: str, backward: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """A function with the signature of the one that it decorates, for the gradient of `backward`."""

    def decorated(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            function(*args, **options)  # refuses what is no argument, as Python does
            given = signature.bind(*args, **options)
            given.apply_defaults()
            return _double_backward(kind, backward, **given.arguments)

        result: Any = call
        return result  # type: ignore[no-any-return]

    return decorated


@compiled("moments", "normalize")
def _moments(x: Any, *, axis: int) -> Any:
    """Mean, m2 and count of each statistic, and their memory."""
    body()


@compiled("backward", "normalize")
def _backward(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, *, axis: int, center: bool,
    use_input_stats: bool, need: Any,
) -> Any:  # fmt: skip
    """The gradient of rows."""
    body()


# ---- views -------------------------------------------------------------------------------------------------------


def _from_first(axes: Any, ndim: int) -> list[int]:
    """Axes, in any of the ways that calls take them, as numbers from 0 to ndim - 1."""
    if axes is None:
        return list(range(ndim))
    try:
        return [operator.index(axes) % ndim]
    except TypeError:  # there are several
        return [operator.index(axis) % ndim for axis in axes]


class _Frame:
    """Moves the axes of x: the axes that are kept come first, the normalized ones last. All that it makes are views."""

    def __init__(self, memory: Memory, kind: str, axes: Any, num_groups: int, x: Any) -> None:
        self.memory, self.shape, ndim = memory, tuple(x.shape), x.ndim
        self.channels: list[int] = []  # the axes that (C,) and (N, C) lie along, where weights belong to channels
        self.by_extents = kind == "layer"  # weights have the normalized axes alone
        self.channel, self.groups = -1, 1  # the axis that is two to a statistic: groups, channels of a group
        named = _from_first(axes, ndim)
        if kind in ("instance", "group"):
            kept = self.channels = [0, *named]
        elif kind == "batch":
            kept = self.channels = named
        else:
            kept = [axis for axis in range(ndim) if axis not in named]
        self.reduced = [axis for axis in range(ndim) if axis not in kept]
        if kind == "group":
            self.channel, self.groups = self.channels[1], num_groups
            # The channels of a group stand behind the groups, and are normalized.
            moved = [axis + (axis > self.channel) for axis in range(ndim)]
            self.order = [moved[a] for a in kept] + sorted([*(moved[a] for a in self.reduced), self.channel + 1])
        else:
            self.order = kept + self.reduced
        seen = tuple(self.data(x).shape)
        self.kept, self.members = seen[: len(kept)], math.prod(seen[len(kept) :])
        self.statistics_shape = self.kept + (1,) * (len(seen) - len(kept))

    def data(self, array: Any) -> Any:
        """An array with the axes of x, some of them perhaps of extent 1."""
        shape = tuple(array.shape)
        if self.channel >= 0:
            groups = self.groups if shape[self.channel] > 1 else 1
            split = groups, shape[self.channel] // groups
            array = array.reshape(*shape[: self.channel], *split, *shape[self.channel + 1 :])
        return self.memory.transposed(array, self.order)

    def statistics(self, array: Any) -> Any:
        if not getattr(array, "shape", ()):  # one for all: a number or an array without axes
            one, array = array, self.memory.empty(self.kept, "float64")
            self.memory.copy(array, one)
        return array[(..., *(None for _ in self.statistics_shape[len(self.kept) :]))]

    def absent(self) -> tuple[int, ...]:
        """The shape of the gradient of a weight that is not there."""
        return tuple(self.shape[axis] for axis in self.channels[-1:] or self.reduced)

    def param(self, array: Any, *, like_absent: bool) -> Any:
        """A weight, or an array of its shape, with the axes of x; `like_absent`: there is no weight."""
        ndim, shape = len(self.shape), tuple(array.shape)
        along: Sequence[int] = range(ndim - len(shape), ndim)  # as broadcasting has it
        forms = (
            [self.channels[-1:], self.channels] if self.channels else [self.reduced] * (self.by_extents or like_absent)
        )
        for form in forms:
            if shape == tuple(self.shape[axis] for axis in form):
                along = form
        extents = dict(zip(along, shape, strict=True))
        return self.data(array.reshape([extents.get(axis, 1) for axis in range(ndim)]))

    def blocks(self, x: Any, elements: int) -> Iterator[Block]:
        """Blocks of whole statistics, each of about `elements` elements."""
        # Where neighbors in memory belong to different statistics, a block of few would read every line many times.
        last = self.memory.strides(self.data(x))[: len(self.kept)][-1:]
        least = _LINE // last[0] if last and 0 < last[0] <= 8 else 1
        rows = max(least, elements // self.members)
        steps = []
        for extent in reversed(self.kept):
            steps.append(min(extent, rows))
            rows //= extent
            rows = max(rows, 1)
        starts = (range(0, extent, step) for extent, step in zip(self.kept, reversed(steps), strict=True))
        for at in itertools.product(*starts):
            yield tuple(slice(start, start + step) for start, step in zip(at, reversed(steps), strict=True))


def _part(array: Any, block: Block) -> Any:
    """The part of a view that belongs to a block: all of it along axes where the view does not vary."""
    return array[tuple(slice(None) if extent == 1 else cut for cut, extent in zip(block, array.shape, strict=False))]


def _load(memory: Memory, array: Any, block: Block) -> Any:
    return None if array is None else memory.wide(_part(array, block), "float64")


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
        """The average over the members, by the core, whose sums do not depend on how many rows there are."""
        return _moments(u.reshape(rows, members), axis=1)[0][..., 0].reshape(rstd.shape)

    def constant(shape: tuple[int, ...], value: float) -> Any:
        filled = memory.empty(shape, "float64")
        memory.copy(filled, value)
        return filled

    if mean is not None:
        x = x - mean
        if not frozen:
            x = x - average(x)  # a mean is rounded: the rest of it is in the data
    x_hat = x * rstd
    # About zero from here on: a mean far from it would round once more.
    zero = None if mean is None else constant((rows,), 0.0)
    data = x.reshape(rows, members), zero, rstd.reshape(rows), constant((rows, 1), 1.0)
    options: dict[str, Any] = {
        "axis": 1,
        "center": mean is not None,
        "use_input_stats": not frozen,
        "need": ("dx", "dweight"),
    }

    def projected(u: Any) -> tuple[Any, Any]:
        """rp(u) and the mean of u * x_hat."""
        rp, sums, _ = _backward(u.reshape(rows, members), *data, **options)
        return rp.reshape(x.shape), sums.reshape(rstd.shape) / members

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


def _check_dtype(name: str, array: Any, x: Any, *, wide: bool) -> None:
    """Refuses an array of another dtype than x. `wide`: float32 and float64 are taken, whatever x is."""
    if not getattr(array.dtype, "isnative", True):
        raise TypeError(f"{name} has dtype {array.dtype.str}, expected native byte order")
    found, like = dtype_name(array.dtype), dtype_name(x.dtype)
    dtypes = ["float32", "float64"] if wide else []
    only_wide = like in dtypes
    if found in dtypes or (found == like and not only_wide):
        return
    expected = "float32 or float64" if only_wide else f"{'float32, float64 or ' * wide}{like}, the dtype of x"
    raise TypeError(f"{name} has dtype {found}, expected {expected}")


def _check_shape(name: str, array: Any, shape: tuple[int, ...], whose: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {shape}: the shape of {whose}")


def _double_backward(
    kind: str, backward: Callable[..., Any], ddx: Any, ddweight: Any, ddbias: Any, dy: Any, x: Any, rstd: Any,
    weight: Any, weight_offset: float, mean: Any = None, num_groups: int = 1, **options: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(d_dy, d_x, d_weight) of any normalization, for any library and layout. `options` are those of its backward."""
    if ddx is None and ddweight is None and ddbias is None:
        raise ValueError("ddx, ddweight and ddbias are None, expected an array for at least one of them")
    if isinstance(options.get("axis"), Iterator):
        options["axis"] = tuple(options["axis"])  # read more than once
    v, memory = views_or_numbers(
        "mean", "rstd", x=x, dy=dy, mean=mean, rstd=rstd, weight=weight, ddx=ddx, ddweight=ddweight, ddbias=ddbias
    )
    given = {name: v[name] for name in ("dy", "x", "mean", "rstd", "weight")} | options
    if kind == "group":
        given["num_groups"] = num_groups
    if "mean" not in inspect.signature(backward).parameters:
        del given["mean"]
    if not options.get("center", True):
        v["mean"] = None  # whatever was passed for it
    x, weight = v["x"], v["weight"]
    with memory:
        backward(**given, need=(), weight_offset=weight_offset)  # judges what it takes
        frame = _Frame(memory, kind, options.get("channel_axis", options.get("axis")), operator.index(num_groups), x)
        own = frame.absent() if weight is None else tuple(weight.shape)
        whose = "dweight" if weight is None else "weight"
        for name, wanted, of in (("ddx", frame.shape, "x"), ("ddweight", own, whose), ("ddbias", own, whose)):
            if v[name] is not None:
                _check_dtype(name, v[name], x, wide=name != "ddx")
                _check_shape(name, v[name], wanted, of)

        d_dy, d_x, d_weight, total = memory.empty_like(x), memory.empty_like(x), None, None
        if weight is not None:
            total, d_weight = memory.empty(own, "float64"), memory.empty(own, dtype_name(weight.dtype))
            memory.copy(total, 0.0)
        with np.errstate(all="ignore"):  # NaN, infinity and what overflows go where they belong, as in the backward
            if math.prod(frame.shape):
                frozen = not options.get("use_input_stats", options.get("training", True))
                _over_blocks(memory, frame, v, float(weight_offset), frozen, (d_dy, d_x), total)
            if d_weight is not None:
                memory.copy(d_weight, total)
        return memory.give_back(d_dy), memory.give_back(d_x), memory.give_back(d_weight)


def _over_blocks(
    memory: Memory, frame: _Frame, v: dict[str, Any], weight_offset: float, frozen: bool,
    outputs: tuple[Any, Any], total: Any,
) -> None:  # fmt: skip
    """Fills the outputs, and adds d_weight up in `total`."""

    def see(name: str, view: Callable[..., Any], **options: bool) -> Any:
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
            memory.copy(_part(place, block), values)
        if sums is not None and terms is not None:
            part = _part(sums, block)
            shared = tuple(axis for axis in range(part.ndim) if part.shape[axis] == 1)
            part += terms.sum(axis=shared, keepdims=True) if shared else terms
