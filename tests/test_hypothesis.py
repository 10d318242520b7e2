"""Calls that hypothesis thinks of, of any shape, strides, axes, weights, dtypes and values, against the reference."""

import normkit
import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, lay, uniform
from checks import check_backward, check_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import OPERATIONS, Operation, over_axes

ONCE = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SHAPE = st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple)
WITH_SPACE = SHAPE.filter(lambda shape: len(shape) > 2)


FLOATS = tuple(DTYPES.values())


@st.composite
def arrays(draw, shape=SHAPE, dtypes=FLOATS):
    """Two arrays of one random shape and dtype, in two random layouts, and a generator."""
    shape, dtype = draw(shape), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0.0, 0.5, 30.0]))
    dy, x = (lay(uniform(rng, shape, dtype, offset=offset), draw(st.sampled_from(sorted(LAYOUTS)))) for _ in range(2))
    return dy, x, rng


def any_axes(axes: tuple[int, ...], center: bool) -> Operation:
    return over_axes("any", lambda ndim: axes, center=center)


@ONCE
@given(arrays(), st.data())
def test_normalize_over_any_axes(isa, given_arrays, data):
    dy, x, rng = given_arrays
    axes = tuple(data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1)))
    op = any_axes(axes, data.draw(st.booleans()))
    shape = tuple(extent if data.draw(st.booleans()) else 1 for extent in x.shape)[data.draw(st.integers(0, x.ndim)) :]
    weight, bias = (np.asarray(rng.standard_normal(shape)).astype(np.float32) for _ in range(2))
    eps = data.draw(st.sampled_from([0.0, 1e-5, 1.0]))
    check_forward(op, x, data.draw(st.sampled_from([weight, None])), data.draw(st.sampled_from([bias, None])), eps=eps)
    check_backward(op, dy, x, data.draw(st.sampled_from([weight, None])), eps=eps)


@ONCE
@given(arrays(WITH_SPACE), st.data())
def test_instance_norm_with_any_weight(isa, given_arrays, data):
    dy, x, rng = given_arrays
    op = OPERATIONS[data.draw(st.sampled_from(["instance", "instance-last"]))]
    shape = data.draw(st.sampled_from(list(op.weights(x.shape).values())))
    dtype = data.draw(st.sampled_from([np.float32, np.float64, x.dtype.type]))
    weight, bias = rng.standard_normal((2, *shape)).astype(dtype)
    check_forward(op, x, weight, bias)
    check_backward(op, dy, x, weight)


@ONCE
@given(arrays(st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 150)), (np.dtype(np.float32),)))
def test_lengths(isa, given_arrays):
    """Every tail of vectors, tiles and blocks of steps, in both traversals."""
    dy, x, _ = given_arrays
    check_forward(OPERATIONS["instance"], x)
    check_backward(OPERATIONS["instance"], dy, x)


@ONCE
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=40),
        elements=st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False),
    )
)
def test_any_values(isa, x):
    """Values that nobody draws from a distribution: equal ones, outliers, steps, 2^-126 next to 2^20."""
    for op in (OPERATIONS["layer"], OPERATIONS["over-first"], OPERATIONS["rms"]):
        check_forward(op, x)


@ONCE
@given(
    hnp.arrays(
        np.float32, (2, 2, 24), elements=st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0, 1e38, -1e38, 1e-45])
    )
)
def test_no_value_crashes_or_spreads(isa, x):
    with np.errstate(all="ignore"):
        y = normkit.instance_norm(x)
    bad = ~np.isfinite(x).all(2)
    assert np.isnan(y[bad]).all()
    assert np.isfinite(y[~bad]).all()


@pytest.mark.parametrize("count", [1, 2, 3])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 3000)), seed=st.integers(0, 2**32 - 1))
def test_any_work_on_any_threads(count, shape, seed):
    x = uniform(np.random.default_rng(seed), shape)
    expected = normkit.normalize(x, axis=1).tobytes(), normkit.normalize(x, axis=2).tobytes()
    with normkit.num_threads(count):
        assert (normkit.normalize(x, axis=1).tobytes(), normkit.normalize(x, axis=2).tobytes()) == expected
