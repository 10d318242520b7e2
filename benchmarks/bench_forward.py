"""Forward of every normalization, beside its rivals."""

from typing import Any

from cases import FORWARD, Case
from conftest import runs
from rivals import Rival


@runs(FORWARD)
def bench_forward(measure: Any, case: Case, rival: Rival, threads: int) -> None:
    measure(case, rival, threads)
