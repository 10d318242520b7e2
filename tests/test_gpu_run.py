"""Steps of benchmarks/gpu.sh: time limits, what is kept of them, and going on. .ci/rehearse_gpu.py does the rest."""

import json
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks/gpu_run.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="not a checkout: no benchmarks")


@pytest.fixture
def gpu_run(monkeypatch):
    spec = spec_from_file_location("gpu_run", FILE)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def session(gpu_run, tmp_path):
    """A function that begins one, in the folders of this test."""

    def begun(earlier=None, seconds=60.0, rehearse=False):
        return gpu_run.Session(tmp_path / "out", tmp_path / "work", earlier, seconds, rehearse)

    return begun


def python(words):
    return [sys.executable, "-c", words]


def test_what_is_worth_most_takes_five_minutes(gpu_run, tmp_path):
    """The steps that come first take five minutes at most, where normkit need not be built."""
    steps = {step.name: step for step in gpu_run.steps_of(tmp_path, tmp_path, tmp_path, "")}
    names = list(steps)
    first = ["install", "build", "check", "tests", "cases", "values", *gpu_run.SANITIZERS]
    assert names == [*first, "profile", *gpu_run.RIVALS, "cpu"]
    assert sum(steps[name].seconds for name in first if name != "build") <= 300


def test_steps_are_noted(gpu_run, session, tmp_path):
    step = lambda name, words: gpu_run.Step(name, 20, python(words))  # noqa: E731
    now = session()
    assert now.run(step("good", "print('line'); print('the last line')")) == "passed"
    assert now.run(step("bad", "print('why'); raise SystemExit(2)")) == "failed"
    assert now.run(gpu_run.Step("absent", 20, ["/no/such/program"])) == "failed"
    lines = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["result"]) for line in lines] == [
        ("good", "passed"),
        ("bad", "failed"),
        ("absent", "failed"),
    ]
    assert [line["told"] for line in lines[:2]] == ["the last line", "why"]
    assert "/no/such/program" in lines[2]["told"]
    assert "line\nthe last line\n" in (tmp_path / "out/log.txt").read_text()


def test_a_step_is_ended_with_all_that_it_started(gpu_run, session, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    words = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert session().run(gpu_run.Step("long", 1, python(words))) == "cut"
    assert time.monotonic() - start < 2.5
    assert "begun" in (tmp_path / "out/log.txt").read_text()
    time.sleep(max(0.0, start + 4 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_another_process_goes_on_where_the_device_was_lost(gpu_run, session, tmp_path):
    path = tmp_path / "runs"
    words = f"f = open({str(path)!r}, 'a'); f.write('.'); f.flush(); raise SystemExit(3 if f.tell() < 3 else 0)"
    assert session().run(gpu_run.Step("lost", 20, python(words))) == "passed"
    assert path.read_text() == "..."
    path.unlink()
    assert session(tmp_path / "out").run(gpu_run.Step("always", 1, python("raise SystemExit(3)"))) == "cut"


def test_no_step_is_begun_when_the_time_is_over(gpu_run, session):
    now = session(seconds=3)
    assert now.run(gpu_run.Step("short", 2, python(""))) == "passed"
    assert now.run(gpu_run.Step("long", 20, python(""))) == "skipped"
    assert now.known["long"]["told"] == "the 3 seconds of all steps are over"


def test_a_run_goes_on_where_the_last_one_stopped(gpu_run, session, tmp_path):
    """Steps that have passed or failed are known. Steps that were cut or skipped are done, and steps whose results lie
    elsewhere than in --out are done again."""
    counted = tmp_path / "count"

    def step(name, **options):
        return gpu_run.Step(name, 5, python(f"open({str(counted)!r}, 'a').write('{name} ')"), **options)

    now = session()
    for name, result in (("passed", "passed"), ("failed", "failed"), ("cut", "cut"), ("skipped", "skipped")):
        now.note(step(name), result, 1.0, "")
    now.note(step("install"), "passed", 1.0, "")
    with pytest.raises(SystemExit, match=r"out holds an earlier run: --resume .*out goes on with it"):
        session()
    (tmp_path / "out").rename(tmp_path / "kept")
    again = session(tmp_path / "kept")
    names = [step(name) for name in ("passed", "failed", "cut", "skipped")]
    assert [again.run(one) for one in [step("install", again=True), *names]] == [
        "passed",
        "passed",
        "failed",
        "passed",
        "passed",
    ]
    assert counted.read_text() == "install cut skipped "
    assert (tmp_path / "kept/steps.jsonl").exists()


def test_a_rehearsal_runs_what_needs_no_gpu(gpu_run, session):
    now = session(rehearse=True)
    assert now.run(gpu_run.Step("other", 5, python("raise SystemExit(1)"), python(""))) == "passed"
    assert now.run(gpu_run.Step("none", 5, python("raise SystemExit(1)"))) == "skipped"


def test_arguments(gpu_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["no-such-step"])
    assert "there is no step 'no-such-step': expected some of install, build, check" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_run.main(["pack", str(tmp_path / "wheels"), "apex"])
    assert "there are no wheels of 'apex': expected some of cudnn, liger, quack" in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()
