"""The CUDA kernels on the CPU, one fiber for each thread, under the sanitizers: no GPU and no nvcc needed.

Needs a checkout and a C++20 compiler. What is compiled are the very sources of the kernels; tests/shim takes the place
of the GPU. (The whole suite of the CPU runs on these kernels too, in a build with NORMKIT_CUDA=shim.)
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
PLANNING = ("geometry", "views", "arguments", "specs", "policy", "plan", "normkit")
SOURCES = {
    "launch": ROOT / "cuda/launch.cu",
    "float32": ROOT / "cuda/kernels.cu",
    "others": ROOT / "tests/shim/only_float32.cpp",
    "backend": ROOT / "tests/shim/backend.cpp",
    **{name: ROOT / f"cpp/src/{name}.cpp" for name in PLANNING},
    "core_test": ROOT / "tests/cpp/core_test.cpp",
    "shim_test": ROOT / "tests/shim/shim_test.cpp",
}
TESTS = ("core_test", "shim_test")
CORE = ("launch", "float32", "others", "backend", *PLANNING)
SANITIZERS = {
    # The address sanitizer finds all that the left out checks would find, as CMakeLists.txt has it.
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=null,object-size,pointer-overflow"),
    "thread": ("-fsanitize=thread",),
}
FLAGS = (
    *("-std=c++20", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"),
    *("-DNORMKIT_SHIM", "-DNORMKIT_STORAGE=float", "-DNORMKIT_STORAGE_NAME=float32"),
    *(f"-I{ROOT / folder}" for folder in ("cpp/include", "cpp/src", "cuda", "tests/shim")),
)

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(not SOURCES["launch"].exists(), reason="not a checkout: no sources of the kernels"),
    pytest.mark.skipif(platform.system() != "Linux", reason="the shim wants Linux"),
]

# What somebody may get wrong, where it shows, which sanitizer is asked, and what is said then.
PLANTS = {
    "missing_barrier": ("blocks", "address", "error nan"),  # of what warps found, before they have found it
    "missing_second_barrier": ("blocks", "thread", "data race"),
    "missing_group_barrier": ("misaligned", "thread", "data race"),  # of what others have brought
    "missing_wait": ("tails", "address", "copies of its are on their way"),
    "short_wait": ("weighted", "address", "error of dweight nan"),  # what is read is still on its way
    "early_tile": ("crowds", "address", "error nan"),
    "one_board": ("weighted", "thread", "data race"),  # a block tells of the next row what another still reads of this
    "missing_cluster_barrier": ("teams", "address", "shared memory of a block that"),  # leaves, or has left
    "early_post": ("teams", "address", "shim: "),  # to a block that may not run yet
    "early_leave": ("teams", "address", "before it has waited there"),  # others still tell it what they found
    "early_return": ("blocks", "address", "shim: "),
    "read_of_peer": ("teams", "address", "shared memory of a block that"),
    "misaligned_load": ("misaligned", "address", "misaligned address"),
    "int_overflow": ("far", "address", "signed integer overflow"),
    "long_tail": ("tails", "address", "heap-buffer-overflow"),
}


@dataclass(frozen=True)
class Programs:
    folder: Path

    def run(
        self, name: str, *arguments: str, sanitizer: str = "address", seed: int = 1, plant: str = "none"
    ) -> subprocess.CompletedProcess:
        shim = {"NORMKIT_SHIM_SEED": str(seed), "NORMKIT_SHIM_PLANT": plant}
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        command = [str(self.folder / f"{name}-{sanitizer}"), *arguments]
        return subprocess.run(
            command, env={**os.environ, **shim, **options}, capture_output=True, text=True, timeout=900
        )

    def expect_pass(self, name: str, arguments: tuple[str, ...], runs: list[tuple[str, int]]) -> None:
        """Each run, a sanitizer and a seed of what comes first, side by side."""

        def run(sanitizer: str, seed: int) -> subprocess.CompletedProcess:
            return self.run(name, *arguments, sanitizer=sanitizer, seed=seed)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in pool.map(run, *zip(*runs, strict=True)):
                assert done.returncode == 0, done.stdout + done.stderr
                assert done.stdout.rstrip().endswith("test passed")


def call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")

    def compile_one(name: str, sanitizer: str) -> Path:
        out = folder / f"{name}-{sanitizer}.o"
        level = "-O0" if name in TESTS else "-O1"  # half the time, for what runs little
        flags = SANITIZERS.get(sanitizer, ())
        call(COMPILER, *FLAGS, *flags, level, "-x", "c++", "-c", SOURCES[name], "-o", out)
        return out

    # Planning has tests under sanitizers elsewhere: once is enough.
    wanted = [(name, sanitizer) for sanitizer in SANITIZERS for name in SOURCES if name not in PLANNING]
    wanted += [(name, "plain") for name in PLANNING]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(wanted, pool.map(compile_one, *zip(*wanted, strict=True)), strict=True))
    for sanitizer, flags in SANITIZERS.items():
        core = [made[name, "plain" if name in PLANNING else sanitizer] for name in CORE]
        for test in TESTS:
            call(COMPILER, *flags, made[test, sanitizer], *core, "-o", folder / f"{test}-{sanitizer}", "-pthread")
    return Programs(folder)


def test_the_core_test_of_the_cpu_passes(programs):
    programs.expect_pass("core_test", (), [("address", 1), ("thread", 1)])


@pytest.mark.parametrize(
    "scenario",
    ["tails", "misaligned", "blocks", "columns", "teams", "weighted", "pieces", "slabs", "slabs_in_place", "far"],
)
def test_scenario(programs, scenario):
    races = [] if scenario in ("misaligned", "slabs_in_place", "far") else [("thread", 1)]  # the others show as much
    programs.expect_pass("shim_test", (scenario,), [*races, ("address", 1), ("address", 2)])


def test_scenario_of_blocks_alone(programs):
    programs.expect_pass("shim_test", ("crowds",), [("address", 1)])


@pytest.mark.parametrize("scenario", ["policy", "lanes", "workspace", "rounding"])
def test_property(programs, scenario):
    programs.expect_pass("shim_test", (scenario,), [("address", 1)])


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_caught(programs, plant):
    scenario, sanitizer, message = PLANTS[plant]
    done = programs.run("shim_test", scenario, sanitizer=sanitizer, plant=plant)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
