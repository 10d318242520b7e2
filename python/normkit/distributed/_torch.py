"""The normalizations of normkit.torch of arrays whose parts lie in several processes, with gradients of both orders.

Each is `normalize` of a view of the part, in two phases with a message between them: forward, backward and double
backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import phases
from .._operations import Frame, Spec, aligned, call_of, heard, learnt
from ..torch._operations import Optional, activation_of, backward, eps_of
from . import add, merge

_SHARED = ("axis", "activation", "weight_offset")  # options of all phases but the first


@torch.compiler.disable
def normalized(
    x: Tensor, weight: Optional, bias: Optional, spec: Spec, where: Optional, slopes: Optional,
    running_mean: Optional, running_var: Optional, group: Any,
) -> Tensor:  # fmt: skip
    """y of the part of this process. Running statistics are updated in place, alike in all processes."""
    frame = Frame(spec, x.shape)
    mask = None if where is None else frame.data(where.broadcast_to(x.shape))
    data, general = frame.data(x), frame.general(eps_of(x))
    own = phases.moments(data.detach(), axis=general.axes, center=spec.is_centered, where=mask)
    whole = merge(own, group)
    if running_mean is not None or running_var is not None:
        _learn(whole, spec.momentum, running_mean, running_var)
    params = [None if p is None else p.reshape(frame.param_shape(p.shape)) for p in (weight, bias, slopes)]
    y: Tensor = frame.back(_Forward.apply(data, *params, mask, general, group, whole))
    return y


def _learn(whole: phases.Moments, momentum: float, *running: Optional) -> None:
    for old, found in zip(running, (whole.mean, whole.var(1)), strict=True):
        if old is not None:
            statistics = torch.atleast_2d(found), torch.atleast_2d(whole.count)
            old.copy_(learnt(torch, old.double(), *statistics, momentum))


def _options(spec: Spec, slopes: Optional) -> dict[str, Any]:
    options = call_of(spec, "forward")[1]
    chosen: dict[str, Any] = {name: options[name] for name in _SHARED if name in options}
    return chosen if slopes is None else chosen | {"activation": ("prelu", slopes)}


class _Forward(torch.autograd.Function):
    """The second phase of the forward: all statistics are there."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, slopes, _, spec, _, whole = args
        ctx.save_for_backward(*args[:5])
        ctx.others = args[5:]
        y: Tensor = phases.apply(x, whole, whole.rstd(spec.eps), weight, bias, **_options(spec, slopes))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        *operands, where = ctx.saved_tensors
        spec, group, whole = ctx.others
        need = ctx.needs_input_grad[:4]
        if not spec.activation or not torch.is_grad_enabled():
            return *_Backward.apply(dy, *operands, where, *ctx.others, need), None, None, None, None
        # PyTorch differentiates the activation once more. Views, as one operand may be a function of another.
        dy, *leaves, slopes = (None if t is None else t.view_as(t) for t in (dy, *operands))
        x, own = heard(torch, leaves[0], dy, where)
        if dy.requires_grad:
            dy.register_hook(own)
        z = _Forward.apply(x, *leaves[1:], None, where, spec._replace(activation="", slope=None), group, whole)
        y = activation_of(spec, z, slopes)
        wanted = [t for t, is_needed in zip((*leaves, slopes), need, strict=True) if is_needed]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
        return *(next(found) if is_needed else None for is_needed in need), None, None, None, None


class _Backward(torch.autograd.Function):
    """Both phases of the backward. Gradients of parameters are those of the part."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        dy, x, weight, bias, slopes, where, spec, group, whole, need = args
        ctx.save_for_backward(dy, x, weight, where)
        ctx.others = spec, group, whole
        ctx.set_materialize_grads(False)
        rstd, dx = whole.rstd(spec.eps), None
        if need[0]:
            options = _options(spec, slopes) | {"where": where, "bias": bias if spec.activation else None}
            sums = add(phases.backward_sums(dy, x, whole, rstd, weight, **options), group)
            dx = phases.apply_backward(dy, x, whole, rstd, sums, whole.count, weight, **options)
        mean = whole.mean
        x, _ = heard(torch, x, dy, where)
        if x.dtype == torch.float64 and mean is not None:  # a mean that is two numbers
            x, mean = x - aligned(mean, spec.axes, x.shape), whole.mean_low
        frozen = spec._replace(frozen=True)
        params = backward(dy, x, mean, rstd, weight, bias, None, slopes, None, frozen, (False, *need[1:]))
        return dx, *params[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddx: Optional, ddweight: Optional, ddbias: Optional, _: None) -> Any:
        """Of S = sum(ddx * dx) + sum(ddweight * dweight) + sum(ddbias * dbias), over all processes.

        With u for any of g = dy * weight, v = ddx and h = dy * ddweight, and a(u) and b(u) the sums of u and of u *
        x_hat, divided by the number of members, of v over these alone,

            S = rstd * (sum(v * g) - count * (a(v) * a(g) + b(v) * b(g))) + sum(h * x_hat) + sum(ddbias * dy).

        That is differentiated by g, by rstd, which is a function of x, and by x_hat, for which c stands.
        """
        dy, x, weight, where = ctx.saved_tensors
        spec, group, whole = ctx.others
        x, own = heard(torch, x, dy, where)
        count, rstd = (aligned(s, spec.axes, x.shape) for s in (whole.count.clip(1), whole.rstd(spec.eps)))
        x_hat = x.double() * rstd
        if spec.is_centered:
            mean, low = (aligned(s, spec.axes, x.shape) for s in (whole.mean, whole.mean_low))
            x_hat = (x.double() - mean - low) * rstd
        w = 1.0 if weight is None else weight.double() + spec.weight_offset
        m = 1.0 if where is None else where.double()
        g = dy.double() * w
        v, h = (torch.zeros_like(g) if t is None else t.double() for t in (ddx, ddweight))
        h = dy * h
        terms = (g, m * v, h, g * x_hat, m * v * x_hat, h * x_hat, v * g)
        sums = add(torch.stack([t.sum(spec.axes) for t in terms], -1), group)
        a_g, a_v, a_h, b_g, b_v, b_h, vg = (aligned(s, spec.axes, x.shape) / count for s in sums.unbind(-1))
        if not spec.is_centered:
            a_g = a_v = a_h = torch.zeros_like(a_g)
        c = h - rstd * (m * v * b_g + g * b_v)
        a_c, b_c = a_h - rstd * (a_v * b_g + a_g * b_v), b_h - 2 * rstd * b_v * b_g
        by_rstd = rstd * (vg - a_v * a_g - b_v * b_g)
        d_x = rstd * (c - m * (a_c + x_hat * (b_c + by_rstd)))
        by_g = rstd * (v - a_v - x_hat * b_v)
        d_dy = w * by_g
        if ddweight is not None:
            d_dy = d_dy + ddweight * x_hat
        if ddbias is not None:
            d_dy = d_dy + ddbias
        d_weight = None if weight is None else (dy * by_g).sum_to_size(weight.shape)
        return own(d_dy), d_x, d_weight, *(None,) * 7
