"""normkit.distributed on processes of gloo and MPI, against the whole in one process."""

import copy
import datetime
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bounds
import normkit
import numpy as np
import pytest
from activations import name_of
from cases import bits, uniform
from normkit import _cuda
from reference import OPERATIONS, compute

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
distributed = pytest.importorskip("torch.distributed")
nd = pytest.importorskip("normkit.distributed")
nt = pytest.importorskip("normkit.torch")
import normkit.distributed._torch  # noqa: E402 - with all that it imports, before processes fork
from processes import Processes  # noqa: E402

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

nn = torch.nn
F = nn.functional
SIZE = 4  # processes at most


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    pool = Processes(__name__, SIZE, tmp_path_factory.mktemp("store"))
    yield pool
    pool.close()


def close(found, expected):
    """Both are within some hundred roundings of values of order 1, in float64, of the truth."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def part_of(rank, cuts, axis, ndim):
    """What process `rank` has of an array that is cut along an axis, as an index."""
    return (slice(None),) * (axis % ndim) + (slice(cuts[rank], cuts[rank + 1]),)


# ---- moments and sums --------------------------------------------------------------------------------------------


def as_library(array, library):
    return torch.from_numpy(array.copy()) if library == "torch" else array


def merged_in(group, rank, x, cuts, axis, library, center):
    part = as_library(x[part_of(rank, cuts, axis, x.ndim)], library)
    m = nd.merge(normkit.moments(part, axis=axis, center=center), group)
    assert type(m.count) is type(part)
    return [None if a is None else np.asarray(a) for a in (m.count, m.mean, m.m2, m.mean_low)]


def in_pairs(parts):
    """Neighbors are merged first, and what they give again."""
    while len(parts) > 1:
        parts = [normkit.merge(parts[k : k + 2]) for k in range(0, len(parts), 2)]
    return parts[0]


CUTS = {"one": (0, 11), "two": (0, 4, 11), "three": (0, 1, 6, 11), "empty": (0, 0, 9, 9, 11)}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_merge(processes, cuts, dtype, center, library, rng):
    """Every process has the moments that one has who merges the parts of all, to the last bit."""
    x = uniform(rng, (3, 11, 5), dtype, offset=1e3)
    size = len(cuts) - 1
    parts = [normkit.moments(x[part_of(r, cuts, 1, 3)], axis=1, center=center) for r in range(size)]
    m = in_pairs(parts)
    for found in processes(size, "merged_in", x, cuts, 1, library, center):
        for mine, expected in zip(found, (m.count, m.mean, m.m2, m.mean_low), strict=True):
            assert mine is None if expected is None else bits(mine) == bits(expected)


def added_in(group, rank, sums, library):
    found = nd.add(as_library(sums[rank], library), group)
    assert type(found) is type(as_library(sums[rank], library))
    return np.asarray(found)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_add(processes, size, library, rng):
    sums = rng.standard_normal((size, 5, 3)) * 10.0 ** rng.integers(-8, 8, (size, 5, 3))
    in_order = sums[0]
    for more in sums[1:]:
        in_order = in_order + more
    for found in processes(size, "added_in", sums, library):
        assert bits(found) == bits(in_order)


def test_a_million_parts(rng):
    """The more parts there are, the less the statistics are off. Of any number of parts, in float32, the mean is within
    2e-7 standard deviations and rstd within 2e-7 of itself, also where parts have means of their own."""
    count, members = 10**6, 16
    x = rng.standard_normal((count, members)).astype(np.float32) + np.float32(10)
    x[::2] += np.linspace(-3, 3, count // 2, dtype=np.float32)[:, None]
    own = normkit.moments(x, axis=1)
    for parts in (1, 2, 10, 1000, 10**5 + 1, count):
        whole = nd._joined(own._numbers[:parts], own._memory, False)
        wide = x[:parts].astype(np.float64)
        mean, var = wide.mean(), wide.var()
        assert whole[2] == parts * members
        assert abs(whole[0] - mean) <= 2e-7 * np.sqrt(var)
        assert abs(np.sqrt(parts * members * var / whole[1]) - 1) <= 2e-7


def as_on_a_gpu_in(group, rank, numbers):
    """What arrays of a GPU go through: tensors that stay such, with the rule of a merge in PyTorch's words."""
    parts = nd._gathered(torch.from_numpy(numbers[rank]), group, "numbers")
    assert torch.equal(parts, torch.from_numpy(numbers[: len(parts)]))
    return nd._joined(parts, _cuda.Device(torch, 0, 0), True).numpy()


def test_tensors_of_a_gpu_stay_tensors(processes, rng):
    x = rng.standard_normal((3, 5, 7)) + 1e8
    m = [normkit.moments(part, axis=1) for part in x]
    expected, numbers = in_pairs(m), np.stack([part._numbers for part in m])
    for found in processes(3, "as_on_a_gpu_in", numbers):
        # The rule is the core's, which rounds a product and a sum at once: of numbers of order 1, and of m2.
        np.testing.assert_allclose(found, expected._numbers, rtol=8 * bounds.DOUBLE, atol=8 * bounds.DOUBLE)


def refused_in(group, rank, shapes, centered):
    m = normkit.moments(np.ones(shapes[rank]), axis=-1, center=centered[rank])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^process 0 has moments of shape .*, process 1 has moments of shape"):
            nd.merge(m, group)
    with pytest.raises(ValueError, match=r"^process 0 has sums of shape .*, process 1 has sums of shape"):
        nd.add(np.ones(shapes[rank]), group)


def test_what_does_not_go_together_is_an_error_in_all_processes(processes):
    processes(3, "refused_in", [(3, 2), (4, 2), (3, 2)], [True] * 3)
    processes(2, "refused_in", [(1, 2), (1, 1, 2)], [True, False])
    with pytest.raises(TypeError, match=r"^moments is 3, expected Moments"):
        nd.merge(3, None)


# ---- every normalization of a sample, or of a batch, in parts ----------------------------------------------------

SHAPE = (4, 6, 11, 5)
# An operation, the axis that is cut, and the axis of its weight that is cut with it.
SPLIT = {
    "batch": ("batch", 0, None),
    "batch-last": ("batch-last", 0, None),
    "batch-in-space": ("batch", 2, None),
    "instance": ("instance", 2, None),
    "instance-last": ("instance-last", 2, None),
    "group": ("group", 2, None),
    "group-last": ("group-last", 2, None),
    "layer": ("layer", 3, 0),
    "layer-outer": ("layer-outer", 0, 0),
    "rms": ("rms", 3, 0),
}
PARTS = {"two": (0.6,), "three": (0.2, 0.8), "four-two-empty": (0, 0.7, 0.7)}


def cut(extent, at):
    return (0, *(round(f * extent) for f in at), extent)


def part_in(group, rank, name, cuts, x, dy, weight, bias, options):
    op, axis, of_weight = SPLIT[name]
    op, part = OPERATIONS[op], part_of(rank, cuts, axis, x.ndim)
    own = part_of(rank, cuts, of_weight, weight.ndim) if of_weight is not None else ...
    tensors = (x[part], weight[own], bias[own])
    x, weight, bias = (torch.from_numpy(np.ascontiguousarray(t)).requires_grad_() for t in tensors)
    given = op.options(x.shape) | op.forward_options | options
    function, groups = getattr(nt, op.function), op.arguments(x.shape)
    y = function(x, *groups, weight, *[bias] * (op.function != "rms_norm"), **given, process_group=group)
    y.backward(torch.from_numpy(np.ascontiguousarray(dy[part])))
    assert y.stride() == torch.empty_like(x).stride() or not x.numel()
    return [None if t is None else t.detach().numpy() for t in (y, x.grad, weight.grad, bias.grad)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("activation", [None, "silu", ("leaky_relu", 0.2)], ids=name_of)
@pytest.mark.parametrize("offset", [0.25, 100])
@pytest.mark.parametrize("name", SPLIT)
def test_parts_are_normalized_as_a_whole(processes, name, offset, activation, dtype, parts, rng):
    """y, dx and the sums of the gradients of parameters keep the bounds of the whole."""
    op, axis, of_weight = SPLIT[name]
    op, cuts = OPERATIONS[op], cut(SHAPE[axis], PARTS[parts])
    x, dy = uniform(rng, SHAPE, dtype, offset=offset), uniform(rng, SHAPE, dtype)
    weight, bias = (uniform(rng, op.weight_shape(SHAPE, "channel"), compute(dtype)) for _ in range(2))
    options = {"activation": activation, "weight_offset": 1.0, "eps": 1e-3}
    found = processes(len(cuts) - 1, "part_in", name, cuts, x, dy, weight, bias, options)
    y, dx = (np.concatenate(of_all, axis) for of_all in list(zip(*found, strict=True))[:2])
    has_bias = found[0][3] is not None
    meaning = {"activation": activation, "weight_offset": 1.0, "bias": bias if has_bias else None}
    f = op.reference(x, weight, eps=1e-3, **meaning)
    assert y.dtype == dx.dtype == x.dtype
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype)) <= 1
    xs = [x[part_of(rank, cuts, axis, 4)] for rank in range(len(cuts) - 1)]
    seen = [(p.reshape(op.blocks(p.shape)), op.reduced(p.shape)) for p in xs]
    m = in_pairs([normkit.moments(p, axis=reduced, center=op.center) for p, reduced in seen])
    b = op.reference_backward(dy, x, m.mean, m.rstd(1e-3), weight, **meaning)
    assert bounds.excess(dx.reshape(b.dx.shape), b.dx, bounds.dx(b, x.dtype)) <= 1
    for k, terms, bound_of in ((2, b.dweight, bounds.dweight), (3, b.dbias, bounds.dbias))[: 1 + has_bias]:
        grads = [of_one[k] for of_one in found]
        total = sum(grads) if of_weight is None else np.concatenate(grads, of_weight)
        bound = bound_of(b, x.dtype, bounds.count_of(SHAPE, weight.shape))
        # What each process adds up is rounded once or twice, and so is the sum of all.
        bound = bound + 3 * bounds.unit(x.dtype) * np.abs(terms)
        expected, bound = (op.to_weight(t, SHAPE, weight) for t in (terms, bound))
        assert bounds.excess(total, expected, bound) <= 1


# ---- options, and gradients of gradients -------------------------------------------------------------------------

# Of normkit.torch, on x of the shape (4, 6, 11, 5): arguments, options, the shape of weights and the axis that is cut.
CALLS = {
    "batch": ("batch_norm", (), {"training": True}, (6,), 0),
    "instance": ("instance_norm", (), {}, (6,), 2),
    "instance-images": ("instance_norm", (), {}, (4, 6), 3),
    "instance-last": ("instance_norm", (), {"channel_axis": -1}, (5,), 2),
    "group": ("group_norm", (3,), {}, (6,), 2),
    "layer": ("layer_norm", (), {"axis": 2}, None, 2),
    "rms": ("rms_norm", (), {"axis": (1, 2), "eps": 0.1}, None, 2),
}
OPTIONS = {
    "plain": {},
    "activation": {"activation": "silu", "weight_offset": 1.0},
    "prelu": {"activation": "slopes"},
    "masked": {"where": True},
    "residual": {"residual": True, "return_residual": True},
    "all": {"where": True, "residual": True, "activation": "gelu"},
}


def both_orders(name, options, arrays, part, group=None):
    """y, gradients, and gradients of these along `second`, of a part of x or of all of it; all by name."""
    function, args, fixed, *_ = CALLS[name]
    leaves = {k: torch.from_numpy(a).requires_grad_() for k, a in arrays["parameters"].items()}
    for k in ("x", "residual", "dy"):
        leaves[k] = torch.from_numpy(np.ascontiguousarray(arrays[k][part])).requires_grad_()
    x, dy, told = leaves["x"], leaves["dy"], fixed | options
    for option in ("where", "residual"):
        if option in told:
            told[option] = leaves["residual"] if option == "residual" else torch.from_numpy(arrays["where"][part])
    if told.get("activation") == "slopes":
        told["activation"] = ("prelu", leaves["slopes"])
    given = [leaves[k] for k in ("weight", "bias") if k in leaves]
    y = getattr(nt, function)(x, *args, *given, **told, process_group=group)
    y = y[0] + y[1] if isinstance(y, tuple) else y
    first = torch.autograd.grad((y * dy).sum(), leaves.values(), create_graph=True, allow_unused=True)
    # A penalty on the gradient of x, and on those of parameters.
    along = arrays["second"] | {k: arrays["second"][k][part] for k in ("x", "residual", "dy")}
    penalty = sum(
        (torch.from_numpy(np.ascontiguousarray(along[k])) * g).sum()
        for k, g in zip(leaves, first, strict=True)
        if g is not None
    )
    second = torch.autograd.grad(penalty, leaves.values(), allow_unused=True, materialize_grads=True)
    found = {"y": y} | {f"d_{k}": g for k, g in zip(leaves, first, strict=True) if g is not None}
    found |= {f"dd_{k}": g for k, g in zip(leaves, second, strict=True)}
    return {k: t.detach().numpy() for k, t in found.items()}


def both_orders_in(group, rank, name, options, arrays, cuts):
    return both_orders(name, options, arrays, part_of(rank, cuts, CALLS[name][4], 4), group)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_both_orders(processes, name, option, parts, rng):
    """In float64, as normkit.torch has them in one process, which its own tests hold to the truth."""
    *_, weight, axis = CALLS[name]
    cuts, draw = cut(SHAPE[axis], PARTS[parts]), rng.standard_normal
    arrays = {k: draw(SHAPE) for k in ("x", "dy", "residual")} | {"where": rng.random(SHAPE) < 0.7}
    parameters = {} if weight is None else {"weight": draw(weight), "bias": draw(weight)}
    if option == "prelu":
        parameters["slopes"] = draw(weight or ())
    arrays["parameters"] = parameters
    arrays["second"] = {k: draw(np.shape(a)) for k, a in {**parameters, "x": arrays["x"]}.items()}
    arrays["second"] |= {k: draw(SHAPE) for k in ("residual", "dy")}
    expected = both_orders(name, OPTIONS[option], arrays, ...)
    found = processes(len(cuts) - 1, "both_orders_in", name, OPTIONS[option], arrays, cuts)
    for k, truth in expected.items():
        mine = [of_one[k] for of_one in found]
        total = sum(mine) if k.rpartition("_")[2] in parameters else np.concatenate(mine, axis)
        close(torch.from_numpy(np.asarray(total)), torch.from_numpy(np.asarray(truth)))


def nan_in(group, rank):
    x, where = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 3, 5) < 0.7
    dy = torch.randn(x.shape, dtype=x.dtype).where(where, 0)
    for activation in (None, "relu", "silu", "prelu"):
        found = []
        for data in (x, x.masked_fill(~where, torch.nan)):
            slopes = torch.full((3,), 0.5, dtype=x.dtype)
            leaves = [t.requires_grad_() for t in (data.clone(), torch.ones(3), torch.zeros(3), slopes, dy.clone())]
            kind = ("prelu", slopes) if activation == "prelu" else activation
            y = nt.batch_norm(*leaves[:3], training=True, where=where, activation=kind, process_group=group)
            wanted = leaves[: 4 if kind != activation else 3]
            once = torch.autograd.grad(y, wanted, dy, retain_graph=True)
            firsts = torch.autograd.grad(y, wanted, leaves[4], create_graph=True)
            seconds = torch.autograd.grad(sum((g * g).sum() for g in firsts), [*wanted, leaves[4]], allow_unused=True)
            d_dy = seconds[-1]
            assert bool(d_dy[~where].isnan().all()) == bool(data.isnan().any())
            found.append([*once, *firsts, *seconds[:-1], d_dy[where]])
        for expected, gradient in zip(*found, strict=True):
            assert gradient is expected is None or torch.equal(gradient, expected)


def test_what_is_no_member_may_be_nan(processes):
    processes(2, "nan_in")


def third_in(group, rank):
    x = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(nt.instance_norm(x, process_group=group).sin().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        ddx.sum().backward()


def test_a_third_derivative_is_refused(processes):
    processes(2, "third_in")


# ---- modules -----------------------------------------------------------------------------------------------------


def steps(module, xs, dys):
    """Outputs, gradients of x, and in the end gradients of parameters and buffers."""
    found = []
    for x, dy in zip(xs, dys, strict=True):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        found.append((y.detach(), leaf.grad))
    ys, dxs = zip(*found, strict=True)
    grads = [p.grad.clone() for p in module.parameters()]
    return ys, dxs, grads, [b.clone() for b in module.buffers()]


def module_in(group, rank, kind, options, cuts, axis, xs, dys):
    torch.manual_seed(0)
    made = getattr(nt, kind)(4, **options, dtype=torch.float64, process_group=group)
    part = part_of(rank, cuts, axis, xs[0].ndim)
    tensors = [[torch.from_numpy(a[part]) for a in arrays] for arrays in (xs, dys)]
    return [[t.numpy() for t in ts] for ts in steps(made, *tensors)]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.3, "affine": False}], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "shape", "axis"),
    [
        ("BatchNorm1d", (9, 4), 0),
        ("BatchNorm1d", (9, 4, 3), 2),
        ("BatchNorm2d", (9, 4, 3, 2), 0),
        ("BatchNorm3d", (9, 4, 2, 3, 2), 0),
        ("InstanceNorm2d", (3, 4, 9, 2), 2),
        ("InstanceNorm3d", (3, 4, 2, 3, 9), 4),
    ],
)
def test_modules_are_torch_s_of_the_whole(processes, kind, shape, axis, size, options, rng):
    """Three steps of training on gloo, of which PyTorch's SyncBatchNorm takes none."""
    if kind.startswith("Instance"):
        options = options | {"track_running_stats": True, "affine": options.get("affine", True)}
    if kind.startswith("Instance") and options.get("momentum", 0) is None:
        pytest.skip("PyTorch's instance norm has no average over all batches")
    xs, dys = (rng.standard_normal((3, *shape)) + offset for offset in (2, 0))
    cuts = cut(shape[axis], (0.2, 0.6, 0.8)[: size - 1])
    theirs = steps(getattr(nn, kind)(4, **options, dtype=torch.float64), *map(list, map(torch.from_numpy, (xs, dys))))
    found = processes(size, "module_in", kind, options, cuts, axis, xs, dys)
    for k in range(2):
        for step in range(3):
            close(torch.from_numpy(np.concatenate([ours[k][step] for ours in found], axis)), theirs[k][step])
    for k, grad in enumerate(theirs[2]):
        close(torch.from_numpy(sum(ours[2][k] for ours in found)), grad)
    for k, buffer in enumerate(theirs[3]):
        for ours in found:
            close(torch.from_numpy(ours[3][k]), buffer)
            assert bits(ours[3][k]) == bits(found[0][3][k])


def edges_in(group, rank):
    # One member in all: its statistics are not learnt, and y is the bias.
    norm = nt.BatchNorm1d(3, process_group=group)
    x = torch.full((1 if rank == 1 else 0, 3), 5.0, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert not y.any()
    assert not norm.running_mean.any()
    assert bool((norm.running_var == 1).all())
    # None at all.
    assert norm(torch.empty(0, 3)).shape == (0, 3)
    assert not norm.running_mean.any()
    # By running statistics, each process for itself.
    if rank == 0:
        norm.eval()(torch.randn(2, 3))
    # No weights, and gradients of weights alone, which want no message.
    weight = torch.ones(3, requires_grad=True)
    y = nt.batch_norm(torch.full((2, 3), float(rank)), weight, training=True, process_group=group, eps=0)
    with counted() as messages:
        y.sum().backward()
    assert not messages
    close(weight.grad, torch.full((3,), 2.0 if rank == 1 else -2.0))
    assert nt.instance_norm(torch.ones(2, 3, 4, dtype=torch.float16), process_group=group).dtype == torch.float16


def errors_in(group, rank):
    """Of one process, before anything is sent, but for what the core finds after that."""
    o = {"process_group": group}
    x, four, eight = torch.ones(2, 4, 6), torch.ones(4), torch.ones(8)

    def learning(mean, var):
        nt.instance_norm(x, running_mean=mean, running_var=var, **o)

    for error, message, call in (
        (ValueError, r"x has shape \(2, 4\), expected at least 3 axes", lambda: nt.instance_norm(x[..., 0], **o)),
        (ValueError, r"weight has shape \(8,\), expected \(4,\), \(2, 4\) or", lambda: nt.group_norm(x, 2, eight, **o)),
        (ValueError, r"weight has shape .*, expected \(4,\), ", lambda: nt.instance_norm(x, x[..., :2], **o)),
        (ValueError, r"num_groups is 3, expected a divisor of 4", lambda: nt.group_norm(x, 3, **o)),
        (ValueError, r"eps is -1", lambda: nt.layer_norm(x, eps=-1, **o)),
        (ValueError, r"running_var is None", lambda: nt.batch_norm(x, running_mean=four, training=True, **o)),
        (ValueError, r"running_mean has shape \(8,\)", lambda: learning(eight, eight.clone())),
        (TypeError, r"running_mean has dtype int32", lambda: learning(four.int(), four)),
        (ValueError, r"running_mean overlaps running_var", lambda: learning(four, four[:])),
        (TypeError, r"residual has dtype float64", lambda: nt.instance_norm(x, residual=x.double(), **o)),
        (ValueError, r"residual has shape \(1, 4, 6\)", lambda: nt.instance_norm(x, residual=x[:1], **o)),
        (ValueError, r"where has shape \(5,\)", lambda: nt.instance_norm(x, where=eight[:5] > 0, **o)),
        (TypeError, r"comm is -100, expected a communicator", lambda: nt.instance_norm(x, process_group=-100)),
        (ValueError, r"momentum is 2", lambda: nt.instance_norm(x, momentum=2, **o)),
        (ValueError, r"activation is 'a'", lambda: nt.instance_norm(x, activation="a", **o)),
        (TypeError, r"x is int, expected a torch.Tensor", lambda: nt.instance_norm(3, **o)),
        (np.exceptions.AxisError, r"axis is 3, expected -3 to 2", lambda: nt.rms_norm(x, axis=3, **o)),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


def test_edges(processes):
    processes(2, "edges_in")


def test_errors(processes):
    processes(2, "errors_in")


class counted:  # noqa: N801 - a context
    """The messages of torch.distributed, as (name, bytes that this process sends)."""

    def __enter__(self):
        self.found, self.before = [], {}
        for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast", "reduce", "barrier"):
            self.before[name] = function = getattr(distributed, name)

            def call(*args, function=function, name=name, **options):
                tensor = args[-1]
                self.found.append((name, tensor.numel() * tensor.element_size()))
                return function(*args, **options)

            setattr(distributed, name, call)
        return self.found

    def __exit__(self, *_):
        for name, function in self.before.items():
            setattr(distributed, name, function)


def without_checks(messages, first):
    """The first message of a shape may have a check in front of it."""
    return messages[messages[:1] == [("all_gather", 128)] :] if first else messages


def messages_in(group, rank, name):
    module, x, statistics = {
        "batch": (nt.BatchNorm2d(4), torch.randn(3, 4, 5, 6), 4),
        "instance": (nt.InstanceNorm2d(4, affine=True, track_running_stats=True), torch.randn(3, 4, 5, 6), 12),
        "group": (nt.GroupNorm(2, 4, activation="silu"), torch.randn(3, 4, 5, 6), 6),
        "layer": (nt.LayerNorm((4, 5, 6)), torch.randn(3, 4, 5, 6), 3),
    }[name]
    module.process_group, x = group, x.requires_grad_()
    for first in (True, False):
        with counted() as forward:
            y = module(x)
        with counted() as backward:
            (dx,) = torch.autograd.grad((y * torch.ones_like(y).cumsum(-1)).sum(), x, create_graph=True)
        with counted() as double:
            dx.sin().sum().backward()
        assert without_checks(forward, first) == [("all_gather", 8 + 32 * statistics)]
        assert without_checks(backward, first) == [("all_gather", 8 + 24 * statistics)]
        # What an activation makes of y is differentiated once more, and goes back through the norm.
        again = [("all_gather", 8 + 24 * statistics)] * (module.activation is not None)
        assert without_checks(double, first) == [("all_gather", 8 + 56 * statistics), *again]


@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer"])
def test_one_message_a_layer_each_way(processes, name):
    """And one more in front of the first of each shape."""
    processes(3, "messages_in", name)


# ---- training ----------------------------------------------------------------------------------------------------


def network(split, process_group=None):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 1, 1),
    ).double()  # fmt: skip
    done = nt.convert(made, process_group=process_group, split=split)
    assert done.synchronized == ([] if process_group is None else ["1"] if split == "batch" else ["1", "4", "6"])
    return made


def trained(model, xs, targets, scale):
    """The state after 50 steps, of a loss that is a sum over all elements times `scale`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for k in range(50):
        optimizer.zero_grad()
        loss = ((model(xs[k % len(xs)]) - targets[k % len(xs)]) ** 2).sum() * scale
        loss.backward()
        optimizer.step()
    return {name: t.numpy() for name, t in model.state_dict().items()}


def trained_in(group, rank, split, cuts, axis, xs, targets, synchronized):
    part = (slice(None), *part_of(rank, cuts, axis, 4))
    made = network(split, group if synchronized else None)
    model = nn.parallel.DistributedDataParallel(made, process_group=group)
    # DDP averages gradients over the processes: the scale makes the sum of it that all have in one process.
    scale = distributed.get_world_size(group) / targets[0].size
    found = trained(model, *(torch.from_numpy(a[part]) for a in (xs, targets)), scale)
    return {name.removeprefix("module."): array for name, array in found.items()}


@pytest.mark.parametrize(("split", "axis"), [("batch", 0), ("space", 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_training_stays_together_with_one_process(processes, split, axis, size, rng):
    """50 steps under DDP. In float64 a step is off by some roundings of numbers of order 1, which later steps carry
    on: descent makes the most of them by a small factor, for which there are four digits."""
    xs, targets = rng.standard_normal((3, 4, 2, 7, 5)), rng.standard_normal((3, 4, 1, 7, 5))
    whole = trained(network(split), torch.from_numpy(xs), torch.from_numpy(targets), 1 / targets[0].size)
    cuts = cut(xs.shape[1 + axis], [0.25, 0.5, 0.75] if size == 4 else [0.25])
    found = processes(size, "trained_in", split, cuts, axis, xs, targets, True)
    apart = processes(size, "trained_in", split, cuts, axis, xs, targets, False)[0]
    for name, expected in whole.items():
        assert all(bits(of_one[name]) == bits(found[0][name]) for of_one in found)
        np.testing.assert_allclose(found[0][name], expected, rtol=1e-10, atol=1e-10)
    assert np.abs(apart["0.weight"] - whole["0.weight"]).max() > 1e-3  # DDP alone is not enough


# ---- convert -----------------------------------------------------------------------------------------------------


def converted_in(group, rank):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.BatchNorm1d(4), nn.InstanceNorm1d(4), nn.GroupNorm(2, 4), nn.ReLU(), nn.LayerNorm((4, 6)), nn.LayerNorm(6)
    ).double()
    before = copy.deepcopy(made)
    done = nt.convert(made, process_group=group)
    assert done.synchronized == ["0"]
    assert [m.process_group for m in (made[0], made[1], made[2], made[4])] == [group, None, None, None]
    again = nt.convert(made, process_group=group, split="space")
    assert not again.converted
    assert again.synchronized == ["0", "1", "2"]
    assert again.left == {"4": "its parameters have the shape of whole samples"}
    assert "0: over all processes" in str(again)
    again.undo()
    assert made[2].process_group is None
    assert made[0].process_group is group
    # Copies are over the same processes, also those that have been in a file.
    saved = io.BytesIO()
    torch.save(made, saved)
    saved.seek(0)
    x = torch.randn(3 + rank, 4, 6, dtype=torch.float64)
    ys = [m.train()(x) for m in (made, copy.deepcopy(made), torch.load(saved, weights_only=False))]
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(ys[0], ys[2])
    assert not torch.allclose(made[0](x), before[0](x), rtol=1e-3)
    assert repr(made[0]).endswith(f", process_group={group.group_name!r})")
    assert torch.equal(torch.compile(made, backend="eager")(x), made(x))  # a call breaks the graph
    done.undo()
    assert repr(made) == repr(before)
    with pytest.raises(ValueError, match=r"^split is 'time', expected 'batch' or 'space'"):
        nt.convert(made, process_group=group, split="time")


def test_convert(processes):
    processes(2, "converted_in")


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def unlike_in(group, rank):
    with pytest.raises(ValueError, match=r"process 0 has moments of shape \(2, 8\).*, process 1 has .* \(2, 9\)"):
        nt.instance_norm(torch.ones(2, 8 + rank, 5), process_group=group)


def test_another_shape_is_an_error_in_all_processes(processes):
    processes(2, "unlike_in")


def renewed_in(group, rank):
    """As many bytes are sent by who asks whether a new shape is that of all, and by who knows another shape."""
    own = distributed.new_group([0, 1])  # which knows no shape yet
    normkit.distributed.add(np.ones((5, 3)), own)
    said = (
        r"process 0 has sums of shape \(6, 3\), process 1 has numbers of another call, expected the same",
        r"another process has something else than sums of shape \(5, 3\), expected the same",
    )
    with pytest.raises(ValueError, match=said[rank]):
        normkit.distributed.add(np.ones((5 + (rank == 0), 3)), own)


def test_a_new_shape_beside_a_known_one_is_an_error_too(processes):
    processes(2, "renewed_in")


def ending_in(group, rank, other):
    """Process 1 dies. 2 and 3 have agreed on two shapes, and each comes with one of them."""
    pairs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    own = pairs[rank // 2]
    for shape in ((2, 3), other):
        nt.instance_norm(torch.ones(*shape, 5), process_group=own)
    if rank == 1:
        os._exit(7)
    nt.instance_norm(torch.ones(*(other if rank == 3 else (2, 3)), 5), process_group=own)


@pytest.mark.parametrize("other", [(3, 2), (2, 4)], ids=["as-many", "more"])
def test_all_end_where_one_is_dead_or_changes_its_shape(other, tmp_path):
    """Of as many statistics both find a mark that they do not know. Of more, gloo ends who has no room for them, and
    the other one finds the mark or a broken connection, whichever comes first."""
    pool = Processes(__name__, 4, tmp_path)
    try:
        first, dead, *both = pool.outcomes(4, "ending_in", other)
        assert "RuntimeError" in first
        assert dead == "ended with 7"
        assert all(isinstance(outcome, str) and outcome != "gave no answer" for outcome in both)
        if other == (3, 2):
            for outcome, shape in zip(both, ("(2, 3)", "(3, 2)"), strict=True):
                assert f"another process has something else than moments of shape {shape}" in outcome
    finally:
        pool.close()


def asleep_in(group, rank):
    short = distributed.new_group([0, 1], timeout=datetime.timedelta(seconds=3))
    if rank == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            nt.instance_norm(torch.ones(2, 3, 5), process_group=short)


def test_an_error_ends_waiting_for_who_does_not_call(processes):
    processes(SIZE, "asleep_in")


# ---- MPI ---------------------------------------------------------------------------------------------------------


def by_mpi(size, script, *args):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    given = [mpiexec, "-n", str(size), sys.executable, script, *args]
    env = os.environ | {"NORMKIT_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(given, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize(("size", "args"), [(1, ()), (2, ("torch",)), (4, ())], ids=["1", "2-torch", "4"])
def test_mpi(size, args):
    """The script asserts, in every process."""
    found = by_mpi(size, str(Path(__file__).with_name("on_mpi.py")), *args)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("done") == size


def test_mpi_aborts_where_a_process_is_dead():
    found = by_mpi(2, str(Path(__file__).with_name("on_mpi.py")), "dead")
    assert found.returncode != 0
    assert "done" not in found.stdout
