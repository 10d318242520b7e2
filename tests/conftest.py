"""Which cases run and in how many processes, fixtures. `NORMKIT_TEST_ARRAYS`: see mirrored.py.

A run without `--full` is for a person: of the cases that a test crosses, so many that every pair of values occurs
(covering.py says how), and no test marked `full`. The whole suite runs in a process for each CPU, where there is
pytest-xdist; what is named on the command line runs in this one, as does what is to be debugged.
"""

import gc
import os
import zlib
from collections.abc import Generator, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any

import normkit
import numpy as np
import pytest
from covering import covering

ARRAYS = os.environ.get("NORMKIT_TEST_ARRAYS")
if ARRAYS:
    import mirrored

    mirrored.install(ARRAYS)

DOTS = 600  # nine lines of a terminal
SESSION = pytest.StashKey[pytest.Session]()
ENDED = count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases, and the tests that compile for minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes minutes, runs with --full alone")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, which reads the options then
def pytest_cmdline_main(config: pytest.Config) -> None:
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    whole = all(Path(argument).is_dir() for argument in config.args) and not (option.keyword or option.markexpr)
    watched = option.usepdb or option.capture == "no" or getattr(option, "lf", False) or option.collectonly
    if whole and not watched and option.numprocesses is None and option.dist == "no":
        option.numprocesses, option.dist = "auto", "worksteal"


def crossed(item: pytest.Item) -> list[tuple[str, ...]]:
    """The parameters of a test that vary together: each list of them, and each fixture that has parameters."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return []
    lists = [mark.args[0] for mark in item.iter_markers("parametrize")]
    rows = [tuple(name.strip() for name in n.split(",")) if isinstance(n, str) else tuple(n) for n in lists]
    return rows + [(name,) for name in item.callspec.params if not any(name in row for row in rows)]


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.full:
        return
    chosen: set[str] = set()
    for _, cases in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        first, *others = cases
        if not first.get_closest_marker("full"):
            rows = crossed(first)
            # Values are told apart by where they are in memory, as not all can be compared.
            chosen |= covering(
                {
                    item.nodeid: {row: tuple(id(item.callspec.params[name]) for name in row) for row in rows}
                    for item in (first, *others)
                }
            )
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
    items[:] = [item for item in items if item.nodeid in chosen]


def pytest_collection_finish() -> None:
    """What is collected stays: gc.collect(), which many tests call, need not visit it, a second each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Each of them collects all tests, which is what a machine with many CPUs would do most of the time."""
    return min((yield), 8)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[SESSION] = session


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(config: pytest.Config) -> Generator[None, Any, Any]:
    """One dot for so many tests that all fit a screen; every failure is shown."""
    category, letter, word = yield
    if category in ("passed", "skipped") and letter and config.get_verbosity() <= 0:
        each = config.stash[SESSION].testscollected // DOTS + 1
        letter = "" if next(ENDED) % each else letter
    return category, letter, word


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
