"""normkit.torch.convert: the same modules with another class, and activations only where they may move."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nt = pytest.importorskip("normkit.torch")

nn = torch.nn
F = nn.functional


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(found, expected):
    """Both are within some hundred roundings of values of order 1, in float64, of the truth."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """A residual block whose forward says what is adjacent, as those of most models do."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


def model():
    # A convolution before a normalization has no bias: Adam would scale the rounding of its zero gradient up.
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.1), Block(),
        nn.GroupNorm(2, 4), nn.GELU(approximate="tanh"), nn.Flatten(1), nn.LayerNorm(36), nn.Softplus(),
        nn.Linear(36, 3), nn.RMSNorm(3),
    )  # fmt: skip
    return made.double()


X = torch.linspace(-2, 2, 4 * 2 * 25, dtype=torch.float64).sin().reshape(4, 2, 5, 5)


def step(made, optimizer=None):
    y = made(X)
    y.sin().sum().backward()  # not the sum of squares, which RMS norm makes the same for all
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()
    return y.detach()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_gives_what_it_gave(training):
    ours = model().train(training)
    theirs = copy.deepcopy(ours)
    before = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    modules, keys = [*ours.named_modules()], [*ours.state_dict()]
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (ours, theirs)]
    close(step(ours, optimizers[0]), step(theirs, optimizers[1]))  # an optimizer that has a state
    done = nt.convert(ours)
    assert done.converted == {
        "1": "InstanceNorm2d", "3.norm1": "BatchNorm2d", "3.norm2": "GroupNorm", "4": "GroupNorm", "7": "LayerNorm",
        "10": "RMSNorm",
    }  # fmt: skip
    assert done.fused == {"1": "2", "3.norm1": "3.act", "4": "5", "7": "8"}
    assert not done.left
    assert str(done).splitlines()[0] == "1: InstanceNorm2d with 2"
    after = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert before.keys() == after.keys()
    assert all(after[name] is t for name, t in before.items())
    assert [*ours.state_dict()] == keys
    assert all(m.training == training for m in ours.modules())
    for optimizer in optimizers[:1]:
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in ours.parameters()
        }
    for _ in range(3):
        close(step(ours, optimizers[0]), step(theirs, optimizers[1]))
    done.undo()
    assert [(name, type(m)) for name, m in modules] == [(name, type(m)) for name, m in ours.named_modules()]
    assert all(a is b for (_, a), (_, b) in zip(modules, ours.named_modules(), strict=True))
    assert repr(ours) == repr(theirs)
    assert not any("activation" in vars(m) for m in ours.modules())
    close(step(ours), step(theirs))


def test_without_fusing():
    ours = model()
    done = nt.convert(ours, fuse=False)
    assert len(done.converted) == 6
    assert not done.fused
    assert type(ours[2]) is nn.LeakyReLU


def test_a_second_time_fuses_what_the_first_left():
    ours = model()
    nt.convert(ours, fuse=False)
    again = nt.convert(ours)
    assert not again.converted
    assert again.fused.keys() == {"1", "3.norm1", "4", "7"}
    assert not nt.convert(ours).fused


def test_a_model_that_is_one_module():
    made = nn.LayerNorm(4)
    done = nt.convert(made)
    assert type(made) is nt.LayerNorm
    assert done.converted == {"": "LayerNorm"}
    assert str(nt.convert(nn.Linear(2, 2))) == "nothing to convert"


def test_hooks_stay_and_keep_an_activation_out():
    made, seen = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU()), []
    made[0].register_forward_hook(lambda module, args, y: seen.append(y))
    made[3].register_forward_pre_hook(lambda module, args: None)
    done = nt.convert(made)
    assert not done.fused
    assert done.left == {"1": "0 has hooks", "3": "3 has hooks"}
    made(torch.randn(2, 4, 3))
    assert len(seen) == 1
    assert bool((seen[0] < 0).any())
    assert "1: it stays, 0 has hooks" in str(done)


class Named(nn.Module):
    """A block whose modules have names of their own besides, as nnU-Net's have."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()
        self.all_modules = nn.Sequential(self.norm, self.act)

    def forward(self, x):
        return self.all_modules(x)


class Deciding(nn.Module):
    """A model without a graph: it looks at values."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) if x.sum() > 1e9 else self.block(-x)


def test_a_graph_sees_through_second_names():
    made, x = nn.Sequential(Named(), Named()), torch.randn(2, 4, 3)
    expected, act = made(x), made[0].act
    done = nt.convert(made)
    assert done.fused == {"0.norm": "0.act", "1.norm": "1.act"}
    assert not done.left
    assert type(made[0].act) is nn.Identity
    assert made[0].all_modules[1] is made[0].act
    torch.testing.assert_close(made(x), expected)
    done.undo()
    assert made[0].act is act is made[0].all_modules[1]
    assert torch.equal(made(x), expected)


def test_a_name_outside_of_what_was_traced_proves_nothing():
    inside, outside = Deciding(Named()), Deciding(Named())
    outside.also = outside.block.act  # who looks at values may call it
    assert nt.convert(inside).fused == {"block.norm": "block.act"}
    done = nt.convert(outside)
    assert not done.fused
    assert done.left == {"block.act": "block.act is in several places"}


class Container(nn.Module):
    """Calls the modules of a Sequential one by one, and gives what is between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())

    def forward(self, x):
        between = [x := layer(x) for layer in self.layers]
        return between[0] + between[1]


class Optional(nn.Module):
    """Applies its activation unless the first of two optional arguments comes alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.ReLU()

    def forward(self, x, first=None, second=None):
        y = self.norm(x)
        return y if first is not None and second is None else self.act(y)


@pytest.mark.parametrize(("kind", "options"), [(Container, {}), (Optional, {"first": 1})])
def test_what_a_graph_shows_otherwise_is_not_fused(kind, options):
    made, x = kind().double(), torch.randn(2, 4, 3, dtype=torch.float64)
    expected = made(x, **options)
    assert not nt.convert(made).fused
    close(made(x, **options), expected)


def test_shared_modules_stay_shared():
    act, norm = nn.ReLU(), nn.GroupNorm(2, 4)
    made = nn.Sequential(nn.GroupNorm(2, 4), act, norm, nn.SiLU(), nn.GroupNorm(2, 4), act, norm)
    expected = copy.deepcopy(made)
    done = nt.convert(made)
    assert not done.fused
    assert made[2] is made[6]
    assert type(made[2]) is nt.GroupNorm
    assert done.left == {"1": "1 is in several places", "3": "2 is in several places"}
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(made(x), expected(x))


class Custom(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_classes_of_their_own_stay():
    made = nn.Sequential(Custom(2, 4), nn.ReLU(), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(4))
    done = nt.convert(made)
    assert not done.converted
    assert done.left == {"0": "Custom is a class of its own", "3": "SyncBatchNorm is a class of its own"}


class Uses(nn.Module):
    """A normalization and an activation that forward uses in some way."""

    def __init__(self, forward, modes=(True, False)):
        super().__init__()
        self.norm, self.act, self.other = nn.BatchNorm1d(4), nn.ReLU(), nn.ReLU()
        self.how = forward

    def forward(self, x, extra=None):
        return self.how(self, x, extra)


def by_mode(m, x, extra):
    return m.act(m.norm(x)) if m.training else m.norm(x) + m.act(x)


def by_argument(m, x, extra):
    return m.norm(x) if extra is None else m.act(m.norm(x)) + extra


def by_value(m, x, extra):
    return m.act(m.norm(x)) if x.sum() > 0 else m.norm(x)


USES = {
    "adjacent": (lambda m, x, extra: m.act(m.norm(x)), True),
    "by a name": (lambda m, x, extra: (lambda y: m.act(y) + m.other(x))(m.norm(x)), True),
    "used twice": (lambda m, x, extra: (lambda y: m.act(y) + y)(m.norm(x)), False),
    "activation used twice": (lambda m, x, extra: m.act(m.norm(x)) + m.act(x), False),
    "normalization used twice": (lambda m, x, extra: m.act(m.norm(x)) + m.norm(x), False),
    "something between": (lambda m, x, extra: m.act(m.norm(x) + 1), False),
    "a function": (lambda m, x, extra: F.relu(m.norm(x)), False),
    "another order": (lambda m, x, extra: m.norm(m.act(x)), False),
    "returned too": (lambda m, x, extra: (lambda y: (m.act(y), y)[0] + 0 * y)(m.norm(x)), False),
    "in training only": (by_mode, False),
    "with an argument only": (by_argument, False),
    "by a value": (by_value, False),
}


@pytest.mark.parametrize("use", USES)
def test_what_the_code_of_a_model_proves(use):
    forward, is_fused = USES[use]
    made = Uses(forward).double()
    expected = copy.deepcopy(made)
    done = nt.convert(made)
    assert done.converted == {"norm": "BatchNorm1d"}
    assert done.fused == ({"norm": "act"} if is_fused else {})
    x = torch.randn(5, 4, dtype=torch.float64)
    for mode in (True, False):
        for extra in (None, torch.ones(4, dtype=torch.float64)):
            close(made.train(mode)(x, extra), expected.train(mode)(x, extra))


def test_children_of_a_model_that_cannot_be_traced():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Uses(USES["adjacent"][0])

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    made = Outer()
    assert nt.convert(made).fused == {"inner.norm": "inner.act"}


def test_tracing_changes_nothing():
    class Counts(Uses):
        def __init__(self):
            super().__init__(USES["adjacent"][0])
            self.calls = 0
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.steps.add_(1)
            return super().forward(x)

    made = Counts().eval()
    done = nt.convert(made)
    assert done.fused
    assert made.calls == 0
    assert float(made.steps) == 0
    assert not any(m.training for m in made.modules())


ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ELU(0.7), nn.Sigmoid(), nn.Tanh(),
    nn.ReLU6(), nn.Hardswish(), nn.Mish(), nn.Softplus(),
]  # fmt: skip
OTHERS = [nn.Softplus(beta=2), nn.PReLU(), nn.Hardtanh(-2, 2), nn.Dropout(), nn.Softmax(-1), nn.Identity()]


@pytest.mark.parametrize("act", ACTIVATIONS + OTHERS, ids=repr)
def test_every_activation(act):
    """Those that normkit has; PReLU has a parameter, which stays where it is."""
    made = nn.Sequential(nn.LayerNorm(7), copy.deepcopy(act)).double().eval()
    expected = copy.deepcopy(made)
    assert bool(nt.convert(made).fused) == any(act is a for a in ACTIVATIONS)
    x = 3 * torch.randn(5, 7, dtype=torch.float64)
    close(made(x), expected(x))


def test_a_compiled_model_goes_on():
    torch._dynamo.reset()
    made = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.SiLU()).double()
    compiled, x = torch.compile(made, backend="eager"), torch.randn(3, 4, dtype=torch.float64)
    before = compiled(x)
    nt.convert(made)
    close(compiled(x), before)
