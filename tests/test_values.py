"""Forward and backward against the reference: every operation, shape, dtype, weight and instruction set."""

import bounds
import normkit
import numpy as np
import pytest
from cases import CHANNELS_LAST, DTYPES, INTEGERS, MATRIX, SHAPES, few_bits, lay, uniform
from checks import check_backward, check_forward
from reference import OPERATIONS, REGISTRY, applied, compute, wide

INSTANCE = OPERATIONS["instance"]
SMALL = (3, 5, 4, 7)
# Shapes of at most a chunk: sums of few bits are exact there.
EXACT = ["square-tail", "vector", "vector-and-one", "register-row", "register-row-and-one", "chunk-less-one", "chunk"]


def parameters(op, shape, kind, rng, dtype=np.float32):
    return [np.asarray(rng.standard_normal(op.weight_shape(shape, kind))).astype(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_matches_the_reference(shape, dtype, isa, rng):
    x = uniform(rng, shape, dtype, offset=0.25)
    check_forward(INSTANCE, x, *parameters(INSTANCE, shape, "channel", rng))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_matches_the_reference(shape, dtype, isa, rng):
    dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=0.25)
    check_backward(INSTANCE, dy, x, parameters(INSTANCE, shape, "channel", rng)[0])


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("shape", CHANNELS_LAST.values(), ids=CHANNELS_LAST)
def test_forward_channels_last(shape, dtype, isa, rng):
    x = lay(uniform(rng, shape, dtype, offset=0.25), "channels-last")
    check_forward(INSTANCE, x, *parameters(INSTANCE, shape, "channel", rng))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", CHANNELS_LAST.values(), ids=CHANNELS_LAST)
def test_backward_channels_last(shape, dtype, isa, rng):
    dy, x = (lay(uniform(rng, shape, dtype), "channels-last") for _ in range(2))
    check_backward(INSTANCE, dy, x, parameters(INSTANCE, shape, "channel", rng)[0])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["square-tail", "chunk-and-one", "rows", "wide-rows", "long-batch", "volume"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_operation(op, shape, dtype, isa, rng):
    shape = SHAPES[shape]
    dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=0.25)
    check_forward(op, x)
    check_backward(op, dy, x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", [op for op in REGISTRY if op.least_ndim == 2], ids=repr)
def test_matrices(op, dtype, isa, rng):
    dy, x = uniform(rng, MATRIX, dtype), uniform(rng, MATRIX, dtype, offset=0.25)
    check_forward(op, x)
    check_backward(op, dy, x)


@pytest.mark.parametrize("kind", sorted({kind for op in REGISTRY for kind in op.weights(SMALL)}))
@pytest.mark.parametrize("given", ["weight", "bias", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_weight(op, layout, given, kind, isa, rng):
    if kind not in op.weights(SMALL):
        return
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    weight, bias = parameters(op, SMALL, kind, rng)
    check_forward(op, x, weight if given != "bias" else None, bias if given != "weight" else None)
    if given != "bias":
        check_backward(op, dy, x, weight)


@pytest.mark.parametrize("kind", ["normalized", "pixel"])
@pytest.mark.parametrize(
    "op", [OPERATIONS[name] for name in ("layer", "over-all-but-first", "rms", "over-first")], ids=repr
)
def test_weights_longer_than_a_buffer(op, kind, isa, rng):
    shape = (66, 3, 1100)
    dy, x = uniform(rng, shape), uniform(rng, shape)
    weight, bias = parameters(op, shape, kind, rng)
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight)


@pytest.mark.parametrize("length", [96, 1024, 1100, 1101])
def test_a_row_of_several_pieces(length, isa, rng):
    """Weights change from piece to piece of a row, and pieces are longer than what is worked on at a time, or not."""
    op, shape = OPERATIONS["over-all-but-first"], (5, 12, length)
    dy, x = uniform(rng, shape), uniform(rng, shape)
    weight, bias = parameters(op, shape, "channel", rng)
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight)


@pytest.mark.parametrize("bias_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("weight_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "op", [OPERATIONS[name] for name in ("instance", "over-all-but-first", "over-first")], ids=repr
)
def test_parameters_mix_dtypes(op, dtype, kind, weight_dtype, bias_dtype, isa, rng):
    dy, x = (uniform(rng, SMALL, dtype) for _ in range(2))
    weight = parameters(op, SMALL, kind, rng, dtype if weight_dtype == "x" else weight_dtype)[0]
    bias = parameters(op, SMALL, kind, rng, dtype if bias_dtype == "x" else bias_dtype)[1]
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight)


@pytest.mark.parametrize("kind", ["channel", "image", "last", "scalar"])
@pytest.mark.parametrize("weight_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", [op for op in REGISTRY if op.function == "normalize"], ids=repr)
def test_parameter_gradients_are_rounded_once(op, dtype, weight_dtype, kind, rng):
    """Thousands of terms that cancel: each rounded to the dtype of weight before they are added would show."""
    shape = (41, 3, 5, 41)
    dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype)
    check_backward(op, dy, x, parameters(op, shape, kind, rng, weight_dtype)[0])


@pytest.mark.parametrize("shape", EXACT)
@pytest.mark.parametrize("op", [OPERATIONS["instance"], OPERATIONS["layer"]], ids=repr)
def test_exact_sums_leave_only_the_roundings_of_apply(op, shape, isa, rng):
    """The bound without its statistics: 7 units of the last place, as sharp as a bound on y can be."""
    check_forward(op, few_bits(rng, SHAPES[shape]), exact=True)


@pytest.mark.parametrize("shape", ["square-tail", "vector", "vector-and-one", "register-row"])
def test_exact_sums_across_lanes(shape, isa, rng):
    """Shapes have at most a chunk of 128 steps: the pivot of the next would be a mean that has no few bits."""
    check_forward(INSTANCE, lay(few_bits(rng, SHAPES[shape]), "channels-last"), exact=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 16), (2, 3, 8, 32), (1, 40, 256), (4, 16, 64)], ids=str)
def test_exact_sums_backward(shape, layout, isa, rng):
    """A power of two of members: their mean has few bits as well, and so have the differences to it."""
    dy, x = (lay(few_bits(rng, shape), layout) for _ in range(2))
    check_backward(INSTANCE, dy, x, exact=True)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 11, 11), (2, 17, 64, 64), (1, 2, 300, 300)], ids=str)
def test_offsets_cost_no_digits(shape, layout, offset, isa, rng):
    """The bounds hold whatever the offset: nothing in them grows with it but the rounding of the mean itself."""
    dy, x = lay(uniform(rng, shape), layout), lay(uniform(rng, shape, offset=offset), layout)
    check_forward(INSTANCE, x)
    check_backward(INSTANCE, dy, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (2, 16, 64, 64), (1, 2, 300, 300)], ids=str)
def test_a_mean_of_a_million_costs_four_ulp(shape, layout, isa, rng):
    """The promise of the contract, for normal data: 4 ulp of the true answer, plus the rounding of y. Near zero an ulp
    is that of 1, the spread of the answer: y = 0 stands for a difference of two numbers that are rounded themselves."""
    x = lay((1e6 + rng.standard_normal(shape)).astype(np.float32), layout)
    y, truth = INSTANCE.forward(x), INSTANCE.reference(x).y
    ulp = np.spacing(np.maximum(np.abs(truth), 1).astype(np.float32)).astype(np.float64)
    assert bounds.excess(y, truth, 4 * ulp + bounds.stored(truth, np.float32)) <= 1


@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
def test_out_dtype(dtype, out_dtype, isa, rng):
    x = uniform(rng, SMALL, dtype)
    check_forward(INSTANCE, x, *parameters(INSTANCE, SMALL, "channel", rng), out_dtype=out_dtype)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5, 1e3])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("op", [OPERATIONS["instance"], OPERATIONS["rms"]], ids=repr)
def test_eps(op, std, eps, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL, std=std)
    check_forward(op, x, eps=eps)
    check_backward(op, dy, x, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_statistics_backward(op, stats_dtype, layout, dtype, isa, rng):
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    shape = op.statistics_shape(SMALL)
    mean = rng.standard_normal(shape).astype(stats_dtype) if op.center else None
    rstd = rng.uniform(0.5, 2, shape).astype(stats_dtype)
    weight = parameters(op, SMALL, "pixel", rng)[0]
    check_backward(op, dy, x, weight, stats=(mean, rstd), use_input_stats=False)
    check_backward(op, dy, x, stats=(mean, rstd), use_input_stats=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_frozen_mean_keeps_the_digits_of_a_double(layout, isa, rng):
    """A float64 mean has digits that float32 does not: they count as much in dweight as they do in y."""
    shape = (4, 3, 8, 8)
    dy, x = lay(uniform(rng, shape, offset=1.0), layout), lay(uniform(rng, shape, offset=1e5), layout)
    mean, rstd = np.full((4, 3), 1e5 + 0.0037), np.ones((4, 3))
    check_backward(INSTANCE, dy, x, stats=(mean, rstd), use_input_stats=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
@pytest.mark.parametrize(("offset", "off"), [(1e4, 1e-3), (0.0, 0.25)])
@pytest.mark.parametrize("op", [op for op in REGISTRY if op.center], ids=repr)
def test_backward_recenters_from_the_data(op, offset, off, stats_dtype, layout, isa, rng):
    """A mean that is rounded, even badly, changes nothing: the sums find the rest of it in x."""
    shape = (3, 6, 4, 7)  # groups of several channels
    dy, x = lay(uniform(rng, shape), layout), lay(uniform(rng, shape, offset=offset), layout)
    mean, rstd = op.statistics(x)[1:]
    check_backward(op, dy, x, stats=((mean.astype(np.float64) + off).astype(stats_dtype), rstd.astype(stats_dtype)))


def test_rows_of_an_image_share_weights(isa, rng):
    """More rows than one group that adds up their gradients, and another image after them."""
    shape = (3, 130, 20)
    dy, x = uniform(rng, shape), uniform(rng, shape)
    weight = rng.standard_normal((3, 1, 20)).astype(np.float32)
    check_backward(OPERATIONS["over-last"], dy, x, weight)


@pytest.mark.parametrize(
    "need", [(), ("dx",), ("dweight",), ("dbias",), ("dx", "dbias"), ("dbias", "dweight", "dx")], ids=str
)
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_need_leaves_out_what_is_not_named(op, kind, need, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight = parameters(op, SMALL, kind, rng)[0]
    stats = op.statistics(x)[1:]
    everything = dict(zip(("dx", "dweight", "dbias"), op.backward(dy, x, *stats, weight), strict=True))
    for name, found in zip(everything, op.backward(dy, x, *stats, weight, need=need), strict=True):
        assert (found is not None) == (name in need)
        assert found is None or found.tobytes() == everything[name].tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("running_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(momentum, running_dtype, layout, dtype, isa, rng):
    x = lay(uniform(rng, SMALL, dtype, offset=3.0), layout)
    mean, var = rng.standard_normal(5).astype(running_dtype), rng.uniform(1, 2, 5).astype(running_dtype)
    truth = INSTANCE.reference(x)
    unbiased = truth.var * truth.members / (truth.members - 1)
    expected_mean = (1 - momentum) * wide(mean) + momentum * truth.mean.mean(0).ravel()
    expected_var = (1 - momentum) * wide(var) + momentum * unbiased.mean(0).ravel()
    y = INSTANCE.forward(x, running_mean=mean, running_var=var, momentum=momentum)
    assert y.tobytes() == INSTANCE.forward(x).tobytes()

    def rounded(values):
        """The rounding of a running statistic: numbers as exact as forward's are averaged and added in double, and
        rounded; half types by way of float32."""
        return bounds.stored(values, running_dtype) + bounds.stored(values, compute(running_dtype))

    relative = 2 * bounds.rstd_error(truth, dtype).max()
    assert (
        bounds.excess(
            mean,
            expected_mean,
            momentum * bounds.mean(truth, dtype).max() + rounded(expected_mean),
        )
        <= 1
    )
    assert (
        bounds.excess(
            var,
            expected_var,
            momentum * relative * (1 + 1e-5) * np.abs(unbiased).max()
            + momentum * bounds.stored(unbiased, np.float32 if dtype != np.float64 else dtype).max()
            + rounded(expected_var),
        )
        <= 1
    )


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop", "rolled"])
@pytest.mark.parametrize("running_dtype", DTYPES.values(), ids=DTYPES)
def test_normalize_with_running_statistics(running_dtype, layout, dtype, isa, rng):
    x = lay(uniform(rng, SMALL, dtype, offset=3.0), layout)
    mean, var = rng.standard_normal(5).astype(running_dtype), rng.uniform(1, 2, 5).astype(running_dtype)
    weight, bias = parameters(INSTANCE, SMALL, "channel", rng)
    before = mean.copy(), var.copy()
    y = INSTANCE.forward(x, weight, bias, running_mean=mean, running_var=var, use_input_stats=False)
    assert (mean == before[0]).all()
    assert (var == before[1]).all()
    along = [wide(p).reshape(5, 1, 1) for p in (mean, 1 / np.sqrt(wide(var) + 1e-5), weight, bias)]
    truth = applied(wide(x), along[2], along[3], (2, 3), mean=along[0], rstd=along[1])
    assert bounds.excess(y, truth.y, bounds.y(truth, dtype)) <= 1


def test_running_statistics_may_be_views(rng):
    x = uniform(rng, SMALL)
    plain = [np.zeros(5, np.float32), np.ones(5, np.float32)]
    spread = [np.zeros((5, 3), np.float32)[:, 1], np.ones(15, np.float32)[::-3]]
    for mean, var in (plain, spread):
        normkit.instance_norm(x, running_mean=mean, running_var=var)
    assert all((a == b).all() for a, b in zip(plain, spread, strict=True))


def test_normalize_takes_axes_in_any_order_and_sign(rng):
    x = uniform(rng, SMALL)
    expected = normkit.normalize(x, axis=(1, 3)).tobytes()
    assert all(normkit.normalize(x, axis=axis).tobytes() == expected for axis in [(3, 1), (-1, 1), (-3, -1), [1, 3]])
    assert normkit.normalize(x, axis=-1).tobytes() == normkit.normalize(x, axis=(3,)).tobytes()


def test_statistics_come_in_logical_order(rng):
    x = lay(uniform(rng, SMALL), "fortran")
    _y, mean, rstd = normkit.normalize(x, axis=(1, 3), return_stats=True)
    assert mean.shape == rstd.shape == (3, 4)
    assert len(normkit.normalize(x, axis=(1, 3), center=False, return_stats=True)) == 2


RANKS = {
    "bias-has-more": ((3, 5), (1, 3, 5)),
    "weight-has-more": ((1, 3, 5), (3, 5)),
    "bias-alone": (None, (1, 1, 5)),
    "between-extents-of-one": ((3, 1), (1, 3, 1)),
}


@pytest.mark.parametrize("layout", ["contiguous", "fortran", "step"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("op", [OPERATIONS["over-last"], OPERATIONS["over-first"]], ids=repr)
def test_weight_and_bias_have_different_ranks(op, ranks, layout, rng):
    """Weight and bias broadcast each by itself: the rank of one says nothing about the strides of the other."""
    x, dy = (lay(uniform(rng, (2, 3, 5)), layout) for _ in range(2))
    weight, bias = (None if shape is None else rng.standard_normal(shape).astype(np.float32) for shape in RANKS[ranks])
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight, bias=bias, activation="silu")
