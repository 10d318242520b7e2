"""What other software says or expects: limits of threads, environments, fork, data frames."""

import asyncio
import importlib.metadata
import modulefinder
import os
import subprocess
import sys
import threading

import normkit as nk
import numpy as np
import pytest

CPUS = len(os.sched_getaffinity(0))


def python(code, **environment):
    """What Python prints, in an environment without limits of threads but for these; warnings are errors."""
    names = ("NORMKIT_NUM_THREADS", "OMP_NUM_THREADS", "NORMKIT_CACHE_BYTES")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, env=clean | environment)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def threads_of(**environment):
    return int(python("import normkit; print(normkit.get_num_threads())", **environment))


# ---- how many threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "general", "expected"),
    [
        (None, None, CPUS), (None, "1", 1), (None, "1,4", 1), (None, "100000", CPUS), ("3", "1", 3), ("3", None, 3),
        ("007", None, 7), (None, "0", CPUS), (None, "two", CPUS), (None, "", CPUS), ("", "1", 1), (None, "1 2", CPUS),
    ],
)  # fmt: skip
def test_environment(mine, general, expected):
    given = {"NORMKIT_NUM_THREADS": mine, "OMP_NUM_THREADS": general}
    found = threads_of(**{name: value for name, value in given.items() if value is not None})
    assert found == expected or (expected == CPUS and found < CPUS)  # a quota may allow less


@pytest.mark.parametrize("value", ["1e3", "99999999999", "0", "-1", "two", " 2", "2 ", "1,2"])
def test_nonsense_in_the_environment_warns(value):
    code = """import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import normkit
print(*(w.message for w in caught))
assert {w.filename for w in caught} == {"<string>"}  # whoever imports, not the library
print(normkit.get_num_threads(), normkit.get_cache_limit())"""
    message, got = python(code, NORMKIT_NUM_THREADS=value).splitlines()
    count = got.split()[0]
    assert message == f"NORMKIT_NUM_THREADS is {value!r}, expected a number of threads, at least 1; using {count}"
    assert int(count) <= CPUS
    if value != "0":
        message, got = python(code, NORMKIT_CACHE_BYTES=value + "9" * 20).splitlines()
        expected = f"NORMKIT_CACHE_BYTES is {value + '9' * 20!r}, expected a number of bytes; using {256 << 20}"
        assert message == expected


@pytest.mark.parametrize("first", ["normkit", "threadpoolctl"])
def test_threadpoolctl(first):
    pytest.importorskip("threadpoolctl")
    code = f"""import {first}, importlib.util, normkit
assert importlib.util.find_spec("threadpoolctl") is not None  # asking is not importing
import threadpoolctl
before = normkit.get_num_threads()
with threadpoolctl.threadpool_limits(1):
    print(normkit.get_num_threads(), end=" ")
with threadpoolctl.threadpool_limits(5, user_api="normkit"):
    print(normkit.get_num_threads(), end=" ")
(info,) = (i for i in threadpoolctl.threadpool_info() if i["user_api"] == "normkit")
print(info["num_threads"] == before == normkit.get_num_threads(), info["version"] == normkit.__version__)"""
    assert python(code) == "1 5 True True"


def test_what_is_not_there_is_not_found():
    code = """import sys, normkit
sys.path[:] = []
try:
    import threadpoolctl
except ImportError as e:
    print(e)"""
    assert python(code) == "No module named 'threadpoolctl'"


def test_a_limit_is_for_its_thread():
    before, found = nk.get_num_threads(), []
    with nk.num_threads(before + 3):
        other = threading.Thread(target=lambda: found.append(nk.get_num_threads()))
        other.start()
        other.join()
        assert nk.get_num_threads() == before + 3
    assert found == [before]


def test_a_limit_is_for_its_task():
    async def task(count, others):
        with nk.num_threads(count):
            await others.wait()
            return nk.get_num_threads()

    async def both():
        barrier = asyncio.Barrier(2)
        return await asyncio.gather(task(3, barrier), task(4, barrier))

    assert asyncio.run(both()) == [3, 4]


def test_a_limit_holds_for_calls():
    """Threads are started when a call first wants them: it says how many."""
    code = """import os, normkit, numpy as np
def threads(): return len(os.listdir("/proc/self/task"))
x, at_first = np.ones((64, 64, 64), np.float32), threads()
for count in (1, 3, 2, 5):
    with normkit.num_threads(count):
        normkit.instance_norm(x)
    print(threads() - at_first, end=" ")"""
    assert python(code, NORMKIT_NUM_THREADS="1") == "0 2 2 4"


# ---- fork --------------------------------------------------------------------------------------------------------


def test_fork_finds_no_thread():
    """Python 3.12 and later warn of a fork with threads, and here a warning is an error."""
    code = """import os, normkit, numpy as np
x = np.random.default_rng(0).random((64, 64, 64), np.float32)
before = normkit.instance_norm(x).tobytes()
for _ in range(20):
    child = os.fork()
    same = normkit.instance_norm(x).tobytes() == before
    if not child:
        os._exit(not same)
    assert same and os.waitpid(child, 0)[1] == 0
print("as before")"""
    assert python(code, NORMKIT_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1") == "as before"


def test_fork_beside_calls_of_other_threads():
    code = """import os, threading, normkit, numpy as np
x = np.random.default_rng(0).random((64, 64, 64), np.float32)
before, over, wrong = normkit.instance_norm(x).tobytes(), threading.Event(), []
def calls():
    while not over.is_set():
        if normkit.instance_norm(x).tobytes() != before:
            wrong.append(1)
others = [threading.Thread(target=calls) for _ in range(3)]
for other in others:
    other.start()
for _ in range(20):
    child = os.fork()
    if not child:
        os._exit(normkit.instance_norm(x).tobytes() != before)
    assert os.waitpid(child, 0)[1] == 0
over.set()
for other in others:
    other.join()
print(len(wrong))"""
    code = "import warnings\nwarnings.simplefilter('ignore')\n" + code  # of threads that are not ours
    assert python(code, NORMKIT_NUM_THREADS="3") == "0"


# ---- frozen programs ---------------------------------------------------------------------------------------------


def test_what_freezes_programs_sees_all_modules():
    """PyInstaller and the like take along what import statements name."""
    finder = modulefinder.ModuleFinder(excludes=["numpy", *sys.stdlib_module_names])
    finder.import_hook("normkit")
    required = [words.partition(">")[0] for words in importlib.metadata.requires("normkit") if "extra" not in words]
    assert {name.replace("-", "_") for name in required} - {"numpy"} <= finder.modules.keys()


# ---- what is no array --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name", "way"),
    [
        ("pandas.core.frame", "DataFrame", "pass x.to_numpy()"),
        ("xarray.core.dataarray", "DataArray", "pass x.values, or call through xarray.apply_ufunc"),
        ("xarray.core.dataset", "Dataset", "pass the values of a variable of x, or call through xarray.apply_ufunc"),
    ],
)
def test_what_holds_an_array_is_refused_with_the_way(library, name, way):
    x = type(name, (), {"__module__": library})()
    message = f"x is a {name}, expected a NumPy array or an object with __dlpack__: {way}"
    with pytest.raises(TypeError) as caught:
        nk.instance_norm(x)
    assert str(caught.value) == message


@pytest.mark.parametrize(("library", "name"), [("numpy", "ndarray"), ("torch", "Tensor")])
def test_a_class_of_arrays_is_no_array(library, name):
    array = getattr(pytest.importorskip(library), name)
    with pytest.raises(TypeError, match=rf"^x is an? {type(array).__name__}, expected a NumPy array or an object"):
        nk.instance_norm(array)


@pytest.mark.parametrize("dtype", ["<U3", ">U3", "|S3", ">c8", ">M8[s]", "O"])
def test_what_no_byte_order_would_mend(dtype):
    with pytest.raises(TypeError, match=r"^x has dtype .*, expected float32, .*bits$"):
        nk.instance_norm(np.zeros((2, 3, 4), dtype))
