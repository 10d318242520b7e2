"""Calls, good or bad, hold on to nothing."""

import gc
import sys
import weakref
from collections.abc import Callable

import normkit
import numpy as np
import pytest
from cases import lay, uniform

SHAPE = (2, 3, 4, 5)


def arrays(rng):
    x, dy = uniform(rng, SHAPE), uniform(rng, SHAPE)
    weight, mean, rstd = np.ones(3, np.float32), np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    return x, dy, weight, mean, rstd, np.empty_like(x), np.ones(3, np.float32)


def steps(x, dy, weight, mean, rstd, out, running) -> list[Callable]:
    def refused():
        with pytest.raises(ValueError, match="weight has shape"):
            normkit.instance_norm(x, weight[:2], out=out)
        with pytest.raises(TypeError, match="weight has dtype"):
            normkit.instance_norm_backward(dy, x, mean, rstd, weight.astype(np.int32))
        with pytest.raises(TypeError, match="where has dtype"):
            normkit.instance_norm(x, where=dy, activation="relu")
        with pytest.raises(TypeError, match="count has dtype"):
            normkit.apply_backward(dy, x, mean, rstd, triples, mean > 0, **over)

    where, triples = weight > 0, np.ones((2, 3, 3))
    over = {"axis": (2, 3)}
    return [
        lambda: normkit.instance_norm(x, weight, weight, return_stats=True),
        lambda: normkit.instance_norm(x, weight, weight, out=out),
        lambda: normkit.instance_norm(x, running_mean=running, running_var=running.copy()),
        lambda: normkit.instance_norm_backward(dy, x, mean, rstd, weight),
        lambda: normkit.instance_norm_backward(dy, x, mean, rstd, weight, need=(), out=None),
        lambda: normkit.instance_norm_backward(dy, x, mean, rstd, weight, out=out),
        lambda: normkit.normalize(x, dy, axis=(0, 2)),
        lambda: normkit.normalize(lay(x, "step"), axis=(0, 2)),
        lambda: normkit.instance_norm(x, residual=dy, return_residual=True, activation="silu", where=x > 0),
        lambda: normkit.instance_norm(x, residual=lay(dy, "step"), out_dtype=np.float64, activation=("elu", 0.5)),
        lambda: normkit.instance_norm_backward(dy, x, mean, rstd, weight, dresidual=x, activation="gelu", where=x > 0),
        lambda: normkit.instance_norm(x, activation=("prelu", running)),
        lambda: normkit.instance_norm(x, activation=["prelu", running[:1]], out=out),
        lambda: normkit.instance_norm_backward(dy, x, mean, rstd, activation=("prelu", weight), need=("dslopes",)),
        lambda: normkit.adaptive_instance_norm(x, dy, out=out),
        lambda: normkit.adaptive_instance_norm_backward(dy, x, x, mean, rstd),
        lambda: normkit.instance_norm_double_backward(dy, weight, None, dy, x, mean, rstd, weight),
        lambda: normkit.merge([normkit.moments(x, where=where[:1], **over) for _ in range(2)]).rstd(),
        lambda: normkit.apply(x, mean.astype(np.float64), rstd, out=out, **over),
        lambda: normkit.backward_sums(dy, x, mean, rstd, **over),
        lambda: normkit.apply_backward(dy, x, mean, rstd, triples, mean, **over),
        lambda: normkit.apply_backward(dy, lay(x, "step"), mean, rstd, triples, 20, **over),
        refused,
    ]


STEPS = range(23)


@pytest.mark.parametrize("step", STEPS)
def test_references_are_given_back(step, rng):
    held = arrays(rng)
    call = steps(*held)[step]
    call()
    gc.collect()
    counted = [*held, held[0].dtype]
    before, nones = [sys.getrefcount(a) for a in counted], sys.getrefcount(None)
    for _ in range(100):
        call()
    gc.collect()
    assert [sys.getrefcount(a) for a in counted] == before
    assert abs(sys.getrefcount(None) - nones) < 50  # others of the process have some, too


@pytest.mark.parametrize("step", STEPS)
def test_no_objects_are_left(step, rng):
    call = steps(*arrays(rng))[step]
    for _ in range(3):
        call()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        call()
    gc.collect()
    assert len(gc.get_objects()) - before < 25


def test_results_live_alone(rng):
    """y is its own: it neither keeps x alive nor dies with it."""
    x = uniform(rng, SHAPE)
    expected = normkit.instance_norm(x).tobytes()
    gone = weakref.ref(x)
    y = normkit.instance_norm(x)
    assert y.base is None
    assert y.flags.owndata
    del x
    gc.collect()
    assert gone() is None
    assert y.tobytes() == expected


def test_memory_does_not_grow(rng):
    resource = pytest.importorskip("resource", reason="no resource usage on this system")
    x = uniform(rng, (4, 16, 128, 128))
    view = lay(x, "crop")

    def work():
        for a in (x, view):
            y, mean, rstd = normkit.instance_norm(a, return_stats=True)
            normkit.instance_norm_backward(y, a, mean, rstd)

    for _ in range(5):
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        work()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # One array of 4 MiB a round would be 120 MiB; the peak is in KiB, on macOS in bytes.
    assert grown * (1 if sys.platform == "darwin" else 1024) < 30 * x.nbytes / 2
