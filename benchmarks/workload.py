"""The arrays of one case: more of them than the last-level cache holds, and the truth about the first."""

import math
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from cases import ACTIVATIONS, MASKS, VIEWS, Case
from limits import Limit

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # last, so that no module here is shadowed
import reference

EPS = 1e-5
LEAST_CACHE = 32 << 20  # where the machine does not say
MOST_SETS = 1 << 14  # the smallest arrays stay in the last-level cache, though in no other
PIECE = 1 << 18
LINE, PAGE = 64, 4096

# An answer may be off by this share of the largest that is right. It tells an answer from none, and is no judgment of
# accuracy: the largest error is reported beside each time.
WRONG = 0.01


@cache
def last_level_cache() -> int:
    """Bytes of the largest cache of a CPU, or LEAST_CACHE if that is more."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 10, "M": 20, "G": 30}
    found = [int(text[:-1]) << units[text[-1]] for text in (path.read_text().strip() for path in sizes)]
    return max([LEAST_CACHE, *found])


def dtype_named(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def arrays(count: int, shape: tuple[int, ...], dtype: np.dtype) -> list[np.ndarray]:
    """Zeros in one buffer; each at a line of its own, which spares every contender the split loads. They are written:
    pages that have only been read are all one, which the caches hold."""
    size = math.prod(shape) * dtype.itemsize
    slot = -(-size // LINE) * LINE
    buffer = np.empty(count * slot + PAGE, np.uint8)
    buffer.fill(0)
    start = -buffer.ctypes.data % PAGE
    return [np.ndarray(shape, dtype, buffer, start + k * slot) for k in range(count)]


class Workload:
    """Inputs x[k], dy[k] and outputs y[k] (dx[k], backward) of a case, with what else a call needs.

    Turns go round the sets, so that no call finds its arrays in a cache. All sets hold the same numbers.
    """

    def __init__(self, case: Case, mean: float = 0.0, sets: int = 0):
        self.case = case
        self.dtype = dtype_named(case.dtype)
        self.sets = sets or min(MOST_SETS, max(3, -(-4 * last_level_cache() // case.moved_bytes)))
        rng = np.random.default_rng(0)
        self.x = self._filled(rng, mean)
        self.dy = self._filled(rng) if case.direction == "backward" else []
        self.residual = self._filled(rng) if case.option == "residual" else []
        self.y = arrays(self.sets, case.memory, dtype_named(case.result_dtype))
        for k in range(self.sets):
            self.poison(k)
        compute = np.float64 if case.dtype == "float64" else np.float32
        self.weight, self.bias = rng.uniform(0.5, 1.0, (2, math.prod(case.parameters))).astype(compute)
        self.where = self._masks(rng) if case.option in MASKS else []
        if case.option == "mask":  # nobody scales a volume
            self.weight[...], self.bias[...] = 1, 0
        self.running_mean, self.running_var = rng.uniform(0.5, 1.5, (2, case.channels)).astype(compute)

    def _filled(self, rng: np.random.Generator, mean: float = 0.0) -> list[np.ndarray]:
        whole, seen = VIEWS.get(self.case.option, (tuple, np.asarray))
        first, *rest = map(seen, arrays(self.sets, whole(self.case.memory), self.dtype))
        if self.dtype == np.uint8:
            first[...] = rng.integers(256, size=self.case.memory, dtype=np.uint8)
        else:
            first[...] = rng.standard_normal(self.case.memory, np.float32) + np.float32(mean)
        for array in rest:
            array[...] = first
        return [first, *rest]

    def _masks(self, rng: np.random.Generator) -> list[np.ndarray]:
        n, _, *spatial = shape = self.case.shape
        if self.case.option == "where":
            frames = rng.integers(spatial[-1] // 2, spatial[-1], (n, 1, *(1 for _ in spatial)))
            return [np.arange(spatial[-1]) < frames] * self.sets
        ball = sum(a * a for a in np.ogrid[tuple(slice(-1, 1, extent * 1j) for extent in spatial)]) < 1
        return [np.broadcast_to(ball, shape).copy() for _ in range(self.sets)]

    def poison(self, k: int) -> None:
        """Fills an output with NaN, so that what is not written is seen."""
        self.y[k].view(np.uint8).fill(0xFF)

    def limit(self, threads: int) -> Limit:
        """Of the arrays of the case, or, where x is a view or a mask is read too, of dense ones with as many bytes."""
        moved = list(filter(len, (self.x, self.dy, self.residual, self.y)))
        if self.case.option in (*VIEWS, "mask"):
            size = self.case.moved_bytes // len(moved)
            moved = [arrays(self.sets, (size,), np.dtype(np.uint8)) for _ in moved]
        return Limit(list(zip(*moved, strict=True)), threads)

    def far(self, k: int) -> int:
        """The set that the limit takes when the contender takes set k: one that has left the cache."""
        return (k + self.sets // 2) % self.sets

    def _pieces(self) -> Iterator[slice]:
        """Parts of the first axis with statistics of their own, small enough for the caches."""
        first, *rest = self.case.blocks
        step = first if 0 in self.case.reduced else -(-PIECE // math.prod(rest))
        return (slice(k, k + step) for k in range(0, first, step))

    def _seen(self, array: np.ndarray, piece: slice) -> np.ndarray:
        return array.reshape(self.case.blocks)[piece].astype(np.float64)

    def _parameter(self, p: np.ndarray) -> np.ndarray:
        return p.astype(np.float64).reshape(self.case.parameters)

    def _forward(self, piece: slice) -> Any:
        case, x = self.case, self._seen(self.x[0], piece)
        weight, bias = self._parameter(self.weight), self._parameter(self.bias)
        if case.operation != "eval":
            options = {
                "where": self.where[0][piece] if self.where else True,
                "activation": case.option if case.option in ACTIVATIONS else None,
            }
            x = x + self._seen(self.residual[0], piece) if self.residual else x
            return reference.forward(x, weight, bias, case.reduced, center=case.operation != "rms", eps=EPS, **options)
        mean, var = self._parameter(self.running_mean), self._parameter(self.running_var)
        return reference.applied(x, weight, bias, case.reduced, mean=mean, rstd=reference.rstd_of(var, EPS))

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """mean and rstd as a forward would have kept them, broadcasting against `case.blocks`."""
        found = [(f.mean, f.rstd) for f in map(self._forward, self._pieces())]
        mean, rstd = (np.concatenate(s).astype(np.float32) for s in zip(*found, strict=True))
        return mean, rstd

    def _gradients(self, piece: slice) -> tuple[np.ndarray, ...]:
        case, whole = self.case, slice(None)
        found = reference.backward(
            self._seen(self.dy[0], piece),
            self._seen(self.x[0], piece),
            self._parameter(self.weight),
            case.reduced,
            rstd=self.statistics[1][whole if 0 in case.reduced else piece].astype(np.float64),
            center=case.operation != "rms",
        )
        return found.dx, *(reference.sum_to(p, case.parameters) for p in (found.dweight, found.dbias))

    @cached_property
    def truth(self) -> tuple[np.ndarray, ...]:
        """The right answer of a call on set 0, in float64: y, or dx, dweight, dbias."""
        if self.case.direction == "forward":
            return (np.concatenate([self._forward(piece).y for piece in self._pieces()]),)
        dx, *parameters = zip(*map(self._gradients, self._pieces()), strict=True)
        return np.concatenate(dx), *(np.sum(terms, 0) for terms in parameters)

    def error(self, answer: tuple[Any, ...], judged: bool = True) -> float:
        """The largest error of y; of gradients, relative to the largest of each. Judged, an answer that is none raises
        AssertionError; else it is as wrong as it is, and NaN infinitely so."""
        worst = 0.0
        for found, right in zip(answer, self.truth, strict=True):
            scale = np.abs(right).max()
            error = np.nan_to_num(np.abs(found.reshape(right.shape).astype(np.float64) - right).max(), nan=math.inf)
            is_one = not judged or error <= WRONG * scale
            assert is_one, f"off by {error:.2g}, where the largest number is {scale:.2g}"
            worst = max(worst, float(error if self.case.direction == "forward" else error / scale))
        return worst
