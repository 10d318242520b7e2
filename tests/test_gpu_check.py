"""gpu_check.py, which is asked first of a GPU: it sees what is wrong, and its record is that of these kernels."""

import json
import re
from pathlib import Path

import gpu_check
import normkit
import numpy as np
import pytest
from normkit import _core

KERNELS = Path(__file__).parents[1] / "cuda"
only_shim = pytest.mark.skipif(
    _core.cuda != "shim", reason="only in a build with NORMKIT_CUDA=shim do kernels run here"
)


def run(*arguments):
    return gpu_check.main([*map(str, arguments)])


def test_inputs_are_the_same_for_ever():
    assert gpu_check.numbers((2,), 1, "float64").tolist() == [1.105180025100708, -0.2804582118988037]
    assert gpu_check.numbers((2,), 2, "float16").tolist() == [0.17578125, -1.21484375]
    assert gpu_check.numbers((2,), 3, "uint8").tolist() == [154, 176]
    values = gpu_check.numbers((1000, 1000), 2)
    assert len(np.unique(values)) > 900_000
    assert abs(values.mean()) < 0.01  # six standard deviations are 0.007
    assert abs(values.var() - 4 / 3) < 0.01


def test_every_call_has_a_name_and_the_record_has_it(capsys):
    names = [str(call) for call in gpu_check.calls()]
    assert len({*names}) == len(names)
    assert {call.op for call in gpu_check.calls()} == {*gpu_check.OPERATIONS}
    recorded = json.loads(gpu_check.RECORD.read_text())
    assert {*recorded} == {str(call) for call in gpu_check.calls() if call.is_exact}
    assert run("--no-launch") == 0
    assert capsys.readouterr().out == f"{len(names)} calls to make\n"


def test_a_record_of_other_calls_is_none(tmp_path, capsys):
    (tmp_path / "bits.json").write_text("{}")
    assert run("--bits", tmp_path / "bits.json") == 1
    assert "is of other calls" in capsys.readouterr().out


@only_shim
def test_the_record_is_that_of_these_kernels(tmp_path, capsys):
    """If it is not, and should not be: `python tests/gpu_check.py --record`."""
    assert run("--out", tmp_path / "check.jsonl") == 0, capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert len(lines) == len(gpu_check.calls())
    assert {line["call"].split()[-1] for line in lines if line["of_bound"] == 0} == {"residual", "phases"}
    assert max(line["of_bound"] for line in lines) <= 1


@only_shim
def test_other_bits_are_seen(tmp_path, capsys):
    recorded = json.loads(gpu_check.RECORD.read_text())
    name = "layer 6x8x5x7 float32"
    first, *rest = recorded[name]
    recorded[name] = "".join(["0" if first != "0" else "1", *rest])
    (tmp_path / "bits.json").write_text(json.dumps(recorded))
    assert run("--bits", tmp_path / "bits.json", "--only", "layer 6x8x5x7") == 1
    said = capsys.readouterr().out
    assert f"{name}: other bits than on the CPU: " in said
    assert ", 1 failed, in" in said


@only_shim
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("instance_norm", "instance 6x8x5x7 float16"),
        ("instance_norm_backward", "instance 6x8x5x7 float16"),
        ("instance_norm_double_backward", "instance 2x4x3x5 float32 double-backward"),
        ("apply", "instance 6x8x5x7 float32 phases"),
    ],
)
def test_wrong_results_are_seen(name, call, monkeypatch, capsys):
    """One element, by more than its bound."""
    right = getattr(normkit, name)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        first = found[0] if isinstance(found, tuple) else found
        first.flat[first.size // 2] += abs(first).max() / 64
        return found

    monkeypatch.setattr(normkit, name, wrong)
    assert run("--only", call) == 1
    assert f"{call}: AssertionError" in capsys.readouterr().out


@only_shim
def test_every_kernel_is_launched_every_way():
    """Each that there is in cuda/; traversals by blocks alone, by clusters, and twice with a finish between."""
    launches = pytest.importorskip("launches", reason="the shim does not tell what it launches")
    names = {name for file in KERNELS.glob("*.cuh") for name in re.findall(r'kName = "(\w+)"', file.read_text())}
    seen, ways = set(), set()
    for call in gpu_check.calls():
        with launches.recorded() as found:
            gpu_check.Judged(call)
        kernels = [launch.kernel for launch in found]
        seen |= {*kernels}
        split = any(kernel.endswith("Finish") for kernel in kernels)
        for launch in found:
            if launch.kernel.startswith(("Runs", "Lanes")):
                ways.add(
                    (launch.kernel, call.dtype, "split" if split else "cluster" if launch.cluster > 1 else "block")
                )
    assert seen == names
    for dtype in gpu_check.FLOATS:
        for traversal in ("RunsForward", "RunsBackward"):
            assert {way for kernel, of, way in ways if (kernel, of) == (traversal, dtype)} == {
                "block",
                "cluster",
                "split",
            }
        for traversal in ("LanesForward", "LanesBackward"):
            assert {way for kernel, of, way in ways if (kernel, of) == (traversal, dtype)} >= {"block", "split"}
