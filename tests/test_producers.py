"""What producers of DLPack may export, and what they must not: refused in words, never a crash, and nothing is kept.

Each test is of a kind of fault that some library's users have met.
"""

import gc
import sys
import types

import fuzz_producers
import normkit
import numpy as np
import pytest
from cases import bits, uniform
from hostile import Producer, of_library
from normkit import _memory
from normkit._memory import views_of

SHAPE = (2, 3, 5)


def x(dtype="float32"):
    return np.arange(30, dtype=dtype).reshape(SHAPE)


def given_back(producer):
    gc.collect()
    return producer.deleted == producer.exported


RIGHT = {
    "versioned": {},
    "unversioned": {"versioned": False},
    "no strides": {"strides": None},
    "no strides, unversioned": {"strides": None, "versioned": False},
    "read-only": {"flags": 1},
    "a newer minor version": {"flags": 1 << 40},
}


@pytest.mark.parametrize("how", RIGHT)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "uint8", "int16"])
def test_what_is_right_is_read(how, dtype):
    producer = Producer(x(dtype), **RIGHT[how])
    assert bits(normkit.instance_norm(producer)) == bits(normkit.instance_norm(x(dtype)))
    assert given_back(producer)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_python_sees_what_is_exported(dtype):
    seen = views_of(x=Producer(x("int8").astype(dtype)))[0]["x"]
    assert seen.dtype == dtype
    assert (seen == x("int8").astype(dtype)).all()


def test_an_offset_in_bytes():
    values = np.concatenate([np.full(4, 99, np.float32), x().ravel()])
    producer = Producer(values, shape=SHAPE, strides=(15, 5, 1), byte_offset=16)
    assert bits(normkit.instance_norm(producer)) == bits(normkit.instance_norm(x()))


@pytest.mark.parametrize("dtype", ["f8", "f4", "i8"])
def test_a_count_without_axes(dtype, rng):
    dy, x = uniform(rng, (2, 6, 5))
    m = normkit.moments(x, axis=1)
    mean, rstd = m.mean, m.rstd()
    sums = normkit.backward_sums(dy, x, mean, rstd, axis=1)
    arrays = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, "sums": sums}
    found = normkit.apply_backward(
        **{name: Producer(a) for name, a in arrays.items()}, count=Producer(np.array(5, dtype)), axis=1
    )
    for count in (5, np.array(5, dtype)):
        assert bits(found) == bits(normkit.apply_backward(**arrays, count=count, axis=1))


def test_a_mask():
    where = x() > 3
    y = normkit.instance_norm(x(), where=where)
    assert bits(normkit.instance_norm(Producer(x()), where=Producer(where))) == bits(y)


FIELDS = "expected extents and strides that memory can have"
WRONG = {
    "65 axes": ({"shape": (1,) * 65, "strides": None}, ValueError, "x has 65 axes, expected at most 64"),
    "1000 axes": ({"shape": (1,) * 1000, "strides": None}, ValueError, "x exports what cannot be read, expected a new"),
    "axes less than none": ({"ndim": -1}, ValueError, "x exports what cannot be read, expected a new capsule"),
    "no memory": ({"data": None}, ValueError, "x has no memory, expected an array that holds its elements"),
    "an extent less than none": ({"shape": (2, -3, 5)}, ValueError, rf"x has shape \(2, -3, 5\), {FIELDS}"),
    "a huge extent": ({"shape": (2, 3, 2**62)}, ValueError, FIELDS),
    "a huge stride": ({"strides": (15, 2**61, 1)}, ValueError, FIELDS),
    "the hugest stride": ({"strides": (15, -(2**63), 1)}, ValueError, FIELDS),
    "lanes": ({"lanes": 4}, TypeError, "x has a DLPack type with code 2 and 32 bits"),
    "128 bits": ({"bits": 128}, TypeError, "x has dtype float128, expected float32"),
    "255 bits": ({"bits": 255}, TypeError, "x has a DLPack type with code 2 and 255 bits"),
    "no bits": ({"bits": 0}, TypeError, "x has a DLPack type with code 2 and 0 bits|x has dtype float0"),
    "float8": ({"code": 7, "bits": 8}, TypeError, "x has a DLPack type with code 7 and 8 bits"),
    "an opaque handle": ({"code": 3}, TypeError, "x has a DLPack type with code 3"),
    "booleans of 32 bits": ({"code": 6}, TypeError, "x has a DLPack type with code 6 and 32 bits"),
    "complex": ({"code": 5}, TypeError, "x has dtype complex32"),
    "DLPack 2": ({"major": 2}, TypeError, "x speaks DLPack 2, expected DLPack 1"),
    "a capsule that is used": ({"name": b"used_dltensor_versioned"}, ValueError, "x exports what cannot be read"),
    "a capsule of something else": ({"name": b"else"}, ValueError, "x exports what cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused(what):
    how, kind, message = WRONG[what]
    with pytest.raises(kind, match=f"^{message}|{message}$"):
        normkit.instance_norm(Producer(x(), **how))


@pytest.mark.parametrize("export", [3, None, object()])
def test_no_capsule(export):
    class Odd(Producer):
        def __dlpack__(self, **_):
            return export

    with pytest.raises(ValueError, match="x exports what cannot be read"):
        normkit.instance_norm(Odd(x()))


def test_an_output_that_is_read_only():
    out = Producer(np.zeros_like(x()), flags=1)
    with pytest.raises(ValueError, match="out is read-only, expected a writable array"):
        normkit.instance_norm(Producer(x()), out=out)
    assert not out.values.any()


def test_an_output_is_written():
    out = Producer(np.zeros_like(x()))
    assert normkit.instance_norm(Producer(x()), out=out) is out
    assert bits(out.values) == bits(normkit.instance_norm(x()))
    assert given_back(out)


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_arrays_that_never_change_are_not_written(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].core = types.SimpleNamespace(Tracer=int)

    Frozen = of_library(name)  # noqa: N806

    class Derived(Frozen):
        pass

    for kind in (Frozen, Derived):
        out, mean, var = kind(np.zeros_like(x())), kind(np.zeros(3, np.float32)), kind(np.ones(3, np.float32))
        with pytest.raises(ValueError, match="out is read-only"):
            normkit.instance_norm(kind(x()), out=out)
        with pytest.raises(ValueError, match="running_mean is read-only"):
            normkit.instance_norm(kind(x()), running_mean=mean, running_var=var)
        with pytest.raises(ValueError, match="out is read-only"):
            normkit.adaptive_instance_norm(kind(x()), kind(x()), out=out)
        assert not out.values.any()
        assert not mean.values.any()
        assert (var.values == 1).all()


def test_a_tracer_of_jax(monkeypatch):
    class Tracer:
        __module__ = "jax"

        def __dlpack__(self, **_):
            raise AssertionError("not asked")

        def __dlpack_device__(self):
            return 1, 0

    module = types.ModuleType("jax")
    module.core = types.SimpleNamespace(Tracer=Tracer)
    monkeypatch.setitem(sys.modules, "jax", module)

    class DynamicJaxprTracer(Tracer):
        pass

    with pytest.raises(TypeError, match="x is a DynamicJaxprTracer of JAX, expected an array that holds values: use"):
        normkit.instance_norm(DynamicJaxprTracer())


# ---- subclasses --------------------------------------------------------------------------------------------------


class Units(np.ndarray):
    """An array of NumPy, with a module that is none of NumPy's."""

    __module__ = "astropy"


def test_a_subclass_of_an_array_of_numpy():
    values = x().view(Units)
    y, mean, rstd = normkit.instance_norm(values, np.ones(3, np.float32).view(Units), return_stats=True)
    assert {type(a) for a in (y, mean, rstd)} == {np.ndarray}
    assert bits(y) == bits(normkit.instance_norm(x(), np.ones(3, np.float32)))
    out = np.zeros_like(x()).view(Units)
    assert normkit.instance_norm(values, out=out) is out


def test_a_subclass_belongs_to_the_library_of_its_base():
    class Derived(Producer):
        __module__ = "monai"

    weight = np.ones(3, np.float32)
    normkit.instance_norm(Derived(x()), Producer(weight))
    normkit.instance_norm(Producer(x()), Derived(weight))


# ---- outputs that share memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [lambda a: a, Producer], ids=["numpy", "producer"])
def test_no_two_outputs_share_memory(of):
    both = np.full(4, 9.0, np.float32)
    for mean, var in ((both[:3], both[:3]), (both[:3], both[1:]), (both[2::-1], both[1:])):
        with pytest.raises(ValueError, match=r"^running_var overlaps running_mean, expected memory apart$"):
            normkit.instance_norm(of(x()), running_mean=of(mean), running_var=of(var))
        with pytest.raises(ValueError, match=r"^running_var overlaps running_mean, expected memory apart$"):
            normkit.batch_norm(of(x()), running_mean=of(mean), running_var=of(var), training=True)
    assert (both == 9).all()
    buffer = np.full(33, 9.0, np.float32)
    with pytest.raises(ValueError, match=r"^out overlaps running_var, expected memory apart$"):
        normkit.instance_norm(
            of(x()), out=of(buffer[:30].reshape(SHAPE)), running_mean=of(both[:3]), running_var=of(buffer[29:32])
        )
    assert (buffer == 9).all()
    pairs = np.array([[0, 1], [0, 1], [0, 1]], np.float32)  # one beside the other, but apart
    y = normkit.instance_norm(of(x()), running_mean=of(pairs[:, 0]), running_var=of(pairs[:, 1]))
    assert bits(y) == bits(normkit.instance_norm(x()))
    assert (pairs != [0, 1]).all()
    normkit.instance_norm(of(x()), running_mean=of(both[:3]), running_var=of(both[:3]), use_input_stats=False)


# ---- weight_offset without a weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("shape", ["channel", "conditional", "pixel"])
def test_an_offset_of_a_weight_that_is_not_there(shape, layout, rng):
    """An absent weight stays 1, in the backward as in the forward: of the parameters only bias has a part in dx."""
    values, dy = (np.asarray(uniform(rng, (2, 3, 5)), order=layout) for _ in range(2))
    bias = uniform(rng, {"channel": (3,), "conditional": (2, 3), "pixel": (2, 3, 5)}[shape])
    _, mean, rstd = normkit.instance_norm(values, return_stats=True)
    options = {"bias": bias, "activation": "silu"}
    plain = normkit.instance_norm_backward(dy, values, mean, rstd, **options)
    moved = normkit.instance_norm_backward(dy, values, mean, rstd, weight_offset=1.0, **options)
    ones = normkit.instance_norm_backward(dy, values, mean, rstd, np.zeros_like(bias), weight_offset=1.0, **options)
    assert [bits(a) for a in moved] == [bits(a) for a in plain]
    assert np.abs(moved[0] - ones[0]).max() <= 1e-5


# ---- PyTorch -----------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def test_axes_without_end(torch):
    for ndim in (65, 80, 1000):
        with pytest.raises((ValueError, RuntimeError)):
            normkit.layer_norm(torch.empty([1] * ndim))
    with pytest.raises(ValueError, match="x has 64 axes, expected at most 63"):
        normkit.group_norm(torch.zeros([1] * 64), 1)
    assert normkit.layer_norm(torch.zeros([1] * 64)).shape == (1,) * 64


def test_lazy_bits_are_resolved(torch):
    lazy = torch.fft.fft(torch.randn(1, 2, 64)).conj().imag
    assert lazy.is_neg()
    like = torch.view_as_real(torch.randn(1, 2, 64, dtype=torch.complex64))[..., 1]
    assert like.stride() == lazy.stride()
    normkit.instance_norm(like)  # a plan that must not be found for what is like it but for its bit
    for _ in range(2):
        assert torch.equal(normkit.instance_norm(lazy), normkit.instance_norm(lazy.clone().resolve_neg()))
    with pytest.raises(TypeError, match=r"^out is negated lazily, expected a tensor whose memory is its value$"):
        normkit.instance_norm(torch.zeros_like(lazy), out=lazy)


def test_what_is_no_memory_is_refused(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = torch.randn(2, 3, 5)

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), options=None):
            raise AssertionError("not asked")

    with FakeTensorMode():
        fake = torch.ones(2, 3, 5)
    tensors = {
        "fake": fake,
        "meta": torch.ones(2, 3, 5, device="meta"),
        "sparse": plain.to_sparse(),
        "zero": torch._efficientzerotensor((2, 3, 5)),
        "wrapper": torch.Tensor._make_subclass(Wrapper, plain),
    }
    normkit.instance_norm(plain)  # a plan that must not be found for what is like it but for its memory
    normkit.instance_norm(plain, residual=plain)
    for tensor in tensors.values():
        with pytest.raises(TypeError, match=r"x is .*, expected"):
            normkit.instance_norm(tensor)
        with pytest.raises(TypeError, match=r"residual is .*, expected"):
            normkit.instance_norm(plain, residual=tensor)
    for transform in (torch.func.vmap, torch.func.functionalize, lambda f: torch.func.grad(lambda t: f(t).sum())):
        with pytest.raises(TypeError, match=r"x .*, expected a (plain dense )?tensor"):
            transform(normkit.instance_norm)(torch.stack([plain, plain]) if transform is torch.func.vmap else plain)


COMPILED = {
    "instance_norm": lambda x: normkit.instance_norm(x),
    "normalize": lambda x: [normkit.normalize(x * 2, axis=-1), x][0],
    "moments": lambda x: normkit.moments(x, axis=-1).mean,
    "apply": lambda x: normkit.apply(x, x[..., 0], x[..., 0], axis=-1),
    "backward": lambda x: normkit.rms_norm_backward(x, x, x[..., 0])[0],
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_does_not_look_into_functions(torch, name):
    """They have code to show, which is not what they do: a graph has to break there, or to say what is to be called."""
    x, call = torch.randn(2, 3, 5), COMPILED[name]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="eager")(x), call(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use normkit\.torch"):
        torch.compile(call, backend="eager", fullgraph=True)(x)


def test_what_stands_for_a_tensor_is_refused(torch):
    with pytest.raises(TypeError, match=r"^x is a Proxy, expected .*: use normkit.torch"):
        torch.fx.symbolic_trace(lambda x: normkit.instance_norm(x))


def test_a_parameter_where_grad_mode_is_off(torch):
    values, weight = torch.randn(2, 3, 5), torch.nn.Parameter(torch.ones(3))
    normkit.instance_norm(values, weight.detach())  # a plan that is not to be found where gradients are recorded
    with pytest.raises(TypeError, match="weight requires grad"):
        normkit.instance_norm(values, weight)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = normkit.instance_norm(values, weight)
        assert torch.equal(y, normkit.instance_norm(values, weight.detach()))


VIEWS = {
    "dense": lambda t: t,
    "step": lambda t: t[:, :, ::2],
    "swap": lambda t: t.transpose(2, 3),
    "expand": lambda t: t[:, :, :1].expand(-1, -1, 6, -1),
    "channels-last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "uint8"])
def test_tensors_are_read_where_they_lie(torch, dtype, view):
    """By a new plan, and by the one that the second call finds: as NumPy's arrays over the same memory."""
    weight = torch.randn(3)
    for seed in range(2):
        torch.manual_seed(seed)
        x = VIEWS[view]((40 * torch.rand(2, 3, 6, 10)).to(getattr(torch, dtype)))
        array = views_of(x=x)[0]["x"]
        assert (array.ctypes.data, array.shape) == (x.data_ptr(), tuple(x.shape)) or not x.numel()
        assert array.strides == tuple(s * x.element_size() for s in x.stride())
        expected = [normkit.instance_norm(array, weight.numpy()), *normkit.group_norm(array, 3, return_stats=True)]
        found = [normkit.instance_norm(x, weight), *normkit.group_norm(x, 3, return_stats=True)]
        for y, like in zip(found, expected, strict=True):
            assert type(y) is torch.Tensor
            values = views_of(x=y)[0]["x"]
            assert (values.dtype, values.strides) == (like.dtype, like.strides)
            assert values.tobytes() == like.tobytes()


def test_plain_tensors_are_read_without_python(torch, monkeypatch):
    judged, readable = [], _memory.readable
    monkeypatch.setattr(_memory, "readable", lambda *given: judged.append(given[0]) or readable(*given))
    lazy = torch.fft.fft(torch.randn(1, 2, 64)).conj().imag
    normkit.instance_norm(lazy)
    assert judged == ["x"]  # what is watched is what judges
    for dtype in (torch.float32, torch.float32, torch.float64):
        normkit.instance_norm(torch.randn(2, 3, 7, dtype=dtype))
    assert judged == ["x"]


def test_a_plan_is_kept_for_the_layout_that_was_read(torch):
    """Whatever happens to a tensor while it is asked: here it becomes smaller."""
    from torch.overrides import TorchFunctionMode

    class Shrinking(TorchFunctionMode):
        def __init__(self, x, after):
            super().__init__()
            self.x, self.left = x, after

        def __torch_function__(self, function, types, arguments=(), options=None):
            self.left -= 1
            if self.left == 0:
                with torch._C.DisableTorchFunction():
                    self.x.resize_(2, 3, 5)
            return function(*arguments, **(options or {}))

    for after in range(1, 12):
        x = torch.randn(2, 3, 50 + after)
        with Shrinking(x, after):
            normkit.instance_norm(x)
        for _ in range(2):
            assert normkit.instance_norm(torch.randn(2, 3, 50 + after)).shape == (2, 3, 50 + after)
            assert normkit.instance_norm(torch.randn(2, 3, 5)).shape == (2, 3, 5)


def test_results_keep_memory_as_long_as_they_live(torch):
    normkit.clear_cache()
    x = torch.randn(64, 64, 64)
    y = [normkit.instance_norm(x) for _ in range(3)][-1]
    kept, held = y.clone(), normkit.cache_size()
    others = [normkit.instance_norm(x + 1) for _ in range(3)]
    assert len({t.data_ptr() for t in [y, *others]}) == 4
    assert torch.equal(y, kept)
    del y, others
    assert normkit.cache_size() >= held + x.nbytes


def test_a_subclass_of_a_tensor(torch):
    class MetaTensor(torch.Tensor):
        __module__ = "monai"

    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(2, 3, 5).to(dtype)
        y = normkit.instance_norm(values.as_subclass(MetaTensor), torch.ones(3))
        assert isinstance(y, torch.Tensor)
        assert y.dtype == dtype
        assert torch.equal(y, normkit.instance_norm(values, torch.ones(3)))
        out = torch.zeros_like(values).as_subclass(MetaTensor)
        assert normkit.instance_norm(values, out=out) is out
        assert torch.equal(torch.Tensor(out.float()), y.float())


# ---- at random ---------------------------------------------------------------------------------------------------


def test_calls_at_random():
    """A few seconds of fuzz_producers.py, which is to run for minutes with the address sanitizer."""
    calls, taken = fuzz_producers.run(0, 2.0, least=500)
    assert taken > calls / 10
