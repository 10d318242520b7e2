"""The fixture `measure`, and the table at the end: time / limit for each case and rival."""

import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Collection
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import limits
import normkit
import paired
import pytest
import rivals
from cases import Case
from workload import Workload, last_level_cache

SECONDS = 0.4  # for the pairs of one case, rival and number of threads
FAR = 1e4  # another mean of x, in standard deviations
workload = lru_cache(maxsize=1)(Workload)  # the runs of a case follow one another
far_workload = lru_cache(maxsize=1)(partial(Workload, mean=FAR, sets=1))


def runs(cases: list[Case], names: Collection[str] = ()) -> Any:
    """Parametrizes a benchmark over cases, rivals (all of them, or those named) and threads (1 and all, or those that
    NORMKIT_BENCHMARK_THREADS lists, such as 1,2,4); what a rival cannot do is no run."""
    threads_of = os.environ.get("NORMKIT_BENCHMARK_THREADS", f"1,{rivals.everywhere()}")
    return pytest.mark.parametrize(
        ("case", "rival", "threads"),
        [
            pytest.param(
                case, rival, threads, id=f"{case}-{rival.name}-{threads}", marks=[pytest.mark.smoke] * case.smoke
            )
            for case in cases
            for threads in sorted({*map(int, threads_of.split(","))})
            for rival in rivals.available()[0].values()
            if rival.takes(case, threads) and (not names or rival.name in names)
        ],
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh", action="store_true", help="new outputs are new pages, as glibc hands them out")
    parser.addoption("--seconds", type=float, default=SECONDS, help="for the pairs of one run (%(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("fresh"):
        paired.keep_memory()


def pytest_report_header() -> list[str]:
    found, left_out = rivals.available()
    return [
        f"rivals: {', '.join(f'{r.name} ({r.version()})' for r in found.values())}",
        *left_out,
        f"limit: {limits.kind()}; last-level cache {last_level_cache() >> 20} MB; isa {normkit.isa()}; {processor()}",
    ]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    arguments = [a for a in config.invocation_params.args if not a.startswith(("--benchmark-json", "-p", "no:"))]
    output_json["command"] = " ".join(["pytest", *arguments])


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """Times a rival on a case, paired with the limit; what the pairs tell is in `extra_info`."""

    def measure(case: Case, rival: rivals.Rival, threads: int) -> None:
        with rival.threads(threads):
            pair = checked(workload(case), rival, threads)
            once = benchmark.disabled or request.config.getoption("markexpr") == "smoke"
            rounds = 1 if once else pair.rounds(request.config.getoption("seconds"))
            benchmark.group = f"{case}, threads: {threads}"
            benchmark.pedantic(pair.turn, setup=pair.limit_turn, rounds=rounds)
            error_far = far_error(case, rival) if threads == 1 else None
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = benchmark.stats.stats.data
        ratios = sorted(t / limit for t, limit in zip(times, pair.limits, strict=True))
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        benchmark.extra_info.update(
            operation=case.operation,
            groups=case.groups,
            shape=list(case.shape),
            option=case.option,
            dtype=case.dtype,
            channels_last=case.channels_last,
            direction=case.direction,
            rival=rival.name,
            threads=threads,
            ratio=statistics.median(ratios),
            ratio_iqr=quartiles[2] - quartiles[0],
            pairs=len(ratios),
            gb_per_s=case.moved_bytes / statistics.median(times) / 1e9,
            limit_gb_per_s=case.moved_bytes / statistics.median(pair.limits) / 1e9,
            error=pair.error,
            error_far=error_far,
            limit=limits.kind(),
            isa=normkit.isa(),
            version=rival.version(),
            processor=processor(),
        )

    return measure


def checked(w: Workload, rival: rivals.Rival, threads: int) -> paired.Pair:
    """A wrong answer of a rival, or what it lacks on this machine, is no time; of normkit it is a failure."""
    try:
        return paired.Pair(w, rival, threads)
    except (AssertionError, NotImplementedError) as error:
        if rival.package == "normkit":
            raise
        pytest.skip(f"{rival.name}: {error}")


def far_error(case: Case, rival: rivals.Rival) -> float | None:
    """The error of the case with x far from zero. Half types have no digits for that, given statistics no trouble."""
    if case.dtype != "float32" or case.operation == "eval" or case.option:
        return None
    w = far_workload(case)
    return paired.error(w, rival, rival.prepare(w, 1), judged=False)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line for each case and number of threads, one column for each rival."""
    session = getattr(config, "_benchmarksession", None)
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for result in session.benchmarks if session else []:
        if "ratio" in result.extra_info:
            table[result.group][result.extra_info["rival"]] = result.extra_info
    if not table:
        return
    names = [name for name in rivals.available()[0] if any(name in row for row in table.values())]
    widths = {name: max(len(name), 6) for name in names}
    first = max(map(len, table))
    write = terminalreporter.write_line
    terminalreporter.section("time / limit: lower is better, 1.00 is the speed of memory")
    write(" " * first + "".join(f"  {name:>{widths[name]}}" for name in names))
    for group, row in table.items():
        cells = (f"{row[name]['ratio']:.2f}" if name in row else "-" for name in names)
        write(f"{group:{first}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths.values(), strict=True)))
