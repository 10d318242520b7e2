"""The table of operations, for libraries that record gradients: how the core calls them, and as what they lie in x.

An operation has three phases: forward, backward and double_backward. `composed` is the forward in a library's own
words, for derivatives that the core does not have.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import functional as core


class Operation(NamedTuple):
    """How the core calls an operation and its options."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    double_backward: Callable[..., Any]
    axes: str = "axis"  # the option that says which axes
    learns: str = ""  # the option that is false where statistics are constants, of operations that can keep them
    fixed: dict[str, Any] = {}  # options that make a named operation of a general one  # noqa: RUF012 - never changed
    in_float32: bool = False  # under autocast on CUDA, as PyTorch's


def _named(name: str, **row: Any) -> Operation:
    forward, backward, double = (getattr(core, f"{name}{phase}") for phase in ("", "_backward", "_double_backward"))
    return Operation(forward, backward, double, **row)


OPERATIONS = {
    "instance": _named("instance_norm", axes="channel_axis", learns="use_input_stats"),
    "group": _named("group_norm", axes="channel_axis", in_float32=True),
    "layer": _named("layer_norm", in_float32=True),
    "rms": _named("rms_norm", in_float32=True),
    "batch": _named("batch_norm", axes="channel_axis", learns="training"),
    # Any of the above on an array with more axes, which is how they are under vmap.
    "centered": _named("normalize", fixed={"center": True}),
    "uncentered": _named("normalize", fixed={"center": False}),
}


class Spec(NamedTuple):
    """All of a call that is no tensor, in the order in which operators take it."""

    kind: str  # a key of OPERATIONS
    axes: tuple[int, ...]  # the normalized ones, or the one of the channels
    groups: int = 1
    frozen: bool = False  # the statistics are constants
    eps: float | None = None  # None: that of the dtype, for rms
    momentum: float = 0.0
    weight_offset: float = 0.0
    activation: str = ""  # "" where there is none
    slope: float | None = None  # the parameter of an activation that has a number

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.kind]

    @property
    def is_centered(self) -> bool:
        return self.kind not in ("rms", "uncentered")


# ---- options of the core -----------------------------------------------------------------------------------------


@lru_cache(1024)
def call_of(spec: Spec, phase: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a phase, and its options but for those that depend on tensors.

    They are always the same objects, by which the core knows calls again.
    """
    row = spec.operation
    options: dict[str, Any] = {row.axes: spec.axes if row.axes == "axis" else spec.axes[0], **row.fixed}
    if spec.kind == "group":
        options["num_groups"] = spec.groups
    if spec.weight_offset:
        options["weight_offset"] = spec.weight_offset
    if phase == "forward":
        options["eps"] = spec.eps
        if row.learns:
            options |= {row.learns: not spec.frozen, "momentum": spec.momentum}
    elif spec.frozen:
        options[row.learns or "use_input_stats"] = False
    has_slopes = spec.activation == "prelu" and spec.slope is None  # a tensor
    if spec.activation and not has_slopes:
        options["activation"] = spec.activation if spec.slope is None else (spec.activation, spec.slope)
    return getattr(row, phase), options


GRADIENTS = ("dx", "dweight", "dbias", "dslopes")
Need: TypeAlias = tuple[bool, bool, bool, bool]


@lru_cache
def named_gradients(need: Need) -> tuple[str, ...]:
    """The core knows calls again by their objects, so it is always the same tuple."""
    return tuple(name for name, is_needed in zip(GRADIENTS, need, strict=True) if is_needed)


# ---- what is judged before there are values ----------------------------------------------------------------------


@lru_cache
def _element(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    return np.zeros(1, dtype)


def stand_in(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """An array that lies like one of this shape and dtype, whose memory is not there and must not be looked at."""
    strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return as_strided(_element(dtype), tuple(shape), strides, writeable=True)


# ---- axes --------------------------------------------------------------------------------------------------------


def axes_of(x: Any, axis: int | Iterable[int] | None) -> tuple[int, ...]:
    """The axes that an option `axis` stands for."""
    if axis is None:
        return tuple(range(x.ndim))
    return (int(axis),) if isinstance(axis, int | np.integer) else tuple(axis)


class Frame:
    """How an operation lies in the axes of x, counted from the end, so that more axes in front change nothing.

    Every operation is `normalize` on a view of x: that of group norm has the groups and their channels as two axes.
    """

    def __init__(self, spec: Spec, shape: Sequence[int]) -> None:
        self.spec, self.shape, ndim = spec, tuple(shape), len(shape)
        named = sorted(axis % ndim for axis in spec.axes)
        self.of_channels = spec.operation.axes == "channel_axis"
        if self.of_channels:
            kept = named if spec.kind == "batch" else [0, *named]
        else:
            kept = [axis for axis in range(ndim) if axis not in named]
        self.kept = kept
        reduced = [axis for axis in range(ndim) if axis not in kept]
        self.split = named[0] if spec.kind == "group" else -1  # the axis that becomes two
        self.axes = tuple(axis - ndim - (axis < self.split) for axis in reduced)
        if self.split >= 0:
            self.axes = (*self.axes, self.split - ndim)
        # Axes that a parameter may have alone, without those that broadcasting wants.
        self.forms = [[named[-1]], [0, named[-1]]] if self.of_channels else [named]

    def data(self, array: Any) -> Any:
        """A view of an array that has the shape of x, or more axes in front."""
        if self.split < 0:
            return array
        shape, at = tuple(array.shape), self.split - len(self.shape)
        groups = self.spec.groups
        return array.reshape((*shape[:at], groups, shape[at] // groups, *shape[len(shape) + at + 1 :]))

    def back(self, array: Any) -> Any:
        """The array that has this view."""
        if self.split < 0:
            return array
        shape, at = tuple(array.shape), self.split - len(self.shape)
        return array.reshape((*shape[: at - 1], shape[at - 1] * shape[at], *shape[len(shape) + at + 1 :]))

    def param_shape(self, shape: Sequence[int]) -> list[int]:
        """The shape with which a parameter broadcasts against the view."""
        ndim = len(self.shape)
        along: Sequence[int] = range(ndim - len(shape), ndim)
        for form in self.forms:
            if tuple(shape) == tuple(self.shape[axis] for axis in form):
                along = form
        extents = dict(zip(along, shape, strict=True))
        aligned = [extents.get(axis, 1) for axis in range(ndim)]
        if self.split >= 0:
            groups = self.spec.groups if aligned[self.split] > 1 else 1
            aligned[self.split : self.split + 1] = [groups, aligned[self.split] // groups]
        return aligned

    def statistics_shape(self) -> list[int]:
        return [self.spec.groups if axis == self.split else self.shape[axis] for axis in self.kept]

    def absent_shape(self) -> list[int]:
        """The shape of the gradient of a parameter that is not there."""
        return [self.shape[axis] for axis in self.forms[0]]

    def general(self, eps: float) -> Spec:
        """The operation on the view. `eps`: what stands for None."""
        kind = "centered" if self.spec.is_centered else "uncentered"
        eps = eps if self.spec.eps is None else self.spec.eps
        return self.spec._replace(kind=kind, axes=self.axes, groups=1, eps=eps)


def aligned(statistics: Any, axes: Sequence[int], shape: Sequence[int]) -> Any:
    """Statistics over these axes, counted from the end, as they broadcast against an array of this shape."""
    return statistics.reshape([1 if k - len(shape) in axes else extent for k, extent in enumerate(shape)])


# ---- statistics, in any library's words ----------------------------------------------------------------------------


def rstd_of(xp: Any, var: Any, count: Any) -> Any:
    """1 / sqrt(var), where `var` has eps in it; 0, as its gradients are, where there is nothing to divide by."""
    is_there = (var > 0) & (count > 0)
    return xp.where(is_there, 1 / xp.sqrt(xp.where(is_there, var, 1)), 0)


def learnt(xp: Any, old: Any, found: Any, count: Any, momentum: float) -> Any:
    """A running statistic after those of all images, which lie along a first axis, with their numbers of members.

    It moves towards the average of those that have two members or more, as an unbiased variance has to.
    """
    counts = count >= 2
    images = counts.sum(0)
    average = xp.where(counts, found, 0).sum(0) / images.clip(1)
    return xp.where(images > 0, (1 - momentum) * old + momentum * average, old)


# ---- what has no say, in any library's words ---------------------------------------------------------------------


def heard(xp: Any, x: Any, dy: Any, where: Any) -> tuple[Any, Callable[[Any], Any]]:
    """x with 0 for what is not finite of elements that are no members and that no gradient reaches, and what puts NaN
    there into d_dy, which alone depends on them."""
    if where is None:
        return x, lambda d_dy: d_dy
    is_heard = where | (dy != 0) | xp.isfinite(x)
    return xp.where(is_heard, x, 0), lambda d_dy: xp.where(is_heard, d_dy, math.nan)


# ---- the forward in a library's own words ------------------------------------------------------------------------


class Words(NamedTuple):
    """What `composed` says in a library's own words."""

    namespace: Any  # with sum, where, clip, sqrt and ones_like, which take what NumPy's take
    wide: Callable[[Any], Any]  # an array in the dtype to compute in
    broadcast: Callable[[Any, tuple[int, ...]], Any]
    activations: dict[str, Callable[..., Any]]


def composed(words: Words, spec: Spec, given: dict[str, Any], constants: dict[str, Any], eps: float) -> Any:
    """The forward, which the library can differentiate again and again.

    `given`: x, and of weight, bias and slopes those that are there. `constants`: the mask, and statistics where the
    call is frozen. `eps`: what stands for None.
    """
    x, wide = given["x"], words.wide
    frame = Frame(spec, x.shape)
    data = wide(frame.data(x))

    def param(name: str) -> Any:
        array = given[name]
        return wide(array.reshape(frame.param_shape(array.shape)))

    if spec.frozen:
        if constants.get("mean") is not None:
            data = data - wide(aligned(constants["mean"], frame.axes, data.shape))
        y = data * wide(aligned(constants["rstd"], frame.axes, data.shape))
    else:
        where = constants.get("where")
        mask = None if where is None else frame.data(words.broadcast(where, tuple(x.shape)))
        y = _normalized(words.namespace, data, mask, frame, eps if spec.eps is None else spec.eps)
    if "weight" in given:
        y = y * (param("weight") + spec.weight_offset)
    if "bias" in given:
        y = y + param("bias")
    return frame.back(_activated(words, spec, y, param("slopes") if "slopes" in given else None))


def activated(words: Words, spec: Spec, z: Any, slopes: Any) -> Any:
    """What the activation makes of a normalized array, in its dtype."""
    frame = Frame(spec, z.shape)
    slopes = None if slopes is None else slopes.reshape(frame.param_shape(slopes.shape))
    return frame.back(_activated(words, spec, frame.data(z), slopes))


def _activated(words: Words, spec: Spec, data: Any, slopes: Any) -> Any:
    if not spec.activation:
        return data
    parameters = [slopes] if slopes is not None else [] if spec.slope is None else [spec.slope]
    return words.activations[spec.activation](data, *parameters)


def _normalized(xp: Any, data: Any, mask: Any, frame: Frame, eps: float) -> Any:
    def members(array: Any) -> Any:
        return xp.sum(array if mask is None else xp.where(mask, array, 0), axis=frame.axes, keepdims=True)

    counted = members(xp.ones_like(data))
    count = xp.clip(counted, 1)
    for _ in range(2 * frame.spec.is_centered):  # the mean is rounded: the second one is that of what is left
        data = data - members(data) / count
    return data * rstd_of(xp, members(data**2) / count + eps, counted)
