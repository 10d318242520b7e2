"""Any strides in; the layout of x out."""

import math
import os

import numpy as np
import pytest
from cases import DTYPES, INTEGERS, LAYOUTS, SHAPES, SHARED_MEMORY, lay, uniform
from checks import check_backward, check_forward, same_order
from reference import OPERATIONS, REGISTRY

SMALL = (3, 5, 4, 7)
SOME = [OPERATIONS[name] for name in ("instance", "instance-last", "layer", "batch")]


def parameters(op, shape, rng):
    return rng.standard_normal((2, *op.weight_shape(shape, "channel"))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_forward(op, layout, dtype, isa, rng):
    x = lay(uniform(rng, SMALL, dtype), layout)
    y = check_forward(op, x, *parameters(op, SMALL, rng))
    assert layout in SHARED_MEMORY or same_order(x, y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_backward(op, layout, dtype, isa, rng):
    dy, x = (lay(uniform(rng, SMALL, dtype), layout) for _ in range(2))
    dx = check_backward(op, dy, x, parameters(op, SMALL, rng)[0])[0]
    assert layout in SHARED_MEMORY or same_order(x, dx)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", ["contiguous", "channels-last", "crop", "reversed"])
@pytest.mark.parametrize("op", SOME, ids=repr)
def test_dy_and_x_lie_differently(op, x_layout, dy_layout, rng):
    dy, x = lay(uniform(rng, SMALL), dy_layout), lay(uniform(rng, SMALL), x_layout)
    check_backward(op, dy, x, parameters(op, SMALL, rng)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["chunk-and-one", "three-chunks", "register-row", "volume"])
def test_long_runs(shape, layout, isa, rng):
    dy, x = (lay(uniform(rng, SHAPES[shape]), layout) for _ in range(2))
    check_forward(OPERATIONS["instance"], x)
    check_backward(OPERATIONS["instance"], dy, x)


@pytest.mark.parametrize("dtype", INTEGERS.values(), ids=INTEGERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers(layout, dtype, isa, rng):
    check_forward(OPERATIONS["instance"], lay(uniform(rng, SMALL, dtype), layout))


@pytest.mark.parametrize("layout", ["step", "reversed", "misaligned", "same-images"])
@pytest.mark.parametrize("kind", ["channel", "pixel", "conditional"])
def test_weights_are_views_too(kind, layout, isa, rng):
    op = OPERATIONS["instance"]
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight, bias = (lay(uniform(rng, op.weight_shape(SMALL, kind)), layout) for _ in range(2))
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight)


@pytest.mark.parametrize("layout", ["fortran", "step", "reversed", "misaligned"])
def test_statistics_are_views_too(layout, isa, rng):
    op = OPERATIONS["instance"]
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    check_backward(op, dy, x, stats=tuple(lay(s, layout) for s in op.statistics(x)[1:]))


@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_read_only(op, rng):
    dy, x = uniform(rng, SMALL), uniform(rng, SMALL)
    weight = parameters(op, SMALL, rng)[0]
    for array in (dy, x, weight):
        array.flags.writeable = False
    check_forward(op, x, weight, weight)
    check_backward(op, dy, x, weight)


@pytest.mark.parametrize("subclass", [np.matrix, np.recarray])
def test_subclasses_give_plain_arrays(subclass, rng):
    x = uniform(rng, (4, 6))
    y = OPERATIONS["layer"].forward(x.view(subclass))
    assert type(y) is np.ndarray
    assert y.tobytes() == OPERATIONS["layer"].forward(x).tobytes()


def test_masked_arrays_are_refused(rng):
    with pytest.raises(
        TypeError, match=r"^x is a masked array, expected a plain one: .* pass x\.data, and where=~x\.mask$"
    ):
        OPERATIONS["layer"].forward(np.ma.masked_array(uniform(rng, (4, 6))))


@pytest.mark.skipif("NORMKIT_TEST_ARRAYS" in os.environ, reason="x is on a GPU, where no masked array is")
def test_masked_weights_are_refused(rng):
    with pytest.raises(TypeError, match=r"^weight is a masked array, expected a plain one: .* pass weight\.data$"):
        OPERATIONS["layer"].forward(uniform(rng, (4, 6)), np.ma.masked_array(uniform(rng, (6,))))


def test_memory_mapped(tmp_path, rng):
    x = uniform(rng, SMALL)
    path = tmp_path / "x.npy"
    np.save(path, x)
    y = OPERATIONS["instance"].forward(np.load(path, mmap_mode="r"))
    assert y.tobytes() == OPERATIONS["instance"].forward(x).tobytes()


def test_every_layout_is_what_it_says():
    for name, strides in LAYOUTS.items():
        span = sum((e - 1) * abs(s) for e, s in zip(SMALL, strides(SMALL), strict=True)) + 1
        assert (span < math.prod(SMALL)) == (name in SHARED_MEMORY)
