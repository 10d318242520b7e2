"""The cache of freed outputs: what it keeps, what it lets go, and that nobody else notices."""

import os
import subprocess
import sys
import textwrap
import threading

import normkit
import numpy as np
import pytest
from cases import bits, uniform

MB = 1 << 20
SHAPE = (1, 4, 256, 256)  # float32: 1 MB


@pytest.fixture(autouse=True)
def fresh_cache():
    limit = normkit.get_cache_limit()
    normkit.clear_cache()
    yield
    normkit.set_cache_limit(limit)


def address(array):
    return array.ctypes.data


def python(code, **environment):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, **environment}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.split()


def test_a_freed_output_is_the_next_one(rng):
    x = uniform(rng, SHAPE)
    y = normkit.instance_norm(x)
    first, expected = address(y), bits(y)
    assert normkit.cache_size() == 0
    del y
    assert normkit.cache_size() == MB
    y = normkit.instance_norm(x)
    assert address(y) == first
    assert bits(y) == expected
    assert normkit.cache_size() == 0


def test_outputs_are_aligned_and_their_own(rng):
    x = uniform(rng, SHAPE)
    y = normkit.instance_norm(x)
    assert address(y) % 64 == 0
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.base is None


def test_what_is_still_alive_is_not_given_out(rng):
    x = uniform(rng, SHAPE)
    ys = [normkit.instance_norm(x) for _ in range(4)]
    assert len({address(y) for y in ys}) == 4
    view = ys[0][0, 1:]
    kept = bits(view)
    del ys
    assert normkit.cache_size() == 3 * MB
    others = [normkit.instance_norm(x + 1) for _ in range(4)]
    assert bits(view) == kept
    assert all(not np.shares_memory(view, other) for other in others)


def test_gradients_and_sums_come_from_it_too(rng):
    x = uniform(rng, SHAPE)
    y, mean, rstd, s = normkit.instance_norm(x, residual=x, return_residual=True, return_stats=True)
    del y
    assert normkit.cache_size() == MB
    dx = normkit.instance_norm_backward(x, s, mean, rstd)[0]
    assert normkit.cache_size() == 0
    del dx, s
    assert normkit.cache_size() == 2 * MB


def test_outputs_of_tensors_come_from_it_too(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(uniform(rng, SHAPE))
    expected = bits(normkit.instance_norm(x).numpy())  # by a plan that is made; from now on it is known
    normkit.clear_cache()
    y = normkit.instance_norm(x)
    first = y.data_ptr()
    assert first % 64 == 0
    assert normkit.cache_size() == 0
    del y
    assert MB < normkit.cache_size() < MB + 1024  # with what is beside the elements
    y = normkit.instance_norm(x)
    assert y.data_ptr() == first
    assert bits(y.numpy()) == expected


def test_small_outputs_are_not_cached(rng):
    x = uniform(rng, (1, 4, 255, 256))
    assert normkit.instance_norm(x).shape == x.shape
    assert normkit.cache_size() == 0


def test_the_limit_is_kept(rng):
    normkit.set_cache_limit(3 * MB)
    x = uniform(rng, SHAPE)
    ys = [normkit.instance_norm(x) for _ in range(5)]
    newest = address(ys[-1])
    while ys:
        ys.pop(0)
        assert normkit.cache_size() <= 3 * MB
    assert normkit.cache_size() == 3 * MB
    # The oldest have gone, and the newest comes first.
    y = normkit.instance_norm(x)
    assert address(y) == newest
    normkit.set_cache_limit(MB)
    assert normkit.cache_size() == MB


def test_larger_than_the_limit_is_not_kept(rng):
    normkit.set_cache_limit(MB)
    x = uniform(rng, (2, *SHAPE[1:]))
    y = normkit.instance_norm(x)
    del y
    assert normkit.cache_size() == 0


def test_switched_off(rng):
    x = uniform(rng, SHAPE)
    y = normkit.instance_norm(x)
    normkit.set_cache_limit(0)
    del y  # from the cache, but there is no cache to go back to
    assert normkit.cache_size() == 0
    assert bits(normkit.instance_norm(x)) == bits(normkit.instance_norm(x, out=np.empty_like(x)))
    assert normkit.cache_size() == 0


def test_clear(rng):
    normkit.instance_norm(uniform(rng, SHAPE))
    assert normkit.cache_size() == MB
    limit = normkit.get_cache_limit()
    normkit.clear_cache()
    assert (normkit.cache_size(), normkit.get_cache_limit()) == (0, limit)


@pytest.mark.parametrize(("rows", "reused"), [(256, True), (250, True), (128, True), (127, False), (257, False)])
def test_only_what_fits_well_is_reused(rows, reused, rng):
    """Memory that is reused is at least as large as an output, and at most twice as large."""
    y = normkit.instance_norm(uniform(rng, (1, 16, 256, 256)))
    first = address(y)
    del y
    y = normkit.instance_norm(uniform(rng, (1, 16, rows, 256)))
    assert (address(y) == first) == reused


def test_resize(rng):
    """NumPy may change the size of an array that it owns."""
    x = uniform(rng, SHAPE)
    y = normkit.instance_norm(x)
    before = y.ravel().copy()
    y.resize((2 * x.size,), refcheck=False)
    assert bits(y[: x.size]) == bits(before)
    y.resize((10,), refcheck=False)
    assert bits(y) == bits(before[:10])


def test_negative_limit():
    with pytest.raises(ValueError, match=r"^n is -1, expected at least 0$"):
        normkit.set_cache_limit(-1)


def test_threads(rng):
    """Many threads that make, keep and drop outputs: each finds its own numbers in them."""
    normkit.set_cache_limit(6 * MB)
    inputs = [uniform(rng, SHAPE, offset=k) for k in range(4)]
    expected = [bits(normkit.instance_norm(x)) for x in inputs]
    wrong = []

    def work(k):
        kept = []
        for _ in range(30):
            kept.append(normkit.instance_norm(inputs[k]))
            if len(kept) > 2:
                kept.pop(0)
        wrong.extend(k for y in kept if bits(y) != expected[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert normkit.cache_size() <= 6 * MB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_others_allocate():
    found = python("""
        import os, threading, warnings
        import numpy as np, normkit
        warnings.simplefilter("ignore")  # forking with threads is what this is about
        x = np.random.default_rng(0).standard_normal((1, 4, 256, 256)).astype("f")
        stop = threading.Event()
        def work():
            while not stop.is_set():
                normkit.instance_norm(x)
        threads = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in threads]
        for _ in range(20):
            child = os.fork()
            if child == 0:
                normkit.instance_norm(x)
                normkit.clear_cache()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        [t.join() for t in threads]
        print("done")
    """)
    assert found == ["done"]


def test_outputs_outlive_everything():
    """A global that the interpreter frees last, after the modules that made it."""
    assert python("""
        import builtins, numpy as np, normkit
        builtins.kept = normkit.instance_norm(np.ones((1, 4, 256, 256), "f"))
        print("done")
    """) == ["done"]


def test_an_environment_that_says_nothing_warns():
    found = python(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import normkit
        print(*[w.message for w in caught], normkit.get_cache_limit())
        """,
        NORMKIT_CACHE_BYTES="1GB",
    )
    assert " ".join(found) == f"NORMKIT_CACHE_BYTES is '1GB', expected a number of bytes; using {256 * MB} {256 * MB}"


@pytest.mark.parametrize(("value", "limit"), [("0", "0"), ("12345678", "12345678"), ("", str(256 * MB))])
def test_environment(value, limit):
    assert python("import normkit; print(normkit.get_cache_limit())", NORMKIT_CACHE_BYTES=value) == [limit]
