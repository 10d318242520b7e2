"""The normalizations of normkit on tensors that require grad, differentiable twice.

They take what the functions of the same names in `normkit` take, in the same order. PyTorch's own have their running
statistics before the weights, and layer norm the normalized shape: here these are options.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import functional as core
from .._operations import OPERATIONS, Spec, axes_of
from .._types import Activation
from . import _operations as phases
from ._operations import Optional
from ._operators import (
    call,
    gradients_of_backward,
    gradients_of_deviation,
    gradients_of_forward,
    is_transforming,
    refuse_third,
    save_backward,
    save_deviation,
    save_forward,
)

__all__ = ["adaptive_instance_norm", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_is_dispatching, _is_traced = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)))


# ---- autograd ----------------------------------------------------------------------------------------------------


class _Forward(torch.autograd.Function):
    """A forward whose tensors hold values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Optional, bias: Optional, residual: Optional, where: Optional, slopes: Optional,
        running_mean: Optional, running_var: Optional, spec: Spec,
    ) -> Any:  # fmt: skip
        y, mean, rstd, total = phases.forward(
            x, weight, bias, residual, where, slopes, running_mean, running_var, spec, with_stats=True,
            with_total=residual is not None,
        )  # fmt: skip
        save_forward(ctx, x if residual is None else total, weight, bias, where, slopes, mean, rstd, spec)
        return y if residual is None else (y, total)  # gradients of gradients go through what is saved

    @staticmethod
    def backward(ctx: Any, dy: Any, dtotal: Any = None) -> Any:
        call = _Backward.apply if torch.is_grad_enabled() else phases.backward
        return *gradients_of_forward(ctx, dy, dtotal, call), None, None, None


# Function.apply without what it does for torch.func, whose transforms do not come here.
_apply = super(torch.autograd.Function, _Forward).apply


class _Backward(torch.autograd.Function):
    """A backward that is differentiated in turn."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *tensors, spec, _ = args
        save_backward(ctx, *tensors[:-1], spec)
        return tuple(phases.backward(*args))

    @staticmethod
    def backward(ctx: Any, *seconds: Any) -> Any:
        call = _DoubleBackward.apply if torch.is_grad_enabled() else phases.double_backward
        return *gradients_of_backward(ctx, seconds, call), None, None


class _DoubleBackward(torch.autograd.Function):
    """The last derivative that there is."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return tuple(phases.double_backward(*args))

    backward = staticmethod(refuse_third)


class _Deviation(torch.autograd.Function):
    """sqrt(var + eps) and the mean of a style."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        save_deviation(ctx, args, None)
        return phases.deviation(*args)

    backward = staticmethod(gradients_of_deviation)


# ---- calls -------------------------------------------------------------------------------------------------------


def _is_meta(x: Any) -> bool:
    """True for a tensor of a shape and a dtype alone."""
    return getattr(x, "is_meta", False)


def _hold_values(tensors: Sequence[Optional]) -> bool:
    """True where a call may read memory; else there is none, or somebody looks on who is told of operators."""
    return _PLAIN.issuperset(map(type, tensors)) and not (
        is_compiling() or is_transforming() or _is_dispatching() or _is_traced() or _is_meta(tensors[0])
    )


def _check(tensors: tuple[Any, ...]) -> None:
    """Refuses what is neither a tensor nor stands for one."""
    for name, tensor in zip(("x", "weight", "bias", "residual", "where"), tensors, strict=False):
        if tensor is not None and not isinstance(tensor, Tensor) and not hasattr(tensor, "__torch_function__"):
            raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")


def _records(*tensors: Optional) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    level: int = forward_ad._current_level
    return level >= 0


def _float32(tensor: Optional) -> Optional:
    if tensor is None or tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    return tensor.float()


def _constant(running: Optional) -> Optional:
    """A running statistic, which is a constant to gradients, whether it requires one or not."""
    return running if running is None or not running.requires_grad else running.detach()


def _call(
    x: Tensor, weight: Optional, bias: Optional, spec: Spec, process_group: Any, where: Any, residual: Optional,
    return_residual: bool, slopes: Optional, running_mean: Optional = None, running_var: Optional = None,
) -> Any:  # fmt: skip
    if getattr(x, "is_cuda", False) and OPERATIONS[spec.kind].in_float32 and torch.is_autocast_enabled("cuda"):
        x, weight, bias, residual = map(_float32, (x, weight, bias, residual))
    if isinstance(where, bool):
        where = None if where else torch.zeros((), dtype=torch.bool, device=x.device)
    if return_residual and residual is None:
        raise ValueError("residual is None, expected a tensor like x: return_residual is True")
    if process_group is not None and not spec.frozen and not _is_meta(x):
        from ..distributed._torch import normalized

        _check((x, weight, bias, residual, where))
        phases.judge_forward(x, weight, bias, residual, where, slopes, None, None, spec)
        learnt = (_constant(running_mean), _constant(running_var))
        if running_mean is not None or running_var is not None:  # which may learn from a whole whose part is one member
            phases.judge_forward(x, None, None, None, None, None, *learnt, spec._replace(frozen=True))
            first, second = (getattr(running, "data_ptr", None) for running in learnt)
            if first and second and first() == second():
                raise ValueError("running_mean overlaps running_var, expected memory apart")
        total = x if residual is None else x + residual
        y = normalized(total, weight, bias, spec, where, slopes, *learnt, process_group)
        return (y, total) if return_residual else y
    tensors = (x, weight, bias, residual, where, slopes, running_mean, running_var)
    if not _hold_values(tensors):
        _check(tensors)
        if _is_meta(x) and not is_compiling():  # the operator judges where there are values
            phases.judge_forward(*tensors, spec)
        y, _, _, total, *learnt = call("forward", *tensors, *spec)
        if not spec.frozen:
            for running, new in zip((running_mean, running_var), learnt, strict=True):
                if running is not None:
                    running.copy_(new)
        return (y, total) if return_residual else y
    if running_mean is not None or running_var is not None:
        tensors = (*tensors[:6], _constant(running_mean), _constant(running_var))
    if _records(x, weight, bias, residual, slopes):
        found = _apply(*tensors, spec)
        return found if residual is None or return_residual else found[0]
    y, _, _, total = phases.forward(*tensors, spec, with_stats=False, with_total=return_residual)
    return (y, total) if return_residual else y


def _activation(activation: Any) -> tuple[Any, float | None, Optional]:
    """Its name, its parameter where that is a number, and where it is a tensor."""
    if activation is None:
        return "", None, None
    if not isinstance(activation, tuple | list) or len(activation) != 2:
        return activation, None, None  # a name, or what the core refuses
    name, parameter = activation
    if name == "prelu" and isinstance(parameter, Tensor):
        return name, None, parameter
    if isinstance(parameter, Tensor) or getattr(parameter, "ndim", 0) > 0 or not hasattr(parameter, "__float__"):
        raise TypeError(f"activation is {activation!r}, expected a number as its parameter, or a tensor with prelu")
    return name, float(parameter), None


def instance_norm(
    x: Tensor,
    weight: Optional = None,
    bias: Optional = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    running_mean: Optional = None,
    running_var: Optional = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    process_group: Any = None,
) -> Any:
    """`normkit.instance_norm` with gradients: each channel of each image by its own mean and variance.

    `torch.nn.functional.instance_norm(x, mean, var, weight, bias)` is
    ``instance_norm(x, weight, bias, running_mean=mean, running_var=var)``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.tensor([[[0.0, 1.0, 5.0]]], requires_grad=True)
    >>> y = nt.instance_norm(x)
    >>> y[0, 0, 0].backward()
    >>> [round(value, 3) for value in x.grad.flatten().tolist()]
    [0.176, -0.22, 0.044]
    """
    name, slope, slopes = _activation(activation)
    spec = Spec("instance", (channel_axis,), 1, not use_input_stats, eps, momentum, weight_offset, name, slope)
    return _call(
        x, weight, bias, spec, process_group, where, residual, return_residual, slopes, running_mean, running_var
    )


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional = None,
    bias: Optional = None,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    process_group: Any = None,
) -> Any:
    """`normkit.group_norm` with gradients: each image over groups of channels.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 6, 8, 8, requires_grad=True)
    >>> y = nt.group_norm(x, 3, torch.ones(6), torch.zeros(6), activation="silu")
    >>> torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 3)), atol=1e-5)
    True
    """
    name, slope, slopes = _activation(activation)
    spec = Spec("group", (channel_axis,), num_groups, False, eps, 0.0, weight_offset, name, slope)
    return _call(x, weight, bias, spec, process_group, where, residual, return_residual, slopes)


def layer_norm(
    x: Tensor,
    weight: Optional = None,
    bias: Optional = None,
    *,
    axis: int | Iterable[int] | None = -1,
    eps: float = 1e-5,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    process_group: Any = None,
) -> Any:
    """`normkit.layer_norm` with gradients, over any axes.

    `torch.nn.functional.layer_norm(x, (C, H, W), weight, bias)` is ``layer_norm(x, weight, bias, axis=(-3, -2, -1))``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 6, 8, 8, requires_grad=True)
    >>> y = nt.layer_norm(x, axis=1)  # of the channels of each pixel, which are not the last axis
    >>> y.mean(1).abs().max().item() < 1e-6
    True
    """
    name, slope, slopes = _activation(activation)
    spec = Spec("layer", axes_of(x, axis), 1, False, eps, 0.0, weight_offset, name, slope)
    return _call(x, weight, bias, spec, process_group, where, residual, return_residual, slopes)


def rms_norm(
    x: Tensor,
    weight: Optional = None,
    bias: Optional = None,
    *,
    axis: int | Iterable[int] | None = -1,
    eps: float | None = None,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    process_group: Any = None,
) -> Any:
    """`normkit.rms_norm` with gradients: by the root mean square over any axes.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> nt.rms_norm(x).square().mean().item()
    1.0
    """
    name, slope, slopes = _activation(activation)
    spec = Spec("rms", axes_of(x, axis), 1, False, eps, 0.0, weight_offset, name, slope)
    return _call(x, weight, bias, spec, process_group, where, residual, return_residual, slopes)


def batch_norm(
    x: Tensor,
    weight: Optional = None,
    bias: Optional = None,
    *,
    running_mean: Optional = None,
    running_var: Optional = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
    weight_offset: float = 0.0,
    process_group: Any = None,
) -> Any:
    """`normkit.batch_norm` with gradients: each channel over the batch, or by its running statistics.

    `torch.nn.functional.batch_norm(x, mean, var, weight, bias)` is
    ``batch_norm(x, weight, bias, running_mean=mean, running_var=var)``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> mean, var = torch.zeros(1), torch.ones(1)
    >>> y = nt.batch_norm(torch.tensor([[1.0], [3.0]]), running_mean=mean, running_var=var, training=True, momentum=0.5)
    >>> mean.item(), var.item()
    (1.0, 1.5)
    """
    name, slope, slopes = _activation(activation)
    spec = Spec("batch", (channel_axis,), 1, not training, eps, momentum, weight_offset, name, slope)
    return _call(
        x, weight, bias, spec, process_group, where, residual, return_residual, slopes, running_mean, running_var
    )


def adaptive_instance_norm(
    content: Tensor,
    style: Tensor,
    *,
    eps: float = 1e-5,
    channel_axis: int = 1,
    where: Tensor | bool | None = None,
    activation: Activation = None,
    residual: Optional = None,
    return_residual: bool = False,
) -> Any:
    """`normkit.adaptive_instance_norm` with gradients of content and of style.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> content, style = torch.arange(4.0).reshape(1, 1, 4), torch.tensor([[[10.0, 30.0]]], requires_grad=True)
    >>> y = nt.adaptive_instance_norm(content, style)
    >>> round(y.mean().item(), 3), y.requires_grad
    (20.0, True)
    """
    if -content.dim() <= channel_axis < content.dim() and -style.dim() <= channel_axis < style.dim():
        found, expected = ((t.shape[0], t.shape[channel_axis]) for t in (style, content))
        core._check_style(found, expected)
    if _hold_values((style,)):
        std, mean = _Deviation.apply(style, channel_axis, eps)
    else:
        std, mean = call("deviation", style, channel_axis, eps)
    if style.shape[0] == 1 != content.shape[0]:
        std, mean = std[0], mean[0]
    return instance_norm(
        content, std, mean, eps=eps, channel_axis=channel_axis, where=where, activation=activation, residual=residual,
        return_residual=return_residual,
    )  # fmt: skip
