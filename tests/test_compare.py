"""The decision of benchmarks/compare.py, on noise that is worse than that of a machine: no false alarm, no miss."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("verdict", Path(__file__).parents[1] / "benchmarks" / "verdict.py")
assert spec is not None
assert spec.loader is not None
verdict = sys.modules["verdict"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verdict)

PAIRS, PAIRS_AGAIN = 10, 20  # the defaults of compare.py
CASES = [f"case {k}" for k in range(16)]
RUNS = 2000


# Each makes the logarithms of the times of one build, as (processes, cases): what a process would have taken, had both
# builds been the same. Processes follow one another.


def tails(rng, shape):
    """Every tenth process meets a neighbor, who costs it up to several times its time."""
    bursts = np.minimum(np.abs(rng.standard_cauchy(shape)) * 0.1, 2)
    return rng.normal(0, 0.02, shape) + np.where(rng.random(shape) < 0.1, bursts, 0)


def drift(rng, shape):
    """The clock falls as the machine warms up, and wanders."""
    return np.linspace(0, 0.3, shape[0])[:, None] + rng.normal(0, 0.015, shape).cumsum(0) + rng.normal(0, 0.01, shape)


def modes(rng, shape):
    """A process is fast or slow for life, by where its arrays lie."""
    return rng.choice([0, 0.08], shape) + rng.normal(0, 0.01, shape)


def episodes(rng, shape):
    """For a fifth of the time another program runs, minutes at a time, and all cases are slow and erratic."""
    busy = np.sin(np.arange(shape[0])[:, None] / 7 + rng.uniform(0, 7)) > 0.8
    return rng.normal(0, 0.015, shape) + busy * (0.3 + rng.normal(0, 0.2, shape))


NOISES = [tails, drift, modes, episodes]


def alarms(noise, rng, slowdown):
    """The cases that a run names, where head is slower by `slowdown` on the first case."""

    def measure(names, pairs):
        times = noise(rng, (2 * pairs, len(names))).reshape(pairs, 2, -1)
        heads_first = rng.random(pairs) < 0.5
        logs = np.where(heads_first[:, None], times[:, 0] - times[:, 1], times[:, 1] - times[:, 0])
        logs[:, [name == CASES[0] for name in names]] += math.log(1 + slowdown)
        return dict(zip(names, np.exp(logs).T.tolist(), strict=True))

    return verdict.verdict(CASES, measure, PAIRS, PAIRS_AGAIN).slower


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_equal_builds_pass(noise, rng):
    """Fewer than 1 run in 1000: four noises make 8000 runs, of which none fails."""
    assert sum(bool(alarms(noise, rng, 0)) for _ in range(RUNS)) == 0


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.__name__)
def test_a_slowdown_is_named(noise, rng):
    found = [alarms(noise, rng, 0.1) for _ in range(200)]
    assert sum(CASES[0] in names for names in found) > 0.95 * len(found)
    assert not any(set(names) - {CASES[0]} for names in found)


def test_small_slowdowns_are_not_judged(rng):
    """A slowdown within the margin is no regression, however sure it is."""
    assert not any(alarms(lambda rng, shape: rng.normal(0, 0.001, shape), rng, verdict.MARGIN) for _ in range(100))


@pytest.mark.parametrize("pairs", [1, 2, 6, 9, 12])
@pytest.mark.parametrize("mistakes", [0.001, 0.025, 0.3])
def test_an_interval_errs_as_often_as_it_says(pairs, mistakes):
    """The lower end is above 1 for at most the share `mistakes` of all ways to sign the ratios; with one average more
    left out, it would be for more."""
    size = np.arange(1, pairs + 1) * 0.01  # distinct averages would do as well: ranks are all that counts
    out = verdict.left_out(pairs, mistakes)

    def share(out):
        lows = (
            sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(size * signs, 2))[out - 1]
            for signs in itertools.product((-1, 1), repeat=pairs)
        )
        return np.mean(np.array(list(lows)) > 0)

    assert out == 0 or share(out) <= mistakes
    assert out == pairs * (pairs + 1) // 2 or share(out + 1) > mistakes
