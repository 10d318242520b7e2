"""torch.nn's normalization modules on normkit: the same constructors, parameters, buffers and state dicts.

Each is a subclass of its namesake that computes in another way, and takes `activation` besides.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from .._types import Activation
from . import functions

__all__ = [
    "AdaptiveInstanceNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]


_OURS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    for name, kind in (("activation", Activation), ("process_group", Any))
]


class _Activated(nn.Module):
    """A module with an activation, before the class of torch.nn whose constructor it has."""

    # Of modules that were unpickled or converted, too.
    activation: Activation = None
    process_group: Any = None

    def __init__(self, *args: Any, activation: Activation = None, process_group: Any = None, **options: Any) -> None:
        super().__init__(*args, **options)
        if isinstance(activation, tuple) and isinstance(activation[1], Tensor):
            raise TypeError(
                "activation has slopes that are a tensor, expected a number: a module keeps no parameter there; call "
                "the function of normkit.torch, or use torch.nn.PReLU behind the module"
            )
        self.activation, self.process_group = activation, process_group

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the group of processes by its name, which it may also have in another process."""
        return {**vars(self), "process_group": getattr(self.process_group, "group_name", self.process_group)}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        theirs = next((base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules")), nn.Module)
        if theirs is not nn.Module:
            parameters = [*inspect.signature(theirs).parameters.values(), *_OURS]
            cls.__signature__ = inspect.Signature(parameters)

    def extra_repr(self) -> str:
        ours = {"activation": self.activation, "process_group": self.__getstate__()["process_group"]}
        own = [f"{name}={value!r}" for name, value in ours.items() if value is not None]
        return ", ".join(filter(None, [super().extra_repr(), *own]))


class _InstanceNorm(_Activated):
    """What InstanceNorm1d, 2d and 3d have in common: what PyTorch's forward calls when it has judged the input."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name for it
        return functions.instance_norm(
            input, self.weight, self.bias, running_mean=self.running_mean, running_var=self.running_var,
            use_input_stats=self.training or not self.track_running_stats, momentum=self.momentum or 0.0,
            eps=self.eps, activation=self.activation, process_group=self.process_group,
        )  # fmt: skip


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 100)
    >>> ours = nt.InstanceNorm1d(16, affine=True, activation="relu")
    >>> theirs = torch.nn.Sequential(torch.nn.InstanceNorm1d(16, affine=True), torch.nn.ReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 8, 8)
    >>> ours = nt.InstanceNorm2d(16, affine=True, activation="relu")
    >>> theirs = torch.nn.Sequential(torch.nn.InstanceNorm2d(16, affine=True), torch.nn.ReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 4, 8, 8)
    >>> ours = nt.InstanceNorm3d(16, activation="leaky_relu")
    >>> theirs = torch.nn.Sequential(torch.nn.InstanceNorm3d(16), torch.nn.LeakyReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class _BatchNorm(_Activated):
    """What BatchNorm1d, 2d and 3d have in common."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name for it
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and (batches := self.num_batches_tracked) is not None:
            batches.add_(1)
            if self.momentum is None:  # the average over all batches
                momentum = 1.0 / float(batches)
        mean, var = self.running_mean, self.running_var
        learns = self.training or (mean is None and var is None)
        if self.training and not self.track_running_stats:
            mean = var = None
        return functions.batch_norm(
            input, self.weight, self.bias, running_mean=mean, running_var=var, training=learns, momentum=momentum,
            eps=self.eps, activation=self.activation, process_group=self.process_group,
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(8, 16)
    >>> ours = nt.BatchNorm1d(16, activation="relu")
    >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(16), torch.nn.ReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 8, 8)
    >>> ours = nt.BatchNorm2d(16, activation="relu")
    >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(16), torch.nn.ReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 4, 8, 8)
    >>> ours = nt.BatchNorm3d(16, activation="relu")
    >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm3d(16), torch.nn.ReLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """


class GroupNorm(_Activated, nn.GroupNorm):
    """`torch.nn.GroupNorm`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 16, 8, 8)
    >>> ours = nt.GroupNorm(4, 16, activation="silu")
    >>> theirs = torch.nn.Sequential(torch.nn.GroupNorm(4, 16), torch.nn.SiLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name for it
        return functions.group_norm(
            input, self.num_groups, self.weight, self.bias,
            eps=self.eps, activation=self.activation, process_group=self.process_group,
        )  # fmt: skip


def _last_axes(input: Tensor, shape: tuple[int, ...]) -> range:  # noqa: A002
    if input.shape[-len(shape) :] != shape:
        raise ValueError(f"input has shape {tuple(input.shape)}, expected one that ends with {shape}, normalized_shape")
    return range(-len(shape), 0)


class LayerNorm(_Activated, nn.LayerNorm):
    """`torch.nn.LayerNorm`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 10, 16)
    >>> ours = nt.LayerNorm(16, activation="gelu")
    >>> theirs = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.GELU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name for it
        axes = _last_axes(input, self.normalized_shape)
        return functions.layer_norm(
            input, self.weight, self.bias, axis=axes,
            eps=self.eps, activation=self.activation, process_group=self.process_group,
        )  # fmt: skip


class RMSNorm(_Activated, nn.RMSNorm):
    """`torch.nn.RMSNorm`, with ``activation``.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> x = torch.randn(2, 10, 16)
    >>> ours = nt.RMSNorm(16, activation="silu")
    >>> theirs = torch.nn.Sequential(torch.nn.RMSNorm(16), torch.nn.SiLU())
    >>> torch.allclose(ours(x), theirs(x), atol=1e-5)
    True
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - PyTorch's name for it
        axes = _last_axes(input, self.normalized_shape)
        return functions.rms_norm(
            input, self.weight, axis=axes,
            eps=self.eps, activation=self.activation, process_group=self.process_group,
        )  # fmt: skip


class AdaptiveInstanceNorm(_Activated, nn.Module):
    """`normkit.torch.adaptive_instance_norm` of a content and a style, without parameters.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> content, style = torch.rand(4, 3, 16, 16), torch.rand(1, 3, 8, 8)
    >>> y = nt.AdaptiveInstanceNorm(eps=0.0)(content, style)
    >>> torch.allclose(y.mean((2, 3)), style.mean((2, 3)).expand(4, 3), atol=1e-5)
    True
    """

    def __init__(self, eps: float = 1e-5, *, activation: Activation = None) -> None:
        super().__init__(activation=activation)
        self.eps = eps

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        return functions.adaptive_instance_norm(content, style, eps=self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"eps={self.eps}{'' if self.activation is None else f', activation={self.activation!r}'}"
