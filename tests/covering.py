"""Which cases of a test run when nobody asks for all: few, and yet every pair of its parameters' values."""

from collections.abc import Hashable, Mapping
from heapq import heapify, heappop, heapreplace
from itertools import combinations
from zlib import crc32

Case = Mapping[str, Hashable]


def pairs(case: Case) -> set[Hashable]:
    """Every value of the case with every other one; of a case with fewer than two factors, what there is."""
    return set(combinations(sorted(case.items()), min(2, len(case))))


def covering(cases: Mapping[str, Case]) -> set[str]:
    """Names of few cases in which every pair of values occurs that occurs in any of them.

    A case says the value of each factor, such as the operation, the dtype, the layout and the instruction set. A fault
    that shows wherever one value is, or two are together, shows in one of the chosen cases: most faults are of this
    kind (Kuhn, Wallace, Gallo: Software fault interactions, 2004). What takes three values at once is found by chance,
    and for certain where all cases run.

    The next case is always one with the most pairs that none before it had, so every factor changes from case to case.
    Which of equals comes first is a matter of its name alone: the choice is the same on every machine, and another one
    for another test that crosses the same factors.
    """
    missing = {name: pairs(case) for name, case in cases.items()}
    found: set[Hashable] = set()
    chosen: set[str] = set()
    # The number of missing pairs only falls: the first in the queue whose number is up to date is the best of all.
    queue = [(-len(missing[name]), crc32(name.encode()), name) for name in cases]
    heapify(queue)
    while queue:
        known, order, name = queue[0]
        missing[name] -= found
        if len(missing[name]) < -known:
            heapreplace(queue, (-len(missing[name]), order, name))
        elif known == 0:
            break
        else:
            chosen.add(name)
            found |= missing[name]
            heappop(queue)
    return chosen
