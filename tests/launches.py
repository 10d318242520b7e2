"""What the kernels of a build with NORMKIT_CUDA=shim are launched with, and what they do to global memory."""

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from normkit import _core


@dataclass(frozen=True)
class Bytes:
    loaded: int
    stored: int


@dataclass(frozen=True)
class Traffic:
    """As threads ask; in sectors of 32 bytes, each once for a block between two barriers; in sectors, each once."""

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


def _launch(values: dict) -> Launch:
    def traffic(counts: dict) -> Traffic:
        return Traffic(**{name: Bytes(*pair) for name, pair in counts.items()})

    return Launch(**{**values, "arrays": traffic(values["arrays"]), "workspace": traffic(values["workspace"])})


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A list that has all launches of this block after it. Workspaces are told from arrays in calls on NumPy arrays."""
    function = ctypes.CDLL(_core.__file__).normkit_shim_launches
    function.restype = ctypes.c_char_p
    found: list[Launch] = []
    function()
    yield found
    found += map(_launch, json.loads(function()))
