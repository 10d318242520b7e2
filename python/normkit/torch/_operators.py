"""The phases as operators of PyTorch: what torch.compile, torch.export, torch.func and modes of dispatch see.

Operators take a Spec in pieces and always give the same number of tensors, empty ones in the place of None. Transforms
of torch.func do not look at the gradients of an operator, but at those of an autograd.Function: each has both.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._operations import Frame, Spec
from . import _operations as phases
from ._operations import SPEC_SCHEMA, Optional

_library = torch.library.Library("normkit", "DEF")
_SCHEMAS = {
    "forward": "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? where, Tensor? slopes, "
    f"Tensor? running_mean, Tensor? running_var, {SPEC_SCHEMA}) -> "
    "(Tensor y, Tensor mean, Tensor rstd, Tensor total, Tensor running_mean, Tensor running_var)",
    "backward": "(Tensor dy, Tensor x, Tensor? mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? where, "
    f"Tensor? slopes, Tensor? dtotal, {SPEC_SCHEMA}, bool[] need) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dslopes)",
    "double_backward": "(Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor dy, Tensor x, Tensor? mean, "
    f"Tensor rstd, Tensor? weight, Tensor? bias, Tensor? where, {SPEC_SCHEMA}) -> "
    "(Tensor d_dy, Tensor d_x, Tensor d_weight, Tensor d_bias)",
    "deviation": "(Tensor style, int channel_axis, float eps) -> (Tensor std, Tensor mean)",
}
_PIECES = len(Spec._fields)


def _spec(pieces: Sequence[Any]) -> Spec:
    kind, axes, *others = pieces
    return Spec(kind, tuple(axes), *others)


def _filled(like: Tensor, tensors: Sequence[Optional]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor.contiguous() for tensor in tensors)


def _or_none(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Optional]:
    return [tensor if is_wanted else None for tensor, is_wanted in zip(tensors, wanted, strict=True)]


# ---- kernels -----------------------------------------------------------------------------------------------------


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *tensors, running_mean, running_var = others[:-_PIECES]
    spec = _spec(others[-_PIECES:])
    if not spec.frozen:  # operators change nothing: they return what running statistics become
        running_mean, running_var = (None if r is None else r.clone() for r in (running_mean, running_var))
    args = [x, *tensors, running_mean, running_var, spec]
    y, mean, rstd, total = phases.forward(*args, with_stats=True, with_total=tensors[2] is not None)
    learnt = (None, None) if spec.frozen else (running_mean, running_var)
    return (y, *_filled(x, [mean, rstd]), x.new_empty(0) if total is None else total, *_filled(x, learnt))


def _backward(*args: Any) -> tuple[Tensor, ...]:
    x, need = args[1], tuple(args[-1])
    joined = [*args[: -_PIECES - 1], _spec(args[-_PIECES - 1 : -1]), need]
    dx, *others = phases.backward(*joined)
    return (x.new_empty(0) if dx is None else dx, *_filled(x, others))


def _double_backward(*args: Any) -> tuple[Any, ...]:
    joined = [*args[:-_PIECES], _spec(args[-_PIECES:])]
    d_dy, d_x, *params = phases.double_backward(*joined)
    return d_dy, d_x, *_filled(args[4], params)


# ---- shapes and dtypes alone -------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _, _, residual, _, _, running_mean, running_var = args[:-_PIECES]
    spec = _spec(args[-_PIECES:])
    shape = Frame(spec, x.shape).statistics_shape()
    is_number = x.dtype.is_floating_point
    rstd = x.new_empty(shape, dtype=_compute_dtype(x))
    mean = torch.empty_like(rstd) if spec.is_centered else x.new_empty(0)
    learnt = (x.new_empty(0) if r is None or spec.frozen else torch.empty_like(r) for r in (running_mean, running_var))
    y = torch.empty_like(x, dtype=x.dtype if is_number else torch.float32)
    return y, mean, rstd, x.new_empty(0) if residual is None else torch.empty_like(x), *learnt


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _, x, _, _, weight, bias, _, slopes, _, *pieces, need = args
    absent = Frame(_spec(pieces), x.shape).absent_shape()

    def like(*params: Optional) -> Tensor:
        shape = next((p.shape for p in params if p is not None), absent)
        return x.new_empty(shape, dtype=_compute_dtype(x) if weight is None else weight.dtype)

    none = x.new_empty(0)
    return (
        torch.empty_like(x) if need[0] else none,
        like(weight) if need[1] else x.new_empty(0),
        like(bias, weight) if need[2] else x.new_empty(0),
        slopes.new_empty(slopes.shape) if need[3] else x.new_empty(0),
    )


def _double_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    *_, x, _, _, weight, bias, _ = args[:-_PIECES]
    own = _compute_dtype(x) if weight is None else weight.dtype
    params = (weight, bias if _spec(args[-_PIECES:]).activation else None)
    found = (x.new_empty(0) if p is None else x.new_empty(p.shape, dtype=own) for p in params)
    return torch.empty_like(x), torch.empty_like(x), *found


def _deviation_fake(style: Tensor, channel_axis: int, eps: float) -> tuple[Tensor, Tensor]:
    shape = style.shape[0], style.shape[channel_axis]
    return style.new_empty(shape, dtype=torch.float64), style.new_empty(shape, dtype=torch.float64)


# ---- gradients ---------------------------------------------------------------------------------------------------


def call_backward(*args: Any) -> list[Optional]:
    """`phases.backward` through its operator."""
    *tensors, spec, need = args
    return _or_none(call("backward", *tensors, *spec, list(need)), need)


def call_double_backward(*args: Any) -> list[Optional]:
    """`phases.double_backward` through its operator."""
    *tensors, spec = args
    *_, weight, bias, _ = tensors
    is_there = (True, True, weight is not None, bias is not None and spec.activation != "")
    return _or_none(call("double_backward", *tensors, *spec), is_there)


def _forward_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, residual, where, slopes = inputs[:6]
    _, mean, rstd, total, *learnt = output
    others = (mean, rstd, *learnt) if residual is not None else (mean, rstd, total, *learnt)
    ctx.mark_non_differentiable(*others)
    save_forward(ctx, x if residual is None else total, weight, bias, where, slopes, mean, rstd, _spec(inputs[8:]))


def save_forward(
    ctx: Any, x: Tensor, weight: Optional, bias: Optional, where: Optional, slopes: Optional, mean: Optional,
    rstd: Optional, spec: Spec,
) -> None:  # fmt: skip
    """Saves what a backward needs. `x`: what was normalized, with the residual."""
    if bias is not None and not spec.activation and weight is not None and weight.shape == bias.shape:
        bias = None  # it would only say which shape dbias has
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    ctx.save_for_backward(x, weight, bias, where, slopes, mean, rstd)


def gradients_of_forward(ctx: Any, dy: Optional, dtotal: Optional, backward: Callable[..., Any]) -> list[Optional]:
    """Of x, weight, bias, residual, where and slopes."""
    is_needed = ctx.needs_input_grad
    if dy is None:
        return [dtotal, None, None, dtotal, None, None]
    x, weight, bias, where, slopes, mean, rstd = ctx.saved_tensors
    if not ctx.spec.is_centered:
        mean = None
    need = (is_needed[0] or is_needed[3], is_needed[1], is_needed[2], is_needed[5])
    dx, dweight, dbias, dslopes = backward(dy, x, mean, rstd, weight, bias, where, slopes, dtotal, ctx.spec, need)
    return [dx, dweight, dbias, dx if is_needed[3] else None, None, dslopes]


def _forward_gradients(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    dy, _, _, dtotal, _, _ = gradients
    return *gradients_of_forward(ctx, dy, dtotal, call_backward), None, None, *(None,) * _PIECES


def _backward_context(ctx: Any, inputs: Any, output: Any) -> None:
    save_backward(ctx, *inputs[:8], _spec(inputs[9:-1]))


def save_backward(ctx: Any, *args: Any) -> None:
    """Saves what gradients of a backward need."""
    *tensors, ctx.spec = args
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def gradients_of_backward(
    ctx: Any, seconds: Sequence[Optional], double: Callable[..., Any]
) -> list[Optional]:  # fmt: skip
    """Of dy, x, mean, rstd, weight, bias, where, slopes and dtotal; mean and rstd are functions of x."""
    dy, x, mean, rstd, weight, bias, where, slopes = ctx.saved_tensors
    spec: Spec = ctx.spec
    ddx, ddweight, ddbias, _ = seconds
    if all(second is None for second in seconds):
        return [None] * 9
    if spec.activation == "prelu":
        d_dy, d_x, d_weight, d_bias, d_slopes = phases.second_gradients(
            seconds, dy, x, mean, rstd, weight, bias, where, slopes, spec
        )
    else:
        d_dy, d_x, d_weight, d_bias = double(ddx, ddweight, ddbias, dy, x, mean, rstd, weight, bias, where, spec)
        d_slopes = None
    d_dtotal = ddx if ctx.needs_input_grad[8] else None
    return [d_dy, d_x, None, None, d_weight, d_bias, None, d_slopes, d_dtotal]


def _backward_gradients(ctx: Any, *seconds: Any) -> tuple[Any, ...]:
    return *gradients_of_backward(ctx, seconds, call_double_backward), *(None,) * _PIECES, None


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def refuse_third(*_: Any) -> Any:
    raise NotImplementedError(
        "normkit.torch is differentiable twice, and a third derivative was asked for: use torch.nn.functional for it"
    )


def save_deviation(ctx: Any, inputs: Any, output: Any) -> None:
    """Saves what the gradient of a deviation needs."""
    style, ctx.channel_axis, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(style)


def gradients_of_deviation(ctx: Any, dstd: Optional, dmean: Optional) -> tuple[Optional, None, None]:
    """dstyle = (dmean + style_hat * dstd) / members: an instance norm of style, which is differentiable in turn."""
    from .functions import instance_norm

    (style,) = ctx.saved_tensors
    images, channels = style.shape[0], style.shape[ctx.channel_axis]
    members = style.numel() // max(images * channels, 1)
    weight, bias = (None if g is None else g / members for g in (dstd, dmean))
    if weight is None and bias is None:
        return None, None, None
    if weight is None:
        weight = torch.zeros_like(bias)
    return instance_norm(style, weight, bias, eps=ctx.eps, channel_axis=ctx.channel_axis), None, None


# ---- vmap --------------------------------------------------------------------------------------------------------


class _Batch:
    """Arguments of an operator that have one more axis each, or none: all get it in front, or do not vary along it."""

    def __init__(self, size: int, x: Tensor, dim: int | None, spec: Spec) -> None:
        self.size = size
        shape = list(x.shape)
        if dim is not None:
            del shape[dim]
        self.frame = Frame(spec, shape)

    def first(self, tensor: Optional, dim: int | None) -> Optional:
        if tensor is None:
            return None
        return tensor.expand(self.size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def data(self, tensor: Optional, dim: int | None) -> Optional:
        """Of the shape of x."""
        tensor = self.first(tensor, dim)
        return None if tensor is None else self.frame.data(tensor)

    def back(self, tensor: Tensor) -> Tensor:
        return self.frame.back(tensor)

    def mask(self, where: Optional, dim: int | None) -> Optional:
        where = self.first(where, dim)
        if where is None:
            return None
        ones = (1,) * (len(self.frame.shape) - where.dim() + 1)
        return self.frame.data(where.reshape(self.size, *ones, *where.shape[1:]).expand(self.size, *self.frame.shape))

    def param(self, tensor: Optional, dim: int | None, *, varies: bool = False) -> Optional:
        """As it broadcasts against the data. `varies`: its gradients differ along the new axis."""
        if tensor is None:
            return None
        if dim is None and not varies:
            return tensor.reshape(self.frame.param_shape(tensor.shape))
        each: Any = self.first(tensor, dim)
        return each.reshape(self.size, *self.frame.param_shape(each.shape[1:]))


def _forward_vmap(info: Any, in_dims: Any, x: Tensor, *args: Any) -> Any:
    weight, bias, residual, where, slopes, running_mean, running_var = args[:-_PIECES]
    spec = _spec(args[-_PIECES:])
    batch = _Batch(info.batch_size, x, in_dims[0], spec)
    frame = batch.frame
    if running_mean is None and running_var is None:
        y, mean, rstd, total, *learnt = call(
            "forward",
            batch.data(x, in_dims[0]), batch.param(weight, in_dims[1]), batch.param(bias, in_dims[2]),
            batch.data(residual, in_dims[3]), batch.mask(where, in_dims[4]),
            batch.param(slopes, in_dims[5]), None, None, *frame.general(phases.eps_of(x)),
        )  # fmt: skip
        y, total = batch.back(y), total if residual is None else batch.back(total)
    elif not spec.frozen or in_dims[6:8] != (None, None):
        raise NotImplementedError(
            "running statistics are neither updated nor mapped over by vmap: pass none, or fixed ones"
        )
    else:  # constants to all, so that samples of batch norm are like images, and those of instance norm have some
        has_images = spec.kind == "instance"

        def images(each: Optional) -> Optional:
            return each if each is None or not has_images else each.flatten(0, 1)

        def param(tensor: Optional, dim: int | None) -> Optional:
            if tensor is None or (dim is None and tensor.dim() < 2):
                return tensor
            each: Any = batch.param(tensor, dim, varies=True)
            return images(each.expand(-1, frame.shape[0], *each.shape[2:]) if has_images else each)

        y, mean, rstd, total, *learnt = call(
            "forward",
            images(batch.first(x, in_dims[0])), param(weight, in_dims[1]), param(bias, in_dims[2]),
            images(batch.first(residual, in_dims[3])), images(batch.mask(where, in_dims[4])), param(slopes, in_dims[5]),
            running_mean, running_var,
            *spec._replace(kind="instance", axes=(spec.axes[0] % len(frame.shape) - len(frame.shape),)),
        )  # fmt: skip
        if has_images:
            each = (info.batch_size, frame.shape[0])
            y, mean, rstd = (t.unflatten(0, each) for t in (y, mean, rstd))
            total = total if residual is None else total.unflatten(0, each)
    dims = (0, 0 if spec.is_centered else None, 0, None if residual is None else 0, None, None)
    return (y, mean, rstd, total, *learnt), dims


def _backward_vmap(info: Any, in_dims: Any, dy: Tensor, x: Tensor, *args: Any) -> Any:
    mean, rstd, weight, bias, where, slopes, dtotal, *pieces, need = args
    batch = _Batch(info.batch_size, x, in_dims[1], _spec(pieces))
    found = call(
        "backward",
        batch.data(dy, in_dims[0]), batch.data(x, in_dims[1]), batch.first(mean, in_dims[2]),
        batch.first(rstd, in_dims[3]), batch.param(weight, in_dims[4], varies=True),
        batch.param(bias, in_dims[5], varies=True), batch.mask(where, in_dims[6]),
        batch.param(slopes, in_dims[7], varies=True),
        batch.data(dtotal, in_dims[8]), *batch.frame.general(phases.eps_of(x)), need,
    )  # fmt: skip
    dx, *params = found
    absent = batch.frame.absent_shape()
    for k, (tensor, dim) in enumerate(zip((weight, bias, slopes), (in_dims[4], in_dims[5], in_dims[7]), strict=True)):
        if need[k + 1]:
            shape = list(absent if tensor is None else tensor.shape)
            if tensor is not None and dim is not None:
                del shape[dim]
            params[k] = params[k].reshape(info.batch_size, *shape)
    return (batch.back(dx) if need[0] else dx, *params), tuple(0 if n else None for n in need)


def _deviation_vmap(info: Any, in_dims: Any, style: Tensor, channel_axis: int, eps: float) -> Any:
    """Images are independent: those of all samples are one batch."""
    style = style.movedim(in_dims[0], 0)
    size, images = style.shape[:2]
    found = call("deviation", style.flatten(0, 1), channel_axis % (style.dim() - 1), eps)
    return tuple(t.unflatten(0, (size, images)) for t in found), (0, 0)


# ---- both kinds --------------------------------------------------------------------------------------------------

is_transforming = torch._C._are_functorch_transforms_active
_transformable: dict[str, Any] = {}


def call(name: str, *args: Any) -> Any:
    """Calls an operator, where it matters as an autograd.Function."""
    if not torch.compiler.is_compiling() and is_transforming():
        return _transformable[name].apply(*args)
    return getattr(torch.ops.normkit, name)(*args)


def _define(name: str, kernel: Any, fake: Any, context: Any, gradients: Any, batched: Any) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    operator = f"normkit::{name}"
    torch.library.register_fake(operator, fake, lib=_library)
    torch.library.register_autograd(operator, gradients, setup_context=context, lib=_library)
    parts = {
        "forward": getattr(torch.ops.normkit, name).default,
        "setup_context": context,
        "backward": gradients,
        "vmap": batched,
    }
    _transformable[name] = type(name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in parts.items()})


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError("normkit.torch has no vmap over gradients of gradients: use a loop")


_define("forward", _forward, _forward_fake, _forward_context, _forward_gradients, _forward_vmap)
_define("backward", _backward, _backward_fake, _backward_context, _backward_gradients, _backward_vmap)
_define("double_backward", _double_backward, _double_backward_fake, _no_context, refuse_third, _refuse_vmap)
_define("deviation", phases.deviation, _deviation_fake, save_deviation, gradients_of_deviation, _deviation_vmap)
