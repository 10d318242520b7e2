"""Threads, instruction sets and the cache of outputs: the only settings that a process has. Results do not depend on
threads and cache, nor on the instruction set as long as it has a fused multiply-add."""

import operator
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import SupportsIndex

from . import _core

_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def _checked(n: SupportsIndex, least: int, most: int) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n is {n!r}, expected an integer") from None
    if not least <= count <= most:
        expected = f"at least {least}" if count < least else f"at most {most}"
        raise ValueError(f"n is {count}, expected {expected}")
    return count


def _checked_threads(n: SupportsIndex) -> int:
    return _checked(n, 1, 2**31 - 1)


def set_num_threads(n: SupportsIndex) -> None:
    """Let every call of the process use up to `n` threads.

    The calling thread is one of them.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        For what is no integer.
    ValueError
        Below 1.

    Examples
    --------
    >>> import normkit as nk
    >>> before = nk.get_num_threads()
    >>> nk.set_num_threads(1)
    >>> nk.get_num_threads()
    1
    >>> nk.set_num_threads(before)
    """
    _core.set_num_threads(_checked_threads(n))


def get_num_threads() -> int:
    """Tell how many threads a call may use.

    At the start: NORMKIT_NUM_THREADS, else the CPUs of the affinity mask, of the cgroup quota or of OMP_NUM_THREADS,
    whichever is least.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.get_num_threads() >= 1
    True
    """
    return _threads.get() or _core.num_threads()


@contextmanager
def num_threads(n: SupportsIndex) -> Iterator[None]:
    """Use up to `n` threads within a `with` block, whatever the process may use.

    It is for the calls of the block alone: other threads and other tasks of asyncio are as they were.

    Parameters
    ----------
    n : int
        At least 1.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    TypeError
        For what is no integer.
    ValueError
        Below 1.

    Examples
    --------
    >>> import normkit as nk
    >>> with nk.num_threads(1):
    ...     nk.get_num_threads()
    1
    """
    count = _checked_threads(n)
    _core.follow_threads_of(_threads)
    before = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(before)


def isas() -> tuple[str, ...]:
    """Name the instruction sets that this build and this machine have.

    Results do not depend on the one that is used, as long as it has a fused multiply-add.

    Returns
    -------
    tuple of str
        Of "avx512", "avx2" and "sse4", or "neon"; the best first.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.isa() in nk.isas()
    True
    """
    return tuple(_core.isas())


def isa() -> str:
    """Name the instruction set in use.

    It is the first of `isas()`, unless NORMKIT_ISA or `use_isa` says otherwise.

    Returns
    -------
    str
        One of `isas()`.

    Examples
    --------
    >>> import normkit as nk
    >>> with nk.use_isa(nk.isas()[-1]):
    ...     nk.isa() == nk.isas()[-1]
    True
    """
    return _core.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use an instruction set within a `with` block.

    It is for the whole process.

    Parameters
    ----------
    name : str
        One of `isas()`.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    ValueError
        For a name that is not in `isas()`.

    Examples
    --------
    >>> import normkit as nk
    >>> with nk.use_isa(nk.isas()[-1]):
    ...     nk.isa() == nk.isas()[-1]
    True
    """
    before = isa()
    if not (isinstance(name, str) and _core.use_isa(name)):
        raise ValueError(f"name is {name!r}, expected one of {', '.join(map(repr, isas()))}")
    try:
        yield
    finally:
        _core.use_isa(before)


def set_cache_limit(n: SupportsIndex) -> None:
    """Keep up to so many bytes of the memory of outputs that have been freed, for the next ones.

    New memory comes from the system page by page, which takes several times as long as writing to it. So the memory of
    freed outputs of 1 MB and more is kept: at most 256 MB, or what NORMKIT_CACHE_BYTES says.

    Parameters
    ----------
    n : int
        Bytes; 0 keeps none.

    Raises
    ------
    TypeError
        For what is no integer.
    ValueError
        Below 0.

    Examples
    --------
    >>> import normkit as nk
    >>> before = nk.get_cache_limit()
    >>> nk.set_cache_limit(0)
    >>> nk.cache_size()
    0
    >>> nk.set_cache_limit(before)
    """
    _core.set_cache_limit(_checked(n, 0, 2**64 - 1))


def get_cache_limit() -> int:
    """Tell the most bytes of freed outputs that are kept.

    256 MB, unless NORMKIT_CACHE_BYTES or `set_cache_limit` says otherwise.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.cache_size() <= nk.get_cache_limit()
    True
    """
    return _core.cache_limit()


def cache_size() -> int:
    """Tell how many bytes of freed outputs are kept at the moment.

    At most `get_cache_limit()`.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.clear_cache()
    >>> nk.cache_size()
    0
    """
    return _core.cache_held()


def clear_cache() -> None:
    """Give the memory of all freed outputs back to the system.

    The limit stays as it is.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.clear_cache()
    >>> nk.cache_size()
    0
    """
    limit = get_cache_limit()
    set_cache_limit(0)
    set_cache_limit(limit)


def cuda_available() -> bool:
    """Tell whether CUDA arrays can be normalized.

    It takes a build with CUDA, a driver and a device. Never raises.

    Returns
    -------
    bool
        True where all three are there.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.cuda_available() in (True, False)
    True
    """
    return bool(_core.cuda_available())


def show_config() -> None:
    """Print what there is and what is in use.

    Version, instruction sets and the one in use, threads, the cache of outputs, and the state of CUDA: for reports of
    faults.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.show_config()  # doctest: +ELLIPSIS
    normkit ...
    """
    print(f"normkit {_core.version}")
    print(f"instruction sets: {', '.join(isas())}; in use: {isa()}")
    print(f"threads: {get_num_threads()}")
    print(f"cache of freed outputs: {cache_size()} of {get_cache_limit()} bytes")
    if cuda_available():
        print(f"CUDA: available ({_core.cuda})")
    elif _core.cuda:
        print(f"CUDA: {_core.cuda}, but no device, no driver or one that is older than that")
    else:
        print(f"CUDA: not in this build ({_core.no_cuda})")


def check_environment() -> None:
    """Warns whoever imports the package of settings that are none."""
    wanted = os.environ.get("NORMKIT_ISA", "")
    if wanted and wanted not in isas():
        expected = ", ".join(map(repr, isas()))
        warnings.warn(f"NORMKIT_ISA is {wanted!r}, expected one of {expected}; using {isa()!r}", stacklevel=3)
    wanted = os.environ.get("NORMKIT_NUM_THREADS", "")
    if wanted and str(get_num_threads()) != wanted.lstrip("0"):
        expected = "expected a number of threads, at least 1"
        warnings.warn(f"NORMKIT_NUM_THREADS is {wanted!r}, {expected}; using {get_num_threads()}", stacklevel=3)
    wanted = os.environ.get("NORMKIT_CACHE_BYTES", "")
    if wanted and str(get_cache_limit()) != (wanted.lstrip("0") or "0"):
        message = f"NORMKIT_CACHE_BYTES is {wanted!r}, expected a number of bytes; using {get_cache_limit()}"
        warnings.warn(message, stacklevel=3)
