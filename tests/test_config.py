"""What the library says about itself, and what it listens to."""

import os
import subprocess
import sys

import normkit
import numpy as np
import pytest
from normkit import _core


def python(*arguments, **environment):
    """The output of a fresh interpreter."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("NORMKIT_")}
    done = subprocess.run(
        [sys.executable, *arguments], env=plain | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


class Index:
    def __index__(self):
        return 3

    def __repr__(self):
        return "Index()"


SETTINGS = [(normkit.set_num_threads, normkit.get_num_threads), (normkit.set_cache_limit, normkit.get_cache_limit)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n", [3, Index(), np.uint8(3), np.array(3)], ids=repr)
def test_integers_of_any_type_are_taken(n):
    limit = normkit.get_cache_limit()
    try:
        for change, get in SETTINGS:
            change(n)
            assert get() == 3
        normkit.set_num_threads(1)
        with normkit.num_threads(n):
            normkit.normalize(np.ones((2, 3)), axis=1)
            assert repr(normkit.get_num_threads()) == "3"
    finally:
        normkit.set_cache_limit(limit)


@pytest.mark.parametrize(
    ("n", "kind", "message"),
    [
        ("2", TypeError, "n is '2', expected an integer"),
        (2.0, TypeError, "n is 2.0, expected an integer"),
        (None, TypeError, "n is None, expected an integer"),
        (2**64, ValueError, f"n is {2**64}, expected at most "),
    ],
    ids=repr,
)
def test_what_is_no_number_of_threads_or_bytes(n, kind, message):
    before = [get() for _, get in SETTINGS]
    for change in (*(change for change, _ in SETTINGS), lambda n: normkit.num_threads(n).__enter__()):
        with pytest.raises(kind) as caught:
            change(n)
        assert str(caught.value).startswith(message)
    assert [get() for _, get in SETTINGS] == before


@pytest.mark.parametrize("name", ["mmx", None, 3, b"avx2"], ids=repr)
def test_what_is_no_instruction_set(name):
    expected = ", ".join(map(repr, normkit.isas()))
    with pytest.raises(ValueError, match=f"^name is {name!r}, expected one of {expected}$"), normkit.use_isa(name):
        pass


def test_version():
    assert normkit.__version__[0].isdigit()


def test_the_best_instruction_set_is_in_use():
    assert python("-c", "import normkit; print(normkit.isa())").strip() == normkit.isas()[0]


def test_use_isa_puts_the_old_one_back():
    before = normkit.isa()
    for name in normkit.isas():
        with normkit.use_isa(name):
            assert normkit.isa() == name
            with normkit.use_isa(normkit.isas()[0]):
                assert normkit.isa() == normkit.isas()[0]
            assert normkit.isa() == name
    assert normkit.isa() == before
    with pytest.raises(KeyError), normkit.use_isa(normkit.isas()[-1]):
        raise KeyError
    assert normkit.isa() == before


@pytest.mark.parametrize("name", normkit.isas())
def test_environment_chooses_the_instruction_set(name):
    assert python("-c", "import normkit; print(normkit.isa())", NORMKIT_ISA=name).strip() == name


def test_environment_names_an_unknown_instruction_set():
    code = "import warnings; warnings.simplefilter('error'); import normkit"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        python("-c", code, NORMKIT_ISA="mmx")
    expected = ", ".join(map(repr, normkit.isas()))
    assert f"NORMKIT_ISA is 'mmx', expected one of {expected}; using {normkit.isas()[0]!r}" in failure.value.stderr


def test_environment_chooses_the_number_of_threads():
    assert python("-c", "import normkit; print(normkit.get_num_threads())", NORMKIT_NUM_THREADS="3").strip() == "3"


def test_show_config_and_the_command_line_say_the_same(capsys):
    code = "import normkit; normkit.show_config()"
    report = python("-m", "normkit")
    assert python("-c", code) == report
    normkit.show_config()
    assert capsys.readouterr().out


def test_the_command_line_says_what_it_does():
    assert "show_config()" in python("-m", "normkit", "--help")
    with pytest.raises(subprocess.CalledProcessError) as failure:
        python("-m", "normkit", "--versoin")
    assert "unrecognized arguments: --versoin" in failure.value.stderr


def test_the_report_names_everything():
    report = python("-m", "normkit", NORMKIT_NUM_THREADS="3")
    assert normkit.__version__ in report
    assert all(name in report for name in normkit.isas())
    assert "thread" in report
    assert "3" in report


def test_the_report_names_the_instruction_set_in_use():
    reports = {python("-m", "normkit", NORMKIT_ISA=name) for name in normkit.isas()}
    assert len(reports) == len(normkit.isas())


def test_cuda_is_there_or_the_report_says_why_not():
    assert isinstance(normkit.cuda_available(), bool)
    (line,) = (line for line in python("-m", "normkit").splitlines() if line.startswith("CUDA: "))
    if normkit.cuda_available():
        assert line == f"CUDA: available ({_core.cuda})"
    elif _core.cuda:
        assert line.startswith(f"CUDA: {_core.cuda}, but no device")
    else:
        assert line == f"CUDA: not in this build ({_core.no_cuda})"
        assert _core.no_cuda


def test_import_takes_numpy_alone():
    """torch, CuPy and ml_dtypes may be installed: they are recognized by the arrays, never imported first."""
    code = """import sys
import numpy
before = set(sys.modules)
import normkit
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"""
    assert set(python("-c", code).split()) <= {"normkit", "nanobind_backend"}


def test_public_names():
    for name in (
        "normalize",
        "normalize_backward",
        "instance_norm",
        "instance_norm_backward",
        "set_num_threads",
        "get_num_threads",
        "num_threads",
        "isa",
        "isas",
        "use_isa",
        "show_config",
        "cuda_available",
    ):
        assert callable(getattr(normkit, name))
        assert name in normkit.__all__
        assert getattr(normkit, name).__doc__


def test_a_second_import_is_the_first():
    assert python("-c", "import normkit, importlib; a = normkit.isa; importlib.reload(normkit); print(callable(a))")


def test_warnings_are_none(recwarn):
    x = np.array([[1.0, np.nan, np.inf], [0, 0, 0]], np.float32)
    normkit.normalize(x, axis=1, eps=0.0)
    assert not recwarn.list
