"""The pool: counts, many callers at once, fork, and what a caller may not notice."""

import os
import signal
import subprocess
import sys
import threading
import time

import normkit
import numpy as np
import pytest
from cases import uniform

pytestmark = pytest.mark.usefixtures("threads")
LARGE = (16, 16, 64, 64)


def both_ways(x):
    y, mean, rstd = normkit.instance_norm(x, return_stats=True)
    return y.tobytes() + b"".join(a.tobytes() for a in normkit.instance_norm_backward(y, x, mean, rstd))


def options_and_phases(x):
    """All options, both ways, and the two phases."""
    options = {"where": x > 0, "activation": "silu"}
    y, mean, rstd, total = normkit.instance_norm(x, residual=x, return_residual=True, return_stats=True, **options)
    dx, dweight, dbias = normkit.instance_norm_backward(y, total, mean, rstd, dresidual=x, **options)
    over = {"axis": tuple(range(2, x.ndim))}
    m = normkit.moments(x, where=x > 0, **over)
    sums = normkit.backward_sums(y, x, m.mean, m.rstd(), **options, **over)
    parts = (
        normkit.apply(x, m.mean, m.rstd(), **over),
        normkit.apply_backward(y, x, m.mean, m.rstd(), sums, m.count, **options, **over),
    )
    return b"".join(a.tobytes() for a in (y, mean, rstd, total, dx, dweight, dbias, m.mean, m.m2, sums, *parts))


def test_count_is_kept():
    for count in (1, 2, 5):
        normkit.set_num_threads(count)
        assert normkit.get_num_threads() == count


def test_context_puts_the_count_back():
    normkit.set_num_threads(2)
    with normkit.num_threads(3):
        assert normkit.get_num_threads() == 3
        with normkit.num_threads(1):
            assert normkit.get_num_threads() == 1
        assert normkit.get_num_threads() == 3
    assert normkit.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="mine"), normkit.num_threads(4):
        raise RuntimeError("mine")
    assert normkit.get_num_threads() == 2


@pytest.mark.parametrize("count", [0, -1])
def test_count_is_at_least_one(count):
    before = normkit.get_num_threads()
    with pytest.raises(ValueError, match=f"^n is {count}, expected at least 1$"):
        normkit.set_num_threads(count)
    with pytest.raises(ValueError, match=f"^n is {count}, expected at least 1$"), normkit.num_threads(count):
        pass
    assert normkit.get_num_threads() == before


def test_the_first_count_is_at_most_what_this_process_may_use():
    code = "import normkit; print(normkit.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "NORMKIT_NUM_THREADS"}
    found = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert 1 <= found <= (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count())


@pytest.mark.parametrize("both_ways", [both_ways, options_and_phases])
def test_many_callers_at_once(both_ways, rng):
    """A busy pool runs the call inline: slower, with the same bits."""
    normkit.set_num_threads(3)
    inputs = [uniform(rng, LARGE) for _ in range(4)]
    expected = [both_ways(x) for x in inputs]
    wrong = []

    def call(k):
        for _ in range(6):
            if both_ways(inputs[k]) != expected[k]:
                wrong.append(k)

    callers = [threading.Thread(target=call, args=(k % len(inputs),)) for k in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_counts_may_change_while_others_call(rng):
    x = uniform(rng, LARGE)
    expected, wrong, done = both_ways(x), [], threading.Event()

    def call():
        while not done.is_set():
            if both_ways(x) != expected:
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for count in [1, 2, 3, 1, 4, 2] * 4:
        normkit.set_num_threads(count)
        time.sleep(0.005)
    done.set()
    for caller in callers:
        caller.join()
    assert not wrong


def test_python_runs_while_the_kernel_does(rng):
    """Large calls give up the interpreter: another thread counts meanwhile."""
    x = uniform(rng, (8, 64, 128, 128))
    ticks, done = [0], threading.Event()

    def tick():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)

    ticker = threading.Thread(target=tick)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is made to give way
    try:
        ticker.start()
        time.sleep(0.01)
        before = ticks[0]
        with normkit.num_threads(1):
            for _ in range(100):  # a busy machine may have no time for the other thread in one
                normkit.instance_norm(x)
                after = ticks[0]
                if after > before:
                    break
    finally:
        done.set()
        sys.setswitchinterval(switch)
        ticker.join()
    assert after > before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_a_pool_exists(rng):
    normkit.set_num_threads(3)
    x = uniform(rng, LARGE)
    expected = both_ways(x)
    for _ in range(3):
        child = os.fork()
        if child == 0:
            normkit.set_num_threads(2)
            os._exit(0 if both_ways(x) == expected and normkit.get_num_threads() == 2 else 1)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0), "a child of fork hangs or differs"
    assert both_ways(x) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_while_another_thread_calls(rng):
    normkit.set_num_threads(3)
    x = uniform(rng, LARGE)
    expected, done = both_ways(x), threading.Event()

    def call():
        while not done.is_set():
            both_ways(x)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                os._exit(0 if both_ways(x) == expected else 1)
            assert os.waitpid(child, 0) == (child, 0), "a child of fork hangs or differs"
    finally:
        done.set()
        caller.join()


def test_more_threads_than_work(rng):
    x = uniform(rng, (1, 2, 5))
    expected = both_ways(x)
    with normkit.num_threads(16):
        assert both_ways(x) == expected


def test_outputs_of_threads_have_no_holes(rng):
    """Every element is written by somebody, for counts that divide nothing evenly."""
    x = uniform(rng, (7, 11, 37, 41))
    expected = normkit.instance_norm(x).tobytes()
    for count in (2, 3, 5, 13):
        with normkit.num_threads(count):
            out = np.full(x.shape, np.nan, np.float32)
            assert normkit.instance_norm(x, out=out).tobytes() == expected


@pytest.mark.parametrize("shape", [(7, 11, 37, 41), (1, 2, 35003)])
def test_options_do_not_depend_on_threads(shape, rng):
    x = uniform(rng, shape)
    with normkit.num_threads(1):
        expected = options_and_phases(x)
    for count in (2, 3, 5, 13):
        with normkit.num_threads(count):
            assert options_and_phases(x) == expected
