"""Masks: statistics over the members alone, outputs of all elements, gradients through both."""

import bounds
import normkit
import numpy as np
import pytest
from activations import ACTIVATIONS, name_of
from cases import CHANNELS_LAST, DTYPES, INTEGERS, LAYOUTS, MASKS, SHAPES, SHARED_MEMORY, Guarded, bits, lay, uniform
from checks import check_backward, check_forward
from reference import OPERATIONS, REGISTRY, wide

INSTANCE, BATCH = OPERATIONS["instance"], OPERATIONS["batch"]
SMALL = (3, 5, 4, 7)
# A kernel of every kind: along runs and across lanes, with neighbors to fold, not centered.
FEW = [OPERATIONS[name] for name in ("instance", "group-last", "batch", "layer", "rms", "over-first", "over-channels")]
FUSED = [name for name in normkit.isas() if name != "sse4"]


def masked(rng, shape, mask, dtype=np.float32):
    """dy, x and a mask; what is no member is far away, so that none gets in unnoticed."""
    dy, x, where = uniform(rng, shape, dtype), uniform(rng, shape, dtype, offset=0.25), MASKS[mask](rng, shape)
    if x.dtype in DTYPES.values():
        x[~np.broadcast_to(where, shape)] += np.asarray(30, dtype)
    return dy, x, where


def parameters(op, shape, rng, kind="channel"):
    return [np.asarray(rng.standard_normal(op.weight_shape(shape, kind))).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_operation(op, mask, isa, rng):
    dy, x, where = masked(rng, SMALL, mask)
    weight, bias = parameters(op, SMALL, rng)
    check_forward(op, x, weight, bias, where=where)
    check_backward(op, dy, x, weight, where=where)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("mask", ["random", "image-and-position", "lengths", "single-member", "stepped"])
@pytest.mark.parametrize("op", FEW, ids=repr)
def test_every_dtype(op, mask, dtype, isa, rng):
    dy, x, where = masked(rng, SMALL, mask, dtype)
    check_forward(op, x, where=where)
    if dtype in DTYPES.values():
        check_backward(op, dy, x, where=where)


@pytest.mark.parametrize("mask", ["random", "tokens", "image-and-position", "transposed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", FEW, ids=repr)
def test_every_layout(op, layout, mask, isa, rng):
    dy, x, where = masked(rng, SMALL, mask)
    x, dy = lay(x, layout), lay(dy, layout)
    check_forward(op, x, where=where)
    check_backward(op, dy, x, where=where)


@pytest.mark.parametrize("mask_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", FEW, ids=repr)
def test_every_layout_of_the_mask(op, layout, mask_layout, isa, rng):
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    where = lay(MASKS["random"](rng, SMALL), mask_layout)
    check_forward(op, x, where=where)
    check_backward(op, dy, x, where=where)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mask", ["random", "sparse", "image-and-position"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_length(shape, mask, dtype, isa, rng):
    dy, x, where = masked(rng, SHAPES[shape], mask, DTYPES[dtype])
    check_forward(INSTANCE, x, where=where)
    check_backward(INSTANCE, dy, x, where=where)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mask", ["random", "sparse", "image-and-position"])
@pytest.mark.parametrize("shape", CHANNELS_LAST)
def test_every_length_across_lanes(shape, mask, dtype, isa, rng):
    dy, x, where = masked(rng, CHANNELS_LAST[shape], mask, DTYPES[dtype])
    x, dy = lay(x, "channels-last"), lay(dy, "channels-last")
    check_forward(INSTANCE, x, where=where)
    check_backward(INSTANCE, dy, x, where=where)


@pytest.mark.parametrize("kind", ["pixel", "kept", "last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_weight(op, layout, kind, isa, rng):
    dy, x, where = masked(rng, SMALL, "random")
    x, dy = lay(x, layout), lay(dy, layout)
    weight, bias = parameters(op, SMALL, rng, kind)
    check_forward(op, x, weight, bias, where=where)
    check_backward(op, dy, x, weight, where=where)


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 11, 11), (2, 17, 64, 64)], ids=str)
def test_offsets_cost_no_digits(shape, layout, offset, isa, rng):
    dy, x = lay(uniform(rng, shape), layout), lay(uniform(rng, shape, offset=offset), layout)
    where = MASKS["random"](rng, shape)
    x[~where] = 0
    check_forward(INSTANCE, x, where=where)
    check_backward(INSTANCE, dy, x, where=where)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS, "prelu"], ids=name_of)
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_what_is_no_member_may_hold_anything(op, layout, dtype, value, kind, activation, rng):
    """NaN and Inf under the mask touch their own y alone: everything else keeps its bits, gradients too."""
    shape = (3, 5, 4, 37)
    where = MASKS["random"](rng, shape)
    x = lay(uniform(rng, shape, dtype), layout)
    dy = lay(np.where(where, uniform(rng, shape, dtype), np.zeros((), dtype)), layout)
    weight, bias = parameters(op, shape, rng, kind)
    slopes = rng.random(weight.shape).astype(np.float32)
    through = {"bias": bias, "activation": ("prelu", slopes) if activation == "prelu" else activation}
    clean = op.statistics(x, where=where)
    gradients = op.backward(dy, x, *clean[1:], weight, where=where, **through)
    x[~where] = value
    y, *stats = op.statistics(x, where=where)
    found = op.backward(dy, x, *stats, weight, where=where, **through)
    assert [bits(g) for g in found] == [bits(g) for g in gradients]
    assert bits(y[where]) == bits(clean[0][where])
    assert not np.isfinite(y[~where].astype(np.float32)).any()
    assert [bits(s) for s in stats if s is not None] == [bits(s) for s in clean[1:] if s is not None]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_in_a_member_poisons_its_own_instance(layout, isa, rng):
    shape, where = (3, 5, 37), np.ones((3, 5, 37), bool)
    where[..., ::3] = False
    x = lay(uniform(rng, shape), layout)
    clean = INSTANCE.statistics(x, where=where)
    x[1, 2, 1] = np.nan
    others = np.ones((3, 5), bool)
    others[1, 2] = False
    for before, after in zip(clean, INSTANCE.statistics(x, where=where), strict=True):
        assert bits(before[others]) == bits(after[others])
        assert np.isnan(after[1, 2]).all()


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_no_members_give_exactly_the_bias(op, layout, dtype, eps, isa, rng):
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    weight, bias = parameters(op, SMALL, rng)
    where = np.zeros((), bool)
    y, mean, rstd = op.statistics(x, weight=weight, bias=bias, eps=eps, where=where)
    expected = op.reference(x, weight, bias).bias
    assert bits(y) == bits(expected.astype(dtype).reshape(SMALL))
    assert not rstd.any()
    assert mean is None or not mean.any()
    dx, dweight, dbias = op.backward(dy, x, mean, rstd, weight, where=where)
    assert not dx.any()
    assert not dweight.any()
    assert dbias.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 17, 300), (1, 2, 9000)], ids=str)
def test_one_member_gives_its_own_mean(shape, layout, isa, rng):
    """A variance of 0: rstd is that of eps alone, exactly the bias at the member, finite everywhere else."""
    x = lay(uniform(rng, shape), layout)
    where = np.zeros(shape[2:], bool)
    where[(1,) * where.ndim] = True
    y, mean, rstd = INSTANCE.statistics(x, where=where)
    assert (mean == x[:, :, where][..., 0]).all()
    assert (rstd == np.float32(1 / np.sqrt(1e-5))).all()
    assert not y[:, :, where].any()
    assert not INSTANCE.forward(x, where=where, eps=0.0).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1e6, 3e4])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 17, 300), (1, 2, 9000)], ids=str)
def test_constant_members_give_exactly_the_bias(shape, value, layout, isa, rng):
    """Elements that are no members may hold anything: a kernel must not make its pivot of them."""
    x, where = lay(uniform(rng, shape), layout), MASKS["random"](rng, shape)
    x[where] = value
    bias = rng.standard_normal(shape[1]).astype(np.float32)
    y = INSTANCE.forward(x, None, bias, where=where)
    expected = np.broadcast_to(bias.reshape(-1, *[1] * (len(shape) - 2)), shape)
    assert bits(y[where]) == bits(expected[where])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("outlier", [1e6, 1e18])
@pytest.mark.parametrize("shape", [(2, 3, 129), (2, 17, 300), (1, 2, 9000)], ids=str)
def test_the_first_member_is_a_bad_pivot(shape, outlier, layout, isa, rng):
    x, where = lay(uniform(rng, shape), layout), MASKS["random"](rng, shape)
    where[..., :3] = [False, False, True]
    x[:, :, 2] = outlier
    check_forward(INSTANCE, x, where=where)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in SHARED_MEMORY])
def test_out(layout, dtype, isa, rng):
    """An out that is given, or x itself, has the bits of a fresh result, and no byte beside them is written."""
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    where = MASKS["random"](rng, SMALL)
    y, mean, rstd = INSTANCE.statistics(x, where=where)
    dx = INSTANCE.backward(dy, x, mean, rstd, where=where)[0]
    out = Guarded(SMALL, dtype, layout)
    assert INSTANCE.forward(x, where=where, out=out.array) is out.array
    assert bits(out.array) == bits(y)
    assert bits(INSTANCE.backward(dy, x, mean, rstd, where=where, out=out.array)[0]) == bits(dx)
    assert out.untouched()
    assert bits(INSTANCE.backward(dy, x, mean, rstd, where=where, out=dy)[0]) == bits(dx)
    assert bits(INSTANCE.forward(x, where=where, out=x)) == bits(y)


@pytest.mark.parametrize("need", [(), ("dx",), ("dweight",), ("dbias",), ("dx", "dbias")], ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_need_leaves_out_what_is_not_named(op, need, rng):
    dy, x, where = masked(rng, SMALL, "random")
    weight = parameters(op, SMALL, rng)[0]
    stats = op.statistics(x, where=where)[1:]
    everything = op.backward(dy, x, *stats, weight, where=where)
    for name, whole, found in zip(
        ("dx", "dweight", "dbias"), everything, op.backward(dy, x, *stats, weight, where=where, need=need), strict=True
    ):
        assert (found is not None) == (name in need)
        assert found is None or bits(found) == bits(whole)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_statistics_have_no_members(op, layout, rng):
    """Constants do not depend on a mask: the same bits without it."""
    dy, x = (lay(uniform(rng, SMALL), layout) for _ in range(2))
    where, weight = MASKS["random"](rng, SMALL), parameters(op, SMALL, rng)[0]
    stats = op.statistics(x)[1:]
    plain = op.backward(dy, x, *stats, weight, use_input_stats=False)
    found = op.backward(dy, x, *stats, weight, use_input_stats=False, where=where)
    assert [bits(a) for a in found] == [bits(a) for a in plain]
    dy[~where] = 0
    plain = op.backward(dy, x, *stats, weight, use_input_stats=False)
    x[~where] = np.nan  # no member, and no gradient reaches it
    found = op.backward(dy, x, *stats, weight, use_input_stats=False, where=where)
    assert [bits(a) for a in found] == [bits(a) for a in plain]
    x[~where] = 0
    if op.function in ("instance_norm", "batch_norm"):
        channel = op.options(SMALL)["channel_axis"]
        running = {"running_mean": np.ones(SMALL[channel]), "running_var": np.full(SMALL[channel], 2.0)}
        frozen = {op.stats_option: False, **running}
        assert bits(op.forward(x, where=where, **frozen)) == bits(op.forward(x, **frozen))


@pytest.mark.parametrize("running_dtype", ["float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", [INSTANCE, BATCH], ids=repr)
def test_running_statistics_follow_the_members(op, layout, running_dtype, isa, rng):
    """The unbiased variance divides by the count less one; whoever has fewer than two members does not take part."""
    x = lay(uniform(rng, SMALL, offset=3.0), layout)
    where = MASKS["random"](rng, SMALL)
    where[0, 1], where[1, 2] = False, False  # an image less for two channels
    where[:, 3] = False  # no member at all
    where[2, 4] = False
    where[2, 4, 1, 1] = True  # one member
    if op is BATCH:
        where[:, 4] = where[2, 4] & (np.arange(3).reshape(3, 1, 1) == 2)
    mean, var = rng.standard_normal(5).astype(running_dtype), rng.uniform(1, 2, 5).astype(running_dtype)
    before = mean.copy(), var.copy()
    y = op.forward(x, where=where, running_mean=mean, running_var=var, momentum=0.25)
    assert bits(y) == bits(op.forward(x, where=where))

    f = op.reference(x, where=where)
    taken = f.members >= 2
    images = np.maximum(taken.sum((0, 2, 3)), 1)
    unbiased = f.var * f.members / np.maximum(f.members - 1, 1)
    off = bounds.mean(f, x.dtype), 2 * bounds.rstd_error(f, x.dtype) * (1 + 1e-5) * unbiased + 2.0**-24 * unbiased
    for found, old, new, error in zip((mean, var), before, (f.mean, unbiased), off, strict=True):
        new, error = (np.where(taken, a, 0).sum((0, 2, 3)) / images for a in (new, error))
        expected = np.where(taken.any((0, 2, 3)), 0.75 * wide(old) + 0.25 * new, wide(old))
        assert bounds.excess(found, expected, 0.25 * error + 2 * bounds.stored(expected, running_dtype)) <= 1
    kept = ~taken.any((0, 2, 3))
    assert kept[3]
    assert kept[4] == (op is BATCH)
    assert bits(mean[kept]) == bits(before[0][kept])
    assert bits(var[kept]) == bits(before[1][kept])


@pytest.mark.parametrize("op", [INSTANCE, OPERATIONS["layer"], OPERATIONS["over-first"]], ids=repr)
def test_empty(op):
    for shape in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        x, where = np.zeros(shape, np.float32), np.ones(shape, bool)
        y, mean, rstd = op.statistics(x, where=where)
        assert y.shape == shape
        assert rstd.shape == op.statistics_shape(shape)
        dx, dweight, dbias = op.backward(x, x, mean, rstd, where=where)
        assert dx.shape == shape
        assert not dweight.any()
        assert not dbias.any()


def everything(op, dy, x, where):
    y, mean, rstd = op.statistics(x, where=where)
    stats = (rstd,) if mean is None else (mean, rstd)
    return [bits(a) for a in (y, *stats, *op.backward(dy, x, mean, rstd, where=where))]


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add: nothing to compare")
@pytest.mark.parametrize("mask", ["random", "sparse", "image-and-position", "lengths", "tokens"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_instruction_sets_agree(op, layout, mask, rng):
    shape = (3, 5, 6, 23)
    dy, x, where = masked(rng, shape, mask)
    x, dy = lay(x, layout), lay(dy, layout)
    found = []
    for name in FUSED:
        with normkit.use_isa(name):
            found.append(everything(op, dy, x, where))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("mask", ["random", "image-and-position"])
@pytest.mark.parametrize("case", [((64, 16, 32, 32), "contiguous"), ((64, 90, 14, 14), "contiguous"),
                                  ((1, 2, 400, 300), "contiguous"),
                                  ((1, 24, 150, 60), "channels-last")], ids=str)  # fmt: skip
def test_thread_counts_agree(case, mask, rng):
    shape, layout = case
    dy, x, where = masked(rng, shape, mask)
    x, dy = lay(x, layout), lay(dy, layout)
    found = []
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            found.append(everything(INSTANCE, dy, x, where))
    assert all(f == found[0] for f in found)


# Around whole vectors and blocks of four, of floats and of doubles, and the longest that go in batches.
RUNS = [1, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 100, 196, 511, 512, 513, 1023, 1024, 1025]
SHORT = {
    "some": lambda rng, shape: rng.random(shape) < 0.8,
    "shared": lambda rng, shape: rng.random((shape[0], 1, shape[2])) < 0.5,
    "none-in-some-rows": lambda rng, shape: (rng.random(shape) < 0.9) & (np.arange(shape[1])[:, None] % 3 > 0),
    "none-in-the-first-vector": lambda rng, shape: np.broadcast_to(np.arange(shape[2]) >= min(shape[2] - 1, 20), shape),
    "one": lambda rng, shape: np.arange(shape[2]) == rng.integers(0, shape[2], (*shape[:2], 1)),
}


@pytest.mark.parametrize("mask", SHORT)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.uint8], ids=[*DTYPES, "uint8"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_short_rows_in_batches_are_rows_one_by_one(run, center, dtype, mask, isa, rng):
    """The two phases take rows one by one. What is no member is NaN, some rows are constant, dx lies over x or dy."""
    shape = (2, 19, run)
    where, dy, x = SHORT[mask](rng, shape), uniform(rng, shape), uniform(rng, shape, dtype, offset=1.0)
    x[0, ::4] = x[0, 0, :1]
    if dtype != np.uint8:
        x[~np.broadcast_to(where, shape)] = np.nan
        dy = np.where(where, dy, 0).astype(dtype)
    phase = {"axis": 2, "where": where}
    options = phase | {"center": center}
    y, *stats = normkit.normalize(x, return_stats=True, **options)
    m = normkit.moments(x, **options)
    mean, rstd = (stats[0] if center else None), stats[-1]
    assert bits(m.rstd().astype(rstd.dtype)) == bits(rstd)
    assert not center or bits(m.mean.astype(rstd.dtype)) == bits(mean)
    assert bits(normkit.apply(x, m if center else None, m.rstd(), axis=2)) == bits(y)
    if dtype == np.uint8:
        return
    dx = normkit.normalize_backward(dy, x, mean, rstd, **options)[0]
    sums = normkit.backward_sums(dy, x, mean, rstd, **phase)
    assert bits(normkit.apply_backward(dy, x, mean, rstd, sums, m.count, **phase)) == bits(dx)
    over_x, over_dy = x.copy(), dy.copy()
    assert bits(normkit.normalize(over_x, out=over_x, **options)) == bits(y)
    assert bits(normkit.normalize_backward(over_dy, x, mean, rstd, out=over_dy, **options)[0]) == bits(dx)
    assert bits(normkit.normalize_backward(dy, x, mean, rstd, out=x, **options)[0]) == bits(dx)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_an_image_has_the_same_bits_in_every_batch(layout, isa, rng):
    dy, x, where = masked(rng, (5, 17, 20, 20), "random")
    x, dy = lay(x, layout), lay(dy, layout)
    y, mean, rstd = INSTANCE.statistics(x, where=where)
    dx = INSTANCE.backward(dy, x, mean, rstd, where=where)[0]
    for images in (slice(0, 1), slice(1, 4)):
        part = INSTANCE.statistics(x[images], where=where[images])
        assert [bits(a) for a in part] == [bits(a[images]) for a in (y, mean, rstd)]
        assert bits(INSTANCE.backward(dy[images], x[images], *part[1:], where=where[images])[0]) == bits(dx[images])


def test_a_padded_batch_has_the_values_of_each_sequence_alone(rng):
    """Lengths as a mask, against every sequence by itself, cut to its length."""
    shape, lengths = (4, 6, 50), (50, 1, 17, 33)
    x = uniform(rng, shape)
    where = np.arange(50) < np.array(lengths).reshape(4, 1, 1)
    y = normkit.instance_norm(x, where=where)
    for n, length in enumerate(lengths):
        f = INSTANCE.reference(x[n : n + 1, :, :length])
        assert bounds.excess(y[n : n + 1, :, :length], f.y, bounds.y(f, x.dtype)) <= 1


ERRORS = {
    "dtype": (np.ones((2, 3, 8), np.float32), TypeError, "where has dtype float32, expected bool"),
    "dtype-of-bytes": (np.ones((2, 3, 8), np.uint8), TypeError, "where has dtype uint8, expected bool"),
    "shape": (
        np.ones(4, bool),
        ValueError,
        "where has shape (4,), expected a shape that broadcasts against x: (2, 3, 8)",
    ),
    "more-axes": (
        np.ones((1, 2, 3, 8), bool),
        ValueError,
        "where has shape (1, 2, 3, 8), expected a shape that broadcasts against x: (2, 3, 8)",
    ),
}


@pytest.mark.parametrize(("where", "kind", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_errors(op, where, kind, message):
    """Messages are right to the letter, and nothing is written before them."""
    x = np.ones((2, 3, 8), np.float32)
    out = Guarded(x.shape, np.float32)
    stats = op.statistics(x)[1:]
    for call in (
        lambda: op.forward(x, where=where, out=out.array),
        lambda: op.backward(x, x, *stats, where=where, out=out.array),
    ):
        with pytest.raises(kind) as error:
            call()
        assert str(error.value) == message
    assert out.unwritten()
