"""How a call lies in the axes of x, chunk by chunk."""

import math
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np

from .._operations import Frame, Spec
from ._chunks import tree


class View:
    """x with its statistics over some of its axes, and how other arrays lie beside it.

    Where chunks hold whole groups, the channels of group norm are seen as two axes, groups and the channels of each.
    Else they stay one axis, chunks are cut at the edges of groups that lie within them, and a group is some pieces in
    a row. Nothing else is done to the chunks of x.
    """

    def __init__(self, spec: Spec, x: Any) -> None:
        has_groups = spec.kind == "group"
        self.frame = Frame(spec._replace(kind="instance") if has_groups else spec, x.shape)
        # An extent of 1 in one chunk: in more, which are empty, it could not be told from one that broadcasts.
        chunks = tuple(c if extent != 1 else (1,) for c, extent in zip(x.chunks, x.shape, strict=True))
        self.shape, self.own, self.chunks, self.pieces = x.shape, x.chunks, chunks, chunks
        self.takes_any = spec.kind in ("centered", "uncentered")  # weights that broadcast
        self.split, self.cut = -1, -1  # the axis of channels where it is seen as two, and where it is cut
        lacking = [a for a in range(x.ndim) if a not in self.frame.kept]
        self.axis = tuple(lacking)
        if has_groups:
            at = spec.axes[0] % x.ndim
            self.groups, self.size = spec.groups, x.shape[at] // spec.groups
            self.is_stacked = self.groups == 1 or not self.size  # dask splits no axis without elements
            edges, of_groups = {*map(int, np.cumsum(chunks[at]))}, [k * self.size for k in range(self.groups + 1)]
            if self.groups == 1 or edges.issubset(of_groups):
                self.split = at
                lacking = sorted([at + 1, *(a + (a > at) for a in lacking)])
                self.axis = tuple(lacking)
            else:
                self.cut, self.axis = at, tuple(sorted([at, *lacking]))
                cuts = sorted(edges.union(of_groups))
                self.pieces = (*chunks[:at], tuple(b - a for a, b in pairwise(cuts)), *chunks[at + 1 :])
                self.firsts = [cuts.index(edge) for edge in of_groups]  # of the pieces of each group
        self.x = self.of(x)
        self.is_whole = all(self.x.numblocks[a] == 1 for a in self.axis)
        self.lacking = tuple(lacking)  # what statistics lack
        self.kept = {a: c if a != self.cut else (1,) * self.groups for a, c in enumerate(self.x.chunks)}
        for a in self.lacking:
            del self.kept[a]

    def _beside(self, array: Any, shape: Any, chunks: Any) -> Any:
        """With the chunks of x along axes that have the extent of x."""
        each = zip(array.shape, shape, chunks, strict=True)
        return array.rechunk(tuple(c if own == extent else (own,) for own, extent, c in each), method="tasks")

    def of(self, array: Any) -> Any:
        """An array that broadcasts against x, beside the view."""
        array = array[(None,) * (len(self.shape) - array.ndim)]
        array, at = self._beside(array, self.shape, self.pieces), self.split
        if at < 0:
            return array
        if array.shape[at] != self.shape[at]:
            return array[(slice(None),) * at + (None,)]
        if self.is_stacked:
            return da.stack([array] * self.groups, at)
        return array.reshape((*array.shape[:at], self.groups, self.size, *array.shape[at + 1 :]))

    def back(self, array: Any, shape: Any = None) -> Any:
        """The array of this shape, or that of x, that has this view."""
        at = self.split
        if at >= 0 and (array.shape[at] != self.groups or self.is_stacked):
            array = array[(slice(None),) * at + (0,)]
        elif at >= 0:
            array = array.reshape((*array.shape[:at], self.shape[at], *array.shape[at + 2 :]))
        array = self._beside(array, self.shape, self.own if shape is None else self.chunks)
        return array if shape is None or array.shape == tuple(shape) else array.reshape(shape)

    def param(self, array: Any) -> Any:
        """A weight or the like, which may lack axes."""
        shape = array.shape
        if not self.takes_any and len(shape) < len(self.shape):
            array = array.reshape(self.frame.param_shape(shape))
        return self.of(array)

    def absent(self) -> tuple[int, ...]:
        """The shape of the gradient of a weight that is not there."""
        return tuple(self.frame.absent_shape())

    def ones(self, dtype: Any) -> Any:
        """A weight of that shape, beside the view."""
        shape = self.frame.param_shape(self.absent())
        return self.of(da.ones(shape, dtype=dtype, chunks=-1 if math.prod(shape) < 1 << 20 else "auto"))

    def statistics(self, array: Any) -> Any:
        """Statistics with the axes that they are taken over, as extents of 1. A number stands for all."""
        if not hasattr(array, "shape"):
            chunks = tuple(self.kept.values())
            array = da.full(tuple(map(sum, chunks)), array, dtype=np.float64, chunks=chunks)
        array = array[tuple(None if a in self.lacking else slice(None) for a in range(self.x.ndim))]
        return self.spread(array.rechunk(self.kept, method="tasks"))

    def joined(self, parts: Any, join: Callable[[Any, Any], Any] = operator.add) -> Any:
        """What chunks of the view give, one element each, joined to one for each statistic."""
        if self.cut < 0:
            return tree(parts, self.axis, join)
        before = (slice(None),) * self.cut
        each = [tree(parts.blocks[(*before, slice(a, b))], self.axis, join) for a, b in pairwise(self.firsts)]
        return da.concatenate(each, self.cut)

    def spread(self, array: Any) -> Any:
        """One element for each statistic, beside the chunks of the view."""
        if self.cut < 0:
            return array
        groups = [k for k, (a, b) in enumerate(pairwise(self.firsts)) for _ in range(a, b)]
        return array.blocks[(*(slice(None),) * self.cut, groups)]
