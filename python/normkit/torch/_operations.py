"""The phases of operations on tensors: calls of the core on memory that both share.

Here they take and give tensors and know nothing of autograd. `functions.py` calls them where tensors hold values,
`_operators.py` makes operators of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import functional as F  # noqa: N812 - everybody's name for it

from .. import functional as core
from .._memory import dtype_named
from .._operations import Need, Spec, Words, activated, call_of, composed, heard, named_gradients, stand_in

Optional: TypeAlias = Tensor | None

SPEC_SCHEMA = (  # a Spec, as operators take it
    "str kind, int[] axes, int groups, bool frozen, float? eps, float momentum, float weight_offset, str activation, "
    "float? slope"
)


# ---- phases ------------------------------------------------------------------------------------------------------


def _with(options: dict[str, Any], operands: dict[str, Any], slopes: Any) -> dict[str, Any]:
    """The options, and of the operands those that are there."""
    options = options | {name: operand for name, operand in operands.items() if operand is not None}
    if slopes is not None:
        options["activation"] = ("prelu", slopes)
    return options


def forward(
    x: Tensor, weight: Optional, bias: Optional, residual: Optional, where: Optional, slopes: Optional,
    running_mean: Optional, running_var: Optional, spec: Spec, *, with_stats: bool, with_total: bool,
) -> tuple[Tensor, Optional, Optional, Optional]:  # fmt: skip
    """(y, mean, rstd, x + residual). `with_total`: only where there is a residual. Running statistics are updated in
    place."""
    function, options = call_of(spec, "forward")
    learns = running_mean is not None or running_var is not None
    if learns:
        options = {**options, "running_mean": running_mean, "running_var": running_var}
    if residual is not None or where is not None or slopes is not None:
        options = _with(options, {"where": where, "residual": residual}, slopes)
        if residual is not None:
            options["return_residual"] = with_total
    found = function(x, weight=weight, bias=bias, return_stats=with_stats, **options)
    if learns and not spec.frozen:
        increment_version([r for r in (running_mean, running_var) if r is not None])
    if not isinstance(found, tuple):
        return found, None, None, None
    total = found[-1] if with_total else None
    if not with_stats:
        return found[0], None, None, total
    mean, rstd = found[1:3] if spec.is_centered else (None, found[1])
    return found[0], mean, rstd, total


def judge_forward(
    x: Tensor, weight: Optional, bias: Optional, residual: Optional, where: Optional, slopes: Optional,
    running_mean: Optional, running_var: Optional, spec: Spec,
) -> None:  # fmt: skip
    """Raises what a forward would raise for these shapes, dtypes and options."""

    def like(tensor: Optional) -> Any:
        return None if tensor is None else stand_in(tuple(tensor.shape), dtype_named(str(tensor.dtype).split(".")[-1]))

    function: Any
    function, options = call_of(spec, "forward")
    given = {"where": where, "residual": residual, "running_mean": running_mean, "running_var": running_var}
    options = _with(options, {name: like(tensor) for name, tensor in given.items()}, like(slopes))
    function._description(like(x), weight=like(weight), bias=like(bias), **options)


def backward(
    dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor, weight: Optional, bias: Optional, where: Optional,
    slopes: Optional, dtotal: Optional, spec: Spec, need: Need,
) -> list[Optional]:  # fmt: skip
    """[dx, dweight, dbias, dslopes], None for what is not needed."""
    function, options = call_of(spec, "backward")
    statistics = {"rstd": rstd} if spec.kind == "rms" else {"mean": mean, "rstd": rstd}
    if bias is not None or where is not None or slopes is not None or dtotal is not None:
        options = _with(options, {"where": where, "bias": bias, "dresidual": dtotal}, slopes)
    found = function(dy, x, weight=weight, need=named_gradients(need), **statistics, **options)
    return [*found] if need[3] else [*found, None]


def double_backward(
    ddx: Optional, ddweight: Optional, ddbias: Optional, dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor,
    weight: Optional, bias: Optional, where: Optional, spec: Spec,
) -> list[Optional]:  # fmt: skip
    """[d_dy, d_x, d_weight, d_bias] of a call whose activation is not prelu."""
    function, options = call_of(spec, "double_backward")
    if spec.kind != "rms":
        options = {"mean": mean, **options}
    found = function(ddx, ddweight, ddbias, dy, x, rstd=rstd, weight=weight, bias=bias, where=where, **options)
    return [*found] if spec.activation else [*found, None]


def deviation(style: Tensor, channel_axis: int, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(var + eps) and the mean of each channel of each image, in float64."""
    moments = core._moments_of_style(style, channel_axis)
    return moments._deviation(eps), moments.mean


# ---- the same in PyTorch's words ---------------------------------------------------------------------------------


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


_WORDS = Words(torch, Tensor.double, Tensor.expand, _ACTIVATIONS)
_GIVEN = ("x", "weight", "bias", "slopes")


def activation_of(spec: Spec, z: Tensor, slopes: Optional) -> Tensor:
    """Of a normalized tensor."""
    y: Tensor = activated(_WORDS, spec, z, slopes)
    return y


def eps_of(x: Tensor) -> float:
    """What rms norm adds where it is not told: PyTorch's choice too."""
    return float(torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps)


def second_gradients(
    seconds: Sequence[Optional], dy: Tensor, x: Tensor, mean: Optional, rstd: Tensor, weight: Optional, bias: Optional,
    where: Optional, slopes: Optional, spec: Spec,
) -> list[Optional]:  # fmt: skip
    """[d_dy, d_x, d_weight, d_bias, d_slopes] of any call, by PyTorch: `seconds` are the gradients of a scalar with
    respect to dx, dweight, dbias and dslopes."""
    if bias is None and seconds[2] is not None:  # one of the shape of weight, on which nothing depends
        bias = torch.zeros_like(weight)
    heard_x, own = heard(torch, x, dy, where)
    given = [heard_x, weight, bias, slopes]
    present = [k for k, tensor in enumerate(given) if tensor is not None]
    constants = {"where": where, "mean": mean, "rstd": rstd}

    def gradients(dy: Tensor, *operands: Tensor) -> Any:
        def y(*operands: Tensor) -> Any:
            named = {_GIVEN[k]: tensor for k, tensor in zip(present, operands, strict=True)}
            return composed(_WORDS, spec, named, constants, eps_of(x))

        return torch.func.vjp(y, *operands)[1](dy.double())

    found, pull = torch.func.vjp(gradients, dy, *(given[k] for k in present))
    cotangents = []
    for k, gradient in zip(present, found, strict=True):
        second = seconds[k]
        cotangents.append(torch.zeros_like(gradient) if second is None else second.to(gradient.dtype))
    d_dy, *others = pull(tuple(cotangents))
    by_operand = dict(zip(present, others, strict=True))
    return [own(d_dy), *(by_operand.get(k) for k in range(4))]
