"""Arrays that are not dense, and masks that name everyone, have the bits of what they stand for."""

import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path

import normkit as nk
import numpy as np
import pytest
from cases import DTYPES, ON_GPU, bits, uniform
from reference import REGISTRY

SHAPES = {"small": (4, 6, 9, 20), "spans": (3, 7, 41, 263), "narrow": (5, 3, 40, 70)}
# The axes from the slowest to the fastest.
ORDERS = {"first": (0, 1, 2, 3), "last": (0, 2, 3, 1), "innermost-batch": (1, 2, 3, 0), "mixed": (2, 0, 3, 1)}
CUTS = {
    "crop": np.s_[1:, 1:, 2:-2, 3:-1],
    "columns": np.s_[..., 3:-1],
    "rows": np.s_[:, :, 2:-2],
    "every-second-row": np.s_[:, :, ::2],
    "every-third-column": np.s_[..., ::3],
    "every-second-channel": np.s_[:, ::2],
    "every-second-image": np.s_[::2],
    "images": np.s_[1:3],
    "rows-flipped": np.s_[:, :, ::-1],
    "columns-flipped": np.s_[..., ::-1],
    "channels-flipped": np.s_[:, ::-1],
    "three-channels": np.s_[:, :3],
    "one-channel": np.s_[:, 1:2],
}
AXES = [(2, 3), (1, 2, 3), (1,), (0, 2, 3), (3,), (2,), (0, 1), (0,), (1, 2), (0, 3)]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(params=ORDERS.values(), ids=ORDERS)
def order(request):
    return request.param


@pytest.fixture(params=CUTS.values(), ids=CUTS)
def cut(request):
    return request.param


def seen(rng, shape, dtype, order, cut):
    """A part of an array whose axes lie in this order."""
    lying = uniform(rng, tuple(shape[a] for a in order), dtype)
    return lying.transpose(np.argsort(order))[cut]


def copied(a):
    """Dense, in the same order of memory."""
    return np.copy(a, order="K")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype("uint8")], ids=str)
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_view_is_its_dense_copy(axis, order, cut, dtype, shape, rng):
    x = seen(rng, shape, dtype, order, cut)
    found, same = nk.moments(x, axis=axis), nk.moments(copied(x), axis=axis)
    assert bits(found.mean) == bits(same.mean)
    assert bits(found.m2) == bits(same.m2)
    weight = rng.standard_normal(x.shape[1]).reshape(-1, 1, 1).astype(np.float32)
    for w in (None, weight):
        assert bits(nk.normalize(x, w, w, axis=axis)) == bits(nk.normalize(copied(x), w, w, axis=axis))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
@pytest.mark.parametrize("shape", [SHAPES["small"], SHAPES["spans"]], ids=["small", "spans"])
def test_view_is_its_dense_copy_in_every_operation(op, order, cut, dtype, shape, rng):
    arrays = x, dy, residual, dresidual = [seen(rng, shape, dtype, order, cut) for _ in range(4)]
    where = seen(rng, shape, np.float32, order, cut) < 0.6
    dense_x, dense_dy, dense_residual, dense_dresidual = map(copied, arrays)
    weight = rng.standard_normal(op.weight_shape(x.shape, "channel")).astype(np.float32)
    found = op.statistics(x, weight=weight)
    same = op.statistics(dense_x, weight=weight)
    assert bits(found[0]) == bits(same[0])
    assert bits(found[2]) == bits(same[2])
    y = op.forward(x, weight, residual=residual, activation="silu")
    assert bits(y) == bits(op.forward(dense_x, weight, residual=dense_residual, activation="silu"))
    assert bits(op.forward(x, weight, where=where)) == bits(op.forward(dense_x, weight, where=copied(where)))
    options = {"dresidual": dresidual, "where": where}
    dense_options = {"dresidual": dense_dresidual, "where": copied(where)}
    for w in (None, weight):
        for given, dense_given in (({}, {}), (options, dense_options)):
            gradients = op.backward(dy, x, *found[1:], w, **given)
            for a, b in zip(gradients, op.backward(dense_dy, dense_x, *found[1:], w, **dense_given), strict=True):
                assert bits(a) == bits(b)


@pytest.mark.parametrize("elsewhere", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_only_x_decides_the_order_of_sums(axis, elsewhere, order, dtype_of_out, rng):
    """Where `out`, `dy` and a residual lie changes no bit, and nor does what they are part of."""
    dtype, out_dtype = dtype_of_out
    shape = SHAPES["small"]
    x, dy, residual = (seen(rng, shape, dtype, order, ...) for _ in range(3))
    y, mean, rstd = nk.normalize(x, axis=axis, return_stats=True, out_dtype=out_dtype)
    out = seen(rng, (4, 6, 9, 25), np.dtype(out_dtype), elsewhere, np.s_[..., :20])
    assert bits(nk.normalize(x, axis=axis, out=out, out_dtype=out_dtype)) == bits(y)
    other = seen(rng, (4, 6, 9, 25), dtype, elsewhere, np.s_[..., :20])
    other[...] = residual
    added = nk.normalize(x, axis=axis, residual=residual)
    assert bits(nk.normalize(x, axis=axis, residual=other)) == bits(added)
    other[...] = dy
    gradients = nk.normalize_backward(dy, x, mean, rstd, axis=axis)
    for a, b in zip(nk.normalize_backward(other, x, mean, rstd, axis=axis), gradients, strict=True):
        assert bits(a) == bits(b)


@pytest.fixture(params=[("float32", "float32"), ("float16", "float32"), ("float64", "float64")], ids="-".join)
def dtype_of_out(request):
    dtype, out = request.param
    return np.dtype(dtype), out


@pytest.mark.parametrize("kind", ["none", "axis", "channel", "pixel"])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_statistics_do_not_depend_on_weights(axis, order, kind, shape, rng):
    x = seen(rng, shape, np.float32, order, ...)
    varies = {"none": (), "axis": axis, "channel": (1,), "pixel": range(4)}[kind]
    weight = rng.standard_normal([n if a in varies else 1 for a, n in enumerate(shape)]).astype(np.float32)
    y, mean, rstd = nk.normalize(x, weight, axis=axis, return_stats=True)
    _, *same = nk.normalize(x, axis=axis, return_stats=True)
    assert [bits(mean), bits(rstd)] == [bits(s) for s in same]
    m = nk.moments(x, axis=axis)
    assert bits(nk.apply(x, m.mean, m.rstd(), weight, axis=axis)) == bits(y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_mask_of_everyone_is_none(op, order, dtype, shape, rng):
    x, dy = (seen(rng, shape, dtype, order, ...) for _ in range(2))
    weight = rng.standard_normal(op.weight_shape(shape, "channel")).astype(np.float32)
    found = op.statistics(x, weight=weight)
    for where in (np.ones(shape, bool), np.ones((1, 1, *shape[2:]), bool)):
        same = op.statistics(x, weight=weight, where=where)
        assert [bits(a) for a in same if a is not None] == [bits(a) for a in found if a is not None]
        for w in (None, weight):
            gradients = op.backward(dy, x, *found[1:], w)
            for a, b in zip(op.backward(dy, x, *found[1:], w, where=where), gradients, strict=True):
                assert bits(a) == bits(b)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("more", [1, 30, 600])
@pytest.mark.parametrize("steps", [2, 3, 4, 17, 520])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["lanes", "runs"])
def test_padding_changes_nothing(order, steps, more, dtype, rng):
    """Padding at the end of the slowest reduced axis, which a mask leaves out. Runs: of members that lie together."""
    shape = (steps, 5, 3) if order == (0, 1) else (steps, 3, 70)
    axis = 0 if order == (0, 1) else (0, 2)
    x, dy = uniform(rng, shape, dtype), uniform(rng, shape, dtype)
    padded = [np.concatenate([a, np.full((more, *shape[1:]), np.nan, dtype)]) for a in (x, dy)]
    padded[1][steps:] = 0
    where = np.arange(steps + more).reshape(-1, 1, 1) < steps
    y, mean, rstd = nk.normalize(x, axis=axis, return_stats=True)
    found, *same = nk.normalize(padded[0], axis=axis, where=where, return_stats=True)
    assert [bits(s) for s in same] == [bits(mean), bits(rstd)]
    assert bits(found[:steps]) == bits(y)
    dx, dweight, _ = nk.normalize_backward(dy, x, mean, rstd, axis=axis)
    gradients = nk.normalize_backward(padded[1], padded[0], mean, rstd, axis=axis, where=where)
    assert bits(gradients[0][:steps]) == bits(dx)
    assert bits(gradients[1][:steps]) == bits(dweight)


def peak_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return None


def peak_of(call, threads):
    """By how many bytes memory grows while a call runs for the second time."""
    with nk.num_threads(threads):
        call()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        tracemalloc.start()
        try:
            call()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
    return peak_bytes() - before


@pytest.mark.skipif(ON_GPU, reason="a GPU packs arrays")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is Linux's to tell")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cut", ["crop", "every-third-column", "columns-flipped", "every-second-channel"])
@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("axis", [(2, 3), (1, 2, 3), (0, 2, 3)], ids=str)
def test_no_array_is_copied_whole(axis, order, cut, threads, rng):
    shape = (8, 6, 400, 300)
    x, dy, out, dx = (seen(rng, shape, np.float32, ORDERS[order], CUTS[cut]) for _ in range(4))
    _, mean, rstd = nk.normalize(x, axis=axis, return_stats=True)

    def call():
        nk.normalize(x, axis=axis, out=out)
        nk.normalize_backward(dy, x, mean, rstd, axis=axis, need=("dx",), out=dx)

    assert peak_of(call, threads) < threads << 20 < x.nbytes


@pytest.mark.skipif(ON_GPU, reason="a GPU packs arrays")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc tells by page faults that a copy was made")
def test_arrays_on_their_elements_are_not_copied_after_others_of_the_same_layout():
    code = """if True:
        import resource
        import normkit as nk
        import numpy as np
        shape = (2, 2, 256, 256)
        raw, out = np.zeros(4 * 2**18 + 64, np.uint8), np.empty(shape, np.float32)
        def faults(begin):
            x = raw[begin : begin - 64].view(np.float32).reshape(shape)
            nk.instance_norm(x, out=out)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                nk.instance_norm(x, out=out)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults(4 - raw.ctypes.data % 4), faults(5 - raw.ctypes.data % 4), faults(4 - raw.ctypes.data % 4))
    """
    # What is allocated beyond this comes in new pages, and goes back when it is freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "NORMKIT_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    before, misaligned, after = map(int, found.stdout.split())
    assert max(before, after) < 10 <= 10 * 16 < misaligned


INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"]
DTYPES_OF_ARRAYS = [(name, "float32") for name in INTEGERS] + [("int16", "float16"), ("float32", "bfloat16")]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("axis", [(2, 3), (1,), (0, 2, 3)], ids=str)
def test_integers_are_read_as_float32(axis, dtype, order, cut, isa, rng):
    x = seen(rng, SHAPES["spans"], dtype, order, cut)
    found = nk.normalize(x, axis=axis, return_stats=True)
    expected = nk.normalize(x.astype(np.float32), axis=axis, return_stats=True)
    assert [bits(a) for a in found] == [bits(a) for a in expected]


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 48, 500, 512, 1040])
@pytest.mark.parametrize("channels", [2, 3, 4, 6, 7, 12, 15, 16, 24, 48])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64"])
@pytest.mark.parametrize("center", [True, False])
def test_few_channels_last_have_the_bits_that_they_have_among_many(center, dtype, channels, steps, isa, rng):
    many = uniform(rng, (2, steps, 64), np.dtype(dtype))
    few = many[..., :channels]
    expected = nk.normalize(many, axis=1, center=center, return_stats=True)
    memory = np.full(few.size + 32, np.nan, expected[0].dtype)
    out = memory[17:-15].reshape(few.shape)
    for x in (few, few.copy()):
        out[...] = np.nan
        found = nk.normalize(x, axis=1, center=center, return_stats=True, out=out)
        assert [bits(a) for a in found] == [bits(a[..., :channels]) for a in expected]
        assert np.isnan([*memory[:17], *memory[-15:]]).all()


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
def test_outputs_of_another_dtype_are_rounded_once(dtype, out, order, cut, isa, rng):
    if (dtype, out) == ("float64", "bfloat16"):
        pytest.skip("ml_dtypes rounds to float32 on the way")
    x = seen(rng, SHAPES["spans"], dtype, order, cut)
    y = nk.normalize(x, axis=(1, 3), out_dtype="float64" if dtype == "float64" else "float32")
    assert bits(nk.normalize(x, axis=(1, 3), out_dtype=out)) == bits(y.astype(DTYPES[out]))


@pytest.mark.skipif(ON_GPU, reason="where arrays are packed, their library rounds them")
@pytest.mark.parametrize(("out", "digits"), [("float32", 23), ("float16", 10), ("bfloat16", 7)])
def test_float64_is_rounded_once(out, digits, isa):
    """Just beyond the middle of two numbers, which float32 would take for the middle itself; and what is no number."""
    x = np.array([1 + 2.0 ** -(digits + 1) + sign * 2.0**-45 for sign in (-1, 1)])
    x = np.stack([x, -x, 2 * x, [np.inf, np.nan]])
    y = nk.apply(x, np.float64(0), np.float64(1), axis=None, out_dtype=out).astype(np.float64)
    up = 1 + 2.0**-digits
    np.testing.assert_array_equal(y, [[1, up], [-1, -up], [2, 2 * up], [np.inf, np.nan]])


@pytest.mark.skipif(ON_GPU, reason="a GPU packs arrays")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is Linux's to tell")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "out"), DTYPES_OF_ARRAYS)
@pytest.mark.parametrize("axis", [(2, 3), (1, 2, 3), (0, 2, 3)], ids=str)
def test_no_array_is_converted_whole(axis, dtype, out, threads, order, rng):
    shape = (8, 6, 400, 300)
    lying = tuple(shape[a] for a in order)
    x, y = (a.transpose(np.argsort(order)) for a in (uniform(rng, lying, dtype), np.empty(lying, DTYPES[out])))
    assert peak_of(lambda: nk.normalize(x, axis=axis, out=y, out_dtype=out), threads) < threads << 20 < y.nbytes
