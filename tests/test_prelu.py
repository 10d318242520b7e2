"""prelu: a slope for each parameter, read as weight and bias are, and the gradient of the slopes."""

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, MASKS, SHAPES, Guarded, bits, lay, uniform
from checks import check_backward, check_forward, unchanged
from reference import OPERATIONS, REGISTRY, compute

INSTANCE = OPERATIONS["instance"]
SMALL = (3, 5, 4, 7)
FEW = [OPERATIONS[name] for name in ("instance", "group-last", "batch", "layer", "rms", "over-first", "over-channels")]
ALL = ("dx", "dweight", "dbias", "dslopes")


def drawn(rng, op, kind="channel", shape=SMALL, dtype=np.float32):
    """A parameter: of one element, or of one for each that there is of that kind."""
    shape = {"one": (1,), "scalar": ()}.get(kind) or (() if kind == "scalar" else op.weight_shape(shape, kind))
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def check_dslopes(op, dy, x, slopes, weight=None, *, bias=None, stats=None, need=ALL, **options):
    """The gradient of slopes, within its bound."""
    where = {"where": options["where"]} if "where" in options else {}
    mean, rstd = stats or op.statistics(x, **where)[1:]
    activation = ("prelu", slopes)
    with unchanged(dy, x, slopes, weight, bias):
        found = op.backward(dy, x, mean, rstd, weight, bias=bias, activation=activation, need=need, **options)
    assert len(found) == 4
    b = op.reference_backward(dy, x, mean, rstd, weight, bias=bias, activation=activation, **options)
    found, like = found[3], np.asarray(slopes)
    assert (found.shape, found.dtype) == (
        like.shape,
        like.dtype if isinstance(slopes, np.ndarray) else compute(x.dtype),
    )
    bound = bounds.dslopes(b, x.dtype, bounds.count_of(x.shape, like.shape))
    if like.size == 1:
        total, bound = (np.reshape(t.sum(), like.shape) for t in (b.dslopes, bound))
    else:
        total, bound = (op.to_weight(t, x.shape, like) for t in (b.dslopes, bound))
    size = np.abs(total) + bound
    bound = bound + bounds.stored(size, compute(x.dtype)) + bounds.stored(size, found.dtype)
    if like.size == 1:  # each parameter has a sum of its own, which is rounded; those add up
        bound = bound + bounds.unit(x.dtype) * np.abs(b.dslopes).sum()
    assert bounds.excess(found, total, bound) <= 1


def check(op, dy, x, slopes, weight=None, bias=None, **options):
    backward = {name: value for name, value in options.items() if name != "out_dtype"}
    if "use_input_stats" not in options:
        check_forward(op, x, weight, bias, activation=("prelu", slopes), **options)
    check_backward(op, dy, x, weight, bias=bias, activation=("prelu", slopes), **backward)
    check_dslopes(op, dy, x, slopes, weight, bias=bias, **backward)


@pytest.mark.parametrize("kind", ["channel", "conditional", "pixel", "last", "kept", "one", "scalar"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop", "step", "flipped"])
@pytest.mark.parametrize("op", FEW, ids=repr)
def test_every_shape_of_slopes(op, layout, kind, isa, rng):
    """Beside a weight of one element for each channel, and beside none."""
    dy, x = (lay(uniform(rng, SMALL, offset=o), layout) for o in (0, 0.25))
    slopes = drawn(rng, op, kind)
    check(op, dy, x, slopes, drawn(rng, op), drawn(rng, op))
    check(op, dy, x, slopes)


@pytest.mark.parametrize("kind", ["conditional", "pixel", "last", "kept"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_weight(layout, kind, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    for op in (INSTANCE, OPERATIONS["over-channels"]):
        weight, bias = drawn(rng, op, kind), drawn(rng, op, kind)
        for slopes in (drawn(rng, op, kind), drawn(rng, op)):
            check(op, dy, x, slopes, weight, bias, weight_offset=1.0)
        check(op, dy, x, slopes, None, bias)


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_operation(op, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL, offset=0.25)
    check(op, dy, x, drawn(rng, op), drawn(rng, op), drawn(rng, op))


@pytest.mark.parametrize("slopes_dtype", ["float32", "float64", "x"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", [INSTANCE, OPERATIONS["layer"]], ids=repr)
def test_every_dtype(op, layout, dtype, slopes_dtype, isa, rng):
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    slopes_dtype = dtype if slopes_dtype == "x" else np.dtype(slopes_dtype)
    check(op, dy, x, drawn(rng, op, dtype=slopes_dtype), drawn(rng, op), drawn(rng, op))
    check(op, dy, x, drawn(rng, op, "one", dtype=slopes_dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_length(shape, layout, isa, rng):
    shape = SHAPES[shape]
    dy, x = (lay(uniform(rng, shape), layout) for _ in range(2))
    for op in (INSTANCE, OPERATIONS["layer"]):
        check(op, dy, x, drawn(rng, op, shape=shape), drawn(rng, op, shape=shape), drawn(rng, op, shape=shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mask", ["random", "image-and-position"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_all_options_at_once(op, mask, layout, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    options = {"where": MASKS[mask](rng, SMALL), "weight_offset": 1.0}
    check(op, dy, x, drawn(rng, op), drawn(rng, op), drawn(rng, op), **options)


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_statistics(op, isa, rng):
    dy, x, shape = uniform(rng, SMALL), uniform(rng, SMALL), op.statistics_shape(SMALL)
    mean = rng.standard_normal(shape).astype(np.float32) if op.center else None
    stats = mean, rng.uniform(0.5, 2, shape).astype(np.float32)
    check(op, dy, x, drawn(rng, op), drawn(rng, op), drawn(rng, op), stats=stats, use_input_stats=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_equal_slopes_are_those_of_leaky_relu(op, layout, isa, rng):
    """To the last bit, however they are given."""
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    weight, bias, stats = drawn(rng, op), drawn(rng, op), op.statistics(x)[1:]
    leaky, options = ("leaky_relu", 0.375), {"bias": bias}
    y, gradients = op.forward(x, weight, bias, activation=leaky), op.backward(
        dy, x, *stats, weight, activation=leaky, **options
    )  # fmt: skip
    found = []
    for slopes in (np.full_like(weight, 0.375), np.full(1, 0.375), np.float32(0.375), 0.375, np.full((1, 1), 0.375)):
        assert bits(op.forward(x, weight, bias, activation=("prelu", slopes))) == bits(y)
        given = {"activation": ["prelu", slopes], "need": ALL}
        *others, dslopes = op.backward(dy, x, *stats, weight, **given, **options)
        assert [bits(a) for a in others] == [bits(a) for a in gradients]
        found.append(dslopes.astype(np.float64))
    assert [a.shape for a in found[1:]] == [(1,), (), (), (1, 1)]
    assert np.ptp([a.sum() for a in found[1:]]) <= 1e-6 * np.abs(found[1]).max()


@pytest.mark.parametrize(
    "need", [("dslopes",), ("dx", "dslopes"), ("dslopes", "dbias"), ["dweight", "dslopes"]], ids=str
)
@pytest.mark.parametrize("kind", ["channel", "pixel", "one"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_bits_do_not_depend_on_what_is_needed(op, kind, need, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight, bias, slopes = drawn(rng, op), drawn(rng, op), drawn(rng, op, kind)
    given = (dy, x, *op.statistics(x)[1:], weight)
    options = {"bias": bias, "activation": ("prelu", slopes)}
    everything = op.backward(*given, need=ALL, **options)
    assert [bits(a) for a in op.backward(*given, **options)] == [bits(a) for a in everything[:3]]
    for name, whole, found in zip(ALL, everything, op.backward(*given, need=need, **options), strict=True):
        assert (found is not None) == (name in need)
        assert found is None or bits(found) == bits(whole)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "step"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_in_place(op, layout, rng):
    """dx over dy: the slopes' gradient has read it before."""
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    given = {"activation": ("prelu", drawn(rng, op)), "need": ALL}
    stats = op.statistics(x)[1:]
    expected = op.backward(dy, x, *stats, **given)
    assert [bits(a) for a in op.backward(dy, x, *stats, out=dy, **given)] == [bits(a) for a in expected]


LYING = {
    "reversed": lambda s: s[::-1],
    "stepped": lambda s: np.repeat(s, 3)[::3],
    "misaligned": lambda s: lay(s[None], "misaligned")[0],
    "broadcast": lambda s: np.broadcast_to(s[:1], s.shape),
}


@pytest.mark.parametrize("lying", LYING)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "step"])
def test_slopes_lie_anywhere(layout, lying, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    slopes = LYING[lying](drawn(rng, INSTANCE))
    given = (dy, x, *INSTANCE.statistics(x)[1:])
    for _ in range(2):
        y, dense = (INSTANCE.forward(x, activation=("prelu", s)) for s in (slopes, slopes.copy()))
        assert bits(y) == bits(dense)
        found, dense = (INSTANCE.backward(*given, activation=("prelu", s), need=ALL) for s in (slopes, slopes.copy()))
        assert [bits(a) for a in found] == [bits(a) for a in dense]


def test_a_repeated_call_reads_the_slopes_that_it_is_given(rng):
    """As arrays that differ in their values and addresses alone, and in more."""
    x, op = uniform(rng, SMALL), INSTANCE
    several = [drawn(rng, op, kind, dtype=d) for kind in ("channel", "one", "conditional") for d in ("f4", "f4", "f8")]
    stats = op.statistics(x)[1:]

    def called(slopes):
        activation = ("prelu", slopes)
        results = op.forward(x, activation=activation), *op.backward(x, x, *stats, activation=activation, need=ALL)
        return [bits(a) for a in results]

    first = [called(slopes) for slopes in several]
    for _ in range(3):
        assert [called(slopes) for slopes in several] == first
    assert len({y for y, *_ in first}) == len(several)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kind", ["channel", "one"])
def test_phases(kind, center, isa, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    slopes, weight, bias = (np.float32(rng.standard_normal((5, 1, 1))) for _ in range(3))
    options = {"axis": (2, 3), "activation": ("prelu", slopes if kind == "channel" else slopes[:1])}
    m = normkit.moments(x, axis=(2, 3), center=center)
    mean, rstd = m.mean if center else None, m.rstd(1e-5)
    y = normkit.normalize(x, weight, bias, center=center, **options)
    assert bits(normkit.apply(x, mean, rstd, weight, bias, **options)) == bits(y)
    sums = normkit.backward_sums(dy, x, mean, rstd, weight, bias=bias, **options)
    found = normkit.apply_backward(dy, x, mean, rstd, sums, m.count, weight, bias=bias, **options)
    dx = normkit.normalize_backward(dy, x, mean, rstd, weight, bias=bias, center=center, **options)[0]
    assert np.abs(found - dx).max() <= 1e-6 * np.abs(dx).max()


def test_adaptive(rng):
    content, style, dy = (uniform(rng, SMALL) for _ in range(3))
    for slopes in (drawn(rng, INSTANCE), 0.25, np.float64(0.25)):
        activation = ("prelu", slopes)
        y, mean, rstd = normkit.adaptive_instance_norm(content, style, activation=activation, return_stats=True)
        plain = normkit.adaptive_instance_norm(content, style)
        below = np.reshape(slopes, (-1, 1, 1))
        assert np.abs(y - np.where(plain > 0, plain, below * plain)).max() <= 1e-6 * np.abs(plain).max()
        given = dy, content, style, mean, rstd
        found = normkit.adaptive_instance_norm_backward(*given, activation=activation)
        through = np.where(plain > 0, dy, np.float32(below) * dy)
        expected = normkit.adaptive_instance_norm_backward(through, *given[1:])
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_nothing_to_sum(op):
    shape = (3, 5, 0, 7)
    x, slopes = np.ones(shape, np.float32), np.ones(op.weight_shape(shape, "channel"), np.float32)
    stats = (np.ones(op.statistics_shape(shape), np.float32),) * 2
    dslopes = op.backward(x, x, *stats, activation=("prelu", slopes), need=ALL)[3]
    assert dslopes.shape == slopes.shape
    assert not dslopes.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_poisons_its_own_channel_only(layout, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    slopes, before = drawn(rng, INSTANCE), None
    for value in (x[1, 2, 3, 4], np.nan):
        x[1, 2, 3, 4] = value
        y, mean, rstd = INSTANCE.statistics(x, activation=("prelu", slopes))
        found = y, INSTANCE.backward(dy, x, mean, rstd, activation=("prelu", slopes), need=ALL)[3]
        before = before or found
    y, dslopes = found
    assert np.isnan(y[1, 2]).all()
    assert np.isnan(dslopes[2])
    others = np.arange(5) != 2
    assert bits(dslopes[others]) == bits(before[1][others])


def test_thread_counts_agree(rng):
    dy, x = uniform(rng, (8, 16, 64, 64)), uniform(rng, (8, 16, 64, 64))
    slopes, stats, found = drawn(rng, INSTANCE, shape=x.shape), INSTANCE.statistics(x)[1:], []
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            gradients = INSTANCE.backward(dy, x, *stats, activation=("prelu", slopes), need=ALL)
            found.append([bits(a) for a in (INSTANCE.forward(x, activation=("prelu", slopes)), *gradients)])
    assert found[0] == found[1] == found[2]


# ---- errors ------------------------------------------------------------------------------------------------------

FORMS = r"expected \(5,\), \(3, 5\) or \(3, 5, 4, 7\): one element per channel of x, or one for all"
WRONG = {
    "alone": ("prelu", TypeError, r"slopes is None, expected an array or a number: activation is \('prelu', slopes\)"),
    "none": (("prelu", None), TypeError, r"slopes is None, expected an array or a number"),
    "list": (("prelu", [0.1] * 5), TypeError, "slopes is a list, expected a NumPy array or an object with __dlpack__"),
    "string": (("prelu", "0.1"), TypeError, "slopes is a str, expected a NumPy array or an object with __dlpack__"),
    "shape": (("prelu", np.ones(4, np.float32)), ValueError, rf"slopes has shape \(4,\), {FORMS}"),
    "dtype": (("prelu", np.ones(5, np.float16)), TypeError, "slopes has dtype float16, expected float32 or float64"),
    "integers": (("prelu", np.ones(5, int)), TypeError, "slopes has dtype int64, expected float32 or float64"),
    "triple": (("prelu", np.ones(5), 1), TypeError, "activation is "),
    "capitals": (("PReLU", np.float32(1)), ValueError, "activation is "),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(wrong):
    activation, kind, message = WRONG[wrong]
    x, s = np.ones(SMALL, np.float32), np.ones(SMALL[:2], np.float32)
    out = Guarded(SMALL, np.float32)
    with pytest.raises(kind, match=f"^{message}"):
        normkit.instance_norm(x, activation=activation, out=out.array)
    with pytest.raises(kind, match=f"^{message}"):
        normkit.instance_norm_backward(x, x, s, s, activation=activation, out=out.array)
    assert out.unwritten()


def test_slopes_and_what_is_written_lie_apart():
    x, s = np.ones(SMALL, np.float32), np.ones(SMALL[:2], np.float32)
    activation = ("prelu", x[0, :, 0, 0])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^out overlaps slopes, expected memory apart$"):
            normkit.instance_norm(x, activation=activation, out=x)
        with pytest.raises(ValueError, match=r"^out overlaps slopes, expected memory apart$"):
            normkit.instance_norm_backward(x.copy(), x, s, s, activation=activation, out=x)
        normkit.instance_norm(x.copy(), activation=activation, out=x.copy())


@pytest.mark.parametrize("activation", [None, "relu", ("leaky_relu", 0.1)], ids=str)
def test_dslopes_of_no_slopes(activation):
    x, s = np.ones(SMALL, np.float32), np.ones(SMALL[:2], np.float32)
    message = r"^need has 'dslopes', expected it with \('prelu', slopes\) as activation alone$"
    with pytest.raises(ValueError, match=message):
        normkit.instance_norm_backward(x, x, s, s, activation=activation, need=ALL)
