"""What the kernels of a build with NORMKIT_CUDA=shim are launched with, and what they do to global memory."""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from normkit import _core


@dataclass(frozen=True)
class Bytes:
    loaded: int
    stored: int


@dataclass(frozen=True)
class Traffic:
    """Bytes as threads ask for them; in sectors of 32 bytes, each once for a block between two barriers; each once."""

    asked: Bytes
    by_block: Bytes
    once: Bytes


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int
    resident_blocks: int
    in_flight_bytes: int
    arrays: Traffic
    workspace: Traffic
    answer: int  # of `question`


def _launch(values: dict) -> Launch:
    def traffic(counts: dict) -> Traffic:
        return Traffic(**{name: Bytes(*pair) for name, pair in counts.items()})

    return Launch(**{**values, "arrays": traffic(values["arrays"]), "workspace": traffic(values["workspace"])})


@contextmanager
def recorded(question: Callable[..., int] | None = None) -> Iterator[list[Launch]]:
    """A list that has all launches of this block after it. Workspaces are told from arrays in calls on NumPy arrays.
    `question`: a function of C without arguments that each launch calls."""
    function = ctypes.CDLL(_core.__file__).normkit_shim_launches
    function.restype = ctypes.c_char_p
    found: list[Launch] = []
    function(ctypes.cast(question, ctypes.c_void_p) if question else None)
    yield found
    found += map(_launch, json.loads(function(None)))
