"""A residual: the bits of the same call on the sum, in every layout; its gradient, added before dx is rounded."""

import bounds
import normkit
import numpy as np
import pytest
from cases import DTYPES, INTEGERS, LAYOUTS, MASKS, SHAPES, SHARED_MEMORY, Guarded, bits, lay, uniform
from checks import check_backward, same_order, unchanged
from reference import OPERATIONS, REGISTRY

INSTANCE = OPERATIONS["instance"]
SMALL = (3, 5, 4, 7)
WRITABLE = [name for name in LAYOUTS if name not in SHARED_MEMORY]


def summed(x, residual, layout):
    """x + residual, rounded to their dtype, where x lies."""
    return lay((x + residual).astype(x.dtype), layout)


def check_residual(op, x, residual, layout, **options):
    """Every output of the call on the sum, to the bit, and that sum.

    The sum lies where x does or, without its gaps, as it is returned: the order of summation may be that of either.
    """
    s = summed(x, residual, layout)
    with unchanged(x, residual):
        *found, returned = op.forward(x, residual=residual, return_residual=True, return_stats=True, **options)
    expected = [[bits(a) for a in op.forward(a, return_stats=True, **options)] for a in (s, returned)]
    assert [bits(a) for a in found] in expected
    assert (returned.shape, returned.dtype) == (x.shape, x.dtype)
    assert bits(returned) == bits(s)
    assert same_order(x, returned)
    assert same_order(x, found[0])
    y, again = op.forward(x, residual=residual, return_residual=True, **options)
    assert (bits(y), bits(again)) == (bits(found[0]), bits(s))
    assert bits(op.forward(x, residual=residual, **options)) == bits(y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_every_layout(op, layout, dtype, isa, rng):
    x, residual = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    weight = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32)
    check_residual(op, x, residual, layout, weight=weight, bias=weight)


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("op", [OPERATIONS[name] for name in ("instance", "layer", "over-first")], ids=repr)
def test_a_residual_that_lies_otherwise(op, layout, other, isa, rng):
    x, residual = lay(uniform(rng, SMALL), layout), lay(uniform(rng, SMALL), other)
    check_residual(op, x, residual, layout)


@pytest.mark.parametrize("layout", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_an_x_that_shares_memory(op, layout, isa, rng):
    """The sum shares no memory, which makes another geometry, with the same bounds."""
    x, residual = lay(uniform(rng, SMALL), layout), uniform(rng, SMALL)
    y, s = op.forward(x, residual=residual, return_residual=True)
    assert bits(s) == bits(x + residual)
    f = op.reference(x + residual)
    assert bounds.excess(y.reshape(f.y.shape), f.y, bounds.y(f, x.dtype)) <= 1


@pytest.mark.parametrize("broadcast", [(1, 5, 4, 7), (3, 1, 1, 1), (1, 1, 1, 7), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_a_broadcast_residual(op, broadcast, isa, rng):
    x, residual = uniform(rng, SMALL), np.broadcast_to(uniform(rng, broadcast), SMALL)
    check_residual(op, x, residual, "contiguous")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_length(shape, layout, dtype, isa, rng):
    """x and the residual are of very different sizes, so that their sum is rounded."""
    x, residual = (lay(uniform(rng, SHAPES[shape], dtype, std=std), layout) for std in (1, 37))
    check_residual(INSTANCE, x, residual, layout)


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_with_all_other_options(op, isa, rng):
    x, residual = uniform(rng, SMALL), uniform(rng, SMALL)
    weight = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32)
    options = {"where": MASKS["random"](rng, SMALL), "activation": "gelu", "weight_offset": 1.0}
    check_residual(op, x, residual, "contiguous", weight=weight, bias=weight, **options)


@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_out_dtype(dtype, out_dtype, isa, rng):
    """out_dtype is the dtype of y; the sum keeps the dtype of x."""
    x, residual = uniform(rng, SMALL, dtype), uniform(rng, SMALL, dtype)
    y, s = INSTANCE.forward(x, residual=residual, return_residual=True, out_dtype=out_dtype)
    assert (y.dtype, s.dtype) == (out_dtype, dtype)
    assert bits(y) == bits(INSTANCE.forward(x + residual, out_dtype=out_dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", WRITABLE)
def test_out(layout, dtype, isa, rng):
    """An out that is given, or x itself, has the bits of a fresh result, and no byte beside them is written."""
    x, residual = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    y, s = INSTANCE.forward(x, residual=residual, return_residual=True)
    out = Guarded(SMALL, dtype, layout)
    found, returned = INSTANCE.forward(x, residual=residual, return_residual=True, out=out.array)
    assert found is out.array
    assert (bits(found), bits(returned)) == (bits(y), bits(s))
    assert out.untouched()
    found, returned = INSTANCE.forward(x, residual=residual, return_residual=True, out=x)
    assert found is x
    assert (bits(found), bits(returned)) == (bits(y), bits(s))


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_x_as_its_own_residual(op, rng):
    x = uniform(rng, SMALL)
    assert bits(op.forward(x, residual=x)) == bits(op.forward(x + x))


@pytest.mark.parametrize("case", [((64, 16, 32, 32), "contiguous"), ((1, 2, 400, 300), "contiguous"),
                                  ((1, 24, 150, 60), "channels-last")], ids=str)  # fmt: skip
def test_thread_counts_agree(case, rng):
    shape, layout = case
    x, residual = (lay(uniform(rng, shape), layout) for _ in range(2))
    for count in (1, 2, 3):
        with normkit.num_threads(count):
            check_residual(INSTANCE, x, residual, layout)


@pytest.mark.parametrize("op", [op for op in REGISTRY if op.function in ("instance_norm", "batch_norm")], ids=repr)
def test_running_statistics_are_those_of_the_sum(op, rng):
    x, residual = uniform(rng, SMALL), uniform(rng, SMALL)
    channels = SMALL[op.options(SMALL)["channel_axis"]]
    found, expected = ([np.zeros(channels), np.ones(channels)] for _ in range(2))
    op.forward(x, residual=residual, running_mean=found[0], running_var=found[1])
    op.forward(x + residual, running_mean=expected[0], running_var=expected[1])
    assert [bits(a) for a in found] == [bits(a) for a in expected]
    frozen = {op.stats_option: False, "running_mean": found[0], "running_var": found[1]}
    assert bits(op.forward(x, residual=residual, **frozen)) == bits(op.forward(x + residual, **frozen))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_empty(op, shape):
    x = np.zeros(shape, np.float32)
    y, s = op.forward(x, residual=x, return_residual=True)
    assert y.shape == s.shape == shape


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_gradient_of_the_returned_sum(op, layout, dtype, isa, rng):
    """dx is rounded once: a gradient of half its digits, added after that, would show."""
    dy, x, dresidual = (lay(uniform(rng, SMALL, dtype, std=std), layout) for std in (1, 1, 0.1))
    weight = rng.standard_normal(op.weight_shape(SMALL, "channel")).astype(np.float32)
    check_backward(op, dy, x, weight, dresidual=dresidual)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_every_length(shape, layout, dtype, isa, rng):
    dy, x, dresidual = (lay(uniform(rng, SHAPES[shape], dtype), layout) for _ in range(3))
    check_backward(INSTANCE, dy, x, dresidual=dresidual)


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("op", [OPERATIONS[name] for name in ("instance", "layer", "over-first")], ids=repr)
def test_gradient_that_lies_otherwise(op, other, isa, rng):
    dy, x, dresidual = uniform(rng, SMALL), uniform(rng, SMALL), lay(uniform(rng, SMALL), other)
    check_backward(op, dy, x, dresidual=dresidual)


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_other_gradients_do_not_see_it(op, kind, rng):
    dy, x, dresidual = (uniform(rng, SMALL) for _ in range(3))
    weight = rng.standard_normal(op.weight_shape(SMALL, kind)).astype(np.float32)
    stats = op.statistics(x)[1:]
    plain, found = op.backward(dy, x, *stats, weight), op.backward(dy, x, *stats, weight, dresidual=dresidual)
    assert [bits(a) for a in found[1:]] == [bits(a) for a in plain[1:]]
    zeros = op.backward(dy, x, *stats, weight, dresidual=np.zeros_like(x))[0]
    assert (zeros == plain[0]).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_frozen_gradient(op, layout, isa, rng):
    dy, x, dresidual = (lay(uniform(rng, SMALL), layout) for _ in range(3))
    shape = op.statistics_shape(SMALL)
    mean = rng.standard_normal(shape).astype(np.float32) if op.center else None
    stats = mean, rng.uniform(0.5, 2, shape).astype(np.float32)
    check_backward(op, dy, x, stats=stats, use_input_stats=False, dresidual=dresidual)


def test_a_chain_of_two(rng):
    """x -> s = x + r -> y, and s goes on: dx is what both paths carry."""
    x, r, dy, ds = (uniform(rng, SMALL) for _ in range(4))
    _, mean, rstd, s = normkit.instance_norm(x, residual=r, return_residual=True, return_stats=True)
    check_backward(INSTANCE, dy, s, stats=(mean, rstd), dresidual=ds)


def f32(*shape):
    return np.ones(shape, np.float32)


ERRORS = {
    "shape": (f32(2, 3, 8), {"residual": f32(2, 3, 1)}, ValueError, "^residual has shape "),
    "dtype": (f32(2, 3, 8), {"residual": np.ones((2, 3, 8))}, TypeError, "^residual has dtype "),
    "return-without": (f32(2, 3, 8), {"return_residual": True}, ValueError, "residual"),
} | {
    name: (np.ones((2, 3, 8), dtype), {"residual": np.ones((2, 3, 8), dtype)}, TypeError, "residual")
    for name, dtype in INTEGERS.items()
}


@pytest.mark.parametrize(("x", "options", "kind", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_errors(op, x, options, kind, message):
    out = Guarded(x.shape, np.float32)
    with pytest.raises(kind, match=message):
        op.forward(x, out=out.array, **options)
    assert out.unwritten()


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_out_may_not_overlap_the_residual(op, rng):
    x, residual = uniform(rng, SMALL), uniform(rng, SMALL)
    buffer = uniform(rng, (4, *SMALL[1:]))
    before = bits(residual), bits(buffer)
    for r, out in ((residual, residual), (x, x), (residual, residual[::-1]), (buffer[:3], buffer[1:])):
        with pytest.raises(ValueError, match=r"^out overlaps "):
            op.forward(x, residual=r, out=out)
    assert (bits(residual), bits(buffer)) == before


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_errors_of_the_gradient(op, rng):
    x = uniform(rng, SMALL)
    stats = op.statistics(x)[1:]
    for dresidual, kind in ((x[..., :1], ValueError), (x.astype(np.float64), TypeError)):
        with pytest.raises(kind, match=r"^dresidual has "):
            op.backward(x, x, *stats, dresidual=dresidual)
