"""Every message, to the letter: the argument, what was given, what would be right. Nothing is written before it."""

import math
import re
from functools import partial
from typing import Any

import normkit as nk
import numpy as np
import pytest
from cases import Guarded

X = (2, 3, 8, 8)
FLOATS = "float32, float64, float16 or bfloat16"


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def x() -> np.ndarray:
    return np.arange(384, dtype=np.float32).reshape(X)


def read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


def instance(**options: Any) -> Any:
    return nk.instance_norm(options.pop("x", x()), **options)


def normalize(**options: Any) -> Any:
    return nk.normalize(options.pop("x", x()), **{"axis": -1, **options})


def backward(**options: Any) -> Any:
    given = {"dy": x(), "x": x(), "mean": f32(2, 3), "rstd": f32(2, 3), **options}
    return nk.instance_norm_backward(**given)


def normalize_backward(**options: Any) -> Any:
    given = {"dy": x(), "x": x(), "mean": f32(2, 3, 8), "rstd": f32(2, 3, 8), "axis": -1, **options}
    return nk.normalize_backward(**given)


def overlapping(name: str) -> dict:
    """An out of X whose memory reaches into the argument `name`."""
    buffer = np.ones(400, np.float32)
    return {"out": buffer[:384].reshape(X), name: buffer[383:386]}


PER_CHANNEL = "expected (3,), (2, 3) or (2, 3, 8, 8): one element per channel of x"
PARAMETER = {
    name: {
        "shape": (instance, {name: f32(4)}, ValueError, f"{name} has shape (4,), {PER_CHANNEL}"),
        "shape-of-a-reduced-axis": (
            instance,
            {name: f32(8, 1)},
            ValueError,
            f"{name} has shape (8, 1), {PER_CHANNEL}",
        ),
        "broadcast": (
            normalize,
            {name: f32(4)},
            ValueError,
            f"{name} has shape (4,), expected a shape that broadcasts against x: (2, 3, 8, 8)",
        ),
        "broadcast-more-axes": (
            normalize,
            {name: f32(1, 2, 3, 8, 8)},
            ValueError,
            f"{name} has shape (1, 2, 3, 8, 8), expected a shape that broadcasts against x: (2, 3, 8, 8)",
        ),
        "dtype": (
            instance,
            {name: np.ones(3, np.int32)},
            TypeError,
            f"{name} has dtype int32, expected float32 or float64",
        ),
        "dtype-of-float16": (
            instance,
            {"x": x().astype(np.float16), name: np.ones(3, np.int32)},
            TypeError,
            f"{name} has dtype int32, expected float32, float64 or float16, the dtype of x",
        ),
        "half-for-a-float": (
            instance,
            {name: np.ones(3, np.float16)},
            TypeError,
            f"{name} has dtype float16, expected float32 or float64",
        ),
        "half-for-an-integer": (
            instance,
            {"x": np.ones(X, np.uint8), name: np.ones(3, np.float16)},
            TypeError,
            f"{name} has dtype float16, expected float32 or float64",
        ),
        "big-endian": (
            instance,
            {name: np.ones(3, ">f4")},
            TypeError,
            f"{name} has dtype >f4, expected native byte order",
        ),
        "list": (
            instance,
            {name: [1, 1, 1]},
            TypeError,
            f"{name} is a list, expected a NumPy array or an object with __dlpack__",
        ),
    }
    for name in ("weight", "bias")
}

ERRORS = {f"{name}-{what}": row for name, rows in PARAMETER.items() for what, row in rows.items()} | {
    "x-complex": (
        instance,
        {"x": x().astype(np.complex64)},
        TypeError,
        "x has dtype complex64, expected float32, float64, float16, bfloat16, bool or an integer of 8 to 64 bits",
    ),
    "x-object": (
        normalize,
        {"x": x().astype(object)},
        TypeError,
        "x has dtype object, expected float32, float64, float16, bfloat16, bool or an integer of 8 to 64 bits",
    ),
    "x-text": (
        normalize,
        {"x": x().astype("S4")},
        TypeError,
        "x has dtype |S4, expected float32, float64, float16, bfloat16, bool or an integer of 8 to 64 bits",
    ),
    "x-big-endian": (instance, {"x": x().astype(">f4")}, TypeError, "x has dtype >f4, expected native byte order"),
    "x-list": (
        instance,
        {"x": [[[1.0]]]},
        TypeError,
        "x is a list, expected a NumPy array or an object with __dlpack__",
    ),
    "x-none": (
        normalize,
        {"x": None},
        TypeError,
        "x is a NoneType, expected a NumPy array or an object with __dlpack__",
    ),
    "x-integer-backward": (backward, {"x": np.ones(X, np.uint8)}, TypeError, f"x has dtype uint8, expected {FLOATS}"),
    "x-one-axis": (instance, {"x": f32(3)}, ValueError, "x has 1 axis, expected at least 2: images and channels"),
    "x-no-axis": (instance, {"x": f32()}, ValueError, "x has 0 axes, expected at least 2: images and channels"),
    **{
        f"x-no-space{name}": (
            call,
            {"x": f32(4, 3), **rest},
            ValueError,
            "x has shape (4, 3), expected at least 3 axes: images, channels and space",
        )
        for name, call, rest in (
            ("", instance, {}),
            ("-last", instance, {"channel_axis": -1}),
            ("-backward", backward, {"dy": f32(4, 3), "mean": f32(4, 3), "rstd": f32(4, 3)}),
        )
    },
    "eps-negative": (instance, {"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number that is at least 0"),
    "eps-nan": (normalize, {"eps": np.nan}, ValueError, "eps is nan, expected a finite number that is at least 0"),
    "eps-inf": (normalize, {"eps": np.inf}, ValueError, "eps is inf, expected a finite number that is at least 0"),
    "momentum-none": (
        instance,
        {"running_mean": f32(3), "running_var": f32(3), "momentum": None},
        ValueError,
        "momentum is None, expected a number from 0 to 1: keep the count yourself",
    ),
    "momentum-range": (
        instance,
        {"running_mean": f32(3), "running_var": f32(3), "momentum": 1.5},
        ValueError,
        "momentum is 1.5, expected a number from 0 to 1",
    ),
    "momentum-nan": (
        instance,
        {"running_mean": f32(3), "running_var": f32(3), "momentum": np.nan},
        ValueError,
        "momentum is nan, expected a number from 0 to 1",
    ),
    "channel-axis": (
        instance,
        {"channel_axis": 4},
        np.exceptions.AxisError,
        "channel_axis is 4, expected -4 to 3: x has 4 axes",
    ),
    "channel-axis-negative": (
        backward,
        {"channel_axis": -5},
        np.exceptions.AxisError,
        "channel_axis is -5, expected -4 to 3: x has 4 axes",
    ),
    "channel-axis-of-images": (
        instance,
        {"channel_axis": 0},
        ValueError,
        "channel_axis is 0, expected another: axis 0 of x counts images",
    ),
    "axis": (normalize, {"axis": 4}, np.exceptions.AxisError, "axis is 4, expected -4 to 3: x has 4 axes"),
    "axis-of-no-axes": (
        normalize,
        {"x": f32()},
        np.exceptions.AxisError,
        "axis is -1, expected no axis: x has 0 axes",
    ),
    "axis-in-a-tuple": (
        normalize_backward,
        {"axis": (1, -5)},
        np.exceptions.AxisError,
        "axis is -5, expected -4 to 3: x has 4 axes",
    ),
    "axis-twice": (
        normalize,
        {"axis": (1, -3)},
        ValueError,
        "axis has 1 more than once: (1, -3), expected distinct axes",
    ),
    "axis-none": (normalize, {"axis": ()}, ValueError, "axis is (), expected at least one axis"),
    "out-shape": (
        instance,
        {"out": f32(2, 3)},
        ValueError,
        "out has shape (2, 3), expected (2, 3, 8, 8), the shape of x",
    ),
    "out-dtype": (instance, {"out": np.ones(X)}, TypeError, "out has dtype float64, expected float32"),
    "out-dtype-of-integers": (
        instance,
        {"x": np.ones(X, np.uint8), "out": np.ones(X, np.uint8)},
        TypeError,
        "out has dtype uint8, expected float32",
    ),
    "out-read-only": (instance, {"out": read_only(f32(*X))}, ValueError, "out is read-only, expected a writable array"),
    "out-shares-memory": (
        instance,
        {"out": np.lib.stride_tricks.as_strided(f32(1), X, (0, 0, 0, 0))},
        ValueError,
        "out has elements that share memory, expected distinct ones",
    ),
    "out-windows": (
        normalize,
        {"x": f32(3, 4), "out": np.lib.stride_tricks.sliding_window_view(f32(6), 4, writeable=True)},
        ValueError,
        "out has elements that share memory, expected distinct ones",
    ),
    "out-interlaced": (
        instance,
        {"out": np.lib.stride_tricks.as_strided(f32(600), X, (768, 256, 28, 4))},
        ValueError,
        "out has elements that share memory, expected distinct ones",
    ),
    "running-var-shares-memory": (
        instance,
        {"running_mean": f32(3), "running_var": np.lib.stride_tricks.as_strided(f32(1), (3,), (0,))},
        ValueError,
        "running_var has elements that share memory, expected distinct ones",
    ),
    "out-overlaps-weight": (instance, overlapping("weight"), ValueError, "out overlaps weight, expected memory apart"),
    "out-overlaps-bias": (instance, overlapping("bias"), ValueError, "out overlaps bias, expected memory apart"),
    "out-dtype-unknown": (instance, {"out_dtype": np.int32}, TypeError, f"out_dtype is int32, expected {FLOATS}"),
    "running-mean-shape": (
        instance,
        {"running_mean": f32(4), "running_var": f32(3)},
        ValueError,
        "running_mean has shape (4,), expected (3,): one element per channel of x",
    ),
    "running-var-shape": (
        instance,
        {"running_mean": f32(3), "running_var": f32(2, 3)},
        ValueError,
        "running_var has shape (2, 3), expected (3,): one element per channel of x",
    ),
    "running-var-none": (
        instance,
        {"running_mean": f32(3)},
        ValueError,
        "running_var is None, expected an array like running_mean",
    ),
    "running-mean-none": (
        instance,
        {"running_var": f32(3)},
        ValueError,
        "running_mean is None, expected an array like running_var",
    ),
    "running-mean-dtype": (
        instance,
        {"running_mean": np.ones(3, int), "running_var": f32(3)},
        TypeError,
        "running_mean has dtype int64, expected float32, float64, float16 or bfloat16",
    ),
    "running-mean-read-only": (
        instance,
        {"running_mean": read_only(f32(3)), "running_var": f32(3)},
        ValueError,
        "running_mean is read-only, expected a writable array",
    ),
    "running-var-read-only": (
        instance,
        {"running_mean": f32(3), "running_var": read_only(f32(3))},
        ValueError,
        "running_var is read-only, expected a writable array",
    ),
    "running-none": (
        instance,
        {"use_input_stats": False},
        ValueError,
        "use_input_stats is False, expected running_mean and running_var to normalize with",
    ),
    "running-one-member": (
        instance,
        {"x": f32(2, 3, 1), "running_mean": f32(3), "running_var": f32(3)},
        ValueError,
        "x has 1 member per statistic, expected at least 2: running_var takes an unbiased variance",
    ),
    "dy-shape": (backward, {"dy": f32(2, 3)}, ValueError, "dy has shape (2, 3), expected (2, 3, 8, 8), the shape of x"),
    "dy-dtype": (
        backward,
        {"x": x().astype(np.float16)},
        TypeError,
        "dy has dtype float32, expected float16, the dtype of x",
    ),
    "mean-shape": (
        backward,
        {"mean": f32(3)},
        ValueError,
        "mean has shape (3,), expected (2, 3): one element per statistic",
    ),
    "rstd-shape": (
        backward,
        {"rstd": f32(2, 3, 1)},
        ValueError,
        "rstd has shape (2, 3, 1), expected (2, 3): one element per statistic",
    ),
    "mean-none": (backward, {"mean": None}, ValueError, "mean is None, expected an array: one element per statistic"),
    "rstd-none": (
        normalize_backward,
        {"rstd": None},
        ValueError,
        "rstd is None, expected an array: one element per statistic",
    ),
    "mean-dtype": (
        backward,
        {"mean": np.ones((2, 3), np.float16)},
        TypeError,
        "mean has dtype float16, expected float32 or float64",
    ),
    "rstd-dtype": (
        backward,
        {"rstd": np.ones((2, 3), np.int64)},
        TypeError,
        "rstd has dtype int64, expected float32 or float64",
    ),
    "need": (
        backward,
        {"need": ("dx", "dz")},
        ValueError,
        "need has 'dz', expected names from ('dx', 'dweight', 'dbias', 'dslopes')",
    ),
    "need-name": (
        backward,
        {"need": "dx"},
        TypeError,
        "need is 'dx', expected a tuple of names from ('dx', 'dweight', 'dbias', 'dslopes')",
    ),
    "need-none": (
        backward,
        {"need": None},
        TypeError,
        "need is None, expected a tuple of names from ('dx', 'dweight', 'dbias', 'dslopes')",
    ),
    "weight-shape-backward": (backward, {"weight": f32(4)}, ValueError, f"weight has shape (4,), {PER_CHANNEL}"),
    "weight-broadcast-backward": (
        normalize_backward,
        {"weight": f32(4)},
        ValueError,
        "weight has shape (4,), expected a shape that broadcasts against x: (2, 3, 8, 8)",
    ),
    "flag": (instance, {"return_stats": "no"}, TypeError, "return_stats is 'no', expected True or False"),
    "flag-backward": (
        backward,
        {"use_input_stats": None},
        TypeError,
        "use_input_stats is None, expected True or False",
    ),
    "threads": (lambda: nk.set_num_threads(0), {}, ValueError, "n is 0, expected at least 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    call, options, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        call(**options)
    assert str(caught.value) == message


WRITES = {
    name: row
    for name, row in ERRORS.items()
    if row[0] in (instance, normalize, backward, normalize_backward)
    and "out" not in row[1]
    and np.shape(row[1].get("x", x())) == X
}


@pytest.mark.parametrize("case", WRITES)
def test_nothing_is_written_before_validation_ends(case):
    """out and the running statistics keep their bytes when another argument is wrong."""
    call, options, kind, _ = WRITES[case]
    out = Guarded(X, options.get("x", x()).dtype if hasattr(options.get("x", x()), "dtype") else np.float32)
    options = {**options, "out": out.array}
    if call is instance and not any(name.startswith(("running", "use")) for name in options):
        options |= {"running_mean": f32(3), "running_var": f32(3)}
    with pytest.raises(kind):
        call(**options)
    assert out.unwritten()
    assert all(
        (options[name] == 1).all()
        for name in ("running_mean", "running_var")
        if isinstance(options.get(name), np.ndarray)
    )


@pytest.mark.parametrize("name", ["weight", "mean", "rstd"])
def test_dx_overlaps_an_input(name):
    buffer = np.ones(400, np.float32)
    shape = (3,) if name == "weight" else (2, 3)
    options = {name: buffer[380 : 380 + int(np.prod(shape))].reshape(shape), "out": buffer[:384].reshape(X)}
    with pytest.raises(ValueError, match=rf"^out overlaps {name}, expected memory apart$"):
        backward(**options)
    assert (buffer == 1).all()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_out_overlaps_running_statistics(name):
    buffer = np.ones(400, np.float32)
    options = {"running_mean": f32(3), "running_var": f32(3)} | {name: buffer[382:385]}
    with pytest.raises(ValueError, match=rf"^out overlaps {name}, expected memory apart$"):
        instance(out=buffer[:384].reshape(X), **options)


def test_unknown_isa():
    expected = ", ".join(map(repr, nk.isas()))
    with pytest.raises(ValueError, match=rf"^name is 'mmx', expected one of {expected}$"), nk.use_isa("mmx"):
        pass


def test_options_are_keywords():
    for call in (lambda: nk.instance_norm(x(), None, None, 1e-5), lambda: nk.normalize(x(), None, None, -1)):
        with pytest.raises(TypeError, match="positional"):
            call()


def test_axis_has_no_default():
    with pytest.raises(TypeError, match="axis"):
        nk.normalize(x())


def test_an_error_leaves_the_library_usable():
    before = nk.instance_norm(x()).tobytes()
    for case in ERRORS.values():
        with pytest.raises(case[2]):
            case[0](**case[1])
    assert nk.instance_norm(x()).tobytes() == before


# ---- options that many functions take --------------------------------------------------------------------------

STATS = {name: np.ones((2, 3)) for name in ("mean", "rstd")}
ROWS = {name: np.ones((2, 3, 8)) for name in ("mean", "rstd")}
SUMS = {"sums": np.ones((2, 3, 8, 3)), "count": 8}


def given(function: Any, /, *names: str, **fixed: Any) -> Any:
    """The function, with arguments that are right where a case does not say otherwise."""

    def call(**options: Any) -> Any:
        data = options.pop("x", x())
        arrays = {name: data if name in ("x", "content") else x() for name in names}
        return function(**{**arrays, **fixed, **options})

    return call


FORWARD = {
    "instance": given(nk.instance_norm, "x"),
    "group": given(nk.group_norm, "x", num_groups=3),
    "layer": given(nk.layer_norm, "x"),
    "rms": given(nk.rms_norm, "x"),
    "batch": given(nk.batch_norm, "x", training=True),
    "normalize": given(nk.normalize, "x", axis=-1),
}
BACKWARD = {
    "instance-backward": given(nk.instance_norm_backward, "dy", "x", **STATS),
    "group-backward": given(nk.group_norm_backward, "dy", "x", num_groups=3, **STATS),
    "layer-backward": given(nk.layer_norm_backward, "dy", "x", **ROWS),
    "rms-backward": given(nk.rms_norm_backward, "dy", "x", rstd=ROWS["rstd"]),
    "batch-backward": given(nk.batch_norm_backward, "dy", "x", mean=np.ones(3), rstd=np.ones(3)),
    "normalize-backward": given(nk.normalize_backward, "dy", "x", axis=-1, **ROWS),
}
MOMENTS = {"moments": given(nk.moments, "x", axis=-1)}
APPLY = {"apply": given(nk.apply, "x", axis=-1, **ROWS)}
SUM = {"backward-sums": given(nk.backward_sums, "dy", "x", axis=-1, **ROWS)}
APPLY_BACKWARD = {"apply-backward": given(nk.apply_backward, "dy", "x", axis=-1, **ROWS, **SUMS)}
ADAPTIVE = {"adaptive": given(nk.adaptive_instance_norm, "content", "style")}
ADAPTIVE_BACKWARD = {"adaptive-backward": given(nk.adaptive_instance_norm_backward, "dy", "content", "style", **STATS)}
DOUBLE = {
    "double-backward": given(nk.instance_norm_double_backward, "ddx", "dy", "x", ddweight=None, ddbias=None, **STATS)
}
WITHOUT_OUT = {*MOMENTS, *SUM, *DOUBLE}

ACTIVATION = (
    "expected None, 'relu', 'leaky_relu', 'silu', 'gelu', 'gelu_tanh', 'elu', 'sigmoid', 'tanh', "
    "'relu6', 'hardswish', 'mish', 'softplus', "
    "or a pair such as ('leaky_relu', 0.01), ('elu', 1.0) or ('prelu', slopes)"
)
# For each option: the functions that take it, and its errors. Masks of the named normalizations are in test_where.py.
OPTIONS = {
    "where": (
        MOMENTS | SUM | APPLY_BACKWARD | ADAPTIVE | ADAPTIVE_BACKWARD,
        {
            "dtype": (f32(8), TypeError, "where has dtype float32, expected bool"),
            "shape": (
                np.ones(7, bool),
                ValueError,
                f"where has shape (7,), expected a shape that broadcasts against x: {X}",
            ),
            "flag": (False, TypeError, "where is a bool, expected a NumPy array or an object with __dlpack__"),
        },
    ),
    "residual": (
        FORWARD | ADAPTIVE,
        {
            "shape": (f32(2, 3, 8), ValueError, f"residual has shape (2, 3, 8), expected {X}, the shape of x"),
            "dtype": (np.ones(X), TypeError, "residual has dtype float64, expected float32, the dtype of x"),
            "list": ([1.0], TypeError, "residual is a list, expected a NumPy array or an object with __dlpack__"),
        },
    ),
    "return_residual": (
        FORWARD | ADAPTIVE,
        {"alone": (True, ValueError, "residual is None, expected an array like x: return_residual is True")},
    ),
    "dresidual": (
        BACKWARD | APPLY_BACKWARD | ADAPTIVE_BACKWARD,
        {
            "shape": (f32(2, 3, 8), ValueError, f"dresidual has shape (2, 3, 8), expected {X}, the shape of x"),
            "dtype": (np.ones(X), TypeError, "dresidual has dtype float64, expected float32, the dtype of x"),
        },
    ),
    "activation": (
        FORWARD | BACKWARD | APPLY | SUM | APPLY_BACKWARD | ADAPTIVE | ADAPTIVE_BACKWARD,
        {
            "name": ("swish", ValueError, f"activation is 'swish', {ACTIVATION}"),
            "none": ("none", ValueError, f"activation is 'none', {ACTIVATION}"),
            "type": (3, TypeError, f"activation is 3, {ACTIVATION}"),
            "triple": (("elu", 1.0, 2.0), TypeError, f"activation is ('elu', 1.0, 2.0), {ACTIVATION}"),
            "parameter-of-none": (
                ("relu", 1.0),
                ValueError,
                "activation is ('relu', 1.0), expected 'relu': only leaky_relu and elu have a parameter",
            ),
            "parameter-type": (
                ("elu", "1"),
                TypeError,
                "activation is ('elu', '1'), expected a number as its parameter",
            ),
            "parameter-nan": (
                ("elu", math.nan),
                ValueError,
                "activation is ('elu', nan), expected a finite parameter",
            ),
            "parameter-inf": (
                ["leaky_relu", -math.inf],
                ValueError,
                "activation is ['leaky_relu', -inf], expected a finite parameter",
            ),
        },
    ),
    "weight_offset": (
        FORWARD | BACKWARD | APPLY | SUM | APPLY_BACKWARD | DOUBLE,
        {
            "type": ("1", TypeError, "weight_offset is '1', expected a finite number"),
            "none": (None, TypeError, "weight_offset is None, expected a finite number"),
            "nan": (math.nan, ValueError, "weight_offset is nan, expected a finite number"),
            "inf": (-math.inf, ValueError, "weight_offset is -inf, expected a finite number"),
        },
    ),
}
OPTION_CASES = {
    f"{name}-{option}-{what}": (call, name, option, *error)
    for option, (calls, errors) in OPTIONS.items()
    for name, call in calls.items()
    for what, error in errors.items()
}


@pytest.mark.parametrize("case", OPTION_CASES)
def test_options_of_every_function(case):
    """Every message is right to the letter, and nothing is written before it."""
    call, name, option, value, kind, message = OPTION_CASES[case]
    out = Guarded(X, np.float32)
    if name not in WITHOUT_OUT:
        call = partial(call, out=out.array)
    with pytest.raises(kind) as caught:
        call(**{option: value})
    assert str(caught.value) == (re.sub(r"\bx\b", "content", message) if "adaptive" in name else message)
    assert out.unwritten()


@pytest.mark.parametrize("name", FORWARD | ADAPTIVE)
def test_integers_take_no_residual(name):
    call = (FORWARD | ADAPTIVE)[name]
    with pytest.raises(TypeError) as caught:
        call(x=np.ones(X, np.int16), residual=np.ones(X, np.int16))
    data = "content" if name in ADAPTIVE else "x"
    assert str(caught.value) == f"{data} has dtype int16, expected {FLOATS} with a residual to add"


OVERLAPS = {
    f"{name}-{argument}": (call, argument)
    for argument, calls in {
        "where": FORWARD | BACKWARD | APPLY_BACKWARD | ADAPTIVE | ADAPTIVE_BACKWARD,
        "residual": ADAPTIVE,
        "dresidual": BACKWARD | APPLY_BACKWARD | ADAPTIVE_BACKWARD,
        "mean": APPLY | APPLY_BACKWARD | ADAPTIVE_BACKWARD,
        "rstd": APPLY | APPLY_BACKWARD | ADAPTIVE_BACKWARD,
        "sums": APPLY_BACKWARD,
        "count": APPLY_BACKWARD,
    }.items()
    for name, call in calls.items()
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_out_overlaps_an_option(case):
    """The last element of out lies where the option begins."""
    call, argument = OVERLAPS[case]
    buffer = np.ones(4 * 800, np.uint8)
    out = buffer[: 4 * 384].view(np.float32).reshape(X)
    rest = buffer[4 * 382 :]
    shape, dtype = {
        "where": ((8,), np.bool_),
        "residual": (X, np.float32),
        "dresidual": (X, np.float32),
        "sums": ((2, 3, 8, 3), np.float64),
    }.get(argument, ((2, 3) if "adaptive" in case else (2, 3, 8), np.float64))
    bytes_of = math.prod(shape) * np.dtype(dtype).itemsize
    with pytest.raises(ValueError, match=rf"^out overlaps {argument}, expected memory apart$"):
        call(out=out, **{argument: rest[:bytes_of].view(dtype).reshape(shape)})
    assert (buffer == 1).all()


# ---- phases and AdaIN ------------------------------------------------------------------------------------------

PHASES = APPLY | SUM | APPLY_BACKWARD
STATISTIC = "one element per statistic"
PHASE_ERRORS = {
    f"{name}-{what}": (call, *error)
    for name, call in PHASES.items()
    for what, error in {
        "mean-shape": (
            {"mean": np.ones((2, 3))},
            ValueError,
            f"mean has shape (2, 3), expected (2, 3, 8): {STATISTIC}",
        ),
        "mean-dtype": (
            {"mean": np.ones((2, 3, 8), int)},
            TypeError,
            "mean has dtype int64, expected float32 or float64",
        ),
        "rstd-shape": ({"rstd": np.ones(X)}, ValueError, f"rstd has shape {X}, expected (2, 3, 8): {STATISTIC}"),
        "rstd-dtype": (
            {"rstd": np.ones((2, 3, 8), np.float16)},
            TypeError,
            "rstd has dtype float16, expected float32 or float64",
        ),
        "rstd-none": ({"rstd": None}, ValueError, f"rstd is None, expected an array: {STATISTIC}"),
    }.items()
} | {
    f"apply-backward-{what}": (APPLY_BACKWARD["apply-backward"], *error)
    for what, error in {
        "sums-shape": (
            {"sums": np.ones((2, 3, 8))},
            ValueError,
            "sums has shape (2, 3, 8), expected (2, 3, 8, 3): three numbers per statistic",
        ),
        "sums-dtype": ({"sums": f32(2, 3, 8, 3)}, TypeError, "sums has dtype float32, expected float64"),
        "sums-none": ({"sums": None}, ValueError, "sums is None, expected an array: three numbers per statistic"),
        "count-shape": ({"count": np.ones(8)}, ValueError, f"count has shape (8,), expected (2, 3, 8): {STATISTIC}"),
        "count-dtype": ({"count": np.ones((2, 3, 8), bool)}, TypeError, "count has dtype bool, expected float64"),
        "count-none": ({"count": None}, ValueError, f"count is None, expected an array: {STATISTIC}"),
        "count-list": (
            {"count": [8]},
            TypeError,
            "count is a list, expected a NumPy array or an object with __dlpack__",
        ),
    }.items()
}


@pytest.mark.parametrize("case", PHASE_ERRORS)
def test_phases(case):
    call, options, kind, message = PHASE_ERRORS[case]
    out = Guarded(X, np.float32)
    if not case.startswith("backward-sums"):
        options = {**options, "out": out.array}
    with pytest.raises(kind) as caught:
        call(**options)
    assert str(caught.value) == message
    assert out.unwritten()


EPS = "expected a finite number that is at least 0"
MOMENTS_ERRORS = {
    "rstd-negative": (lambda m: m.rstd(-1), ValueError, f"eps is -1, {EPS}"),
    "rstd-nan": (lambda m: m.rstd(math.nan), ValueError, f"eps is nan, {EPS}"),
    "rstd-type": (lambda m: m.rstd("a"), TypeError, "eps is 'a', expected a number that is at least 0"),
    "std-type": (lambda m: m.std("a"), TypeError, "correction is 'a', expected a number"),
    "var-type": (lambda m: m.var("a"), TypeError, "correction is 'a', expected a number"),
    "merge-type": (lambda m: m.merge(3), TypeError, "other is 3, expected Moments"),
    "merge-all-type": (lambda m: nk.merge([3]), TypeError, "moments has 3, expected Moments"),
    "merge-none": (lambda m: nk.merge([]), ValueError, "moments is empty, expected at least one"),
    "merge-shape": (
        lambda m: m.merge(nk.moments(x(), axis=0)),
        ValueError,
        "other has statistics of shape (3, 8, 8), expected (2, 3, 8)",
    ),
    "adaptive-eps": (
        lambda m: nk.adaptive_instance_norm(x(), x(), eps=-1),
        ValueError,
        f"eps is -1, {EPS}",
    ),
    "adaptive-eps-type": (
        lambda m: nk.adaptive_instance_norm(x(), x(), eps="a"),
        TypeError,
        "eps is 'a', expected a number that is at least 0",
    ),
    "adaptive-integer-gradient": (
        lambda m: nk.adaptive_instance_norm_backward(x(), x(), np.ones(X, np.uint8), **STATS),
        TypeError,
        f"style has dtype uint8, expected {FLOATS}",
    ),
    "adaptive-images": (
        lambda m: nk.adaptive_instance_norm(x(), x()[:, :2]),
        ValueError,
        "style has images and channels (2, 2), expected (2, 3), those of content, or (1, 3)",
    ),
    "moments-type": (
        lambda m: nk.Moments("a", 1, 2),
        TypeError,
        "count is a str, expected a NumPy array or an object with __dlpack__",
    ),
    "moments-none": (
        lambda m: nk.Moments(3, 0, None),
        TypeError,
        "m2 is a NoneType, expected a NumPy array or an object with __dlpack__",
    ),
    "moments-shape": (
        lambda m: nk.Moments(np.ones(3), np.ones(2), 1),
        ValueError,
        "count has shape (3,), expected (2,), that of mean",
    ),
    "moments-dtype": (
        lambda m: nk.Moments(3, np.ones(2), np.ones(2, complex)),
        TypeError,
        "m2 has dtype complex128, expected real numbers",
    ),
    "moments-complex": (
        lambda m: nk.Moments(3, np.ones(2), np.complex64(1j)),
        TypeError,
        "m2 is a complex64, expected a NumPy array or an object with __dlpack__",
    ),
    "correction-complex": (
        lambda m: m.var(np.complex64(1)),
        TypeError,
        "correction is np.complex64(1+0j), expected a number",
    ),
    "axis-huge": (
        lambda m: nk.moments(np.ones(3), axis=2**70),
        ValueError,
        "axis is 1180591620717411303424, expected one of 64 bits",
    ),
}


@pytest.mark.parametrize("case", MOMENTS_ERRORS)
def test_moments(case):
    call, kind, message = MOMENTS_ERRORS[case]
    m = nk.moments(x(), axis=-1)
    with pytest.raises(kind) as caught:
        call(m)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", BACKWARD | SUM | APPLY_BACKWARD | ADAPTIVE_BACKWARD)
def test_no_gradient(name):
    with pytest.raises(TypeError) as caught:
        (BACKWARD | SUM | APPLY_BACKWARD | ADAPTIVE_BACKWARD)[name](dy=None)
    assert str(caught.value) == "dy is a NoneType, expected a NumPy array or an object with __dlpack__"
