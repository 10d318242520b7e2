"""Arrays of a GPU, as far as that goes without one: modules that look like their libraries, with host memory behind.

In a build with NORMKIT_CUDA=shim the kernels run on that memory, and results are compared with those of the references,
or with calls on NumPy arrays, which run the same kernels there. Other builds are asked for their errors.
"""

import ctypes
import inspect
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, lay, uniform
from fake_gpu import FakeCupy, FakeOther, FakeTorch, Memory
from launches import recorded
from mirrored import PHASES
from normkit import _core, _cuda
from reference import OPERATIONS, REGISTRY

SHIM = _core.cuda == "shim"
on_shim = pytest.mark.skipif(not SHIM, reason="only in a build with NORMKIT_CUDA=shim do kernels run on host memory")
SHAPE = (3, 4, 5, 7)


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    memory.ran = []

    def entered(array, device, enter=_cuda.entered):
        """The memory of a call; a call that the core runs by itself ends with its __exit__()."""
        found = enter(array, device)
        memory.__enter__()
        found.__exit__ = lambda *error: (memory.__exit__(), type(found).__exit__(found, *error))
        memory.ran.append((device, found.stream))
        return found

    monkeypatch.setattr(_cuda, "entered", entered)
    yield memory
    assert memory.untouched(), "something was written past the end"


@pytest.fixture
def cupy(monkeypatch, memory):
    fake = FakeCupy(memory)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    yield fake
    assert fake.current == 7, "the current device was not put back"


@pytest.fixture
def torch(monkeypatch, memory):
    fake = FakeTorch(memory)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "cupy", None)  # cannot be imported
    return fake


@pytest.fixture
def other(cupy, memory):
    """A library of which nothing is known: CuPy does for it what it has to."""
    return FakeOther(memory)


@pytest.fixture
def real_torch(monkeypatch):
    """PyTorch itself, which is told that its memory is that of a GPU."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda _: (2, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(sys.modules, "cupy", None)

    def array(values, device=0):
        low, high = np.lib.array_utils.byte_bounds(values)
        storage = torch.empty(high - low, dtype=torch.uint8).view(getattr(torch, values.dtype.name))
        made = storage.as_strided(values.shape, [step // values.itemsize for step in values.strides])
        made[...] = torch.from_numpy(values.astype(np.float64, order="C")).to(made.dtype)
        return made

    def get(tensor):
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"]).copy(order="K")
        return tensor.numpy().copy(order="K")

    return SimpleNamespace(array=array, get=get, Array=torch.Tensor)


LIBRARIES = ["cupy", "torch", "other", "real_torch"]


@pytest.fixture(params=LIBRARIES)
def library(request):
    return request.getfixturevalue(request.param)


def same(library, found, wanted):
    """Asserts that results have the bits that are wanted, in the same places."""
    if not isinstance(wanted, tuple):
        found, wanted = (found,), (wanted,)
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        if w is None:
            assert f is None
            continue
        assert type(f) is library.Array
        f, w = library.get(f), np.array(w, order="K", copy=True)
        assert (f.shape, f.dtype) == (w.shape, w.dtype)
        assert all(a == b for a, b, extent in zip(f.strides, w.strides, w.shape, strict=True) if extent > 1)
        assert f.tobytes() == w.tobytes()


# ---- CuPy against the references ---------------------------------------------------------------------------------


@on_shim
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("op", ["instance", "group", "batch", "layer"])
def test_forward_and_backward_match_the_reference(op, dtype, layout, cupy, rng):
    op = OPERATIONS[op]
    x, dy = (lay(uniform(rng, SHAPE, dtype), layout) for _ in range(2))
    weight, bias = rng.standard_normal((2, *op.weight_shape(SHAPE, "channel"))).astype(np.float32)
    arrays = [cupy.array(a) for a in (x, weight, bias)]
    y, mean, rstd = op.statistics(arrays[0], weight=arrays[1], bias=arrays[2])
    f = op.reference(x, weight, bias)
    assert (type(y), y.dtype, y.shape) == (cupy.ndarray, x.dtype, x.shape)
    assert y.strides == x.strides
    assert bounds.excess(cupy.get(y), f.y.reshape(SHAPE), bounds.y(f, x.dtype).reshape(SHAPE)) <= 1
    dx, dweight, dbias = op.backward(cupy.array(dy), arrays[0], mean, rstd, arrays[1])
    assert (dx.dtype, dx.shape, dx.strides) == (x.dtype, x.shape, x.strides)
    mean, rstd = cupy.get(mean), cupy.get(rstd)
    b = op.reference_backward(dy, x, mean, rstd, weight)
    assert bounds.excess(cupy.get(dx), b.dx.reshape(SHAPE), bounds.dx(b, x.dtype).reshape(SHAPE)) <= 1
    same(cupy, (dweight, dbias), op.backward(dy, x, mean, rstd, weight)[1:])


# ---- every library against NumPy ---------------------------------------------------------------------------------


@on_shim
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "step"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_calls_have_the_bits_of_numpy(op, layout, library, rng):
    """What fits, and what is packed first: axes that are no neighbors, weights of other axes, a residual that lies
    otherwise."""
    x, dy, dresidual = (lay(uniform(rng, SHAPE), layout) for _ in range(3))
    residual, where = lay(uniform(rng, SHAPE), "fortran"), rng.random((SHAPE[0], 1, *SHAPE[2:])) < 0.7
    weight, bias = rng.standard_normal((2, *op.weight_shape(SHAPE, "channel"))).astype(np.float32)
    options = {"activation": "silu", "weight_offset": 1.0}
    slopes = rng.standard_normal(op.weight_shape(SHAPE, "channel")).astype(np.float32)

    def calls(of):
        a, w, b = of(x), of(weight), of(bias)
        y, mean, rstd = op.statistics(a, weight=w, bias=b)
        yield from (y, mean, rstd)
        yield from op.backward(of(dy), a, mean, rstd, w)
        yield from op.backward(of(dy), a, mean, rstd)
        masked = {"where": of(where), "bias": b, "dresidual": of(dresidual)}
        yield from op.backward(of(dy), a, mean, rstd, w, **masked, **options)
        extra = {"return_residual": True, "residual": of(residual), "where": masked["where"]}
        yield from op.forward(a, weight=w, bias=b, **extra, **options)
        yield op.forward(a, weight=w, out_dtype="float64")
        for own in (slopes, slopes.reshape(-1)[:1]):
            prelu = {"activation": ("prelu", of(own))}
            yield op.forward(a, w, b, **prelu)
            yield from op.backward(of(dy), a, mean, rstd, w, bias=b, need=("dx", "dslopes"), **prelu)

    wanted = tuple(calls(lambda a: a))
    for _ in range(2):  # calls that are planned, and calls whose plans are known
        same(library, tuple(calls(library.array)), wanted)


@on_shim
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, library, rng):
    op, dtype = OPERATIONS["over-channels"], DTYPES[dtype]
    x, dy, residual = (lay(uniform(rng, SHAPE, dtype), "channels-last") for _ in range(3))
    weight = uniform(rng, SHAPE[-1:], dtype)

    def calls(of):
        a = of(x)
        y, mean, rstd = op.statistics(a, weight=of(weight), residual=of(np.ascontiguousarray(residual)))
        yield from (y, mean, rstd)
        yield from op.backward(of(dy), a, mean, rstd, of(weight))
        yield normkit.instance_norm(a, out_dtype=dtype.name)

    wanted = tuple(calls(lambda a: a))
    for _ in range(2):
        same(library, tuple(calls(library.array)), wanted)


@on_shim
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "step"])
def test_phases_have_the_bits_of_numpy(layout, dtype, library, rng):
    """All phases but merges and rstd have them: the library computes these, with a rounding here or there."""
    x, dy = (lay(uniform(rng, SHAPE, dtype, offset=1e3), layout) for _ in range(2))
    where = rng.random((5, 1)) < 0.6
    weight, bias = rng.standard_normal((2, 4, 1, 1)).astype(np.float32)
    rstd, count = rng.uniform(0.5, 2, SHAPE[:2]), np.full(SHAPE[:2], 35)

    def phases(of):
        a, w = of(x), of(weight)
        m = normkit.moments(a, axis=(2, 3), where=of(where))
        options = {"axis": (2, 3), "bias": of(bias), "activation": "gelu"}
        sums = normkit.backward_sums(of(dy), a, m.mean, of(rstd), w, where=of(where), **options)
        yield from (m.count, m.mean, m.m2, m.mean_low, sums)
        for mean in (m.mean, m):
            yield normkit.apply(a, mean, of(rstd), w, of(bias), axis=(2, 3))
        for members in (35, of(count)):
            yield normkit.apply_backward(of(dy), a, m.mean, of(rstd), sums, members, w, where=of(where), **options)

    same(library, tuple(phases(library.array)), tuple(phases(lambda a: a)))


@on_shim
@pytest.mark.parametrize(("dtype", "offset"), [("float32", 3.0), ("float64", 1e8)])
def test_moments_merge(dtype, offset, library, rng):
    x = uniform(rng, SHAPE, dtype, offset=offset)
    where = np.ones(SHAPE, bool)
    where[0] = False  # statistics without members

    def moments(of):
        parts = [(slice(None),) * 3 + (slice(k, k + 3),) for k in (0, 3, 6)]
        return normkit.merge([normkit.moments(of(x[p]), axis=(2, 3), where=of(where[p])) for p in parts])

    found, wanted = moments(library.array), moments(lambda a: a)
    for name, get in {
        **{name: lambda m, name=name: getattr(m, name) for name in ("count", "mean", "m2")},
        "var": lambda m: m.var(),
        "unbiased": lambda m: m.var(correction=1),
        "none left": lambda m: m.var(correction=35),
        "std": lambda m: m.std(1),
        "rstd": lambda m: m.rstd(1e-3),
    }.items():
        assert type(get(found)) is library.Array
        of_library, of_numpy = library.get(get(found)), get(wanted)
        assert of_library.dtype == np.float64
        # Two merges and a quotient, each a few roundings of numbers that are no larger than the largest.
        np.testing.assert_allclose(of_library, of_numpy, rtol=32 * bounds.DOUBLE, atol=0, err_msg=name)
    (mean, low), (its_mean, its_low) = ((m.mean, m.mean_low) for m in (found, wanted))
    # As exact as the spread, which is 1, far from zero too.
    off = (library.get(mean) - its_mean) + (library.get(low) - its_low)
    assert np.abs(off).max() <= 32 * bounds.DOUBLE * (1 if dtype == "float64" else offset)
    assert (its_low != 0).any() == (dtype == "float64")
    constant = normkit.moments(library.array(np.full((2, 3), 0.5, np.float32)), axis=1)
    assert (library.get(constant.rstd(0.0)) == 0).all()
    with pytest.raises(ValueError, match="eps is -1"):
        found.rstd(-1)
    if type(found._numbers) is not np.ndarray:
        with pytest.raises(TypeError, match=r"other has arrays of .*, expected numpy: all parts share a library"):
            wanted.merge(found)


@on_shim
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("op", ["instance", "group-last", "batch", "rms", "over-channels"])
def test_double_backward_matches_numpy(op, dtype, library, rng):
    """Both run the kernels of a GPU here, to the same bits; what these give is tested in test_double_backward."""
    op = OPERATIONS[op]
    # With channels last kernels cannot take a weight along the last axis, and the library adds up its gradient.
    layout = "contiguous" if op is OPERATIONS["rms"] else "channels-last"
    ddx, dy, x = (lay(uniform(rng, SHAPE, dtype), layout) for _ in range(3))
    params = [np.asarray(uniform(rng, op.weight_shape(SHAPE, "channel"), bounds.compute(dtype))) for _ in range(3)]

    def calls(of):
        a, w = of(x), of(params[0])
        _, mean, rstd = op.statistics(a)
        dds = of(ddx), *map(of, params[1:])
        yield from op.double_backward(dds, of(dy), a, mean, rstd, w, weight_offset=1.0)
        yield from op.double_backward((of(ddx), None, None), of(dy), a, mean, rstd, use_input_stats=False)

    for found, wanted in zip(calls(library.array), calls(lambda a: a), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            assert type(found) is library.Array
            found = library.get(found)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
            assert found.tobytes() == wanted.tobytes()


@on_shim
def test_adaptive_has_the_bits_of_numpy(library, rng):
    content, dy, style = uniform(rng, SHAPE), uniform(rng, SHAPE), uniform(rng, (3, 4, 4, 6))

    def calls(of):
        y, mean, rstd = normkit.adaptive_instance_norm(of(content), of(style), return_stats=True)
        yield from (y, mean, rstd)
        yield from normkit.adaptive_instance_norm_backward(of(dy), of(content), of(style), mean, rstd)

    for found, wanted in zip(calls(library.array), calls(lambda a: a), strict=True):
        assert type(found) is library.Array
        # Deviations of style are of the library: a rounding of doubles, which may be one of the result's dtype.
        np.testing.assert_allclose(library.get(found), wanted, rtol=4 * bounds.UNIT["float32"], atol=1e-7)


@on_shim
def test_outputs_in_place(library, rng):
    x = rng.standard_normal((4, 3, 50)).astype(np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    out, *running = map(library.array, (np.zeros_like(x), mean, var))
    names = "running_mean", "running_var"
    options = {"training": True, "out": out, **dict(zip(names, running, strict=True))}
    assert normkit.batch_norm(library.array(x), **options) is out
    want = normkit.batch_norm(x, training=True, running_mean=mean, running_var=var)
    same(library, (out, *running), (want, mean, var))


@on_shim
def test_empty_arrays_have_zero_gradients(library):
    x = library.array(np.empty((0, 3, 4), np.float32))
    statistics = library.array(np.empty((0, 3), np.float32))
    dx, dweight, dbias = normkit.instance_norm_backward(x, x, statistics, statistics)
    assert tuple(dx.shape) == (0, 3, 4)
    assert not library.get(dweight).any()
    assert not library.get(dbias).any()


# ---- streams, allocations, devices -------------------------------------------------------------------------------


@on_shim
@pytest.mark.parametrize("name", ["cupy", "torch", "real_torch"])
def test_where_a_plan_is_known_nothing_is_judged_anew(name, request, monkeypatch, rng):
    library = request.getfixturevalue(name)
    x, weight = uniform(rng, (2, 3, 5, 8)), uniform(rng, (3,))
    a, w = library.array(x), library.array(weight)
    _, mean, rstd = normkit.instance_norm(a, w, return_stats=True)
    wanted = normkit.instance_norm(x, weight, return_stats=True)
    normkit.instance_norm_backward(a, a, mean, rstd, w)
    monkeypatch.setattr(library.Array, "__dlpack_device__", None)
    same(library, normkit.instance_norm(a, w, return_stats=True), wanted)
    dx, dweight, dbias = normkit.instance_norm_backward(a, a, mean, rstd, w)
    same(library, (dx, dweight, dbias), normkit.instance_norm_backward(x, x, *wanted[1:], weight))


@on_shim
@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_a_known_plan_is_not_taken_for_others(name, request, rng):
    """Arrays of another device or library, and an output that overlaps: each is judged as if it came first."""
    library = request.getfixturevalue(name)
    values, weight = uniform(rng, (4, 3, 8)), np.ones(3, np.float32)
    x, w = library.array(values), library.array(weight)
    out = normkit.instance_norm(x[:2], w)
    assert normkit.instance_norm(x[:2], w, out=out) is out
    with pytest.raises(ValueError, match="out overlaps x"):
        normkit.instance_norm(x[:2], w, out=x[1:3])
    with pytest.raises(TypeError, match="weight is on device 1, expected device 0"):
        normkit.instance_norm(x[:2], library.array(weight, device=1))
    with pytest.raises(TypeError, match="weight is a numpy array"):
        normkit.instance_norm(x[:2], weight)
    y = normkit.instance_norm(values[:2], weight)
    same(library, normkit.instance_norm(x[:2], w), y)
    same(library, normkit.instance_norm(x[:2], w, out=x[:2]), y)


@on_shim
@pytest.mark.parametrize("name", ["cupy", "torch"])
def test_one_stream_one_workspace_and_the_outputs(name, request, rng):
    library = request.getfixturevalue(name)
    x = library.array(rng.standard_normal((2, 3, 40)).astype(np.float32))
    normkit.instance_norm(x)
    assert library.streams == [0]
    assert library.allocations == 1  # y: a block that has all of its statistics wants no workspace
    tall = library.array(rng.standard_normal((2, 300, 4)).astype(np.float32))
    assert normkit.instance_norm(tall, channel_axis=2).shape == tall.shape
    assert library.allocations == 3
    out = library.array(np.zeros((2, 3, 40), np.float32))
    assert normkit.instance_norm(x, out=out) is out
    assert library.allocations == 3
    assert library.streams == [0, 0, 0]


@on_shim
@pytest.mark.parametrize(("stream", "asked"), [(0, 1), (1, 1), (2, 2), (0x7F00, 0x7F00)])
def test_other_libraries_are_asked_for_the_stream_that_works(stream, asked, other, cupy, memory, rng):
    """The legacy default stream, whose handle is 0, is 1 to DLPack. What comes back is ordered by CuPy."""
    cupy.stream = stream
    normkit.instance_norm(other.array(uniform(rng, (2, 3, 40))), other.array(np.ones(3, np.float32)))
    assert other.streams == [asked, asked]
    assert memory.ran == [(0, stream)]
    assert cupy.exported == [other.STREAM]


@on_shim
@pytest.mark.parametrize("name", ["cupy", "torch", "other"])
def test_no_launch_keeps_other_threads_waiting(name, request, rng):
    """A host function of Python on the stream may want the interpreter lock, and a full queue wait for it."""
    library = request.getfixturevalue(name)
    x = library.array(uniform(rng, SHAPE))

    def launches():
        with recorded(ctypes.pythonapi.PyGILState_Check) as found:
            _, mean, rstd = normkit.instance_norm(x, return_stats=True)
            normkit.instance_norm_backward(x, x, mean, rstd)
            normkit.moments(x, axis=(2, 3))
        return found

    for found in (launches(), launches()):  # planned, and with plans that are known
        assert len(found) >= 3
        assert not any(launch.answer for launch in found)


@on_shim
def test_launches_know_of_the_lock(rng):
    """A small call on NumPy keeps the lock, and the record says so: else no test here would see who holds it."""
    with recorded(ctypes.pythonapi.PyGILState_Check) as found:
        normkit.instance_norm(uniform(rng, SHAPE))
    assert [launch.answer for launch in found] == [1]


@pytest.mark.skipif(_core.cuda != "", reason="a build with CUDA")
def test_a_build_without_cuda_says_so(library):
    assert not normkit.cuda_available()
    said = rf"^this build of normkit has no CUDA \({re.escape(_core.no_cuda)}\): install it with NORMKIT_CUDA=on, .*$"
    with pytest.raises(RuntimeError, match=said):
        normkit.instance_norm(library.array(np.ones((2, 3, 4), np.float32)))


@pytest.mark.skipif(_core.cuda in ("", "shim"), reason="a build without CUDA")
@pytest.mark.skipif(normkit.cuda_available(), reason="there is a GPU")
def test_a_build_with_cuda_says_that_there_is_no_gpu(library):
    said = rf"^this build of normkit has {_core.cuda}, but there is no device, no driver or one that is older .*$"
    with pytest.raises(RuntimeError, match=said):
        normkit.instance_norm(library.array(np.ones((2, 3, 4), np.float32)))


@pytest.mark.parametrize("name", ["cupy", "torch", "other"])
def test_arrays_of_one_call_share_a_library_and_a_device(name, request):
    library = request.getfixturevalue(name)
    x, ones = library.array(np.ones((2, 3, 4), np.float32)), np.ones(3, np.float32)
    with pytest.raises(TypeError, match=f"weight is a numpy array, expected {name}, as x is"):
        normkit.instance_norm(x, ones)
    with pytest.raises(TypeError, match="weight is on device 1, expected device 0, that of x"):
        normkit.instance_norm(x, library.array(ones, device=1))
    expected = "a CuPy array, expected a NumPy" if name == "cupy" else "on DLPack device type 2, expected the CPU"
    with pytest.raises(TypeError, match=f"weight is {expected}"):
        normkit.instance_norm(np.ones((2, 3, 4), np.float32), library.array(ones))
    with pytest.raises(TypeError, match="dy is a NoneType, expected a NumPy array or an object with __dlpack__"):
        normkit.instance_norm_backward(None, x, library.array(ones), library.array(ones))


def test_a_tensor_on_the_cpu_beside_others(torch):
    x, weight = (torch.array(np.ones(shape, np.float32)) for shape in ((2, 3, 4), (3,)))
    on_cpu = {"__dlpack_device__": lambda _: (1, 0), "is_cuda": False}
    weight.__class__ = type("Tensor", (type(weight),), {"__module__": "torch", **on_cpu})
    with pytest.raises(TypeError, match="weight is on the CPU, expected device 0, that of x"):
        normkit.instance_norm(x, weight)


def test_a_tensor_that_requires_grad_is_refused(torch):
    x = torch.array(np.ones((2, 3, 4), np.float32))
    if SHIM:  # its plan is known
        normkit.instance_norm(x)
    x.requires_grad = True
    with pytest.raises(TypeError, match=r"x requires grad.*pass x.detach\(\)"):
        normkit.instance_norm(x)


@on_shim
def test_a_tensor_that_is_negated_lazily(torch, rng):
    """The memory of such a tensor holds other numbers than the tensor."""
    values = uniform(rng, (2, 3, 4))
    x, out = torch.array(values), torch.array(values)
    normkit.instance_norm(x)
    x.negated = True
    same(torch, normkit.instance_norm(x), normkit.instance_norm(-values))
    out.negated = True
    with pytest.raises(TypeError, match="out is negated lazily, expected a tensor whose memory is its value"):
        normkit.instance_norm(x, out=out)


def test_a_dtype_that_numpy_does_not_know(torch):
    x = torch.array(np.ones((2, 3, 4), np.uint8))
    x.dtype = "torch.float8_e4m3fn"
    with pytest.raises(TypeError, match=r"x has dtype .*float8_e4m3fn"):
        normkit.instance_norm(x)


def test_other_libraries_want_cupy(other, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match="arrays of other on a GPU want CuPy, which makes their outputs: install"):
        normkit.instance_norm(other.array(np.ones((2, 3, 4), np.float32)))


def test_errors_come_before_anything_is_allocated(cupy):
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(3,\)"):
        normkit.instance_norm(cupy.array(np.ones((2, 3, 4), np.float32)), cupy.array(np.ones(4, np.float32)))
    assert cupy.allocations == 0


def test_libraries_are_never_imported_first():
    code = """
import sys, numpy, normkit
normkit.instance_norm(numpy.ones((1, 1, 2)))
assert not {"cupy", "torch", "jax"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_of_the_device_is_closed(memory):
    """A host that looks into memory of the device ends at once: else no test here would see that it does."""
    code = "from fake_gpu import FakeCupy, Memory; import numpy; FakeCupy(Memory()).array(numpy.ones(3))._numpy.sum()"
    done = subprocess.run([sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True)
    assert done.returncode < 0


# ---- arrays that do not lie on their elements --------------------------------------------------------------------

FUNCTIONS = [*normkit.functional.__all__, *PHASES]
FUNCTIONS.remove("merge")  # of moments
KEPT = {"batch": (4,), "group": (3, 2), "layer": (3, 4, 5), "rms": (3, 4, 5)}  # by the first word of a name
OWN = {"layer": (7,), "rms": (7,)}
FAULTS = [("cupy", "address"), ("cupy", "strides"), ("torch", "address"), ("other", "address")]  # others count elements


KINDS_OF_ARRAYS = ("Array", "Mask", "Statistics")  # as signatures call them


def operands(function, rng):
    """An array for each argument that is one."""
    family = function.partition("_")[0]
    by_axis = family in ("normalize", "moments", "apply", "backward", "l2")
    kept, own = KEPT.get(family, SHAPE[:2]), OWN.get(family, (4, 1, 1) if by_axis else (4,))

    def values(name):
        if name == "where":
            return rng.random(SHAPE) < 0.9
        if name in ("weight", "bias", "ddweight", "ddbias", "running_mean", "running_var"):
            return rng.uniform(1, 2, own).astype(np.float32)
        if name in ("mean", "rstd", "rnorm"):
            return rng.uniform(1, 2, kept).astype(np.float32)
        return {
            "sums": lambda: rng.standard_normal((*kept, 3)),
            "count": lambda: np.full(kept, 35),
        }.get(name, lambda: uniform(rng, SHAPE))()

    parameters = inspect.signature(getattr(normkit, function)).parameters.values()
    arrays = {p.name: values(p.name) for p in parameters if p.annotation.split(" |")[0] in KINDS_OF_ARRAYS}
    options = {"axis": (2, 3) if by_axis else -1, "num_groups": 2}
    return arrays, {name: value for name, value in options.items() if name in {p.name for p in parameters}}


def displaced(values, fault):
    """The values a byte beside where they could lie, or with strides that have a byte too much."""
    size = values.itemsize
    steps = [step + step // size if fault == "strides" else step for step in values.strides]
    buffer = np.zeros(4 * values.nbytes + 128, np.uint8)
    made = np.ndarray(values.shape, values.dtype, buffer, -buffer.ctypes.data % 64 + (fault == "address"), steps)
    made[...] = values
    return made


def refused(name, array, fault):
    """An error about this array, before anything is launched."""
    size, dtype = array.itemsize, array.dtype.name
    found = {
        "address": rf"is at address 0x[0-9a-f]+1, expected a multiple of {size}",
        "strides": rf"has strides \([0-9]+,[0-9, ]*\) in bytes, expected multiples of {size}",
    }[fault]
    return pytest.raises(ValueError, match=rf"^{name} {found}: a GPU has {dtype} nowhere else$")


@pytest.mark.parametrize(("name", "fault"), FAULTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_does_not_lie_on_its_elements_is_refused(function, name, fault, request, rng):
    """Each argument of each function, also where the plan of the call is known. A GPU that reads such an array answers
    this process no more."""
    library, call = request.getfixturevalue(name), getattr(normkit, function)
    arrays, options = operands(function, rng)
    assert {"x", "content"} & {*arrays}
    given = {name: library.array(a) for name, a in arrays.items()}
    if SHIM:
        call(**given, **options)
    for wrong, a in arrays.items():
        if a.itemsize == 1:
            continue
        misplaced = {**given, wrong: library.array(displaced(a, fault))}
        with recorded() if SHIM else nullcontext() as launches, refused(wrong, a, fault):
            call(**misplaced, **options)
        assert not launches


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "uint16", "int16"])
@pytest.mark.parametrize("name", ["cupy", "torch", "other"])
def test_elements_have_the_size_of_their_dtype(name, dtype, request):
    library, dtype = request.getfixturevalue(name), np.dtype(DTYPES.get(dtype, dtype))
    x = np.ones(SHAPE, dtype)
    with refused("x", x, "address"):
        normkit.instance_norm(library.array(displaced(x, "address")))


@pytest.mark.parametrize("name", ["cupy", "torch", "other"])
def test_numbers_of_members_lie_on_their_elements_too(name, request, rng):
    """A count may have a dtype that kernels do not read."""
    library = request.getfixturevalue(name)
    arrays, options = operands("apply_backward", rng)
    count = np.full(SHAPE[:2], 35, np.int64)
    given = {name: library.array(a) for name, a in arrays.items()}
    with refused("count", count, "address"):
        normkit.apply_backward(**{**given, "count": library.array(displaced(count, "address"))}, **options)
    if SHIM:
        wanted = library.get(normkit.apply_backward(**given, **options))
        found = normkit.apply_backward(**{**given, "count": library.array(count)}, **options)
        assert library.get(found).tobytes() == wanted.tobytes()


def test_moments_are_made_of_what_lies_on_its_elements(cupy):
    parts = {name: np.ones(3, dtype) for name, dtype in {"count": "int32", "mean": "float32", "m2": "float64"}.items()}
    for wrong, a in parts.items():
        given = {name: cupy.array(part) for name, part in parts.items()}
        with refused(wrong, a, "address"):
            normkit.Moments(**{**given, wrong: cupy.array(displaced(a, "address"))})


@on_shim
def test_what_lies_on_its_elements_is_taken(library, rng):
    """Arrays may lie on any element beside whole vectors, and a mask anywhere."""
    x, where = uniform(rng, (3, 1, 50)), rng.random((3, 1, 50)) < 0.8
    wanted = normkit.instance_norm(x, where=where)
    buffer = np.zeros(3 * 50 * 4 + 128, np.uint8)
    for step in range(4, 64, 4):
        beside = np.ndarray(x.shape, x.dtype, buffer, -buffer.ctypes.data % 64 + step, x.strides)
        beside[...] = x
        same(library, normkit.instance_norm(library.array(beside), where=library.array(where)), wanted)
    same(library, normkit.instance_norm(library.array(x), where=library.array(displaced(where, "address"))), wanted)


@on_shim
def test_strides_that_are_not_used_may_be_anything(cupy, rng):
    x = uniform(rng, (3, 1, 50))
    seen = np.lib.stride_tricks.as_strided(x, x.shape, (x.strides[0], 7, x.strides[2]))
    assert cupy.get(normkit.instance_norm(cupy.array(seen))).tobytes() == normkit.instance_norm(x).tobytes()
    for fault in ("address", "strides"):
        empty = cupy.array(displaced(np.empty((0, 3, 4), np.float32), fault))
        assert normkit.instance_norm(empty).shape == (0, 3, 4)


@on_shim
@pytest.mark.parametrize(("plant", "code"), [("none", 0), ("misaligned_load", 70)])
def test_a_kernel_that_reads_off_an_element_ends_the_process(plant, code):
    """The shim ends such a process, as a GPU would: else no test of values would see it, as a CPU reads anywhere."""
    program = (
        "import normkit, numpy; normkit.instance_norm(numpy.ones(2 * 400 + 1, numpy.float32)[1:].reshape(2, 1, 400))"
    )
    env = {**os.environ, "NORMKIT_SHIM_PLANT": plant}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    expected = r"shim: .*:[0-9]+: address 0x[0-9a-f]+, expected a multiple of 16: kernel RunsForward, block 0, .*"
    assert re.fullmatch(expected if code else "", done.stderr.strip())
