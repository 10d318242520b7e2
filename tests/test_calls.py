"""Functions whose body is C++: what they say of themselves, and that a repeated call is like its first one."""

import copy
import doctest
import gc
import inspect
import pickle
import threading
import weakref

import normkit
import numpy as np
import pytest

FORWARD = ("instance_norm", "group_norm", "layer_norm", "rms_norm", "batch_norm", "normalize")
NAMES = (*FORWARD, *(f"{name}_backward" for name in FORWARD))


@pytest.fixture(params=NAMES)
def function(request):
    return getattr(normkit, request.param)


# ---- a function like any other -----------------------------------------------------------------------------------


def test_signature_is_that_of_the_function_in_python(function):
    python = function.__wrapped__  # signature and docstring
    assert inspect.isfunction(python)
    assert inspect.signature(function) == inspect.signature(python)
    assert len(inspect.signature(function).parameters) > 8
    assert inspect.getdoc(function) == inspect.getdoc(python) != ""
    assert inspect.isroutine(function)
    assert (function.__name__, function.__module__) == (python.__name__, "normkit.functional")
    assert repr(function) == repr(python)


def test_tools_find_its_source_and_its_arguments(function):
    """Editors and what makes documentation ask inspect."""
    python = function.__wrapped__
    assert inspect.isfunction(function)
    assert not inspect.isfunction(type(function))
    assert inspect.getsourcefile(function) == inspect.getsourcefile(python)
    assert f"\ndef {function.__name__}(" in inspect.getsource(function)
    in_module = doctest.DocTestFinder().find(normkit.functional)
    (found,) = (test for test in in_module if test.name == f"normkit.functional.{function.__name__}")
    assert found.examples
    assert found.lineno + 1 > inspect.getsourcelines(function)[1]
    assert not inspect.getclosurevars(function).nonlocals
    assert inspect.getfullargspec(function) == inspect.getfullargspec(python)
    assert inspect.signature(function, follow_wrapped=False) == inspect.signature(python)


def test_is_pickled_and_copied_as_itself(function):
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.copy(function) is copy.deepcopy(function) is function
    assert weakref.ref(function)() is function


def test_becomes_a_method():
    class Net:
        eps = 1e-3
        norm = normkit.layer_norm

    with pytest.raises(TypeError, match="x is a Net"):
        Net().norm(np.zeros((2, 2)))
    assert Net.norm is normkit.layer_norm


def test_is_collected_with_its_plans():
    def instance_norm(x, weight=None, bias=None, *, eps=1e-5, channel_axis=1):
        raise AssertionError

    x = np.ones((1, 2, 3))
    function = normkit._core.function(instance_norm, "forward", "instance", {})
    eps = float("0.125")
    assert not function(x, eps=eps).any()
    function.itself, gone = function, weakref.ref(function)
    del function, instance_norm
    gc.collect()
    assert gone() is None


def anew(function):
    """The function, which plans its call as if there had been none before."""

    def call(*args, **options):
        normkit._core.forget_plans()
        return function(*args, **options)

    return call


def test_an_output_that_has_become_read_only_is_refused():
    x = np.arange(12.0).reshape(2, 2, 3)
    out = np.empty_like(x)
    for _ in range(2):
        normkit.instance_norm(x, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        normkit.instance_norm(x, out=out)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(), "missing 1 required positional argument: 'x'"),
        (lambda f, x: f(x, x, x, x), "takes from 1 to 3 positional arguments but 4 were given"),
        (lambda f, x: f(x, scale=2), "unexpected keyword argument 'scale'"),
        (lambda f, x: f(x, x=x), "multiple values for argument 'x'"),
        (lambda f, x: f(x, x, weight=x), "multiple values for argument 'weight'"),
    ],
)
def test_wrong_arguments_are_refused_as_python_does(call, message):
    with pytest.raises(TypeError, match=message):
        call(normkit.instance_norm, np.zeros((1, 2, 3)))


def test_arguments_by_any_road():
    x, weight = np.arange(12.0).reshape(2, 2, 3), np.array([2.0, 3.0])
    expected = normkit.instance_norm(x, weight, eps=0.5).tobytes()
    eps = "".join(["e", "p", "s"])  # equal to the name of the parameter, but not the same object
    for y in (
        normkit.instance_norm(x=x, weight=weight, eps=0.5),
        normkit.instance_norm(eps=0.5, weight=weight, x=x),
        normkit.instance_norm(*(x, weight), **{eps: 0.5}),
        normkit.instance_norm(x, weight, **{eps: np.float32(0.5)}),
        normkit.instance_norm(x, weight, None, eps=0.5, out=None),
    ):
        assert y.tobytes() == expected


# ---- calls that are like others but for one thing -----------------------------------------------------------------


class Drawer:
    """Draws the arguments of a call, most of them as they mostly are; arrays lie in one buffer, over each other too."""

    def __init__(self, rng, buffer):
        self.rng, self.buffer = rng, buffer

    def one(self, usual, *others, often=0.85):
        return usual if self.rng.random() < often else others[self.rng.integers(len(others))]

    def array(self, place, shape, dtype=np.float32):
        """One of the arrays that this place of the buffer is for, mostly a dense one."""
        start = 4096 * place + self.one(0, 4, 1, 64)
        stride = self.one(1, 2)
        flat = self.buffer[start : start + 2048].view(np.dtype(self.one(dtype, "f8", "f2", ">f4", "i2")))
        dense = flat[: stride * int(np.prod(shape)) : stride].reshape(shape)
        if len(shape) > 1:
            rows = flat[: 2 * int(np.prod(shape))].reshape(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]
            dense = self.one(dense, dense[..., ::-1], dense.swapaxes(0, -1).copy().swapaxes(0, -1), rows)
        if self.rng.random() < 0.05:
            dense.flags.writeable = False
        return dense

    def maybe(self, place, shape, often=0.8, **options):
        return None if self.rng.random() < often else self.array(place, shape, **options)

    def options(self):
        return {
            "weight_offset": self.one(0.0, 1, 1.0, 10**30, 10**31, float("nan")),
            "activation": self.one(
                None,
                "relu",
                ["relu"],
                ("leaky_relu", 0.1),
                ("leaky_relu", 0.2),
                ["elu", 0.5],
                "prelu",
                ("prelu", 0.5),
                ("prelu", self.array(7, (2,))),
                ["prelu", self.array(7, (1,))],
            ),
            "where": self.one(None, self.buffer[:4].view(bool) if self.rng.random() < 0.5 else np.array([True, False])),
        }

    def forward(self):
        shape = self.one((2, 2, 4), (2, 4, 2), (2, 4), (0, 2, 4), (1, 1, 2, 4))
        x = self.array(0, shape)
        residual = self.maybe(6, shape)
        out = self.one(None, "x", "far", "near", "weight", "residual", often=0.4)
        weight, bias = self.maybe(1, (shape[1],)), self.maybe(2, (shape[1],))
        running = (None, None) if self.rng.random() < 0.8 else (self.array(4, shape[1:2]), self.array(5, shape[1:2]))
        places = {"x": x, "far": self.array(3, shape), "near": self.array(0, shape), "weight": self.array(1, shape)}
        places |= {None: None, "residual": residual}
        names = "eps", "out", "out_dtype", "return_stats", "residual", "return_residual", "momentum"
        values = (
            self.one(1e-5, 0.5, 1, 0, 10**30, np.float64(0.5), "1"), places[out],
            self.one(None, "float64", np.float32, "float32"), self.one(False, True, 1), residual,
            self.one(False, True), self.one(0.1, 0.5, None, 2),
        )  # fmt: skip
        options = dict(zip(names, values, strict=True)) | self.options()
        options |= {"running_mean": running[0], "running_var": running[1], "use_input_stats": self.one(True, False)}
        return (x, weight, bias), options | {"channel_axis": self.one(1, -1, 5, 10**30)}

    def backward(self):
        shape = self.one((2, 2, 4), (2, 4, 2))
        dy, x = self.array(0, shape), self.array(1, shape)
        mean, rstd = self.array(2, shape[:2]), self.array(3, shape[:2])
        dresidual = self.maybe(7, shape)
        out = self.one(None, "x", "dy", "far", "near", "dresidual", often=0.4)
        places = {None: None, "x": x, "dy": dy, "far": self.array(5, shape), "near": self.array(1, shape)}
        places |= {"dresidual": dresidual}
        options = {
            "out": places[out], "bias": self.maybe(6, shape[1:2]), "dresidual": dresidual,
            "need": self.one(("dx", "dweight", "dbias"), ("dx",), ["dweight"], (), ("dy",), ("dx", "dslopes")),
            "use_input_stats": self.one(True, False),
        }  # fmt: skip
        return (dy, x, mean, rstd, self.maybe(4, shape[1:2], often=0.5)), options | self.options()


def outcome(function, args, options):
    """All that a call does: results, or the error."""
    with np.errstate(all="ignore"):
        try:
            results = function(*args, **options)
        except (TypeError, ValueError, OverflowError) as error:
            return type(error), str(error)
    results = results if isinstance(results, tuple) else (results,)
    return [None if a is None else (a.dtype, a.shape, a.strides, a.tobytes(), a is options["out"]) for a in results]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("part", range(8))
def test_repeated_calls_are_like_first_ones(direction, part, rng):
    """Thousands of calls in which most come again, but for one thing or another. They give the bits, or the error, that
    they would have given alone, and write nothing else."""
    start = rng.integers(-100, 100, 16384).astype(np.float32)
    start[:] = np.where(start == 0, 1, start)
    buffer, seen = np.empty_like(start), 0
    function = normkit.instance_norm if direction == "forward" else normkit.instance_norm_backward
    for _ in range(600):
        state = rng.bit_generator.state
        outcomes = []
        for way in (function, function, anew(function)):
            rng.bit_generator.state = state
            buffer[:] = start
            args, options = getattr(Drawer(rng, buffer.view(np.uint8)), direction)()
            outcomes.append((outcome(way, args, options), buffer.tobytes()))
        assert outcomes[0] == outcomes[1] == outcomes[2]
        seen += isinstance(outcomes[0][0], list)
    assert seen > 100  # of calls that are not refused


def test_memory_is_judged_each_time(rng):
    """An output may come to lie over an input where the arrays of a call differ in their addresses alone."""
    buffer = rng.standard_normal(512).astype(np.float32)
    x, far = buffer[:32].reshape(2, 2, 8), buffer[256:288].reshape(2, 2, 8)
    padded_over_x, padded_far = (buffer[at : at + 64].reshape(2, 2, 16)[..., :8] for at in (0, 256))
    for _ in range(2):
        normkit.instance_norm(x, out=far)
        assert normkit.instance_norm(x, out=x) is x
        with pytest.raises(ValueError, match="out overlaps x"):
            normkit.instance_norm(x, out=buffer[16:48].reshape(2, 2, 8))
        normkit.instance_norm(x, out=padded_far)
        with pytest.raises(ValueError, match="out overlaps x"):
            normkit.instance_norm(x, out=padded_over_x)
        residual = buffer[128:160].reshape(2, 2, 8)
        normkit.instance_norm(x, residual=residual, out=far)
        with pytest.raises(ValueError, match="out overlaps residual"):
            normkit.instance_norm(x, residual=residual, out=residual)
        mean, rstd = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
        normkit.instance_norm_backward(x, far, mean, rstd, dresidual=residual, out=x)
        with pytest.raises(ValueError, match="out overlaps dresidual"):
            normkit.instance_norm_backward(x, far, mean, rstd, dresidual=residual, out=residual)


def test_group_and_axis_options_tell_calls_apart(rng):
    x = rng.standard_normal((2, 8, 4, 4))
    for _ in range(3):
        for groups in (1, 2, 4, 8):
            y = normkit.group_norm(x, groups)
            assert y.tobytes() == anew(normkit.group_norm)(x, groups).tobytes()
        for axis in (0, 1, (1, 2), [1, 2], [2, 3], -1, (2, 3)):
            for center in (True, False, 1, 0):
                y = normkit.normalize(x, axis=axis, center=center)
                assert y.tobytes() == anew(normkit.normalize)(x, axis=axis, center=center).tobytes()


def test_a_list_of_axes_may_change(rng):
    x, axes = rng.standard_normal((4, 4, 4)), [0]
    first = normkit.layer_norm(x, axis=axes)
    axes[0] = 1
    assert normkit.layer_norm(x, axis=axes).tobytes() == normkit.layer_norm(x, axis=1).tobytes() != first.tobytes()


def test_an_option_that_is_gone_is_not_taken_for_a_new_one(rng):
    """A new tuple lies, as a rule, where the one before it was."""
    x = rng.standard_normal((2, 2, 8))
    slopes = [0.25 * k for k in range(8)]
    ys = [normkit.instance_norm(x, activation=("leaky_relu", slope)).tobytes() for slope in slopes]
    assert len(set(ys)) == len(slopes)


def test_threads_share_plans(rng):
    """Calls of several threads, large enough to run without the interpreter lock, with the same plans all along."""
    xs = [rng.standard_normal((2, 4, 256, 256)) for _ in range(4)]
    expected = [normkit.instance_norm(x).tobytes() for x in xs]
    wrong = []

    def work(k):
        out = np.empty_like(xs[k])
        for turn in range(20):
            y = normkit.instance_norm(xs[k], eps=1e-5, out=out if turn % 2 else None)
            normkit.instance_norm(xs[k][:, :, : 1 + turn], eps=1.0 + turn)  # pushes older plans out
            if y.tobytes() != expected[k]:
                wrong.append((k, turn))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
