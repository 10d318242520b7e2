"""Arguments that mean the same are all taken, and a gradient has the shape of the argument that it belongs to."""

import itertools
import re

import normkit as nk
import numpy as np
import pytest
from cases import CONVERTED, DTYPES, INTEGERS, LAYOUTS, SHARED_MEMORY, bits, lay, uniform
from checks import check_backward
from reference import OPERATIONS, REGISTRY, Operation

SHAPE = (3, 5, 4)
AN_ARRAY = "expected a NumPy array or an object with __dlpack__"


class Index:
    def __index__(self):
        return 1

    def __repr__(self):
        return "Index()"


@pytest.mark.parametrize(
    ("axis", "same"),
    [
        (None, (0, 1, 2)),
        (np.array([0, 2]), (0, 2)),
        (np.array(1), 1),
        (np.int64(1), 1),
        (Index(), 1),
        ((Index(), np.int8(-1)), (1, 2)),
        (range(1, 3), (1, 2)),
        ([0, 1], (0, 1)),
        ({2}, 2),
    ],
    ids=repr,
)
def test_axes(axis, same, rng):
    x = uniform(rng, SHAPE)
    for call in (nk.normalize, nk.layer_norm, nk.rms_norm, nk.l2_normalize):
        for _ in range(2):  # also where the plan may be known
            assert bits(call(x, axis=axis)) == bits(call(x, axis=same))
    stats = nk.moments(x, axis=same)
    assert bits(nk.moments(x, axis=axis).m2) == bits(stats.m2)
    given = uniform(rng, SHAPE), None, None, uniform(rng, SHAPE), x, stats.mean, stats.rstd()
    for call in (nk.normalize_double_backward, nk.layer_norm_double_backward):
        assert [bits(d) for d in call(*given, axis=axis)[:2]] == [bits(d) for d in call(*given, axis=same)[:2]]
    found, expected = (nk.rms_norm_double_backward(*given[:5], given[6], axis=a)[1] for a in (axis, same))
    assert bits(found) == bits(expected)


def test_an_iterator_of_axes(rng):
    x = uniform(rng, SHAPE)
    given = x, None, None, x, x, 0.5, 2.0
    assert bits(nk.layer_norm(x, axis=iter((0, 2)))) == bits(nk.layer_norm(x, axis=(0, 2)))
    found, expected = (nk.layer_norm_double_backward(*given, axis=axis)[1] for axis in (iter((0, 2)), (0, 2)))
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("index", [Index(), np.uint8(1), np.array(1)], ids=repr)
def test_integers_of_any_type(index, rng):
    """As the axis of channels and as the number of groups: forward, backward and twice backward."""
    ddx, dy, x = (uniform(rng, SHAPE) for _ in range(3))
    stats = {"mean": 0.5, "rstd": 2.0}

    def results(n):
        for name in ("instance_norm", "batch_norm", "group_norm"):
            options = {"channel_axis": n} | ({"num_groups": n} if name == "group_norm" else {})
            yield getattr(nk, name)(x, **options, **({"training": True} if name == "batch_norm" else {}))
            yield from getattr(nk, f"{name}_backward")(dy, x, **stats, **options)
            twice = getattr(nk, f"{name}_double_backward")
            yield from twice(ddx, None, None, dy, x, **stats, **options)[:2]

        y, *given = nk.adaptive_instance_norm(x, dy, channel_axis=n, return_stats=True)
        yield y
        yield from nk.adaptive_instance_norm_backward(dy, x, ddx, *given, channel_axis=n)

    for found, expected in zip(results(index), results(1), strict=True):
        assert bits(found) == bits(expected)


def test_axes_that_change(rng):
    """A list is read at each call."""
    x, axes = uniform(rng, SHAPE), [0]
    nk.normalize(x, axis=axes)
    axes[0] = 1
    assert bits(nk.normalize(x, axis=axes)) == bits(nk.normalize(x, axis=1))
    array = np.array([0])
    nk.normalize(x, axis=array)
    array[0] = 1
    assert bits(nk.normalize(x, axis=array)) == bits(nk.normalize(x, axis=1))


@pytest.mark.parametrize("axis", ["1", b"1", 1.0, (1.0,), ..., np.array([1.0]), [[1]]], ids=repr)
def test_what_is_no_axis(axis, rng):
    with pytest.raises(TypeError, match=r"^axis is .*, expected an integer$"):
        nk.normalize(uniform(rng, SHAPE), axis=axis)


def test_all_axes_of_none(rng):
    with pytest.raises(ValueError, match=r"^axis is \(\), expected at least one axis$"):
        nk.normalize(np.float32([3])[0:1].reshape(()), axis=None)


@pytest.mark.parametrize("where", [True, np.True_, None], ids=repr)
def test_all_are_members(where, rng):
    x, dy = uniform(rng, SHAPE), uniform(rng, SHAPE)
    y, mean, rstd = nk.instance_norm(x, return_stats=True)
    for _ in range(2):
        assert bits(nk.instance_norm(x, where=where)) == bits(y)
        dx = nk.instance_norm_backward(dy, x, mean, rstd, where=where)[0]
        assert bits(dx) == bits(nk.instance_norm_backward(dy, x, mean, rstd)[0])
        assert bits(nk.adaptive_instance_norm(x, dy, where=where)) == bits(nk.adaptive_instance_norm(x, dy))
        assert bits(nk.moments(x, axis=2, where=where).m2) == bits(nk.moments(x, axis=2).m2)


@pytest.mark.parametrize("where", [False, np.False_, 1], ids=repr)
def test_what_is_no_mask(where, rng):
    with pytest.raises(TypeError, match=r"^where is an? .*, expected a NumPy array"):
        nk.instance_norm(uniform(rng, SHAPE), where=where)


@pytest.mark.parametrize("dtype", CONVERTED.values(), ids=CONVERTED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_what_is_converted(op, layout, dtype, rng):
    """A converted x has the bits of x.astype(np.float32), which rounds once, and the memory order of x."""
    shape = (3, 5, 4, 7)
    x = lay(uniform(rng, shape, dtype), layout)
    same, before = x.astype(np.float32), bits(x)  # in the order of x
    weight, bias = rng.standard_normal((2, *op.weight_shape(shape, "channel"))).astype(np.float32)
    where = rng.random(shape) < 0.7
    for options in ({}, {"where": where}, {"activation": "silu", "weight_offset": 1.0}):
        for out_dtype in DTYPES.values():
            options = options | {"out_dtype": out_dtype, "return_stats": True}
            found, expected = (op.forward(a, weight, bias, **options) for a in (x, same))
            assert [bits(r) for r in found] == [bits(r) for r in expected]
            assert layout in SHARED_MEMORY or found[0].strides == expected[0].strides
    out = lay(np.full(shape, 7, np.float16), layout)
    if layout not in SHARED_MEMORY:
        assert op.forward(x, weight, bias, out=out) is out
        assert bits(out) == bits(op.forward(same, weight, bias, out_dtype=np.float16))
    assert bits(x) == before


@pytest.mark.parametrize("dtype", CONVERTED.values(), ids=CONVERTED)
def test_what_is_converted_by_other_functions(dtype, rng):
    x, style = uniform(rng, SHAPE, dtype), uniform(rng, SHAPE, dtype)
    same, likewise = x.astype(np.float32), style.astype(np.float32)
    found, expected = nk.moments(x, axis=2), nk.moments(same, axis=2)
    assert bits(found.m2) == bits(expected.m2)
    assert bits(nk.apply(x, found.mean, found.rstd(), axis=2)) == bits(nk.apply(same, found.mean, found.rstd(), axis=2))
    assert bits(nk.adaptive_instance_norm(x, style)) == bits(nk.adaptive_instance_norm(same, likewise))
    assert bits(nk.l2_normalize(x)) == bits(nk.l2_normalize(same))
    assert nk.instance_norm(x[:0]).dtype == np.float32
    running = [np.ones(5, np.float32) for _ in range(4)]
    for a, (mean, var) in ((x, running[:2]), (same, running[2:])):
        nk.instance_norm(a, running_mean=mean, running_var=var)
    assert [bits(r) for r in running[:2]] == [bits(r) for r in running[2:]]


@pytest.mark.parametrize("value", [2**24 + 1, 2**24 + 3, 2**53 + 2**29 + 1, 2**63 - 1, -(2**63)], ids=str)
def test_each_integer_is_rounded_once(value):
    """An integer becomes the nearest float32; 2**53 + 2**29 + 1 would come out lower by way of float64."""
    x = np.array([[value, 0]], np.int64)
    mean = nk.moments(x[:, :1], axis=1).mean
    nearest = min((np.float32(value), *(np.nextafter(np.float32(value), s) for s in (-np.inf, np.inf))),
                  key=lambda f: abs(int(f) - value))  # fmt: skip
    assert float(mean[0]) == float(nearest)


@pytest.mark.parametrize("dtype", CONVERTED.values(), ids=CONVERTED)
def test_what_has_no_gradient(dtype, rng):
    x = uniform(rng, SHAPE, dtype)
    with pytest.raises(TypeError, match=rf"^x has dtype {dtype}, expected float32, float64, float16 or bfloat16$"):
        nk.layer_norm_backward(x, x, 0.0, 1.0)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
def test_out_says_what_becomes_of_integers(out_dtype, dtype, rng):
    x = uniform(rng, SHAPE, dtype)
    out = np.full_like(x, 7, out_dtype)
    assert nk.instance_norm(x, out=out) is out
    assert bits(out) == bits(nk.instance_norm(x, out_dtype=out_dtype))


@pytest.mark.parametrize(
    ("spelled", "dtype"),
    [(float, "float64"), ("f4", "float32"), ("<f2", "float16"), ("d", "float64"), (np.dtype("f8"), "float64")],
    ids=repr,
)
def test_dtypes_as_numpy_spells_them(spelled, dtype, rng):
    x = uniform(rng, SHAPE)
    assert bits(nk.instance_norm(x, out_dtype=spelled)) == bits(nk.instance_norm(x, out_dtype=dtype))


@pytest.mark.parametrize("spelled", [int, "i4", bool, complex, "float8", "such", 3, ...], ids=repr)
def test_what_is_no_dtype_of_y(spelled, rng):
    with pytest.raises(TypeError, match=r"^out_dtype is .*, expected float32, float64, float16 or bfloat16$"):
        nk.instance_norm(uniform(rng, SHAPE), out_dtype=spelled)


# ---- one number for all statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [(1,), (0, 2), None], ids=str)
@pytest.mark.parametrize("kind", ["float", "np.float32", "np.float64", "0-d float32", "0-d float64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
def test_numbers_as_statistics(layout, kind, axis, isa, rng):
    """The bits of an array of the same numbers, float64 as numbers of Python are."""
    dy, x = (lay(uniform(rng, SHAPE), layout) for _ in range(2))
    numbers = [np.float32(v) for v in rng.uniform(0.5, 2, 2)]
    dtype = np.dtype("float32" if "float32" in kind else "float64")
    given = [np.array(v, dtype) if "0-d" in kind else dtype.type(v) if "np" in kind else float(v) for v in numbers]
    kept = nk.moments(x, axis=axis).count.shape
    arrays = [np.full(kept, v, dtype) for v in numbers]
    sums = nk.backward_sums(dy, x, *arrays, axis=axis)
    assert bits(nk.backward_sums(dy, x, *given, axis=axis)) == bits(sums)
    for one, other in ((given, arrays), ((given[0], arrays[1]), arrays), ((None, given[1]), (None, arrays[1]))):
        assert bits(nk.apply(x, *one, axis=axis)) == bits(nk.apply(x, *other, axis=axis))
        dx = [nk.apply_backward(dy, x, *stats, sums, 7, axis=axis) for stats in (one, other)]
        assert bits(dx[0]) == bits(dx[1])
    center = {"axis": axis, "center": True, "use_input_stats": False}
    found, expected = (nk.normalize_backward(dy, x, *stats, **center) for stats in (given, arrays))
    assert [bits(g) for g in found] == [bits(g) for g in expected]


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_one_number_as_statistics(op, kind, rng):
    """Every backward and double backward takes a number, or an array without axes, for all statistics."""
    dy, x, ddx = (uniform(rng, SHAPE) for _ in range(3))
    given = [kind(np.float32(v)) for v in rng.uniform(0.5, 2, 2)]
    arrays = [np.full(op.statistics_shape(SHAPE), v) for v in given]
    found, expected = (op.backward(dy, x, *stats) for stats in (given, arrays))
    assert [bits(g) for g in found] == [bits(g) for g in expected]
    found, expected = (op.double_backward((ddx, None, None), dy, x, *stats)[:2] for stats in (given, arrays))
    assert [bits(g) for g in found] == [bits(g) for g in expected]


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_one_number_as_statistics_of_content(kind, rng):
    dy, content, style = (uniform(rng, SHAPE) for _ in range(3))
    given = [kind(np.float32(v)) for v in rng.uniform(0.5, 2, 2)]
    arrays = [np.full(SHAPE[:2], v) for v in given]
    found, expected = (nk.adaptive_instance_norm_backward(dy, content, style, *stats) for stats in (given, arrays))
    assert [bits(g) for g in found] == [bits(g) for g in expected]


def test_integers_and_scalars_as_statistics(rng):
    x = uniform(rng, SHAPE)
    for mean, rstd in ((1, 2), (np.int8(1), np.uint64(2)), (True, np.float16(2))):
        assert bits(nk.apply(x, mean, rstd, axis=1)) == bits(nk.apply(x, 1.0, 2.0, axis=1))
    y = nk.apply(np.ones((2, 0), np.float32), 1, 2, axis=1)
    assert y.shape == (2, 0)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("1", TypeError, f"rstd is a str, {AN_ARRAY}"),
        (1j, TypeError, f"rstd is a complex, {AN_ARRAY}"),
        (np.complex64(1), TypeError, f"rstd is a complex64, {AN_ARRAY}"),
        (np.timedelta64(1, "s"), TypeError, f"rstd is a timedelta64, {AN_ARRAY}"),
        ([1.0], TypeError, f"rstd is a list, {AN_ARRAY}"),
        (np.array(1), TypeError, "rstd has dtype int64, expected float32 or float64"),
        (np.ones(1), ValueError, "rstd has shape (1,), expected (3, 4): one element per statistic"),
    ],
    ids=repr,
)
def test_what_is_no_statistic(given, kind, message, rng):
    with pytest.raises(kind, match=rf"^{re.escape(message)}$"):
        nk.apply(uniform(rng, SHAPE), 0.0, given, axis=1)


# ---- shapes of parameters ----------------------------------------------------------------------------------------


def spelled(op: Operation, weight: np.ndarray) -> list[np.ndarray]:
    """A weight with ones, so that it broadcasts against x: with all of the axes of x, and without the first."""
    full = weight.reshape(op.aligned(weight.shape, SHAPE))
    return [full, full[0]] if full.shape[0] == 1 else [full]


NAMED = [op for op in REGISTRY if op.function != "normalize"]  # the others broadcast weights anyway


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", NAMED, ids=repr)
def test_ones_in_the_shape_of_weights(op, layout, rng):
    """The bits of the shape without them; gradients are like weights and bias as they are given."""
    dy, x, ddx = (lay(uniform(rng, SHAPE), layout) for _ in range(3))
    for kind, activation in itertools.product(kinds_of(op), [None, "silu"]):
        weight, bias = param(op, kind, rng), param(op, kind, rng)
        y, *stats = op.statistics(x, weight=weight, bias=bias, activation=activation)
        gradients = op.backward(dy, x, *stats, weight, bias=bias, activation=activation)
        second = op.double_backward((ddx, weight, bias), dy, x, *stats, weight)
        for w, b in zip(spelled(op, weight), spelled(op, bias)[::-1], strict=True):
            assert bits(op.forward(x, w, b, activation=activation)) == bits(y)
            found = op.backward(dy, x, *stats, w, bias=b, activation=activation)
            assert [g.shape for g in found] == [SHAPE, w.shape, b.shape]
            assert [bits(g) for g in found] == [bits(g) for g in gradients]
            found = op.double_backward((ddx, w, b.reshape(w.shape)), dy, x, *stats, w)
            assert [g.shape for g in found] == [SHAPE, SHAPE, w.shape]
            assert [bits(g) for g in found] == [bits(g) for g in second]


@pytest.mark.parametrize(
    "shape", [(1, 5), (5, 1, 1), (3, 1, 1), (1, 5, 4), (3, 5, 2), (1, 3, 5, 1), (1, 1, 1), (4,), ()]
)
def test_ones_in_the_wrong_places(shape, rng):
    expected = rf"^weight has shape {re.escape(str(shape))}, expected \(5,\), \(3, 5\) or \(3, 5, 4\): one element per"
    with pytest.raises(ValueError, match=expected):
        nk.instance_norm(uniform(rng, SHAPE), np.ones(shape, np.float32))


# ---- gradients ---------------------------------------------------------------------------------------------------


def param(op: Operation, kind: str | None, rng: np.random.Generator, dtype: str = "float32") -> np.ndarray | None:
    return None if kind is None else np.asarray(uniform(rng, op.weight_shape(SHAPE, kind), dtype))


def kinds_of(op: Operation) -> list[str]:
    return list(op.weights(SHAPE))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_dbias_has_the_shape_of_bias(op, layout, rng):
    """The shape of weight does not matter, nor whether an activation depends on bias."""
    dy, x = (lay(uniform(rng, SHAPE), layout) for _ in range(2))
    for weight, bias, activation in itertools.product([None, *kinds_of(op)], kinds_of(op), [None, "silu"]):
        check_backward(op, dy, x, param(op, weight, rng), bias=param(op, bias, rng), activation=activation)


@pytest.mark.parametrize("bias_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_dbias_of_every_dtype(activation, dtype, bias_dtype, isa, rng):
    op = OPERATIONS["instance"]
    dy, x = (uniform(rng, SHAPE, dtype) for _ in range(2))
    bias = param(op, "conditional", rng, dtype if bias_dtype == "x" else bias_dtype)
    for weight in (None, param(op, "channel", rng, dtype)):
        check_backward(op, dy, x, weight, bias=bias, activation=activation)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_gradients_of_parameters_whatever_else_is_wanted(op, activation, layout, rng):
    """Gradients of parameters do not depend on what else is wanted, nor on whether dx is written over dy."""
    dy, x = (lay(uniform(rng, SHAPE), layout) for _ in range(2))
    stats, names = op.statistics(x)[1:], ("dx", "dweight", "dbias")
    for weight, bias in itertools.product([None, *kinds_of(op)], kinds_of(op)):
        params = {"weight": param(op, weight, rng), "bias": param(op, bias, rng), "activation": activation}
        everything = op.backward(dy, x, *stats, **params)
        for need in (names[1:2], names[2:], names[1:], names[:2]):
            found = op.backward(dy, x, *stats, need=need, **params)
            for name, one, other in zip(names, found, everything, strict=True):
                assert (one is None) if name not in need else bits(one) == bits(other), (weight, bias, need, name)
        over = lay(dy, layout)
        assert [bits(a) for a in op.backward(over, x, *stats, out=over, **params)] == [bits(a) for a in everything]


def test_dbias_of_no_elements(rng):
    x, weight, bias = np.ones((2, 3, 0), np.float32), np.ones(3, np.float32), np.ones((2, 3), np.float32)
    stats = nk.instance_norm(x, return_stats=True)[1:]
    _, dweight, dbias = nk.instance_norm_backward(x, x, *stats, weight, bias=bias)
    assert (dweight.shape, dbias.shape) == ((3,), (2, 3))
    assert not dweight.any()
    assert not dbias.any()
