"""Activations and weight offsets: their own accuracy, then through every operation, forward and backward."""

import math

import activations
import bounds
import normkit
import numpy as np
import pytest
from activations import ACTIVATIONS, name_of
from cases import DTYPES, INTEGERS, LAYOUTS, MASKS, SHAPES, Guarded, bits, lay, uniform
from checks import check_backward, check_forward
from reference import OPERATIONS, REGISTRY, compute, wide

INSTANCE = OPERATIONS["instance"]
SMALL = (3, 5, 4, 7)
FEW = [OPERATIONS[name] for name in ("instance", "group-last", "batch", "layer", "rms", "over-first", "over-channels")]
FUSED = [name for name in normkit.isas() if name != "sse4"]


def arguments(dtype):
    """Every size of number, of both signs, closest where the activations bend and where they end."""
    near = np.linspace(-12, 12, 4097)
    ends = np.linspace(-120, 120, 1001)
    sizes = np.geomspace(1e-36, min(float(np.finfo(compute(dtype)).max) / 16, 1e300), 500)
    if dtype == np.float16:
        sizes = np.geomspace(1e-7, 6e4, 500)
    x = np.concatenate([[0.0], near, ends, sizes, -sizes]).astype(dtype)
    return x.reshape(1, 1, -1)


def plain(x):
    """Statistics that leave z = x, exactly."""
    return {"running_mean": np.zeros(1), "running_var": np.ones(1), "use_input_stats": False, "eps": 0.0}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_values_of_the_activation_alone(activation, dtype, isa):
    x = arguments(dtype)
    truth = activations.activated(wide(x), activation)
    u = bounds.unit(dtype)
    bound = bounds.evaluation(activation, wide(x)) * u * np.abs(truth) + bounds.TINY[compute(dtype).name]
    y = INSTANCE.forward(x, activation=activation, **plain(x))
    assert y.dtype == x.dtype
    assert bounds.excess(y, truth, bound + bounds.stored(np.abs(truth) + bound, dtype)) <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_derivatives_of_the_activation_alone(activation, dtype, isa):
    x = arguments(dtype)
    x = x[x != 0].reshape(1, 1, -1)
    truth = activations.slope(wide(x), activation)
    bound = bounds.ACTIVATION * bounds.unit(dtype) * bounds.steepest(activation)[0]
    dx = slopes_of(activation, x)
    assert bounds.excess(dx, truth, bound + bounds.stored(np.abs(truth) + bound, dtype)) <= 1


def slopes_of(activation, x):
    """What a gradient of ones becomes at statistics that leave z = x, exactly."""
    one = np.ones((1, 1), compute(x.dtype))
    return INSTANCE.backward(np.ones_like(x), x, 0 * one, one, activation=activation, use_input_stats=False)[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_second_derivatives_of_the_activation_alone(activation, dtype, isa):
    x = arguments(dtype)
    x = x[x != 0].reshape(1, 1, -1)
    z = wide(x)
    truth = activations.curvature(z, activation)
    steepest = bounds.steepest(activation)[1]
    # The truth is a difference of slopes near 1, each with up to 8 roundings: 2 (45 + 9 + 1) / (60 steps) times those.
    bound = bounds.ACTIVATION * bounds.unit(dtype) * steepest + 8 * 2.0**12 * float(np.finfo(z.dtype).eps)
    found = curvatures_of(activation, x)
    assert bounds.excess(found, truth, bound + bounds.stored(np.abs(truth) + bound, dtype)) <= 1


def curvatures_of(activation, x):
    """What a double backward sends to x at statistics that leave z = x, where dy and its own gradient are ones."""
    one = np.ones((1, 1), compute(x.dtype))
    call = INSTANCE.double_backward((None, None, one[0]), np.ones_like(x), x, 0 * one, one, use_input_stats=False)
    assert (call[1] == 0).all()  # nothing is bent
    return INSTANCE.double_backward(
        (None, None, one[0]), np.ones_like(x), x, 0 * one, one, use_input_stats=False, activation=activation
    )[1]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("activation", "place", "curvature"), [
    ("relu", 0, 0.0), ("leaky_relu", 0, 0.0), ("relu6", 6, 0.0), (("elu", 0.5), 0, 0.0), ("elu", 1, 0.0),
    ("silu", 0, 0.5), ("sigmoid", 0, 0.0), ("tanh", 0, 0.0), ("hardswish", 3, 0.0), ("hardswish", -3, 0.0),
    ("hardswish", 0, 1 / 3), ("softplus", 0, 0.25)], ids=str)  # fmt: skip
def test_second_derivatives_at_kinks_and_zero(activation, place, curvature, dtype, isa):
    found = curvatures_of(activation, np.full((1, 1, 5), place, dtype)).astype(np.float64)
    assert (np.abs(found - curvature) <= bounds.stored(curvature, dtype) + 2.0**-24 * curvature).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_nothing_is_bent_at_the_ends(activation, dtype, isa):
    end = np.finfo(dtype).max if dtype.kind == "f" else bounds.LARGEST["bfloat16"]
    x = np.array([-end, end]).astype(dtype).reshape(1, 1, -1)
    assert (np.abs(curvatures_of(activation, x).astype(np.float64)) <= bounds.unit(dtype)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ["mish", "softplus"])
def test_derivatives_relative_to_themselves(activation, dtype, isa):
    """Also where they vanish on the left. That of mish is a sum of two terms, which cancel near its zero at -1.19."""
    x = arguments(np.dtype(dtype))
    z = wide(x)
    truth = activations.slope(z, activation)
    size = np.abs(truth)
    if activation == "mish":
        gate = np.tanh(np.logaddexp(z, 0))
        size = gate + np.abs(truth - gate)
    bound = bounds.ACTIVATION * bounds.unit(dtype) * size + bounds.TINY[dtype]
    assert bounds.excess(slopes_of(activation, x), truth, bound) <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("activation", "place", "slope"), [
    ("relu", 0, 0.0), ("leaky_relu", 0, 0.01), (("leaky_relu", 0.25), 0, 0.25), ("elu", 0, 1.0), ("silu", 0, 0.5),
    ("gelu", 0, 0.5), ("gelu_tanh", 0, 0.5), ("sigmoid", 0, 0.25), ("tanh", 0, 1.0), ("relu6", 0, 0.0),
    ("relu6", 6, 0.0), ("hardswish", 0, 0.5), ("hardswish", -3, 0.0), ("hardswish", 3, 1.0), ("mish", 0, 0.6),
    ("softplus", 0, 0.5)], ids=str)  # fmt: skip
def test_derivatives_at_kinks_and_zero(activation, place, slope, dtype, isa):
    found = slopes_of(activation, np.full((1, 1, 5), place, dtype)).astype(np.float64)
    assert (np.abs(found - slope) <= bounds.stored(slope, dtype) + 2.0**-24 * slope).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_derivatives_beside_kinks(activation, dtype, isa):
    """At the numbers next to a kink: the side that they are on."""
    kinks = np.array(list(bounds.KINKS[activation]), dtype)
    step = kinks.astype(np.float64) * bounds.UNIT[dtype.name] * 2 + bounds.SMALLEST[dtype.name]
    x = np.concatenate([kinks + step, kinks - step]).astype(dtype).reshape(1, 1, -1)
    truth = activations.slope(wide(x), activation)
    bound = bounds.ACTIVATION * bounds.unit(dtype) * np.abs(truth)
    assert bounds.excess(slopes_of(activation, x), truth, bound + bounds.stored(np.abs(truth) + bound, dtype)) <= 1


LIMITS = {
    "relu": (0, np.inf, 0, 1), "leaky_relu": (-np.inf, np.inf, 0.01, 1), "silu": (0, np.inf, 0, 1),
    "gelu": (0, np.inf, 0, 1), "gelu_tanh": (0, np.inf, 0, 1), "elu": (-1, np.inf, 0, 1), "sigmoid": (0, 1, 0, 0),
    "tanh": (-1, 1, 0, 0), "relu6": (0, 6, 0, 0), "hardswish": (0, np.inf, 0, 1), "mish": (0, np.inf, 0, 1),
    "softplus": (0, np.inf, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if isinstance(a, str)])
def test_infinities_have_the_limits(activation, dtype, isa):
    """Value and derivative have their limits from the largest finite number on."""
    end = np.finfo(dtype).max if dtype.kind == "f" else bounds.LARGEST["bfloat16"]
    x = np.array([-np.inf, np.inf, -end, end]).astype(dtype).reshape(1, 1, -1)
    left, right, *slopes = LIMITS[activation]
    y, dx = INSTANCE.forward(x, activation=activation, **plain(x)).ravel(), slopes_of(activation, x[..., 2:]).ravel()
    assert (y[:2] == np.array([left, right]).astype(dtype)).all()
    if np.isfinite(left):
        assert y[2] == y[0]
    assert y[3] == (end if right == np.inf else right)
    assert (np.abs(dx.astype(np.float64) - slopes) <= bounds.stored(slopes, dtype) + bounds.unit(dtype)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_operation(op, activation, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL, offset=0.25)
    weight, bias = (rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32) for _ in range(2))
    check_forward(op, x, weight, bias, activation=activation)
    check_backward(op, dy, x, weight, bias=bias, activation=activation)
    check_forward(op, x, activation=activation)
    check_backward(op, dy, x, activation=activation)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_every_dtype(layout, activation, dtype, isa, rng):
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    weight, bias = rng.standard_normal((2, 5)).astype(np.float32)
    check_forward(INSTANCE, x, weight, bias, activation=activation)
    if dtype in DTYPES.values():
        check_backward(INSTANCE, dy, x, weight, bias=bias, activation=activation)


@pytest.mark.parametrize("kind", ["channel", "pixel", "last", "kept"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", FEW, ids=repr)
def test_every_layout_and_weight(op, layout, kind, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    weight, bias = (np.asarray(rng.standard_normal(op.weight_shape(SMALL, kind))).astype(np.float32) for _ in range(2))
    check_forward(op, x, weight, bias, activation="silu", weight_offset=1.0)
    check_backward(op, dy, x, weight, bias=bias, activation="silu", weight_offset=1.0)
    check_forward(op, x, None, bias, activation="relu")
    check_backward(op, dy, x, weight, activation="relu")


@pytest.mark.parametrize("activation", ["relu", "gelu", ("elu", 0.5)], ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_length(shape, layout, activation, isa, rng):
    shape = SHAPES[shape]
    dy, x = (lay(uniform(rng, shape), layout) for _ in range(2))
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    check_forward(INSTANCE, x, weight, bias, activation=activation)
    check_backward(INSTANCE, dy, x, weight, bias=bias, activation=activation)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("run", [33, 513, 1100])
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_weights_along_rows(name, run, activation, isa, rng):
    """Of rows in batches, through buffers that hold a part of a long one."""
    op = OPERATIONS[name]
    dy, x = (uniform(rng, (19, run)) for _ in range(2))
    weight, bias = rng.standard_normal((2, *op.weight_shape(x.shape, "channel"))).astype(np.float32)
    assert weight.size == run
    check_backward(op, dy, x, weight, bias=bias, activation=activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_offsets_cost_backward_no_more_than_the_rounded_mean(offset, layout, isa, rng):
    dy, x = (lay(uniform(rng, (2, 3, 33, 33), offset=o), layout) for o in (0, offset))
    check_forward(INSTANCE, x, activation="gelu")
    check_backward(INSTANCE, dy, x, activation="gelu")


@pytest.mark.parametrize("bias_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", [INSTANCE, OPERATIONS["layer"], OPERATIONS["over-first"]], ids=repr)
def test_bias_of_every_dtype_in_backward(op, dtype, bias_dtype, isa, rng):
    dy, x = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    bias = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(dtype if bias_dtype == "x" else bias_dtype)
    check_backward(op, dy, x, bias=bias, activation="silu")


@pytest.mark.parametrize("mask", ["random", "image-and-position"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_all_options_at_once(op, layout, mask, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    weight, bias = (rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32) for _ in range(2))
    options = {"where": MASKS[mask](rng, SMALL), "activation": "gelu_tanh", "weight_offset": 1.0}
    check_forward(op, x, weight, bias, **options)
    check_backward(op, dy, x, weight, bias=bias, dresidual=uniform(rng, SMALL), **options)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_statistics(op, layout, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    shape = op.statistics_shape(SMALL)
    mean = rng.standard_normal(shape).astype(np.float32) if op.center else None
    rstd = rng.uniform(0.5, 2, shape).astype(np.float32)
    weight, bias = (rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32) for _ in range(2))
    options = {"activation": "gelu", "bias": bias, "use_input_stats": False, "weight_offset": 0.5}
    check_backward(op, dy, x, weight, stats=(mean, rstd), **options)


@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(np.uint8)], ids=[*DTYPES, "uint8"])
def test_out_dtype(dtype, out_dtype, isa, rng):
    check_forward(INSTANCE, uniform(rng, SMALL, dtype), activation="tanh", out_dtype=out_dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop", "step"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_out(op, layout, rng):
    """Given, in place; the bits of a fresh result, and no byte beside them."""
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    stats = op.statistics(x)[1:]
    y, dx = op.forward(x, activation="silu"), op.backward(dy, x, *stats, activation="silu")[0]
    out = Guarded(SMALL, np.float32, layout)
    assert bits(op.forward(x, activation="silu", out=out.array)) == bits(y)
    assert bits(op.backward(dy, x, *stats, activation="silu", out=out.array)[0]) == bits(dx)
    assert out.untouched()
    assert bits(op.backward(dy, x, *stats, activation="silu", out=dy)[0]) == bits(dx)
    assert bits(op.forward(x, activation="silu", out=x)) == bits(y)


@pytest.mark.parametrize("need", [(), ("dx",), ("dweight",), ("dbias",), ("dx", "dbias")], ids=str)
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_need_leaves_out_what_is_not_named(op, kind, need, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight, bias = (rng.standard_normal(op.weight_shape(SMALL, kind)).astype(np.float32) for _ in range(2))
    stats = op.statistics(x)[1:]
    options = {"bias": bias, "activation": "gelu"}
    everything = op.backward(dy, x, *stats, weight, **options)
    for name, whole, found in zip(
        ("dx", "dweight", "dbias"), everything, op.backward(dy, x, *stats, weight, need=need, **options), strict=True
    ):
        assert (found is not None) == (name in need)
        assert found is None or bits(found) == bits(whole)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("length", [1, 7, 16, 129])
def test_nan_goes_through(length, activation, dtype, isa):
    x = np.full((1, 1, length), np.nan, dtype)
    assert np.isnan(INSTANCE.forward(x, activation=activation, **plain(x)).astype(np.float32)).all()
    assert np.isnan(INSTANCE.forward(x, activation=activation).astype(np.float32)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_poisons_its_own_instance_only(layout, activation, isa, rng):
    dy, x = (lay(uniform(rng, (3, 5, 37)), layout) for _ in range(2))
    clean = INSTANCE.statistics(x, activation=activation)
    before = INSTANCE.backward(dy, x, *clean[1:], activation=activation)[0]
    x[1, 2, 3] = np.nan
    y, mean, rstd = INSTANCE.statistics(x, activation=activation)
    after = INSTANCE.backward(dy, x, mean, rstd, activation=activation)[0]
    others = np.ones((3, 5), bool)
    others[1, 2] = False
    assert bits(y[others]) == bits(clean[0][others])
    assert bits(after[others]) == bits(before[others])
    assert np.isnan(y[1, 2]).all()
    if activation != "relu":  # whose derivative at NaN is a comparison
        assert np.isnan(after[1, 2]).all()


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_the_default_parameters(op, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    stats = op.statistics(x)[1:]
    for name, parameter in (("leaky_relu", 0.01), ("elu", 1.0)):
        pair = (name, parameter)
        assert bits(op.forward(x, activation=name)) == bits(op.forward(x, activation=pair))
        found, expected = (op.backward(dy, x, *stats, activation=a) for a in (name, pair))
        assert [bits(a) for a in found] == [bits(a) for a in expected]


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_none_is_no_activation(op, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    bias = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32)
    stats = op.statistics(x)[1:]
    assert bits(op.forward(x, None, bias, activation=None)) == bits(op.forward(x, None, bias))
    found, without = op.backward(dy, x, *stats, activation=None, bias=bias), op.backward(dy, x, *stats)
    same = slice(3 if bias.shape == without[2].shape else 2)  # else dbias has the shape of bias
    assert [bits(a) for a in found[same]] == [bits(a) for a in without[same]]


@pytest.mark.parametrize("weight_dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight_offset", [1.0, -0.3, 1e3])
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_weight_offset(op, kind, weight_offset, weight_dtype, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL, offset=0.25)
    weight, bias = (rng.standard_normal(op.weight_shape(SMALL, kind)).astype(weight_dtype) for _ in range(2))
    check_forward(op, x, weight, bias, weight_offset=weight_offset)
    check_backward(op, dy, x, weight, weight_offset=weight_offset)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_weight_offset_in_every_dtype(op, dtype, isa, rng):
    dy, x = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    weight = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(dtype)
    check_forward(op, x, weight, weight_offset=1.0)
    check_backward(op, dy, x, weight, weight_offset=1.0)


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_weight_offset_without_weight_is_nothing(op, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    stats = op.statistics(x)[1:]
    assert bits(op.forward(x, weight_offset=1.0)) == bits(op.forward(x))
    found = op.backward(dy, x, *stats, weight_offset=1.0)
    assert [bits(a) for a in found] == [bits(a) for a in op.backward(dy, x, *stats)]


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_weight_offset_of_whole_numbers_is_a_weight(op, isa, rng):
    """A sum that rounds nowhere: the bits of the weight that it is, dweight among them."""
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight = rng.integers(-8, 8, op.weight_shape(SMALL, "channel")).astype(np.float32)
    stats = op.statistics(x)[1:]
    assert bits(op.forward(x, weight, weight_offset=1.0)) == bits(op.forward(x, weight + 1))
    found = op.backward(dy, x, *stats, weight, weight_offset=1.0)
    assert [bits(a) for a in found] == [bits(a) for a in op.backward(dy, x, *stats, weight + 1)]


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add: nothing to compare")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=name_of)
def test_instruction_sets_agree(activation, layout, dtype, rng):
    dy, x = (lay(uniform(rng, (3, 5, 6, 23), dtype, std=4), layout) for _ in range(2))
    weight, bias = rng.standard_normal((2, 5)).astype(np.float32)
    found = []
    for name in FUSED:
        with normkit.use_isa(name):
            y, mean, rstd = INSTANCE.statistics(x, weight=weight, bias=bias, activation=activation)
            gradients = INSTANCE.backward(dy, x, mean, rstd, weight, bias=bias, activation=activation)
            found.append([bits(a) for a in (y, *gradients)])
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("case", [((64, 16, 32, 32), "contiguous"), ((1, 2, 400, 300), "contiguous"),
                                  ((1, 24, 150, 60), "channels-last")], ids=str)  # fmt: skip
def test_thread_counts_agree(case, rng):
    shape, layout = case
    dy, x = (lay(uniform(rng, shape), layout) for _ in range(2))
    weight, bias = rng.standard_normal((2, shape[1])).astype(np.float32)
    found = []
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            y, mean, rstd = INSTANCE.statistics(x, weight=weight, bias=bias, activation="gelu")
            gradients = INSTANCE.backward(dy, x, mean, rstd, weight, bias=bias, activation="gelu")
            found.append([bits(a) for a in (y, *gradients)])
    assert all(f == found[0] for f in found)


ERRORS = {
    "unknown": "swish",
    "capitals": "ReLU",
    "empty": "",
    "parameter-for-one-without": ("relu", 0.1),
    "unknown-with-parameter": ("swish", 0.1),
    "parameter-is-a-string": ("leaky_relu", "0.1"),
    "parameter-is-none": ("elu", None),
    "no-parameter": ("elu",),
    "two-parameters": ("elu", 1.0, 2.0),
    "number": 1,
    "function": math.tanh,
}


@pytest.mark.parametrize("activation", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_errors(op, activation):
    """Naming the argument, before anything is written."""
    x = np.ones((2, 3, 8), np.float32)
    out = Guarded(x.shape, np.float32)
    stats = op.statistics(x)[1:]
    with pytest.raises((TypeError, ValueError), match=r"^activation is "):
        op.forward(x, activation=activation, out=out.array)
    with pytest.raises((TypeError, ValueError), match=r"^activation is "):
        op.backward(x, x, *stats, activation=activation, out=out.array)
    assert out.unwritten()
