"""Builds where nvcc is of no use: they have no CUDA, and say why. Needs a checkout, CMake and a C++20 compiler."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "cuda/cuda.cmake").exists(), reason="not a checkout: nothing to build"),
    pytest.mark.skipif(not CMAKE, reason="no CMake"),
]

# The words that an nvcc says before it fails, and what the build makes of them.
UNWILLING = {
    "silent": ("", "nvcc failed"),
    "too old": ("nvcc fatal   : Unsupported gpu architecture 'sm_120'", "Unsupported gpu architecture 'sm_120'"),
    "refuses the compiler": (
        "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 11 are not supported!",
        "unsupported GNU version! gcc versions later than 11 are not supported",
    ),
    "lacks a header": ("device.cuh:3:10: fatal error: cuda_bf16.h: No such file", "cuda_bf16.h: No such file"),
}

NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "nvcc: NVIDIA (R) Cuda compiler driver"; exit;;
  *__cmake_determine_cuda*) echo "#$ TOP={root}" >&2;;
esac
cat >&2 <<'END'
{words}
END
exit 1
"""


@pytest.fixture
def toolkit(tmp_path):
    """A folder that CMake takes for one of CUDA; the function puts an nvcc there that says something and fails."""
    (tmp_path / "nvvm/libdevice").mkdir(parents=True)
    (tmp_path / "bin").mkdir()

    def with_nvcc(words: str) -> Path:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.write_text(NVCC.format(root=tmp_path, words=words))
        nvcc.chmod(0o755)
        return nvcc.parent

    return with_nvcc


def configure(folder: Path, nvcc: Path, cuda: str) -> subprocess.CompletedProcess:
    path = f"{nvcc}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_PATH")}
    command = [CMAKE, "-S", ROOT, "-B", folder, "-DNORMKIT_PYTHON=OFF", f"-DNORMKIT_CUDA={cuda}"]
    return subprocess.run(command, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("nvcc", UNWILLING)
def test_auto_leaves_cuda_out_and_says_why(nvcc, toolkit, tmp_path):
    words, expected = UNWILLING[nvcc]
    done = configure(tmp_path / "build", toolkit(words), "auto")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "no CUDA" in line)
    assert line.startswith("-- normkit: this build has no CUDA: nvcc failed")
    assert expected in line


def test_on_insists(toolkit, tmp_path):
    assert configure(tmp_path / "build", toolkit(""), "on").returncode != 0


def test_auto_looks_anew_each_time(toolkit, tmp_path):
    for words in ("first", "second"):
        done = configure(tmp_path / "build", toolkit(f"nvcc fatal   : {words}"), "auto")
        assert f"no CUDA: nvcc failed: {words}" in done.stdout
