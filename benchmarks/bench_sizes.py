"""Instance norm of 64 instances from 1 KB to 1 GB: where the call ends and the memory begins."""

from typing import Any

from cases import SIZES, Case
from conftest import runs
from rivals import Rival


@runs(SIZES, ("normkit", "torch", "NumPy, two lines"))
def bench_sizes(measure: Any, case: Case, rival: Rival, threads: int) -> None:
    measure(case, rival, threads)
