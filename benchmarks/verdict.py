"""What ratios head / base say of each case, however noisy the machine; no part of this measures anything.

A pair of processes gives one ratio for a case, and a coin decides which build goes first. So where both builds are the
same, a ratio of 1.3 is as likely as one of 1 / 1.3, in each pair for itself, whatever the noise: drift, bursts, heavy
tails, processes that are fast or slow from birth. That symmetry is all that Wilcoxon's signed ranks ask for, and
`interval` is theirs. What it cannot see through is a difference that comes with the build and is none of its code, such
as the length of its path: whoever measures has to leave none. In two steps:

- A few pairs of every case: those that seem slower by more than MARGIN are suspects. Nobody fails here.
- New pairs, of the suspects alone, in up to LOOKS rounds. A case is slower if the interval of all new pairs lies above
  1 + MARGIN as a whole; it is cleared where their center does not. The probability that any of equal cases is called
  slower is below MISTAKES, for all suspects and rounds together.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

MARGIN = 0.02
MISTAKES = 0.001  # the share of runs on equal builds that may fail; MARGIN makes it less
LOOKS = 3  # few where all is equal, many where a busy machine needs them
SHOWN = 0.025  # likewise at each end of the intervals that are only shown

Ratios = dict[str, list[float]]
Measure = Callable[[list[str], int], Ratios]  # (cases, pairs) -> their ratios


@functools.cache
def left_out(pairs: int, mistakes: float) -> int:
    """How many averages of two ratios lie beyond an end of the interval, which errs with at most that probability.

    The k-th smallest is above the center where the ranks of the ratios below the center sum to less than k. Each rank
    is in the sum or not, with equal chances: `ways` counts the subsets of the ranks by their sum.
    """
    ways = [1]
    for rank in range(1, pairs + 1):
        ways = [a + b for a, b in zip(ways + [0] * rank, [0] * rank + ways, strict=True)]
    errs = itertools.accumulate(ways)
    return sum(1 for _ in itertools.takewhile(lambda total: total <= mistakes * 2**pairs, errs))


def fewest_pairs(mistakes: float) -> int:
    """The fewest pairs with which an interval has an end."""
    return next(n for n in itertools.count(1) if left_out(n, mistakes))


@dataclass(frozen=True)
class Interval:
    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def interval(ratios: list[float], mistakes: float) -> Interval:
    """The interval of the center of the ratios: their Hodges-Lehmann estimate, and the ends that go with it."""
    logs = [math.log(ratio) for ratio in ratios]
    averages = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(logs, 2))
    out, last = left_out(len(ratios), mistakes), len(averages) - 1
    middle = (averages[last // 2] + averages[(last + 1) // 2]) / 2
    ends = (averages[out - 1], averages[last + 1 - out]) if out else (-math.inf, math.inf)
    return Interval(math.exp(ends[0]), math.exp(middle), math.exp(ends[1]))


def seems_slower(found: dict[str, Interval]) -> list[str]:
    return [name for name, of_case in found.items() if of_case.middle > 1 + MARGIN]


@dataclass(frozen=True)
class Verdict:
    first: dict[str, Interval]
    again: dict[str, Interval]  # of the suspects

    @property
    def slower(self) -> list[str]:
        return [name for name, found in self.again.items() if found.low > 1 + MARGIN]


def verdict(names: list[str], measure: Measure, pairs: int, pairs_again: int) -> Verdict:
    first = {name: interval(ratios, SHOWN) for name, ratios in measure(names, pairs).items()}
    result, collected = Verdict(first, {}), defaultdict(list)
    suspects = seems_slower(first)
    mistakes = MISTAKES / LOOKS / max(1, len(suspects))
    for _ in range(LOOKS):
        for name, ratios in (measure(suspects, pairs_again) if suspects else {}).items():
            collected[name] += ratios
            result.again[name] = interval(collected[name], mistakes)
        suspects = [name for name in seems_slower(result.again) if name in suspects and name not in result.slower]
    return result
