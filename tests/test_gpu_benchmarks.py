"""benchmarks/gpu.py, as far as that goes without a GPU: with NumPy, small arrays and a clock that is made up."""

import itertools
import json
import sys
from pathlib import Path

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


def test_from_a_run_to_a_table(modules, tmp_path, capsys):
    """A clock that ticks once a second: all times are one second, so everything is as fast as a copy."""
    gpu, report = modules
    path = tmp_path / "results" / "run.json"
    ticks = itertools.count()
    gpu.main(["--dry-run", "--pairs", "3", "--cases", "G32", "--json", str(path)], clock=lambda: float(next(ticks)))
    printed = capsys.readouterr().out
    whole = json.loads(path.read_text())
    assert whole["commit"]
    results = [r["extra_info"] for r in whole["benchmarks"]]
    assert len(results) == 2 * 8 + 1  # of both, but that the formulas have no activation
    assert all(r["ratio"] == 1 and r["pairs"] == 3 and r["error"] < 0.01 for r in results)
    calls = {r["us"] for r in results}
    assert all(us <= 1e6 / gpu.LEAST_SETS for us in calls)
    line = "| group (2, 64, 5, 5) G=32 channels-last float16 backward |"
    assert line in printed

    pytest.importorskip("matplotlib", reason="no pictures without matplotlib")
    sys.argv = ["report.py", str(path), "--root", str(tmp_path)]
    report.main()
    assert capsys.readouterr().out.strip() == printed[printed.index("`python") :].strip()
    assert {picture.name for picture in (tmp_path / "docs").iterdir()} == {"gpu-bars.png", "gpu-sizes.png"}


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
    """Those that are drawn meanwhile."""
    matplotlib = pytest.importorskip("matplotlib", reason="no pictures without matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    for figure in drawn:
        close(figure)


def test_bars_are_shares_of_a_copy(modules, figures, tmp_path):
    """Of each operation, and only where a rival can do all of its cases; next to each other, as they come."""
    gpu, report = modules
    results = made_up(gpu, {"normkit": 1.25, "torch": 2.0, "rows alone": 4.0})
    report.bars_of_gpu({"date": "", "commit": ""}, results, tmp_path / "bars.png")
    (figure,) = figures
    forward, last, backward = figure.axes
    for panel in (forward, last, backward):
        for group, label in enumerate(panel.get_xticklabels()):
            bars = [b for b in panel.patches if abs(b.get_x() + b.get_width() / 2 - group) < 0.5]
            rows = label.get_text() in ("layer", "rms")
            assert [b.get_height() for b in bars] == pytest.approx([80, 50, 25] if rows else [80, 50])
            assert all(b.get_y() == 0 for b in bars)
    names = ["instance", "instance, small", "group", "batch", "batch, small"]
    assert [label.get_text() for label in last.get_xticklabels()] == names
    assert [label.get_text() for label in forward.get_xticklabels()] == [*names, "layer", "rms"]
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
    monkeypatch.setattr(gpu.gpu_rivals.TwoLines, "forward", lambda self, w, threads: lambda k: w.y[k])  # poison
    for name in ("instance_forward", "layer_forward"):
        monkeypatch.setattr(gpu.gpu_rivals.TwoLines, name, gpu.gpu_rivals.TwoLines.forward)
    gpu.main(["--dry-run", "--pairs", "2", "--cases", "layer-131072x128-bfloat16-forward"])
    out = capsys.readouterr().out
    assert "cupy left out: AssertionError: off by inf" in out
    assert "| normkit |" in out


def test_a_wrong_answer_of_ours_is_a_failure(modules, monkeypatch):
    gpu, _ = modules
    wrong = lambda self, w, threads: lambda k: (w.y[k],)  # noqa: E731
    monkeypatch.setattr(gpu.gpu_rivals.Normkit, "layer_forward", wrong)
    with pytest.raises(AssertionError, match="off by inf"):
        gpu.main(["--dry-run", "--pairs", "2", "--cases", "layer-131072x128-bfloat16-forward"])


def test_gradients_of_parameters_are_judged(modules):
    gpu, _ = modules
    case = gpu.shrunk(next(c for c in gpu.CASES if str(c).startswith("layer") and c.direction == "backward"))
    sets = gpu.Sets(case, np, gpu.Dry.cache)
    dx, dweight, dbias = gpu.gpu_rivals.Normkit().prepare(sets, 1)(0)
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
