"""Arrays of other libraries: the same library, dtype and layout back, the same bits as on NumPy."""

import gc
import weakref

import bounds
import normkit
import numpy as np
import pytest
from cases import uniform
from reference import OPERATIONS

SHAPE = (2, 3, 5, 7)
FLOATS = ["float32", "float64", "float16", "bfloat16"]
INSTANCE = OPERATIONS["instance"]


class Producer:
    """The least that speaks DLPack: nothing but the protocol."""

    def __init__(self, array):
        self.array, self.exports = array, 0

    def __dlpack__(self, **options):
        self.exports += 1
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_in_torch_out(torch, dtype, memory, rng):
    values = uniform(rng, SHAPE)
    x = torch.from_numpy(values).to(getattr(torch, dtype))
    dy = torch.from_numpy(uniform(rng, SHAPE)).to(x.dtype)
    if memory == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    weight, bias = torch.randn(2, 3)
    y, mean, rstd = normkit.instance_norm(x, weight, bias, return_stats=True)
    dx, dweight, dbias = normkit.instance_norm_backward(dy, x, mean, rstd, weight)
    assert all(isinstance(t, torch.Tensor) for t in (y, mean, rstd, dx, dweight, dbias))
    assert (y.dtype, y.shape, y.stride(), y.device) == (x.dtype, x.shape, x.stride(), x.device)
    assert (dx.dtype, dx.stride()) == (x.dtype, x.stride())
    assert dweight.dtype == weight.dtype
    if dtype != "bfloat16":
        expected = normkit.instance_norm(x.numpy(), weight.numpy(), bias.numpy())
        assert y.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_those_of_torch(torch, dtype, rng):
    """Two correct kernels: no farther apart than both are from the truth."""
    x = torch.from_numpy(uniform(rng, SHAPE, dtype, offset=2.0))
    weight, bias = torch.randn(2, 3, dtype=x.dtype)
    ours = [torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)]
    theirs = [t.clone() for t in ours]
    y = normkit.instance_norm(x, weight, bias, running_mean=ours[0], running_var=ours[1], momentum=0.3)
    z = torch.nn.functional.instance_norm(x, theirs[0], theirs[1], weight, bias, momentum=0.3)
    truth = INSTANCE.reference(x.numpy(), weight.numpy(), bias.numpy())
    assert bounds.excess(y.numpy(), z.numpy(), 2 * bounds.y(truth, x.numpy().dtype)) <= 1
    unit = 16 * bounds.unit(x.numpy().dtype) * (1 + np.abs(truth.x).max())  # sums of 35, some rounding
    assert all(np.abs((a - b).numpy()).max() <= unit for a, b in zip(ours, theirs, strict=True))

    frozen = normkit.instance_norm(x, weight, bias, running_mean=ours[0], running_var=ours[1], use_input_stats=False)
    like = torch.nn.functional.instance_norm(x, ours[0], ours[1], weight, bias, use_input_stats=False)
    assert np.abs((frozen - like).numpy()).max() <= unit * 4


def test_gradients_are_those_of_torch(torch, rng):
    x = torch.from_numpy(uniform(rng, SHAPE, np.float64)).requires_grad_()
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(SHAPE, dtype=torch.float64)
    torch.nn.functional.instance_norm(x, None, None, weight, bias).backward(dy)
    plain, gamma = x.detach(), weight.detach()
    _, mean, rstd = normkit.instance_norm(plain, gamma, return_stats=True)
    found = normkit.instance_norm_backward(dy, plain, mean, rstd, gamma)
    for ours, theirs in zip(found, (x.grad, weight.grad, bias.grad), strict=True):
        scale = 100 * 2.0**-53 * float(dy.abs().sum()) * float(gamma.abs().max() + 1)  # 35 terms and 16 operations
        assert float((ours - theirs).abs().max()) <= scale


def test_a_tensor_that_requires_grad_is_refused(torch):
    x = torch.ones(SHAPE, requires_grad=True)
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(x)
    assert str(caught.value) == (
        "x requires grad, expected a tensor that does not: normkit records no gradients, pass x.detach()"
    )
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(x.detach(), weight)
    assert str(caught.value) == (
        "weight requires grad, expected a tensor that does not: normkit records no gradients, pass weight.detach()"
    )


def test_libraries_do_not_mix(torch):
    x = np.ones(SHAPE, np.float32)
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(x, torch.ones(3))
    assert str(caught.value) == "weight is a torch array, expected numpy: all arrays of a call share a library"
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(torch.ones(SHAPE), np.ones(3, np.float32))
    assert str(caught.value) == "weight is a numpy array, expected torch: all arrays of a call share a library"
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(x, out=torch.ones(SHAPE))
    assert str(caught.value) == "out is a torch array, expected numpy: all arrays of a call share a library"


def test_torch_out_and_in_place(torch, rng):
    x = torch.from_numpy(uniform(rng, SHAPE))
    expected = normkit.instance_norm(x)
    out = torch.full(SHAPE, float("nan"))
    assert normkit.instance_norm(x, out=out) is out
    assert out.equal(expected)
    assert normkit.instance_norm(x, out=x) is x
    assert x.equal(expected)


def test_torch_views(torch, rng):
    whole = torch.from_numpy(uniform(rng, (4, 6, 10, 14)))
    for x in (whole[::2, 1:4], whole.permute(3, 1, 0, 2), whole[:, :, ::3, 1::2], whole[:1].expand(3, -1, -1, -1)):
        y = normkit.instance_norm(x)
        assert y.contiguous().numpy().tobytes() == np.ascontiguousarray(normkit.instance_norm(x.numpy())).tobytes()


def test_torch_on_another_device_is_refused(torch):
    """A device without memory to read; torch itself says so."""
    with pytest.raises((TypeError, ValueError), match="device"):
        normkit.instance_norm(torch.ones(SHAPE, device="meta"))


def test_anything_that_speaks_dlpack(rng):
    values = uniform(rng, SHAPE)
    x = Producer(values)
    y = normkit.instance_norm(x)
    assert x.exports >= 1
    assert type(y) is np.ndarray  # of a library without a namespace: there is no other array to give back
    assert y.tobytes() == normkit.instance_norm(values).tobytes()


def test_a_producer_is_let_go(rng):
    values = uniform(rng, SHAPE)
    x = Producer(values)
    gone = weakref.ref(x)
    normkit.instance_norm(x)
    del x
    gc.collect()
    assert gone() is None
    normkit.instance_norm(values, out=values)  # nobody holds the memory, so it can be written


def test_a_producer_that_raises_is_heard():
    class Broken(Producer):
        def __dlpack__(self, **options):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match=r"^out of order$"):
        normkit.instance_norm(Broken(np.ones(SHAPE, np.float32)))


def test_jax(rng):
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    values = uniform(rng, SHAPE)
    x = jnp.asarray(values)
    y = normkit.instance_norm(x)
    assert type(y) is type(x)
    assert np.asarray(y).tobytes() == normkit.instance_norm(values).tobytes()
    with pytest.raises(TypeError):
        normkit.instance_norm(x, out=x)


def test_a_library_with_a_namespace_gets_its_own_arrays(rng):
    class Own(Producer):
        @staticmethod
        def __array_namespace__(**options):
            return Own

        @staticmethod
        def from_dlpack(x):
            return Own(np.from_dlpack(x))

    values = uniform(rng, SHAPE)
    y = normkit.instance_norm(Own(values))
    assert type(y) is Own
    assert y.array.tobytes() == normkit.instance_norm(values).tobytes()
