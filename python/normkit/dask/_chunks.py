"""What is done to each chunk, and how what chunks give is put together.

Arrays of a call go by the names that the core has for them. All lie beside x: each axis has the extent and the chunks
that x has there, or the extent 1. Moments, and sums of a backward, are four numbers along one more axis.
"""

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from dask._task_spec import Alias, Task, TaskRef, convert_legacy_graph
from dask.array.utils import meta_from_array
from dask.base import clone_key
from dask.blockwise import Blockwise
from dask.graph_manipulation import bind
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.layers import ArrayOverlapLayer

from .. import functional as core
from .. import phases
from .._memory import views_of
from .._operations import learnt
from ..phases import Moments

Axes: TypeAlias = tuple[int, ...]
Arrays: TypeAlias = dict[str, Any]
NUMBERS = 4
TOGETHER = 16  # chunks that are joined at a time, whatever dask is told: it decides bits


# ---- in a worker -------------------------------------------------------------------------------------------------


def moments_of(numbers: Any, axis: Axes, center: bool) -> Moments:
    """The moments of statistics that have their axes still. Of x other than float64 the fourth number is 0."""
    return Moments._of(numbers.squeeze(axis), views_of(numbers=numbers)[1], center, twofold=True)


def moments(x: Any, where: Any = None, *, axis: Axes, center: bool) -> Any:
    return np.expand_dims(phases.moments(x, axis=axis, center=center, where=where)._numbers, axis)


def merged(a: Any, b: Any) -> Any:
    memory = views_of(a=a)[1]
    with memory:
        return memory.merged(a, b, True)


def rstd(moments: Moments, eps: float, of_norm: bool = False) -> Any:
    """What a chunk is multiplied by."""
    if not of_norm:
        return moments.rstd(eps)
    norm = np.maximum(np.sqrt(moments.m2), eps)  # NaN stays
    return np.where(norm == 0, 0, 1 / np.where(norm == 0, 1, norm))


def statistic(moments: Any, *, name: str, dtype: Any, eps: float, of_norm: bool = False) -> Any:
    """A statistic as a call returns it, with its axes still."""
    found = moments_of(moments, (), True)
    of = {"mean": lambda: found.mean, "deviation": lambda: found._deviation(eps)}
    with np.errstate(over="ignore"):
        return of.get(name, lambda: rstd(found, eps, of_norm))().astype(dtype)


def constants(running_mean: Any, running_var: Any) -> Any:
    """Running statistics as moments."""
    mean, var = (a.astype(np.float64) for a in (running_mean, running_var))
    return np.stack([mean, var, np.ones_like(var), np.zeros_like(var)], -1)


def normalized(x: Any, slopes: Any = None, *, axis: Axes, eps: float, of_norm: bool, **options: Any) -> Any:
    if of_norm:
        return core.l2_normalize(x, axis=axis, eps=eps)
    return core.normalize(x, axis=axis, eps=eps, **with_slopes(options, slopes))


def applied(
    x: Any, moments: Any, slopes: Any = None, *, axis: Axes, center: bool, eps: float, of_norm: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    found = moments_of(moments, axis, center)
    mean, scale = found if center else None, rstd(found, eps, of_norm)
    return phases.apply(x, mean, scale, axis=axis, **with_slopes(options, slopes))


def with_slopes(options: dict[str, Any], slopes: Any) -> dict[str, Any]:
    return options if slopes is None else options | {"activation": ("prelu", slopes)}


def sums(
    x: Any, dy: Any, rstd: Any, mean: Any = None, where: Any = None, slopes: Any = None, *, axis: Axes, **options: Any
) -> Any:
    """The sums of a chunk for its gradient, and the number of its members."""
    mean, rstd = (s if s is None else s.squeeze(axis) for s in (mean, rstd))
    found = phases.backward_sums(dy, x, mean, rstd, axis=axis, where=where, **with_slopes(options, slopes))
    members = np.ones_like(found[..., :1]) * math.prod(x.shape[a] for a in axis)
    if where is not None:
        members = np.broadcast_to(where, x.shape).sum(axis)[..., None].astype(found.dtype)
    return np.expand_dims(np.concatenate([found, members], -1), axis)


def gradients(
    x: Any, dy: Any, rstd: Any, mean: Any = None, sums: Any = None, where: Any = None, slopes: Any = None,
    dresidual: Any = None, *, axis: Axes, center: bool, need: tuple[str, ...], use_input_stats: bool, **options: Any,
) -> Any:  # fmt: skip
    """dx of a chunk, and its share in gradients of parameters. `sums`: those of all chunks, where there are more."""
    mean, rstd = (s if s is None else s.squeeze(axis) for s in (mean, rstd))
    options = with_slopes(options, slopes)
    told: dict[str, Any] = {"axis": axis, "center": center, "need": need}
    if sums is None:
        return core.normalize_backward(
            dy, x, mean, rstd, use_input_stats=use_input_stats, where=where, dresidual=dresidual, **told, **options
        )
    sums = sums.squeeze(axis)
    total, count = sums[..., :3], sums[..., 3]
    found: tuple[Any, ...] = (None,)
    if need != ("dx",):  # the statistics are those of all chunks, and the mean what it is before it is rounded
        exact = mean if mean is None else mean + total[..., 2] / np.maximum(count, 1)
        told["need"] = tuple(name for name in need if name != "dx")
        found = core.normalize_backward(dy, x, exact, rstd, use_input_stats=False, **told, **options)
    if "dx" not in need:
        return found
    dx = phases.apply_backward(dy, x, mean, rstd, total, count, axis=axis, where=where, dresidual=dresidual, **options)
    return (dx, *found[1:])


def gradient_of_norm(x: Any, dy: Any, rstd: Any, sums: Any = None, *, axis: Axes, eps: float) -> Any:
    """dx of a chunk. Where the norm is below eps, it takes no part."""
    rstd = rstd.squeeze(axis)
    if sums is None:
        return core.l2_normalize_backward(dy, x, rstd, axis=axis, eps=eps)
    is_there = rstd * eps < 1 - np.finfo(rstd.dtype).eps * 2
    total = sums.squeeze(axis)[..., :3] * is_there[..., None]
    return phases.apply_backward(dy, x, None, rstd, total, 1, axis=axis)


def taken(x: Any, *, k: int) -> Any:
    return x[k]


def share(x: Any, *, k: int) -> Any:
    return x[k].astype(np.float64)


def learned(running: Any, moments: Any, *, name: str, momentum: float) -> Any:
    """A running statistic after the statistics of all images."""
    mean, m2, count = (moments[..., k] for k in range(3))
    found = mean if name == "running_mean" else m2 / np.maximum(count - 1, 1)
    return learnt(np, running.astype(np.float64), found, count, momentum).astype(running.dtype)


# ---- as arrays of dask -------------------------------------------------------------------------------------------


def _named(function: Callable[..., Any], names: tuple[str, ...], *blocks: Any) -> Any:
    return function(**dict(zip(names, blocks, strict=True)))


def each(
    function: Callable[..., Any], arrays: Arrays, dtype: Any, *, like: str = "x", single: Axes = (),
    numbers: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """The function of each chunk, by names. Along the axes `single` it gives one element, and where it gives `numbers`
    they are one more axis."""
    arrays = {name: a for name, a in arrays.items() if a is not None}
    x = arrays[like]
    index = tuple(range(x.ndim - (like == "moments")))
    out = (*index, -1) if numbers else index
    # What has one more axis ends with it; that axis has one block.
    pairs = [part for a in arrays.values() for part in (a, (*index, -2)[: a.ndim])]
    options = {"dtype": dtype, **options} if like == "moments" else options
    return da.blockwise(
        partial(_named, partial(function, **options), tuple(arrays)), out, *pairs, dtype=dtype,
        meta=meta_from_array(x._meta, len(out), dtype), token=f"normkit-{function.__name__}",
        new_axes={-1: NUMBERS} if numbers else None, adjust_chunks=dict.fromkeys(single, 1), align_arrays=False,
        concatenate=True,
    )  # fmt: skip


def _as_it_is(part: Any, axis: Axes, keepdims: bool) -> Any:
    return part


def _joined(parts: Any, axis: Axes, keepdims: bool, *, join: Callable[[Any, Any], Any]) -> Any:
    first = np.moveaxis(parts, axis, range(len(axis)))
    count = math.prod(first.shape[: len(axis)])
    return np.expand_dims(reduce(join, first.reshape(count, *first.shape[len(axis) :])), axis)


def tree(parts: Any, axis: Axes, join: Callable[[Any, Any], Any] = operator.add) -> Any:
    """Parts that have one element along these axes in each chunk, joined from first to last, some at a time."""
    if all(parts.numblocks[a] == 1 for a in axis):
        return parts
    return da.reduction(
        parts, _as_it_is, partial(_joined, join=join), axis=axis, keepdims=True, dtype=parts.dtype, meta=parts._meta,
        split_every=TOGETHER, name=f"normkit-{join.__name__}",
    )  # fmt: skip


class _Tasks(MaterializedLayer):  # type: ignore[misc]
    """A layer that dask can clone: its own leaves tasks as they are."""

    def clone(self, keys: Any, seed: Any, bind_to: Any = None) -> tuple[Any, bool]:
        found: dict[Any, Any] = {}
        is_bound = False
        for key, task in convert_legacy_graph(self.mapping, {*keys, *self.mapping}).items():
            new = {name: clone_key(name, seed) for name in task.dependencies if name in keys}
            key = clone_key(key, seed)
            found[key] = Alias(key, new.get(task.target, task.target)) if isinstance(task, Alias) else None
            found[key] = found[key] or task.substitute(new, key=key)
            if bind_to is not None and not new:
                found[key], is_bound = Task(key, after, found[key], TaskRef(bind_to)), True
        return MaterializedLayer(found), is_bound


def after(value: Any, _: Any) -> Any:
    return value


def again(arrays: Arrays, parent: Any) -> Arrays:
    """The arrays computed a second time, so that nobody keeps their chunks until `parent` is known.

    Where all wait for one statistic, they are told to, so that none is read too early. What was shuffled stays as it
    is: shuffles cannot be repeated.
    """
    found: Arrays = {}
    for name, array in arrays.items():
        graph = array.__dask_graph__()
        of_tasks = MaterializedLayer, ArrayOverlapLayer
        layers = {key: _Tasks(dict(a)) if type(a) in of_tasks else a for key, a in graph.layers.items()}
        if all(isinstance(a, Blockwise | _Tasks) for a in layers.values()):
            graph = HighLevelGraph(layers, graph.dependencies)
            array = da.Array(graph, array.name, array.chunks, meta=array._meta)
            array = bind(array, parent if parent.npartitions == 1 else None, seed=parent.name)
        found[name] = array
    return found
