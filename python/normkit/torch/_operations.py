"""The table of operations, and what each phase of them is on tensors: calls of the core on memory that both share.

An operation has three phases: forward, backward and double_backward. Here they take and give tensors and know nothing
of autograd. `functions.py` calls them where tensors hold values, `_operators.py` makes operators of them.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - everybody's name for it

from .. import functional as core
from .._memory import _core

Optional: TypeAlias = Tensor | None


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
    groups: int
    frozen: bool  # the statistics are constants
    eps: float | None  # None: that of the dtype, for rms
    momentum: float
    weight_offset: float
    activation: str  # "" where there is none
    slope: float | None  # the parameter of an activation that has a number

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.kind]

    @property
    def is_centered(self) -> bool:
        return self.kind not in ("rms", "uncentered")


SPEC_SCHEMA = (
    "str kind, int[] axes, int groups, bool frozen, float? eps, float momentum, float weight_offset, str activation, "
    "float? slope"
)


# ---- options of the core -----------------------------------------------------------------------------------------


@lru_cache(1024)
def _call(spec: Spec, phase: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a phase, and its options but for those that depend on tensors.

    They are always the same objects, by which the core knows calls again.
    """
    row = spec.operation
    options: dict[str, Any] = {row.axes: spec.axes if row.axes == "axis" else spec.axes[0], **row.fixed}
    if spec.weight_offset:
        options["weight_offset"] = spec.weight_offset
    if phase == "forward":
        options["eps"] = spec.eps
        if row.learns:
            options |= {row.learns: not spec.frozen, "momentum": spec.momentum}
    elif spec.frozen:
        options[row.learns or "use_input_stats"] = False
    has_slopes = spec.activation == "prelu" and spec.slope is None  # a tensor
    if phase != "double_backward" and spec.activation and not has_slopes:
        options["activation"] = spec.activation if spec.slope is None else (spec.activation, spec.slope)
    return getattr(row, phase), options


# ---- memory ------------------------------------------------------------------------------------------------------


def _arrays(*tensors: Any) -> list[Any]:
    """The tensors as the core takes them fastest: as NumPy arrays over their memory, where that is the CPU's."""
    found: list[Any] | None = _core.of_tensors(Tensor, *tensors)
    if found is None:  # a call with tensors of a GPU, or with some of which the core has to say what is wrong
        return [t if t is None else t.detach() for t in tensors]
    return found


def _tensor(array: Any) -> Any:
    return _core.to_tensor(Tensor, array) if type(array) is np.ndarray else array


# ---- phases ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor, weight: Optional, bias: Optional, residual: Optional, where: Optional, slopes: Optional,
    running_mean: Optional, running_var: Optional, spec: Spec, *, with_stats: bool, with_total: bool,
) -> tuple[Tensor, Optional, Optional, Optional]:  # fmt: skip
    """(y, mean, rstd, x + residual). Running statistics are updated in place."""
    function, options = _call(spec, "forward")
    x_, weight_, bias_, residual_, where_, slopes_, mean_, var_ = _arrays(
        x, weight, bias, residual, where, slopes, running_mean, running_var
    )
    groups = (spec.groups,) if spec.kind == "group" else ()
    more: dict[str, Any] = {}
    if where is not None:
        more["where"] = where_
    if slopes is not None:
        more["activation"] = ("prelu", slopes_)
    if residual is not None:
        more |= {"residual": residual_, "return_residual": with_total}
    if running_mean is not None or running_var is not None:
        more |= {"running_mean": mean_, "running_var": var_}
    found = function(x_, *groups, weight_, bias_, return_stats=with_stats, **options, **more)
    if not spec.frozen and (running_mean is not None or running_var is not None):
        torch.autograd.graph.increment_version([r for r in (running_mean, running_var) if r is not None])
    if not isinstance(found, tuple):
        return _tensor(found), None, None, None
    y, *others = map(_tensor, found)
    total = others.pop() if with_total and residual is not None else None
    rstd = others.pop() if with_stats else None
    return y, others.pop() if others else None, rstd, total


GRADIENTS = ("dx", "dweight", "dbias", "dslopes")
Need: TypeAlias = tuple[bool, bool, bool, bool]


@lru_cache
def _named_gradients(need: Need) -> tuple[str, ...]:
    """The core knows calls again by their objects, so it is always the same tuple."""
    return tuple(name for name, is_needed in zip(GRADIENTS, need, strict=True) if is_needed)


def backward(
    dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor, weight: Optional, bias: Optional, where: Optional,
    slopes: Optional, dtotal: Optional, spec: Spec, need: Need,
) -> list[Optional]:  # fmt: skip
    """[dx, dweight, dbias, dslopes], None for what is not needed."""
    function, options = _call(spec, "backward")
    dy_, x_, mean_, rstd_, weight_, bias_, where_, slopes_, dtotal_ = _arrays(
        dy, x, mean, rstd, weight, bias, where, slopes, dtotal
    )
    groups = (spec.groups,) if spec.kind == "group" else ()
    statistics = (rstd_,) if spec.kind == "rms" else (mean_, rstd_)
    more = {"where": where_} if where is not None else {}
    if bias is not None:
        more["bias"] = bias_
    if dtotal is not None:
        more["dresidual"] = dtotal_
    if slopes is not None:
        more["activation"] = ("prelu", slopes_)
    found = function(dy_, x_, *groups, *statistics, weight_, need=_named_gradients(need), **options, **more)
    gradients = [_tensor(array) for array in found]
    return gradients if need[3] else [*gradients, None]


def double_backward(
    ddx: Optional, ddweight: Optional, ddbias: Optional, dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor,
    weight: Optional, spec: Spec,
) -> list[Optional]:  # fmt: skip
    """[d_dy, d_x, d_weight] of a call without a mask and without an activation."""
    function, options = _call(spec, "double_backward")
    dy_, x_, mean_, rstd_, weight_, *second = _arrays(dy, x, mean, rstd, weight, ddx, ddweight, ddbias)
    groups = (spec.groups,) if spec.kind == "group" else ()
    statistics = (rstd_,) if spec.kind == "rms" else (mean_, rstd_)
    found = function(*second, dy_, x_, *groups, *statistics, weight_, **options)
    return [_tensor(array) for array in found]


def deviation(style: Tensor, channel_axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(var + eps) and the mean of each channel of each image, in float64."""
    (array,) = _arrays(style)
    moments = core._moments_of_style(array, channel_axis)
    return _tensor(moments._deviation(eps)), _tensor(moments.mean)


# ---- the same in PyTorch's words ---------------------------------------------------------------------------------


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

    def data(self, tensor: Tensor) -> Tensor:
        """A view of a tensor that has the shape of x, or more axes in front."""
        if self.split < 0:
            return tensor
        return tensor.unflatten(self.split - len(self.shape), (self.spec.groups, -1))

    def back(self, tensor: Tensor) -> Tensor:
        """The tensor that has this view."""
        at = self.split - len(self.shape)
        return tensor if self.split < 0 else tensor.flatten(at - 1, at)

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

    def general(self, x: Tensor) -> Spec:
        """The operation on the view."""
        kind = "centered" if self.spec.is_centered else "uncentered"
        eps = eps_of(x) if self.spec.eps is None else self.spec.eps
        return self.spec._replace(kind=kind, axes=self.axes, groups=1, eps=eps)


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "softplus": lambda y: F.softplus(y, threshold=40),  # beyond that float64 does not tell it from y
    "prelu": lambda y, slopes: torch.where(y > 0, y, slopes * y),
}


def eps_of(x: Tensor) -> float:
    """What rms norm adds where it is not told: PyTorch's choice too."""
    return float(torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps)


def composed(
    x: Tensor, weight: Optional, bias: Optional, where: Optional, slopes: Optional, mean: Optional, rstd: Optional,
    spec: Spec,
) -> Tensor:  # fmt: skip
    """The forward in float64 and in PyTorch's own operations, which can be differentiated again and again."""
    frame = Frame(spec, x.shape)
    data = frame.data(x).double()
    if spec.frozen:
        seen = [1 if axis - data.ndim in frame.axes else extent for axis, extent in enumerate(data.shape)]
        mean, rstd = (None if s is None else s.double().reshape(seen) for s in (mean, rstd))
    else:
        mask = None if where is None else frame.data(where.expand(x.shape))
        mean, rstd = _statistics(data, mask, frame, eps_of(x) if spec.eps is None else spec.eps)
    y = (data if mean is None else data - mean) * rstd
    if weight is not None:
        y = y * (weight.reshape(frame.param_shape(weight.shape)).double() + spec.weight_offset)
    if bias is not None:
        y = y + bias.reshape(frame.param_shape(bias.shape)).double()
    if spec.activation:
        parameters = [] if spec.slope is None else [spec.slope]
        if slopes is not None:
            shape = frame.param_shape(slopes.shape) if slopes.numel() > 1 else ()
            parameters = [slopes.reshape(shape).double()]
        y = _ACTIVATIONS[spec.activation](y, *parameters)
    return frame.back(y)


def _statistics(data: Tensor, mask: Optional, frame: Frame, eps: float) -> tuple[Optional, Tensor]:
    axes = frame.axes
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=data.device).expand(data.shape)
    members = mask.sum(axes, keepdim=True)
    count = members.clamp(min=1)
    mean = None
    if frame.spec.is_centered:
        mean = torch.where(mask, data, 0.0).sum(axes, keepdim=True) / count
        data = data - mean
    var = (torch.where(mask, data, 0.0) ** 2).sum(axes, keepdim=True) / count + eps
    is_there = (var > 0) & (members > 0)  # else rstd is 0, and so are its gradients
    return mean, torch.where(is_there, torch.where(is_there, var, 1.0).rsqrt(), 0.0)


def second_gradients(
    seconds: Sequence[Optional], dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor, weight: Optional, bias: Optional,
    where: Optional, slopes: Optional, spec: Spec,
) -> list[Optional]:  # fmt: skip
    """[d_dy, d_x, d_weight, d_bias, d_slopes] of any call, by PyTorch: `seconds` are the gradients of a scalar with
    respect to dx, dweight, dbias and dslopes."""
    if bias is None and seconds[2] is not None:  # one of the shape of weight, on which nothing depends
        bias = torch.zeros_like(weight)
    given = [x, weight, bias, slopes]
    present = [k for k, tensor in enumerate(given) if tensor is not None]

    def gradients(dy: Tensor, *operands: Tensor) -> Any:
        def y(*operands: Tensor) -> Tensor:
            named = dict(zip(present, operands, strict=True))
            return composed(named[0], named.get(1), named.get(2), where, named.get(3), mean, rstd, spec)

        return torch.func.vjp(y, *operands)[1](dy.double())

    found, pull = torch.func.vjp(gradients, dy, *(given[k] for k in present))
    cotangents = []
    for k, gradient in zip(present, found, strict=True):
        second = seconds[k]
        cotangents.append(torch.zeros_like(gradient) if second is None else second.to(gradient.dtype))
    d_dy, *others = pull(tuple(cotangents))
    by_operand = dict(zip(present, others, strict=True))
    return [d_dy, *(by_operand.get(k) for k in range(4))]
