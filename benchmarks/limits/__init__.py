"""What the memory allows: the fastest of several copies of the same bytes, or of a ^ b where two arrays are read.

limits.cpp is compiled once for this machine, into the user's cache folder. Without a compiler NumPy does the same less
well, and `kind` says so.
"""

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

FLAGS = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
TRIES = 5  # of each kernel, to learn which is the fastest


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normkit-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++")


def _this_machine() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")][:1] if info.exists() else []
    return "".join([platform.machine(), platform.processor(), *flags])


@cache
def _library() -> ctypes.CDLL | None:
    command = compiler()
    if not command:
        return None
    source = Path(__file__).with_name("limits.cpp")
    key = hashlib.sha256(source.read_bytes() + " ".join([command, *FLAGS, _this_machine()]).encode()).hexdigest()
    built = cache_folder() / f"limits-{key[:16]}.so"
    if not built.exists():
        new = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command.split(), *FLAGS, str(source), "-o", str(new)], check=True)
        new.replace(built)
    library = ctypes.CDLL(str(built))
    library.limit_seconds.restype = ctypes.c_double
    library.limit_seconds.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_int]
    return library


def kind() -> str:
    if _library() is None:
        return "NumPy's copy: a weaker limit, for want of a C++ compiler"
    return "compiled: memcpy, plain, prefetching, streaming"


Timed = Callable[[tuple[int, int], int], float]  # ((kernel, threads), k) -> seconds


def _compiled(library: ctypes.CDLL, sets: Sequence[tuple[np.ndarray, ...]]) -> Timed:
    """Sets of arrays: one or two to read, one to write."""
    pointers = [(s[0].ctypes.data, s[1].ctypes.data if len(s) == 3 else None, s[-1].ctypes.data) for s in sets]
    size = sets[0][-1].nbytes
    times = size // sets[0][0].nbytes
    return lambda way, k: library.limit_seconds(*way, *pointers[k], size, times)


def _in_numpy(sets: Sequence[tuple[np.ndarray, ...]], threads: int) -> Timed:
    flat = [[np.array_split(a.reshape(-1).view(f"u{a.itemsize}"), threads) for a in s] for s in sets]
    pool = ThreadPoolExecutor(threads)

    def part(*arrays: np.ndarray) -> None:
        np.copyto(arrays[-1], arrays[0]) if len(arrays) == 2 else np.bitwise_xor(*arrays)

    def timed(way: tuple[int, int], k: int) -> float:
        start = time.perf_counter()
        if way[1] == 1:
            for arrays in zip(*flat[k], strict=True):
                part(*arrays)
        else:
            list(pool.map(part, *flat[k]))
        return time.perf_counter() - start

    return timed


class Limit:
    """Sets of dense arrays (read, written) or (read, read, written): `seconds(k)` moves set k at full speed. What is
    written has as many bytes as each of the others, or four times as many.

    With several threads, or with one where that is faster: small arrays are not worth a second.
    """

    def __init__(self, sets: Sequence[tuple[np.ndarray, ...]], threads: int):
        library = _library()
        self._sets = sets  # alive: the library has their addresses alone
        self._timed = _compiled(library, sets) if library else _in_numpy(sets, threads)
        kernels = library.limit_kernels() if library else 1
        ways = list(itertools.product(range(kernels), sorted({1, threads})))
        turn = itertools.cycle(range(len(sets)))
        times = [{way: self._timed(way, next(turn)) for way in ways} for _ in range(TRIES)]
        self._way = min(ways, key=lambda way: statistics.median(t[way] for t in times))

    def seconds(self, k: int) -> float:
        return self._timed(self._way, k)
