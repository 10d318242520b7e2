"""gpu_check.py, which is asked first of a GPU: it sees what is wrong, and its record is that of these kernels."""

import json
import re
from collections import defaultdict
from pathlib import Path

import gpu_check
import normkit
import numpy as np
import pytest
from launches import recorded
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
    record = json.loads(gpu_check.RECORD.read_text())
    assert {*record} == {*names}
    assert run("--no-launch") == 0
    assert capsys.readouterr().out == f"{len(names)} calls to make\n"


def test_a_record_of_other_calls_is_none(tmp_path, capsys):
    (tmp_path / "bits.json").write_text("{}")
    assert run("--bits", tmp_path / "bits.json") == 1
    assert "is of other calls" in capsys.readouterr().out


@pytest.fixture(scope="module")
def judged():
    """What is said of every call, and what it launches."""
    if _core.cuda != "shim":
        pytest.skip("only in a build with NORMKIT_CUDA=shim do kernels run here")
    record, found = json.loads(gpu_check.RECORD.read_text()), []
    for call in gpu_check.calls():
        with recorded() as launches:
            line = gpu_check.judged(call, None)
        if line["bits"] != record[str(call)]:
            line["failed"] = "other bits"
        found.append((call, line, launches))
    return found


def test_the_record_is_that_of_these_kernels(judged):
    """If it is not, and should not be: `python tests/gpu_check.py --record`."""
    assert [line for _, line, _ in judged if "failed" in line] == []
    assert {call.kind for call, line, _ in judged if line["of_bound"] == 0} == {"residual", "phases"}
    assert max(line["of_bound"] for _, line, _ in judged) <= 1


@only_shim
def test_other_bits_are_seen(tmp_path, capsys):
    record = json.loads(gpu_check.RECORD.read_text())
    name = "layer 6x8x5x7 float32"
    first, *rest = record[name]
    record[name] = "".join(["0" if first != "0" else "1", *rest])
    (tmp_path / "bits.json").write_text(json.dumps(record))
    arguments = ("--bits", tmp_path / "bits.json", "--only", "layer 6x8x5x7", "--out", tmp_path / "check.jsonl")
    assert run(*arguments) == 1
    said = capsys.readouterr().out
    assert f"{name}: other bits than on the CPU: " in said
    assert ", 1 failed, in" in said
    lines = [json.loads(line) for line in (tmp_path / "check.jsonl").read_text().splitlines()]
    assert [line["call"] for line in lines if "failed" in line] == [name]


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


def test_every_kernel_is_launched_every_way(judged):
    """Each that there is in cuda/; traversals by blocks alone, by clusters, and twice with a finish between."""
    names = {name for file in KERNELS.glob("*.cuh") for name in re.findall(r'kName = "(\w+)"', file.read_text())}
    ways, seen = defaultdict(set), set()
    for call, _, launches in judged:
        kernels = [launch.kernel for launch in launches]
        seen |= {*kernels}
        split = any(kernel.endswith("Finish") for kernel in kernels)
        for launch in launches:
            ways[launch.kernel, call.dtype].add("split" if split else "cluster" if launch.cluster > 1 else "block")
    assert seen == names
    for dtype in gpu_check.FLOATS:
        for kernel in ("RunsForward", "RunsBackward", "LanesForward", "LanesBackward"):
            assert ways[kernel, dtype] == {"block", "cluster", "split"}
