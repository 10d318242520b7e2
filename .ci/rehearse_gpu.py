"""Rehearses benchmarks/gpu.sh without a GPU: `python .ci/rehearse_gpu.py normkit-*.whl`.

A virtual environment becomes the machine that gpu.sh is for: Python 3.12, no network, no git, old tools to build with,
and in the place of CuPy, PyTorch and JAX stand-ins that have no device. There all is done that needs none, and what is
left of it is looked at. `--build` has normkit built there. `--plants` puts back mistakes that were once made, one after
the other, and fails where one is not seen.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = """numpy==2.5.* onnx==1.23.* ml-dtypes pytest pytest-benchmark pytest-xdist pytest-timeout hypothesis cmake
    ninja nanobind<3 scikit-build-core<1"""

NOTED = """
    import json, os, sys
    with open(os.environ["IMPORTS"], "a") as file:
        file.write(json.dumps([__name__, sys.argv, os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")]) + chr(10))
    def __getattr__(name):
        raise (AttributeError if name.startswith("__") else ImportError)(f"{__name__} without a GPU has no {name}")
    """
STAND_INS = {  # each notes who imports it; CuPy warns where it does not find the compiler of CUDA
    "cupy": """
        import warnings
        warnings.warn("CUDA path could not be detected. Set CUDA_PATH environment variable if CuPy fails to load.")
        class Lost:
            def __call__(self, *_, **__):
                raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        class ndarray: pass
        class cuda:
            Device = Stream = alloc = Lost()
            set_allocator = lambda allocator: None
        class pool:
            malloc = Lost()
        get_default_memory_pool = lambda: pool
        """,
    "torch": """
        class cuda:
            is_available = lambda: False
        """,
    "jax": """
        default_backend = lambda: "cpu"
        """,
}
PASSED = {"install", "build", "check", "tests", "cases", "values", "cupy", "torch", "jax", "cpu"}

RUN = "benchmarks/gpu_run.py"
PLANTS = {  # in a file, instead of some words, others
    "a venv of a venv": (
        "benchmarks/gpu.sh",
        "exec python3 ",
        'python3 -m venv --system-site-packages "$HOME/venv"; exec "$HOME/venv/bin/python" ',
    ),
    "packages from a network": (RUN, '"--no-index", "--find-links", wheels]', '"--find-links", "nowhere"]'),
    "no backend of nanobind": (
        RUN,
        "    return [*dict.fromkeys(listed)",
        '    listed = [one for one in listed if "backend" not in one]\n    return [*dict.fromkeys(listed)',
    ),
    "what ONNX's own tests warn of": (
        "tests/test_onnx.py",
        '"ignore", module=',
        '"ignore", category=RuntimeWarning, module=',
    ),
    "memory for JAX alone": (RUN, '"XLA_PYTHON_CLIENT_PREALLOCATE": "false"', '"XLA": ""'),
    "results at the end": ("benchmarks/gpu.py", "        if self.path:\n", "        if False:\n"),
    "results where nothing is kept": (RUN, 'os.environ.get("OUT") or ', ""),
    "git must be there": ("benchmarks/gpu.py", "except OSError:", "except ZeroDivisionError:"),
    "all rivals are imported": ("benchmarks/gpu.py", "    status = 0\n", "    status = 0\n    import torch\n"),
    "plugins and warnings of others": (RUN, '"-W", "default", ', ""),
}


def python_3_12() -> str | None:
    """The path of a Python 3.12 that can make virtual environments."""
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12"))
    for path in (*pyenv, shutil.which("python3.12")):
        if path and subprocess.run([path, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return str(path)
    return None


def without_network() -> list[str] | None:
    """The words that keep a command from the network when they stand before it; None where there are none."""
    for words in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return None


class Machine:
    """The environment, and no program but those of the system; of these no git, no Python, and no compiler but where it
    `builds`: without CUDA, and for one instruction set."""

    def __init__(self, folder: Path, python: str, isolated: list[str], builds: bool) -> None:
        self.isolated = isolated
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES.split()], check=True)
        (site,) = (folder / "venv/lib").glob("python*/site-packages")
        for name, words in STAND_INS.items():
            (site / f"{name}.py").write_text(textwrap.dedent(NOTED) + textwrap.dedent(words))
        programs = folder / "bin"
        programs.mkdir()
        for path in Path("/usr/bin").iterdir():
            compiles = path.name in ("cc", "c++", "gcc", "g++", "clang", "clang++")
            if not path.name.startswith(("git", "python", "pip")) and (builds or not compiles):
                (programs / path.name).symlink_to(path)
        kept = {name: os.environ[name] for name in ("LANG", "CMAKE_BUILD_PARALLEL_LEVEL") if name in os.environ}
        own = {"NORMKIT_CUDA": "off", "CMAKE_ARGS": "-DNORMKIT_ISAS=sse4"} if builds else {}
        self.environment = {"PATH": f"{folder / 'venv/bin'}:{programs}", **own, **kept}

    def run(self, tree: Path, *command: object, **environment: object) -> subprocess.CompletedProcess:
        own = {**self.environment, **{name: str(value) for name, value in environment.items()}}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run([*self.isolated, *map(str, command)], cwd=tree, env=own, **pipes)


def checkout(to: Path) -> Path:
    """Makes a folder with the files that a checkout by git would have, but not git's own."""
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(list_files, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).exists(), names):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def expect(so: bool, what: str, output: str = "") -> None:
    if not so:
        raise SystemExit(f"{output}\nrehearsal: {what}")


def lines_of(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rehearse(machine: Machine, tree: Path, wheels: Path, folder: Path) -> None:
    """Runs all steps that need no GPU, then the first that touches one."""
    out, work, home = folder / "out", folder / "work", folder / "home"
    for made in (out, home):
        made.mkdir(parents=True)
    places = {"OUT": out, "HOME": home, "IMPORTS": folder / "imports"}
    command = ["bash", "benchmarks/gpu.sh", "--wheels", wheels, "--work", work, "--rehearse"]
    done = machine.run(tree, *command, **places)
    said = done.stdout
    steps = {line["step"]: line for line in lines_of(out / "steps.jsonl")}
    passed = {name for name, line in steps.items() if line["result"] == "passed"}
    missed = {name: (steps[name]["result"], steps[name]["told"]) if name in steps else None for name in PASSED - passed}
    expect(done.returncode == 0 and not missed, f"gpu.sh ended with {done.returncode}, and without {missed}", said)
    kept = list(out.rglob("*"))
    expect(0 < len(kept) <= 8, f"of eight files at most that are kept there are {len(kept)}", said)
    expect(all(p.is_file() and re.fullmatch(r"[\w.-]+", p.name) for p in kept), f"not all are files: {kept}")
    expect("1 passed" in steps["values"]["told"], f"of the tests of values: {steps['values']['told']}", said)
    rivals = {line["rival"] for line in lines_of(out / "results.jsonl")}
    expect(rivals == {"normkit", "cupy"}, f"times of {rivals}, expected normkit and cupy", said)
    expect("| % of a copy |" in (out / "table.md").read_text(), "there is no table", said)

    for name, arguments, preallocates in lines_of(folder / "imports"):
        of_torch = {"torch", "inductor", "cudnn", "liger", "quack"}
        wanted = {name, *(of_torch if name == "torch" else ())} & {*arguments}
        expect(name == "cupy" or "gpu.py" not in arguments[0] or bool(wanted), f"{name} is imported by {arguments}")
        expect(preallocates == "false", f"JAX would take most of the memory in {arguments}")

    site = {**places, "PYTHONPATH": work / "site", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = machine.run(tree, "python3", "-m", "pytest", "-q", "-p", "no:benchmark", "tests/test_onnx.py", **site)
    expect(done.returncode == 0, "the tests of ONNX failed, with warnings as errors", done.stdout)

    device = "cudaErrorNoDevice: no CUDA-capable device is detected"
    done = machine.run(tree, "python3", "tests/gpu_check.py", "--out", folder / "check.jsonl", **site)
    calls = lines_of(folder / "check.jsonl")
    expect(bool(calls) and all(device in call["failed"] for call in calls), "calls failed otherwise", done.stdout)
    done = machine.run(tree, "python3", "benchmarks/gpu.py", "--rivals", "normkit", **site)
    expect(device in done.stdout.splitlines()[-1], "times failed otherwise", done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--build", action="store_true", help="build normkit there")
    parser.add_argument("--plants", action="store_true", help="see whether mistakes are seen")
    options = parser.parse_args()
    python, isolated = python_3_12(), without_network()
    if not python or not isolated:
        print(f"skipped: there is no {'namespace without a network' if python else 'Python 3.12'}")
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        machine, wheels = Machine(folder, python, isolated, options.build), folder / "wheels"
        pack = [ROOT / "benchmarks/gpu.sh", "pack", wheels, "--wheel", options.wheel.resolve()]
        subprocess.run(pack, check=True)
        size = sum(path.stat().st_size for path in wheels.iterdir())
        expect(size < 40e6, f"what is packed has {size / 1e6:.0f} MB, expected less than 40")
        if options.build:
            next(wheels.glob("normkit-*.whl")).unlink()
        rehearse(machine, checkout(folder / "tree"), wheels, folder / "run")
        print(f"rehearsed in {time.monotonic() - start:.0f} s", flush=True)
        for name, (path, words, others) in PLANTS.items() if options.plants else ():
            place = folder / name.replace(" ", "-")
            file = checkout(place / "tree") / path
            text = file.read_text()
            expect(text.count(words) == 1, f"{name}: {path} has no {words!r}")
            file.write_text(text.replace(words, others))
            try:
                rehearse(machine, place / "tree", wheels, place)
            except SystemExit as error:
                print(f"seen: {name}: {str(error).splitlines()[-1]}", flush=True)
            else:
                raise SystemExit(f"not seen: {name}")


if __name__ == "__main__":
    main()
