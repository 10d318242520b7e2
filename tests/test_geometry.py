"""The geometry against NumPy's axes, by brute force over every element."""

import itertools
import math

import numpy as np
import pytest
from cases import LAYOUTS, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from normkit import _core

N, C, G, S = 2, 6, 3, 5
# shape, reduced axes, parameter axes, and the row of the table: outer, steps, lanes, run, param_stride, param_count
TABLE = {
    "instance": ((N, C, S), (2,), (1,), (1, 1, N * C, S, S, C)),
    "instance-conditional": ((N, C, S), (2,), (0, 1), (1, 1, N * C, S, S, N * C)),
    "instance-per-pixel": ((N, C, S), (2,), (0, 1, 2), (1, 1, N * C, S, 1, N * C * S)),
    "instance-channels-last": ((N, S, C), (1,), (2,), (N, S, C, 1, 1, C)),
    "layer": ((N, C, S), (2,), (2,), (1, 1, N * C, S, 1, S)),
    "layer-over-channels": ((N, C, S), (1,), (1,), (N, C, S, 1, S, C)),
    "group": ((N, G, C // G, S), (2, 3), (1, 2), (1, 1, N * G, C // G * S, S, C)),
    "group-channels-last": ((N, S, G, C // G), (1, 3), (2, 3), (N, S, G, C // G, 1, C)),
    "batch": ((N, C, S), (0, 2), (1,), (1, N, C, S, S, C)),
    "batch-channels-last": ((N, S, C), (0, 1), (2,), (1, N * S, C, 1, 1, C)),
    "batch-without-space": ((N, C), (0,), (1,), (1, N, C, 1, 1, C)),
    "weight-standardization": ((C, S, 3), (1, 2), (), (1, 1, C, 3 * S, 1, 1)),
}


def addresses(shape, strides):
    """The place of every element, by its logical index."""
    index = np.indices(shape).reshape(len(shape), -1)
    return np.asarray(strides, np.int64) @ index if shape else np.zeros(1, np.int64)


def number_along(shape, axes):
    """A number for every element that tells its indices along `axes` apart."""
    index = np.indices(shape).reshape(len(shape), -1)
    return (
        np.ravel_multi_index([index[a] for a in axes], [shape[a] for a in axes])
        if axes
        else np.zeros(math.prod(shape), int)
    )


def one_to_one(a, b):
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})


def check(shape, strides, reduced, params, g):
    """Every element is met once, and its statistic and parameter are those of its indices."""
    extents = g["outer"], g["steps"], g["lanes"], g["run"]
    o, step, lane, i = np.indices(extents).reshape(4, -1)
    offset = ((o * extents[1] + step) * extents[2] + lane) * extents[3] + i
    address = o * g["outer_stride"] + step * g["step_stride"] + lane * g["lane_stride"] + i
    where = {a: k for k, a in enumerate(addresses(shape, strides).tolist())}
    assert len(where) == math.prod(shape), "the test wants distinct elements"
    element = np.array([where[a] for a in address.tolist()])
    assert np.unique(element).size == element.size == math.prod(shape)

    kept = [a for a in range(len(shape)) if a not in reduced]
    assert one_to_one(o * extents[2] + lane, number_along(shape, kept)[element])
    parameter = o * g["param_outer"] + (offset // g["param_stride"]) % g["param_count"]
    assert one_to_one(parameter, number_along(shape, params)[element])
    assert parameter.max() + 1 == math.prod(shape[a] for a in params)
    # Parameters are numbered in the order of memory, so that their array can be read as it lies.
    in_memory = sorted((a for a in params if shape[a] > 1), key=lambda a: -abs(strides[a]))
    assert (parameter == number_along(shape, in_memory)[element]).all()


@pytest.mark.parametrize("row", TABLE)
def test_row_of_the_table(row):
    shape, reduced, params, expected = TABLE[row]
    strides = dense(shape, tuple(range(len(shape))))
    g = _core.geometry(shape, strides, reduced, params)
    assert (g["outer"], g["steps"], g["lanes"], g["run"], g["param_stride"], g["param_count"]) == expected
    assert g["param_outer"] == 0
    check(shape, strides, reduced, params, g)


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("same") and name != "reversed"])
def test_table_in_every_layout(layout, row):
    shape, reduced, params, _ = TABLE[row]
    strides = LAYOUTS[layout](shape)
    g = _core.geometry(shape, strides, reduced, params)
    if g is not None:
        check(shape, strides, reduced, params, g)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_every_order_of_four_axes(order):
    shape = (2, 3, 4, 5)
    strides = dense(shape, order)
    for count in range(1, 5):
        for reduced in itertools.combinations(range(4), count):
            for params in [(), (1,), tuple(a for a in range(4) if a not in reduced), (0, 1, 2, 3)]:
                g = _core.geometry(shape, strides, reduced, params)
                if g is not None:
                    check(shape, strides, reduced, params, g)


def test_crop_keeps_its_runs():
    """Cropped images need no copy where whole runs stay together."""
    g = _core.geometry((2, 3, 4, 5), (600, 100, 5, 1), (2, 3), (1,))
    assert (g["lanes"] * g["outer"], g["steps"] * g["run"]) == (6, 20)
    check((2, 3, 4, 5), (600, 100, 5, 1), (2, 3), (1,), g)


@pytest.mark.parametrize(
    ("shape", "strides", "reduced"),
    [
        ((2, 3, 4), (24, 8, 2), (2,)),
        ((2, 3, 2, 3, 2), (36, 12, 6, 2, 1), (0, 2, 4)),
    ],
    ids=["gaps-in-the-run", "alternating-too-often"],
)
def test_what_does_not_fit(shape, strides, reduced):
    assert _core.geometry(shape, strides, reduced, ()) is None


EXTENTS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_axes(data):
    shape = tuple(data.draw(EXTENTS))
    axes = range(len(shape))
    order = tuple(data.draw(st.permutations(axes)))
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=len(shape), max_size=len(shape)))
    strides = dense(tuple(e + g for e, g in zip(shape, gaps, strict=True)), order)
    reduced = tuple(data.draw(st.sets(st.sampled_from(axes), min_size=1)))
    params = tuple(data.draw(st.sets(st.sampled_from(axes))))
    g = _core.geometry(shape, strides, reduced, params)
    if g is not None:
        check(shape, strides, reduced, params, g)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_packed_arrays_always_fit(data):
    """The arrays are dense, the reduced axes the fastest; parameters vary along no axis, the kept axes, or all."""
    shape = tuple(data.draw(EXTENTS))
    kept_count = data.draw(st.integers(0, len(shape) - 1))
    kept, reduced = tuple(range(kept_count)), tuple(range(kept_count, len(shape)))
    strides = dense(shape, (*kept, *reduced))
    for params in [(), kept, kept + reduced]:
        g = _core.geometry(shape, strides, reduced, params)
        assert g is not None
        check(shape, strides, reduced, params, g)
