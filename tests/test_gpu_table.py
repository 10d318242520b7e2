"""What every case moves through a GPU's memory, and how full it keeps the GPU: known before a GPU is at hand.

Bytes are those that the kernels read and write on the CPU (tests/launches.py), on fewer statistics of the same size,
over the fewest possible. Launches, blocks and waves are those of the whole case, whose kernels are not run, on GPUs of
132 and 144 multiprocessors. `pytest tests/test_gpu_table.py -s` prints the table.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import normkit
import numpy as np
import pytest
from launches import Launch, recorded
from normkit import _core

pytestmark = pytest.mark.skipif(
    _core.cuda != "shim", reason="only in a build with NORMKIT_CUDA=shim are launches recorded"
)

SHARED_BYTES = 228 << 10  # of a multiprocessor of compute capability 9.0, which keeps 1 KB of it for each block
MOST_THREADS, MOST_BLOCKS = 2048, 32
LARGE = 16_000_000  # bytes from which a GPU is to be full
# Memory that gives readers 2.1 TB/s (measured on an H200) within about a microsecond has 16 KB on the way to each
# multiprocessor. Three times as much leaves room for blocks that reduce or write meanwhile.
IN_FLIGHT = 48 << 10
GROUPS = 32


@dataclass(frozen=True)
class Case:
    operation: str
    shape: tuple[int, ...]  # channels first; rows and columns
    fewer: tuple[
        int, ...
    ]  # the same with fewer statistics, but so many that what is read once for all of them counts little
    dtype: str = "float32"
    last: bool = False
    fits: bool = True  # a statistic fits the blocks of one cluster
    direction: str = "forward"

    def __str__(self) -> str:
        name = f"{self.direction} {self.operation} {'x'.join(map(str, self.shape))} {self.dtype}"
        return name + " channels-last" * self.last

    @property
    def fewest(self) -> float:
        """Bytes for each byte of x: x is read and y written; or x and dy are read and dx is written."""
        return 2 if self.direction == "forward" else 3

    @property
    def goal(self) -> float:
        """x read again, or x and dy; a twentieth is for statistics, weights and what tiles find."""
        if self.fits:
            return 1.05
        return (self.fewest + (1 if self.direction == "forward" else 2)) / self.fewest + 0.01


def both_dtypes(case: Case) -> list[Case]:
    return [case, replace(case, dtype="float16")]


FORWARD = [
    Case("instance", (16, 256, 32, 32), (2, 4, 32, 32)),
    *both_dtypes(Case("instance", (8, 64, 128, 128), (1, 4, 128, 128))),
    *both_dtypes(Case("instance", (1, 64, 512, 512), (1, 2, 512, 512))),
    Case("instance", (1, 1, 256, 256, 256), (1, 1, 96, 96, 96), fits=False),
    *both_dtypes(Case("layer", (4096, 768), (128, 768))),
    *both_dtypes(Case("layer", (4096, 4096), (64, 4096))),
    *both_dtypes(Case("layer", (65536, 128), (1024, 128))),
    *both_dtypes(Case("instance", (8, 64, 128, 128), (1, 64, 128, 128), last=True)),
    *both_dtypes(Case("group", (8, 320, 64, 64), (1, 320, 64, 64))),
    Case("group", (32, 256, 56, 56), (1, 256, 56, 56), dtype="float16", last=True),
]
CASES = [*FORWARD, *(replace(case, direction="backward") for case in FORWARD)]


def call(case: Case, shape: tuple[int, ...], make) -> int:
    """Calls the operation on arrays that make(shape, dtype) gives; returns the fewest bytes that it can move."""
    memory = (shape[0], *shape[2:], shape[1]) if case.last else shape
    x, dy, out = (make(memory, case.dtype) for _ in range(3))
    weight, bias = (make(shape[1:2], "float32") for _ in range(2))
    axis = {} if case.operation == "layer" else {"channel_axis": -1 if case.last else 1}
    groups = (GROUPS,) if case.operation == "group" else ()
    kept = {"instance": shape[:2], "layer": shape[:1], "group": (shape[0], GROUPS)}[case.operation]
    small = 2 * 4 * math.prod(kept) + 2 * weight.nbytes  # mean and rstd; weight and bias, or their gradients
    if case.direction == "forward":
        getattr(normkit, f"{case.operation}_norm")(x, *groups, weight, bias, out=out, return_stats=True, **axis)
        return 2 * x.nbytes + small
    mean, rstd = (make(kept, "float32") for _ in range(2))
    getattr(normkit, f"{case.operation}_norm_backward")(dy, x, *groups, mean, rstd, weight, out=out, **axis)
    return 3 * x.nbytes + small + weight.nbytes


def schedules() -> None:
    """Prints the launches of all cases as JSON: run where NORMKIT_SHIM_IDLE keeps kernels from running."""
    found = []
    for case in CASES:
        with recorded() as launches:
            call(case, case.shape, np.empty)
        found.append([vars(launch) | {"arrays": None, "workspace": None} for launch in launches])
    print(json.dumps(found))


@cache
def launches_on(processors: int) -> list[list[Launch]]:
    environment = {**os.environ, "NORMKIT_SHIM_IDLE": "1", "NORMKIT_SHIM_PROCESSORS": str(processors)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", "import test_gpu_table; test_gpu_table.schedules()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [[Launch(**launch) for launch in launches] for launches in json.loads(done.stdout)]


def blocks_together(launch: Launch) -> int:
    """Blocks of a launch that a multiprocessor has at once: those that registers allow are what the kernel says."""
    by_registers = launch.resident_blocks * 256 // launch.threads
    return min(by_registers, SHARED_BYTES // (launch.shared_bytes + 1024), MOST_THREADS // launch.threads, MOST_BLOCKS)


@dataclass(frozen=True)
class Filling:
    """How full a launch keeps a GPU."""

    waves: float
    in_flight: float  # bytes on their way to a multiprocessor
    all_there_is: float  # bytes that one of them has to read at all

    @property
    def is_enough(self) -> bool:
        return self.waves >= 1.9 or self.in_flight >= min(IN_FLIGHT, 0.95 * self.all_there_is)


def filling(launch: Launch, processors: int, read: int) -> Filling:
    together = blocks_together(launch)
    at_once = min(together, launch.blocks / processors)
    return Filling(launch.blocks / (together * processors), at_once * launch.in_flight_bytes, read / processors)


def bytes_over_fewest(case: Case, rng: np.random.Generator) -> float:
    def make(shape, dtype):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.zeros(size + 64, np.uint8)  # sectors are its own
        array = memory[-memory.ctypes.data % 32 :][:size].view(dtype).reshape(shape)
        array[...] = rng.standard_normal(shape)
        return array

    with recorded() as launches:
        fewest = call(case, case.fewer, make)
    moved = sum(
        traffic.loaded + traffic.stored
        for launch in launches
        for traffic in (launch.arrays.once, launch.workspace.once)
    )
    return moved / fewest


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes(case, rng):
    ratio = bytes_over_fewest(case, rng)
    print(f"\n{case}: {ratio:.3f} of the fewest bytes, goal {case.goal:.2f}")
    assert 1 <= ratio <= case.goal


@pytest.mark.parametrize("processors", [132, 144])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu_is_full(case, processors):
    size = math.prod(case.shape) * np.dtype(case.dtype).itemsize
    launches = launches_on(processors)[CASES.index(case)]
    for launch in launches:
        full = filling(launch, processors, int(size * (case.fewest - 1)))
        shape = f"{launch.blocks} x {launch.threads}, {launch.shared_bytes / 1024:.1f} KB, clusters of {launch.cluster}"
        filled = f"{full.waves:.2f} waves, {full.in_flight / 1024:.0f} KB in flight"
        print(f"\n{case}, {processors}: {launch.kernel}, {shape}: {filled}")
        if launch.in_flight_bytes and size * case.fewest >= LARGE:
            assert full.is_enough
    walks = [launch for launch in launches if launch.in_flight_bytes]
    assert len(walks) == (1 if case.fits else 2)
