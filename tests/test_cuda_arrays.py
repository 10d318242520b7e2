"""CuPy arrays, as far as that goes without a GPU: a module that looks like CuPy, with host memory behind its arrays.

In a build with NORMKIT_CUDA=shim the kernels run on that memory, and results are compared with those of the references.
Other builds are asked for their errors.
"""

import subprocess
import sys

import bounds
import normkit
import numpy as np
import pytest
from fake_cupy import FakeCupy
from normkit import _core
from reference import OPERATIONS

SHIM = _core.cuda == "shim"
on_shim = pytest.mark.skipif(not SHIM, reason="only in a build with NORMKIT_CUDA=shim do kernels run on host memory")


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    yield fake
    assert fake.current == 7, "the current device was not put back"
    assert all(memory.untouched() for memory in fake.allocated), "something was written past the end"


LAYOUTS = {"contiguous": lambda x: x, "channels-last": lambda x: np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)}


@on_shim
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("op", ["instance", "group", "batch", "layer"])
def test_forward_and_backward_match_the_reference(op, dtype, layout, cupy, rng):
    op, shape = OPERATIONS[op], (3, 4, 5, 7)
    x, dy = (LAYOUTS[layout](a.astype(dtype)) for a in rng.standard_normal((2, *shape)))
    weight, bias = rng.standard_normal((2, *op.weight_shape(shape, "channel"))).astype(np.float32)
    arrays = [cupy.array(a) for a in (x, weight, bias)]
    y, mean, rstd = op.statistics(arrays[0], weight=arrays[1], bias=arrays[2])
    f = op.reference(x, weight, bias)
    assert (type(y), y.dtype, y.shape) == (cupy.ndarray, x.dtype, x.shape)
    assert y.strides == x.strides
    assert bounds.excess(y.get(), f.y.reshape(shape), bounds.y(f, dtype).reshape(shape)) <= 1
    dx, dweight, dbias = op.backward(cupy.array(dy), arrays[0], mean, rstd, arrays[1])
    assert (dx.dtype, dx.shape, dx.strides) == (x.dtype, x.shape, x.strides)
    b = op.reference_backward(dy, x, mean.get(), rstd.get(), weight)
    assert bounds.excess(dx.get(), b.dx.reshape(shape), bounds.dx(b, dtype).reshape(shape)) <= 1
    on_cpu = op.backward(dy, x, mean.get(), rstd.get(), weight)
    for found, want in zip((dweight, dbias), on_cpu[1:], strict=True):
        np.testing.assert_array_equal(found.get(), want)  # the CPU of this build runs the same kernels


@on_shim
def test_one_stream_one_workspace_and_the_outputs(cupy, rng):
    x = cupy.array(rng.standard_normal((2, 3, 40)).astype(np.float32))
    normkit.instance_norm(x)
    assert cupy.streams == [0]
    assert len(cupy.allocated) == 2  # y and the workspace
    out = cupy.array(np.zeros((2, 3, 40), np.float32))
    assert normkit.instance_norm(x, out=out) is out
    assert len(cupy.allocated) == 3


@on_shim
def test_running_statistics_are_updated_in_place(cupy, rng):
    x = rng.standard_normal((4, 3, 50)).astype(np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    on_device = cupy.array(mean), cupy.array(var)
    normkit.batch_norm(cupy.array(x), running_mean=on_device[0], running_var=on_device[1], training=True)
    normkit.batch_norm(x, running_mean=mean, running_var=var, training=True)
    np.testing.assert_array_equal(on_device[0].get(), mean)
    np.testing.assert_array_equal(on_device[1].get(), var)


@on_shim
def test_empty_arrays_have_zero_gradients(cupy):
    x = cupy.array(np.empty((0, 3, 4), np.float32))
    statistics = cupy.array(np.empty((0, 3), np.float32))
    dx, dweight, dbias = normkit.instance_norm_backward(x, x, statistics, statistics)
    assert dx.shape == x.shape
    assert not dweight.get().any()
    assert not dbias.get().any()


@on_shim
def test_what_no_geometry_holds_is_packed_on_its_own_side(cupy, rng):
    """Axes that are no neighbors, weights of other axes, a residual that lies otherwise: the bits of calls on NumPy."""
    x, dy, residual = rng.standard_normal((3, 2, 3, 4, 5)).astype(np.float32)
    weight, bias = rng.standard_normal((3, 1, 1)).astype(np.float32), rng.standard_normal((5,)).astype(np.float32)
    residual = np.asfortranarray(residual)
    options = {"axis": (0, 2), "return_stats": True}
    want = normkit.normalize(x, weight, bias, residual=residual, **options)
    found = normkit.normalize(*map(cupy.array, (x, weight, bias)), residual=cupy.array(residual), **options)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a.get(), b)
    want_gradients = normkit.normalize_backward(dy, x, *want[1:], weight, axis=(0, 2))
    gradients = normkit.normalize_backward(*map(cupy.array, (dy, x)), *found[1:], cupy.array(weight), axis=(0, 2))
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_array_equal(a.get(), b)


@pytest.mark.skipif(_core.cuda != "", reason="a build with CUDA")
def test_a_build_without_cuda_says_so(cupy):
    assert not normkit.cuda_available()
    with pytest.raises(RuntimeError, match="this build of normkit has no CUDA: install it with NORMKIT_CUDA=on"):
        normkit.instance_norm(cupy.array(np.ones((2, 3, 4), np.float32)))


def test_arrays_of_one_call_share_a_library_and_a_device(cupy):
    x = cupy.array(np.ones((2, 3, 4), np.float32))
    with pytest.raises(TypeError, match="weight is a numpy array, expected cupy, as x is"):
        normkit.instance_norm(x, np.ones(3, np.float32))
    with pytest.raises(TypeError, match="weight is on device 1, expected 0, that of x"):
        normkit.instance_norm(x, cupy.array(np.ones(3, np.float32), device=1))
    with pytest.raises(TypeError, match="weight is a CuPy array, expected a NumPy array"):
        normkit.instance_norm(np.ones((2, 3, 4), np.float32), cupy.array(np.ones(3, np.float32)))


@pytest.mark.parametrize("call", [normkit.moments], ids=lambda f: f.__name__)
def test_what_is_not_there_for_cuda_arrays_says_so(call, cupy):
    with pytest.raises(TypeError, match=r"x is a CuPy array, expected a NumPy array.*pass x.get\(\)"):
        call(cupy.array(np.ones((2, 3, 4), np.float32)), axis=2)


def test_errors_come_before_anything_is_allocated(cupy):
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(3,\)"):
        normkit.instance_norm(cupy.array(np.ones((2, 3, 4), np.float32)), cupy.array(np.ones(4, np.float32)))
    assert not cupy.allocated


def test_cupy_is_never_imported_first():
    code = "import sys, numpy, normkit; normkit.instance_norm(numpy.ones((1, 1, 2))); assert 'cupy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
