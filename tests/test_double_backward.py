"""Gradients through a backward, against the derivative of the reference's backward along the imaginary axis."""

import bounds
import normkit
import numpy as np
import pytest
from activations import ACTIVATIONS, name_of
from cases import DTYPES, LAYOUTS, MASKS, SHARED_MEMORY, lay, uniform
from checks import same_order, unchanged
from reference import OPERATIONS, REGISTRY, compute, derivative_along, gradient

SMALL = (2, 4, 3, 5)
# Shapes of more than one block: with statistics along an inner and an outer axis, of few members and of many.
LARGE = {"many-statistics": (3, 70, 11, 19), "many-members": (2, 4, 91, 89), "few-members": (70, 40, 4, 3)}
NAMES = ("d_dy", "d_x", "d_weight", "d_bias")
# Those that hold what two members with nearly one value give.
WIDE_RANGE = {name: DTYPES[name] for name in ("bfloat16", "float32", "float64")}


def inputs(op, shape, rng, *, dtype=np.float32, layout="contiguous", kind="channel", offset=0.25, weight=True):
    """dds, dy, x and weight; weight None where it is not wanted."""
    dy, ddx = (lay(uniform(rng, shape, dtype), layout) for _ in range(2))
    x = lay(uniform(rng, shape, dtype, offset=offset), layout)
    own = op.weight_shape(shape, kind) if weight else op.absent(shape)[0]
    params = [np.asarray(uniform(rng, own, compute(dtype))) for _ in range(3)]
    return (ddx, *params[:2]), dy, x, params[2] if weight else None


def check(op, dds, dy, x, weight=None, *, eps=1e-5, stats=None, directions=0, **options):
    """The whole contract of one call. `directions`: compare along so many of them, not element by element."""
    mean, rstd = stats or op.statistics(x, eps=eps)[1:]
    with unchanged(*dds, dy, x, mean, rstd, weight):
        found = op.double_backward(dds, dy, x, mean, rstd, weight, **options)
    truth = op.reference_double_backward(dds, dy, x, mean, rstd, weight, **options)
    assert [(f.shape, f.dtype) for f in found[:2]] == [(x.shape, x.dtype)] * 2
    *errors, of_weight, of_bias = bounds.double_backward(truth, x.dtype)
    errors = [e.reshape(x.shape) for e in errors]
    params = [(weight, weight, of_weight)]
    if options.get("activation"):
        params.append((options.get("bias"), weight if weight is not None else options.get("bias"), of_bias))
    assert len(found) == 2 + len(params)
    for (param, like, terms), ours in zip(params, found[2:], strict=True):
        if param is None:
            assert ours is None
            errors.append(None)
            continue
        own = compute(x.dtype) if weight is None else like.dtype
        assert (ours.shape, ours.dtype) == (param.shape, own)
        count = bounds.count_of(x.shape, param.shape)
        # A sum of so many, in any order, each with at least one rounding behind it.
        errors.append(op.to_weight(terms * (1 + count), x.shape, param))
    for k, error in enumerate(errors):
        if error is None:
            continue
        values, dtype = found[k].astype(np.longdouble), found[k].dtype
        through = bounds.stored(np.abs(values) + error, np.float32) * (dtype.itemsize == 2)  # on the way to 16 bits
        bound = error + through + 2 * bounds.stored(np.abs(values) + error, dtype)
        if not directions:
            assert bounds.excess(values, gradient(truth.scalar, truth.arguments, k), bound) <= 1, NAMES[k]
        for _ in range(directions):
            # Few elements at a time: a wrong one is not lost among the bounds of all.
            along = np.zeros(values.size)
            along[np.random.default_rng(k).choice(values.size, min(values.size, 8), replace=False)] = 1
            along = along.reshape(values.shape)
            expected = derivative_along(truth.scalar, truth.arguments, k, along)
            assert bounds.excess((values * along).sum(), expected, (bound * along).sum()) <= 1, NAMES[k]
    return found


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_matches_the_reference(op, weight, dtype, rng):
    dds, dy, x, weight = inputs(op, SMALL, rng, dtype=dtype, weight=weight)
    check(op, dds, dy, x, weight)


EVERY = [*ACTIVATIONS, ("leaky_relu", 0.0)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", EVERY, ids=name_of)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_activations(op, activation, dtype, rng):
    dds, dy, x, weight = inputs(op, SMALL, rng, dtype=dtype)
    bias = np.asarray(uniform(rng, weight.shape, weight.dtype))
    check(op, dds, dy, x, weight, bias=bias, activation=activation, weight_offset=0.5)


PARAMS = {"both": (0, 0), "weight": (0, None), "bias": (None, 0), "apart": (0, -1), "last": (-1, -1)}  # kinds of each


@pytest.mark.parametrize("missing", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("statistics", ["moving", "masked", "frozen"])
@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_activations_of_any_call(op, activation, layout, params, statistics, missing, rng):
    kinds = [*op.weights(SMALL)]
    weight, bias = (
        None if k is None else np.asarray(uniform(rng, op.weight_shape(SMALL, kinds[k]), np.float32))
        for k in PARAMS[params]
    )
    ddx, dy = (lay(uniform(rng, SMALL, np.float32), layout) for _ in range(2))
    x = lay(uniform(rng, SMALL, np.float32, offset=0.25), layout)
    dds = [ddx]
    for like in (weight, weight if bias is None else bias):
        dds.append(uniform(rng, op.absent(SMALL)[0] if like is None else like.shape, np.float32))
    dds = [None if k in missing else np.asarray(d) for k, d in enumerate(dds)]
    options = {"activation": activation, "bias": bias, "use_input_stats": statistics != "frozen"}
    if statistics == "masked":
        options["where"] = MASKS["random"](rng, SMALL)
    stats = op.statistics(x, where=options.get("where"))[1:]
    check(op, dds, dy, x, weight, stats=stats, **options)


SHAPES = [(4, 6), (3, 2, 1), (1, 1, 1), (2, 4, 1, 7), (2, 2, 3, 2, 3)]
SHAPES_OF = [pytest.param(op, shape, id=f"{op}-{shape}") for op in REGISTRY for shape in SHAPES[op.least_ndim - 2 :]]


@pytest.mark.parametrize(("op", "shape"), SHAPES_OF)
def test_shapes(op, shape, rng):
    dds, dy, x, weight = inputs(op, shape, rng, dtype=np.float64)
    check(op, dds, dy, x, weight)


@pytest.mark.parametrize("kind", sorted({kind for op in REGISTRY for kind in op.weights(SMALL)}))
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_weight(op, kind, rng):
    if kind in op.weights(SMALL):
        dds, dy, x, weight = inputs(op, SMALL, rng, dtype=np.float64, kind=kind)
        check(op, dds, dy, x, weight, weight_offset=1.0)


@pytest.mark.parametrize("weight_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtypes_mix(dtype, weight_dtype, rng):
    (ddx, ddweight, ddbias), dy, x, weight = inputs(OPERATIONS["group"], SMALL, rng, dtype=dtype)
    weight = weight.astype(dtype if weight_dtype == "x" else weight_dtype)
    ddweight, ddbias = ddweight.astype(np.float64), ddbias.astype(weight.dtype)
    check(OPERATIONS["group"], (ddx, ddweight, ddbias), dy, x, weight)


def through(activation, weight):
    """The options of a call with this activation or None, and with a bias where there is one."""
    return {} if activation is None else {"activation": activation, "bias": weight[::-1] / 2}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_layouts(op, layout, activation, rng):
    """Any strides in, those of x out, and the values are those of a dense copy whose axes lie in the same order."""
    dds, dy, x, weight = inputs(op, SMALL, rng, layout=layout)
    options = through(activation, weight)
    stats = op.statistics(x)[1:]
    found = op.double_backward(dds, dy, x, *stats, weight, **options)
    dense = [a.copy(order="K") for a in (*dds, dy, x, weight)]
    expected = op.double_backward(dense[:3], *dense[3:5], *stats, dense[5], **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert layout in SHARED_MEMORY or all(same_order(x, f) for f in found[:2])


@pytest.mark.parametrize("other", ["ddx", "dy"])
@pytest.mark.parametrize("shape", [SMALL, (2, 72, 9, 11)], ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_steps_of_one_operand_are_further_apart(op, shape, other, rng):
    """Half the channels of a wider array with channels last: the bits of a dense copy."""
    dds, dy, x, weight = inputs(op, shape, rng, layout="channels-last")
    stats = op.statistics(x)[1:]
    expected = op.double_backward(dds, dy, x, *stats, weight)
    last = np.moveaxis(dds[0] if other == "ddx" else dy, 1, -1)
    apart = np.moveaxis(np.concatenate([last, last], -1)[..., : last.shape[-1]], -1, 1)
    dds, dy = ((apart, *dds[1:]), dy) if other == "ddx" else (dds, apart)
    found = op.double_backward(dds, dy, x, *stats, weight)
    assert [f.tobytes() for f in found] == [e.tobytes() for e in expected]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_many_blocks(op, activation, shape, layout, rng):
    dds, dy, x, weight = inputs(op, shape, rng, layout=layout)
    check(op, dds, dy, x, weight, directions=2, **through(activation, weight))


@pytest.mark.parametrize("dtype", WIDE_RANGE.values(), ids=WIDE_RANGE)
@pytest.mark.parametrize("channels", [2, 3, 5, 8, 9, 15])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_few_channels_last(op, activation, channels, dtype, rng):
    """Several steps side by side fill a vector, and the last ones none; a mask takes them one by one."""
    dds, dy, x, weight = inputs(op, (2, channels, 29, 19), rng, dtype=dtype, layout="channels-last")
    options = through(activation, weight)
    found = check(op, dds, dy, x, weight, directions=1, **options)
    masked = op.double_backward(dds, dy, x, *op.statistics(x)[1:], weight, where=np.ones(x.shape, bool), **options)
    assert [f.tobytes() for f in found] == [m.tobytes() for m in masked]


@pytest.mark.parametrize("dtype", WIDE_RANGE.values(), ids=WIDE_RANGE)
@pytest.mark.parametrize("run", [1, 3, 48, 101, 340, 1024, 1025])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_rows_of_any_length(op, activation, run, dtype, rng):
    """Short ones go in batches, which end with the channels of an instance: it has its bits in any batch."""
    dds, dy, x, weight = inputs(op, (2, 11, run), rng, dtype=dtype)
    options = through(activation, weight)
    found = check(op, dds, dy, x, weight, directions=1, **options)
    if 0 in op.reduced(x.shape) or weight.shape[:1] == x.shape[:1]:
        return
    mean, rstd = op.statistics(x)[1:]
    stats = None if mean is None else mean[1:], rstd[1:]
    alone = op.double_backward((dds[0][1:], *dds[1:]), dy[1:], x[1:], *stats, weight, **options)
    assert [f[1:].tobytes() for f in found[:2]] == [a.tobytes() for a in alone[:2]]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_element_of_many_blocks(op, activation, layout, rng):
    """d_dy and d_x belong to statistics, which a smaller batch has as well: to the bit, wherever a block begins."""
    shape = (7, 40, 11, 13)
    dds, dy, x, weight = inputs(op, shape, rng, layout=layout)
    options = through(activation, weight)
    mean, rstd = op.statistics(x)[1:]
    whole = op.double_backward(dds, dy, x, mean, rstd, weight, **options)
    if 0 in op.reduced(shape) or (weight.ndim == len(shape) and weight.shape[0] > 1):
        return
    for n in range(shape[0]):
        one = slice(n, n + 1)
        stats = None if mean is None else mean[one], rstd[one]
        found = op.double_backward((dds[0][one], *dds[1:]), dy[one], x[one], *stats, weight, **options)
        assert [f.tobytes() for f in found[:2]] == [w[one].tobytes() for w in whole[:2]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_threads_change_no_bit(op, activation, layout, dtype, rng):
    """Of a few large statistics, which are cut into spans where there are several threads."""
    dds, dy, x, weight = inputs(op, (1, 2, 150, 151), rng, dtype=dtype, layout=layout)
    stats = op.statistics(x)[1:]
    found = []
    for threads in (1, 3):
        with normkit.num_threads(threads):
            found.append(op.double_backward(dds, dy, x, *stats, weight, **through(activation, weight)))
    assert [f.tobytes() for f in found[0]] == [f.tobytes() for f in found[1]]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_masks(op, layout, mask, rng):
    dds, dy, x, weight = inputs(op, SMALL, rng, layout=layout)
    where = MASKS[mask](rng, SMALL)
    check(op, dds, dy, x, weight, stats=op.statistics(x, where=where)[1:], where=where)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_mask_of_all_changes_no_bit(op, activation, layout, rng):
    dds, dy, x, weight = inputs(op, LARGE["many-statistics"], rng, layout=layout)
    options = through(activation, weight)
    stats = op.statistics(x)[1:]
    found, masked = (
        op.double_backward(dds, dy, x, *stats, weight, where=w, **options) for w in (None, np.ones(x.shape, bool))
    )
    assert [f.tobytes() for f in found] == [m.tobytes() for m in masked]


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_mask_over_many_blocks(op, rng):
    shape = LARGE["many-members"]
    dds, dy, x, weight = inputs(op, shape, rng)
    where = MASKS["random"](rng, shape)
    check(op, dds, dy, x, weight, stats=op.statistics(x, where=where)[1:], where=where, directions=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_what_is_no_member_may_be_nan(op, activation, layout, rng):
    """Where no gradient reaches it: other elements have the bits that they have beside any number."""
    dds, dy, x, weight = inputs(op, SMALL, rng, layout=layout)
    where = MASKS["random"](rng, SMALL)
    dy[~where], x[~where] = 0, 1
    stats = op.statistics(x, where=where)[1:]
    options = {"where": where} | through(activation, weight)
    expected = op.double_backward(dds, dy, x, *stats, weight, **options)
    x[~where] = np.nan
    found = op.double_backward(dds, dy, x, *stats, weight, **options)
    assert found[0][where].tobytes() == expected[0][where].tobytes()
    assert [f.tobytes() for f in found[1:]] == [e.tobytes() for e in expected[1:]]


@pytest.mark.parametrize("offset", [0.25, 3000.0])
@pytest.mark.parametrize("stats_dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_statistics(op, weight, stats_dtype, offset, rng):
    dds, dy, x, weight = inputs(op, SMALL, rng, weight=weight, offset=offset)
    kept = op.statistics_shape(SMALL)
    stats = rng.standard_normal(kept) + offset if op.center else None, rng.uniform(0.5, 2, kept)
    stats = tuple(None if s is None else s.astype(stats_dtype) for s in stats)
    check(op, dds, dy, x, weight, stats=stats, use_input_stats=False)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["moving", "frozen"])
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize(
    "shape", [SMALL, (3, 130, 4, 8)], ids=["small", "wide"]
)  # wide: many columns, of several steps
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_none_stands_for_zeros(op, layout, shape, weight, frozen, missing, rng):
    dds, dy, x, weight = inputs(op, shape, rng, weight=weight, layout=layout)
    stats = op.statistics(x)[1:]
    found, expected = (
        op.double_backward(
            [absent(d) if k in missing else d for k, d in enumerate(dds)],
            dy, x, *stats, weight, use_input_stats=not frozen,
        )
        for absent in (lambda _: None, np.zeros_like)
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours == theirs).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_no_ddx_of_many_columns(op, dtype, rng):
    """Several steps of them are taken at once, and all have the same zeros."""
    (ddx, *others), dy, x, weight = inputs(op, (2, 600, 4, 4), rng, dtype=dtype, layout="channels-last")
    stats = op.statistics(x)[1:]
    found, expected = (op.double_backward((d, *others), dy, x, *stats, weight) for d in (None, np.zeros_like(ddx)))
    assert all((ours == theirs).all() for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_offsets_cost_no_digits(op, activation, offset, dtype, rng):
    """The bound knows an offset by how far the mean that was given is from that of x, and by nothing else."""
    dds, dy, x, weight = inputs(op, SMALL, rng, dtype=dtype, offset=offset)
    check(op, dds, dy, x, weight, **through(activation, weight))


@pytest.mark.parametrize("scale", [1e13, 1e-13])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_scales_cost_no_digits(op, scale, rng):
    """The square of 1/std is in the range of floats, as results are, and its third power is not."""
    dds, dy, x, weight = inputs(op, SMALL, rng)
    check(op, dds, dy, x * np.float32(scale), weight, eps=0.0)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("op", [op for op in REGISTRY if op.center], ids=repr)
def test_a_rounded_mean_changes_nothing(op, activation, rng):
    """But the place that an activation is at, which is that of the backward."""
    dds, dy, x, weight = inputs(op, SMALL, rng, offset=1e4)
    mean, rstd = op.statistics(x)[1:]
    check(op, dds, dy, x, weight, stats=(mean + np.float32(0.01), rstd), **through(activation, weight))


@pytest.mark.parametrize("eps", [1e-12, 0.5, 1e3])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_eps(op, activation, eps, rng):
    """A large eps makes the mean of x_hat squared less than 1."""
    dds, dy, x, weight = inputs(op, SMALL, rng)
    check(op, dds, dy, x, weight, eps=eps, **through(activation, weight))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_constants(op, value, rng):
    """x_hat is 0, and so is rstd without eps: nothing but ddbias is left then, and nothing is divided by it."""
    dds, dy, _, weight = inputs(op, SMALL, rng)
    x = np.full(SMALL, value, np.float32)
    stats = op.statistics(x, eps=0.0)[1:]
    d_dy, d_x, d_weight = op.double_backward(dds, dy, x, *stats, weight)
    assert all(np.isfinite(f).all() for f in (d_dy, d_x, d_weight))
    if (stats[1] == 0).all():
        assert (d_x == 0).all()
        assert (d_weight == 0).all()
        assert (d_dy == np.broadcast_to(dds[2].reshape(op.aligned(weight.shape, SMALL)), SMALL)).all()
    elif value == 0.0:
        pytest.fail("rstd of zeros is not 0")
    if op.center or value:
        check(op, dds, dy, x, weight, eps=0.25)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_stays_in_its_instance(bad, rng):
    op = OPERATIONS["instance"]
    dds, dy, x, weight = inputs(op, SMALL, rng)
    clean = op.double_backward(dds, dy, x, *op.statistics(x)[1:], weight)
    x[1, 2, 0, 0] = bad
    found = op.double_backward(dds, dy, x, *op.statistics(x)[1:], weight)
    elsewhere = np.ones(SMALL, bool)
    elsewhere[1, 2] = False
    for ours, theirs in zip(found[:2], clean[:2], strict=True):
        assert np.isnan(ours[1, 2]).any()
        assert (ours[elsewhere] == theirs[elsewhere]).all()
    assert np.isnan(found[2]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_no_elements(op, weight, shape, rng):
    dds, dy, x, weight = inputs(op, shape, rng, weight=weight)
    kept = op.statistics_shape(shape)
    mean = np.zeros(kept, np.float32) if op.center else None
    d_dy, d_x, d_weight = op.double_backward(dds, dy, x, mean, np.ones(kept, np.float32), weight)
    assert d_dy.shape == d_x.shape == shape
    assert (d_weight is None) == (weight is None)
    assert weight is None or (d_weight.shape == weight.shape and (d_weight == 0).all())


def test_overflow_is_infinity(rng):
    """A float16 result beyond its range, without a warning."""
    op = OPERATIONS["layer"]
    dds, dy, x, weight = inputs(op, (3, 8), rng, dtype=np.float16)
    d_dy, _, _ = op.double_backward((dds[0], None, None), dy, x, *op.statistics(x)[1:], weight * np.float32(1e9))
    assert np.isinf(d_dy).any()


def test_a_gradient_penalty(rng):
    """sum(dx**2) as a function of x, by the two calls that a user makes; differences of the same calls agree.

    Differences of step t are off by t^2 / 6 times a third derivative, and by roundings of 2^-53 f / t: with t = 2^-17,
    both are below 1e-8 times the scale of the problem, a hundred times what is allowed.
    """
    x, dy = uniform(rng, (2, 3, 16), np.float64), uniform(rng, (2, 3, 16), np.float64)

    def penalty(x):
        _, mean, rstd = normkit.instance_norm(x, return_stats=True)
        return (normkit.instance_norm_backward(dy, x, mean, rstd)[0] ** 2).sum(), mean, rstd

    _, mean, rstd = penalty(x)
    dx = normkit.instance_norm_backward(dy, x, mean, rstd)[0]
    d_x = normkit.instance_norm_double_backward(2 * dx, None, None, dy, x, mean, rstd)[1]
    along, step = uniform(rng, x.shape, np.float64), 2.0**-17
    difference = (penalty(x + step * along)[0] - penalty(x - step * along)[0]) / (2 * step)
    assert abs((d_x * along).sum() - difference) <= 1e-6 * np.abs(d_x).sum()


# ---- other libraries ---------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


THEIRS = {
    "instance": lambda f, x, w, b: f.instance_norm(x, None, None, w, b),
    "group": lambda f, x, w, b: f.group_norm(x, 2, w, b),
    "layer": lambda f, x, w, b: f.layer_norm(x, w.shape, w, b),
    "batch": lambda f, x, w, b: f.batch_norm(x, None, None, w, b, training=True),
    "rms": lambda f, x, w, b: f.rms_norm(x, w.shape, w, 1e-5) + b,
}


@pytest.mark.parametrize("name", THEIRS)
def test_values_are_those_of_torch(torch, name, rng):
    """Values are no farther apart than both are from the truth, with statistics of their own: a relative change of rstd
    enters at most five times, in c * x_hat * rstd**2."""
    op = OPERATIONS[name]
    dds, dy, x, weight = inputs(op, SMALL, rng, dtype=np.float64)
    mean, rstd = op.statistics(x)[1:]
    found = op.double_backward(dds, dy, x, mean, rstd, weight)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (dy, x, weight, np.zeros_like(weight))]
    y = THEIRS[name](torch.nn.functional, *tensors[1:])
    first = torch.autograd.grad(y, tensors[1:], tensors[0], create_graph=True)
    expected = torch.autograd.grad(first, tensors[:3], [torch.from_numpy(d) for d in dds])
    truth = op.reference_double_backward(dds, dy, x, mean, rstd, weight)
    roundings = bounds.double_backward_roundings(truth.members, x.dtype)
    apart = 5 * bounds.rstd_error(op.reference(x), x.dtype).max() / roundings
    *errors, terms, _ = bounds.double_backward(truth, x.dtype)
    errors.append(op.to_weight(terms * (1 + bounds.count_of(SMALL, weight.shape)), SMALL, weight))
    for ours, theirs, error in zip(found, expected, errors, strict=True):
        bound = (2 + float(apart)) * error.reshape(ours.shape) + 4 * bounds.stored(ours, x.dtype)
        assert bounds.excess(ours, theirs.numpy(), bound) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_in_torch_out(torch, dtype, rng):
    op = OPERATIONS["group"]
    dds, dy, x, weight = inputs(op, SMALL, rng, dtype=np.float32)
    kind = getattr(torch, dtype)
    ddx, dy, x = (torch.from_numpy(a).to(kind).contiguous(memory_format=torch.channels_last) for a in (dds[0], dy, x))
    ddweight, ddbias, weight = (torch.from_numpy(a) for a in (*dds[1:], weight))
    for like in (weight, weight.to(kind)):
        _, mean, rstd = normkit.group_norm(x, 2, like, return_stats=True)
        d_dy, d_x, d_weight = normkit.group_norm_double_backward(ddx, ddweight, ddbias, dy, x, 2, mean, rstd, like)
        assert all(isinstance(t, torch.Tensor) for t in (d_dy, d_x, d_weight))
        for t in (d_dy, d_x):
            assert (t.dtype, t.shape, t.stride()) == (x.dtype, x.shape, x.stride())
        assert (d_weight.dtype, d_weight.shape) == (like.dtype, like.shape)
        stats = mean.numpy(), rstd.numpy()
        wide = [
            t.float().numpy() if kind is torch.bfloat16 else t.numpy() for t in (ddx, ddweight, ddbias, dy, x, like)
        ]
        expected = normkit.group_norm_double_backward(*wide[:5], 2, *stats, wide[5])
        for ours, theirs in zip((d_dy, d_x, d_weight), expected, strict=True):
            assert ours.equal(torch.from_numpy(theirs).to(ours.dtype))
    assert normkit.group_norm_double_backward(ddx, None, None, dy, x, 2, mean, rstd)[2] is None


# ---- errors ------------------------------------------------------------------------------------------------------

X = (2, 3, 8)


def f32(*shape):
    return np.ones(shape, np.float32)


def instance(**options):
    given = {
        "ddx": f32(*X), "ddweight": f32(3), "ddbias": f32(3), "dy": f32(*X), "x": f32(*X),
        "mean": f32(2, 3), "rstd": f32(2, 3), "weight": f32(3), **options,
    }  # fmt: skip
    return normkit.instance_norm_double_backward(**given)


def half(**options):
    return instance(**{name: np.ones(X, np.float16) for name in ("ddx", "dy", "x")} | options)


NONE = {"ddx": None, "ddweight": None, "ddbias": None}
ERRORS = {
    "nothing": (
        instance, NONE, ValueError, "ddx, ddweight and ddbias are None, expected an array for at least one of them",
    ),
    "ddx-shape": (instance, {"ddx": f32(4)}, ValueError, "ddx has shape (4,), expected (2, 3, 8), the shape of x"),
    "ddx-dtype": (
        instance, {"ddx": np.ones(X)}, TypeError, "ddx has dtype float64, expected float32, the dtype of x",
    ),
    "ddx-big-endian": (
        instance, {"ddx": np.ones(X, ">f4")}, TypeError, "ddx has dtype >f4, expected native byte order",
    ),
    "ddx-list": (
        instance, {"ddx": [1.0]}, TypeError, "ddx is a list, expected a NumPy array or an object with __dlpack__",
    ),
    "ddweight-shape": (
        instance, {"ddweight": f32(2, 3)}, ValueError,
        "ddweight has shape (2, 3), expected (3,): the shape of weight",
    ),
    "ddbias-shape": (
        instance, {"ddbias": f32(1)}, ValueError, "ddbias has shape (1,), expected (3,): the shape of weight",
    ),
    "ddbias-shape-with-bias": (
        instance, {"bias": f32(2, 3)}, ValueError, "ddbias has shape (3,), expected (2, 3): the shape of bias",
    ),
    "prelu": (
        instance, {"activation": ("prelu", 0.25)}, ValueError,
        "activation is prelu, expected another: what slopes would be given is not computed",
    ),
    "ddweight-shape-without-weight": (
        instance, {"ddweight": f32(2, 3), "weight": None}, ValueError,
        "ddweight has shape (2, 3), expected (3,): the shape of dweight",
    ),
    "ddbias-dtype": (
        instance, {"ddbias": np.ones(3, np.int64)}, TypeError,
        "ddbias has dtype int64, expected float32 or float64",
    ),
    "ddweight-half-for-a-float": (
        instance, {"ddweight": np.ones(3, np.float16)}, TypeError,
        "ddweight has dtype float16, expected float32 or float64",
    ),
    "ddweight-dtype-of-float16": (
        half, {"ddweight": np.ones(3, np.int8)}, TypeError,
        "ddweight has dtype int8, expected float32, float64 or float16, the dtype of x",
    ),
    "dy-none": (
        instance, {"dy": None}, TypeError, "dy is a NoneType, expected a NumPy array or an object with __dlpack__",
    ),
    "dy-shape": (instance, {"dy": f32(4)}, ValueError, "dy has shape (4,), expected (2, 3, 8), the shape of x"),
    "x-dtype": (
        instance, {"x": np.ones(X, np.uint8)}, TypeError,
        "x has dtype uint8, expected float32, float64, float16 or bfloat16",
    ),
    "mean-none": (
        instance, {"mean": None}, ValueError, "mean is None, expected an array: one element per statistic",
    ),
    "rstd-shape": (
        instance, {"rstd": f32(3)}, ValueError, "rstd has shape (3,), expected (2, 3): one element per statistic",
    ),
    "weight-shape": (
        instance, {"weight": f32(4)}, ValueError,
        "weight has shape (4,), expected (3,), (2, 3) or (2, 3, 8): one element per channel of x",
    ),
    "channel-axis": (
        instance, {"channel_axis": 3}, np.exceptions.AxisError, "channel_axis is 3, expected -3 to 2: x has 3 axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    call, options, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        call(**options)
    assert str(caught.value) == message


def test_a_mean_without_centering_is_ignored(rng):
    ddx, dy, x = uniform(rng, (3, 4, 8))
    rstd = normkit.rms_norm(x, return_stats=True)[1]
    found = normkit.normalize_double_backward(ddx, None, None, dy, x, f32(7), rstd, axis=-1, center=False)
    expected = normkit.rms_norm_double_backward(ddx, None, None, dy, x, rstd)
    assert all((a == b).all() for a, b in zip(found[:2], expected[:2], strict=True))
