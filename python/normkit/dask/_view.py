"""How a call lies in the axes of x, chunk by chunk."""

import math
from typing import Any

import dask.array as da
import numpy as np

from .._operations import Frame, Spec


class View:
    """x with its statistics over some of its axes, and how other arrays lie beside it.

    The channels of group norm are seen as two axes, groups and the channels of each. Where the edge of a group lies
    within a chunk, or that of a chunk within a group, chunks are cut there; nothing else is done to the chunks of x.
    """

    def __init__(self, spec: Spec, x: Any) -> None:
        has_groups = spec.kind == "group"
        self.frame = Frame(spec._replace(kind="instance") if has_groups else spec, x.shape)
        self.shape, self.chunks, self.pieces = x.shape, x.chunks, x.chunks
        self.takes_any = spec.kind in ("centered", "uncentered")  # weights that broadcast
        self.split = spec.axes[0] % x.ndim if has_groups else -1
        axis = [a for a in range(x.ndim) if a not in self.frame.kept]
        if has_groups:
            self.groups, at = spec.groups, self.split
            self.size = x.shape[at] // self.groups
            self.cut = math.gcd(self.size, *map(int, np.cumsum(x.chunks[at])))
            if self.cut != self.size:
                self.pieces = (*x.chunks[:at], (self.cut,) * (x.shape[at] // self.cut), *x.chunks[at + 1 :])
            axis = sorted([at + 1, *(a + (a > at) for a in axis)])
        self.axis = tuple(axis)
        self.x = self.of(x)
        self.kept_chunks = tuple(c for a, c in enumerate(self.x.chunks) if a not in self.axis)
        self.is_whole = all(self.x.numblocks[a] == 1 for a in self.axis)

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
        if self.cut == self.size:
            return array.reshape((*array.shape[:at], self.groups, self.size, *array.shape[at + 1 :]))
        starts = range(0, self.shape[at], self.size)
        return da.stack([array[(slice(None),) * at + (slice(k, k + self.size),)] for k in starts], at)

    def back(self, array: Any, shape: Any = None) -> Any:
        """The array of this shape, or that of x, that has this view."""
        at = self.split
        if at >= 0 and array.shape[at] != self.groups:
            array = array.squeeze(at)
        elif at >= 0 and self.cut == self.size:
            array = array.reshape((*array.shape[:at], self.shape[at], *array.shape[at + 2 :]))
        elif at >= 0:
            array = da.concatenate([array[(slice(None),) * at + (k,)] for k in range(self.groups)], at)
        array = self._beside(array, self.shape, self.chunks)
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
            extents = tuple(map(sum, self.kept_chunks))
            array = da.full(extents, array, dtype=np.float64, chunks=self.kept_chunks)
        array = array[tuple(None if a in self.axis else slice(None) for a in range(self.x.ndim))]
        return self._beside(array, self.x.shape, self.x.chunks)
