"""normkit.torch's modules: torch.nn's in everything but the kernel."""

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nt = pytest.importorskip("normkit.torch")
pytest.importorskip("expecttest", reason="PyTorch's own samples want expecttest")
from torch.testing._internal.common_modules import module_db  # noqa: E402

nn = torch.nn
NAMES = [name for name in nt.modules.__all__ if hasattr(nn, name)]
# Arguments and an input of each, and of each what an activation is added to.
MADE: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "InstanceNorm1d": ((4,), {"affine": True, "track_running_stats": True}, (3, 4, 7)),
    "InstanceNorm2d": ((4,), {"affine": True}, (3, 4, 5, 3)),
    "InstanceNorm3d": ((4,), {"track_running_stats": True, "momentum": 0.3}, (3, 4, 2, 3, 5)),
    "GroupNorm": ((2, 4), {}, (3, 4, 5)),
    "LayerNorm": (((4, 5),), {"bias": False}, (3, 4, 5)),
    "RMSNorm": ((5,), {}, (3, 4, 5)),
    "BatchNorm1d": ((4,), {}, (3, 4)),
    "BatchNorm2d": ((4,), {"momentum": None}, (3, 4, 5, 3)),
    "BatchNorm3d": ((4,), {"affine": False}, (3, 4, 2, 3, 5)),
}
MADE_EACH = pytest.mark.parametrize("name", MADE)


@pytest.fixture(autouse=True)
def seeded():
    """One thread: those of PyTorch wait for each other on a busy machine."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(name, **more):
    """Ours and theirs with the same random state."""
    args, options, _ = MADE[name]
    ours, theirs = (getattr(library, name)(*args, **options, **more) for library in (nt, nn))
    state = {k: v if k == "num_batches_tracked" else torch.rand_like(v) + 0.5 for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state), theirs.load_state_dict(state)
    return ours, theirs


def close(found, expected):
    """Both are within some hundred roundings of values of order 1, in float64, of the truth."""
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_every_name_is_there():
    assert {*NAMES, "AdaptiveInstanceNorm"} == {*nt.modules.__all__}
    assert MADE.keys() == {*NAMES}


@MADE_EACH
def test_is_a_module_of_torch(name):
    ours, theirs = pair(name)
    assert isinstance(ours, getattr(nn, name))
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert repr(ours) == repr(theirs)
    parameters = [*inspect.signature(getattr(nt, name)).parameters.values()]
    expected = [*inspect.signature(getattr(nn, name)).parameters.values()]
    own = [("activation", None), ("process_group", None)]
    assert [(p.name, p.default) for p in parameters] == [*((p.name, p.default) for p in expected), *own]
    assert repr(getattr(nt, name)(*MADE[name][0], activation="relu")).endswith(", activation='relu')")
    for source, target in ((ours, theirs), (theirs, ours)):
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"


@MADE_EACH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_computes_what_torch_does(name, training, activation):
    """Values, gradients and buffers, over three steps."""
    ours, theirs = (m.train(training) for m in pair(name, dtype=torch.float64))
    ours.activation = activation
    act = nn.functional.silu if activation else lambda y: y
    for _ in range(3):
        x = torch.randn(MADE[name][2], dtype=torch.float64)
        ys, grads = [], []
        for function in (ours, lambda x: act(theirs(x))):
            leaf = x.clone().requires_grad_()
            ys.append(function(leaf))
            grads.append(torch.autograd.grad(ys[-1].sin().sum(), leaf, retain_graph=True))
        close(*ys), close(*grads)
        ys[0].cos().sum().backward(), ys[1].cos().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):  # those of all three steps
        close(a.grad, b.grad)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_by_which_pytorch_tests_its_own(name, training):
    """ModuleInfo: constructors and inputs of every kind, and the mistakes that are to be refused."""
    (info,) = (m for m in module_db if m.module_cls is getattr(nn, name))
    count = 0
    inputs = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
    for sample in inputs:
        made = sample.constructor_input
        ours, theirs = (getattr(library, name)(*made.args, **made.kwargs).double() for library in (nt, nn))
        ours.load_state_dict(theirs.state_dict())
        given = sample.forward_input
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's words for channels that are not num_features
            ys = [m.train(training)(*given.args, **given.kwargs) for m in (ours, theirs)]
        close(*ys)
        close(*(torch.autograd.grad(y.sin().sum(), given.args[0])[0] for y in ys))
        count += 1
    assert count >= 2
    if info.module_error_inputs_func is not None:
        for mistake in info.module_error_inputs_func(info, "cpu", torch.float64, False, training):
            if mistake.module_error_input.constructor_input.kwargs.get("eps") == 0:
                continue  # normkit divides by the deviation alone, and gives the bias where that is 0
            made, given = mistake.module_error_input.constructor_input, mistake.module_error_input.forward_input
            message = mistake.error_regex.replace("eps must be positive", "eps is .*, expected a finite number")
            with pytest.raises(mistake.error_type, match=message):
                getattr(nt, name)(*made.args, **made.kwargs)(*given.args, **given.kwargs)


@MADE_EACH
def test_copies_and_pickles(name):
    ours, _ = pair(name, dtype=torch.float64)
    ours.activation = ("leaky_relu", 0.2)
    ours.eval()
    x = torch.randn(MADE[name][2], dtype=torch.float64)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert copied.activation == ours.activation
        assert torch.equal(copied(x), ours(x))
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in ours.parameters()}


@MADE_EACH
def test_compiled(name):
    ours, _ = pair(name)
    again = copy.deepcopy(ours)
    torch._dynamo.reset()
    x = torch.randn(MADE[name][2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(ours, backend="aot_eager", fullgraph=ours.__dict__.get("momentum", 0) is not None)(x)
    assert torch.equal(y, again(x))
    for a, b in zip(ours.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@MADE_EACH
def test_half_modules(name, dtype):
    """Parameters and running statistics of a half type; the truth is the same module in float64."""
    ours, _ = pair(name)
    ours, x = ours.to(dtype), torch.randn(MADE[name][2]).to(dtype).requires_grad_()
    wide = copy.deepcopy(ours).double()
    y, expected = ours(x), wide(x.double())
    assert y.dtype == dtype
    assert all(p.dtype == dtype for p in ours.parameters())
    unit = torch.finfo(dtype).eps / 2
    # All is computed in float32 and y is rounded once.
    assert bool(((y.double() - expected).abs() <= unit * expected.abs() + 64 * 2.0**-24 * (1 + expected.abs())).all())
    y.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in ours.parameters())
    for a, b in zip(ours.buffers(), wide.buffers(), strict=True):
        if a.dtype == dtype:
            assert bool(((a.double() - b).abs() <= 1.01 * unit * b.abs() + 1e-6).all())


@pytest.mark.parametrize(("name", "form"), [
    ("BatchNorm2d", torch.channels_last), ("InstanceNorm2d", torch.channels_last), ("GroupNorm", torch.channels_last),
    ("BatchNorm3d", torch.channels_last_3d), ("InstanceNorm3d", torch.channels_last_3d),
])  # fmt: skip
def test_memory_format_is_kept(name, form):
    shape = (3, 4, 5, 3) if form == torch.channels_last else (3, 4, 2, 3, 5)
    x = torch.randn(shape).to(memory_format=form).requires_grad_()
    module = getattr(nt, name)(*MADE[name][0])
    y = module(x)
    assert y.is_contiguous(memory_format=form)
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    assert dx.is_contiguous(memory_format=form)


def test_adaptive():
    module = nt.AdaptiveInstanceNorm(eps=1e-3, activation="tanh")
    content, style = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    assert torch.equal(module(content, style), nt.adaptive_instance_norm(content, style, eps=1e-3, activation="tanh"))
    assert repr(module) == "AdaptiveInstanceNorm(eps=0.001, activation='tanh')"
    assert not module.state_dict()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"input has shape \(2, 4\), expected one that ends with \(5,\)"):
        nt.LayerNorm(5, elementwise_affine=False)(torch.randn(2, 4))
    with pytest.raises(TypeError, match="activation has slopes that are a tensor, expected a number"):
        nt.LayerNorm(5, activation=("prelu", torch.ones(5)))
    with pytest.raises(ValueError, match="activation"):
        nt.LayerNorm(5, activation="swish")(torch.randn(2, 5))


def network(library):
    torch.manual_seed(1)
    instance = library.InstanceNorm2d(6, affine=True, track_running_stats=True)
    # Without biases, whose gradients a normalization makes zero, up to rounding which Adam would scale up to its steps.
    layers = [nn.Conv2d(2, 6, 3, padding=1, bias=False)]
    for norm in (library.BatchNorm2d(6), library.GroupNorm(2, 6), instance):
        layers += [norm, nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1, bias=False)]
    layers += [nn.Flatten(), library.LayerNorm(150), nn.Linear(150, 8), library.RMSNorm(8)]
    return nn.Sequential(*layers).double()


def trained(model, steps=100):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=generator)
        loss = (model(x) - x.flatten(1)[:, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64), model


def test_a_training_run_stays_with_that_of_torch():
    """A hundred steps of Adam in float64, to 1e-10: what rounding does at the first step has not grown to that."""
    ours, theirs = trained(network(nt)), trained(network(nn))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=0)
    for a, b in zip(ours[1].state_dict().values(), theirs[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert float(ours[0][-1]) < float(ours[0][0])


def test_distributed_data_parallel(tmp_path):
    """One process is enough to see that hooks on gradients run and buffers are found."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("this build of PyTorch has no distributed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model, x = network(nt), torch.randn(4, 2, 5, 5, dtype=torch.float64)
            expected = copy.deepcopy(model)
            nn.parallel.DistributedDataParallel(model)(x).square().sum().backward()
            expected(x).square().sum().backward()
            for a, b in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(a.grad, b.grad)
        finally:
            dist.destroy_process_group()
