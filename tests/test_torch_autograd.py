"""normkit.torch's functions: what normkit gives to the last bit, and gradients that PyTorch records, twice.

What the kernels give is judged elsewhere: here a function has to be normkit's own of the same name, and its gradients
those of the backward beside it. Derivatives of both orders are compared with differences of values in float64.
"""

import contextlib
import gc
import subprocess
import sys
import warnings

import normkit
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nt = pytest.importorskip("normkit.torch")
pytest.importorskip("expecttest", reason="PyTorch's own samples want expecttest")
import recorded  # noqa: E402
from recorded import CASES, OPTIONS, PARAMS, SHAPE, SOME  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

F = torch.nn.functional


def running(x):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return {name: torch.tensor(values, dtype=dtype) for name, values in recorded.RUNNING.items()}


DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
LAYOUTS = {
    "dense": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cropped": lambda t: F.pad(t, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


EACH = pytest.mark.parametrize(("case", "options"), SOME)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def uniform(*shape, dtype=torch.float64):
    return (4 * torch.rand(shape, dtype=torch.float64) - 2).to(dtype)


def made(case, options, params="both", dtype=torch.float64, layout="dense"):
    """The tensors that require grad, by name, and a function of them: the call."""
    arrange = LAYOUTS[layout]
    tensors = {"x": arrange(uniform(*SHAPE, dtype=dtype) + 1)}
    for name, is_there in zip(("weight", "bias"), PARAMS[params], strict=True):
        if is_there:
            tensors[name] = uniform(*case.weight, dtype=dtype)
    told = dict(options)
    if told.pop("residual", False):
        tensors["residual"] = arrange(uniform(*SHAPE, dtype=dtype))
    if told.get("activation") == "slopes":
        tensors["slopes"] = uniform(*case.weight, dtype=dtype)
    if told.pop("where", False):
        told["where"] = torch.rand(2, 1, 3, 5) < 0.7
    tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}

    def call(*values):
        named = dict(zip(tensors, values, strict=True))
        slopes = {"activation": ("prelu", named.pop("slopes"))} if "slopes" in named else {}
        return getattr(nt, case.name)(**named, **case.told(running(named["x"])), **told | slopes)

    return tensors, told, call


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def plain(tensors):
    return {name: t.detach() for name, t in tensors.items()}


def by_normkit(case, tensors, told, dys):
    """Of tensors that do not require grad."""
    ys, gradients = recorded.by_normkit(case, plain(tensors), told, dys, running(tensors["x"]))
    return ys, [*gradients.values()]


def same_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert torch.equal(a, b), (a - b).abs().max()


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_is_normkit_to_the_last_bit(case, options, params, dtype, layout):
    """y and the gradients of all inputs, with their dtypes and strides."""
    case = CASES[case]
    tensors, told, call = made(case, OPTIONS[options], params, DTYPES[dtype], layout)
    ys = as_tuple(call(*tensors.values()))
    dys = [uniform(*SHAPE, dtype=DTYPES[dtype]) for _ in ys]
    gradients = torch.autograd.grad(ys, tensors.values(), dys)
    expected, of_normkit = by_normkit(case, tensors, told, dys)
    same_bits(ys, expected)
    cast = [g.to(t.dtype) for g, t in zip(of_normkit, tensors.values(), strict=True)]  # autograd rounds dbias so
    same_bits(gradients, cast)
    assert all(y.requires_grad for y in ys)
    with torch.no_grad():
        same_bits(as_tuple(call(*tensors.values())), expected)


def test_adaptive_is_normkit_to_the_last_bit():
    content, style = uniform(3, 4, 6).requires_grad_(), uniform(3, 4, 5).requires_grad_()
    y = nt.adaptive_instance_norm(content, style, activation="silu")
    expected, mean, rstd = normkit.adaptive_instance_norm(
        content.detach(), style.detach(), activation="silu", return_stats=True
    )
    assert torch.equal(y, expected)
    dy = uniform(3, 4, 6)
    found = torch.autograd.grad(y, (content, style), dy)
    dcontent, dstyle = normkit.adaptive_instance_norm_backward(
        dy, content.detach(), style.detach(), mean, rstd, activation="silu"
    )
    assert torch.equal(found[0], dcontent)
    # That of style is an instance norm here, whose mean and rstd are rounded from the same moments: a few operations.
    assert float((found[1] - dstyle).abs().max()) <= 64 * 2.0**-53 * float(dstyle.abs().max() + dy.abs().sum())


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_follow(training):
    x = uniform(*SHAPE).requires_grad_()
    ours, theirs = running(x), running(x)
    version = ours["running_mean"]._version
    nt.batch_norm(x, **ours, training=training)
    F.batch_norm(x.detach(), *theirs.values(), training=training)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert (ours["running_mean"]._version > version) == training


@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "instance_norm", "batch_norm", "rms_norm"])
def test_samples_of_pytorch(name):
    """The samples by which PyTorch tests its own operators, in float64: values and gradients."""

    def layer(x, shape, weight=None, bias=None, eps=1e-5):
        return nt.layer_norm(x, weight, bias, axis=range(-len(shape), 0), eps=eps)

    def rms(x, shape, weight=None, eps=None):
        return nt.rms_norm(x, weight, axis=tuple(range(-len(shape), 0)), eps=eps)

    def group(x, groups, **options):
        return nt.group_norm(x, groups, **options)

    def instance(x, **options):
        return nt.instance_norm(x, **options)

    def batch(x, running_mean, running_var, weight=None, bias=None, **options):
        return nt.batch_norm(x, weight, bias, running_mean=running_mean, running_var=running_var, **options)

    ours = {f.__name__: f for f in (layer, rms, group, instance, batch)}[name.removesuffix("_norm")]
    (info,) = (op for op in op_db if op.name == f"nn.functional.{name}" and not op.variant_test_name)
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        if min(v for v in (*sample.args, *sample.kwargs.values(), 0) if isinstance(v, int | float)) < 0:
            with pytest.raises(ValueError, match=r"eps is -|momentum is -"):  # which PyTorch takes
                ours(sample.input, *sample.args, **sample.kwargs)
            continue

        def copies(sample=sample):
            return [t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
                    for t in (sample.input, *sample.args)], {
                        k: t.detach().clone().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t
                        for k, t in sample.kwargs.items()}  # fmt: skip

        if sample.input.dim() < 2 and name == "batch_norm":
            with pytest.raises(ValueError, match="x has 1 axis, expected at least 2"):  # to PyTorch these are channels
                ours(sample.input, *sample.args, **sample.kwargs)
            continue
        results = []
        for function in (getattr(F, name), ours):
            args, options = copies()
            y = function(*args, **options)
            leaves = [t for t in (*args, *options.values()) if torch.is_tensor(t) and t.requires_grad]
            dy = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
            gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
            buffers = [t for t in (*args, *options.values()) if torch.is_tensor(t) and not t.requires_grad]
            results.append([y.detach(), *gradients, *buffers])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                # Both are right to some hundred roundings of values of order 1, but for rstd up to 1 / sqrt(eps).
                scale = float(b.abs().max()) if b.numel() else 0.0
                torch.testing.assert_close(a, b, rtol=0, atol=2.0**-53 * 4096 * (1 + scale), equal_nan=True)
        count += 1
    assert count > 3


# ---- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_both_orders(case, options, params, layout):
    tensors, _, call = made(CASES[case], OPTIONS[options], params, layout=layout)
    assert torch.autograd.gradcheck(call, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("activation", [
    "relu", ("leaky_relu", 0.2), "silu", "gelu", "gelu_tanh", ("elu", 0.7), "sigmoid", "tanh", "relu6", "hardswish",
    "mish", "softplus", ("prelu", 0.3), ("prelu", torch.tensor([0.3], dtype=torch.float64)),
], ids=str)  # fmt: skip
def test_every_activation_has_derivatives_of_both_orders(activation):
    x, weight = uniform(2, 3, 7).requires_grad_(), uniform(3).requires_grad_()

    def call(x, weight):
        return nt.instance_norm(x, weight, activation=activation)

    assert torch.autograd.gradcheck(call, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, weight), fast_mode=True)


@pytest.mark.parametrize(("case", "options"), SOME)
def test_second_derivatives_of_float32_are_those_of_float64(case, options):
    """In units of the largest, to 300 roundings: of five sums one inside the other, of at most 60 terms each."""

    tensors, _, call = made(CASES[case], OPTIONS[options], dtype=torch.float32)
    count = len(as_tuple(call(*tensors.values())))
    values = [*tensors.values(), *(uniform(*SHAPE, dtype=torch.float32) for _ in range(count))]

    def second(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in values]
        given, dys = leaves[: len(tensors)], leaves[len(tensors) :]
        first = torch.autograd.grad(as_tuple(call(*given)), given, dys, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)

    for found, exact in zip(second(torch.float32), second(torch.float64), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 300 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("options", ["activation", "parametrized", "prelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_derivatives_of_half_types_are_rounded_once(dtype, options):
    """What lies between the normalization and its activation is float32; the bound is float32's, and one rounding."""
    tensors, _, call = made(CASES["instance"], OPTIONS[options] | {"where": True}, dtype=dtype)
    dy, *seconds = (uniform(*t.shape, dtype=dtype) for t in (tensors["x"], *tensors.values()))

    def second(dtype):
        *given, dy_ = leaves = [t.detach().to(dtype).requires_grad_() for t in (*tensors.values(), dy)]
        first = torch.autograd.grad(call(*given), given, dy_, create_graph=True)
        return torch.autograd.grad(first, leaves, [t.to(dtype) for t in seconds], materialize_grads=True)

    for found, exact in zip(second(dtype), second(torch.float64), strict=True):
        assert found.dtype == dtype
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 300 * 2**-24 * exact.abs().max()
        assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.parametrize("images", [3, 1])
def test_adaptive_has_derivatives_of_both_orders(images):
    content, style = uniform(3, 2, 4).requires_grad_(), uniform(images, 2, 5).requires_grad_()
    for options in ({}, {"activation": "tanh"}):

        def call(content, style, options=options):
            return nt.adaptive_instance_norm(content, style, **options)

        assert torch.autograd.gradcheck(call, (content, style))
        assert torch.autograd.gradgradcheck(call, (content, style))


def test_derivatives_with_weights_of_each_image_and_a_bias_of_none():
    """The parameters of instance norm may have different shapes, on which their gradients' gradients depend."""
    x, weight, bias = (uniform(*shape).requires_grad_() for shape in ((2, 3, 5), (2, 3), (3,)))
    assert torch.autograd.gradgradcheck(nt.instance_norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: nt.instance_norm(x, None, bias), (x, weight))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "prelu"])
@pytest.mark.parametrize("bias", [(4,), (2, 4)], ids=["by the core", "by PyTorch"])  # of the shape of weight or another
def test_what_is_no_member_may_be_nan(bias, activation, value):
    """Where no gradient reaches it: both orders have the bits that they have beside a number, but for its own d_dy."""
    x, where = uniform(*SHAPE), torch.rand(SHAPE) < 0.7
    others = [uniform(4), uniform(*bias), uniform(4), uniform(*SHAPE).where(where, 0)]
    found = []
    for data in (x, x.masked_fill(~where, value)):
        *tensors, slopes, dy = leaves = [t.clone().requires_grad_() for t in (data, *others)]
        kind = ("prelu", slopes) if activation == "prelu" else activation
        y = nt.instance_norm(*tensors, where=where, activation=kind)
        firsts = torch.autograd.grad(y, leaves[: 4 if kind != activation else 3], dy, create_graph=True)
        *seconds, d_dy = torch.autograd.grad(sum((g * g).sum() for g in firsts), leaves, allow_unused=True)
        assert bool(d_dy[~where].isfinite().any()) == (data is x)
        found.append([*firsts, *seconds, d_dy[where]])
    for expected, gradient in zip(*found, strict=True):
        assert gradient is expected is None or torch.equal(gradient, expected)


def test_a_mask_without_members_has_gradients_of_gradients_that_are_no_nan():
    x = uniform(2, 3, 5).requires_grad_()
    where = torch.ones(2, 3, 5, dtype=torch.bool)
    where[0, 1] = False
    (dx,) = torch.autograd.grad((nt.instance_norm(x, where=where) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((dx**2).sum(), x)
    assert bool(torch.isfinite(second).all())
    assert bool((second[0, 1] == 0).all())
    assert bool((second[1] != 0).any())


def test_a_third_derivative_is_refused():
    x = uniform(2, 3, 5).requires_grad_()
    (dx,) = torch.autograd.grad((nt.instance_norm(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((dx**2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice, and a third derivative was asked for"):
        torch.autograd.grad(second.sum(), x)


def test_forward_mode_is_refused_not_wrong():
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own modules, on their way
            x = forward_ad.make_dual(uniform(2, 3, 5), uniform(2, 3, 5))
        with pytest.raises(NotImplementedError, match="jvp"):
            nt.instance_norm(x)


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_saved(residual, activation):
    """x, or the sum that was normalized; statistics; weight, and bias where an activation depends on it. No copies."""
    x, weight, bias = uniform(*SHAPE).requires_grad_(), uniform(4).requires_grad_(), uniform(4).requires_grad_()
    saved = []
    more = {"residual": uniform(*SHAPE), "return_residual": True} if residual else {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = nt.instance_norm(x, weight, bias, activation=activation, **more)
    normalized, *others = saved
    assert normalized.data_ptr() == (found[1] if residual else x).data_ptr()
    expected = [weight.data_ptr(), bias.data_ptr()] if activation else [weight.data_ptr()]
    *params, mean, rstd = others
    assert [t.data_ptr() for t in params] == expected
    assert mean.shape == rstd.shape == (2, 4)


def test_changing_what_is_saved_is_noticed():
    x, weight = uniform(*SHAPE).requires_grad_(), uniform(4).requires_grad_()
    y = nt.instance_norm(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


PEAK = """
import resource, sys, torch
import normkit.torch as nt
torch.set_num_threads(1)
F = torch.nn.functional
x = torch.randn(32, 64, 64, 64, requires_grad=True)  # 32 MB
weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
function = {
    "ours": lambda: nt.group_norm(x, 8, weight, bias),
    "theirs": lambda: F.group_norm(x, 8, weight, bias),
}[sys.argv[1]]
for _ in range(4):
    y = function()
    y.backward(y.detach())
    x.grad = y = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_peak_memory_is_that_of_pytorch():
    """In units of x, of 32 MB: two runs of one process differ by far less than a quarter of it."""
    ours, theirs = (
        int(subprocess.run([sys.executable, "-c", PEAK, who], check=True, capture_output=True, text=True).stdout)
        for who in ("ours", "theirs")
    )
    assert (ours - theirs) * 1024 < 0.25 * 32 * 2**20


def test_nothing_is_kept():
    """A thousand steps make no tensor and no object that stays."""
    x, weight, bias = uniform(*SHAPE).requires_grad_(), uniform(4).requires_grad_(), uniform(4).requires_grad_()

    def step():
        y = nt.group_norm(x, 2, weight, bias, activation="silu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        x.grad = weight.grad = bias.grad = None

    def count():
        gc.collect()
        return len(gc.get_objects()), sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for _ in range(10):
        step()
    before = count()
    for _ in range(1000):
        step()
    after = count()
    assert after[1] == before[1]
    assert after[0] - before[0] < 100  # caches of others may grow by a few objects; a thousand steps did not


# ---- transforms --------------------------------------------------------------------------------------------------


def every_option(case, options):
    tensors, _, call = made(CASES[case], OPTIONS[options])
    return list(tensors.values()), call


def loss(call):
    return lambda *tensors: sum((y * y).sum() for y in as_tuple(call(*tensors)))


@EACH
def test_compiled_is_eager_to_the_last_bit(case, options):
    tensors, call = every_option(case, options)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own modules, on their way
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    same_bits(as_tuple(compiled), as_tuple(call(*tensors)))
    dys = [uniform(*SHAPE) for _ in as_tuple(compiled)]
    expected = torch.autograd.grad(as_tuple(call(*tensors)), tensors, dys)
    same_bits(torch.autograd.grad(as_tuple(compiled), tensors, dys), expected)


@pytest.mark.parametrize("case", CASES)
def test_exported(case):
    tensors, call = every_option(case, "all")
    module = torch.nn.Module()
    module.forward = call
    values = tuple(t.detach() for t in tensors)
    for strict in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Wrapped(call), values, strict=strict)
        assert "normkit.forward" in str(program.graph)
        same_bits(as_tuple(program.module()(*values)), as_tuple(call(*values)))


class Wrapped(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *values):
        return self.call(*values)


@pytest.mark.parametrize("records", [False, True])
def test_running_statistics_that_require_grad_are_constants(records):
    x = uniform(*SHAPE).requires_grad_(records)
    given, like = running(x), running(x)
    y = nt.batch_norm(x, **{name: t.requires_grad_() for name, t in given.items()}, training=True)
    assert torch.equal(y, nt.batch_norm(x, **like, training=True))
    for name, t in given.items():
        assert t.grad_fn is None
        assert torch.equal(t, like[name])


def test_compiled_training_updates_running_statistics():
    x = uniform(*SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(nt.batch_norm, fullgraph=True, backend="aot_eager")
    found, expected = running(x), running(x)
    y = compiled(x, **found, training=True)
    same_bits([y, *found.values()], [nt.batch_norm(x, **expected, training=True), *expected.values()])


def test_compiled_with_other_sizes():
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager", "dynamic": True}
    compiled = torch.compile(lambda x: nt.group_norm(x, 2, activation="relu"), **options)
    for shape in ((2, 4, 3, 5), (3, 6, 7, 2), (1, 2, 9, 9)):
        x = uniform(*shape)
        same_bits([compiled(x)], [nt.group_norm(x, 2, activation="relu")])


@EACH
def test_operators_pass_the_checks_of_pytorch(case, options):
    """opcheck: schema, fake kernels, gradients and dynamic shapes of each call that a backward of both orders makes."""
    tensors, call = every_option(case, options)
    with Calls() as seen:
        (dx,) = torch.autograd.grad(loss(call)(*tensors), tensors[0], create_graph=True)
        dx.square().sum().backward()
    names = {name for name, _ in seen.calls}
    assert {"forward", "backward"} <= names
    has_double = OPTIONS[options].get("activation") != "slopes"  # those of prelu are by PyTorch
    assert ("double_backward" in names) == has_double
    for name, args in seen.calls:
        checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        if name == "double_backward":  # it has no gradient
            args = tuple(t.detach() if torch.is_tensor(t) else t for t in args)
        else:
            checks.append("test_autograd_registration")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.library.opcheck(getattr(torch.ops.normkit, name).default, args, test_utils=checks)


def copied(value):
    if not torch.is_tensor(value):
        return value
    return value.detach().clone().requires_grad_(value.dtype.is_floating_point)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the calls of normkit's operators, which a mode of dispatch sees."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "normkit":
            self.calls.append((func._opname, tuple(copied(t) for t in args)))
        return func(*args, **kwargs or {})


@EACH
def test_gradients_of_torch_func(case, options):
    tensors, call = every_option(case, options)
    every = tuple(range(len(tensors)))
    values = [t.detach() for t in tensors]
    found = torch.func.grad(loss(call), argnums=every)(*values)
    same_bits(found, torch.autograd.grad(loss(call)(*tensors), tensors))

    def penalty(*tensors):
        return sum((g * g).sum() for g in torch.func.grad(loss(call), argnums=every)(*tensors))

    found = torch.func.grad(penalty, argnums=every)(*values)
    first = torch.autograd.grad(loss(call)(*tensors), tensors, create_graph=True)
    expected = torch.autograd.grad(sum((g * g).sum() for g in first), tensors, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max() + 1))  # sums in another order


@EACH
def test_vmap_is_a_loop_without_a_loop(case, options):
    """Over x with shared weights, over both, and the gradients of each sample."""
    tensors, call = every_option(case, options)
    xs, rest = uniform(3, *SHAPE), [t.detach() for t in tensors[1:]]
    operator_calls = Calls()
    with operator_calls:
        found = torch.func.vmap(call, in_dims=(0, *(None for _ in rest)))(xs, *rest)
    assert len(operator_calls.calls) == 1
    looped = [as_tuple(call(x, *rest)) for x in xs]
    for k, y in enumerate(as_tuple(found)):
        torch.testing.assert_close(y, torch.stack([ys[k] for ys in looped]), rtol=1e-13, atol=1e-13)

    every = tuple(range(len(tensors)))
    gradients = torch.func.grad(loss(call), argnums=every)
    found = torch.func.vmap(gradients, in_dims=(0, *(None for _ in rest)))(xs, *rest)
    looped = [gradients(x, *rest) for x in xs]
    for k, g in enumerate(found):
        expected = torch.stack([gs[k] for gs in looped])
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max() + 1))

    if not rest:
        return
    each = [uniform(3, *t.shape) for t in rest]
    found = torch.func.vmap(call)(xs, *each)
    looped = [as_tuple(call(*values)) for values in zip(xs, *each, strict=True)]
    for k, y in enumerate(as_tuple(found)):
        torch.testing.assert_close(y, torch.stack([ys[k] for ys in looped]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("axes", [(0, None), (0, 1), (None, 0)], ids=str)
@pytest.mark.parametrize(
    ("name", "weight", "channel_axis"),
    [("instance_norm", (2, 4), 1), ("instance_norm", SHAPE, 1), ("batch_norm", (4,), 1), ("batch_norm", (2,), 0)],
)
def test_vmap_by_fixed_statistics(name, weight, channel_axis, axes):
    """Parameters of each image too, shared by the samples or not, and with them a mask and a residual."""
    option = "training" if name == "batch_norm" else "use_input_stats"
    fixed = {"running_mean": uniform(SHAPE[channel_axis]), "running_var": torch.rand(SHAPE[channel_axis]) + 0.5}

    def call(x, weight, bias, slopes, mask):
        options = {"where": mask > 0, "residual": x, "activation": ("prelu", slopes), "channel_axis": channel_axis}
        return getattr(nt, name)(x, weight, bias, **fixed, **options, **{option: False})

    gradient = torch.func.grad(lambda *tensors: (call(*tensors) ** 2).sum(), argnums=(0, 1, 2, 3))
    over = dict(enumerate((axes[0], *[axes[1]] * 4)))
    shapes = (SHAPE, weight, weight, weight, (3, 5))
    each = [uniform(*s) if over[k] is None else uniform(*s, 3).movedim(-1, over[k]) for k, s in enumerate(shapes)]
    for function in (call, gradient):
        found = as_tuple(torch.func.vmap(function, (*over.values(),))(*each))
        samples = ((t if over[k] is None else t.select(over[k], n) for k, t in enumerate(each)) for n in range(3))
        looped = [as_tuple(function(*sample)) for sample in samples]
        for tensor, *expected in zip(found, *looped, strict=True):
            torch.testing.assert_close(tensor, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_vmap_refuses_running_statistics():
    x = uniform(3, *SHAPE)
    with pytest.raises(NotImplementedError, match="running statistics are neither updated nor mapped over by vmap"):
        torch.func.vmap(lambda t: nt.batch_norm(t, **running(x), training=True))(x)


def test_jacobians_and_batched_gradients():
    x = uniform(2, 3, 4)
    found = torch.func.jacrev(nt.instance_norm)(x)
    expected = torch.autograd.functional.jacobian(nt.instance_norm, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    y = nt.instance_norm(leaf)
    dys = torch.eye(y.numel(), dtype=y.dtype).reshape(y.numel(), *y.shape)
    looped = torch.stack([torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for dy in dys])
    torch.testing.assert_close(looped.reshape(found.shape), found, rtol=1e-12, atol=1e-12)


def test_a_graph_of_operators():
    x = uniform(*SHAPE)
    graph = make_fx(lambda x: nt.layer_norm(x, axis=(1, 2)), tracing_mode="symbolic")(x)
    assert "normkit.forward" in graph.code
    same_bits([graph(x)], [nt.layer_norm(x, axis=(1, 2))])


# ---- the manners of PyTorch --------------------------------------------------------------------------------------


@EACH
def test_shapes_alone_on_meta(case, options):
    """A model that is built where there is no memory: shapes, dtypes and strides are those of tensors with values."""

    def found():
        tensors, _, call = made(CASES[case], OPTIONS[options])
        ys, every = as_tuple(call(*tensors.values())), list(tensors.values())
        first = torch.autograd.grad(sum((y * y).sum() for y in ys), every, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), every, allow_unused=True)
        return [t if t is None else (t.shape, t.dtype, t.stride()) for t in (*ys, *first, *second)]

    with torch.device("meta"):
        on_meta = found()
    assert on_meta == found()


def test_modules_on_meta_and_what_is_refused_there():
    with torch.device("meta"):
        x, style = torch.empty(2, 3, 7), torch.empty(2, 3, 5)
        norm = nt.BatchNorm1d(3, activation="relu", process_group=0)  # nothing is sent
        assert norm(x).device == norm.eval()(x).device == norm.running_var.device == x.device
        assert nt.AdaptiveInstanceNorm()(x, style).shape == x.shape
        with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(3,\), \(2, 3\) or \(2, 3, 7\)"):
            nt.instance_norm(x, torch.ones(4))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    tensors, call = every_option("group", "all")
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    checkpoint(call, *tensors, use_reentrant=reentrant).sum().backward()
    same_bits([t.grad for t in tensors], expected)


def test_inference_mode():
    tensors, call = every_option("group", "all")
    with torch.inference_mode():
        y = call(*tensors)
        inside = nt.group_norm(y, 2)
    assert y.is_inference()
    assert inside.is_inference()
    same_bits([y], [call(*tensors).detach()])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast(device):
    """On the CPU PyTorch leaves the dtype of these to x; on CUDA layer, group and RMS norm are in float32."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    x = uniform(*SHAPE, dtype=torch.bfloat16).to(device)
    pairs = {
        "layer": (lambda: nt.layer_norm(x), lambda: F.layer_norm(x, (5,))),
        "rms": (lambda: nt.rms_norm(x), lambda: F.rms_norm(x, (5,))),
        "group": (lambda: nt.group_norm(x, 2), lambda: F.group_norm(x, 2)),
        "instance": (lambda: nt.instance_norm(x), lambda: F.instance_norm(x)),
        "batch": (lambda: nt.batch_norm(x, training=True), lambda: F.batch_norm(x, None, None, training=True)),
    }
    with torch.autocast(device):
        for ours, theirs in pairs.values():
            assert ours().dtype == theirs().dtype


def test_a_gradient_of_any_layout():
    x = uniform(*SHAPE).requires_grad_()
    for dy in (torch.ones((), dtype=torch.float64).expand(SHAPE), uniform(5, 3, 4, 2).permute(3, 2, 1, 0)):
        (found,) = torch.autograd.grad(nt.instance_norm(x), x, dy)
        (expected,) = torch.autograd.grad(nt.instance_norm(x), x, dy.contiguous())
        same_bits([found], [expected])


def test_outputs_that_are_not_used():
    """A gradient that comes by the sum alone, and one of neither."""
    x, residual = uniform(*SHAPE).requires_grad_(), uniform(*SHAPE).requires_grad_()
    y, total = nt.layer_norm(x, residual=residual, return_residual=True)
    dtotal = uniform(*SHAPE)
    for gradient in torch.autograd.grad(total, (x, residual), dtotal):
        assert torch.equal(gradient, dtotal)
    assert y.requires_grad


def test_leaves_that_share_a_gradient_do_not_share_its_memory():
    x, residual = uniform(*SHAPE).requires_grad_(), uniform(*SHAPE).requires_grad_()
    nt.layer_norm(x, residual=residual).square().sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_lazily_negated_tensors():
    x = torch.complex(uniform(2, 3, 5), uniform(2, 3, 5)).conj().imag
    assert x.is_neg()
    assert torch.equal(nt.instance_norm(x), nt.instance_norm(x.resolve_neg()))


MISTAKES = {
    "weight": (lambda x: nt.instance_norm(x, torch.ones(7)), ValueError, r"weight has shape \(7,\), expected \(4,\)"),
    "groups": (lambda x: nt.group_norm(x, 3), ValueError, "num_groups"),
    "axis": (lambda x: nt.layer_norm(x, axis=7), np.exceptions.AxisError, "axis"),
    "activation": (lambda x: nt.layer_norm(x, activation="swish"), ValueError, "activation"),
    "no activation": (lambda x: nt.layer_norm(x, activation=("elu", 1.0, 2.0)), TypeError, "activation"),
    "slopes of relu": (lambda x: nt.layer_norm(x, activation=("relu", torch.ones(6))), TypeError, "activation"),
    "slopes of NumPy": (lambda x: nt.layer_norm(x, activation=("prelu", np.ones(6))), TypeError, "activation"),
    "residual": (lambda x: nt.layer_norm(x, return_residual=True), ValueError, "residual is None, expected a tensor"),
    "dtype": (lambda x: nt.layer_norm(x.to(torch.complex128)), TypeError, "x has"),
    "sparse": (lambda x: nt.layer_norm(x.to_sparse()), TypeError, "x is a"),
    "numpy": (lambda x: nt.layer_norm(x.numpy()), TypeError, "x is ndarray, expected a torch.Tensor"),
    "numpy-weight": (lambda x: nt.layer_norm(x, np.ones(5)), TypeError, "weight is ndarray, expected a torch.Tensor"),
    "frozen": (lambda x: nt.batch_norm(x), ValueError, "running_mean"),
    "style": (
        lambda x: nt.adaptive_instance_norm(x, x[:, :2]), ValueError,
        r"style has images and channels \(2, 2\), expected \(2, 4\), those of content, or \(1, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake, records):
    call, kind, message = MISTAKES[mistake]
    x = uniform(*SHAPE)
    with pytest.raises(kind, match=message):
        call(x.requires_grad_() if records and mistake not in ("numpy",) else x)


def test_double_backward_of_nothing():
    """Gradients of the gradients of inputs of which some are not asked for."""
    x, weight, bias = uniform(*SHAPE).requires_grad_(), uniform(4).requires_grad_(), uniform(4)
    y = nt.instance_norm(x, weight, bias)
    (dweight,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    found = torch.autograd.grad(dweight.sum(), (x, weight))
    assert all(bool(torch.isfinite(g).all()) for g in found)


def test_importing_normkit_imports_no_torch():
    code = "import normkit, sys; assert 'torch' not in sys.modules and 'normkit.torch' not in sys.modules"
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", code], check=True)
        return
    pytest.fail("normkit imports torch")
