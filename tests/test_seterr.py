"""NumPy's reactions to floating-point errors are for its own arithmetic: `np.seterr` has no say in calls of normkit."""

import normkit as nk
import numpy as np
import pytest
from cases import DTYPES, LAYOUTS, bits, lay, uniform
from reference import REGISTRY

SHAPE = (3, 5, 4, 7)


def hard(rng, dtype):
    """Values of all magnitudes, with NaN, infinities and subnormal numbers among them."""
    x = uniform(rng, SHAPE, np.float64)
    info = np.finfo(dtype if np.dtype(dtype).kind == "f" else np.float32)
    x[0] *= float(info.max) / 2
    x[1] *= float(info.smallest_subnormal) * 8
    x[2, 0, 0, :3] = np.nan, np.inf, -np.inf
    with np.errstate(all="ignore"):
        return x.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", REGISTRY, ids=repr)
def test_calls_are_silent(op, layout, dtype, rng):
    """Arrays are packed or converted on their way, too: other bits or an error would show that NumPy had a say."""
    dy, x = (lay(hard(rng, dtype), layout) for _ in range(2))
    weight, bias = (1e30 * rng.standard_normal((2, *op.weight_shape(SHAPE, "channel")))).astype(np.float32)
    where = x == x

    def calls():
        for out_dtype in DTYPES.values():
            yield op.forward(x, weight, bias, out_dtype=out_dtype, activation="silu", where=where)
        y, mean, rstd = op.statistics(x)
        yield from (y, mean, rstd)
        yield from op.backward(dy, x, mean, rstd, weight, bias=bias, activation="gelu")
        yield from op.double_backward((dy, None, None), dy, x, mean, rstd, weight)
        m = nk.moments(x, axis=1)
        yield from (m.m2, m.rstd(), nk.apply(x, m.mean, m.rstd(), axis=1))

    results = {}
    for reaction in ("ignore", "raise"):
        with np.errstate(all=reaction):
            results[reaction] = [None if r is None else bits(r) for r in calls()]
    assert results["raise"] == results["ignore"]


def test_adaptive_instance_norm_is_silent(rng):
    dy, content, style = (hard(rng, np.float32) for _ in range(3))
    with np.errstate(all="raise"):
        _, mean, rstd = nk.adaptive_instance_norm(content, style, return_stats=True)
        nk.adaptive_instance_norm_backward(dy, content, style, mean, rstd)
