"""What only a GPU has: streams, graphs, several devices, other work beside ours, arrays beyond 2^31 elements.

That values are right there too, the suite of the CPU says, on arrays of a GPU: see mirrored.py. Tests that ask for no
stream run in a build with NORMKIT_CUDA=shim as well, with fake_gpu.py in the place of CuPy.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import bounds
import normkit
import numpy as np
import pytest
from cases import bits, uniform
from checks import statistics_of
from fake_gpu import fake_cupy
from mirrored import poisoned, to_device, to_host
from normkit import _core, _cuda
from reference import OPERATIONS, REGISTRY

SHAPE, WHOLE = (6, 8, 5, 7), (6, 8, 12, 25)  # rows of whole vectors have kernels of their own
SLOW = 20_000  # elements
SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""
LONG = 200_000_000  # cycles: a tenth of a second
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # JAX takes three quarters of the memory at its first touch


@pytest.fixture(scope="module")
def gpu():
    """CuPy, on a machine that has what it wants."""
    if not normkit.cuda_available() or _core.cuda == "shim":
        pytest.skip("no GPU, or a build of normkit without CUDA")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    with poisoned(cupy):
        yield cupy


@pytest.fixture
def cupy(request, monkeypatch):
    """CuPy, or in a build for it what takes its place."""
    if _core.cuda != "shim":
        return request.getfixturevalue("gpu")
    fake = fake_cupy()
    fake.current = 0
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def on_device(cupy, *arrays):
    return tuple(None if a is None else to_device(cupy, a) for a in arrays)


def on_host(cupy, arrays):
    return tuple(None if a is None else to_host(cupy, a) for a in arrays)


def call(op, dy, x, weight, bias):
    """Forward and backward: y, the statistics, and all gradients."""
    y, mean, rstd = op.statistics(x, weight=weight, bias=bias)
    return (y, mean, rstd, *op.backward(dy, x, mean, rstd, weight))


def data(op, rng, shape=SHAPE, dtype=np.float32):
    if _core.cuda == "shim" and np.prod(shape) > SLOW:
        pytest.skip("takes the shim too long")
    dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=0.5)
    weight, bias = (uniform(rng, op.weight_shape(shape, "channel"), np.float32) for _ in range(2))
    return dy, x, weight, bias


def bits_of(cupy, arrays):
    return [None if a is None else bits(to_host(cupy, a)) for a in arrays]


# ---- whatever runs the kernels -----------------------------------------------------------------------------------


@contextmanager
def busy(cupy):
    """Another stream is at work, where there are streams: with a multiprocessor's worth of arithmetic at a time."""
    if not hasattr(cupy, "RawKernel"):
        yield lambda: None
        return
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        load = cupy.ones((1 << 22,), cupy.float32)

    def work():
        with stream:
            for _ in range(3):
                cupy.multiply(load, 1.0001, out=load)

    yield work
    stream.synchronize()


@pytest.mark.parametrize("shape", [SHAPE, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_hundred_runs_have_the_same_bits(op, shape, cupy, rng):
    runs = 100 if hasattr(cupy, "RawKernel") else 3
    arrays = on_device(cupy, *data(op, rng, shape))
    first = bits_of(cupy, call(op, *arrays))
    with busy(cupy) as work:
        for _ in range(runs):
            work()
            found = call(op, *arrays)
            assert bits_of(cupy, found) == first


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (2, 4, 700), (5, 33, 9, 11), (5, 16, 700), (3, 2, 40000)], ids=str)
@pytest.mark.parametrize("op", ["instance", "instance-last", "group", "layer", "rms"])
def test_bits_do_not_depend_on_the_batch(op, shape, dtype, cupy, rng):
    op = OPERATIONS[op]
    dy, x, weight, bias = data(op, rng, shape, dtype)
    whole = on_host(cupy, call(op, *on_device(cupy, dy, x, weight, bias))[:4])
    for n in (0, shape[0] - 1):
        alone = on_host(cupy, call(op, *on_device(cupy, dy[n : n + 1], x[n : n + 1], weight, bias))[:4])
        for a, w in zip(alone, whole, strict=True):
            assert a is None or bits(a) == bits(w[n : n + 1])


@pytest.mark.parametrize("shape", [SHAPE, WHOLE], ids=["ragged", "whole"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("op", ["instance", "instance-last", "layer", "over-channels", "batch"])
def test_one_bad_number_stays_in_its_statistic(op, poison, shape, cupy, rng):
    op = OPERATIONS[op]
    dy, x, weight, bias = data(op, rng, shape)
    clean = on_host(cupy, call(op, *on_device(cupy, dy, x, weight, bias)))
    at = 3, 5, 2, 4
    x[at] = poison
    found = on_host(cupy, call(op, *on_device(cupy, dy, x, weight, bias)))
    own = np.zeros(op.blocks(shape), bool)
    own.reshape(shape)[at] = True
    own = np.broadcast_to(own.any(op.reduced(shape), keepdims=True), own.shape).reshape(shape)
    for k in (0, 3):  # y and dx
        assert not np.isfinite(found[k][own]).any()
        assert found[k][~own].tobytes() == clean[k][~own].tobytes()


@pytest.mark.parametrize("rows", [65535, 65536, 70001, 1_000_000])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
def test_more_rows_than_a_grid_has_in_y(rows, last, cupy, rng):
    op = OPERATIONS["instance-last" if last else "layer"]
    shape = (rows, 2, 1) if last else (rows, 3)
    dy, x, weight, bias = data(op, rng, shape)
    y, mean, rstd, dx, *_ = on_host(cupy, call(op, *on_device(cupy, dy, x, weight, bias)))
    f = op.reference(x, weight, bias)
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype)) <= 1
    b = op.reference_backward(dy, x, mean, rstd, weight)
    assert bounds.excess(dx.reshape(b.dx.shape), b.dx, bounds.dx(b, x.dtype)) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tiles", [2, 3, 5, 6, 7, 8, 9, 11, 13, 15, 16, 24])
def test_teams_of_any_size(tiles, dtype, cupy, rng):
    """Few rows of so many tiles, of which 32 KB are one: clusters of odd numbers of blocks among them."""
    op, shape = OPERATIONS["instance"], (2, 1, 32768 // np.dtype(dtype).itemsize * tiles - 5)
    dy, x = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=0.5)
    y, mean, rstd, dx, *_ = on_host(cupy, call(op, *on_device(cupy, dy, x, None, None)))
    f = op.reference(x)
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype)) <= 1
    b = op.reference_backward(dy, x, mean, rstd)
    assert bounds.excess(dx.reshape(b.dx.shape), b.dx, bounds.dx(b, x.dtype)) <= 1


@pytest.mark.parametrize("shape", [(1100, 1, 12225), (2200, 16384)], ids=str)
def test_a_thousand_runs_of_blocks_alone(shape, cupy, rng):
    """There are so many rows of two tiles that a block has all of a row, whose tiles its threads tell each other."""
    runs = 1000 if hasattr(cupy, "RawKernel") else 2
    if runs == 2:
        shape = (2, *shape[1:])
    x = to_device(cupy, uniform(rng, shape))
    out = [to_device(cupy, np.empty(shape, np.float32)) for _ in range(2)]
    first = normkit.normalize(x, axis=-1, out=out[0])
    for _ in range(runs):
        again = normkit.normalize(x, axis=-1, out=out[1])
        assert bits(to_host(cupy, again)) == bits(to_host(cupy, first)) if runs == 2 else bool((again == first).all())


@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("bytes_each", [100_000, 4_500_000])
def test_workspace_is_a_fifth_of_x_at_most(bytes_each, last, cupy, rng, monkeypatch):
    """The size is what is asked for, not what a pool makes of it. x is a long row, or has 64 bytes a step."""
    sizes, workspace = [], _cuda.CuPy.workspace
    monkeypatch.setattr(_cuda.CuPy, "workspace", lambda self, size: (sizes.append(size), workspace(self, size))[1])
    values = uniform(rng, (bytes_each // 64, 32) if last else (1, bytes_each // 2), np.float16)
    x = to_device(cupy, values)
    axis = 0 if last else 1
    _, mean, rstd = normkit.normalize(x, axis=axis, return_stats=True)
    normkit.normalize_backward(x, x, mean, rstd, axis=axis, need=("dx",))
    assert 0 < min(sizes) <= max(sizes) <= values.nbytes / 5


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 20, 31, 33])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_channels_last_of_odd_extents(channels, dtype, cupy, rng):
    op, shape = OPERATIONS["instance-last"], (3, 7, 5, channels)
    dy, x, weight, bias = data(op, rng, shape, dtype)
    y, mean, rstd, dx, *_ = on_host(cupy, call(op, *on_device(cupy, dy, x, weight, bias)))
    f = op.reference(x, weight, bias)
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype)) <= 1
    b = op.reference_backward(dy, x, mean, rstd, weight)
    assert bounds.excess(dx.reshape(b.dx.shape), b.dx, bounds.dx(b, x.dtype)) <= 1


@pytest.mark.parametrize("axis", [(-1,), (-2, -1), (-3, -2, -1)], ids=str)
def test_layer_norm_of_several_axes(axis, cupy, rng):
    """Rank 4 and up, where a gradient of another shape would be written past its end."""
    x, dy = (uniform(rng, (2, 3, 5, 7)) for _ in range(2))
    weight = uniform(rng, x.shape[axis[0] :])

    def calls(*arrays):
        dy, x, weight = arrays
        y, mean, rstd = normkit.layer_norm(x, weight, axis=axis, return_stats=True)
        return (y, *normkit.layer_norm_backward(dy, x, mean, rstd, weight, axis=axis))

    found = on_host(cupy, calls(*on_device(cupy, dy, x, weight)))
    for f, shape in zip(found, (x.shape, x.shape, weight.shape, weight.shape), strict=True):
        assert f.shape == shape
    flat = np.ascontiguousarray(x.reshape(*x.shape[: axis[0]], -1)), np.ascontiguousarray(weight.reshape(-1))
    alike = to_host(cupy, normkit.layer_norm(*on_device(cupy, *flat)))
    assert bits(found[0]) == bits(alike)


# ---- streams -----------------------------------------------------------------------------------------------------


@pytest.fixture
def spin(gpu):
    kernel = gpu.RawKernel(SPIN, "spin")
    return lambda cycles=LONG: kernel((1,), (1,), (np.int64(cycles),))


@pytest.mark.parametrize("op", ["instance", "instance-last", "batch", "over-channels"])
def test_work_goes_to_the_current_stream_and_nobody_waits(op, gpu, spin, rng):
    """x is written late, on a stream that waits for no other: who works on another one, or waits, is seen."""
    op = OPERATIONS[op]
    values = data(op, rng)
    wanted = bits_of(gpu, call(op, *on_device(gpu, *values)))
    late = on_device(gpu, *values)
    arrays = tuple(gpu.zeros_like(a) for a in late)
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        call(op, *arrays)  # kernels are loaded, and the pool has memory
        stream.synchronize()
        spin()
        for to, source in zip(arrays, late, strict=True):
            to[...] = source
        found = call(op, *arrays)
        assert not stream.done, "the call waited"
    stream.synchronize()
    assert bits_of(gpu, found) == wanted


@pytest.mark.parametrize("op", ["instance", "instance-last", "layer"])
def test_two_streams_at_once(op, gpu, spin, rng):
    """Each with a workspace of its own."""
    op = OPERATIONS[op]
    values = [data(op, rng, (8, 32, 64, 64)) for _ in range(2)]
    arrays = [on_device(gpu, *v) for v in values]
    wanted = [bits_of(gpu, call(op, *a)) for a in arrays]
    streams = [gpu.cuda.Stream(non_blocking=True) for _ in range(2)]
    found = [[], []]
    gpu.cuda.Device().synchronize()
    for stream in streams:
        with stream:
            spin(LONG // 10)  # until both have their queues full
    for _ in range(20):
        for k, stream in enumerate(streams):
            with stream:
                found[k].append(call(op, *arrays[k]))
    for k, stream in enumerate(streams):
        stream.synchronize()
        assert all(bits_of(gpu, results) == wanted[k] for results in found[k])


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_graph_is_captured_and_replayed(op, gpu, rng):
    """The driver refuses to allocate and to wait meanwhile. The pool is the graph's own, and with it the workspace."""
    stream, pool = gpu.cuda.Stream(non_blocking=True), gpu.cuda.MemoryPool()
    arrays = on_device(gpu, *data(op, rng))
    with stream, gpu.cuda.using_allocator(pool.malloc):
        call(op, *arrays)
        stream.synchronize()
        before = pool.total_bytes()
        stream.begin_capture(mode=gpu.cuda.runtime.streamCaptureModeGlobal)
        found = call(op, *arrays)
        graph = stream.end_capture()
        assert pool.total_bytes() == before
    with stream:
        for _ in range(3):
            fresh = on_device(gpu, *data(op, rng))
            for to, source in zip(arrays, fresh, strict=True):
                to[...] = source
            for result in found:
                if result is not None:
                    result.fill(np.nan)
            graph.launch(stream)
            assert bits_of(gpu, found) == bits_of(gpu, call(op, *fresh))


FIRST_CALL = """
import sys
import cupy, numpy as np
from reference import OPERATIONS
op, dtype = OPERATIONS[sys.argv[1]], np.dtype(sys.argv[2])
shape = tuple(map(int, sys.argv[3].split(",")))
rng = np.random.default_rng(0)
x = cupy.asarray(rng.standard_normal(shape).astype(dtype))
weight = cupy.asarray(rng.standard_normal(op.weight_shape(shape, "channel")).astype(np.float32))
stream = cupy.cuda.Stream(non_blocking=True)

def calls():
    y, mean, rstd = op.statistics(x, weight=weight)
    return [a for a in (y, mean, rstd, *op.backward(x, x, mean, rstd, weight)) if a is not None]

with stream:
    cupy.empty(8 * x.nbytes + (1 << 24), np.uint8)  # what the pool may give meanwhile: the driver gives nothing
    stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeGlobal)
    captured = calls()  # the first of this process
    graph = stream.end_capture()
    for _ in range(2):
        for a in captured:
            a.fill(np.nan)
        graph.launch(stream)
    stream.synchronize()
    found, wanted = ([cupy.asnumpy(a).tobytes() for a in arrays] for arrays in (captured, calls()))
assert found == wanted
print("captured")
"""


FIRST_CALLS = [
    (loading, *call)
    for loading in ("LAZY", "EAGER")
    for call in (
        ("instance", "float32", "6,8,5,7"),
        ("instance", "float16", "2,3,256,260"),  # a cluster, which is asked for first
        ("instance-last", "float32", "3,400,5"),  # three launches
        ("layer", "float32", "300,1000"),
        ("group", "float16", "3,8,9,9"),
        ("batch", "float64", "6,8,5,7"),
    )
]


@pytest.fixture(scope="module")
def first_calls(gpu):
    """Processes that all make their first call. They take seconds to start, and are started together."""

    def started(loading, *call):
        environment = {**os.environ, "CUDA_MODULE_LOADING": loading}
        command = [sys.executable, "-c", FIRST_CALL, *call]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=Path(__file__).parent, env=environment, **pipes)

    processes = {first: started(*first) for first in FIRST_CALLS}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("first", FIRST_CALLS, ids="-".join)
def test_a_graph_of_the_first_call_of_a_process(first, first_calls):
    """The first call of a process loads its kernels while the stream is captured."""
    said, _ = first_calls[first].communicate(timeout=100)
    assert "captured" in said, said


HOST_FUNCTION = """
import time
import cupy, normkit
x = cupy.ones((4, 3, 50), cupy.float32)
out = cupy.empty_like(x)
normkit.instance_norm(x, out=out)
stream = cupy.cuda.Stream(non_blocking=True)
with stream:
    stream.launch_host_func(lambda _: time.sleep(0.5), None)
    for _ in range(5000):  # more than a queue holds
        normkit.instance_norm(x, out=out)
stream.synchronize()
print("came back")
"""


def test_a_full_queue_waits_for_a_host_function_of_python(gpu):
    """The function wants the interpreter lock, and who launches waits for the function."""
    done = subprocess.run([sys.executable, "-c", HOST_FUNCTION], capture_output=True, text=True, timeout=100)
    assert "came back" in done.stdout, done.stderr


def test_a_graph_of_torch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not (torch.cuda.is_available() and normkit.cuda_available()):
        pytest.skip("no GPU, or PyTorch or normkit without CUDA")
    op = OPERATIONS["instance"]
    arrays = [torch.from_numpy(a).cuda() for a in data(op, rng)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(op, *arrays)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(op, *arrays)
    for _ in range(3):
        fresh = [torch.from_numpy(a).cuda() for a in data(op, rng)]
        for to, source in zip(arrays, fresh, strict=True):
            to.copy_(source)
        graph.replay()
        wanted = call(op, *fresh)
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_on_a_stream_of_its_own(dtype, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not (torch.cuda.is_available() and normkit.cuda_available()):
        pytest.skip("no GPU, or PyTorch or normkit without CUDA")
    x = torch.from_numpy(uniform(rng, SHAPE)).to(getattr(torch, dtype)).cuda()
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        late.copy_(x)
        y = normkit.instance_norm(late)
        assert not stream.query(), "the call waited"
    stream.synchronize()
    assert (y.dtype, y.device) == (x.dtype, x.device)
    assert torch.equal(y, normkit.instance_norm(x))


def test_jax(rng):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    if not normkit.cuda_available() or jax.default_backend() != "gpu":
        pytest.skip("no GPU, or jax or normkit without CUDA")
    pytest.importorskip("cupy", reason="CuPy is not installed")
    values = uniform(rng, SHAPE)
    x = jax.numpy.asarray(values) + 0  # still under way
    y = normkit.instance_norm(x)
    assert type(y) is type(x)
    f = OPERATIONS["instance"].reference(values)
    assert bounds.excess(np.asarray(y).reshape(f.y.shape), f.y, bounds.y(f, values.dtype)) <= 1


# ---- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["instance", "over-channels", "layer-outer"])
def test_arrays_of_a_device_that_is_not_current(op, gpu, rng):
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    op = OPERATIONS[op]
    values = data(op, rng)
    with gpu.cuda.Device(0):
        wanted = bits_of(gpu, call(op, *on_device(gpu, *values)))
    with gpu.cuda.Device(1):
        arrays = on_device(gpu, *values)
    with gpu.cuda.Device(0):
        found = call(op, *arrays)
        assert gpu.cuda.runtime.getDevice() == 0
        assert {a.device.id for a in found if a is not None} == {1}
    with gpu.cuda.Device(1):
        assert bits_of(gpu, found) == wanted
        # CuPy made it current with a runtime of its own: ours has to know.
        found = call(op, *arrays)
        assert gpu.cuda.runtime.getDevice() == 1
        assert {a.device.id for a in found if a is not None} == {1}
        assert bits_of(gpu, found) == wanted


# ---- large -------------------------------------------------------------------------------------------------------


def needs(gpu, gigabytes):
    """Skips on a device that is too small. Where others hold too much of a large one, somebody has to know."""
    gpu.get_default_memory_pool().free_all_blocks()
    free, whole = gpu.cuda.Device().mem_info
    wanted = int(gigabytes * 1.1 * 2**30)
    if whole < wanted:
        pytest.skip(f"{wanted >> 30} GB of memory wanted, the device has {whole >> 30}")
    assert free >= wanted, f"{wanted >> 30} GB of memory wanted, {free >> 30} of {whole >> 30} are free"


LARGE = {  # more than 2^31 elements, and the statistics that are looked at
    "rows": ((4194305, 512), {"axis": -1}, [0, 2097151, 4194304]),
    "channels-last": ((2, (1 << 25) // 2 + 1, 65), {"axis": 1}, [0, 1]),
    "first-axis": ((5, 430_000_003), {"axis": 0}, None),
}


@pytest.mark.parametrize("case", LARGE)
def test_more_elements_than_an_int_counts(case, gpu):
    """float16. Statistics at both ends have the bits that they have alone."""
    shape, options, rows = LARGE[case]
    needs(gpu, 8 * np.prod(shape) * 2 / 2**30)
    generator = gpu.random.default_rng(0)
    x, dy = (generator.standard_normal(shape, dtype=gpu.float32).astype(gpu.float16) for _ in range(2))
    y, mean, rstd = normkit.normalize(x, **options, return_stats=True)
    dx, *_ = normkit.normalize_backward(dy, x, mean, rstd, **options, need=("dx",))
    for k in [slice(n, n + 1) for n in rows] if rows else [slice(0, 7), slice(-7, None)]:
        part = (k,) if rows else (slice(None), k)
        stats = (mean[k], rstd[k])
        alone = normkit.normalize(gpu.ascontiguousarray(x[part]), **options)
        assert bool((y[part] == alone).all())
        pieces = (gpu.ascontiguousarray(a[part]) for a in (dy, x))
        alone, *_ = normkit.normalize_backward(*pieces, *map(gpu.ascontiguousarray, stats), **options, need=("dx",))
        assert bool((dx[part] == alone).all())


def test_one_statistic_of_more_elements_than_an_int_counts(gpu):
    """The statistic is compared with moments that CuPy finds in doubles, piece by piece."""
    shape = (1, (1 << 31) + 9)
    needs(gpu, 5 * 2 * shape[1] / 2**30)
    x = gpu.random.default_rng(0).standard_normal(shape, dtype=gpu.float32).astype(gpu.float16)
    y, mean, rstd = normkit.normalize(x, axis=1, return_stats=True)
    pieces = [x[0, k : k + (1 << 27)].astype(gpu.float64) for k in range(0, shape[1], 1 << 27)]
    average = sum(float(p.sum()) for p in pieces) / shape[1]
    var = sum(float(((p - average) ** 2).sum()) for p in pieces) / shape[1]
    f = statistics_of(mean=average, var=np.float64(var), members=shape[1], farthest=12.0, largest=12.0)
    assert abs(float(mean[0]) - average) <= bounds.mean(f, np.float16)
    assert abs(float(rstd[0]) - f.rstd) <= bounds.rstd(f, np.float16)
    for part in (slice(0, 1000), slice(-1000, None)):
        apart = normkit.apply(gpu.ascontiguousarray(x[:, part]), mean, rstd, axis=1)
        # The call itself has the statistics in double, what it returns of them is rounded.
        assert float(gpu.abs(y[:, part].astype(gpu.float64) - apart).max()) <= 2 * bounds.UNIT["float16"] * 8


def test_memory_is_given_back(gpu, rng):
    op = OPERATIONS["instance"]
    arrays = on_device(gpu, *data(op, rng))
    pool = gpu.get_default_memory_pool()
    call(op, *arrays)
    before = pool.used_bytes()
    for _ in range(50):
        call(op, *arrays)
    assert pool.used_bytes() == before
