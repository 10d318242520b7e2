"""normkit.dask: values, chunk by chunk, what is read and kept, bits that depend on the chunks alone, and errors.

What a call means is judged as that of the core is: `chunked` puts the functions of normkit.dask in the place of the
core's, on arrays in chunks, and the checks of every other test know no difference.
"""

import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial, wraps

import normkit
import numpy as np
import pytest

da = pytest.importorskip("dask.array", reason="dask is not installed")
nd = pytest.importorskip("normkit.dask")
import bounds  # noqa: E402
import dask  # noqa: E402
from cases import DTYPES, INTEGERS, uniform  # noqa: E402
from checks import check_backward, check_forward  # noqa: E402
from reference import OPERATIONS, REGISTRY  # noqa: E402

SHAPE = (3, 6, 8, 5)
# Of each axis; no chunk of "uneven" ends where a group does.
CHUNKS = {
    "whole": SHAPE,
    "images": (1, 6, 8, 5),
    "twos": (2, 2, 4, 3),
    "uneven": ((1, 2), (4, 1, 1), (5, 3), (1, 4)),
}
CORE = {name: getattr(normkit, name) for name in nd.__all__}


def lazy(array, chunks):
    """An array of dask in these chunks, where it has the extents that they are of."""
    if array is None or array.ndim != len(SHAPE):
        return array
    fitting = [c if n == extent else -1 for n, extent, c in zip(array.shape, SHAPE, chunks, strict=True)]
    return da.from_array(array, chunks=tuple(fitting))


def computed(*arrays):
    """Their values. What each said of itself before has to be true of every block."""
    given = [a for a in arrays if a is not None]
    blocks = [a.to_delayed(optimize_graph=False).ravel().tolist() for a in given]
    values, found = dask.compute(given, blocks, scheduler="sync")
    for array, of_array, value in zip(given, found, values, strict=True):
        shapes = [block.shape for block in of_array]
        expected = [tuple(c[k] for c, k in zip(array.chunks, at, strict=True)) for at in np.ndindex(*array.numblocks)]
        assert shapes == expected
        assert {block.dtype for block in of_array} == {array.dtype} == {value.dtype}
        assert {type(block) for block in of_array} <= {type(array._meta), array.dtype.type}
        assert array._meta.shape == (0,) * array.ndim
    result = iter(values)
    return tuple(None if a is None else next(result) for a in arrays)


def by_dask(name, chunks, *args, **options):
    """A function of normkit.dask on arrays in chunks, called as the core's on arrays of NumPy."""
    bound = inspect.signature(CORE[name]).bind(*args, **options).arguments
    others = CHUNKS["twos"]
    first = "content" if "content" in bound else "x"
    for key, value in bound.items():
        if isinstance(value, np.ndarray):
            bound[key] = lazy(value, chunks if key == first else others)
    found = getattr(nd, name)(**bound)
    many = isinstance(found, tuple)
    results = found if many else (found,)
    assert results[0] is None or results[0].chunks == bound[first].chunks
    values = computed(*results)
    return values if many else values[0]


@pytest.fixture(params=CHUNKS)
def chunks(request):
    return CHUNKS[request.param]


@pytest.fixture
def chunked(chunks, monkeypatch):
    for name, function in CORE.items():
        monkeypatch.setattr(normkit, name, wraps(function)(partial(by_dask, name, chunks)))


def same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.tobytes() == np.ascontiguousarray(b).tobytes()


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
@pytest.mark.usefixtures("chunked")
def test_every_operation(op, dtype, rng):
    dy, x = uniform(rng, SHAPE, dtype), uniform(rng, SHAPE, dtype, offset=0.25)
    check_forward(op, x)
    check_backward(op, dy, x)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.usefixtures("chunked")
def test_integers(dtype, rng):
    check_forward(OPERATIONS["group"], uniform(rng, SHAPE, dtype, offset=0.25))


@pytest.mark.parametrize("kind", sorted({kind for op in REGISTRY for kind in op.weights(SHAPE)}))
@pytest.mark.parametrize("given", ["weight", "bias", "both"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
@pytest.mark.usefixtures("chunked")
def test_every_weight(op, given, kind, rng):
    if kind not in op.weights(SHAPE):
        return
    dy, x = (uniform(rng, SHAPE) for _ in range(2))
    weight, bias = (np.asarray(uniform(rng, op.weight_shape(SHAPE, kind))) for _ in range(2))
    check_forward(op, x, weight if given != "bias" else None, bias if given != "weight" else None)
    if given != "bias":
        check_backward(op, dy, x, weight, bias=bias if given == "both" else None)


@pytest.mark.parametrize("mask", [SHAPE, (3, 1, 8, 5), (8, 1), (3, 6, 1, 1)], ids=repr)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
@pytest.mark.usefixtures("chunked")
def test_masks(op, mask, rng):
    dy, x = uniform(rng, SHAPE), uniform(rng, SHAPE, offset=0.25)
    where = rng.random(mask) < 0.6
    check_forward(op, x, where=where)
    check_backward(op, dy, x, where=where)


@pytest.mark.parametrize("options", ["plain", "silu", "leaky", "prelu", "masked", "all"])
@pytest.mark.parametrize("name", ["instance_norm", "group_norm", "layer_norm", "rms_norm", "batch_norm"])
def test_options_as_the_core_has_them(name, options, chunks, rng):
    """To the last bit where statistics lie within chunks. Else both are within the bounds of float32: statistics of at
    most a chunk of the core are 20 roundings off at most, gradients of parameters are sums over all of x."""
    x, dy, residual, dresidual = (uniform(rng, SHAPE) for _ in range(4))
    shape = (5,) if name in ("layer_norm", "rms_norm") else (6,)
    weight, bias, slopes = (uniform(rng, shape) for _ in range(3))
    told = {
        "plain": {},
        "silu": {"activation": "silu"},
        "leaky": {"activation": ("leaky_relu", 0.3)},
        "prelu": {"activation": ("prelu", slopes)},
        "masked": {"where": rng.random((3, 1, 8, 5)) < 0.6},
        "all": {"activation": "gelu", "weight_offset": 1.0, "where": rng.random(SHAPE) < 0.6},
    }[options]
    extra = {"num_groups": 2} if name == "group_norm" else {}
    learns = {"training": True} if name == "batch_norm" else {}
    forward = {"weight": weight, "bias": bias, "residual": residual, "return_stats": True, "return_residual": True}
    found = by_dask(name, chunks, x, **forward, **extra, **learns, **told)
    expected = CORE[name](x, **forward, **extra, **learns, **told)
    _, *statistics, total = expected
    need = ("dx", "dweight", "dbias", *(("dslopes",) if options == "prelu" else ()))
    backward = {"weight": weight, "bias": bias, "dresidual": dresidual, "need": need, **extra, **told}
    given = dict(zip(("mean", "rstd")[-len(statistics) :], statistics, strict=True))
    gradients = by_dask(f"{name}_backward", chunks, dy, total, **given, **backward)
    of_core = CORE[f"{name}_backward"](dy, total, **given, **backward)
    same_bits(found[-1:], expected[-1:])
    if chunks == SHAPE:
        same_bits([*found, *gradients], [*expected, *of_core])
        return
    unit = bounds.unit(np.float32)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 40 * unit * np.abs(b).max()
    assert np.abs(gradients[0] - of_core[0]).max() <= 80 * unit * (1 + np.abs(of_core[0]).max())
    for a, b in zip(gradients[1:], of_core[1:], strict=True):
        assert np.abs(a - b).max() <= 80 * unit * np.abs(dy).sum()


@pytest.mark.parametrize("out_dtype", ["float16", np.float64])
def test_out_dtype(out_dtype, chunks, rng):
    x = rng.integers(0, 255, SHAPE, np.uint8)
    found = by_dask("normalize", chunks, x, axis=None, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    truth = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    assert np.abs(found - truth).max() <= (2**-11 if out_dtype == "float16" else 2**-21) * np.abs(truth).max()


@pytest.mark.parametrize("name", ["instance_norm", "batch_norm"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_running_statistics_are_returned(name, is_masked, chunks, rng):
    x = uniform(rng, SHAPE)
    where = rng.random(SHAPE) < 0.1 if is_masked else None  # some of fewer than two members
    running = {"running_mean": uniform(rng, (6,)), "running_var": np.abs(uniform(rng, (6,)))}
    kept = {key: value.copy() for key, value in running.items()}
    learns = {"training": True} if name == "batch_norm" else {}
    _, mean, var = by_dask(name, chunks, x, **running, **learns, where=where, momentum=0.3)
    CORE[name](x, **kept, **learns, where=where, momentum=0.3)
    for found, expected in ((mean, kept["running_mean"]), (var, kept["running_var"])):
        assert np.abs(found - expected).max() <= 20 * bounds.unit(np.float32) * np.abs(expected).max()


@pytest.mark.parametrize("name", ["instance_norm", "batch_norm"])
def test_frozen_statistics(name, chunks, rng):
    dy, x = uniform(rng, SHAPE), uniform(rng, SHAPE)
    running = {"running_mean": uniform(rng, (6,)), "running_var": np.abs(uniform(rng, (6,)))}
    weight, option = uniform(rng, (6,)), "training" if name == "batch_norm" else "use_input_stats"
    told = {option: False, "activation": "silu"}
    found = by_dask(name, chunks, x, weight, **running, **told, return_stats=True)
    expected = CORE[name](x, weight, **running, **told, return_stats=True)
    same_bits(found, expected)
    gradients = by_dask(f"{name}_backward", chunks, dy, x, *found[1:], weight, **told)
    of_core = CORE[f"{name}_backward"](dy, x, *expected[1:], weight, **told)
    same_bits(gradients[:1], of_core[:1])
    assert np.abs(gradients[1] - of_core[1]).max() <= 40 * bounds.unit(np.float32) * np.abs(dy).sum()


@pytest.mark.parametrize("styles", [1, 3])
@pytest.mark.parametrize("need", [("dcontent", "dstyle"), ("dcontent",), ("dstyle",)])
def test_adaptive_instance_norm(styles, need, chunks, rng):
    dy, content = (uniform(rng, SHAPE) for _ in range(2))
    style = uniform(rng, (styles, 6, 4, 7))
    unit = bounds.unit(np.float32)
    found = by_dask("adaptive_instance_norm", chunks, content, style, return_stats=True, activation="silu")
    expected = CORE["adaptive_instance_norm"](content, style, return_stats=True, activation="silu")
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() <= 40 * unit * np.abs(b).max()
    arguments = (dy, content, style, *expected[1:])
    gradients = by_dask("adaptive_instance_norm_backward", chunks, *arguments, activation="silu", need=need)
    of_core = CORE["adaptive_instance_norm_backward"](*arguments, activation="silu", need=need)
    for a, b in zip(gradients, of_core, strict=True):
        assert (a is None) == (b is None)
        assert a is None or np.abs(a - b).max() <= 80 * unit * np.abs(dy).sum((0, 2, 3)).max()


@pytest.mark.parametrize("size", [1, 1e-14], ids=["", "below-eps"])
@pytest.mark.parametrize("axis", [-1, (0, 2), None], ids=repr)
def test_l2_normalize(size, axis, chunks, rng):
    dy, x = uniform(rng, SHAPE), uniform(rng, SHAPE) * np.float32(size)
    y, rnorm = by_dask("l2_normalize", chunks, x, axis=axis, return_stats=True)
    expected, of_core = CORE["l2_normalize"](x, axis=axis, return_stats=True)
    unit = bounds.unit(np.float32)
    assert np.abs(rnorm - of_core).max() <= 20 * unit * np.abs(of_core).max()
    assert np.abs(y - expected).max() <= 20 * unit * np.abs(expected).max()
    dx = by_dask("l2_normalize_backward", chunks, dy, x, rnorm, axis=axis)
    expected = CORE["l2_normalize_backward"](dy, x, of_core, axis=axis)
    assert np.abs(dx - expected).max() <= 80 * unit * np.abs(dy).max() * np.abs(of_core).max()


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_what_has_no_norm(chunk):
    x = np.array([[1, np.nan, 3, 4], [1, np.inf, 3, 4], [0, 0, 0, 0], [3, 0, 4, 0]])
    (y,) = computed(nd.l2_normalize(da.from_array(x, chunks=(4, chunk))))
    np.testing.assert_array_equal(y, normkit.l2_normalize(x))


@pytest.mark.parametrize("empty", ["before", "behind"])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("name", ["instance", "group", "layer", "batch", "frozen-instance", "frozen-batch"])
def test_an_extent_of_one_beside_an_empty_chunk(name, at, empty, rng):
    shape = tuple(1 if axis == at else (4, 2, 6)[axis] for axis in range(3))
    x, dy = uniform(rng, shape), uniform(rng, shape)
    one = (0, 1) if empty == "before" else (1, 0)
    blocks = tuple(one if axis == at else extent // 2 for axis, extent in enumerate(shape))
    lazy_x, lazy_dy = (da.from_array(a, chunks=blocks) for a in (x, dy))
    kind, args, options = name.rpartition("-")[2], (1,) if name == "group" else (), {}
    weight = uniform(rng, shape[-1:] if kind == "layer" else shape[1:2])
    if kind == "batch":
        options["training"] = name == "batch"
    if name.startswith("frozen"):
        options |= {"running_mean": weight, "running_var": weight**2}
        options |= {} if kind == "batch" else {"use_input_stats": False}
    forward, lazy_forward = (getattr(library, f"{kind}_norm") for library in (normkit, nd))
    y, *statistics = forward(x, *args, weight, **options, return_stats=True)
    found = computed(*lazy_forward(lazy_x, *args, weight, **options, return_stats=True))
    for a, b in zip(found, (y, *statistics), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-5)
    options = {key: value for key, value in options.items() if not key.startswith("running")}
    backward, lazy_backward = (getattr(library, f"{kind}_norm_backward") for library in (normkit, nd))
    for given in (weight, None):
        found = computed(*lazy_backward(lazy_dy, lazy_x, *args, *statistics, given, **options))
        for a, b in zip(found, backward(dy, x, *args, *statistics, given, **options), strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-5)


def test_far_from_zero(chunks, rng):
    """mean 1e6 and deviation 1 in float32: y is as exact as that of the core. Two lines of dask are 1e-2 off."""
    x = (rng.standard_normal(SHAPE) + 1e6).astype(np.float32)
    y = by_dask("normalize", chunks, x, axis=None, eps=0)
    wide = x.astype(np.float64)
    truth = (wide - wide.mean()) / wide.std()
    assert np.abs(y - truth).max() <= 4 * 2**-23 * np.abs(truth).max()


@pytest.mark.parametrize("shape", [(0, 6, 8, 5), (3, 6, 0, 5)], ids=repr)
def test_nothing_to_normalize(shape):
    x = da.zeros(shape, chunks=2, dtype="f4")
    y, mean, rstd = nd.instance_norm(x, return_stats=True)
    values = computed(y, mean, rstd)
    same_bits(values, normkit.instance_norm(np.zeros(shape, "f4"), return_stats=True))
    gradients = computed(*nd.instance_norm_backward(x, x, mean, rstd))
    assert [g.shape for g in gradients] == [shape, (6,), (6,)]
    assert not gradients[1].any()


@pytest.mark.parametrize("chunks", [2, -1])
def test_groups_without_channels(chunks):
    x = da.zeros((4, 0, 5, 7), chunks=chunks, dtype="f4")
    weight, of_core = np.ones(0, "f4"), np.zeros(x.shape, "f4")
    y, mean, rstd = nd.group_norm(x, 3, weight, return_stats=True)
    values = computed(y, mean, rstd)
    same_bits(values, normkit.group_norm(of_core, 3, weight, return_stats=True))
    assert y.chunks == x.chunks
    gradients = computed(*nd.group_norm_backward(x, x, 3, mean, rstd, weight))
    same_bits(gradients, normkit.group_norm_backward(of_core, of_core, 3, *values[1:], weight))


def test_chunks_without_elements(rng):
    x = uniform(rng, (4, 9))
    odd = da.from_array(x, chunks=((2, 0, 2), (0, 4, 5)))
    assert np.abs(nd.layer_norm(odd).compute(scheduler="sync") - normkit.layer_norm(x)).max() <= 20 * 2**-24 * 3


def test_numbers_as_statistics(chunks, rng):
    dy, x = uniform(rng, SHAPE), uniform(rng, SHAPE)
    found = by_dask("instance_norm_backward", chunks, dy, x, 0.25, 0.5, use_input_stats=False)
    same_bits(found[:1], CORE["instance_norm_backward"](dy, x, 0.25, 0.5, use_input_stats=False)[:1])


# ---- what is read, and what is kept ------------------------------------------------------------------------------


class Source:
    """An array that counts how often each element is read, and how many of the parts that it gave are alive."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.reads, self.alive, self.most = np.zeros(array.shape, int), 0, 0

    def __getitem__(self, index):
        part = self.array[index].copy()
        self.reads[index] += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(part, self.freed)
        return part

    def freed(self):
        self.alive -= 1


def source(rng, chunks, shape=SHAPE):
    counted = Source(uniform(rng, shape))
    return counted, da.from_array(counted, chunks=chunks, name=f"source-{id(counted)}", lock=False)


CALLS = {
    "instance": lambda x: nd.instance_norm(x),
    "instance-stats": lambda x: nd.instance_norm(x, return_stats=True),
    "group": lambda x: nd.group_norm(x, 2, return_stats=True),
    "volume": lambda x: nd.normalize(x, axis=None, return_stats=True),
    "batch": lambda x: nd.batch_norm(x, np.ones(6), np.ones(6), training=True),
    "frozen": lambda x: nd.batch_norm(x, running_mean=np.ones(6), running_var=np.ones(6)),
    "backward": lambda x: nd.batch_norm_backward(da.ones(SHAPE, chunks=2, dtype="f4"), x, 0.1, 1.2),
    "backward-whole": lambda x: nd.layer_norm_backward(da.ones(SHAPE, chunks=5, dtype="f4"), x, 0.1, 1.2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_computes_nothing_and_reads_twice_at_most(call, chunks, rng):
    counted, x = source(rng, chunks)
    found = CALLS[call](x)
    assert not counted.reads.any()
    dask.compute(found, scheduler="sync")
    once = chunks == SHAPE or call == "frozen" or (chunks == CHUNKS["images"] and call in ("instance", "group"))
    if once:
        assert (counted.reads == 1).all()
    else:
        assert counted.reads.max() <= 2
        assert counted.reads.min() >= 1


FROM = {
    "as-it-is": lambda x: x,
    "computed": lambda x: x * 2 + 1,
    "sliced": lambda x: x[:, :, 1:],
    "rechunked": lambda x: x.rechunk({0: 6}),
    "stacked": lambda x: da.stack([x[..., 0], x[..., 1]], -1),
    "residual": lambda x: x + x.sum(-1, keepdims=True),
    "filtered": lambda x: x.map_overlap(lambda a: a * 2, depth={2: 1}, boundary="reflect"),
}


@pytest.mark.parametrize("origin", FROM)
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_no_chunk_is_kept(groups, origin, rng):
    """Of 160 chunks a few are in memory at a time: those that one task needs, and what the scheduler has in hand."""
    counted, x = source(rng, (3, 6, 1, 1), (6, 6, 16, 5))
    x = FROM[origin](x)
    y = nd.normalize(x, axis=None) if groups is None else nd.group_norm(x, groups)
    target = np.zeros(y.shape, y.dtype)
    gc.collect()
    y.store(target, scheduler="sync")
    assert counted.most <= (64 if origin == "filtered" else 24)  # storing what was filtered takes dask 56
    value = x.compute(scheduler="sync")
    expected = normkit.normalize(value, axis=None) if groups is None else normkit.group_norm(value, groups)
    assert np.abs(target - expected).max() <= 40 * 2**-24 * np.abs(expected).max()


def test_two_lines_of_dask_keep_all(rng):
    """What the test above would see."""
    counted, x = source(rng, (3, 6, 1, 1), (6, 6, 16, 5))
    ((x - x.mean()) / x.std()).store(np.zeros(x.shape, "f4"), scheduler="sync")
    assert counted.most >= 160


def test_a_part_of_the_result_reads_what_it_needs(rng):
    counted, x = source(rng, (1, 6, 4, 5))
    nd.instance_norm(x)[1].compute(scheduler="sync")
    assert not counted.reads[[0, 2]].any()


def test_what_is_in_memory_stays_there(rng):
    counted, x = source(rng, (1, 6, 4, 5))
    x = x.persist(scheduler="sync")
    nd.normalize(x, axis=None).compute(scheduler="sync")
    assert (counted.reads == 1).all()


def test_one_task_for_a_chunk(rng):
    x = da.from_array(uniform(rng, (8, 6, 8, 5)), chunks=(1, 3, 8, 5))
    y = nd.instance_norm(x, np.ones(6), residual=x)
    (optimized,) = dask.optimize(y)
    tasks = [key for key in optimized.__dask_graph__() if isinstance(key, tuple) and "normkit" in key[0]]
    assert len(tasks) == y.npartitions == 16


@pytest.mark.parametrize("size", [320, 80, 64, 63, 7, 1])
def test_chunks_are_cut_at_edges_of_groups_alone(size):
    """And tasks are so many for each piece. Before, every group was cut where any was: 4574 tasks for 64."""
    x = da.zeros((2, 320, 6, 6), chunks=(1, size, 6, 6), dtype="f4")
    edges = set(range(0, 320, size))
    pieces = edges if edges <= set(range(0, 320, 10)) else edges | set(range(0, 320, 10))
    y = nd.group_norm(x, 32)
    names = [key[0] for key in y.__dask_graph__() if isinstance(key, tuple)]
    calls = [name for name in names if name.startswith(("normkit-applied", "normkit-normalized"))]
    assert len(calls) == 2 * len(pieces)
    assert len(names) <= 12 * len(calls)


# ---- bits and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_the_chunks_alone_decide_the_bits(call, chunks, rng):
    x = da.from_array(uniform(rng, SHAPE), chunks=chunks)
    expected = as_tuple(dask.compute(CALLS[call](x), scheduler="sync")[0])
    for threads in (1, 3):
        for every in (2, 64):
            with dask.config.set(split_every=every):
                found = dask.compute(CALLS[call](x), scheduler="threads", num_workers=threads)[0]
            same_bits(as_tuple(found), expected)


@pytest.mark.parametrize("call", CALLS)
def test_names_are_those_of_the_arguments(call):
    x, other = (da.full(SHAPE, value, chunks=(2, 4, 3, 5), dtype="f4") for value in (1, 2))
    first, second, third = (as_tuple(CALLS[call](a)) for a in (x, x, other))
    assert [a.name for a in first] == [a.name for a in second]
    assert set(first[0].__dask_graph__()) == set(second[0].__dask_graph__())
    assert first[0].name != third[0].name


def test_names_tell_options_apart(rng):
    x = da.ones((4, 6, 8), chunks=(4, 6, 4))
    calls = [
        {}, {"eps": 0.1}, {"weight": np.ones(6)}, {"weight": np.zeros(6)}, {"bias": np.ones(6)}, {"activation": "silu"},
        {"activation": ("leaky_relu", 0.1)}, {"where": np.ones((4, 6, 8), bool)}, {"weight_offset": 1.0},
        {"out_dtype": "float32"},
    ]  # fmt: skip
    names = {nd.instance_norm(x, **options).name for options in calls}
    assert len(names) == len(calls)
    assert nd.instance_norm(x).name in names


def test_names_are_those_of_another_process():
    code = "import dask.array as da, normkit.dask as nd; print(nd.normalize(da.ones((6, 6), chunks=2), axis=None).name)"
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(names) == 1


@pytest.mark.parametrize(
    "activation",
    [("elu", 0.5), ("elu", np.array(0.5)), ("leaky_relu", np.float32(0.2)), ("prelu", np.float64(0.25))],
    ids=lambda pair: f"{pair[0]}-{type(pair[1]).__name__}",
)
def test_parameters_of_activations(activation, rng):
    x = uniform(rng, SHAPE)
    found = nd.instance_norm(lazy(x, CHUNKS["images"]), activation=activation)
    same_bits(computed(found), [normkit.instance_norm(x, activation=activation)])


# ---- errors ------------------------------------------------------------------------------------------------------

WRONG = {
    "weight": lambda n, x: n.instance_norm(x, np.ones(5)),
    "groups": lambda n, x: n.group_norm(x, 4),
    "axis": lambda n, x: n.layer_norm(x, axis=7),
    "eps": lambda n, x: n.rms_norm(x, eps=-1.0),
    "activation": lambda n, x: n.normalize(x, axis=1, activation="swish"),
    "slopes-of-relu": lambda n, x: n.normalize(x, axis=1, activation=("relu", np.ones(6))),
    "slopes-of-elu": lambda n, x: n.normalize(x, axis=1, activation=("elu", np.ones(6))),
    "slopes-of-nothing": lambda n, x: n.normalize(x, axis=1, activation=("prelul", np.ones(6))),
    "where": lambda n, x: n.normalize(x, axis=1, where=False),
    "where-of-numpy": lambda n, x: n.normalize(x, axis=1, where=np.False_),
    "mask": lambda n, x: n.batch_norm(x, training=True, where=np.ones(4, bool)),
    "residual": lambda n, x: n.group_norm(x, 2, residual=np.ones(SHAPE)),
    "no-residual": lambda n, x: n.layer_norm(x, return_residual=True),
    "running": lambda n, x: n.batch_norm(x),
    "need": lambda n, x: n.instance_norm_backward(x, x, 0.0, 1.0, need=("dy",)),
    "rstd": lambda n, x: n.group_norm_backward(x, x, 2, np.zeros((3, 2)), np.ones((3, 3))),
    "style": lambda n, x: n.adaptive_instance_norm(x, np.ones((2, 6, 4), "f4")),
    "style-dtype": lambda n, x: n.adaptive_instance_norm_backward(x, x, np.ones((3, 6, 4), int), 0.0, 1.0),
    "content": lambda n, x: n.adaptive_instance_norm(x, x, channel_axis=4),
    "l2": lambda n, x: n.l2_normalize(x, axis=(1, 1)),
    "complex": lambda n, x: n.l2_normalize(x.astype(complex)),
    "object": lambda n, x: n.instance_norm(x.astype(object)),
    "order": lambda n, x: n.instance_norm(x.astype(">f4")),
    "out-dtype": lambda n, x: n.instance_norm(x, out_dtype="int8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_at_the_call_in_the_words_of_the_core(wrong):
    x = np.ones(SHAPE, np.float32)
    with pytest.raises((TypeError, ValueError)) as expected:
        WRONG[wrong](normkit, x)
    with pytest.raises(type(expected.value)) as found:
        WRONG[wrong](nd, da.from_array(x, chunks=2))
    assert str(found.value) == str(expected.value)


def test_what_only_dask_has_wrong():
    x = da.ones((4, 6), chunks=2)
    with pytest.raises(TypeError, match=r"^x is ndarray, expected a dask\.array\.Array$"):
        nd.layer_norm(np.ones((4, 6)))
    with pytest.raises(TypeError, match=r"^weight is list, expected an array of dask, or one that dask takes$"):
        nd.layer_norm(x, [1.0] * 6)
    tensor = type("Tensor", (), {"__module__": "torch", "shape": (6,), "dtype": "torch.float32"})()
    for name in ("weight", "style"):
        f = nd.layer_norm if name == "weight" else nd.adaptive_instance_norm
        with pytest.raises(TypeError, match=rf"^{name} has chunks of torch, expected numpy, as those of \w+$"):
            f(x, tensor)
    with pytest.raises(TypeError, match=r"^out is given, expected None: what is computed is a new array of dask$"):
        nd.layer_norm(x, out=np.ones((4, 6)))
    unknown = x[x[:, 0] > 0]
    with pytest.raises(ValueError, match=r"^x has chunks of unknown sizes: call x\.compute_chunk_sizes\(\) before$"):
        nd.layer_norm(unknown)
    assert nd.layer_norm(unknown.compute_chunk_sizes()).compute().shape == (4, 6)


@pytest.mark.parametrize("name", nd.__all__)
def test_the_core_hands_arrays_of_dask_over(name):
    x = da.random.default_rng(1).random(SHAPE, chunks=CHUNKS["uneven"])
    told = {"num_groups": 2, "axis": -1, "mean": 0.25, "rstd": 3.0, "rnorm": 3.0, "training": True}
    given = {
        key: told.get(key, x)
        for key, parameter in inspect.signature(CORE[name]).parameters.items()
        if parameter.default is inspect.Parameter.empty or key in told
    }
    found, expected = as_tuple(CORE[name](**given)), as_tuple(getattr(nd, name)(**given))
    # The name of an array of dask tells what it is computed of, and how.
    assert [getattr(a, "name", None) for a in found] == [getattr(a, "name", None) for a in expected]
    assert isinstance(found[0], da.Array)


def test_what_the_core_cannot_hand_over():
    x = da.ones((4, 6), chunks=2)
    expected = "is an Array, expected a NumPy array or an object with __dlpack__: pass"
    with pytest.raises(TypeError, match=rf"^x {expected} x\.compute\(\)$"):
        normkit.moments(x, axis=1)
    with pytest.raises(TypeError, match=rf"^x {expected} x\.compute\(\)$"):
        normkit.layer_norm_double_backward(x, None, None, x, x, 0.0, 1.0)
    with pytest.raises(TypeError, match=rf"^weight {expected} weight\.compute\(\)$"):
        normkit.layer_norm(np.ones((4, 6)), x[0])
    with pytest.raises(TypeError, match=rf"^style {expected} style\.compute\(\)$"):
        normkit.adaptive_instance_norm(np.ones((4, 6)), x)
    with pytest.raises(TypeError, match=r"^out is given, expected None"):
        normkit.layer_norm(x, out=np.ones((4, 6)))


@pytest.mark.parametrize("name", nd.__all__)
def test_signatures_are_those_of_the_core(name):
    assert inspect.signature(getattr(nd, name)) == inspect.signature(CORE[name])


def test_dask_is_asked_for_where_it_is_missing():
    code = "import sys; sys.modules['dask'] = None; sys.modules['dask.array'] = None; import normkit.dask"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'normkit.dask needs dask, which is not installed: pip install "normkit[dask]"' in done.stderr


# ---- xarray ------------------------------------------------------------------------------------------------------


def test_xarray(rng):
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    values = uniform(rng, (4, 6, 10))
    x = xarray.DataArray(da.from_array(values, chunks=(1, 6, 5)), dims=("time", "level", "cell"))
    expected = normkit.layer_norm(values)
    # Any chunks: the function of dask arrays.
    y = xarray.apply_ufunc(nd.layer_norm, x, input_core_dims=[["cell"]], output_core_dims=[["cell"]], dask="allowed")
    assert np.abs(y.compute().values - expected).max() <= 40 * 2**-24 * np.abs(expected).max()
    assert (y.dims, y.chunks) == (x.dims, x.chunks)
    # The core dimension in one chunk: the core's own, of each.
    y = xarray.apply_ufunc(
        normkit.layer_norm, x.chunk(cell=-1), input_core_dims=[["cell"]], output_core_dims=[["cell"]],
        dask="parallelized", output_dtypes=[x.dtype],
    )  # fmt: skip
    same_bits([y.compute().values], [expected])


# ---- processes ---------------------------------------------------------------------------------------------------


def slow(block):
    time.sleep(0.05)
    return block


@pytest.fixture
def cluster():
    """A function that starts so many worker processes and gives a client of them."""
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    opened = []

    def start(workers):
        made = distributed.LocalCluster(workers, threads_per_worker=1, dashboard_address=":0", memory_limit=None)
        opened.extend([made, distributed.Client(made)])
        return opened[-1]

    yield start
    for each in reversed(opened):
        each.close()


def made(seed):
    x = da.random.default_rng(seed).standard_normal((4, 6, 16, 5), chunks=(4, 4, 4, 5)).astype("f4") + 100
    return x.map_blocks(slow, dtype=x.dtype)


@pytest.mark.filterwarnings("default")
def test_processes_give_the_same_bits_and_so_does_one_that_is_killed(cluster):
    def calls():
        x = made(0)
        y, mean, rstd = nd.normalize(x, axis=None, return_stats=True)
        _, dweight, _ = nd.group_norm_backward(x, x, 2, 0.1, 1.2)
        return y, mean, rstd, dweight

    expected = dask.compute(*calls(), scheduler="sync")
    client = cluster(2)
    futures = client.compute(calls())
    while client.run_on_scheduler(done) < 1:
        time.sleep(0.1)
    assert {future.status for future in futures} == {"pending"}
    victim = next(iter(client.scheduler_info()["workers"]))
    client.run(end, workers=[victim])
    same_bits(client.gather(futures), expected)


def end():
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()  # the answer goes out before


def done(dask_scheduler):
    """How many tasks have given something that is still wanted."""
    return sum(task.state == "memory" for task in dask_scheduler.tasks.values())


@pytest.mark.filterwarnings("default")
def test_what_was_shuffled_is_not_shuffled_again(cluster):
    client = cluster(2)
    x = made(1).rechunk((4, 6, 16, 1), method="p2p")
    y = nd.normalize(x, axis=None)
    expected = normkit.normalize(made(1).compute(), axis=None)
    assert np.abs(client.compute(y).result() - expected).max() <= 40 * 2**-24 * np.abs(expected).max()
