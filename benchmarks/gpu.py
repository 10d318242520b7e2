"""Times on a GPU, for `benchmarks/gpu.sh`; or `python benchmarks/gpu.py --out results.jsonl` where all is installed.

Every figure is time / limit: the fastest copy of as many bytes as any implementation must move, in the same loop; of
two arrays into one, where two are read. What a rival does with all sets of arrays is one CUDA graph, timed by events,
so that no launch is waited for; sets are at least four and four times the second-level cache, each of random numbers
of its own. Graphs of rival and copy take turns, and the figure is the median of the pairs' ratios. Beside it:
microseconds of a call in the graph, of one on the same set again and again, and of one as programs make it.
An answer is compared with float64 first, in memory that held NaNs; a wrong one gets no time. All leave what a backward
needs: forward writes statistics, backward gives all three gradients.

A rival is imported when its turn comes. Every result is a line of `--out` as soon as it is there, and what has a line
is not measured again; `--rivals ""` has a table of it. Exit status 1 where normkit failed; 3 where the device is lost
to this process, and another may go on. `--dry-run` does all with NumPy on small arrays: for tests of this file.
"""

import argparse
import gc
import json
import math
import platform
import site
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import gpu_rivals
import normkit
import numpy as np
import report
from cases import VOLUME, Case
from rivals import evaluated, gradients, two_lines
from workload import EPS, WRONG, dtype_named

PAIRS, WARM_UP = 20, 3
LEAST_SETS, MOST_SETS = 4, 256
PIECE = 1 << 24  # elements whose truth is in memory at a time
TEMPORARIES = 10  # arrays of doubles of a piece, while its truth is found
LOST = 3  # exit status

F32, F16, BF16 = "float32", "float16", "bfloat16"
# Cases of which it is known what bytes, blocks and waves they should take: tests/test_gpu_table.py counts these.
KNOWN = [
    *(Case("instance", (8, 64, 128, 128), dtype) for dtype in (F32, F16)),
    Case("instance", (16, 256, 32, 32)),
    *(Case("layer", (4096, 4096), dtype) for dtype in (F32, F16)),
    *(Case("instance", (1, 64, 512, 512), dtype) for dtype in (F32, F16)),
    *(Case("layer", (4096, 768), dtype) for dtype in (F32, F16)),
    Case("group", (8, 320, 64, 64), groups=32),
    Case("instance", (8, 64, 128, 128), channels_last=True),
    Case("instance", VOLUME),
    *(Case("layer", (65536, 128), dtype) for dtype in (F32, F16)),
]
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
    for shape in ((16384, 4096), (131072, 128), (1024, 12288), (8192, 65536))
    for operation in ("layer", "rms")
]
FORWARD = [*KNOWN, *ROWS, *IMAGES, *(replace(c, channels_last=True) for c in IMAGES), ONE_ROW, FUSED]
CASES = [c for f in FORWARD for c in (f, replace(f, direction="backward")) if not (c.option and c is not f)]

# Shares of a copy to reach: where all is read once; where it is two arrays; where it is too large for the chip, and is
# read twice.
GOAL, GOAL_BACKWARD, GOAL_LARGE = 0.92, 0.85, 0.80
ON_CHIP = 8 * 96 << 10  # bytes that a cluster of eight blocks holds
SECTOR = 32  # bytes: the fewest side by side that memory gives


def goal(case: Case) -> float:
    """The share of a copy that a case is to reach. Channels-last, as much of each step as memory gives at once must fit
    the chip."""
    size, arrays = case.array_bytes // case.elements, 2 if case.direction == "backward" else 1
    members = case.elements // math.prod(case.statistics)
    within = [case.blocks[a] for a in case.reduced if a > case.channel_axis] if case.channels_last else [members]
    beside = math.prod(within)
    if arrays * members // beside * max(beside * size, SECTOR) > ON_CHIP:
        return GOAL_LARGE
    return GOAL_BACKWARD if arrays == 2 else GOAL


def shrunk(case: Case) -> Case:
    """The case with extents that a dry run has the time for."""
    n, c, *spatial = case.shape
    if case.rows:
        return replace(case, shape=(min(n, 4), min(c, 64)))
    return replace(case, shape=(min(n, 2), min(c, 2 * max(case.groups, 4)), *(min(s, 5) for s in spatial)))


# ---- arrays ------------------------------------------------------------------------------------------------------


def sets_of(case: Case, cache: int) -> int:
    return min(MOST_SETS, max(LEAST_SETS, -(-4 * cache // case.moved_bytes)))


def pieces_of(case: Case) -> tuple[int, int]:
    """An axis of `case.blocks` that statistics keep, and how much of it makes a piece."""
    kept = [a for a in range(len(case.blocks)) if a not in case.reduced]
    axis = max(kept, key=lambda a: case.blocks[a])
    return axis, min(case.blocks[axis], max(1, PIECE * case.blocks[axis] // case.elements))


def needed_bytes(case: Case, cache: int) -> int:
    """The bytes that a case needs on the device: for all sets, statistics that are given and those that three rounds
    leave, and the truth about a piece."""
    axis, step = pieces_of(case)
    statistics_bytes = 2 * 4 * math.prod(case.statistics)
    truth = 8 * max(TEMPORARIES * case.elements * step // case.blocks[axis], 6 * math.prod(case.parameters))
    return sets_of(case, cache) * (case.moved_bytes + 4 * statistics_bytes) + truth


class Sets:
    """Arrays of a case on the device, as `Workload` has them on the CPU: x[k], dy[k] and y[k] of set k."""

    def __init__(self, case: Case, xp: Any, cache: int) -> None:
        self.case, self.xp = case, xp
        self.dtype = dtype_named(case.dtype)
        self.sets = sets_of(case, cache)
        self.random = xp.random.default_rng(0)
        self.x = [self._normal() for _ in range(self.sets)]
        self.dy = [self._normal() for _ in range(self.sets)] if case.direction == "backward" else []
        self.residual: list[Any] = []
        self.where: list[Any] = []
        self.y = [xp.empty(case.memory, self.dtype) for _ in range(self.sets)]
        self.weight, self.bias = (
            0.5 + 0.5 * self.random.random((math.prod(case.parameters),), dtype=np.float32) for _ in range(2)
        )
        self.running_mean, self.running_var = (self.random.random((case.channels,), dtype=np.float32) for _ in range(2))
        self.axis, self.step = pieces_of(case)

    def poison(self) -> None:
        """Fills the outputs with NaN, so that what is not written is seen: no answer of another rival remains."""
        for y in self.y:
            y.view(np.uint8).fill(0xFF)

    def _normal(self) -> Any:
        array = self.xp.empty(self.case.memory, self.dtype)
        flat = array.reshape(-1)
        for k in range(0, flat.size, PIECE):
            part = flat[k : k + PIECE]
            part[...] = self.random.standard_normal(part.shape, dtype=np.float32)
        return array

    def _pieces(self) -> Iterator[slice]:
        return (slice(k, k + self.step) for k in range(0, self.case.blocks[self.axis], self.step))

    def _at(self, shape: tuple[int, ...], piece: slice) -> tuple[slice, ...]:
        """The slices of a piece in an array that broadcasts against `case.blocks`."""
        return tuple(piece if a == self.axis and extent > 1 else slice(None) for a, extent in enumerate(shape))

    def _wide(self, array: Any, shape: tuple[int, ...], piece: slice) -> Any:
        return array.reshape(shape)[self._at(shape, piece)].astype(np.float64)

    def _parameter(self, p: Any, piece: slice) -> Any:
        return self._wide(p, self.case.parameters, piece)

    @cached_property
    def all_statistics(self) -> list[tuple[Any, Any]]:
        """mean and rstd of each set, broadcasting against `case.blocks`."""
        case, xp, found = self.case, self.xp, []
        for x in self.x:
            mean, rstd = (xp.zeros(case.statistics, np.float32) for _ in range(2))
            for piece in self._pieces():
                wide, at = self._wide(x, case.blocks, piece), self._at(case.statistics, piece)
                if case.operation != "rms":
                    average = wide.mean(case.reduced, keepdims=True)
                    mean[at] = average
                    wide -= average
                rstd[at] = 1 / xp.sqrt((wide * wide).mean(case.reduced, keepdims=True) + EPS)
            found.append((mean, rstd))
        return found

    def _truth(self, piece: slice) -> tuple[Any, ...]:
        """y, or dx and what a piece adds to dweight and dbias, of set 0."""
        case, xp, x = self.case, self.xp, self._wide(self.x[0], self.case.blocks, piece)
        axis, weight, bias = case.reduced, self._parameter(self.weight, piece), self._parameter(self.bias, piece)
        if case.direction == "backward":
            mean, rstd = (self._wide(s, case.statistics, piece) for s in self.all_statistics[0])
            dy = self._wide(self.dy[0], case.blocks, piece)
            return gradients(dy, x, mean, rstd, weight, axis, case.operation != "rms")
        if case.operation == "eval":
            running = (self._parameter(p, piece) for p in (self.running_mean, self.running_var))
            return (evaluated(xp, x, weight, bias, *running),)
        y = two_lines(xp, x, weight, bias, axis=axis, center=case.operation != "rms")
        return (y / (1 + xp.exp(-y)) if case.option == "silu" else y,)

    def error(self, answer: tuple[Any, ...]) -> float:
        """The largest error of set 0, relative to the largest number that is right."""
        case, (first, *sums) = self.case, answer
        worst = largest = 0.0

        def largest_of(a: Any) -> float:
            return float(np.nan_to_num(float(abs(a).max()), nan=math.inf))

        totals = [self.xp.zeros(case.parameters) for _ in sums]
        for piece in self._pieces():
            right, *terms = self._truth(piece)
            worst = max(worst, largest_of(self._wide(first, case.blocks, piece) - right))
            largest = max(largest, largest_of(right))
            for total, term in zip(totals, terms, strict=True):
                total[self._at(case.parameters, piece)] += term
        errors = [worst / largest]
        for found, right in zip(sums, totals, strict=True):
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

    def free_bytes(self) -> int:
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()
        return self.cupy.cuda.Device().mem_info[0]

    def is_lost(self) -> bool:
        """True where the device answers no more: after a bad address nothing works in the same process."""
        try:
            self.cupy.cuda.Device().synchronize()
        except Exception:
            return True
        return False

    def work(self) -> AbstractContextManager[Any]:
        return self.stream

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A graph of the work that `run` enqueues by way of CuPy. It has memory of its own."""
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

    @contextmanager
    def profiled(self, name: str) -> Iterator[None]:
        from cupyx import profiler

        self.stream.synchronize()
        with profiler.profile(), profiler.time_range(name, color_id=0):
            yield
            self.stream.synchronize()

    def copies(self, sets: Sets) -> list[tuple[str, Callable[[], None]]]:
        """Ways to move the bytes of the case, from x, or x and dy, to y."""
        module = self.cupy.RawModule(code=COPY)
        name = "combine" if sets.dy else "copy"
        kernel, runtime = module.get_function(name), self.cupy.cuda.runtime
        words, every = sets.case.array_bytes // 16, list(zip(sets.y, sets.x, *([sets.dy] * bool(sets.dy)), strict=True))
        blocks = max(1, min(-(-words // 1024), 1 << 16))

        def by_driver() -> None:
            for y, x in every:
                args = y.data.ptr, x.data.ptr, x.nbytes, runtime.memcpyDeviceToDevice, self.stream.ptr
                runtime.memcpyAsync(*args)

        def by_kernel() -> None:
            for arrays in every:
                kernel((blocks,), (256,), (*(np.uint64(a.data.ptr) for a in arrays), np.int64(words)))

        return [("a kernel", by_kernel), *([("memcpy", by_driver)] * (not sets.dy))]


COPY = r"""
template <class Load> __device__ void move_words(int4* to, long long words, Load load) {
  const long long step = (long long)gridDim.x * blockDim.x;
  long long k = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  for (; k + 3 * step < words; k += 4 * step) {
    int4 word[4];
    for (int i = 0; i < 4; ++i) word[i] = load(k + i * step);
    for (int i = 0; i < 4; ++i) to[k + i * step] = word[i];
  }
  for (; k < words; k += step) to[k] = load(k);
}
extern "C" __global__ void copy(int4* to, const int4* from, long long words) {
  move_words(to, words, [=](long long k) { return from[k]; });
}
extern "C" __global__ void combine(int4* to, const int4* a, const int4* b, long long words) {
  move_words(to, words, [=](long long k) {
    const int4 u = a[k], v = b[k];
    return make_int4(u.x ^ v.x, u.y ^ v.y, u.z ^ v.z, u.w ^ v.w);
  });
}
"""


class Dry:
    """Everything but a GPU. `clock` tells seconds."""

    cache, chip, about = 1 << 12, platform.processor() or "CPU", "dry run"

    def __init__(self, clock: Callable[[], float] = time.perf_counter, free_bytes: int = 1 << 40) -> None:
        self.clock, self.free = clock, free_bytes

    def free_bytes(self) -> int:
        return self.free

    def is_lost(self) -> bool:
        return False

    def work(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run

    def seconds(self, launch: Callable[[], Any]) -> float:
        start = self.clock()
        launch()
        return self.clock() - start

    def profiled(self, name: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def copies(self, sets: Sets) -> list[tuple[str, Callable[[], None]]]:
        def by_numpy() -> None:
            for k, y in enumerate(sets.y):
                given = [a[k].view(np.uint8) for a in (sets.x, sets.dy) if a]
                np.bitwise_xor(*given, out=y.view(np.uint8)) if sets.dy else np.copyto(y.view(np.uint8), *given)

        return [("NumPy", by_numpy)]


# ---- a run -------------------------------------------------------------------------------------------------------


def measured(sets: Sets, rival: Any, timer: Any, pairs: int) -> dict[str, Any]:
    """Raises what the rival raises, and AssertionError where its answer is none."""
    call, case, every = rival.prepare(sets, 1), sets.case, range(sets.sets)
    sets.poison()
    answer = rival.arrays_of(call(0), sets)
    error = sets.error(answer if case.direction == "backward" else answer[:1])
    assert error <= WRONG, f"off by {error:.2g} of the largest number"
    del answer
    copy = fastest_copy(sets, timer)
    launch = rival.recorded(timer, lambda: [call(k) for k in every])
    seconds = rival.seconds if hasattr(rival, "seconds") else timer.seconds
    for _ in range(WARM_UP):
        seconds(launch), timer.seconds(copy[1])
    limits, times = zip(*((timer.seconds(copy[1]), seconds(launch)) for _ in range(pairs)), strict=True)
    del launch
    plain = [seconds(lambda: [call(k) for k in every]) for _ in range(5)]
    same = rival.recorded(timer, lambda: [call(0) for _ in every])  # one set, which stays in the cache where it fits
    warm = [seconds(same) for _ in range(5)]
    ratios = [t / limit for t, limit in zip(times, limits, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    per_call = statistics.median(times) / sets.sets
    return {
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


class Lines:
    """A file of one JSON object a line, each on the disk as soon as it is known."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.all = report.lines_of(path) if path and path.exists() else []
        self.known = {(line["case"], line["rival"]) for line in self.all}

    def add(self, case: Case, rival: str, found: dict[str, Any]) -> None:
        fields = ("operation", "groups", "option", "dtype", "channels_last", "direction")
        about = {**{key: getattr(case, key) for key in fields}, "shape": list(case.shape), "goal": goal(case)}
        line = {"case": str(case), "rival": rival, **about, **found, **self.about}
        self.all.append(line)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")


def measure(case: Case, rival: Any, timer: Any, xp: Any, pairs: int) -> dict[str, Any]:
    """What there is to say of a case: figures, or why there are none."""
    rival.release()
    needed, free = needed_bytes(case, timer.cache), timer.free_bytes()
    if 1.2 * needed > free:  # workspaces, and what graphs keep
        return {"left_out": f"wants {needed >> 20} MB and a fifth more, {free >> 20} are free"}
    try:
        with timer.work():
            return measured(Sets(case, xp, timer.cache), rival, timer, pairs)
    except Exception as error:
        return {"left_out": f"{type(error).__name__}: {error}"[:400], "failed": isinstance(rival, gpu_rivals.Normkit)}


def run(cases: list[Case], rivals: list[str], timer: Any, xp: Any, pairs: int, lines: Lines) -> int:
    """Measures the cases and rivals that are asked for, and returns the exit status."""
    status = 0
    for name in rivals:
        rival = None
        for case in cases:
            if (str(case), name) in lines.known:
                continue
            try:
                rival = rival or gpu_rivals.RIVALS[name](xp)
            except Exception as error:
                print(f"{name} left out: {type(error).__name__}: {error}", flush=True)
                break
            if not rival.takes(case, 1):
                continue
            found = measure(case, rival, timer, xp, pairs)
            lines.add(case, name, found)
            status = max(status, int(found.get("failed", False)))
            if "left_out" in found:
                told = f"left out: {found['left_out']}"
            else:
                told = f"{100 / found['ratio']:.0f} % of a copy, {found['us']:.1f} us, {found['us_plain']:.1f} us plain"
            print(f"{case}: {name}: {told}", flush=True)
            if "left_out" in found and timer.is_lost():
                print("the device is lost to this process", flush=True)
                return LOST
    return status


def profile(cases: list[Case], timer: Any, xp: Any) -> None:
    """Calls of normkit, one a case, for a profiler that waits to be started. A range of NVTX has each one's name."""
    rival = gpu_rivals.Normkit(xp)
    for case in cases:
        with timer.work():
            sets = Sets(case, xp, 0)
            call = rival.prepare(sets, 1)
            call(0)  # its kernels are loaded
            with timer.profiled(str(case)):
                call(1)
        del sets, call
        timer.free_bytes()


def commit() -> str:
    """The commit of the checkout, where git is there to tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def main(arguments: list[str] | None = None, clock: Callable[[], float] = time.perf_counter) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="add the results there, a line each")
    parser.add_argument("--json", type=Path, help="write all results there, as report.py stores them")
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument(
        "--rivals",
        default=",".join(gpu_rivals.RIVALS),
        help="who is measured, with commas between them: %(default)s; of nobody there is the table alone",
    )
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a graph and a copy (%(default)s)")
    parser.add_argument("--packages", type=Path, help="a folder of packages that a rival wants")
    parser.add_argument("--commit", help="of what is measured; by default git tells")
    parser.add_argument("--profile", action="store_true", help="one call of normkit a case, for Nsight Compute")
    parser.add_argument("--dry-run", action="store_true", help="with NumPy on small arrays")
    options = parser.parse_args(arguments)

    cases = [case for case in CASES if options.cases in str(case)]
    if not cases:
        parser.error(f"no case has {options.cases!r} in its name")
    wanted = [name for name in options.rivals.split(",") if name]
    if unknown := {*wanted} - {*gpu_rivals.RIVALS}:
        parser.error(f"there is no rival {unknown.pop()!r}: expected some of {', '.join(gpu_rivals.RIVALS)}")
    if options.packages and options.packages.is_dir():
        site.addsitedir(str(options.packages))
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": options.commit or commit()}
    lines, status = Lines(options.out, about), 0
    timer: Any = None
    xp: Any = np
    if options.dry_run:
        timer, cases = Dry(clock), list(dict.fromkeys(map(shrunk, cases)))
    elif wanted or options.profile:
        import cupy

        timer, xp = Cuda(cupy), cupy
    if options.profile:
        profile(cases, timer, xp)
        return 0
    if wanted:
        status = run(cases, wanted, timer, xp, options.pairs, lines)
    whole = report.of_lines(lines.all)
    if options.json and whole["benchmarks"]:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report.store(whole, options.json)
    if wanted and options.out:
        found = [line for line in lines.all if line["rival"] in wanted]
        print(f"{sum('ratio' in line for line in found)} times, {sum('left_out' in line for line in found)} left out")
    else:
        print(report.gpu(whole, [r["extra_info"] for r in whole["benchmarks"]]))
        for line in lines.all:
            if "left_out" in line:
                print(f"{line['case']}: {line['rival']}: {line['left_out']}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
