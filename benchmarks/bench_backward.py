"""Backward of every normalization, beside its rivals."""

from typing import Any

from cases import BACKWARD, Case
from conftest import runs
from rivals import Rival


@runs(BACKWARD)
def bench_backward(measure: Any, case: Case, rival: Rival, threads: int) -> None:
    measure(case, rival, threads)
