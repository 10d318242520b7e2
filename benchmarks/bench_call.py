"""The path from Python to the kernel, stage by stage: `python benchmarks/bench_call.py`, no part of the pytest suite.

Each stage is the difference of two calls on tiny arrays: in nanoseconds, the best of many rounds that take the calls by
turns, and in instructions, where valgrind is installed: callgrind's count of 41,000 calls less that of 1,000, on AVX2.
The instructions repeat to a percent on any machine, the nanoseconds do not.

In a build with NORMKIT_CUDA=shim it also shows calls on arrays of a GPU, up to where kernels are launched, on those of
tests/fake_gpu.py. Their attributes cost about as much as CuPy's; what its stream and its device cost, a GPU tells.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["NORMKIT_SHIM_IDLE"] = "1"  # before normkit launches anything

import normkit
import numpy as np
from normkit import _core

TESTS = Path(__file__).parents[1] / "tests"
MANY, FEW = 41_000, 1_000
ROUNDS, LOOPS = 60, 2_000
SHAPE, LARGE = (2, 4, 4, 4), (1, 8, 8, 8)


def anew(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, planned as if there had been none before."""

    def first() -> Any:
        _core.forget_plans()
        return call()

    return first


def calls() -> dict[str, Callable[[], Any]]:
    """Every call that is measured. Those of one line differ in one thing from one before."""
    forward, backward = normkit.instance_norm, normkit.instance_norm_backward
    x, large, one = (np.arange(np.prod(s), dtype=np.float32).reshape(s) for s in (SHAPE, LARGE, (1, 1, 1)))
    y, large_y, one_y = map(np.empty_like, (x, large, one))
    weight, bias = np.ones(SHAPE[1], np.float32), np.zeros(SHAPE[1], np.float32)
    _, mean, rstd = forward(x, return_stats=True)
    return {
        "nothing": lambda: None,
        "empty call": lambda: _core.num_threads(),
        "one element": lambda: forward(one, out=one_y),
        "out": lambda: forward(x, out=y),
        "large": lambda: forward(large, out=large_y),
        "weight": lambda: forward(x, weight, bias, out=y),
        "new": lambda: forward(x),
        "new, statistics": lambda: forward(x, return_stats=True),
        "planned anew": anew(lambda: forward(x, out=y)),
        "backward, out": lambda: backward(x, x, mean, rstd, weight, out=y, need=("dx",)),
        "backward": lambda: backward(x, x, mean, rstd, weight),
        **(of_gpu(x, weight, mean, rstd) if _core.cuda == "shim" else {}),
    }


def of_gpu(x: Any, weight: Any, mean: Any, rstd: Any) -> dict[str, Callable[[], Any]]:
    sys.path.append(str(TESTS))
    import fake_gpu

    cupy = sys.modules["cupy"] = fake_gpu.fake_cupy()
    cupy.current, piece = 0, cupy.memory.take(1 << 16)
    cupy.cuda.alloc = lambda size: piece  # a pool always has one at hand
    x, y, weight, bias, mean, rstd = map(cupy.array, (x, x, weight, weight, mean, rstd))
    forward, backward = normkit.instance_norm, normkit.instance_norm_backward
    return {
        "GPU, out": lambda: forward(x, out=y),
        "GPU, weight": lambda: forward(x, weight, bias, out=y),
        "GPU, backward": lambda: backward(x, x, mean, rstd, weight, out=y, need=("dx",)),
        "GPU, planned anew": anew(lambda: forward(x, out=y)),
    }


# What a row shows: a call, less another.
STAGES = {
    "an empty call into C++": ("empty call", "nothing"),
    "arguments, a plan that is known, dispatch": ("one element", "empty call"),
    f"the kernel, {SHAPE}": ("out", "one element"),
    "= instance_norm(x, out=y)": ("out", "nothing"),
    "weight and bias": ("weight", "out"),
    "a new y, not a given one": ("new", "out"),
    "new statistics": ("new, statistics", "new"),
    "= instance_norm(x, return_stats=True)": ("new, statistics", "nothing"),
    f"the same with out=y on {LARGE}": ("large", "nothing"),
    "views and a plan, not a known one": ("planned anew", "out"),
    "= instance_norm_backward, dx into out": ("backward, out", "nothing"),
    "= instance_norm_backward, all new": ("backward", "nothing"),
}
STAGES_OF_GPU = {
    "= instance_norm(x, out=y), of a GPU": ("GPU, out", "nothing"),
    "weight and bias, of a GPU": ("GPU, weight", "GPU, out"),
    "= instance_norm_backward, dx into out": ("GPU, backward", "nothing"),
    "what a known plan saves": ("GPU, planned anew", "GPU, out"),
}


def nanoseconds() -> dict[str, float]:
    timers = {name: timeit.Timer(call) for name, call in calls().items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            best[name] = min(best[name], timer.timeit(LOOPS) / LOOPS * 1e9)
    return best


def instructions(name: str) -> float:
    def counted(count: int) -> int:
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
        command += [str(Path(__file__).resolve()), "--calls", str(count), "--of", name]
        environment = {**os.environ, "NORMKIT_ISA": "avx2", "NORMKIT_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
        found = re.search(r"Collected : (\d+)", told)
        assert found, told
        return int(found[1])

    return (counted(MANY) - counted(FEW)) / (MANY - FEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, help="only make so many calls --of this name")
    parser.add_argument("--of", choices=calls(), metavar="NAME")
    parser.add_argument("--no-instructions", action="store_true", help="nanoseconds alone: seconds, not minutes")
    options = parser.parse_args()
    if options.calls:
        call = calls()[options.of]
        for _ in range(options.calls):
            call()
        return
    normkit.set_num_threads(1)
    times = nanoseconds()
    count = not options.no_instructions and shutil.which("valgrind") is not None
    counts = {name: instructions(name) for name in calls()} if count else {}
    print(f"normkit {normkit.__version__} ({normkit.isa()}), {SHAPE} float32, one thread")
    print(f"{'':44}{'ns':>8}{'instructions (avx2)' if count else '':>22}")
    for stage, (name, less) in [*STAGES.items(), *(STAGES_OF_GPU.items() if _core.cuda == "shim" else ())]:
        told = f"{counts[name] - counts[less]:22,.0f}" if count else ""
        print(f"{stage:44}{times[name] - times[less]:8.0f}{told}")


if __name__ == "__main__":
    main()
