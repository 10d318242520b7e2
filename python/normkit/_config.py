"""Threads and instruction sets: the only settings that a process has. Results do not depend on the threads, nor on the
instruction set as long as it has a fused multiply-add."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from . import _core


def set_num_threads(n: int) -> None:
    """Let every call use up to `n` threads, the calling one included. Raises ValueError below 1."""
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Threads that a call may use.

    At the start: NORMKIT_NUM_THREADS, else the CPUs of the affinity mask, or of the cgroup quota where that is less.
    """
    return _core.num_threads()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use up to `n` threads within a `with` block, for the whole process."""
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def isas() -> tuple[str, ...]:
    """The instruction sets that this build and this machine have, best first."""
    return tuple(_core.isas())


def isa() -> str:
    """The instruction set in use: the first of `isas()`, unless NORMKIT_ISA or `use_isa` says otherwise."""
    return _core.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use the instruction set `name` within a `with` block, for the whole process.

    Raises ValueError for a name that is not in `isas()`.
    """
    before = isa()
    if not _core.use_isa(name):
        raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, isas()))}")
    try:
        yield
    finally:
        _core.use_isa(before)


def cuda_available() -> bool:
    """True where CUDA arrays can be normalized: a build with CUDA, a driver and a device. This release has none."""
    return False


def show_config() -> None:
    """Print version, instruction sets and the one in use, threads, and the state of CUDA."""
    print(f"normkit {_core.version}")
    print(f"instruction sets: {', '.join(isas())}; in use: {isa()}")
    print(f"threads: {get_num_threads()}")
    print(f"CUDA: {'available' if cuda_available() else 'not in this build'}")


def _check_environment() -> None:
    wanted = os.environ.get("NORMKIT_ISA", "")
    if wanted and wanted not in isas():
        expected = ", ".join(map(repr, isas()))
        warnings.warn(f"NORMKIT_ISA is {wanted!r}, expected one of {expected}; using {isa()!r}", stacklevel=2)


_check_environment()
