"""What it takes to normalize a whole that lies in parts in several processes, and how exact that is.

    python benchmarks/parts.py

Three tables: the error of statistics against the number of parts, to a million; what a message takes between 1, 2, 4
and 8 processes of this machine, by gloo, beside what a model says that knows one and two; and what the model says of
more. docs/distributed.md has them.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import normkit as nk
import normkit.distributed as ndist
import numpy as np

BYTES = 32  # of a statistic in a message: count, mean, what rounding took from it, m2
PARTS = (1, 10, 100, 1000, 10**4, 10**5, 10**6)
PROCESSES = (1, 2, 4, 8)
STATISTICS = (16, 256, 4096)


def errors(members: int = 16) -> None:
    """Of float32 parts of few members, whose means drift by six deviations: the worst of eight draws."""
    print(f"parts of {members} float32      mean, in deviations      rstd, relative")
    worst = dict.fromkeys(PARTS, (0.0, 0.0))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((PARTS[-1], members), np.float32) + np.float32(10 * seed)
        x += np.linspace(-3, 3, len(x), dtype=np.float32)[:, None]
        rng.shuffle(x)
        own = nk.moments(x, axis=1)
        for parts in PARTS:
            whole = ndist._joined(own._numbers[:parts], own._memory, False)
            wide = x[:parts].astype(np.float64)
            mean, var = wide.mean(), wide.var()
            found = float(abs(whole[0] - mean) / np.sqrt(var)), float(abs(np.sqrt(var * whole[2] / whole[1]) - 1))
            worst[parts] = tuple(map(max, worst[parts], found))
    for parts, (mean, rstd) in worst.items():
        print(f"{parts:20}{mean:25.1e}{rstd:20.1e}")


def _time(call: Callable[[], Any]) -> float:
    """Seconds of a call: the fastest mean of five, which a busy machine leaves alone the most."""
    means = []
    for _ in range(60):
        start = time.perf_counter()
        for _ in range(5):
            call()
        means.append((time.perf_counter() - start) / 5)
    return min(means)


def _work(rank: int, size: int, store: str, pipe: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    nk.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = []
    for count in STATISTICS:
        own = nk.moments(np.ones((count, 4), np.float32), axis=1)
        ndist.merge(own, distributed.group.WORLD)
        found.append(_time(lambda own=own: ndist.merge(own, distributed.group.WORLD)))
    pipe.send(found)
    distributed.barrier()


def measured(size: int) -> list[float]:
    """Seconds of a merge of each number of statistics, between so many processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe()
        given = [(rank, size, f"{folder}/store", theirs) for rank in range(size)]
        processes = [context.Process(target=_work, args=args) for args in given]
        for process in processes:
            process.start()
        found = ours.recv()
        for process in processes:
            process.join()
    return found


def joining(size: int, count: int) -> float:
    """Seconds of what every process does with what all have sent."""
    own = nk.moments(np.ones((count, 4), np.float32), axis=1)
    parts = np.stack([own._numbers] * size)
    return _time(lambda: ndist._joined(parts, own._memory, False))


def ring(size: int, sent: float, latency: float, rate: float) -> float:
    """Seconds until all have what `size` processes send, each passing on what it got from its neighbor."""
    return (size - 1) * (latency + sent / rate)


def tree(size: int, sent: float, latency: float, rate: float) -> float:
    """The same with twice as much in each of log2(size) messages, as MPI and NCCL do with what is small."""
    return float(np.ceil(np.log2(size))) * latency + (size - 1) * sent / rate


def messages() -> None:
    cores = len(os.sched_getaffinity(0))
    found = {size: measured(size) for size in PROCESSES}
    # One process says what a call takes; two, of which each has a core, what a step and a byte do.
    extra = [two - one - joining(2, n) for one, two, n in zip(found[1], found[2], STATISTICS, strict=True)]
    rate = BYTES * (STATISTICS[-1] - STATISTICS[0]) / max(extra[-1] - extra[0], 1e-9)
    latency = max(extra[0] - BYTES * STATISTICS[0] / rate, 0.0)
    print(f"\n{cores} cores, gloo: {1e6 * latency:.0f} us a step, {rate / 1e9:.2f} GB/s")
    print("processes  statistics  sent, bytes  measured, us  model, us")
    for size in PROCESSES:
        for count, one, seconds in zip(STATISTICS, found[1], found[size], strict=True):
            shared = max(1.0, size / cores)  # processes wait for a core
            says = one + shared * (ring(size, BYTES * count, latency, rate) + joining(size, count) * (size > 1))
            print(f"{size:9}{count:12}{BYTES * count:13}{1e6 * seconds:14.0f}{1e6 * says:11.0f}")


def extrapolated() -> None:
    """Of a message of statistics; of the data, a pass of the moments, and one more that reads and writes."""
    print("\n                                      the data    message, ring    message, tree    joining")
    for name, size, data, rate_of_data, count, latency, rate in (
        ("10 TB, 1000 workers, 64 statistics", 1000, 10e12, 10e9, 64, 50e-6, 1.25e9),
        ("10 TB, 1000 workers, 4096", 1000, 10e12, 10e9, 4096, 50e-6, 1.25e9),
        ("64 GPUs of 100 MB, 256 statistics", 64, 64 * 100e6, 3e12, 256, 3e-6, 50e9),
        ("64 GPUs of 100 MB, 8192", 64, 64 * 100e6, 3e12, 8192, 3e-6, 50e9),
    ):
        passes = 3 * data / size / rate_of_data
        by = [f(size, BYTES * count, latency, rate) for f in (ring, tree)]
        own = joining(size, count) if "GPU" not in name else float("nan")
        print(f"{name:36}{1e3 * passes:7.2f} ms" + "".join(f"{1e3 * t:14.3f} ms" for t in by) + f"{1e3 * own:8.2f} ms")


if __name__ == "__main__":
    errors()
    messages()
    extrapolated()
