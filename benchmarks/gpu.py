"""Times on a GPU: `benchmarks/gpu.sh`, or `python benchmarks/gpu.py --json results.json` where all is installed.

Every figure is time / limit: the fastest copy of as many bytes as any implementation must move, in the same loop. What
a rival does with all sets of arrays is one CUDA graph, timed by events, so that no launch is waited for; sets are at
least four and four times the second-level cache, each of numbers of its own. Graphs of rival and copy take turns, and
the figure is the median of the pairs' ratios. Beside it: microseconds of a call in the graph, of one on the same set
again and again, and of one as programs make it.
An answer is compared with float64 first, in memory that held NaNs; a wrong one gets no time. All leave what a backward
needs: forward writes statistics, backward gives all three gradients.

`--dry-run` does all of it with NumPy on small arrays: for tests of this file.
"""

import argparse
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import gpu_rivals
import normkit
import numpy as np
import report
from cases import Case
from rivals import evaluated, gradients, two_lines
from workload import EPS, WRONG, dtype_named

PAIRS, WARM_UP = 50, 3
LEAST_SETS, MOST_SETS = 4, 256
PIECE = 1 << 26  # elements whose truth is in memory at a time

F32, F16, BF16 = "float32", "float16", "bfloat16"
IMAGES = [
    Case("instance", (16, 64, 256, 256), F16),
    Case("instance", (8, 64, 512, 512), F16),
    Case("instance", (32, 256, 56, 56), F16),
    Case("instance", (64, 512, 7, 7), F16),
    Case("instance", (1, 3, 1024, 1024)),
    Case("instance", (1, 64, 35, 45)),
    Case("instance", (2, 32, 128, 128, 128)),
    Case("instance", (2, 32, 128, 128, 128), F16),
    Case("instance", (2, 320, 8, 8, 8), F16),
    Case("group", (32, 256, 56, 56), F16, groups=32),
    Case("group", (1, 512, 16, 180, 320), BF16, groups=32),
    Case("batch", (4, 128, 1024, 1024), F16),
    Case("batch", (8, 64, 32, 32), F16),
]
ONE_ROW = Case("instance", (1, 1, 4096, 4096))
FUSED = Case("group", (1, 128, 20, 256, 256), BF16, groups=32, option="silu")
ROWS = [
    Case(operation, shape, BF16)
    for operation in ("layer", "rms")
    for shape in ((16384, 4096), (131072, 128), (1024, 12288), (8192, 65536))
]
FORWARD = [*IMAGES, *(replace(c, channels_last=True) for c in IMAGES), ONE_ROW, FUSED, *ROWS]
CASES = [*FORWARD, *(replace(c, direction="backward") for c in FORWARD if not c.option)]


def shrunk(case: Case) -> Case:
    """The same with extents that a dry run has the time for."""
    n, c, *spatial = case.shape
    if case.rows:
        return replace(case, shape=(min(n, 4), min(c, 64)))
    return replace(case, shape=(min(n, 2), min(c, 2 * max(case.groups, 4)), *(min(s, 5) for s in spatial)))


class Sets:
    """Arrays of a case on the device, as `Workload` has them on the CPU: x[k], dy[k] and y[k] of set k."""

    def __init__(self, case: Case, xp: Any, cache: int) -> None:
        self.case, self.xp = case, xp
        self.dtype = dtype_named(case.dtype)
        self.sets = min(MOST_SETS, max(LEAST_SETS, -(-4 * cache // case.moved_bytes)))
        self.random = xp.random.default_rng(0)
        self.x = [self._normal() for _ in range(self.sets)]
        self.dy = [self._normal() for _ in range(self.sets)] if case.direction == "backward" else []
        self.residual: list[Any] = []
        self.y = [xp.empty(case.memory, self.dtype) for _ in range(self.sets)]
        self.weight, self.bias = (
            0.5 + 0.5 * self.random.random((math.prod(case.parameters),), dtype=np.float32) for _ in range(2)
        )
        self.running_mean, self.running_var = (self.random.random((case.channels,), dtype=np.float32) for _ in range(2))

    def poison(self) -> None:
        """Fills the outputs with NaN, so that what is not written is seen: no answer of another rival remains."""
        for y in self.y:
            y.view(np.uint8).fill(0xFF)

    def _normal(self) -> Any:
        return self.random.standard_normal(self.case.memory, dtype=np.float32).astype(self.dtype)

    def _pieces(self) -> Iterator[slice]:
        first, *rest = self.case.blocks
        step = first if 0 in self.case.reduced else max(1, PIECE // math.prod(rest))
        return (slice(k, k + step) for k in range(0, first, step))

    def _wide(self, array: Any, piece: slice) -> Any:
        return array.reshape(self.case.blocks)[piece].astype(np.float64)

    def _parameter(self, p: Any) -> Any:
        return p.astype(np.float64).reshape(self.case.parameters)

    @cached_property
    def all_statistics(self) -> list[tuple[Any, Any]]:
        """mean and rstd of each set, broadcasting against `case.blocks`."""
        xp, axis, found = self.xp, self.case.reduced, []
        for x in self.x:
            parts = []
            for piece in self._pieces():
                wide = self._wide(x, piece)
                mean = wide.mean(axis, keepdims=True) if self.case.operation != "rms" else xp.zeros((1,))
                var = ((wide - mean) ** 2).mean(axis, keepdims=True)
                parts.append((xp.broadcast_to(mean, var.shape), 1 / xp.sqrt(var + EPS)))
            found.append(tuple(xp.concatenate(s).astype(np.float32) for s in zip(*parts, strict=True)))
        return found

    def _truth(self, piece: slice) -> tuple[Any, ...]:
        """y, or dx and what a piece adds to dweight and dbias, of set 0."""
        case, xp, x = self.case, self.xp, self._wide(self.x[0], piece)
        axis, weight, bias = case.reduced, self._parameter(self.weight), self._parameter(self.bias)
        if case.direction == "backward":
            mean, rstd = (s[slice(None) if 0 in axis else piece].astype(np.float64) for s in self.all_statistics[0])
            return gradients(self._wide(self.dy[0], piece), x, mean, rstd, weight, axis, case.operation != "rms")
        if case.operation == "eval":
            return (evaluated(xp, x, weight, bias, *map(self._parameter, (self.running_mean, self.running_var))),)
        y = two_lines(xp, x, weight, bias, axis=axis, center=case.operation != "rms")
        return (y / (1 + xp.exp(-y)) if case.option == "silu" else y,)

    def error(self, answer: tuple[Any, ...]) -> float:
        """The largest error of set 0, relative to the largest number that is right."""
        first, *sums = answer
        worst = largest = 0.0

        def largest_of(a: Any) -> float:
            return float(np.nan_to_num(float(abs(a).max()), nan=math.inf))

        total: list[Any] = [0.0] * len(sums)
        for piece in self._pieces():
            right, *terms = self._truth(piece)
            worst = max(worst, largest_of(self._wide(first, piece) - right))
            largest = max(largest, largest_of(right))
            total = [a + b for a, b in zip(total, terms, strict=True)]
        errors = [worst / largest]
        for found, right in zip(sums, total, strict=True):
            errors.append(largest_of(found.reshape(right.shape) - right) / largest_of(right))
        return max(errors)


# ---- timers ------------------------------------------------------------------------------------------------------


class Cuda:
    """Events on a stream of its own, on which everything happens."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.stream = cupy, cupy.cuda.Stream(non_blocking=True)
        device = cupy.cuda.Device()
        self.cache = device.attributes["L2CacheSize"]
        self.chip = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        self.about = f"sm_{device.compute_capability}, {normkit._core.cuda}"

    def fits(self, case: Case) -> bool:
        self.cupy.get_default_memory_pool().free_all_blocks()
        sets = max(LEAST_SETS, 4 * self.cache / case.moved_bytes)
        return 1.2 * sets * case.moved_bytes + 6 * 8 * min(PIECE, case.elements) < self.cupy.cuda.Device().mem_info[0]

    def work(self) -> AbstractContextManager[Any]:
        return self.stream

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """What `run` enqueues by way of CuPy, as a graph. Its memory is its own."""
        pool = self.cupy.cuda.MemoryPool()
        with self.cupy.cuda.using_allocator(pool.malloc):
            run()
            self.stream.synchronize()
            self.stream.begin_capture()
            kept = run()
            graph = self.stream.end_capture()

        def launch(memory: Any = (pool, kept)) -> None:
            graph.launch(self.stream)

        return launch

    def seconds(self, launch: Callable[[], Any]) -> float:
        start, end = (self.cupy.cuda.Event() for _ in range(2))
        start.record(self.stream)
        launch()
        end.record(self.stream)
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end) / 1e3

    def copies(self, sets: Sets) -> list[tuple[str, Callable[[], None]]]:
        """Ways to move as many bytes as the case, half of them read and half written, set by set."""
        size = sets.case.moved_bytes // 2 // 16 * 16
        source, target = (self.cupy.empty((size * sets.sets,), np.uint8) for _ in range(2))
        source.fill(1)
        kernel = self.cupy.RawKernel(COPY, "copy")
        runtime, words = self.cupy.cuda.runtime, size // 16
        blocks = max(1, min(-(-words // 256), 1 << 16))

        def by_driver() -> None:
            for k in range(sets.sets):
                at = k * size
                args = target.data.ptr + at, source.data.ptr + at, size, runtime.memcpyDeviceToDevice, self.stream.ptr
                runtime.memcpyAsync(*args)

        def by_kernel() -> None:
            for k in range(sets.sets):
                part = slice(k * size, (k + 1) * size)
                kernel((blocks,), (256,), (target[part], source[part], np.int64(words)))

        return [("memcpy", by_driver), ("a kernel", by_kernel)]


COPY = r"""
extern "C" __global__ void copy(int4* to, const int4* from, long long words) {
  const long long step = (long long)gridDim.x * blockDim.x;
  for (long long k = blockIdx.x * (long long)blockDim.x + threadIdx.x; k < words; k += step) to[k] = from[k];
}
"""


class Dry:
    """Everything but a GPU. `clock` tells seconds."""

    cache, chip, about = 1 << 12, platform.processor() or "CPU", "dry run"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def fits(self, case: Case) -> bool:
        return True

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def seconds(self, launch: Callable[[], Any]) -> float:
        start = self.clock()
        launch()
        return self.clock() - start

    def copies(self, sets: Sets) -> list[tuple[str, Callable[[], None]]]:
        def by_numpy() -> None:
            for x, y in zip(sets.x, sets.y, strict=True):
                np.copyto(y, x)

        return [("NumPy", by_numpy)]


# ---- a run -------------------------------------------------------------------------------------------------------


def measured(sets: Sets, rival: Any, timer: Any, copy: tuple[str, Callable[[], Any]], pairs: int) -> dict[str, Any]:
    """Raises what the rival raises, and AssertionError where its answer is none."""
    call, case, every = rival.prepare(sets, 1), sets.case, range(sets.sets)
    sets.poison()
    answer = rival.arrays_of(call(0), sets)
    error = sets.error(answer if case.direction == "backward" else answer[:1])
    assert error <= WRONG, f"off by {error:.2g} of the largest number"
    launch = rival.recorded(timer, lambda: [call(k) for k in every])
    seconds = rival.seconds if hasattr(rival, "seconds") else timer.seconds
    for _ in range(WARM_UP):
        seconds(launch), timer.seconds(copy[1])
    limits, times = zip(*((timer.seconds(copy[1]), seconds(launch)) for _ in range(pairs)), strict=True)
    plain = [seconds(lambda: [call(k) for k in every]) for _ in range(5)]
    same = rival.recorded(timer, lambda: [call(0) for _ in every])  # one set, which stays in the cache where it fits
    warm = [seconds(same) for _ in range(5)]
    ratios = [t / limit for t, limit in zip(times, limits, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    per_call = statistics.median(times) / sets.sets
    return {
        **{key: getattr(case, key) for key in ("operation", "groups", "option", "dtype", "channels_last", "direction")},
        "shape": list(case.shape),
        "rival": rival.name,
        "version": rival.version(),
        "ratio": middle,
        "ratio_iqr": high - low,
        "pairs": pairs,
        "us": per_call * 1e6,
        "us_plain": statistics.median(plain) / sets.sets * 1e6,
        "us_warm": statistics.median(warm) / sets.sets * 1e6,
        "gb_per_s": case.moved_bytes / per_call / 1e9,
        "limit_gb_per_s": case.moved_bytes * sets.sets / statistics.median(limits) / 1e9,
        "limit": copy[0],
        "error": error,
        "processor": timer.chip,
        "isa": timer.about,
    }


def fastest_copy(sets: Sets, timer: Any) -> tuple[str, Callable[[], Any]]:
    found = [(name, timer.recorded(run)) for name, run in timer.copies(sets)]
    return min(found, key=lambda f: min(timer.seconds(f[1]) for _ in range(WARM_UP + 1)))


def run(cases: list[Case], rivals: list[Any], timer: Any, xp: Any, pairs: int) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        takers = [rival for rival in rivals if rival.takes(case, 1)]
        if not takers or not timer.fits(case):
            print(f"{case}: left out, {'it does not fit the memory' if takers else 'nobody takes it'}", flush=True)
            continue
        with timer.work():
            sets = Sets(case, xp, timer.cache)
            copy = fastest_copy(sets, timer)
            for rival in takers:
                try:
                    results.append(measured(sets, rival, timer, copy, pairs))
                except Exception as error:
                    if isinstance(rival, gpu_rivals.Normkit):
                        raise
                    print(f"{case}: {rival.name} left out: {type(error).__name__}: {error}"[:400], flush=True)
                else:
                    r = results[-1]
                    told = f"{100 / r['ratio']:.0f} % of a copy, {r['us']:.1f} us, {r['us_plain']:.1f} us plain"
                    print(f"{case}: {rival.name}: {told}", flush=True)
            del sets, copy
    return results


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--rivals", default="", help="only those named, with commas between them, beside normkit")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a graph and a copy (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="with NumPy on small arrays")
    options = parser.parse_args(arguments)

    cases = [case for case in CASES if options.cases in str(case)]
    if not cases:
        parser.error(f"no case has {options.cases!r} in its name")
    if options.dry_run:
        xp, timer, cases = np, Dry(clock), [shrunk(case) for case in cases]
        rivals, left_out = [gpu_rivals.Normkit(), gpu_rivals.TwoLines(np)], []
    else:
        import cupy as xp

        timer = Cuda(xp)
        rivals, left_out = gpu_rivals.available(xp)
    wanted = options.rivals.split(",") if options.rivals else [rival.name for rival in rivals]
    rivals = [rival for rival in rivals if rival.name in wanted or isinstance(rival, gpu_rivals.Normkit)]
    print(*left_out, sep="\n", flush=True)
    results = run(cases, rivals, timer, xp, options.pairs)
    whole = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": "python benchmarks/gpu.py" + (" --dry-run" if options.dry_run else ""),
        "benchmarks": [
            {"fullname": f"gpu.py::{name}", "name": name, "extra_info": result}
            for result in results
            for name in [f"gpu[{report.title(result)} {result['direction']}-{result['rival']}]"]
        ],
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report.store(whole, options.json)
    print(report.gpu(whole, results))


if __name__ == "__main__":
    main()
