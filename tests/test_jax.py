"""normkit.jax: what normkit gives to the last bit, gradients of every order, and the transforms of JAX.

What the kernels give is judged elsewhere: here a function has to be normkit's own of the same name, and its gradients
those of the backward beside it. Derivatives are compared with differences of values in float64.
"""

import ctypes
import gc
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import normkit
import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
nj = pytest.importorskip("normkit.jax")
import recorded  # noqa: E402
from bounds import UNIT  # noqa: E402
from cases import DTYPES  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402
from normkit.jax import _xla  # noqa: E402
from recorded import CASES, OPTIONS, PARAMS, SHAPE, SOME, Case  # noqa: E402

CALL = f"custom_call @{_xla.TARGET}"


def running(x):
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    return {name: np.array(values, dtype) for name, values in recorded.RUNNING.items()}


EACH = pytest.mark.parametrize(("case", "options"), SOME)


@pytest.fixture(autouse=True)
def wide(request):
    """float64 is there, except where a test says in what dtype it computes."""
    dtype = getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("dtype", "float64")
    with jax.enable_x64(dtype == "float64"):
        yield


def uniform(rng, *shape, dtype="float64", middle=0):
    return rng.uniform(middle - 2, middle + 2, shape).astype(DTYPES[dtype])


def made(rng, case, options, params="both", dtype="float64"):
    """The arrays that have gradients, by name, and a function of them: the call."""
    arrays = {"x": uniform(rng, *SHAPE, dtype=dtype, middle=1)}
    for name, is_there in zip(("weight", "bias"), PARAMS[params], strict=True):
        if is_there:
            arrays[name] = uniform(rng, *case.weight, dtype=dtype)
    told = dict(options)
    if told.pop("residual", False):
        arrays["residual"] = uniform(rng, *SHAPE, dtype=dtype)
    if told.get("activation") == "slopes":
        arrays["slopes"] = uniform(rng, *case.weight, dtype=dtype)
    if told.pop("where", False):
        told["where"] = rng.random((2, 1, 3, 5)) < 0.7

    def call(*values):
        named = dict(zip(arrays, values, strict=True))
        slopes = {"activation": ("prelu", named.pop("slopes"))} if "slopes" in named else {}
        return getattr(nj, case.name)(**named, **case.told(running(named["x"])), **told | slopes)

    return arrays, told, call


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def by_normkit(case, arrays, told, dys):
    return recorded.by_normkit(case, arrays, told, dys, running(arrays["x"]))


def same_bits(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def close(found, expected, roundings, size):
    """As two results that differ by so many roundings in float64 of numbers that are at most `size`."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0) <= (
            roundings * UNIT["float64"] * size(b)
        )


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_is_normkit_to_the_last_bit(rng, case, options, params, dtype):
    """y and the gradient of x, with their dtypes.

    Gradients of parameters are sums, which XLA adds up in another order where no kernel does: of at most as many terms
    as x has elements, each at most 1.2 |dy| or 1.2 |dy * x_hat|, for the slope of activations, and |x_hat| is at most
    the root of the members.
    """
    case = CASES[case]
    arrays, told, call = made(rng, case, OPTIONS[options], params, dtype)
    found, pull = jax.vjp(jax.jit(call), *arrays.values())
    dys = [uniform(rng, *SHAPE, dtype=dtype) for _ in as_tuple(found)]
    gradients = dict(zip(arrays, pull(tuple(dys) if isinstance(found, tuple) else dys[0]), strict=True))
    expected, of_normkit = by_normkit(case, arrays, told, dys)
    same_bits(as_tuple(found), expected)
    same_bits(as_tuple(call(*arrays.values())), expected)
    unit, count = UNIT["float64" if dtype == "float64" else "float32"], np.prod(SHAPE)
    most = 1.2 * count * float(np.abs(dys[0].astype(np.float64)).sum()) * np.sqrt(count)  # times a rounding each
    for name, gradient in gradients.items():
        truth = of_normkit[name]
        assert gradient.dtype == arrays[name].dtype
        if name in ("x", "residual"):
            same_bits([gradient], [truth])
        else:
            off = np.abs(np.asarray(gradient, np.float64) - np.asarray(truth, np.float64))
            stored = 2 * UNIT[dtype] * np.abs(np.asarray(truth, np.float64))
            assert (off <= 2 * unit * most + stored).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "bool"])
def test_integers(rng, dtype):
    x = rng.integers(0, 2 if dtype == "bool" else 100, SHAPE).astype(dtype)
    with jax.enable_x64(True):
        same_bits([nj.group_norm(x, 2)], [normkit.group_norm(x, 2)])


LYING = {  # no kernel takes these as they lie
    "short-segments": lambda f, rng: f.group_norm(uniform(rng, 2, 4, 3), 2, *uniform(rng, 2, 4)),
    "last": lambda f, rng: f.group_norm(uniform(rng, 2, 9, 6), 3, *uniform(rng, 2, 6), channel_axis=-1),
    "many-axes": lambda f, rng: f.layer_norm(uniform(rng, 2, 3, 2, 3, 2), axis=(0, 2, 4)),
    "weights-differ": lambda f, rng: f.instance_norm(uniform(rng, 2, 4, 7), uniform(rng, 2, 4), uniform(rng, 4)),
    "pixels": lambda f, rng: f.instance_norm(uniform(rng, 2, 4, 7), uniform(rng, 2, 4, 7), uniform(rng, 4)),
    "few-slopes": lambda f, rng: f.layer_norm(uniform(rng, 3, 4), activation=("prelu", uniform(rng, 1))),
    "mask": lambda f, rng: f.layer_norm(uniform(rng, 3, 4, 5), axis=(0, 2), where=rng.random((3, 1, 5)) < 0.5),
    "no-elements": lambda f, rng: f.instance_norm(uniform(rng, 2, 0, 7), return_stats=True),
    "number": lambda f, rng: f.layer_norm(uniform(rng, 3, 4), activation=("prelu", 0.3), where=True),
    "number-of-float32": lambda f, rng: f.layer_norm(uniform(rng, 3, 4, dtype="float32"), activation=("prelu", 0.3)),
    "nobody": lambda f, rng: f.layer_norm(uniform(rng, 3, 4), where=np.zeros((), bool)),
}


@pytest.mark.parametrize("lying", LYING)
def test_what_has_to_be_packed(lying):
    found, expected = (as_tuple(LYING[lying](f, np.random.default_rng(1))) for f in (nj, normkit))
    same_bits(found, expected)


@pytest.mark.parametrize("images", [3, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adaptive_is_normkit_to_the_last_bit(rng, dtype, images):
    content, style = uniform(rng, 3, 4, 6, dtype=dtype), uniform(rng, images, 4, 5, dtype=dtype)
    options = {"activation": "silu", "return_stats": True}
    same_bits(nj.adaptive_instance_norm(content, style, **options),
              normkit.adaptive_instance_norm(content, style, **options))  # fmt: skip


@pytest.mark.parametrize("case", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_statistics_are_returned(rng, case, dtype):
    x, weight = uniform(rng, *SHAPE, dtype=dtype), uniform(rng, 4, dtype=dtype)
    options = {"training": True} if case == "batch_norm" else {}
    given, updated = running(x), running(x)
    found = jax.jit(lambda x, given: getattr(nj, case)(x, weight, **given, **options, return_stats=True))(x, given)
    expected = getattr(normkit, case)(x, weight, **updated, **options, return_stats=True)
    same_bits(found, [*expected, *updated.values()])
    same_bits(given.values(), running(x).values())


def test_outputs_are_constants_to_gradients_but_for_the_sum(rng):
    x = uniform(rng, *SHAPE)
    statistics = jax.grad(lambda x: sum(s.sum() for s in nj.layer_norm(x, return_stats=True)[1:]))(x)
    assert not statistics.any()
    total = jax.grad(lambda x: nj.layer_norm(x, residual=x, return_residual=True)[1].sum())(x)
    assert (total == 2).all()


# ---- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_both_orders(rng, case, options, params):
    arrays, _, call = made(rng, CASES[case], OPTIONS[options], params)
    check_grads(call, tuple(arrays.values()), order=2, modes=["rev"])


@pytest.mark.parametrize("activation", [
    "relu", ("leaky_relu", 0.2), "silu", "gelu", "gelu_tanh", ("elu", 0.7), "sigmoid", "tanh", "relu6", "hardswish",
    "mish", "softplus", ("prelu", 0.3), ("prelu", np.array([0.3])),
], ids=str)  # fmt: skip
def test_every_activation_has_derivatives_of_both_orders(rng, activation):
    x, weight = uniform(rng, 2, 3, 7), uniform(rng, 3)
    check_grads(lambda x, w: nj.instance_norm(x, w, activation=activation), (x, weight), order=2, modes=["rev"])


@pytest.mark.parametrize("images", [3, 1])
def test_adaptive_has_derivatives_of_both_orders(rng, images):
    content, style = uniform(rng, 3, 2, 4), uniform(rng, images, 2, 5)
    for options in ({}, {"activation": "tanh"}):
        check_grads(lambda c, s, o=options: nj.adaptive_instance_norm(c, s, **o), (content, style), 2, modes=["rev"])


def test_a_third_derivative(rng):
    check_grads(lambda x: nj.instance_norm(x, activation="silu"), (uniform(rng, 1, 2, 5),), order=3, modes=["rev"])


def test_forward_mode_is_refused(rng):
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(nj.layer_norm, (uniform(rng, 2, 3),), (uniform(rng, 2, 3),))


def test_only_wanted_gradients_are_computed(rng):
    x, weight = uniform(rng, *SHAPE), uniform(rng, 4)
    compiled = jax.jit(jax.grad(lambda w: nj.instance_norm(x, w).sum())).lower(weight)
    names = _xla._core.operands
    # The last numbers of a call are the operands that its results stand for.
    assert f", {names.index('dweight')}]>" in compiled.as_text()
    assert f", {names.index('out')}, {names.index('dweight')}]>" not in compiled.as_text()


# ---- vmap --------------------------------------------------------------------------------------------------------


def stacked(call, axes, arrays):
    """The calls one by one."""
    rows = [
        call(*(a if axis is None else np.take(a, k, axis) for a, axis in zip(arrays, axes, strict=True)))
        for k in range(3)
    ]
    return [np.stack(parts) for parts in zip(*map(as_tuple, rows), strict=True)]


def mapped(rng, arrays, axis_of):
    """Three of each array along an axis, or one for all."""
    axes = [axis_of(k, a) for k, a in enumerate(arrays)]
    each = [a if n is None else np.stack([a + k / 8 for k in range(3)], n) for a, n in zip(arrays, axes, strict=True)]
    return axes, each


MAPPED = {
    "x": lambda k, a: 0 if k == 0 else None,
    "x-last": lambda k, a: a.ndim if k == 0 else None,
    "params": lambda k, a: None if k == 0 else a.ndim,
    "both": lambda k, a: 1,
}


@pytest.mark.parametrize("over", MAPPED)
@EACH
def test_vmap_is_a_loop_without_a_loop(rng, case, options, over):
    """Over x to the last bit: a statistic has the same members in the same order. With weights that differ kernels may
    take these element by element, so that y is rounded elsewhere: four roundings of terms that are at most 2 |y| + 4.
    Gradients are sums of as many terms as x has elements, in another order."""
    arrays, _, call = made(rng, CASES[case], OPTIONS[options])
    axes, each = mapped(rng, list(arrays.values()), MAPPED[over])
    function = jax.vmap(call, axes)
    found, expected = as_tuple(function(*each)), stacked(call, axes, each)
    if over.startswith("x"):
        same_bits(found, expected)
    else:
        close(found, expected, 8, lambda y: 2 * np.abs(y).max() + 4)
    assert jax.jit(function).lower(*each).as_text().count(CALL) == 1

    every = tuple(range(len(arrays)))
    gradients = jax.grad(lambda *a: sum((y * y).sum() for y in as_tuple(call(*a))), every)
    found = jax.jit(jax.vmap(gradients, axes))(*each)
    count = 2 * np.prod(SHAPE)
    close(found, stacked(gradients, axes, each), 16 * count, lambda g: count * (1 + np.abs(g).max()))


def test_vmap_in_vmap_and_around_gradients_of_gradients(rng):
    arrays, _, call = made(rng, CASES["group"], OPTIONS["all"])
    x, *others = arrays.values()
    xs = np.stack([np.stack([x + k + j / 4 for j in range(2)]) for k in range(3)])

    def penalty(x, *others):
        return (jax.grad(lambda x: (call(x, *others) ** 2).sum())(x) ** 2).sum()

    none = [None] * len(others)
    for function in (call, jax.grad(penalty)):
        found = jax.vmap(jax.vmap(function, (0, *none)), (0, *none))(xs, *others)
        for k in range(3):
            for j in range(2):
                one = function(xs[k, j], *others)
                # jnp adds up in another order where there are more axes.
                close([found[k, j]], [one], 64 * np.prod(SHAPE), lambda g: 1 + np.abs(g).max())


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("over", ["x", "x-last", "both"])
@pytest.mark.parametrize("learns", [True, False])
def test_vmap_over_running_statistics(rng, name, over, learns):
    option = "training" if name == "batch_norm" else "use_input_stats"

    def call(x, weight, mean, var, where):
        where = None if where is None else where > 0
        given = {"running_mean": mean, "running_var": var, option: learns, "where": where}
        return getattr(nj, name)(x, weight, **given, return_stats=True)

    x = uniform(rng, *SHAPE)
    arrays = [x, uniform(rng, 4), *running(x).values(), uniform(rng, 3, 5)]
    axes, each = mapped(rng, arrays, MAPPED[over])
    found = jax.vmap(call, axes)(*each)
    assert len(found) == (5 if learns else 3)
    same_bits(found, stacked(call, axes, each))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "prelu"])
def test_what_is_no_member_may_be_nan(rng, activation, value):
    """Where no gradient reaches it: both orders have the bits that they have beside a number, but for its own d_dy."""
    x, where = uniform(rng, *SHAPE), rng.random(SHAPE) < 0.7
    others = [*uniform(rng, 3, 4), np.where(where, uniform(rng, *SHAPE), 0)]

    def firsts(x, weight, bias, slopes, dy):
        def call(x, weight, bias, slopes):
            kind = ("prelu", slopes) if activation == "prelu" else activation
            return nj.instance_norm(x, weight, bias, where=where, activation=kind)

        return jax.vjp(call, x, weight, bias, slopes)[1](dy)

    def both(*arrays):
        *seconds, d_dy = jax.grad(lambda *a: sum((g * g).sum() for g in firsts(*a)), range(5))(*arrays)
        return [*firsts(*arrays), *seconds, d_dy[where]], d_dy[~where]

    (expected, numbers), (found, nans) = both(x, *others), both(np.where(where, x, value), *others)
    same_bits(found, expected)
    assert np.isfinite(numbers).all()
    assert not np.isfinite(nans).any()


def test_gradients_of_one_array_and_another(rng):
    """A call that was differentiated by x has its gradients by weight as before, and in a loop both."""
    x, weight = uniform(rng, *SHAPE), uniform(rng, 4)

    def loss(x, weight):
        return (nj.instance_norm(x, weight) ** 3).sum()

    by_weight = jax.grad(loss, 1)(x, weight)
    assert bool((by_weight != 0).all())
    jax.grad(loss)(x, weight)
    same_bits([jax.grad(loss, 1)(x, weight)], [by_weight])

    def steps(weight):  # what goes round depends on weight from the second time on
        return jax.lax.scan(lambda y, _: (nj.instance_norm(y, weight), None), x, length=2)[0].sum()

    expected = jax.grad(lambda w: nj.instance_norm(nj.instance_norm(x, w), w).sum())(weight)
    close([jax.grad(steps)(weight)], [expected], 64 * x.size, lambda g: 1 + np.abs(g).max())


@pytest.mark.parametrize("images", [2, 1])
@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 0)], ids=str)
def test_vmap_over_content_and_style(rng, images, axes):
    arrays = [uniform(rng, 2, 3, 4), uniform(rng, images, 3, 5)]
    _, each = mapped(rng, arrays, lambda k, a: axes[k])
    options = {"where": rng.random((2, 1, 4)) < 0.8, "activation": ("prelu", uniform(rng, 3)), "return_stats": True}

    def call(content, style):
        return nj.adaptive_instance_norm(content, style, **options)

    same_bits(jax.vmap(call, axes)(*each), stacked(call, axes, each))
    gradients = jax.grad(lambda c, s: (nj.adaptive_instance_norm(c, s) ** 2).sum(), (0, 1))
    found = jax.vmap(gradients, axes)(*each)
    close(found, stacked(gradients, axes, each), 64 * 24, lambda g: 1 + np.abs(g).max())


# ---- programs ----------------------------------------------------------------------------------------------------


def test_a_scan_and_a_checkpoint(rng):
    x, weight = uniform(rng, 3, 8), uniform(rng, 8)

    def looped(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(nj.rms_norm)(x, weight), None), x, length=3)[0]

    def unrolled(x):
        return nj.rms_norm(nj.rms_norm(nj.rms_norm(x, weight), weight), weight)

    same_bits([looped(x)], [unrolled(x)])
    same_bits([jax.grad(lambda x: looped(x).sum())(x)], [jax.grad(lambda x: unrolled(x).sum())(x)])


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import normkit.jax as nj

rng = np.random.default_rng(0)
x, weight, bias = (rng.uniform(-2, 2, s).astype(np.float32) for s in ((4, 6, 3, 5), 6, 6))
mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 2
images, every = P("data"), P()

def call(x, weight, bias):
    return nj.group_norm(x, 2, weight, bias, activation="silu", where=x < 1.5)

def loss(call):
    return lambda *arrays: (call(*arrays) ** 2).sum()

def penalty(call):
    return lambda *arrays: sum((g * g).sum() for g in jax.grad(loss(call), (0, 1, 2))(*arrays))

def apart(function, *sums):  # how far sums are off that are taken over devices: by roundings of all their terms
    for found, expected in zip(*sums, strict=True):
        assert np.abs(found - expected).max() <= 2.0**-24 * 360 * np.abs(expected).max(), function

sharded = jax.shard_map(call, mesh=mesh, in_specs=(images, every, every), out_specs=images)
for function in (sharded, jax.jit(sharded)):
    assert (function(x, weight, bias) == call(x, weight, bias)).all()
placed = jax.device_put(x, NamedSharding(mesh, images))
assert (jax.jit(call)(placed, weight, bias) == call(x, weight, bias)).all()
for order in (loss, penalty):
    apart(order, *(jax.jit(jax.grad(order(f), (0, 1, 2)))(x, weight, bias) for f in (sharded, call)))

def step(x, weight, bias):  # gradients inside: those of what all devices share are added up
    return jax.grad(loss(call), (0, 1, 2))(x, weight, bias)

step = jax.shard_map(step, mesh=mesh, in_specs=(images, every, every), out_specs=(images, every, every))
apart(step, jax.jit(step)(x, weight, bias), jax.grad(loss(call), (0, 1, 2))(x, weight, bias))

def trained(x, mean, var):
    return nj.batch_norm(x, running_mean=mean, running_var=var, training=True)

channels = P(None, "data"), P("data"), P("data")
arrays = x, np.zeros(6, np.float32), np.ones(6, np.float32)
of_channels = jax.shard_map(trained, mesh=mesh, in_specs=channels, out_specs=channels)
assert all((a == b).all() for a, b in zip(of_channels(*arrays), trained(*arrays), strict=True))
styled = jax.shard_map(nj.adaptive_instance_norm, mesh=mesh, in_specs=(images, every), out_specs=images)
assert (styled(x, x[:1] + 1) == nj.adaptive_instance_norm(x, x[:1] + 1)).all()
"""


PARTS = """
import jax, numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import normkit.jax as nj

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()), ("parts",))
assert mesh.size == 4
SHAPE = (4, 6, 8, 5)
x = rng.uniform(-2, 2, SHAPE) + 100
where = rng.random(SHAPE) < 0.6
where[:, :, 2:4] = False  # one part has no members
where[1, 2] = False
of_channels, of_images, of_pixels, slopes = (rng.uniform(0.5, 2, s) for s in ((2, 6), (2, 4, 6), (2, 6, 1, 5), 6))
running = np.zeros(6), np.ones(6)

def split(axis):
    return P(*(None,) * axis, "parts")

CASES = {
    "instance": (2, lambda x, w, b, more: nj.instance_norm(x, w, b, **more), of_channels),
    "images": (2, lambda x, w, b, more: nj.instance_norm(x, w, b, activation="silu", **more), of_images),
    "masked": (2, lambda x, w, b, more: nj.instance_norm(x[0], w, b, where=x[1], **more), of_channels),
    "group": (2, lambda x, w, b, more: nj.group_norm(x, 3, w, b, activation=("prelu", slopes), **more), of_channels),
    "layer": (2, lambda x, w, b, more: nj.layer_norm(x, axis=(0, 2), activation="relu", **more) * w + b, of_pixels),
    "rms": (2, lambda x, w, b, more: nj.rms_norm(x, axis=(-2, -1), **more) * w + b, of_pixels),
    "batch": (0, lambda x, w, b, more: nj.batch_norm(x, w, b, training=True, **more), of_channels),
    "residual": (0, lambda x, w, b, more: nj.batch_norm(x, w, b, training=True, residual=x**2, **more), of_channels),
}

def close(found, expected, scale):
    assert float(jnp.abs(found - expected).max()) <= scale * float(1 + jnp.abs(expected).max()), (name, found, expected)

for name, (axis, call, (w, b)) in CASES.items():
    whole = lambda x, w, b: call(x, w, b, {})
    if name == "masked":
        whole = lambda x, w, b: call((x, where), w, b, {})
    for check in (True, False) if name in ("images", "masked") else (True,):  # does JAX keep account of what varies
        specs = (split(axis), P(), P())
        part = lambda x, w, b: call(x, w, b, {"axis_name": "parts"})
        parts = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=split(axis), check_vma=check)
        if name == "masked":
            part = lambda x, where, w, b: call((x, where), w, b, {"axis_name": "parts"})
            masked = jax.shard_map(
                part, mesh=mesh, in_specs=(split(axis), *specs), out_specs=split(axis), check_vma=check
            )
            parts = lambda x, w, b: masked(x, where, w, b)

        def loss(of):
            return lambda *arrays: (of(*arrays) ** 3).sum()

        def penalty(of):
            return lambda *arrays: sum((g * g).sum() for g in jax.grad(loss(of), (0, 1, 2))(*arrays))

        def compiled(of):
            found = jax.jit(of).lower(x, w, b).compile()
            return found, found.as_text().count(" all-reduce(")  # messages

        # A mean of 100, whose square is taken with a residual, and sums of 960 terms, twice for the second order.
        call_parts, messages = compiled(parts)
        assert messages == 1
        close(call_parts(x, w, b), whole(x, w, b), 1e-11)
        gradient, messages = compiled(jax.grad(loss(parts)))
        assert messages == 2, "one forward, and one backward"
        close(gradient(x, w, b), jax.grad(loss(whole))(x, w, b), 1e-10)
        found, expected = (jax.jit(jax.grad(penalty(of), (0, 1, 2)))(x, w, b) for of in (parts, whole))
        for f, e in zip(found, expected, strict=True):
            close(f, e, 1e-9)

def trained(x, mean, var, **more):
    return nj.batch_norm(x, running_mean=mean, running_var=var, training=True, return_stats=True, **more)

name, every = "running", (P(),) * 4
of_parts = jax.shard_map(
    lambda *arrays: trained(*arrays, axis_name="parts"), mesh=mesh, in_specs=(P("parts"), P(), P()),
    out_specs=(P("parts"), *every),
)
for found, expected in zip(of_parts(x, *running), trained(x, *running), strict=True):
    close(found, expected, 1e-11)
fixed = lambda x, **more: nj.batch_norm(x, running_mean=running[0], running_var=running[1], **more)
of_fixed = jax.shard_map(lambda x: fixed(x, axis_name="parts"), mesh=mesh, in_specs=P("parts"), out_specs=P("parts"))
assert (of_fixed(x) == fixed(x)).all()
assert "all-reduce" not in jax.jit(of_fixed).lower(x).compile().as_text()

name = "NaN"  # no member, and no gradient reaches it: it has no say
dy = np.where(where, rng.standard_normal(SHAPE), 0)
for check in (True, False):
    def both(x):
        def firsts(x, w, b, dy):
            parts = jax.shard_map(
                lambda x, where, w, b: nj.batch_norm(
                    x, w, b, where=where, training=True, activation="silu", axis_name="parts"
                ), mesh=mesh, in_specs=(P("parts"), P("parts"), P(), P()), out_specs=P("parts"), check_vma=check,
            )
            return jax.vjp(lambda x, w, b: parts(x, where, w, b), x, w, b)[1](dy)

        def penalty(*arrays):
            return sum((g * g).sum() for g in firsts(*arrays))

        *seconds, d_dy = jax.jit(jax.grad(penalty, (0, 1, 2, 3)))(x, *of_channels, dy)
        return [*jax.jit(firsts)(x, *of_channels, dy), *seconds, d_dy[where]]

    for found, expected in zip(both(np.where(where, x, np.nan)), both(x), strict=True):
        assert (found == expected).all()

name = "far"  # float32 a million deviations from zero: as right as in one piece
far = (rng.standard_normal((4, 4096)) + 1e6).astype(np.float32)
exact = far.astype(np.float64)
exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
of_far = jax.shard_map(lambda x: nj.layer_norm(x, axis_name="parts"), mesh=mesh, in_specs=split(1), out_specs=split(1))
assert np.abs(of_far(far) - exact).max() <= 4 * 2.0**-24 * np.abs(exact).max() + 2.0**-24 * np.abs(exact).max()
"""


def test_statistics_of_parts_on_four_devices():
    run(PARTS, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def run(code, *args, **environment):
    import os

    subprocess.run([sys.executable, "-c", code, *args], check=True, env=os.environ | environment)


PARTS_MAPPED = """
import jax, numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import normkit.jax as nj

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()), ("parts",))
assert mesh.size == 2
x, w, where = rng.uniform(-2, 2, (3, 2, 4, 6)), rng.uniform(0.5, 2, (3, 4)), rng.random((2, 1, 6)) < 0.7

def part(x, w, where):
    return nj.instance_norm(x, w, where=where, activation="silu", return_stats=True, axis_name="parts")[0]

def whole(x, w):
    return jax.vmap(lambda x, w: nj.instance_norm(x, w, where=where, activation="silu"))(x, w)

def loss(of):
    return lambda x, w: (of(x, w) ** 3).sum()

def penalty(of):
    return lambda x, w: sum((g * g).sum() for g in jax.grad(loss(of), (0, 1))(x, w))

last = lambda ndim: P(*(None,) * (ndim - 1), "parts")
for check in (True, False):
    sharded = lambda f, ndim: jax.shard_map(
        f, mesh=mesh, in_specs=(last(ndim), P(), last(3)), out_specs=last(ndim), check_vma=check
    )
    of_parts = jax.vmap(sharded(part, 3), (0, 0, None)), sharded(jax.vmap(part, (0, 0, None)), 4)
    for of in (lambda x, w: of_parts[0](x, w, where), lambda x, w: of_parts[1](x, w, where)):
        for order in (lambda f: lambda *a: (f(*a),), lambda f: jax.grad(loss(f), (0, 1)),
                      lambda f: jax.grad(penalty(f), (0, 1))):
            for found, expected in zip(jax.jit(order(of))(x, w), order(whole)(x, w), strict=True):
                assert float(jnp.abs(found - expected).max()) <= 1e-10 * float(1 + jnp.abs(expected).max())
"""


def test_vmap_of_parts_on_two_devices():
    run(PARTS_MAPPED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


@pytest.mark.parametrize("jit", [True, False])
def test_an_axis_of_vmap_has_parts(rng, jit):
    """Samples that vmap names an axis of are parts of one batch, to gradients taken inside and outside."""
    x, weight = uniform(rng, 3, 2, 4, 5), uniform(rng, 4)

    def call(x, weight, **more):
        return nj.batch_norm(x, weight, training=True, activation="silu", **more)

    def whole(x, weight):
        return call(x.reshape(6, 4, 5), weight).reshape(x.shape)

    one = partial(call, axis_name="samples")
    parts = jax.vmap(jax.jit(one) if jit else one, (0, None), axis_name="samples")

    def penalty(of):
        return lambda *a: sum((g * g).sum() for g in jax.grad(lambda *a: (of(*a) ** 3).sum(), (0, 1))(*a))

    for order in (lambda f: lambda *a: (f(*a),), lambda f: jax.grad(lambda *a: (f(*a) ** 3).sum(), (0, 1)),
                  lambda f: jax.grad(penalty(f), (0, 1))):  # fmt: skip
        close(order(parts)(x, weight), order(whole)(x, weight), 64 * x.size, lambda g: 1 + np.abs(g).max())
    inside = jax.vmap(jax.grad(lambda x: (one(x, weight) ** 3).sum()), axis_name="samples")(x)
    close([inside], [jax.grad(lambda x: (whole(x, weight) ** 3).sum())(x)], 64 * x.size, lambda g: 1 + np.abs(g).max())


def test_shard_map_over_two_devices():
    run(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


IMPORTED = """
import sys
import jax, numpy as np
import normkit.jax as nj

nj.rms_norm(np.ones((1, 2)))  # the first call tells XLA of all
x, y, dx = np.load(sys.argv[2]).values()
with open(sys.argv[1], "rb") as file:
    program = jax.export.deserialize(file.read())
assert (program.call(x) == y).all()
assert (program.vjp().call(x, y) == dx).all()
"""


def test_a_program_goes_to_another_process(rng, tmp_path):
    pytest.importorskip("flatbuffers", reason="JAX writes programs with flatbuffers, which is not installed")
    x, weight = uniform(rng, *SHAPE, dtype="float32"), uniform(rng, 4, dtype="float32")

    def call(x):
        return nj.group_norm(x, 2, weight, activation="silu")

    with jax.enable_x64(False):
        allowed = [jax.export.DisabledSafetyCheck.custom_call(_xla.TARGET)]
        program = jax.export.export(jax.jit(call), disabled_checks=allowed)(x)
        y, pull = jax.vjp(call, x)
        np.savez(tmp_path / "arrays.npz", x=x, y=y, dx=pull(y)[0])
    (tmp_path / "program").write_bytes(program.serialize(vjp_order=1))
    run(IMPORTED, str(tmp_path / "program"), str(tmp_path / "arrays.npz"))


def test_other_numbers_are_refused(rng):
    x = uniform(rng, 3, 4)
    call = _xla.Call("forward", nj.functions._spec("layer", (-1,), 1e-5, 0.0, None)[0], ("out",))
    numbers, packed = _xla.describe(call, {"x": x})
    assert not packed
    names = _xla._core.operands
    right = [*numbers, 1, names.index("x"), names.index("out")]

    def called(numbers, **more):
        target = jax.ffi.ffi_call(_xla.TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
        return target(x, call=np.array(numbers, np.int64), **more)

    same_bits([called(right)], [normkit.layer_norm(x)])
    wrong = [right[:5], [], [*right[:-1], 99], [*right[:-3], 2, *right[-2:]], [6, *right[1:]], [-1, *right[1:]]]
    for numbers in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="these are not the numbers of a call of this normkit"):
            called(numbers).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="these are not the numbers of a call"):
        called(right, other=1).block_until_ready()


# ---- the interface of XLA ----------------------------------------------------------------------------------------

OFFSETS = {
    "Extension": ("XLA_FFI_Extension_Base", "struct_size type next"),
    "Version": ("XLA_FFI_Api_Version", "struct_size extension_start major_version minor_version"),
    "Metadata": ("XLA_FFI_Metadata", "struct_size api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "extension_base metadata"),
    "ErrorCreate": ("XLA_FFI_Error_Create_Args", "struct_size extension_start message errc"),
    "StreamGet": ("XLA_FFI_Stream_Get_Args", "struct_size extension_start ctx stream"),
    "DeviceGet": ("XLA_FFI_DeviceOrdinal_Get_Args", "struct_size extension_start ctx device_ordinal"),
    "MemoryAllocate": ("XLA_FFI_DeviceMemory_Allocate_Args", "struct_size extension_start ctx size alignment data"),
    "MemoryFree": ("XLA_FFI_DeviceMemory_Free_Args", "struct_size extension_start ctx size data"),
    "Api": (
        "XLA_FFI_Api", "struct_size extension_start api_version XLA_FFI_Error_Create XLA_FFI_Stream_Get "
        "XLA_FFI_DeviceMemory_Allocate XLA_FFI_DeviceMemory_Free XLA_FFI_DeviceOrdinal_Get",
    ),
    "Buffer": ("XLA_FFI_Buffer", "struct_size extension_start dtype data rank dims"),
    "Buffers": ("XLA_FFI_Args", "struct_size extension_start size types args"),
    "Numbers": ("XLA_FFI_Array", "dtype size data"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size extension_start size types names attrs"),
    "CallFrame": ("XLA_FFI_CallFrame", "struct_size extension_start api ctx stage args rets attrs"),
}  # fmt: skip
OURS = {"extension_start": "extensions", "major_version": "major", "minor_version": "minor", "api_version": "version",
        "extension_base": "base", "errc": "code", "ctx": "context", "device_ordinal": "device", "dims": "extents",
        "XLA_FFI_Error_Create": "create_error", "XLA_FFI_Stream_Get": "get_stream", "attrs": "attributes",
        "XLA_FFI_DeviceMemory_Allocate": "allocate", "XLA_FFI_DeviceMemory_Free": "free", "rets": "results",
        "XLA_FFI_DeviceOrdinal_Get": "get_device"}  # fmt: skip
OF_STRUCT = {
    ("MemoryAllocate", "size"): "bytes", ("MemoryFree", "size"): "bytes", ("Buffers", "size"): "count",
    ("Numbers", "size"): "count", ("Attributes", "size"): "count", ("Buffers", "args"): "buffers",
    ("Attributes", "attrs"): "values", ("CallFrame", "args"): "arguments",
}  # fmt: skip
CONSTANTS = {
    "kMajor": "XLA_FFI_API_MAJOR", "kMetadata": "XLA_FFI_Extension_Metadata",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT", "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    "kArray": "XLA_FFI_AttrType_ARRAY", "kInt64": "XLA_FFI_DataType_S64",
    "kExecute": "XLA_FFI_ExecutionStage_EXECUTE",
}  # fmt: skip


def test_the_interface_is_that_of_jaxlib(tmp_path):
    """Offsets, constants and version, as a C++ compiler has them of both headers."""
    compiler, header = which("c++"), Path(__file__).parent.parent / "python" / "xla_ffi.hpp"
    if compiler is None or not header.exists():
        pytest.skip("there is no C++ compiler, or no sources")
    checks = [f"same({ours}, {theirs})" for ours, theirs in CONSTANTS.items()]
    for struct, (theirs, fields) in OFFSETS.items():
        for field in fields.split():
            own = OF_STRUCT.get((struct, field), OURS.get(field, field))
            checks.append(f"same(offsetof({struct}, {own}), offsetof({theirs}, {field}))")
    checks += [f"same(sizeof({ours}) >= {theirs}_STRUCT_SIZE, true)" for ours, theirs in (
        ("ErrorCreate", "XLA_FFI_Error_Create_Args"), ("StreamGet", "XLA_FFI_Stream_Get_Args"),
        ("DeviceGet", "XLA_FFI_DeviceOrdinal_Get_Args"), ("MemoryAllocate", "XLA_FFI_DeviceMemory_Allocate_Args"),
        ("MemoryFree", "XLA_FFI_DeviceMemory_Free_Args"))]  # fmt: skip
    source = tmp_path / "same.cpp"

    def compiled(checks):
        lines = [
            '#include "xla/ffi/api/c_api.h"', f'#include "{header}"', "using namespace xla_ffi;",
            "#define same(a, b) static_assert(static_cast<long>(a) == static_cast<long>(b), #a)",
            *(f"{check};" for check in checks),
        ]  # fmt: skip
        source.write_text("\n".join(lines))
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{jax.ffi.include_dir()}"]
        return subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)

    found = compiled([*checks, "static_assert(kOldestMinor <= XLA_FFI_API_MINOR && XLA_FFI_API_MINOR <= kNewestMinor)"])
    assert found.returncode == 0, found.stderr
    for check in ("same(offsetof(Buffer, rank), offsetof(XLA_FFI_Buffer, data))", "same(kMajor, XLA_FFI_API_MINOR)"):
        assert compiled([check]).returncode != 0


# The structs of the interface, for calls of handlers without XLA.
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def struct(*fields):
    return type("Struct", (ctypes.Structure,), {"_fields_": [*fields]})


Version = struct(("size", SIZE), ("next", POINTER), ("major", INT), ("minor", INT))
Metadata = struct(("size", SIZE), ("version", Version), ("traits", ctypes.c_uint32))
Extension = struct(("size", SIZE), ("type", INT), ("next", POINTER), ("metadata", ctypes.POINTER(Metadata)))
Request = struct(("size", SIZE), ("next", POINTER), ("context", POINTER), *((f"word{k}", SIZE) for k in range(3)))
Complaint = struct(("size", SIZE), ("next", POINTER), ("message", ctypes.c_char_p), ("code", INT))
FUNCTION, COMPLAIN = (ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(kind)) for kind in (Request, Complaint))
Api = struct(
    ("size", SIZE), ("next", POINTER), ("version", Version), ("internal", POINTER), ("create_error", COMPLAIN),
    ("errors", POINTER * 3), ("get_stream", FUNCTION), ("states", POINTER * 4), ("allocate", FUNCTION),
    ("free", FUNCTION), ("others", POINTER * 6), ("get_device", FUNCTION),
)  # fmt: skip
Buffer = struct(("size", SIZE), ("next", POINTER), ("dtype", INT), ("data", POINTER), ("rank", SIZE), ("dims", POINTER))
Several = struct(("size", SIZE), ("next", POINTER), ("count", SIZE), ("types", POINTER), ("buffers", POINTER))
Numbers = struct(("dtype", INT), ("count", SIZE), ("data", POINTER))
Attributes = struct(
    ("size", SIZE), ("next", POINTER), ("count", SIZE), *((n, POINTER) for n in ("types", "names", "values"))
)
Frame = struct(
    ("size", SIZE), ("next", POINTER), ("api", ctypes.POINTER(Api)), ("context", POINTER), ("stage", INT),
    ("arguments", Several), ("results", Several), ("attributes", Attributes),
)  # fmt: skip


class Runtime:
    """As much of XLA as a handler sees of it."""

    def __init__(self, on_device, version=(0, 3)):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = POINTER, [ctypes.py_object, ctypes.c_char_p]
        address = get(_xla._core.xla_handlers[on_device], b"xla._CUSTOM_CALL_TARGET")
        self.handler = ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(Frame))(address)
        self.asked, self.complaint, self.held, self.fails = [], None, {}, None
        self.api = Api(version=Version(0, None, *version), create_error=COMPLAIN(self.create_error))
        for name in ("get_stream", "allocate", "free", "get_device"):
            setattr(self.api, name, FUNCTION(lambda request, name=name: self.answer(name, request.contents)))

    def create_error(self, complaint):
        self.complaint = complaint.contents.message.decode(), complaint.contents.code
        return 1

    def answer(self, name, request):
        assert request.context == 7
        self.asked.append(name)
        if name == self.fails:
            return 2
        if name == "get_stream":
            request.word0 = 0
        elif name == "get_device":
            ctypes.c_int32.from_buffer(request, Request.word0.offset).value = 0
        elif name == "allocate":
            assert request.word1 == 256
            memory = np.empty(request.word0 + 256, np.uint8)
            request.word2 = (memory.ctypes.data + 255) // 256 * 256
            self.held[request.word2] = memory
        else:
            assert self.held.pop(request.word1).size == request.word0 + 256
        return None

    def version(self):
        metadata = Metadata()
        extension = Extension(ctypes.sizeof(Extension), 1, None, ctypes.pointer(metadata))
        frame = Frame(next=ctypes.addressof(extension), api=self.api and ctypes.pointer(self.api))
        assert self.handler(frame) is None
        return metadata.version.major, metadata.version.minor

    def call(self, numbers, arguments, results, stage=3):
        kept = []

        def several(arrays):
            buffers = [Buffer(data=a.ctypes.data) for a in arrays]
            pointers = (POINTER * len(arrays))(*(ctypes.addressof(b) for b in buffers))
            kept.append((buffers, pointers))
            return Several(count=len(arrays), buffers=ctypes.addressof(pointers))

        numbers = np.array(numbers, np.int64)
        attribute, types = Numbers(5, numbers.size, numbers.ctypes.data), INT(1)
        values = POINTER(ctypes.addressof(attribute))
        attributes = Attributes(count=1, types=ctypes.addressof(types), values=ctypes.addressof(values))
        frame = Frame(
            api=ctypes.pointer(self.api), context=7, stage=stage, arguments=several(arguments),
            results=several(results), attributes=attributes,
        )  # fmt: skip
        return self.handler(frame)


def test_the_version_that_handlers_tell():
    """XLA hears its own version where it is known, else the newest that is, and decides."""
    for on_device in (False, True):
        for version, told in (((0, 1), 1), ((0, 2), 2), ((0, 3), 3), ((0, 4), 3), ((0, 0), 3), ((1, 1), 3)):
            assert Runtime(on_device, version).version() == (0, told)
        runtime = Runtime(on_device)
        runtime.api = None  # so are calls of 0.1
        assert runtime.version() == (0, 1)


@pytest.mark.parametrize("name", ["group", "batch"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_handler_of_cuda(rng, name, phase):
    """It asks for stream, device and memory, which it gives back. Kernels of CUDA run where they are made for the CPU;
    elsewhere there are none, or no device, and it says so."""
    x = uniform(rng, 16, 64, 32, 32, dtype="float32")
    case = Case("group_norm", (), {"num_groups": 2}) if name == "group" else Case("batch_norm", (), {"training": True})
    y, mean, rstd = getattr(normkit, case.name)(x, **case.options, return_stats=True)
    spec = nj.functions._spec(name, (1,), 1e-5, 0.0, None, groups=2 if name == "group" else 1)[0]
    if phase == "forward":
        given, expected = {"x": x}, {"out": y, "mean": mean, "rstd": rstd}
    else:
        given = {"dy": y, "x": x, "mean": mean, "rstd": rstd}
        expected = {"out": getattr(normkit, f"{case.name}_backward")(**given, **case.options, need=("dx",))[0]}
    numbers, packed = _xla.describe(_xla.Call(phase, spec, tuple(expected)), given)
    assert not packed
    found = {name: np.zeros_like(a) for name, a in expected.items()}
    numbers = [*numbers, len(given), *(_xla._core.operands.index(name) for name in (*given, *found))]

    runtime = Runtime(True)
    assert runtime.call(numbers, [*given.values()], [*found.values()], stage=2) is None  # which is not the stage
    assert not runtime.asked
    error = runtime.call(numbers, [*given.values()], [*found.values()])
    assert not runtime.held
    if _xla._core.cuda == "shim":
        assert error is None
        assert {"get_stream", "get_device"} <= {*runtime.asked}
        same_bits(found.values(), expected.values())
        if "allocate" in runtime.asked:
            runtime.fails = "allocate"
            assert runtime.call(numbers, [*given.values()], [*found.values()]) == 2  # XLA's own error
    elif not normkit.cuda_available():
        message, code = runtime.complaint
        assert (error, code) == (1, 13)
        assert "CUDA" in message
    runtime.fails = "get_stream"
    assert runtime.call(numbers, [*given.values()], [*found.values()]) == 2


# ---- without the interface ---------------------------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """A JAX whose interface has another version."""

    def refuse(*_, **__):
        raise RuntimeError("the handler's API version (0.3) is incompatible")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    caches = _xla._is_known, nj._transforms._mappable, nj._transforms._mappable_deviation

    def forget():
        jax.clear_caches()
        for cache in caches:
            cache.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def test_other_versions_go_through_python_and_say_so_once(rng, unknown):
    arrays, told, call = made(rng, CASES["group"], OPTIONS["all"])
    with pytest.warns(UserWarning, match="through Python, which is slow: JAX .* does not know .the handler's API"):
        found, pull = jax.vjp(jax.jit(call), *arrays.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dy = uniform(rng, *SHAPE)
        expected, gradients = by_normkit(CASES["group"], arrays, told, [dy])
        same_bits([found], expected)
        same_bits(pull(dy), gradients.values())
        x = arrays["x"]
        updated = running(x)
        y = normkit.batch_norm(x, **updated, training=True)
        same_bits(nj.batch_norm(x, **running(x), training=True), [y, *updated.values()])
        same_bits([nj.adaptive_instance_norm(x, x * 2)], [normkit.adaptive_instance_norm(x, x * 2)])
        xs = np.stack([x, x + 1])
        same_bits(jax.vmap(nj.instance_norm)(xs), [normkit.instance_norm(x) for x in xs])
        assert CALL not in jax.jit(nj.instance_norm).lower(x).as_text()
        check_grads(lambda c, s: nj.adaptive_instance_norm(c, s), (x[..., 0], x[..., 1]), order=1, modes=["rev"])


# ---- manners -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "weight": (lambda x: nj.instance_norm(x, np.ones(7)), ValueError, r"weight has shape \(7,\), expected \(4,\)"),
    "groups": (lambda x: nj.group_norm(x, 3), ValueError, "num_groups is 3, expected a divisor of 4"),
    "axis": (lambda x: nj.layer_norm(x, axis=7), np.exceptions.AxisError, "axis is 7, expected -4 to 3"),
    "activation": (lambda x: nj.layer_norm(x, activation="swish"), ValueError, "activation is 'swish', expected"),
    "no-activation": (lambda x: nj.layer_norm(x, activation=3), TypeError, "activation is 3, expected"),
    "residual": (lambda x: nj.layer_norm(x, return_residual=True), ValueError, "residual is None, expected an array"),
    "residual-shape": (lambda x: nj.layer_norm(x, residual=x[0]), ValueError, "residual has shape"),
    "eps": (lambda x: nj.layer_norm(x, eps=-1.0), ValueError, "eps is -1"),
    "no-eps": (lambda x: nj.layer_norm(x, eps="small"), TypeError, "eps is 'small', expected a number"),
    "momentum": (
        lambda x: nj.batch_norm(x, training=True, **running(x), momentum=2.0), ValueError, "momentum is 2",
    ),
    "dtype": (lambda x: nj.layer_norm(x.astype(np.complex128)), TypeError, "x has dtype complex128"),
    "list": (lambda x: nj.layer_norm([1.0, 2.0]), TypeError, "x is list, expected a jax.Array"),
    "nothing": (lambda x: nj.instance_norm(None), TypeError, "x is NoneType, expected a jax.Array"),
    "number": (lambda x: nj.layer_norm(x, 2.0), TypeError, "weight is float, expected a jax.Array"),
    "frozen": (lambda x: nj.batch_norm(x), ValueError, "running_mean"),
    "mask": (lambda x: nj.layer_norm(x, where=np.ones(5)), TypeError, "where has dtype float64, expected bool"),
    "style": (
        lambda x: nj.adaptive_instance_norm(x, x[:, :2]), ValueError,
        r"style has images and channels \(2, 2\), expected \(2, 4\), those of content, or \(1, 4\)",
    ),
    "style-axes": (lambda x: nj.adaptive_instance_norm(x, x[0, 0, 0]), ValueError, "style has 1 axis, expected"),
}  # fmt: skip


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(rng, mistake, traced):
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        (jax.jit(call) if traced else call)(jnp.asarray(uniform(rng, *SHAPE)))


def test_numbers_are_known_when_a_call_is_traced(rng):
    with pytest.raises(TypeError, match="eps is a tracer, expected a number that is known"):
        jax.jit(lambda x, eps: nj.layer_norm(x, eps=eps))(uniform(rng, 2, 3), 1e-5)


def test_the_functions_of_normkit_say_where_tracers_go(rng):
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match=r"x is a \w+ of JAX, expected an array that holds values: use normkit.jax"):
            transform(normkit.instance_norm)(uniform(rng, *SHAPE))


def test_nothing_is_kept(rng):
    """A thousand steps make no object that stays, and no array."""
    x, weight = jnp.asarray(uniform(rng, *SHAPE)), jnp.asarray(uniform(rng, 4))
    step = jax.jit(jax.grad(lambda x, w: (nj.group_norm(x, 2, w, activation="silu") ** 2).sum(), (0, 1)))

    def count():
        gc.collect()
        return len(gc.get_objects()), len(jax.live_arrays())

    for _ in range(10):
        step(x, weight)
        nj.group_norm(x, 2, weight)
    before = count()
    for _ in range(1000):
        step(x, weight)
        nj.group_norm(x, 2, weight)
    after = count()
    assert after[1] == before[1]
    assert after[0] - before[0] < 100  # caches of others may grow by a few objects; a thousand steps did not


def test_importing_normkit_imports_no_jax():
    run("import normkit, sys; assert 'jax' not in sys.modules and 'normkit.jax' not in sys.modules")


def test_without_jax_there_is_an_error_that_names_the_extra():
    run("""
import sys
sys.modules["jax"] = None
try:
    import normkit.jax
except ImportError as error:
    assert 'pip install "normkit[jax]"' in str(error), error
else:
    raise AssertionError
""")
