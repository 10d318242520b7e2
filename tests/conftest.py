"""Fixtures: a seeded generator and every instruction set of this machine. `NORMKIT_TEST_ARRAYS`: see mirrored.py."""

import os
import zlib
from collections.abc import Iterator

import normkit
import numpy as np
import pytest

ARRAYS = os.environ.get("NORMKIT_TEST_ARRAYS")
if ARRAYS:
    import mirrored

    mirrored.install(ARRAYS)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Different for every test, the same on every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=normkit.isas()[: 1 if ARRAYS else None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with normkit.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = normkit.get_num_threads()
    yield
    normkit.set_num_threads(before)
