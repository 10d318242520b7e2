"""Arrays of other libraries: the same library, dtype and layout back, the same bits as on NumPy."""

import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import bounds
import normkit
import numpy as np
import pytest
from cases import bits, lay, uniform
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


class Own(Producer):
    """A library with a namespace, and with the arithmetic that callers do on sums."""

    @staticmethod
    def __array_namespace__(**options):
        return Own

    @staticmethod
    def from_dlpack(x):
        array = np.from_dlpack(x)
        return Own(array if array.flags.writeable else array.copy())  # what NumPy 2.0 imports it does not export

    def __add__(self, other):
        return Own(self.array + other.array)


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
        "x requires grad, expected a tensor that does not: use normkit.torch, whose functions record gradients, "
        "or pass x.detach()"
    )
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError) as caught:
        normkit.instance_norm(x.detach(), weight)
    assert str(caught.value) == (
        "weight requires grad, expected a tensor that does not: use normkit.torch, whose functions record gradients, "
        "or pass weight.detach()"
    )


def test_a_tensor_that_has_a_tangent_is_refused(torch):
    ad = torch.autograd.forward_ad
    x, weight = torch.randn(SHAPE), torch.randn(3)
    y = normkit.instance_norm(x, weight)  # as the call that is known does not refuse it
    with ad.dual_level():
        assert bool((normkit.instance_norm(x, weight) == y).all())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own modules, on their way
            duals = {"x": ad.make_dual(x, x), "weight": ad.make_dual(weight, weight)}
        for name, dual in duals.items():
            with pytest.raises(TypeError) as caught:
                normkit.instance_norm(**{"x": x, "weight": weight, name: dual})
            assert str(caught.value) == (
                f"{name} has a tangent, expected a tensor that has none: normkit has no derivatives in forward mode; "
                f"pass torch.autograd.forward_ad.unpack_dual({name}).primal"
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
    with pytest.raises(ValueError, match="out is read-only"):
        normkit.instance_norm(x, out=x)


@pytest.mark.parametrize("x64", [False, True])
def test_phases_of_jax(x64, rng):
    """Far from zero they have the bits that they have of NumPy's arrays, whether JAX has float64 or not."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    dy, values = uniform(rng, (3, 400)), uniform(rng, (3, 400), offset=1e6)
    expected = normkit.moments(values, axis=1)
    sums = normkit.backward_sums(dy, values, expected, expected.rstd(), axis=1)
    with jax.enable_x64(x64):
        x, dx = jax.numpy.asarray(values), jax.numpy.asarray(dy)
        m = normkit.moments(x[:, :150], axis=1).merge(normkit.moments(x[:, 150:], axis=1))
        assert (np.abs(np.asarray(m.mean) - expected.mean) <= 1e-6).all()
        m = normkit.moments(x, axis=1)
        kind = type(x) if x64 else np.ndarray
        held = {name: getattr(m, name) for name in ("count", "mean", "m2", "mean_low")}
        for name, numbers in held.items():
            assert isinstance(numbers, kind)
            assert np.asarray(numbers).tobytes() == getattr(expected, name).tobytes()
        for other in (normkit.Moments(**held), pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)):
            assert other == m
            y = normkit.apply(x, other, other.rstd(), axis=1)
            assert isinstance(y, type(x))
            assert np.asarray(y).tobytes() == normkit.normalize(values, axis=1).tobytes()
        found = normkit.backward_sums(dx, x, m, m.rstd(), axis=1)
        assert np.asarray(found).tobytes() == sums.tobytes()
        dx = normkit.apply_backward(dx, x, m, m.rstd(), found, m.count, axis=1)
        assert isinstance(dx, type(x))
        many = normkit.Moments(2**24 + 1, x[:, 0], x[:, 0])
        assert (np.asarray(many.count) == 2**24 + 1).all()
        with pytest.raises(TypeError, match=r"^weight is a numpy array, expected jax: all arrays"):
            normkit.apply(x, m, m.rstd(), np.ones(400, np.float32), axis=1)
        with pytest.raises(TypeError, match=r"^mean is a numpy array, expected jax: all arrays"):
            normkit.normalize_backward(x, x, expected.mean, expected.rstd(), axis=1)
    whole = normkit.apply_backward(dy, values, expected, expected.rstd(), sums, expected.count, axis=1)
    assert np.asarray(dx).tobytes() == whole.tobytes()


def test_a_library_with_a_namespace_gets_its_own_arrays(rng):
    values = uniform(rng, SHAPE)
    y = normkit.instance_norm(Own(values))
    assert type(y) is Own
    assert y.array.tobytes() == normkit.instance_norm(values).tobytes()


def arrays_of(library):
    """The functions that take an array from NumPy to the library, and back."""
    if library == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        return torch.from_numpy, torch.Tensor.numpy
    return Own, lambda result: result.array


def same(found, expected, to_numpy):
    """Asserts that results are arrays of the library with the bits that are expected, in the same places."""
    if not isinstance(expected, tuple):
        found, expected = (found,), (expected,)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        f = None if f is None else to_numpy(f)
        assert (f is None) == (e is None)
        if e is not None:
            assert (f.shape, f.dtype, np.ascontiguousarray(f).tobytes()) == (e.shape, e.dtype, bits(e))


LIBRARIES = ["torch", "own"]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_options_are_those_of_numpy(library, layout, rng):
    of, to_numpy = arrays_of(library)
    x, dy, residual, dresidual = (lay(uniform(rng, SHAPE), layout) for _ in range(4))
    weight, bias = rng.standard_normal((2, 3)).astype(np.float32)
    where = rng.random((2, 1, 5, 7)) < 0.6
    options = {"activation": "silu", "weight_offset": 1.0}
    arrays = {"residual": residual, "where": where}
    given = {name: of(a) for name, a in arrays.items()}
    results = normkit.instance_norm(x, weight, bias, return_stats=True, return_residual=True, **arrays, **options)
    found = normkit.instance_norm(
        of(x), of(weight), of(bias), return_stats=True, return_residual=True, **given, **options
    )
    same(found, results, to_numpy)
    _, mean, rstd, s = results
    arrays = {"bias": bias, "where": where, "dresidual": dresidual}
    gradients = normkit.instance_norm_backward(dy, s, mean, rstd, weight, **arrays, **options)
    given = {name: of(a) for name, a in arrays.items()}
    found = normkit.instance_norm_backward(of(dy), of(s), of(mean), of(rstd), of(weight), **given, **options)
    same(found, gradients, to_numpy)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_slopes_are_those_of_numpy(library, layout, rng):
    of, to_numpy = arrays_of(library)
    x, dy = (lay(uniform(rng, SHAPE), layout) for _ in range(2))
    slopes = rng.standard_normal((5, 3)).astype(np.float32)
    mean, rstd = normkit.instance_norm(x, return_stats=True)[1:]

    def results(of, slopes):
        options = {"activation": ("prelu", slopes)}
        yield normkit.instance_norm(of(x), **options)
        yield normkit.adaptive_instance_norm(of(x), of(dy), **options)
        yield from normkit.instance_norm_backward(
            of(dy), of(x), of(mean), of(rstd), need=("dx", "dweight", "dbias", "dslopes"), **options
        )

    for each in (*slopes, slopes[:3, 0], slopes[1, :1]):
        same(tuple(results(of, of(each))), tuple(results(lambda a: a, each)), to_numpy)
    same(tuple(results(of, 0.25)), tuple(results(lambda a: a, 0.25)), to_numpy)


@pytest.mark.parametrize("library", LIBRARIES)
def test_slopes_of_another_library_are_refused(library, rng):
    of, _ = arrays_of(library)
    x, slopes = uniform(rng, SHAPE), np.ones(3, np.float32)
    for array, other in ((of(x), slopes), (x, of(slopes))):
        for call in (normkit.instance_norm, lambda a, **options: normkit.adaptive_instance_norm(a, a, **options)):
            with pytest.raises(TypeError, match=r"^slopes is a .* all arrays of a call share a library$"):
                call(array, activation=("prelu", other))


@pytest.mark.parametrize("library", LIBRARIES)
def test_adaptive_is_that_of_numpy(library, rng):
    of, to_numpy = arrays_of(library)
    content, dy, style = uniform(rng, SHAPE), uniform(rng, SHAPE), uniform(rng, (2, 3, 4, 6))
    where = rng.random(SHAPE) < 0.6
    results = normkit.adaptive_instance_norm(content, style, where=where, return_stats=True)
    found = normkit.adaptive_instance_norm(of(content), of(style), where=of(where), return_stats=True)
    same(found, results, to_numpy)
    _, mean, rstd = results
    gradients = normkit.adaptive_instance_norm_backward(dy, content, style, mean, rstd, where=where)
    views = (of(a) for a in (dy, content, style, mean, rstd))
    same(normkit.adaptive_instance_norm_backward(*views, where=of(where)), gradients, to_numpy)
    out = of(np.full(SHAPE, np.nan, np.float32))
    assert normkit.adaptive_instance_norm(of(content), of(style), where=of(where), out=out) is out
    same(out, results[0], to_numpy)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "step"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_phases_are_those_of_numpy(library, layout, dtype, rng):
    of, to_numpy = arrays_of(library)
    x, dy = (lay(uniform(rng, SHAPE, dtype, offset=1e3), layout) for _ in range(2))
    where = rng.random((5, 1)) < 0.6
    weight, bias = rng.standard_normal((2, 3, 1, 1)).astype(np.float32)

    def phases(of):
        w, b = of(weight), of(bias)
        halves = [(of(dy[:, :, :, part]), of(x[:, :, :, part])) for part in (slice(0, 3), slice(3, 7))]
        moments = [normkit.moments(part, axis=(2, 3), where=of(where)) for _, part in halves]
        m = normkit.merge(moments)
        mean, rstd = m.mean, m.rstd()
        options = {"axis": (2, 3), "bias": b, "activation": "gelu"}
        first, second = (normkit.backward_sums(*half, mean, rstd, w, where=of(where), **options) for half in halves)
        sums = first + second
        for d, part in halves:
            for given in (mean, m):
                yield normkit.apply(part, given, rstd, w, b, axis=(2, 3))
            yield normkit.apply_backward(d, part, mean, rstd, sums, m.count, w, where=of(where), **options)
        yield from (m.count, mean, m.m2, m.mean_low, m.var(), m.var(correction=1), m.std(correction=1), rstd)
        yield from (first, second)

    same(tuple(phases(of)), tuple(phases(lambda a: a)), to_numpy)


ONES = np.ones(SHAPE, np.float32)
STATISTICS = np.ones((2, 3), np.float32)
MIXED = {
    "where": (normkit.instance_norm, (ONES,)),
    "residual": (normkit.instance_norm, (ONES,)),
    "bias": (normkit.instance_norm_backward, (ONES, ONES, STATISTICS, STATISTICS)),
    "dresidual": (normkit.instance_norm_backward, (ONES, ONES, STATISTICS, STATISTICS)),
    "style": (normkit.adaptive_instance_norm, (ONES,)),
    "mean": (normkit.adaptive_instance_norm_backward, (ONES, ONES, ONES)),
    "rstd": (partial(normkit.apply, axis=(2, 3)), (ONES, STATISTICS)),
    "count": (partial(normkit.apply_backward, axis=(2, 3)), (ONES, ONES, STATISTICS, STATISTICS, np.ones((2, 3, 3)))),
    "sums": (partial(normkit.apply_backward, axis=(2, 3), count=1), (ONES, ONES, STATISTICS, STATISTICS)),
}


@pytest.mark.parametrize("name", MIXED)
def test_options_of_another_library(name):
    """The argument, its library and that of x."""
    call, arrays = MIXED[name]
    rest = {"rstd": STATISTICS} if name == "mean" else {}
    own = type(Own(ONES)).__module__.partition(".")[0]
    with pytest.raises(TypeError) as caught:
        call(*arrays, **{name: Own(STATISTICS)}, **rest)
    assert str(caught.value) == f"{name} is a {own} array, expected numpy: all arrays of a call share a library"


def test_moments_of_another_library():
    with pytest.raises(TypeError) as caught:
        normkit.moments(Own(ONES), axis=1, where=ONES > 0)
    assert str(caught.value).startswith("where is a numpy array, expected ")
