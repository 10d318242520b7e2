"""One statistic, one arithmetic: what is wanted beside it, and in how many calls it is asked for, changes no bit."""

import itertools

import normkit as nk
import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, bits, lay, uniform
from reference import OPERATIONS, REGISTRY

GRADIENTS = ("dx", "dweight", "dbias")
SHAPES = {"small": (3, 5, 4, 7), "chunks": (2, 6, 40, 131)}
AXES = [(3,), (2, 3), (1,), (0, 2, 3), (1, 2, 3), (0,), (0, 1)]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def backward_arguments(op, layout, dtype, shape, rng):
    """The arguments of a backward, without a weight and with one."""
    dy, x = (lay(uniform(rng, shape, dtype), layout) for _ in range(2))
    _, mean, rstd = op.statistics(x)
    for weight in (None, np.asarray(rng.standard_normal(op.weight_shape(shape, "channel")), np.float32)):
        yield dy, x, mean, rstd, weight


# Statistics of several spans, which threads share, and such as are gathered span by span where they are no dense array.
LARGER = {**SHAPES, "spans": (2, 3, 150, 131), "gathered": (1, 2, 400, 301)}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("size", LARGER)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_gradients_do_not_depend_on_need(op, layout, dtype, size, count, rng):
    with nk.num_threads(count):
        for arguments in backward_arguments(op, layout, dtype, LARGER[size], rng):
            everything = dict(zip(GRADIENTS, op.backward(*arguments), strict=True))
            for need in (n for count in (1, 2) for n in itertools.combinations(GRADIENTS, count)):
                found = dict(zip(GRADIENTS, op.backward(*arguments, need=need), strict=True))
                assert [bits(found[name]) for name in need] == [bits(everything[name]) for name in need]
                assert all(found[name] is None for name in set(GRADIENTS) - set(need))


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_dx_does_not_depend_on_dresidual(op, layout, dtype, shape, rng):
    """Zeros to add change nothing but the sign of a zero."""
    for arguments in backward_arguments(op, layout, dtype, shape, rng):
        dx, *others = op.backward(*arguments)
        found, *same = op.backward(*arguments, dresidual=lay(np.zeros(shape, dtype), layout))
        assert np.array_equal(found, dx)
        assert [bits(g) for g in same] == [bits(g) for g in others]


@pytest.mark.parametrize("kind", ["none", "axis", "channel", "pixel"])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_two_phases_are_one_call(axis, layout, dtype, shape, kind, rng):
    dy, x = (lay(uniform(rng, shape, dtype), layout) for _ in range(2))
    varies = {"none": (), "axis": axis, "channel": (1,), "pixel": range(4)}[kind]
    extents = [n if a in varies else 1 for a, n in enumerate(shape)]
    weight = None if kind == "none" else rng.standard_normal(extents).astype(np.float32)
    y, mean, rstd = nk.normalize(x, axis=axis, return_stats=True)
    m = nk.moments(x, axis=axis)
    assert bits(nk.apply(x, m, m.rstd(), axis=axis)) == bits(y)
    if x.dtype != np.float64:  # whose mean has more digits than m.mean
        assert bits(nk.apply(x, m.mean, m.rstd(), axis=axis)) == bits(y)
    dx = nk.normalize_backward(dy, x, mean, rstd, weight, axis=axis)[0]
    sums = nk.backward_sums(dy, x, mean, rstd, weight, axis=axis)
    assert bits(nk.apply_backward(dy, x, mean, rstd, sums, m.count, weight, axis=axis)) == bits(dx)


@pytest.mark.parametrize("rows", [64, 3])
@pytest.mark.parametrize("run", [100, 768, 4096, 5000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weight_dtype", ["float32", "float64", None])
def test_two_phases_along_rows(weight_dtype, dtype, run, rows, isa, rng):
    """Weights along a row take several buffers where they have another dtype; batches of rows have them in one."""
    op = OPERATIONS["layer"]
    dy, x = uniform(rng, (rows, run), dtype), uniform(rng, (rows, run), dtype)
    weight = weight_dtype and rng.standard_normal(run).astype(weight_dtype)
    _, mean, rstd = op.statistics(x)
    dx = op.backward(dy, x, mean, rstd, weight)[0]
    sums = nk.backward_sums(dy, x, mean, rstd, weight, axis=-1)
    found = nk.apply_backward(dy, x, mean, rstd, sums, np.full(rows, run), weight, axis=-1)
    assert bits(found) == bits(dx)


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1), "silu", "gelu"], ids=str)
@pytest.mark.parametrize("rows", [(1, 5, 3), (5, 7, 16), (3, 50, 49), (2, 33, 196), (4, 9, 400), (3, 5, 1023)], ids=str)
@pytest.mark.parametrize("name", ["instance", "batch", "evaluation", "evaluation, channels slowest"])
def test_rows_in_batches_are_rows_one_by_one(name, rows, activation, dtype, isa, rng):
    """Short rows go in batches, but for one alone, and those with a mask of whole rows. The masks name everyone."""
    dy, x = (uniform(rng, rows, dtype) + dtype.type(2) for _ in range(2))
    weight, bias, mean, deviation = rng.standard_normal((4, rows[1])).astype(np.float32)
    options = {"activation": activation}
    if name.startswith("evaluation"):  # whose statistics are given, one for several rows where channels are slowest
        x = x if name == "evaluation" else np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)

        def evaluated(images, channels):
            running = {"running_mean": mean[channels], "running_var": deviation[channels] ** 2}
            arguments = x[images, channels], weight[channels], bias[channels]
            return nk.instance_norm(*arguments, **running, use_input_stats=False, **options)

        y = evaluated(slice(None), slice(None))
        for n, c in np.ndindex(rows[:2]):
            assert bits(evaluated(slice(n, n + 1), slice(c, c + 1))) == bits(y[n : n + 1, c : c + 1])
        return
    op, masks = OPERATIONS[name], ({"where": np.ones(mask, bool)} for mask in (rows, (*rows[:2], 1)))
    found = op.statistics(x, weight=weight, bias=bias, **options)
    gradients = op.backward(dy, x, *found[1:], weight, bias=bias, **options)
    for mask in masks:
        expected = op.statistics(x, weight=weight, bias=bias, **options, **mask)
        assert [bits(a) for a in found] == [bits(a) for a in expected]
        expected = op.backward(dy, x, *found[1:], weight, bias=bias, **options, **mask)
        assert [bits(a) for a in gradients] == [bits(a) for a in expected]


@pytest.mark.parametrize("seed", range(200))
def test_parameters_of_any_shapes_keep_the_promises(seed, isa):
    """Slices of a batch, and masks that name everyone; some statistics have one member, some gradients are zeros."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(2, 6)), *rng.choice([1, 2, 3, 5, 8, 17, 40], rng.integers(1, 4)).tolist())
    reduced = [a for a in range(1, len(shape)) if rng.random() < 0.6]
    common = {"axis": tuple(reduced) or -1, "center": bool(rng.random() < 0.8)}
    dtype = rng.choice(["float32", "float64", "float16"])
    dy, x, ddx = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    dy[rng.random(shape) < 0.2] = 0

    def drawn():
        return rng.standard_normal([n if rng.random() < 0.5 else 1 for n in shape]).astype(np.float32)

    weight, bias = (drawn() if rng.random() < 0.8 else None for _ in range(2))
    activation, slopes = rng.choice(["none", "relu", "leaky_relu", "prelu", "silu"]), drawn()

    def results(members, where=None):
        """All results for some members of the batch, by names, and those of them that have the batch as an axis."""

        def of(a):
            return a if a is None or len(a) == 1 else a[members]

        options = common | {"where": where}
        if activation != "none":
            options["activation"] = ("prelu", of(slopes)) if activation == "prelu" else activation
        y, *statistics = nk.normalize(of(x), of(weight), of(bias), return_stats=True, **options)
        statistics = statistics if common["center"] else [np.zeros_like(statistics[-1]), statistics[-1]]
        dx, *others = nk.normalize_backward(of(dy), of(x), *statistics, of(weight), bias=of(bias), **options)
        found = {"y": y, "mean": statistics[0], "rstd": statistics[1], "dx": dx}
        if activation == "none":
            dds, ones = (of(ddx), None if weight is None else of(weight), None), (of(x), *statistics, of(weight))
            d_dy, d_x, d_weight = nk.normalize_double_backward(*dds, of(dy), *ones, **options)
            found, others = found | {"d_dy": d_dy, "d_x": d_x}, [*others, d_weight]
        return found, others

    everything, sums = results(slice(None))
    found, same = results(slice(None), np.ones(shape, bool))
    assert {name: bits(a) for name, a in found.items()} == {name: bits(a) for name, a in everything.items()}
    assert [None if a is None else bits(a) for a in same] == [None if a is None else bits(a) for a in sums]
    for n in range(len(x)):
        alone, _ = results(slice(n, n + 1))
        assert {name: bits(a) for name, a in alone.items()} == {
            name: bits(a[n : n + 1]) for name, a in everything.items()
        }
