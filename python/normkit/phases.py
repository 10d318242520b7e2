"""The two phases of a normalization, for data in parts: tiles of an image, files larger than memory, several machines.

    whole = nk.merge([nk.moments(part, axis=0) for part in parts])
    ys = [nk.apply(part, whole, whole.rstd(1e-5), axis=0) for part in parts]

Moments of parts merge, sums of the backward add. Both are held in float64, so that parts lose nothing by being parts:
beside arrays of JAX, which holds float64 with jax_enable_x64 alone, they are arrays of NumPy where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np

from . import _core
from ._compiled import body, compiled
from ._memory import Memory, library_of, views_of
from ._types import Activation, Array, Axes, Flag, Float, Mask, Number, Statistics


def _float(name: str, number: Any) -> float:
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is {number!r}, expected a number that float64 has") from None


class Moments:
    """Number, mean and sum of squared deviations of the members of each statistic, in float64.

    A value: it can be made of stored numbers, pickled, copied and compared, and its arrays are the caller's own. Where
    JAX holds no float64 (without jax_enable_x64), they are NumPy's, and the phases take them beside JAX's.

    Parameters
    ----------
    count, mean, m2, mean_low : one shape, that of x without `axis`
        Real numbers, or arrays of any real dtype, of one library and device. A number stands for all statistics. Where
        count is 0, so are the others. Without centering mean is None and m2 the sum of squares. The mean is
        ``mean + mean_low``: far from zero a float64 has too few digits for the mean of float64 numbers. Of other x
        mean_low is 0.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> m = nk.moments(np.float32([[1, 2, 3], [5, 5, 5]]), axis=1)
    >>> m == nk.Moments(count=3, mean=np.array([2, 5]), m2=np.array([2, 0]))
    True
    >>> m.var(correction=1)
    array([1., 0.])
    """

    __slots__ = ("_centered", "_memory", "_numbers", "_twofold")
    _numbers: Any  # mean, m2, count and mean_low along the last axis, as an array that its memory computes with
    _memory: Memory
    _centered: bool
    _twofold: bool  # merges keep what a mean has left over, as those of float64 x do

    def __init__(
        self, count: Statistics, mean: Statistics | None, m2: Statistics, mean_low: Statistics | None = None
    ) -> None:
        low = 0 if mean_low is None else mean_low
        given: dict[str, Any] = {"mean": 0 if mean is None else mean, "m2": m2, "count": count, "mean_low": low}
        numbers = {name: _float(name, v) for name, v in given.items() if _core.is_number(v)}
        if len(numbers) == len(given):
            given["m2"] = np.asarray(numbers.pop("m2"))
        views, memory = views_of(**{name: v for name, v in given.items() if name not in numbers})
        with memory:
            wide: dict[str, Any] = {}
            for name, view in views.items():
                first = next(iter(wide), name)
                kind = "None" if view is None else str(view.dtype).rpartition(".")[2]
                if not kind.startswith(("float", "bfloat", "int", "uint")):
                    raise TypeError(f"{name} has dtype {kind}, expected real numbers")
                if view.shape != views[first].shape:
                    shape, expected = tuple(view.shape), tuple(views[first].shape)
                    raise ValueError(f"{name} has shape {shape}, expected {expected}, that of {first}")
                wide[name] = memory.wide(view)
            zeros = memory.xp.zeros_like(next(iter(wide.values())))
            parts = [wide[name] if name in wide else zeros + numbers[name] for name in given]
            self._numbers = memory.xp.stack(parts, -1)
            if not bool((self._numbers[..., 2] >= 0).all()):
                raise ValueError("count has what is negative or NaN, expected the number of members of each statistic")
        self._memory, self._centered, self._twofold = memory, mean is not None, mean_low is not None

    @classmethod
    def _of(cls, numbers: Any, memory: Memory, centered: bool, twofold: bool) -> Moments:
        found = cls.__new__(cls)
        found._numbers, found._memory, found._centered, found._twofold = numbers, memory, centered, twofold
        return found

    def __repr__(self) -> str:
        low = f", mean_low={self.mean_low!r}" if self._twofold else ""
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r}{low})"

    def __eq__(self, other: object) -> bool:
        """True where all numbers are the same. NaN is the same as NaN."""
        if not isinstance(other, Moments):
            return NotImplemented
        a, b = self._numbers, other._numbers
        if type(a) is not type(b) or a.shape != b.shape or self._centered != other._centered:
            return False
        with self._memory:
            return bool(((a == b) | ((a != a) & (b != b))).all())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Moments], tuple[Any, ...]]:
        return Moments, (self.count, self.mean, self.m2, self.mean_low if self._twofold else None)

    def _part(self, k: int) -> Any:
        with self._memory as memory:
            return memory.hand_over(memory.wide(self._numbers[..., k]))

    @property
    def count(self) -> Any:
        """The number of members of each statistic."""
        return self._part(2)

    @property
    def mean(self) -> Any:
        """The mean of each statistic, rounded to float64; None without centering."""
        return self._part(0) if self._centered else None

    @property
    def m2(self) -> Any:
        """The sum of squared deviations from the mean; without centering, of squares."""
        return self._part(1)

    @property
    def mean_low(self) -> Any:
        """What rounding took from the mean: 0 unless x was float64."""
        return self._part(3)

    def merge(self, other: Moments) -> Moments:
        """The moments of the members of both, which share none.

        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other is {other!r}, expected Moments")
        if type(other._numbers) is not type(self._numbers):
            theirs, ours = (library_of(m._numbers) for m in (other, self))
            raise TypeError(f"other has arrays of {theirs}, expected {ours}: all parts share a library")
        if other._numbers.shape != self._numbers.shape:
            found, expected = (tuple(m._numbers.shape[:-1]) for m in (other, self))
            raise ValueError(f"other has statistics of shape {found}, expected {expected}")
        if other._centered != self._centered:
            raise ValueError("other is centered and this is not, or the other way round: expected both alike")
        with self._memory as memory:
            twofold = self._twofold or other._twofold
            merged = memory.merged(self._numbers, other._numbers, twofold)
        return Moments._of(merged, memory, self._centered, twofold)

    def var(self, correction: Number = 0) -> Any:
        """m2 / (count - correction); 0 where there are no members, NaN where `correction` leaves none."""
        with self._memory as memory:
            return memory.hand_over(self._var(memory, correction))

    def _var(self, memory: Memory, correction: Number) -> Any:
        if not _core.is_number(correction):
            raise TypeError(f"correction is {correction!r}, expected a number")
        with np.errstate(all="ignore"):
            where, count, m2 = memory.xp.where, self._numbers[..., 2], self._numbers[..., 1]
            left = count - correction
            return where(left > 0, m2 / left, where(count == 0, 0.0, math.nan))

    def std(self, correction: Number = 0) -> Any:
        """The square root of `var(correction)`."""
        with self._memory as memory:
            return memory.hand_over(memory.xp.sqrt(self._var(memory, correction)))

    def _deviation(self, eps: Number) -> Any:
        """sqrt(var + eps)."""
        with self._memory as memory:
            return memory.hand_over(memory.deviation(self._numbers, eps, inverse=False))

    def rstd(self, eps: Number = 1e-5) -> Any:
        """1 / sqrt(var + eps), as the normalizations have it: 0 where there are no members, or where var + eps is 0."""
        with self._memory as memory:
            return memory.hand_over(memory.deviation(self._numbers, eps, inverse=True))


def merge(moments: Iterable[Moments]) -> Moments:
    """The moments of all parts together, merged from the first to the last.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Parameters
    ----------
    moments : iterable of Moments
        Those of the parts, of one shape, library and device.

    Returns
    -------
    Moments
        Those of the whole.

    Raises
    ------
    TypeError, ValueError
        Where there are none, or they do not go together.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> whole = nk.merge(nk.moments(np.array(part), axis=0) for part in ([1.0, 2.0], [3.0], [6.0]))
    >>> float(whole.count), float(whole.mean)
    (4.0, 3.0)
    """
    parts = list(moments)
    if not parts:
        raise ValueError("moments is empty, expected at least one")
    for part in parts:
        if not isinstance(part, Moments):
            raise TypeError(f"moments has {part!r}, expected Moments")
    return reduce(Moments.merge, parts)


@compiled("moments", "normalize")
def _moments(x: Array, *, axis: Axes, center: Flag = True, where: Mask | None = None) -> tuple[Any, Memory, bool]:
    """Mean, m2, count and mean_low of each statistic, their memory, and whether x is float64."""
    body()


def moments(x: Array, *, axis: Axes, center: Flag = True, where: Mask | None = None) -> Moments:
    """The moments of x over `axis`: the first phase of `normalize`, and of every named normalization.

    They are merged in float64, whatever the dtype of x. Chunks of float64 x are summed in float64, so that mean +
    mean_low and m2 are exact to a few roundings of it; of other x in float32: of random numbers the mean is within 1e-6
    standard deviations, and m2 within 1e-5 of itself, as a rule ten times nearer.

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    center
        False: the sum of squares, for a root mean square.
    where : bool, broadcasts against x, optional
        The members; the others may be NaN.

    Returns
    -------
    Moments
        Of each statistic.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Naming the argument.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> left, right = np.array([1.0, 2.0]), np.array([3.0, 6.0])
    >>> m = nk.moments(left, axis=0).merge(nk.moments(right, axis=0))
    >>> float(m.count), float(m.mean), float(m.var())
    (4.0, 3.0, 3.5)
    """
    numbers, memory, twofold = _moments(x, axis=axis, center=center, where=where)
    return Moments._of(numbers, memory, bool(center), twofold)


@compiled("apply", "normalize", center=None)
def apply(
    x: Array,
    mean: Statistics | Moments | None,
    rstd: Statistics,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    axis: Axes,
    out: Array | None = None,
    out_dtype: Float = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> Any:
    """Normalize x by statistics that are given: the second phase of `normalize`.

        y = (x - mean) * rstd * weight + bias

    Parameters
    ----------
    x : any shape
        The dtypes that `instance_norm` takes, with any strides.
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        A mean of None is 0. In float64, as `Moments` has them, they keep what a float32 rounds off. A number stands for
        all statistics. `Moments` in the place of a mean give all of its digits: y has the bits of one call.
    weight, bias : broadcast against x as in NumPy, optional
        Of float32, float64 or the dtype of x.
    axis
        The axes that mean and rstd do not have: one or several, each from -x.ndim to x.ndim - 1; None: all of them.

    Returns
    -------
    y
        Like x.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.apply(np.array([[1.0, 2.0, 6.0]]), 3.0, 0.5, axis=1).tolist()
    [[-1.0, -0.5, 1.5]]
    """
    body()


@compiled("backward_sums", "normalize", center=None)
def backward_sums(
    dy: Array,
    x: Array,
    mean: Statistics | Moments | None,
    rstd: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
) -> Any:
    """What the gradient of each statistic needs to know of a part: the first phase of `normalize_backward`.

    Sums of g, of g * (x - mean) and of x - mean, where g = dy * weight. The last one, over the members alone, makes
    good what a rounded mean lost.

    Parameters
    ----------
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As in `apply`.
    weight : broadcasts against x, optional
        That of the forward.

    Returns
    -------
    the shape of x without `axis`, and 3
        Sums of float64. Those of parts add, whatever the library: ``sums + others``. Beside an x of JAX, where that
        holds no float64, an array of NumPy.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        Naming the argument.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x, dy = np.array([[1.0, 2.0, 6.0]]), np.array([[1.0, 0.0, 1.0]])
    >>> nk.backward_sums(dy, x, 3.0, 0.5, axis=1).tolist()
    [[2.0, 1.0, 0.0]]
    """
    body()


@compiled("apply_backward", "normalize", center=None)
def apply_backward(
    dy: Array,
    x: Array,
    mean: Statistics | Moments | None,
    rstd: Statistics,
    sums: Array,
    count: Statistics,
    weight: Array | None = None,
    *,
    axis: Axes,
    out: Array | None = None,
    where: Mask | None = None,
    bias: Array | None = None,
    activation: Activation = None,
    weight_offset: Number = 0.0,
    dresidual: Array | None = None,
) -> Any:
    """The gradient of a part, once the sums of all parts are known: the second phase of `normalize_backward`.

        dx = rstd * (g - sum(g) / count - x_hat * sum(g * x_hat) / count),    g = dy * weight

    Parameters
    ----------
    mean, rstd : the shape of x without `axis`, of float32 or float64, or numbers
        As in `apply`.
    sums : as `backward_sums` gives them
        Those of all parts, added.
    count : the shape of rstd, or a number
        The members of each statistic, all parts together.
    weight : broadcasts against x, optional
        That of the forward.

    Returns
    -------
    dx
        Like x.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x, dy = np.array([[1.0, 2.0, 6.0]]), np.array([[1.0, 0.0, 1.0]])
    >>> sums = nk.backward_sums(dy, x, 3.0, 0.5, axis=1)
    >>> nk.apply_backward(dy, x, 3.0, 0.5, sums, 3, axis=1).round(3).tolist()
    [[0.25, -0.292, 0.042]]
    """
    body()
