"""The whole contract of one call: dtype, shape, layout, untouched inputs, values within their bounds."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import bounds
import numpy as np
from cases import DTYPES, bits
from reference import Operation, compute, rstd_of


def same_order(x: np.ndarray, y: np.ndarray) -> bool:
    """True where y lies as NumPy lays out a result that is like x. Extents of 1 have no place in memory."""
    like = np.empty_like(x, dtype=y.dtype)
    return all(a == b for a, b, extent in zip(like.strides, y.strides, x.shape, strict=True) if extent > 1)


@contextmanager
def unchanged(*arrays: np.ndarray | None) -> Iterator[None]:
    """Inputs are inputs: the same bytes afterwards."""
    before = [None if a is None else bits(a) for a in arrays]
    yield
    assert [None if a is None else bits(a) for a in arrays] == before, "an input was written to"


def result_dtype(x: np.ndarray) -> np.dtype:
    return x.dtype if x.dtype in DTYPES.values() else np.dtype(np.float32)


# Options that the reference knows by the same name.
MEANING = ("where", "weight_offset", "activation")


def _meaning(options: dict) -> dict:
    return {name: options[name] for name in MEANING if name in options}


def check_forward(
    op: Operation,
    x: np.ndarray,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    exact: bool = False,
    out_dtype: Any = None,
    **options: Any,
) -> np.ndarray:
    if out_dtype is not None:
        options["out_dtype"] = out_dtype
    with unchanged(x, weight, bias, options.get("where")):
        y, mean, rstd = op.statistics(x, weight=weight, bias=bias, eps=eps, **options)
    truth = op.reference(x, weight, bias, eps=eps, **_meaning(options))
    kept = op.statistics_shape(x.shape)
    assert (y.shape, y.dtype) == (x.shape, np.dtype(out_dtype) if out_dtype is not None else result_dtype(x))
    assert (rstd.shape, rstd.dtype) == (kept, compute(x.dtype))
    bound = bounds.y(truth, x.dtype, y.dtype, exact=exact)
    assert bounds.excess(y.reshape(truth.y.shape), truth.y, bound) <= 1
    assert bounds.excess(rstd.reshape(truth.rstd.shape), truth.rstd, bounds.rstd(truth, x.dtype)) <= 1
    if op.center:
        assert (mean.shape, mean.dtype) == (kept, compute(x.dtype))
        assert bounds.excess(mean.reshape(truth.mean.shape), truth.mean, bounds.mean(truth, x.dtype)) <= 1
    return y


def check_backward(
    op: Operation,
    dy: np.ndarray,
    x: np.ndarray,
    weight: Any = None,
    *,
    eps: float = 1e-5,
    exact: bool = False,
    stats: Any = None,
    **options: Any,
) -> tuple:
    """Gradients at the statistics that forward returned, or at those that are given."""
    where = {name: options[name] for name in ("where",) if name in options}
    mean, rstd = stats or op.statistics(x, eps=eps, **where)[1:]
    with unchanged(dy, x, weight, mean, rstd, *(options.get(name) for name in ("where", "bias", "dresidual"))):
        dx, dweight, dbias = op.backward(dy, x, mean, rstd, weight, **options)
    given = {name: options[name] for name in ("use_input_stats", "bias", "dresidual") if name in options}
    truth = op.reference_backward(dy, x, mean, rstd, weight, **given, **_meaning(options))
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert bounds.excess(dx.reshape(truth.dx.shape), truth.dx, bounds.dx(truth, x.dtype, exact=exact)) <= 1

    dtype = compute(x.dtype) if weight is None else weight.dtype
    bias = weight if options.get("bias") is None else options["bias"]
    for found, like, terms, bound_of in (
        (dweight, weight, truth.dweight, partial(bounds.dweight, exact=exact)),
        (dbias, bias, truth.dbias, bounds.dbias),
    ):
        shape = op.absent(x.shape)[0] if like is None else like.shape
        assert (found.shape, found.dtype) == (shape, dtype)
        bound = bound_of(truth, x.dtype, bounds.count_of(x.shape, shape))
        total, bound = (op.to_weight(t, x.shape, like) for t in (terms, bound))
        bound = (
            bound + bounds.stored(np.abs(total) + bound, compute(x.dtype)) + bounds.stored(np.abs(total) + bound, dtype)
        )
        assert bounds.excess(found, total, bound) <= 1
    return dx, dweight, dbias


def statistics_of(*, mean: Any, var: Any, members: int, farthest: Any, largest: Any, eps: float = 1e-5) -> Any:
    """What bounds want to know of statistics that were found without the reference, as the data is too large for it."""
    return SimpleNamespace(
        mean=mean,
        var=var,
        rstd=rstd_of(var, eps),
        eps=eps,
        members=members,
        elements=members,
        farthest=np.broadcast_to(farthest, np.shape(var)),
        largest=largest,
    )


def check_sample(f: Any, x: np.ndarray, y: np.ndarray) -> None:
    """Some outputs, of statistics that are known."""
    x_hat = (x.astype(np.float64) - f.mean) * f.rstd
    affine = {"weight": 1.0, "weight_offset": 0.0, "bias": 0.0, "activation": None}
    f = SimpleNamespace(**vars(f), **affine, x_hat=x_hat, z=x_hat, y=x_hat)
    assert bounds.excess(y, x_hat, bounds.y(f, x.dtype)) <= 1
