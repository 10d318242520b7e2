"""benchmarks/gpu.py, as far as that goes without a GPU: with NumPy, small arrays and a clock that is made up."""

import itertools
import json
import re
import sys
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a checkout: no benchmarks")


@pytest.fixture
def modules(monkeypatch):
    """gpu and report, imported as scripts in their folder import them; afterwards nothing is left of that."""
    before = set(sys.modules)
    shadowed = {name: sys.modules.pop(name) for name in ("cases", "reference") if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    import gpu
    import report

    yield gpu, report
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.modules.update(shadowed)


def test_every_case_has_a_name_of_its_own(modules):
    gpu, _ = modules
    names = [str(case) for case in gpu.CASES]
    assert len({*names}) == len(names)
    assert {case.operation for case in gpu.CASES} >= {"instance", "group", "layer", "rms", "batch"}


LAYER = "layer-131072x128-bfloat16-forward"


def test_goals_are_those_of_what_fits_the_chip(modules):
    """8 blocks of 96 KB hold a statistic, or what gradients want of it; channels-last 32 bytes of each step."""
    gpu, _ = modules
    goals = {str(case): gpu.goal(case) for case in gpu.CASES}
    assert goals["layer-8192x65536-bfloat16-forward"] == 0.92  # 128 KB
    assert goals["layer-8192x65536-bfloat16-backward"] == 0.85
    assert goals["instance-8x64x512x512-float16-forward"] == 0.92  # 512 KB, twice that
    assert goals["instance-8x64x512x512-float16-backward"] == 0.80
    assert goals["instance-1x1x256x256x256-float32-forward"] == 0.80
    assert goals["instance-32x256x56x56-float16-last-backward"] == 0.85  # 2 * 3136 * 32 bytes
    assert goals["instance-8x64x128x128-float32-last-forward"] == 0.92  # 16384 * 32 bytes, twice that
    assert goals["instance-8x64x128x128-float32-last-backward"] == 0.80
    assert goals["group-G32-8x320x64x64-float32-forward"] == 0.92
    assert goals["batch-4x128x1024x1024-float16-forward"] == 0.80


def test_from_a_run_to_a_table(modules, tmp_path, capsys):
    """A clock that ticks once a second: all times are one second, so everything is as fast as a copy."""
    gpu, report = modules
    lines, path = tmp_path / "out/results.jsonl", tmp_path / "out/results.json"
    ticks = itertools.count()
    run = ["--dry-run", "--rivals", "normkit,cupy", "--pairs", "3", "--cases", "G32"]
    status = gpu.main([*run, "--out", str(lines), "--json", str(path)], clock=lambda: float(next(ticks)))
    assert status == 0
    assert capsys.readouterr().out.endswith("21 times, 0 left out\n")
    assert gpu.main(["--rivals", "", "--out", str(lines)]) == 0
    printed = capsys.readouterr().out
    whole = json.loads(path.read_text())
    assert whole["commit"]
    results = [r["extra_info"] for r in whole["benchmarks"]]
    assert len(results) == 2 * 10 + 1  # of both, but that the formulas have no activation
    assert all(r["ratio"] == 1 and r["pairs"] == 3 and r["error"] < 0.01 for r in results)
    assert all(r["us"] <= 1e6 / gpu.LEAST_SETS for r in results)
    rows = [line for line in printed.splitlines() if line.startswith("| group (2, 64, 5, 5) G=32 channels-last")]
    words = [[word.strip() for word in row.split("|")] for row in rows]
    assert [w[1].split()[-1] for w in words] == ["float16", "backward"]
    assert all(w[2] == "**100**" and w[8] == "1.00" for w in words)
    assert [w[3] for w in words] == ["92", "85"]

    pytest.importorskip("matplotlib", reason="no pictures without matplotlib")
    for source in (path, lines):
        sys.argv = ["report.py", str(source), "--root", str(tmp_path)]
        report.main()
        again = capsys.readouterr().out.strip().splitlines()
        assert again[1:] == printed[printed.index("`benchmarks") :].strip().splitlines()[1 : len(again)]
        assert {picture.name for picture in (tmp_path / "docs").iterdir()} == {"gpu-bars.png", "gpu-sizes.png"}


def test_a_result_is_kept_as_soon_as_it_is_there(modules, tmp_path, monkeypatch):
    """A run that is ended leaves what it has found, and another goes on with the next case."""
    gpu, report = modules
    path, measured, seen = tmp_path / "results.jsonl", gpu.measured, []

    def ended(sets, *others):
        seen.append(str(sets.case))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return measured(sets, *others)

    monkeypatch.setattr(gpu, "measured", ended)
    run = ["--dry-run", "--pairs", "2", "--rivals", "normkit", "--cases", "layer", "--out", str(path)]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(run)
    assert [line["case"] for line in report.lines_of(path)] == seen[:2]
    third = seen[2]
    assert gpu.main(run) == 0
    assert seen[3] == third
    cases = [line["case"] for line in report.lines_of(path)]
    assert len({*cases}) == len(cases) == len({str(gpu.shrunk(c)) for c in gpu.CASES if c.operation == "layer"})
    before = path.read_bytes()
    assert gpu.main([*run, "--rivals", ""]) == 0  # the table alone
    assert path.read_bytes() == before


def test_without_git(modules, monkeypatch):
    gpu, _ = modules
    monkeypatch.setenv("PATH", "")
    assert gpu.commit() == "unknown"


def test_rivals_are_imported_when_their_turn_comes(modules, monkeypatch, capsys, tmp_path):
    gpu, report = modules
    made = []

    class Missing(gpu.gpu_rivals.TwoLines):
        name = "missing"

        def __init__(self, xp):
            made.append(self.name)
            raise ImportError("it is not there")

    monkeypatch.setitem(gpu.gpu_rivals.RIVALS, "missing", Missing)
    run = ["--dry-run", "--pairs", "2", "--cases", LAYER, "--out", str(tmp_path / "results.jsonl")]
    assert gpu.main([*run, "--rivals", "normkit"]) == 0
    assert made == []
    assert gpu.main([*run, "--rivals", "missing,cupy"]) == 0
    assert made == ["missing"]
    assert "missing left out: ImportError: it is not there" in capsys.readouterr().out
    assert [line["rival"] for line in report.lines_of(tmp_path / "results.jsonl")] == ["normkit", "cupy"]
    with pytest.raises(SystemExit):
        gpu.main([*run, "--rivals", "nobody"])
    assert "there is no rival 'nobody': expected some of normkit, cupy" in capsys.readouterr().err


def made_up(gpu, ratios):
    """Results of all cases, as gpu.py has them, with one ratio for each rival."""
    fields = ("operation", "groups", "option", "dtype", "channels_last", "direction", "shape")
    about = {"processor": "none", "isa": "made up", "version": "0"}
    return [
        {**{key: getattr(case, key) for key in fields}, **about, "rival": rival, "ratio": ratio}
        for case in gpu.CASES
        for rival, ratio in ratios.items()
        if rival != "rows alone" or case.rows
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn during a test."""
    matplotlib = pytest.importorskip("matplotlib", reason="no pictures without matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


def test_bars_are_shares_of_a_copy(modules, figures, tmp_path):
    """A rival has a bar for each operation whose cases it can all do; bars stand next to each other, as they come."""
    gpu, report = modules
    results = made_up(gpu, {"normkit": 1.25, "torch": 2.0, "rows alone": 4.0})
    report.bars_of_gpu({"date": "", "commit": ""}, results, tmp_path / "bars.png")
    (figure,) = figures
    forward, last, backward = figure.axes
    for panel in (forward, last, backward):
        for group, label in enumerate(panel.get_xticklabels()):
            bars = [b for b in panel.patches if abs(b.get_x() + b.get_width() / 2 - group) < 0.5]
            rows = label.get_text().startswith(("layer", "rms"))
            assert [b.get_height() for b in bars] == pytest.approx([80, 50, 25] if rows else [80, 50])
            assert all(b.get_y() == 0 for b in bars)
    names = {"instance", "instance, small", "group", "batch", "batch, small"}
    assert {label.get_text() for label in last.get_xticklabels()} == names
    assert {label.get_text() for label in forward.get_xticklabels()} == {*names, "layer", "layer, small", "rms"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["normkit", "torch", "rows alone"]


def test_every_case_is_a_point_at_its_bytes(modules, figures, tmp_path):
    gpu, report = modules
    results = made_up(gpu, {"normkit": 1.25, "torch": 2.0})
    report.sizes_of_gpu({"date": "", "commit": ""}, results, tmp_path / "sizes.png")
    (figure,) = figures
    for axis, direction in zip(figure.axes, ("forward", "backward"), strict=True):
        cases = [case for case in gpu.CASES if case.direction == direction and not case.option]
        for name, share in (("normkit", 0.8), ("torch", 0.5)):
            (line,) = (line for line in axis.lines if line.get_label() == name)
            points = [(float(case.moved_bytes), share) for case in cases]
            assert sorted(map(tuple, line.get_xydata())) == sorted(points)


def test_a_wrong_answer_has_no_time(modules, capsys, monkeypatch):
    gpu, _ = modules
    wrong = lambda self, w, threads: lambda k: w.y[k]  # noqa: E731 - poison
    monkeypatch.setattr(gpu.gpu_rivals.TwoLines, "layer_forward", wrong)
    assert gpu.main(["--dry-run", "--pairs", "2", "--rivals", "normkit,cupy", "--cases", LAYER]) == 0
    out = capsys.readouterr().out
    assert "cupy: left out: AssertionError: off by inf" in out
    assert "| layer (4, 64) bfloat16 |" in out


@pytest.mark.parametrize("lost", [False, True], ids=["goes-on", "device-lost"])
def test_a_wrong_answer_of_ours_is_a_failure(lost, modules, monkeypatch, tmp_path):
    """The others are measured all the same; by another process, where this one can no longer."""
    gpu, report = modules
    forward = gpu.gpu_rivals.Normkit.layer_forward

    def wrong_once(self, w, threads):
        wrong = w.case.dtype == "float16"
        return (lambda k: (w.y[k],)) if wrong else forward(self, w, threads)

    monkeypatch.setattr(gpu.gpu_rivals.Normkit, "layer_forward", wrong_once)
    monkeypatch.setattr(gpu.Dry, "is_lost", lambda self: lost)
    path = tmp_path / "results.jsonl"
    run = ["--dry-run", "--pairs", "2", "--rivals", "normkit", "--cases", "layer", "--out", str(path)]
    expected = [gpu.LOST, 0] if lost else [1, 0]
    assert [gpu.main(run), gpu.main(run)] == expected
    lines = report.lines_of(path)
    (failed,) = (line for line in lines if "left_out" in line)
    assert failed["failed"]
    assert failed["left_out"] == "AssertionError: off by inf of the largest number"
    assert len(lines) == len({str(gpu.shrunk(c)) for c in gpu.CASES if c.operation == "layer"})


def test_packages_of_a_rival_may_lie_deeper(modules, tmp_path):
    """A .pth file in the folder says where, as it does in a folder of Python's own."""
    gpu, _ = modules
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/only_here_for_this_test.py").write_text("")
    (tmp_path / "some.pth").write_text("deep/er\n")
    gpu.main(["--dry-run", "--rivals", "normkit", "--pairs", "2", "--cases", LAYER, "--packages", str(tmp_path)])
    __import__("only_here_for_this_test")


# ---- memory ------------------------------------------------------------------------------------------------------


MEMORY = [  # of each kind of arrays and of truth, in pieces and whole
    ("instance", (8, 16, 64, 64), {}),
    ("instance", (8, 16, 64, 64), {"direction": "backward"}),
    ("instance", (4, 16, 128, 64), {"channels_last": True, "direction": "backward", "dtype": "float16"}),
    ("batch", (8, 16, 64, 64), {"direction": "backward"}),
    ("batch", (8, 16, 64, 64), {"channels_last": True, "dtype": "float16"}),
    ("group", (1, 32, 64, 64), {"groups": 4, "dtype": "float16"}),
    ("group", (1, 32, 64, 64), {"groups": 4, "option": "silu", "dtype": "float16"}),
    ("layer", (512, 1024), {"direction": "backward", "dtype": "float16"}),
    ("rms", (4096, 32), {"direction": "backward"}),
    ("instance", (1, 1, 512, 256), {}),
    ("instance", (512, 64, 3, 3), {"direction": "backward"}),
]


@pytest.mark.parametrize(("operation", "shape", "options"), MEMORY, ids=lambda p: str(p))
def test_memory_is_counted(operation, shape, options, modules, monkeypatch):
    """NumPy's memory is counted while a case runs. It may have less at a time than gpu.py says, but not by half."""
    gpu, _ = modules
    monkeypatch.setattr(gpu, "PIECE", 1 << 16)
    case = gpu.Case(operation, shape, **options)
    needed = gpu.needed_bytes(case, gpu.Dry.cache)
    gpu.measure(case, gpu.gpu_rivals.Normkit(np), gpu.Dry(), np, 2)  # what stays for good is there afterwards
    tracemalloc.start()
    found = gpu.measure(case, gpu.gpu_rivals.Normkit(np), gpu.Dry(), np, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "ratio" in found, found
    assert needed / 2 <= peak <= needed


def test_what_does_not_fit_is_said(modules):
    gpu, _ = modules
    case = gpu.Case("instance", (2, 3, 64, 64))
    needed = gpu.needed_bytes(case, gpu.Dry.cache)
    fits = lambda free: gpu.measure(case, gpu.gpu_rivals.Normkit(np), gpu.Dry(free_bytes=free), np, 2)  # noqa: E731
    assert "ratio" in fits(int(1.3 * needed))
    assert re.fullmatch(r"wants \d+ MB and a fifth more, \d+ are free", fits(needed)["left_out"])


def test_every_case_fits_80_gigabytes(modules):
    """The cases fit with the 60 MB of cache of an H200, and with all that the largest case leaves behind."""
    gpu, _ = modules
    assert max(1.2 * gpu.needed_bytes(case, 60 << 20) for case in gpu.CASES) < 60 << 30


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_copy_moves_random_bytes(direction, modules):
    """The copy moves as many bytes as the case: half of them are read, or two thirds."""
    gpu, _ = modules
    sets = gpu.Sets(gpu.Case("layer", (64, 512), direction=direction), np, gpu.Dry.cache)
    ((_, copy),) = gpu.Dry().copies(sets)
    sets.poison()
    copy()
    for k, y in enumerate(sets.y):
        dy = sets.dy[k].view(np.uint8) if sets.dy else 0
        assert (y.view(np.uint8) == sets.x[k].view(np.uint8) ^ dy).all()
        assert len(zlib.compress(y.tobytes())) > 0.85 * y.nbytes


# ---- rivals, with what stands for their libraries ----------------------------------------------------------------


class Interpreted:
    """ReductionKernel and ElementwiseKernel of CuPy: expressions of C that are ones of Python but for casts."""

    def __init__(self, arguments, outputs, expression):
        words = re.sub(r"\((float|T)\)", "", expression)
        self.names = [argument.split()[-1] for argument in arguments.split(",")]
        self.out, self.term = outputs.split()[-1], words.split(" = ", 1)[-1]

    def value(self, arguments):
        given = dict(zip(self.names, (np.asarray(a, np.float32) for a in arguments), strict=True))
        return eval(self.term, {"rsqrtf": lambda a: 1 / np.sqrt(a)}, given)

    @classmethod
    def reduction(cls, arguments, out, term, combine, after, identity, name):
        kernel = cls(arguments, out, term)
        assert (combine, after, identity) == ("a + b", "sum = a", "0")
        return lambda *a, axis, keepdims=False: kernel.value(a).sum(axis, np.float32, keepdims=keepdims)

    @classmethod
    def elementwise(cls, arguments, out, expression, name):
        kernel = cls(arguments, out, expression)

        def call(*arguments):
            *given, y = arguments
            y[...] = kernel.value(given)

        return call


def test_kernels_of_cupy_are_right(modules):
    """The formulas of the kernels are right, as Python runs them."""
    gpu, _ = modules
    cupy = SimpleNamespace(
        ReductionKernel=Interpreted.reduction, ElementwiseKernel=Interpreted.elementwise, zeros=np.zeros
    )
    rival, judged = gpu.gpu_rivals.Kernels(cupy), set()
    for case in dict.fromkeys(map(gpu.shrunk, gpu.CASES)):
        if rival.takes(case, 1):
            sets = gpu.Sets(case, np, gpu.Dry.cache)
            sets.poison()
            answer = rival.prepare(sets, 1)(0)
            assert sets.error(answer if case.direction == "backward" else answer[:1]) < gpu.WRONG
            judged.add((case.operation, case.direction))
    assert len(judged) == 2 * 5


class TorchOfStreams:
    """A tensor, and the PyTorch that it is of: every piece of work notes the stream that it is put on."""

    def __init__(self):
        self.current, self.work = "default", []
        self.cuda = SimpleNamespace(stream=self.stream, ExternalStream=lambda pointer: f"stream {pointer}")

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    ndim = 4

    def __getattr__(self, name):
        def noted(*_):
            self.work.append((name, self.current))
            return self

        return noted


def test_answers_of_torch_are_looked_at_on_their_stream(modules):
    """Answers are still under way when they are converted, so that must happen on their stream."""
    gpu, _ = modules
    torch = TorchOfStreams()
    rival = object.__new__(gpu.gpu_rivals.Torch)
    stream = SimpleNamespace(ptr=42)
    rival.torch, rival.functional = torch, None
    rival.cupy = SimpleNamespace(
        cuda=SimpleNamespace(get_current_stream=lambda: stream), from_dlpack=lambda t: t.from_dlpack()
    )
    rival.instance_forward = lambda w, threads: lambda k: torch.normalize()
    case = gpu.Case("instance", (2, 3, 4, 5), "float16", channels_last=True)
    call = rival.prepare(SimpleNamespace(case=case), 1)
    rival.arrays_of(call(0), SimpleNamespace(case=case))
    assert [name for name, _ in torch.work] == ["normalize", "detach", "float", "permute", "contiguous", "from_dlpack"]
    assert {at for _, at in torch.work} == {"stream 42"}


def test_jax_leaves_memory_to_others(modules, monkeypatch):
    gpu, _ = modules
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    seen = []

    def backend():
        seen.append(gpu.gpu_rivals.os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"))
        return "gpu"

    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(default_backend=backend, numpy=np))
    gpu.gpu_rivals.Jax(np)
    assert seen == ["false"]


def test_gradients_of_parameters_are_judged(modules):
    gpu, _ = modules
    case = gpu.shrunk(next(c for c in gpu.CASES if str(c).startswith("layer") and c.direction == "backward"))
    sets = gpu.Sets(case, np, gpu.Dry.cache)
    dx, dweight, dbias = gpu.gpu_rivals.Normkit(np).prepare(sets, 1)(0)
    assert sets.error((dx, dweight, dbias)) < 0.01
    assert sets.error((dx, 1.02 * dweight, dbias)) > 0.01
    assert sets.error((dx, dweight, dbias + 0.02 * abs(dbias).max())) > 0.01
    assert sets.sets >= gpu.LEAST_SETS
    assert sets.x[0].tobytes() != sets.x[1].tobytes()


def test_no_such_case(modules, capsys):
    gpu, _ = modules
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--cases", "no such"])
    assert "no case has 'no such' in its name" in capsys.readouterr().err
