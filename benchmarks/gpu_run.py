"""All that a GPU is asked, what is worth most first: `benchmarks/gpu.sh`. For a machine that has CuPy, but no network.

    gpu.sh pack FOLDER [RIVAL ...]     where there is a network and nvcc: gathers the wheels that such a machine may
                                       lack, normkit's among them, and those of rivals: cudnn, liger, quack
    gpu.sh --wheels FOLDER [STEP ...]  there: all steps, or some, each under a time limit of its own

      install      what is missing, into a folder beside all that Python has
      build        normkit, where its wheel does not import or there is none
      check        every operation and every kernel against float64, and against the bits of the CPU
      tests        what only a GPU has: streams, graphs, large arrays
      cases        times of normkit alone
      values       the tests of values on arrays of the GPU
      memcheck, racecheck, synccheck     compute-sanitizer on every kernel
      profile      each kernel of every case once, by Nsight Compute: bytes of memory, occupancy, time
      cupy, cupy-kernels, torch, ...     times of a rival
      cpu          times on 1 to 16 cores, beside PyTorch

What is found lies in `--out`: a log, and a line of JSON for each step, check and time, written as it comes; a table at
the end. `--resume FOLDER`, an `--out` of before, goes on where that run stopped. Exit status 1 where a step failed.
`--rehearse` does all that needs no GPU.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, TESTS = ROOT / "benchmarks", ROOT / "tests"
PYTHON = sys.executable
LOST = 3  # exit status of a process that can no longer use the device: another may
VALUES = """values layouts out where residual activation adaptive extremes edges family phases double_backward streamed
    bits hypothesis onnx errors l2_normalize"""
SANITIZERS = {"memcheck": 20, "racecheck": 35, "synccheck": 10}  # seconds
# What users of a GPU know best comes first. Inductor compiles each case for seconds.
RIVALS = {"cupy": 30, "cupy-kernels": 30, "torch": 60, "inductor": 80, "cudnn": 40, "liger": 40, "quack": 40, "jax": 40}
RIVAL_WHEELS = {
    "cudnn": ["nvidia-cudnn-frontend==1.20.0"],
    "liger": ["liger-kernel==0.8.5"],
    "quack": [
        "quack-kernels==0.2.4",
        "nvidia-cutlass-dsl==4.3.5",
        "apache-tvm-ffi==0.1.15.post2",
        "torch-c-dlpack-ext==0.1.5",
    ],
}
MANYLINUX = [*(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34)), "manylinux2014_x86_64"]
METRICS = """gpu__time_duration.sum dram__bytes_read.sum dram__bytes_write.sum launch__grid_size launch__block_size
    launch__registers_per_thread launch__shared_mem_per_block_dynamic launch__waves_per_multiprocessor
    sm__warps_active.avg.pct_of_peak_sustained_active smsp__issue_active.avg.pct_of_peak_sustained_active"""
CPU_CASES = " or ".join(
    f"{case}-float32-{direction}"
    for case in ("instance-16x256x32x32", "instance-8x64x128x128", "layer-4096x768", "batch-32x64x112x112")
    for direction in ("forward", "backward")
)


def requirements() -> list[str]:
    """All that pyproject.toml wants to build, run and test, and what stops a test that hangs."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())
    builds = [*whole["build-system"]["requires"], *whole["tool"]["scikit-build"]["build"]["requires"]]
    listed = [*builds, *whole["project"]["optional-dependencies"]["test"]]
    return [*dict.fromkeys(listed), "ninja", "pytest-timeout"]


def pip(*arguments: object, **options: object) -> str:
    """Runs pip, and returns what it says. A caller in a terminal sees its errors there."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    return "unknown"


# ---- where there is a network ------------------------------------------------------------------------------------


def pack(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh pack", description="Gathers wheels for a machine without a network.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("rivals", nargs="*", metavar="RIVAL", help=f"some of {', '.join(RIVAL_WHEELS)}")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU (%(default)s)")
    parser.add_argument("--wheel", type=Path, help="one of normkit that is built already")
    options = parser.parse_args(arguments)
    if unknown := {*options.rivals} - {*RIVAL_WHEELS}:
        parser.error(f"there are no wheels of {unknown.pop()!r}: expected some of {', '.join(RIVAL_WHEELS)}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("normkit-*.whl"):
        wheel.unlink()
    if options.wheel:
        shutil.copy(options.wheel, folder)
    else:
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, env={"NORMKIT_CUDA": "on", **os.environ})
    there = ["--quiet", "--only-binary=:all:", "--implementation", "cp", "--python-version", options.python]
    there += [word for platform in MANYLINUX for word in ("--platform", platform)]
    pip("download", *there, "--dest", folder, *requirements())
    for wheel in folder.glob("numpy-*.whl"):
        wheel.unlink()  # who has CuPy has NumPy
    for rival in options.rivals:
        pip("download", "--no-deps", *there, "--dest", folder / rival, *RIVAL_WHEELS[rival])
    (folder / "commit").write_text(commit())
    sizes = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*.whl"))}
    for path, size in sizes.items():
        print(f"{size / 1e6:7.1f} MB  {path}")
    print(f"{sum(sizes.values()) / 1e6:7.1f} MB  in {options.folder}, for Python {options.python}")
    return 0


# ---- where there is a GPU ----------------------------------------------------------------------------------------


def into(site: Path, wheels: list[object], **options: object) -> None:
    flags = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", site]
    pip("install", *flags, *wheels, **options)


def install(arguments: list[str]) -> int:
    """Installs into a folder of its own, as a virtual environment made from another does not see the packages of that.
    Packages that are there stay as they are, and pip says which are missing."""
    site, wheels = map(Path, arguments)
    shutil.rmtree(site, ignore_errors=True)
    if not any(wheels.glob("*.whl")):
        print(f"{wheels} has no wheels: all there is must be installed", flush=True)
        return 0
    ask = ["install", "--quiet", "--dry-run", "--report", "-", "--no-index", "--find-links", wheels]
    plan = json.loads(pip(*ask, *requirements()))["install"]
    missing = [f"{one['metadata']['name']}=={one['metadata']['version']}" for one in plan]
    print("missing:", *missing, flush=True)
    into(site, ["--find-links", wheels, *missing, *wheels.glob("normkit-*.whl")])
    for rival in RIVAL_WHEELS:
        if (wheels / rival).is_dir():
            into(site.with_name(rival), [*(wheels / rival).glob("*.whl")])
    return 0


def build(arguments: list[str]) -> int:
    """Builds normkit, if it does not import from the folder that it was installed into."""
    site = Path(arguments[0])
    command = [PYTHON, "-m", "normkit"]
    if (site / "normkit").is_dir() and subprocess.run(command).returncode == 0:
        return 0
    capability = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with suppress(OSError):
        found = subprocess.run(capability, capture_output=True, text=True).stdout.split()
        os.environ.setdefault("ARCHITECTURES", f"{found[0].replace('.', '')}-real" if found else "")
    settings = [f"build-dir={ROOT / 'build/gpu-build'}"]
    if os.environ.get("ARCHITECTURES"):
        settings.append(f"cmake.define.NORMKIT_CUDA_ARCHITECTURES={os.environ['ARCHITECTURES']}")
    words = [word for setting in settings for word in ("--config-settings", setting)]
    into(site, ["--no-build-isolation", *words, ROOT], env={"NORMKIT_CUDA": "on", **os.environ})
    return subprocess.run(command).returncode


@dataclass(frozen=True)
class Step:
    """`seconds` are what it may take. A rehearsal runs another command, or nothing."""

    name: str
    seconds: float
    command: list[object]
    rehearsed: list[object] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    again: bool = False  # in every run: what it makes does not lie in `--out`


def steps_of(out: Path, work: Path, wheels: Path, of_commit: str) -> list[Step]:
    """Up to the sanitizers they take five minutes at most."""
    site = work / "site"
    this = [PYTHON, BENCHMARKS / "gpu_run.py"]
    # A test is named when it ends, as time may be over before all have. Plugins that nobody asked for may warn, as
    # libraries may that are newer than normkit. Elsewhere that is an error.
    pytest = [PYTHON, "-m", "pytest", "-v", "-W", "default", "-p", "pytest_timeout", "--timeout", 60, "--durations", 6]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    values = [*pytest, "--tb=line", *(TESTS / f"test_{name}.py" for name in VALUES.split())]
    side_by_side = ["-p", "xdist", "-n", min(12, os.cpu_count() or 1)]
    check = [PYTHON, TESTS / "gpu_check.py"]
    times = [PYTHON, BENCHMARKS / "gpu.py", "--out", out / "results.jsonl", "--commit", of_commit, "--rivals"]
    cpu = [PYTHON, "-m", "pytest", "-q", BENCHMARKS, "--seconds", 0.1]
    steps = [
        Step("install", 15, made := [*this, "install-into", site, wheels], made, again=True),
        Step("build", 240, made := [*this, "build-into", site], made, again=True),
        Step("check", 30, [*check, "--out", out / "check.jsonl"], [*check, "--no-launch"]),
        Step("tests", 55, test := [*pytest, "-rs", TESTS / "test_gpu.py"], test, alone),
        Step("cases", 65, [*times, "normkit"], [*times, "normkit", "--pairs", 2, "--dry-run"]),
        Step(
            "values",
            70,
            [*values, *side_by_side],
            [*values, "-p", "xdist", "-n", 1, "-k", "every_operator_has_cases"],
            {**alone, "NORMKIT_TEST_ARRAYS": "cupy"},
        ),
    ]
    for tool, seconds in SANITIZERS.items():
        tested = [] if tool == "memcheck" else ["--only", "float32"]
        watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9, *check, *tested]
        steps.append(Step(tool, seconds, watched, None, {"NORMKIT_TEST_POOL": "off"}))
    profiled = [PYTHON, BENCHMARKS / "gpu.py", "--rivals", "", "--profile"]
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--nvtx", "--page", "raw"]
    ncu += ["--metrics", ",".join(METRICS.split()), "--csv", "--log-file", out / "profile.csv"]
    steps.append(Step("profile", 50, [*ncu, *profiled], [*profiled, "--dry-run"]))
    for rival, seconds in RIVALS.items():
        one = [*times, rival, "--packages", work / rival]
        steps.append(Step(rival, seconds, one, [*one, "--pairs", 2, "--dry-run"]))
    threads = {"NORMKIT_BENCHMARK_THREADS": "1,2,4,8,16"}
    measured = [*cpu, "-k", f"({CPU_CASES}) and (normkit- or torch-)", f"--benchmark-json={out / 'cpu.json'}"]
    steps.append(Step("cpu", 120, measured, [*cpu, "-m", "smoke", "-k", "normkit-"], threads))
    return steps


class Session:
    """A run of some steps, and what is known of it: the files of its folder."""

    def __init__(self, out: Path, work: Path, earlier: Path | None, seconds: float, rehearse: bool) -> None:
        self.out = out
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)
        if earlier and earlier.resolve() != out:
            for path in earlier.iterdir():
                shutil.copy(path, out)
        self.steps = out / "steps.jsonl"
        lines = map(json.loads, self.steps.read_text().splitlines()) if self.steps.exists() else ()
        self.known = {line["step"]: line for line in lines}
        if self.known and not earlier:
            raise SystemExit(f"{out} holds an earlier run: --resume {out} goes on with it")
        self.rehearses, self.slower = rehearse, 4 if rehearse else 1  # a machine without a GPU may be any
        self.seconds = self.slower * seconds
        self.until = time.monotonic() + self.seconds
        paths = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **{f"{owner}_CACHE_DIR": str(work / "cache") for owner in ("CUPY", "TRITON", "TORCHINDUCTOR")},
        }

    def say(self, words: str, file: str = "log.txt") -> None:
        print(words, flush=True)
        with (self.out / file).open("a") as log:
            log.write(words + "\n")

    def note(self, step: Step, result: str, seconds: float, told: str) -> str:
        line = {"step": step.name, "result": result, "seconds": round(seconds, 1), "told": told}
        self.known[step.name] = line
        with self.steps.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.say(f"=== {step.name}: {result} after {seconds:.0f} s: {told}")
        return result

    def run(self, step: Step) -> str:
        """passed, failed, `cut` where its time was over, or `skipped`."""
        before = self.known.get(step.name, {}).get("result")
        if before in ("passed", "failed") and not step.again:
            self.say(f"=== {step.name}: {before} in an earlier run")
            return str(before)
        command = step.rehearsed if self.rehearses else step.command
        start = time.monotonic()
        end = min(start + self.slower * step.seconds, self.until)
        if command is None:
            return self.note(step, "skipped", 0, "it wants a GPU")
        if end - start < min(step.seconds, 5):
            return self.note(step, "skipped", 0, f"the {self.seconds:.0f} seconds of all steps are over")
        self.say(f"=== {step.name}, for {end - start:.0f} s at most")
        status: int | None = LOST
        while status == LOST:
            status, last = self.watch([*map(str, command)], step.environment, end)
        result = {None: "cut", 0: "passed"}.get(status, "failed")
        return self.note(step, result, time.monotonic() - start, last[:200])

    def watch(self, command: list[str], environment: dict[str, str], end: float) -> tuple[int | None, str]:
        """The exit status of a command, None if it had to be ended, and the last line of what it said."""
        last = [""]
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
            )
        except OSError as error:
            return 1, str(error)

        def pass_on() -> None:
            assert process.stdout
            with process.stdout as said:
                for line in said:
                    self.say(line.rstrip())
                    last[0] = line.strip() or last[0]

        reader = threading.Thread(target=pass_on)
        reader.start()
        status: int | None = None
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            reader.join()
        return status, last[0]

    def summary(self, of_commit: str) -> None:
        """Writes a table of all steps, and a table of all times."""
        lines = ["| step | result | s | |", "|---|---|---|---|"]
        lines += [f"| {k['step']} | {k['result']} | {k['seconds']} | {k['told']} |" for k in self.known.values()]
        results = ["--out", self.out / "results.jsonl", "--json", self.out / "results.json"]
        command = [PYTHON, BENCHMARKS / "gpu.py", "--commit", of_commit, "--rivals", "", *results]
        told = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True)
        (self.out / "table.md").unlink(missing_ok=True)
        self.say("\n".join([*lines, "", told.stdout or told.stderr]), "table.md")


def main(arguments: list[str]) -> int:
    commands = {"pack": pack, "install-into": install, "build-into": build}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="*", help="some steps; by default all")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build/wheels", help="what pack made (%(default)s)")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "build/gpu", help="(%(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu-work", help="for packages (%(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="an --out of before: goes on with that run")
    parser.add_argument("--seconds", type=float, default=570, help="for all steps (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="all that needs no GPU")
    options = parser.parse_args(arguments)

    noted = options.wheels / "commit"
    of_commit = noted.read_text().strip() if noted.exists() else commit()
    out, work = options.out.resolve(), options.work.resolve()
    steps = steps_of(out, work, options.wheels.resolve(), of_commit)
    if unknown := {*options.step} - {step.name for step in steps}:
        parser.error(f"there is no step {unknown.pop()!r}: expected some of {', '.join(s.name for s in steps)}")
    session = Session(out, work, options.resume, options.seconds, options.rehearse)
    results = []
    for step in steps:
        if step.again or not options.step or step.name in options.step:
            results.append(session.run(step))
            if step.again and results[-1] != "passed":
                return 1  # nothing can be done without it
    session.summary(of_commit)
    return int("failed" in results)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
