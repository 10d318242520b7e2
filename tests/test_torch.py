"""PyTorch's semantics, pinned: values, gradients, running statistics, statistics, dtypes and defaults.

normkit and PyTorch are both correct kernels, each within its bound of the truth that tests/reference.py computes in a
wider type: so they are within twice the bound of each other. No sum here has more than 144 terms, for which the bounds
allow a rounding per term, whatever the order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bounds
import normkit
import numpy as np
import pytest
import reference
from cases import DTYPES, uniform

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
functional = torch.nn.functional

SHAPE, CHANNELS, LAST, GROUPS = (4, 6, 5, 7), 6, 7, 3
RUNNING_MEAN, RUNNING_VAR = np.linspace(-0.5, 0.5, CHANNELS), np.linspace(0.5, 2, CHANNELS)


def running(x):
    """Statistics to normalize by: none is 0 or 1, no two are alike."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor(RUNNING_MEAN, dtype=dtype), torch.tensor(RUNNING_VAR, dtype=dtype)


def by_running(function, x, *params, **options):
    mean, var = running(x)
    return function(x, *params, running_mean=mean, running_var=var, **options)


def each_image(x, w, b, **options):
    """Weights that depend on the image, which PyTorch leaves to the caller."""
    return functional.instance_norm(x, **options) * w[:, :, None, None] + b[:, :, None, None]


def over_channels(x, w, b, **options):
    """Axes that are not the last ones, which PyTorch's layer norm wants moved."""
    return functional.layer_norm(x.movedim(1, -1), (CHANNELS,), w, b, **options).movedim(-1, 1)


@dataclass(frozen=True)
class Case:
    """A function of both libraries: of (x, weight, bias), and in normkit its backward, of (dy, x, *statistics, weight).

    axis is what a statistic is taken over in x of the shape `blocks`; `aligned` is the shape of weight in x.
    """

    ours: Callable[..., Any]
    backward: Callable[..., Any]
    theirs: Callable[..., Any]
    weight: tuple[int, ...]
    aligned: tuple[int, ...]
    axis: tuple[int, ...]
    blocks: tuple[int, ...] = SHAPE
    params: tuple[str, ...] = ("none", "weight", "both")
    center: bool = True
    frozen: bool = False

    def seen(self, param: Any, absent: float) -> Any:
        """A parameter as the reference wants it: one for every element, in blocks."""
        param = np.full(self.weight, absent, np.longdouble) if param is None else wide(param)
        return np.broadcast_to(param.reshape(self.aligned), SHAPE).reshape(self.blocks)

    def truth(self, x: Any, w: Any, b: Any, *, eps: float = 1e-5) -> Any:
        mean, var = (wide(s).reshape(1, CHANNELS, 1, 1) for s in running(x))
        x, w, b = wide(x).reshape(self.blocks), self.seen(w, 1), self.seen(b, 0)
        if self.frozen:
            return reference.applied(x, w, b, self.axis, mean=mean, rstd=1 / np.sqrt(var + eps))
        return reference.forward(x, w, b, self.axis, center=self.center, eps=eps)


C = {"weight": (CHANNELS,), "aligned": (1, CHANNELS, 1, 1)}
L = {"weight": (LAST,), "aligned": (1, 1, 1, LAST), "axis": (3,)}
CASES = {
    "instance": Case(
        normkit.instance_norm,
        normkit.instance_norm_backward,
        lambda x, w, b, **o: functional.instance_norm(x, None, None, w, b, **o),
        **C,
        axis=(2, 3),
    ),
    "instance-frozen": Case(
        lambda *a, **o: by_running(normkit.instance_norm, *a, use_input_stats=False, **o),
        lambda *a: normkit.instance_norm_backward(*a, use_input_stats=False),
        lambda x, w, b, **o: functional.instance_norm(x, *running(x), w, b, use_input_stats=False, **o),
        **C,
        axis=(2, 3),
        frozen=True,
    ),
    "instance-conditional": Case(
        normkit.instance_norm,
        normkit.instance_norm_backward,
        each_image,
        weight=SHAPE[:2],
        aligned=(*SHAPE[:2], 1, 1),
        axis=(2, 3),
        params=("both",),
    ),
    "group": Case(
        lambda x, *a, **o: normkit.group_norm(x, GROUPS, *a, **o),
        lambda dy, x, *a: normkit.group_norm_backward(dy, x, GROUPS, *a),
        lambda x, w, b, **o: functional.group_norm(x, GROUPS, w, b, **o),
        **C,
        axis=(2, 3, 4),
        blocks=(SHAPE[0], GROUPS, CHANNELS // GROUPS, *SHAPE[2:]),
    ),
    "layer": Case(
        normkit.layer_norm,
        normkit.layer_norm_backward,
        lambda x, w, b, **o: functional.layer_norm(x, (LAST,), w, b, **o),
        **L,
    ),
    "layer-two-axes": Case(
        lambda *a, **o: normkit.layer_norm(*a, axis=(-2, -1), **o),
        lambda *a: normkit.layer_norm_backward(*a, axis=(-2, -1)),
        lambda x, w, b, **o: functional.layer_norm(x, SHAPE[2:], w, b, **o),
        weight=SHAPE[2:],
        aligned=(1, 1, *SHAPE[2:]),
        axis=(2, 3),
    ),
    "layer-over-channels": Case(
        lambda *a, **o: normkit.layer_norm(*a, axis=1, **o),
        lambda *a: normkit.layer_norm_backward(*a, axis=1),
        over_channels,
        **C,
        axis=(1,),
    ),
    "normalize": Case(
        lambda *a, **o: normkit.normalize(*a, axis=-1, **o),
        lambda *a: normkit.normalize_backward(*a, axis=-1),
        lambda x, w, b, **o: functional.layer_norm(x, (LAST,), w, b, **o),
        **L,
    ),
    "rms": Case(
        normkit.rms_norm,
        normkit.rms_norm_backward,
        lambda x, w, b, **o: functional.rms_norm(x, (LAST,), w, **o),
        **L,
        params=("none", "weight"),
        center=False,
    ),
    "batch": Case(
        lambda *a, **o: normkit.batch_norm(*a, training=True, **o),
        normkit.batch_norm_backward,
        lambda x, w, b, **o: functional.batch_norm(x, None, None, w, b, training=True, **o),
        **C,
        axis=(0, 2, 3),
    ),
    "batch-frozen": Case(
        lambda *a, **o: by_running(normkit.batch_norm, *a, **o),
        lambda *a: normkit.batch_norm_backward(*a, training=False),
        lambda x, w, b, **o: functional.batch_norm(x, *running(x), w, b, **o),
        **C,
        axis=(0, 2, 3),
        frozen=True,
    ),
}
GIVEN = [(name, given) for name, case in CASES.items() for given in case.params]
IDS = [f"{name}-{given}" for name, given in GIVEN]
COMPILED = [name for name in CASES if name != "instance-conditional"]  # one function of PyTorch, not several
HALVES = [name for name in DTYPES if name not in ("float32", "float64")]
NOT_FUSED = "ignore:Mismatch dtype between input and weight:UserWarning"  # rms_norm, of its own speed


def wide(t: Any) -> Any:
    return t.detach().double().numpy().astype(np.longdouble)


def tensor(rng, shape: tuple[int, ...], dtype: str, **options: Any) -> Any:
    return torch.from_numpy(uniform(rng, shape, np.float64, **options)).to(getattr(torch, dtype))


def parameters(rng, case: Case, given: str, dtype: str) -> list[Any]:
    """weight and bias, of which those not given are None."""
    wanted = {"none": (), "weight": (1,), "both": (1, 0)}[given]
    made = [tensor(rng, case.weight, dtype, offset=offset) for offset in wanted]
    return made + [None] * (2 - len(made))


def agree(found: Any, theirs: Any, truth: Any, bound: Any, more: Any = 0) -> None:
    """`more` is what PyTorch may add to the bound."""
    assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
    assert bounds.excess(wide(found).reshape(truth.shape), wide(theirs).reshape(truth.shape), 2 * bound + more) <= 1
    assert bounds.excess(wide(found).reshape(truth.shape), truth, bound) <= 1


def folded(f: Any, dtype: Any) -> Any:
    """PyTorch makes x * scale + shift of the statistics and the parameters: either part is rounded where it is larger
    than y. Two roundings of scale and one of the product; one more of the shift."""
    return 4 * bounds.unit(dtype) * np.abs(f.weight) * f.rstd * (np.abs(f.x) + np.abs(f.mean))


def compare_values(name, dtype, x, params, **options):
    case, kind = CASES[name], DTYPES[dtype]
    default = {} if case.center else {"eps": float(torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)}
    f = case.truth(x, *params, **{**default, **options})
    agree(case.ours(x, *params, **options), case.theirs(x, *params, **options), f.y, bounds.y(f, kind), folded(f, kind))


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}], ids=["default-eps", "large-eps"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "given"), GIVEN, ids=IDS)
def test_values(name, given, dtype, options, rng):
    x = tensor(rng, SHAPE, dtype, offset=0.5)
    compare_values(name, dtype, x, parameters(rng, CASES[name], given, dtype), **options)


@pytest.mark.filterwarnings(NOT_FUSED)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", COMPILED)
def test_values_of_half_types(name, dtype, rng):
    """One rounding, that of y: neither library rounds x_hat to the type of x before it is scaled.

    Parameters in float32 are what PyTorch needs to be as exact: with others it rounds the statistics to the type of x.
    """
    x = tensor(rng, SHAPE, dtype, offset=0.5)
    compare_values(name, dtype, x, parameters(rng, CASES[name], CASES[name].params[-1], "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "given"), GIVEN, ids=IDS)
def test_gradients(name, given, dtype, rng):
    """Gradients of a scalar through y agree, at the statistics that either library kept of its forward.

    The statistics of normkit are rounded: rstd is off by rstd_error and one rounding, and dx is a sum of
    rstd * (g - mean_g) and of a part that goes with the third power of rstd.
    """
    case, x, dy = CASES[name], tensor(rng, SHAPE, dtype), tensor(rng, SHAPE, dtype)
    params = parameters(rng, case, given, dtype)
    leaves = [p.clone().requires_grad_() for p in (x, *params) if p is not None]
    y = case.theirs(*leaves, *[None] * (3 - len(leaves)), eps=0.01)
    theirs = torch.autograd.grad(y, leaves, dy)
    _, *statistics = case.ours(x, *params, eps=0.01, return_stats=True)
    ours = case.backward(dy, x, *statistics, params[0])

    f, kind = case.truth(x, *params, eps=0.01), DTYPES[dtype]
    b = reference.backward(
        wide(dy).reshape(case.blocks), f.x, f.weight, case.axis, rstd=f.rstd, mean=f.mean, center=case.center,
        use_input_stats=not case.frozen,
    )  # fmt: skip
    off = (0 if case.frozen else bounds.rstd_error(f, kind)) + 2 * bounds.unit(kind)
    count = bounds.count_of(SHAPE, case.weight)
    terms = {
        "dweight": bounds.dweight(b, kind, count) + off * np.abs(b.dweight),
        "dbias": bounds.dbias(b, kind, count),
    }
    parts = b.rstd * (np.abs(b.g) + np.abs(b.mean_g) + 3 * np.abs(b.x_hat * b.mean_gx))
    agree(ours[0], theirs[0], b.dx, bounds.dx(b, kind) + off * parts)
    for found, gradient, (key, bound) in zip(ours[1:], theirs[1:], terms.items(), strict=False):
        total, bound = (
            reference.sum_to(t.reshape(SHAPE), case.aligned).reshape(case.weight) for t in (getattr(b, key), bound)
        )
        agree(found, gradient, total, bound + bounds.stored(np.abs(total) + bound, kind))


@pytest.mark.filterwarnings(NOT_FUSED)
@pytest.mark.parametrize("params", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", COMPILED)
def test_dtypes(name, dtype, params, rng):
    """y and dx are like x, dweight and dbias like weight."""
    if (name, params) == ("batch-frozen", "same"):
        pytest.skip("PyTorch wants running statistics of the dtype of weight, normkit of float32")
    case, x, dy = CASES[name], tensor(rng, SHAPE, dtype), tensor(rng, SHAPE, dtype)
    params = parameters(rng, case, case.params[-1], dtype if params == "same" else params)
    leaves = [p.clone().requires_grad_() for p in (x, *params) if p is not None]
    theirs = case.theirs(*leaves, *[None] * (3 - len(leaves)))
    y, *statistics = case.ours(x, *params, return_stats=True)
    ours = case.backward(dy, x, *statistics, params[0])
    assert y.dtype == theirs.dtype
    for found, gradient in zip(ours, torch.autograd.grad(theirs, leaves, dy), strict=False):
        assert (found.shape, found.dtype) == (gradient.shape, gradient.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["group", "layer", "layer-two-axes", "batch"])
def test_statistics(name, dtype, rng):
    """PyTorch keeps the mean and 1 / sqrt(var + eps), as normkit does; but with the normalized axes in layer norm."""
    case, x = CASES[name], tensor(rng, SHAPE, dtype, offset=1)
    n, c, h, w = SHAPE
    _, *theirs = {
        "group": lambda: torch.native_group_norm(x, None, None, n, c, h * w, GROUPS, 1e-3),
        "layer": lambda: torch.native_layer_norm(x, (w,), None, None, 1e-3),
        "layer-two-axes": lambda: torch.native_layer_norm(x, (h, w), None, None, 1e-3),
        "batch": lambda: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-3),
    }[name]()
    _, *ours = case.ours(x, eps=1e-3, return_stats=True)
    truth = case.truth(x, None, None, eps=1e-3)
    for found, expected, key in zip(ours, theirs, ("mean", "rstd"), strict=True):
        bound = getattr(bounds, key)(truth, DTYPES[dtype])
        agree(found, expected.reshape(found.shape), getattr(truth, key), bound)


@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_running_statistics(name, dtype, momentum, rng):
    """Three batches in training, then one in evaluation, against the layers of PyTorch.

    A batch adds its own error to what is left of the earlier ones, and each update rounds four times. rstd is
    1 / sqrt(var + eps), so that var + eps is off by twice the relative error of rstd.
    """
    kind, u = DTYPES[dtype], bounds.unit(DTYPES[dtype])
    layer, axis = {
        "batch": (torch.nn.BatchNorm2d(CHANNELS, momentum=momentum, affine=False), (0, 2, 3)),
        "instance": (
            torch.nn.InstanceNorm2d(CHANNELS, momentum=momentum, affine=False, track_running_stats=True),
            (2, 3),
        ),
    }[name]
    layer = layer.to(getattr(torch, dtype))
    kept = {"running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()}
    truth, error = np.array([[0.0], [1.0]], np.longdouble) + np.zeros(CHANNELS), np.zeros((2, CHANNELS), np.longdouble)
    function = normkit.batch_norm if name == "batch" else normkit.instance_norm
    for offset in (1, 2, -1):
        x = tensor(rng, SHAPE, dtype, offset=offset)
        layer(x)
        function(x, momentum=momentum, **kept, **({"training": True} if name == "batch" else {}))
        f = reference.forward(wide(x), 1, 0, axis)
        unbiased = f.members / (f.members - 1)
        now = np.stack([f.mean, f.var * unbiased]).mean(1).reshape(2, CHANNELS)
        off = np.stack([bounds.mean(f, kind), 2 * bounds.rstd_error(f, kind) * (f.var + f.eps) * unbiased])
        off = off.mean(1).reshape(2, CHANNELS)
        error = (1 - momentum) * error + momentum * off + 4 * u * (np.abs(truth) + np.abs(now) + error + off)
        truth = (1 - momentum) * truth + momentum * now
    for found, theirs, expected, bound in zip(
        kept.values(), (layer.running_mean, layer.running_var), truth, error, strict=True
    ):
        agree(found, theirs, expected, bound)

    before = [s.clone() for s in kept.values()]
    y = function(x, **kept, **({"training": False} if name == "batch" else {"use_input_stats": False}))
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), before, strict=True))
    (mean, var), (mean_error, var_error) = (a.reshape(2, 1, CHANNELS, 1, 1) for a in (truth, error))
    f = reference.applied(wide(x), np.longdouble(1), 0, axis, mean=mean, rstd=1 / np.sqrt(var + 1e-5))
    bound = bounds.y(f, kind) + f.rstd * mean_error + np.abs(f.x_hat) * var_error / (var + 1e-5)
    agree(y, layer.eval()(x), f.y, bound, folded(f, kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_default_eps(dtype, rng):
    """The default eps is that of the type PyTorch computes in: 2^-23 also for float16 and bfloat16, whatever finfo says
    of these. Members of the size of 1e-4 would be far off with another eps."""
    x = tensor(rng, SHAPE, dtype, std=1e-4)
    eps = 2.0**-52 if dtype == "float64" else 2.0**-23
    truth = CASES["rms"].truth(x, None, None, eps=eps)
    agree(normkit.rms_norm(x), functional.rms_norm(x, (LAST,)), truth.y, bounds.y(truth, DTYPES[dtype]))


@pytest.mark.parametrize("name", ["instance", "group", "batch"])
def test_channels_of_one_member(name):
    """PyTorch refuses what has a variance of 0; normkit gives bias, unless a running variance would need n - 1."""
    x, case = torch.ones((1, GROUPS, 1, 1)), CASES[name]
    with pytest.raises(ValueError, match="Expected more than 1"):
        case.theirs(x, None, None)
    assert torch.equal(case.ours(x), torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 8, 4, 4), (1, 1, 4), (3, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_calls_by_a_known_plan_return_the_strides_of_the_first(shape):
    """Strides of axes with one element mean nothing, but PyTorch takes the layout of a convolution from them."""
    x, weight = torch.randn(shape), torch.randn(1, shape[1], *(1 for _ in shape[2:]))
    dense = [torch.empty(s).stride() for s in (shape, shape[:2], shape[:2], shape, weight.shape, weight.shape)]
    for _ in range(3):
        y, mean, rstd = normkit.instance_norm(x, weight, return_stats=True)
        gradients = normkit.instance_norm_backward(x, x, mean, rstd, weight)
        assert [a.stride() for a in (y, mean, rstd, *gradients)] == dense


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**60, 4), (2**22, 2**22)], ids=str)
def test_outputs_that_are_too_big_are_refused_in_words_each_time(shape):
    x = torch.zeros(1).expand(shape)
    for _ in range(3):
        with pytest.raises((ValueError, MemoryError), match=r"array is too big|Unable to allocate"):
            normkit.normalize(x, axis=1)
