"""Every normalization once more, in plain NumPy and a wider type: too simple to be wrong.

A normalization is one entry of REGISTRY; the tests iterate over it. Nothing here is shared with the library.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import normkit
import numpy as np
from activations import activated, slope

Shape = tuple[int, ...]


def compute(dtype: Any) -> np.dtype:
    """The type of statistics and arithmetic for data of this dtype."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def wide(x: Any) -> Any:
    """x in float64, or in the longest double where x is float64 already: what the truth is computed in."""
    if x is None:
        return None
    x = np.asarray(x)
    return x.astype(np.longdouble if x.dtype in (np.float64, np.longdouble) else np.float64)


def sum_to(x: np.ndarray, shape: Shape) -> np.ndarray:
    """The adjoint of broadcasting: sums x over the axes along which `shape` was stretched."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(a for a, extent in enumerate(shape) if extent == 1), keepdims=True)


def rstd_of(var: Any, eps: float) -> Any:
    """1 / sqrt(var + eps), and 0 where that does not exist."""
    with np.errstate(divide="ignore"):
        return np.where(var + eps == 0, 0, 1 / np.sqrt(var + eps))


def forward(
    x: Any,
    weight: Any,
    bias: Any,
    axis: Shape,
    *,
    center: bool = True,
    eps: float = 1e-5,
    where: Any = True,
    **affine: Any,
) -> SimpleNamespace:
    """Normalizes x over `axis`; weight and bias broadcast against x. Statistics keep their axes.

    Those of no members are 0, rstd as well. The true mean is `mean` + `rest`: far from zero the first is rounded.
    """
    count = members(where, x.shape, axis)

    def average(terms: Any) -> Any:
        return inside(terms, where).sum(axis, keepdims=True) / np.maximum(count, 1)

    mean = average(x) if center else np.zeros_like(average(x))
    rest = average(x - mean) if center else mean
    var = average((x - mean - rest) ** 2)
    rstd = np.where(count > 0, rstd_of(var, eps), 0)
    f = applied(x, weight, bias, axis, mean=mean, rest=rest, rstd=rstd, **affine)
    f.var, f.eps, f.members = var, eps, count
    f.elements = math.prod(x.shape[a] for a in axis)
    f.farthest = inside(np.abs(x - mean - rest), where).max(axis, keepdims=True)
    f.largest = inside(np.abs(x), where).max(axis, keepdims=True)
    return f


def members(where: Any, shape: Shape, axis: Shape) -> Any:
    """How many elements feed each statistic."""
    if where is True:
        return math.prod(shape[a] for a in axis)
    return where.sum(axis, keepdims=True)


def inside(x: Any, where: Any) -> Any:
    """x, and 0 for what is no member."""
    return x if where is True else np.where(where, x, 0)


def applied(
    x: Any,
    weight: Any,
    bias: Any,
    axis: Shape,
    *,
    mean: Any,
    rstd: Any,
    rest: Any = 0.0,
    weight_offset: float = 0.0,
    activation: Any = None,
) -> SimpleNamespace:
    """The second half of forward(), for statistics that are given: z is what the activation is taken of."""
    x_hat = (x - mean - rest) * rstd
    weight = weight + weight_offset
    z = x_hat * weight + bias
    return SimpleNamespace(
        x=x,
        weight=weight,
        weight_offset=weight_offset,
        bias=bias,
        axis=axis,
        mean=mean,
        rest=rest,
        var=None,
        rstd=rstd,
        x_hat=x_hat,
        z=z,
        activation=activation,
        y=activated(z, activation),
    )


def backward(
    dy: Any,
    x: Any,
    weight: Any,
    axis: Shape,
    *,
    rstd: Any,
    mean: Any = None,
    center: bool = True,
    use_input_stats: bool = True,
    where: Any = True,
    bias: Any = 0.0,
    weight_offset: float = 0.0,
    activation: Any = None,
    dresidual: Any = None,
) -> SimpleNamespace:
    """Gradients of sum(dy * y). The mean is that of the data unless it is frozen; rstd is what the caller holds, and so
    is the mean that the activation sees, if there is one.

    dweight and dbias come with the shape of x, one term for every element; sum_to() adds them up.
    """
    where = where if use_input_stats else True
    count = members(where, x.shape, axis)

    def average(terms: Any) -> Any:
        return terms.sum(axis, keepdims=True) / np.maximum(count, 1)

    given, rest = mean, 0.0
    if not center:
        mean = given = np.zeros_like(rstd)
    elif use_input_stats:
        mean = average(inside(x, where))
        rest = average(inside(x - mean, where))  # what the mean is rounded by
        given = mean if given is None else given
    x_hat = (x - mean - rest) * rstd
    weight = weight + weight_offset
    z = (x - given) * rstd * weight + bias
    dz = dy * slope(z, activation)
    g = dz * weight
    mean_g = average(g) if center and use_input_stats else np.zeros_like(rstd)
    mean_gx = average(g * x_hat) if use_input_stats else np.zeros_like(rstd)
    dx = rstd * (g - inside(mean_g + x_hat * mean_gx, where))
    return SimpleNamespace(
        dy=dy,
        x=x,
        weight=weight,
        weight_offset=weight_offset,
        bias=bias,
        axis=axis,
        mean=mean,
        given=given,
        rstd=rstd,
        x_hat=x_hat,
        z=z,
        activation=activation,
        dz=dz,
        g=g,
        mean_g=mean_g,
        mean_gx=mean_gx,
        dresidual=dresidual,
        dx=dx if dresidual is None else dx + dresidual,
        dweight=dz * x_hat,
        dbias=dz + np.zeros_like(x),
        dslopes=dy * np.minimum(z, 0),
        where=where,
        members=count,
        elements=math.prod(x.shape[a] for a in axis),
        frozen=not use_input_stats,
        center=center,
    )


def gradient(f: Callable[..., Any], arguments: list, k: int) -> Any:
    """The derivative of a scalar f(*arguments) with respect to each element of argument k.

    A step along the imaginary axis: nothing cancels, and what is left out is of the order of the step squared.
    """
    found = np.zeros(arguments[k].shape, np.longdouble)
    for index in np.ndindex(found.shape):
        direction = np.zeros(found.shape, np.longdouble)
        direction[index] = 1
        found[index] = derivative_along(f, arguments, k, direction)
    return found


def derivative_along(f: Callable[..., Any], arguments: list, k: int, direction: Any) -> Any:
    """The derivative of a scalar f(*arguments) when argument k moves along `direction`."""
    step = np.longdouble(2.0**-100)
    moved = [a + 1j * step * direction if i == k else a for i, a in enumerate(arguments)]
    return f(*moved).imag / step


@dataclass(frozen=True)
class Operation:
    """How the tests call one normalization, and what it means.

    reduced     shape -> the axes of `blocks(shape)` that a statistic is taken over
    weights     shape -> the shapes that weight may have, by kind
    aligned     (weight shape, shape) -> the weight's shape, padded with ones so that it broadcasts against x
    absent      shape -> the shape of dweight where there is no weight, and the same aligned
    blocks      shape -> the shape x is seen in, for normalizations that split an axis
    arguments   shape -> what stands between x and weight in a call
    options     keywords of every call; `forward_options` of the forward alone
    stats_option  the keyword that freezes statistics
    """

    name: str
    function: str
    reduced: Callable[[Shape], Shape]
    weights: Callable[[Shape], dict[str, Shape]]
    absent: Callable[[Shape], tuple[Shape, Shape]]
    aligned: Callable[[Shape, Shape], Shape] = lambda weight, shape: weight
    blocks: Callable[[Shape], Shape] = lambda shape: shape
    arguments: Callable[[Shape], tuple] = lambda shape: ()
    options: Callable[[Shape], dict] = lambda shape: {}
    forward_options: dict = field(default_factory=dict)
    center: bool = True
    backward_takes_mean: bool = True
    stats_option: str = "use_input_stats"
    least_ndim: int = 2

    def __repr__(self) -> str:
        return self.name

    def weight_shape(self, shape: Shape, kind: str) -> Shape:
        """The weight of that kind, or of the first kind that there is: most normalizations have few."""
        kinds = self.weights(shape)
        return kinds.get(kind, next(iter(kinds.values())))

    def forward(self, x: Any, weight: Any = None, bias: Any = None, **options: Any) -> Any:
        f = getattr(normkit, self.function)
        options = {**self.options(x.shape), **self.forward_options, **options}
        return f(x, *self.arguments(x.shape), weight, bias, **options)

    def statistics(self, x: Any, **options: Any) -> tuple[Any, Any, Any]:
        """y, mean, rstd; mean is None where there is none."""
        found = self.forward(x, return_stats=True, **options)
        return found if self.center else (found[0], None, found[1])

    def backward(self, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, **options: Any) -> Any:
        f = getattr(normkit, self.function + "_backward")
        given = (mean, rstd) if self.backward_takes_mean else (rstd,)
        if "use_input_stats" in options:
            options[self.stats_option] = options.pop("use_input_stats")
        return f(dy, x, *self.arguments(x.shape), *given, weight, **self.options(x.shape), **options)

    def double_backward(
        self, dds: Any, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, **options: Any
    ) -> Any:
        """`dds`: ddx, ddweight, ddbias."""
        f = getattr(normkit, self.function + "_double_backward")
        given = (mean, rstd) if self.backward_takes_mean else (rstd,)
        if "use_input_stats" in options:
            options[self.stats_option] = options.pop("use_input_stats")
        return f(*dds, dy, x, *self.arguments(x.shape), *given, weight, **self.options(x.shape), **options)

    def statistics_shape(self, shape: Shape) -> Shape:
        blocks = self.blocks(shape)
        return tuple(extent for a, extent in enumerate(blocks) if a not in self.reduced(shape))

    def _seen(self, x: Any, shape: Shape) -> Any:
        return np.broadcast_to(x, shape).reshape(self.blocks(shape))

    def _param(self, p: Any, shape: Shape, absent: float, like: Any) -> Any:
        if p is None:
            return self._seen(like.dtype.type(absent), shape)
        return self._seen(wide(p).astype(like.dtype).reshape(self.aligned(p.shape, shape)), shape)

    def _activation(self, activation: Any, shape: Shape, like: Any) -> Any:
        """With slopes, if there are any, for each element of x."""
        if activation is None or activation[0] != "prelu":
            return activation
        slopes = np.asarray(activation[1])
        if slopes.size == 1:
            return "prelu", self._seen(wide(slopes).astype(like.dtype).reshape(()), shape)
        return "prelu", self._param(slopes, shape, 1, like)

    def _kept(self, s: Any, shape: Shape, like: Any) -> Any:
        return None if s is None else wide(s).astype(like.dtype).reshape(self._kept_shape(shape))

    def _kept_shape(self, shape: Shape) -> Shape:
        return tuple(1 if a in self.reduced(shape) else extent for a, extent in enumerate(self.blocks(shape)))

    def reference(
        self,
        x: Any,
        weight: Any = None,
        bias: Any = None,
        *,
        eps: float = 1e-5,
        where: Any = None,
        weight_offset: float = 0.0,
        activation: Any = None,
    ) -> SimpleNamespace:
        shape, x = x.shape, wide(x)
        return forward(
            self._seen(x, shape),
            self._param(weight, shape, 1, x),
            self._param(bias, shape, 0, x),
            self.reduced(shape),
            center=self.center,
            eps=eps,
            where=True if where is None else self._seen(where, shape),
            weight_offset=0.0 if weight is None else weight_offset,
            activation=self._activation(activation, shape, x),
        )

    def reference_backward(
        self,
        dy: Any,
        x: Any,
        mean: Any,
        rstd: Any,
        weight: Any = None,
        *,
        use_input_stats: bool = True,
        where: Any = None,
        bias: Any = None,
        weight_offset: float = 0.0,
        activation: Any = None,
        dresidual: Any = None,
    ) -> SimpleNamespace:
        shape, x = x.shape, wide(x)
        return backward(
            self._seen(wide(dy), shape),
            self._seen(x, shape),
            self._param(weight, shape, 1, x),
            self.reduced(shape),
            rstd=self._kept(rstd, shape, x),
            mean=self._kept(mean, shape, x),
            center=self.center,
            use_input_stats=use_input_stats,
            where=True if where is None else self._seen(where, shape),
            bias=self._param(bias, shape, 0, x),
            weight_offset=0.0 if weight is None else weight_offset,
            activation=self._activation(activation, shape, x),
            dresidual=None if dresidual is None else self._seen(wide(dresidual), shape),
        )

    def reference_double_backward(
        self,
        dds: Any,
        dy: Any,
        x: Any,
        mean: Any,
        rstd: Any,
        weight: Any = None,
        *,
        use_input_stats: bool = True,
        where: Any = None,
        bias: Any = None,
        weight_offset: float = 0.0,
        activation: Any = None,
    ) -> SimpleNamespace:
        """The scalar sum(ddx * dx) + sum(ddweight * dweight) + sum(ddbias * dbias) as a function of dy, x, weight and
        bias, and the arguments it is differentiated at. All in the longest double.

        Statistics are functions of x. eps is what makes rstd at x that of the caller, to the last digit.
        """
        shape, real = x.shape, np.dtype(np.longdouble)
        params = [np.ones(()) if weight is None else weight, np.zeros(()) if bias is None else bias]
        arguments = [np.asarray(a).astype(real) for a in (dy, x, *params)]

        def param(p: Any, like: Any) -> Any:
            if p is None:
                return self._seen(np.zeros((), real), shape)
            aligned = self.absent(shape)[1] if like is None else self.aligned(like.shape, shape)
            return self._seen(p.astype(real).reshape(aligned), shape)

        ddx = self._seen(np.zeros((), real) if dds[0] is None else np.asarray(dds[0]).astype(real), shape)
        ddweight, ddbias = param(dds[1], weight), param(dds[2], weight if bias is None else bias)
        axis, kept = self.reduced(shape), self._kept_shape(shape)
        mask = True if where is None else self._seen(where, shape)
        mean, rstd = (None if s is None else np.asarray(s).astype(real).reshape(kept) for s in (mean, rstd))
        if self.center:  # whatever is subtracted from both; near zero the longest double has digits to spare
            origin = arguments[1].flat[0]
            arguments[1], mean = arguments[1] - origin, mean - origin
        with np.errstate(divide="ignore"):
            eps = 1 / rstd**2 - forward(self._seen(arguments[1], shape), 1, 0, axis, center=self.center, where=mask).var

        def used(p: Any, given: Any, offset: float = 0.0) -> Any:
            return self._seen(p if given is None else p.reshape(self.aligned(given.shape, shape)) + offset, shape)

        def first(dy: Any, x: Any, w: Any, b: Any) -> Any:
            x, dy = self._seen(x, shape), self._seen(dy, shape)
            options = {"center": self.center, "where": mask}
            moving = SimpleNamespace(mean=mean, rest=0, rstd=rstd)
            if use_input_stats:
                moving = forward(x, 1, 0, axis, eps=eps, **options)
            held, ahead = None, 0.0
            if self.center:  # an activation is where the given mean puts it, and moves as that of x does
                held = moving.mean + moving.rest
                ahead = ((held - mean) * moving.rstd * used(w, weight, weight_offset)).real
            return backward(
                dy,
                x,
                used(w, weight, weight_offset),
                axis,
                rstd=moving.rstd,
                mean=held,
                use_input_stats=use_input_stats,
                bias=used(b, bias) + ahead,
                activation=activation,
                **options,
            )

        def scalar(*moved: Any) -> Any:
            b = first(*moved)
            return (ddx * b.dx + ddweight * b.dweight + ddbias * b.dbias).sum()

        dy, x, w, _ = arguments
        of_bounds = first(*arguments)
        of_bounds.given = of_bounds.mean  # its z is at what was given
        return SimpleNamespace(
            scalar=scalar,
            arguments=arguments,
            dds=(ddx, ddweight, ddbias),
            first=of_bounds,
            dy=self._seen(dy, shape),
            x=self._seen(x, shape),
            w=used(w, weight, weight_offset),
            mean=np.zeros_like(rstd) if mean is None else mean,
            rstd=rstd,
            axis=axis,
            members=members(mask, self.blocks(shape), axis),
            where=mask,
            frozen=not use_input_stats,
            center=self.center,
        )

    def to_weight(self, terms: Any, shape: Shape, weight: Any) -> Any:
        """One term for every element of x, added up for every parameter."""
        like, aligned = self.absent(shape) if weight is None else (weight.shape, self.aligned(weight.shape, shape))
        return sum_to(terms.reshape(shape), aligned).reshape(like)


def per_instance(name: str, channel: int) -> Operation:
    def channel_axis(shape: Shape) -> int:
        return channel % len(shape)

    def weights(shape: Shape) -> dict[str, Shape]:
        c = shape[channel_axis(shape)]
        return {"channel": (c,), "conditional": (shape[0], c), "pixel": shape}

    def aligned(weight: Shape, shape: Shape) -> Shape:
        if weight == shape and len(shape) != 2:
            return weight
        first = shape[0] if len(weight) == 2 else 1
        return tuple(first if a == 0 else weight[-1] if a == channel_axis(shape) else 1 for a in range(len(shape)))

    return Operation(
        name,
        "instance_norm",
        weights=weights,
        aligned=aligned,
        options=lambda shape: {"channel_axis": channel},
        absent=lambda shape: ((shape[channel_axis(shape)],), aligned((shape[channel_axis(shape)],), shape)),
        reduced=lambda shape: tuple(a for a in range(1, len(shape)) if a != channel_axis(shape)),
        least_ndim=3,
    )


def groups_of(channels: int) -> int:
    """Some number of groups: neither 1 nor all, where there is a choice."""
    return next((g for g in (2, 3, 5, 7) if g < channels and channels % g == 0), channels or 1)


def per_group(name: str, channel: int) -> Operation:
    """Group norm, which is like instance norm but for the split axis and what is reduced."""
    instance = per_instance(name, channel)

    def blocks(shape: Shape) -> Shape:
        a = channel % len(shape)
        groups = groups_of(shape[a])
        return (*shape[:a], groups, shape[a] // groups, *shape[a + 1 :])

    return replace(
        instance,
        function="group_norm",
        least_ndim=2,
        arguments=lambda shape: (groups_of(shape[channel]),),
        blocks=blocks,
        reduced=lambda shape: tuple(a for a in range(1, len(shape) + 1) if a != channel % len(shape)),
    )


def per_channel(name: str, channel: int) -> Operation:
    """Batch norm in training."""
    instance = per_instance(name, channel)
    return replace(
        instance,
        function="batch_norm",
        least_ndim=2,
        weights=lambda shape: {"channel": (shape[channel],)},
        forward_options={"training": True},
        stats_option="training",
        reduced=lambda shape: tuple(a for a in range(len(shape)) if a != channel % len(shape)),
    )


def named_layer(name: str, function: str, axes: Callable[[int], Shape], *, center: bool = True) -> Operation:
    """Layer and RMS norm: like normalize over the same axes, but for the shape of weight."""
    like = over_axes(name, axes, center=center)

    def extents(shape: Shape) -> Shape:
        return tuple(shape[a] for a in like.reduced(shape))

    return replace(
        like,
        function=function,
        weights=lambda shape: {"normalized": extents(shape)},
        aligned=lambda weight, shape: like.absent(shape)[1],
        options=lambda shape: {"axis": axes(len(shape))},
        forward_options={} if center else {"eps": 1e-5},
        backward_takes_mean=center,
    )


def over_axes(name: str, axes: Callable[[int], Shape], *, center: bool = True) -> Operation:
    def axis(shape: Shape) -> Shape:
        return tuple(sorted(a % len(shape) for a in axes(len(shape))))

    def only(shape: Shape, axes: Shape) -> Shape:
        return tuple(extent if a in axes else 1 for a, extent in enumerate(shape))

    def weights(shape: Shape) -> dict[str, Shape]:
        kept = tuple(a for a in range(len(shape)) if a not in axis(shape))
        return {
            "normalized": only(shape, axis(shape))[axis(shape)[0] :],
            "kept": only(shape, kept),
            "channel": only(shape, (1,)),
            "image": only(shape, (0,)),
            "last": shape[-1:],
            "pixel": shape,
            "scalar": (),
        }

    return Operation(
        name,
        "normalize",
        weights=weights,
        center=center,
        reduced=axis,
        options=lambda shape: {"axis": axes(len(shape)), "center": center},
        absent=lambda shape: (tuple(shape[a] for a in axis(shape)), only(shape, axis(shape))),
    )


REGISTRY = [
    per_instance("instance", 1),
    per_instance("instance-last", -1),
    per_group("group", 1),
    per_group("group-last", -1),
    per_channel("batch", 1),
    per_channel("batch-last", -1),
    named_layer("layer", "layer_norm", lambda ndim: (-1,)),
    named_layer("layer-outer", "layer_norm", lambda ndim: (0, ndim - 1)),
    named_layer("rms", "rms_norm", lambda ndim: (-1,), center=False),
    over_axes("over-last", lambda ndim: (-1,)),
    over_axes("over-all-but-first", lambda ndim: tuple(range(1, ndim))),
    over_axes("over-all-but-channels", lambda ndim: tuple(a for a in range(ndim) if a != 1)),
    over_axes("over-channels", lambda ndim: (1,)),
    over_axes("over-first", lambda ndim: (0,)),
    over_axes("rms-over-last", lambda ndim: (-1,), center=False),
    over_axes("rms-over-all-but-channels", lambda ndim: tuple(a for a in range(ndim) if a != 1), center=False),
]
OPERATIONS = {operation.name: operation for operation in REGISTRY}
