"""Results have the same bits on every instruction set with fused multiply-add, whatever the threads, batch and run."""

import normkit
import numpy as np
import pytest
from cases import CHANNELS_LAST, DTYPES, INTEGERS, SHAPES, Guarded, bits, lay, misalignment, uniform
from reference import OPERATIONS, REGISTRY

INSTANCE = OPERATIONS["instance"]
FUSED = [name for name in normkit.isas() if name != "sse4"]
EVERY_SHAPE = {name: (shape, "contiguous") for name, shape in SHAPES.items()} | {
    f"channels-last-{name}": (shape, "channels-last") for name, shape in CHANNELS_LAST.items()
}
# Large enough that threads share the work: many statistics, few long ones, many steps.
LARGE = {
    "many": (64, 16, 32, 32),
    "few": (1, 2, 400, 700),
    "one": (1, 1, 700001),
    "one-channels-last": (1, 24, 150, 180),
}


def results(op, x, dy, weight=None):
    """Everything that forward and backward return, as bits."""
    y, mean, rstd = op.statistics(x, weight=weight, bias=weight)
    found = [y, rstd] + ([mean] if op.center else [])
    if dy is not None:
        found += op.backward(dy, x, mean, rstd, weight)
    return [bits(a) for a in found]


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add: nothing to compare")
@pytest.mark.parametrize("dtype", [*DTYPES.values(), *INTEGERS.values()], ids=[*DTYPES, *INTEGERS])
@pytest.mark.parametrize("case", EVERY_SHAPE)
def test_instruction_sets_agree(case, dtype, rng):
    shape, layout = EVERY_SHAPE[case]
    x = lay(uniform(rng, shape, dtype, offset=0.3), layout)
    dy = lay(uniform(rng, shape, dtype), layout) if dtype in DTYPES.values() else None
    weight = rng.standard_normal(shape[1]).astype(np.float32)
    found = []
    for name in FUSED:
        with normkit.use_isa(name):
            found.append(results(INSTANCE, x, dy, weight))
    assert all(f == found[0] for f in found)


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add: nothing to compare")
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop", "fortran"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_instruction_sets_agree_on_every_operation(op, layout, kind, rng):
    shape = (3, 5, 6, 23)
    dy, x = (lay(uniform(rng, shape), layout) for _ in range(2))
    weight = rng.standard_normal(op.weight_shape(shape, kind)).astype(np.float32)
    found = []
    for name in FUSED:
        with normkit.use_isa(name):
            found.append(results(op, x, dy, weight))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("data", ["outlier", "tiny", "huge"])
@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add: nothing to compare")
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 50), (2, 3, 200), (1, 2, 9000)], ids=str)
def test_instruction_sets_agree_on_data_that_starts_again_in_double(shape, layout, data, rng):
    x = lay(uniform(rng, shape) * np.float32({"outlier": 1, "tiny": 1e-25, "huge": 1e25}[data]), layout)
    if data == "outlier":
        x[:, :, 0] = 1e9
    found = []
    for name in FUSED:
        with normkit.use_isa(name):
            found.append(results(INSTANCE, x, None))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("kind", ["channel", "pixel"])
@pytest.mark.parametrize("case", LARGE)
def test_thread_counts_agree(case, kind, dtype, rng):
    if dtype not in DTYPES:
        pytest.importorskip("ml_dtypes", reason="bfloat16 on NumPy is ml_dtypes'")
    shape = LARGE[case]
    layout = "channels-last" if case.endswith("channels-last") else "contiguous"
    dy, x = (lay(uniform(rng, shape, DTYPES[dtype]), layout) for _ in range(2))
    weight = rng.standard_normal(INSTANCE.weight_shape(shape, kind)).astype(np.float32)
    found = []
    for count in (1, 2, 3, 7):
        with normkit.num_threads(count):
            found.append(results(INSTANCE, x, dy, weight))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("op", [op for op in REGISTRY if op.name != "instance"], ids=repr)
def test_thread_counts_agree_on_every_operation(op, rng):
    shape = (130, 3, 17, 100)
    dy, x = uniform(rng, shape), uniform(rng, shape)
    found = []
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            found.append(results(op, x, dy))
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (5, 3, 4200), (5, 17, 20, 20)], ids=str)
def test_an_image_has_the_same_bits_in_every_batch(shape, layout, isa, rng):
    dy, x = (lay(uniform(rng, shape), layout) for _ in range(2))
    y, mean, rstd = INSTANCE.statistics(x)
    dx = INSTANCE.backward(dy, x, mean, rstd, need=("dx",))[0]
    for images in (slice(0, 1), slice(2, 3), slice(1, 4), slice(4, 5)):
        part = INSTANCE.statistics(x[images])
        assert [bits(a) for a in part] == [bits(a[images]) for a in (y, mean, rstd)]
        part_dx = INSTANCE.backward(dy[images], x[images], *part[1:], need=("dx",))[0]
        assert bits(part_dx) == bits(dx[images])


@pytest.mark.parametrize("images", [1, 2, 40])
@pytest.mark.parametrize("shape", [(3, 224, 224), (17, 50, 50)], ids=str)
def test_the_size_of_the_batch_changes_nothing(shape, images, rng):
    """A schedule may look at the batch, and at the number of threads; the bits may not."""
    x = np.repeat(uniform(rng, (1, *shape)), images, axis=0)
    with normkit.num_threads(1):
        alone = bits(INSTANCE.forward(x[:1]))
    for count in (1, 2, 4):
        with normkit.num_threads(count):
            y = INSTANCE.forward(x)
        assert {bits(y[k]) for k in range(images)} == {alone}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 49), (2, 3, 129), (1, 2, 5000)], ids=str)
def test_alignment_changes_nothing(shape, dtype, isa, rng):
    values, gradient = uniform(rng, shape, dtype), uniform(rng, shape, dtype)
    expected = results(INSTANCE, values, gradient)
    step = misalignment(dtype)
    for shift in range(step, 17, step):
        buffers = [np.empty(values.nbytes + 64, np.uint8) for _ in range(2)]
        x, dy = (np.ndarray(shape, dtype, buffer, shift) for buffer in buffers)
        x[...], dy[...] = values, gradient
        assert results(INSTANCE, x, dy) == expected


@pytest.mark.parametrize("case", LARGE)
def test_out_of_any_alignment_has_the_same_bits(case, isa, rng):
    """Large outputs may go past the caches, with a head and a tail that do not."""
    shape = LARGE[case]
    x = uniform(rng, shape)
    expected = bits(INSTANCE.forward(x))
    for layout in ("contiguous", "misaligned"):
        out = Guarded(shape, np.float32, layout)
        INSTANCE.forward(x, out=out.array)
        assert bits(out.array) == expected
        assert out.untouched()


@pytest.mark.parametrize("case", LARGE)
def test_runs_repeat(case, rng):
    shape = LARGE[case]
    dy, x = uniform(rng, shape), uniform(rng, shape)
    expected = results(INSTANCE, x, dy)
    assert all(results(INSTANCE, x, dy) == expected for _ in range(5))


@pytest.mark.parametrize("layout", ["crop", "reversed", "step"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_gaps_are_not_read(op, layout, rng):
    """The result has the same bits whatever lies between the elements of x."""
    values = uniform(rng, (3, 5, 4, 7))
    x = lay(values, layout)
    expected = bits(op.forward(x))
    again = Guarded(values.shape, values.dtype, layout)
    again.buffer[...] = 0xFF  # NaN
    again.array[...] = values
    assert bits(op.forward(again.array)) == expected


# Of short rows over images: channels that have common divisors, and a prime number of them; rows of one element.
MANY_CHANNELS = {"pixels": (5, 2000, 7, 7), "prime": (3, 4099, 5), "samples": (70, 4096), "long": (2, 640, 33)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mask_of", ["", "elements", "images"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", MANY_CHANNELS.values(), ids=MANY_CHANNELS)
def test_a_channel_has_the_same_bits_among_many(shape, dtype, mask_of, threads, isa, rng):
    axis, ones = (0, *range(2, len(shape))), (1,) * (len(shape) - 2)
    x, dy, ddx = (uniform(rng, shape, dtype) for _ in range(3))
    weight, bias, slopes = (rng.standard_normal((shape[1], *ones)).astype(np.float32) for _ in range(3))
    where = rng.random(shape) < 0.7 if mask_of else None
    if mask_of == "images":  # one for all channels
        where = np.broadcast_to(where[:, :1], shape)

    def found(channels):
        x_, dy_, ddx_ = (a[:, channels].copy() for a in (x, dy, ddx))
        w, b, s = (a[channels] for a in (weight, bias, slopes))
        mask = None if where is None else where[:, channels]
        options = {"axis": axis, "where": mask, "activation": ("prelu", s)}
        y, mean, rstd = normkit.normalize(x_, w, b, return_stats=True, **options)
        dx, *others = normkit.normalize_backward(dy_, x_, mean, rstd, w, bias=b, **options)
        constants = normkit.normalize_backward(dy_, x_, mean, rstd, w, axis=axis, where=mask, use_input_stats=False)
        second = normkit.normalize_double_backward(ddx_, None, None, dy_, x_, mean, rstd, w, axis=axis, where=mask)
        by_element = [y, dx, constants[0], *second[:2]]
        return by_element, [mean, rstd, *others, *constants[1:], second[2]]

    with normkit.num_threads(threads):
        by_element, by_channel = found(np.s_[:])
        few = np.s_[-20:-4]
        some_by_element, some_by_channel = found(few)
    assert [bits(a[:, few]) for a in by_element] == [bits(a) for a in some_by_element]
    assert [bits(a[few]) for a in by_channel] == [bits(a) for a in some_by_channel]


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("mask_of", ["", "pixels", "elements", "channels"])
@pytest.mark.parametrize("channels", [2, 3, 8, 15, 16])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(np.uint8)], ids=[*DTYPES, "uint8"])
def test_few_channels_last_have_the_bits_that_they_have_among_many(dtype, channels, mask_of, activation, isa, rng):
    """Several steps of few channels are summed together, and a mask goes with them."""
    shape = (2, 37, 23, 64)  # pixels that are no whole blocks
    has_gradients = dtype != np.uint8
    x, dy = (uniform(rng, shape, dtype) if has_gradients else rng.integers(0, 256, shape, dtype) for _ in range(2))
    weight, bias = uniform(rng, (2, 64))
    masks = {"": None, "pixels": (2, 37, 23, 1), "elements": shape, "channels": (64,)}
    where = None if not mask_of else rng.random(masks[mask_of]) < 0.7

    def found(of):
        x_, dy_ = x[..., of].copy(), dy[..., of].copy()
        mask = where if mask_of in ("", "pixels") else where[..., of]
        w, b = weight[of], bias[of]
        options = {"axis": (1, 2), "where": mask, "activation": activation}
        y, mean, rstd = normkit.normalize(x_, w, b, return_stats=True, **options)
        gradients = normkit.normalize_backward(dy_, x_, mean, rstd, w, bias=b, **options) if has_gradients else ()
        return [a.reshape(-1, a.shape[-1]) for a in (y, mean, rstd, *gradients)]

    for few, many in zip(found(np.s_[:channels]), found(np.s_[:]), strict=True):
        assert bits(few) == bits(many[:, :channels].copy())


@pytest.mark.parametrize("order", [(2, 1, 3), (3, 1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("axis", "shape"), [((1,), (1, 5, 6)), ((2,), (4, 1, 6))], ids=["first", "middle"])
def test_parameters_that_are_repeated_leave_a_sample_its_bits(axis, shape, order, isa, rng):
    """Along axes on both sides of the reduced one; `order`: the axes of a sample, from the slowest in memory on."""
    axes = (0, *order)
    stored = uniform(rng, (2, *(np.array((3, 4, 5, 6))[list(axes)])), np.float32)
    x, dy = stored.transpose(0, *(1 + np.argsort(axes)))
    weight = uniform(rng, shape)

    def found(x_, dy_):
        y, mean, rstd = normkit.normalize(x_, weight, weight, axis=axis, return_stats=True)
        return y, normkit.normalize_backward(dy_, x_, mean, rstd, weight, axis=axis, need=("dx",))[0]

    for batch, alone in zip(found(x, dy), found(x[1:2], dy[1:2]), strict=True):
        assert bits(batch[1:2]) == bits(alone)
