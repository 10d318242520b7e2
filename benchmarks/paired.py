"""A contender and the limit in turn, in one process: the median of the pairs' ratios is the unit of this suite."""

import ctypes
import time
from typing import Any

from rivals import Call, Rival
from workload import Workload

FEWEST, MOST = 3, 200  # pairs


def keep_memory() -> None:
    """Makes glibc keep what is freed, so that a new output costs no page faults after the first.

    It favors rivals that cannot be given outputs: without it, they pay for new pages in every call.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(trim_threshold, ctypes.c_int(2**31 - 1))
    libc.mallopt(mmap_max, 0)


def error(w: Workload, rival: Rival, call: Call, judged: bool = True) -> float:
    """The error of the answer to set 0."""
    w.poison(0)
    answer: Any = call(0)
    answer = answer if isinstance(answer, tuple | list) else (answer,)
    return w.error(tuple(rival.to_numpy(a) for a in answer), judged)


class Pair:
    """One contender on one case: `error` of its answer, then `turn()` and `limit_turn()`, of the same k in turn."""

    def __init__(self, w: Workload, rival: Rival, threads: int):
        self.w, self.rival = w, rival
        self._call = rival.prepare(w, threads)
        self._limit = w.limit(threads)
        self._rest = rival.lingers if threads > 1 else 0.0
        self._k = -1
        self._kept = [None] * w.sets  # so that new outputs rotate as given ones do
        self._woken: Any = None
        self.error = error(w, rival, self._call)
        self.limits: list[float] = []

    def limit_turn(self) -> None:
        self._k = (self._k + 1) % self.w.sets
        self._kept[self._k] = None
        if self._rest:  # lingering threads would slow the limit; after a pause all are slow at first
            time.sleep(self._rest)
            self._limit.seconds(self.w.far(self._k + 1))
        self.limits.append(self._limit.seconds(self.w.far(self._k)))
        if self._rest:  # kept until after the turn, which else would be given its memory, still in the cache
            self._woken = self._call((self._k + 1) % self.w.sets)

    def turn(self) -> None:
        self._kept[self._k] = self._call(self._k)

    def seconds(self) -> float:
        """The seconds that one turn takes."""
        start = time.perf_counter()
        self.turn()
        return time.perf_counter() - start

    def rounds(self, budget: float) -> int:
        """How many pairs fit into `budget` seconds. First calls, which may cost more, get a quarter of that before."""
        start = time.perf_counter()
        for k in range(min(self.w.sets, MOST)):
            self._call(k)
            if time.perf_counter() - start > budget / 4:
                break
        self.limit_turn()
        took = (self.seconds() + self.limits[-1]) * (2 if self._rest else 1) + self._rest
        self.limits.clear()
        return max(FEWEST, min(MOST, int(budget / took)))


def ratios(pair: Pair, budget: float) -> list[float]:
    found = []
    for _ in range(pair.rounds(budget)):
        pair.limit_turn()
        found.append(pair.seconds() / pair.limits[-1])
    return found
