"""Two builds, each a commit or a folder with normkit in it: `python benchmarks/compare.py BASE HEAD`.

The gate for regressions. Fresh processes measure a few cases each, every time as time / limit; a pair of processes,
base and head in an order that a coin decides, gives one ratio head / base for each run: a case, a number of threads and
an instruction set, such as rows/2/avx2. What seems slower is measured once more, and only what is slower then, beyond
all noise, is named and makes the exit status 1: verdict.py says why.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO
from itertools import product
from pathlib import Path

from cases import VIEWS, Case
from limits import cache_folder
from verdict import LOOKS, MARGIN, MISTAKES, SHOWN, Ratios, Verdict, fewest_pairs, verdict

PAIRS, PAIRS_AGAIN = 10, 20
CHUNK = 4  # runs of one process
SECONDS = 0.1  # for one run in one process
DEFAULT_ISA = "default"  # what a build takes by itself on this machine, or NORMKIT_ISA
PADDING = 4096  # bytes of environment: a page, in which a stack begins anywhere
THIS = Path(__file__).resolve()

# One for every path through the kernels: along the run or across lanes, in registers, in the cache, beyond it, split;
# arrays as they are or gathered; with what else a call may bring.
PLANES = (8, 64, 64, 64)
CASES = {
    "registers": Case("instance", (32, 512, 7, 7)),
    "rows": Case("layer", (4096, 768)),
    "rms": Case("rms", (4096, 768)),
    "planes": Case("instance", PLANES),
    "beyond-cache": Case("instance", (1, 4, 1024, 1024)),
    "bfloat16": Case("instance", PLANES, "bfloat16"),
    "float16": Case("layer", (4096, 768), "float16"),
    "lanes": Case("instance", PLANES, channels_last=True),
    "group-lanes": Case("group", (4, 320, 32, 32), groups=32, channels_last=True),
    "batch": Case("batch", (16, 64, 56, 56)),
    "eval": Case("eval", (16, 64, 56, 56)),
    **{option: Case("instance", PLANES, option=option) for option in (*VIEWS, "mask", "residual")},
    "padding": Case("instance", (8, 64, 4096), option="where"),
    "two-channels": Case("instance", (8, 2, 256, 256), channels_last=True),
    "three-channels": Case("instance", (8, 3, 256, 256), channels_last=True),
    "bytes": Case("instance", (8, 3, 256, 256), "uint8", channels_last=True),
    "registers-backward": Case("instance", (32, 512, 7, 7), direction="backward"),
    "rows-backward": Case("layer", (4096, 768), direction="backward"),
    "long-rows-backward": Case("layer", (1024, 4096), direction="backward"),
    "rms-backward": Case("rms", (4096, 768), direction="backward"),
    "float16-backward": Case("layer", (4096, 768), "float16", direction="backward"),
    "bfloat16-backward": Case("instance", PLANES, "bfloat16", direction="backward"),
    "planes-backward": Case("instance", PLANES, direction="backward"),
    "lanes-backward": Case("instance", PLANES, channels_last=True, direction="backward"),
    "batch-backward": Case("batch", (16, 64, 56, 56), direction="backward"),
}


# ---- builds ------------------------------------------------------------------------------------------------------


def build(name: str, options: list[str], variant: str = "", change: Callable[[Path], None] | None = None) -> Path:
    """The folder that holds normkit: `name` itself, or what pip made of the commit of that name, once. A variant is
    another build of it, of sources that `change` has been at."""
    if (Path(name) / "normkit").is_dir():
        return Path(name).resolve()
    git = ["git", "-C", str(THIS.parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], capture_output=True, text=True
    ).stdout.strip()
    if not commit:
        raise SystemExit(f"{name} is neither a commit nor a folder with normkit in it")
    folder = cache_folder() / "builds" / f"{commit}{variant}"
    if not folder.exists():
        print(f"building {name}{variant} ({commit[:10]})", flush=True)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True).stdout.strip()
            tree = subprocess.run(["git", "-C", top, "archive", commit], check=True, capture_output=True).stdout
            source, site = Path(temporary) / "source", Path(temporary) / "site"
            with tarfile.open(fileobj=BytesIO(tree)) as archive:
                archive.extractall(source, filter="data")
            if change:
                change(source)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
            subprocess.run([*pip, *options, str(source)], env={"NORMKIT_CUDA": "off", **os.environ}, check=True)
            site.rename(folder)
    return folder


# ---- one process -------------------------------------------------------------------------------------------------


def measured(names: list[str], seconds: float) -> dict[str, float]:
    """Median of time / limit of each run, with the normkit that is imported here."""
    import normkit
    import rivals
    from paired import Pair, ratios
    from workload import Workload

    rival, workload = rivals.Normkit(), lru_cache(maxsize=1)(Workload)
    found = {}
    for name in names:
        case, threads, isa = name.split("/")
        with rival.threads(int(threads)), normkit.use_isa(normkit.isa() if isa == DEFAULT_ISA else isa):
            found[name] = statistics.median(ratios(Pair(workload(CASES[case]), rival, int(threads)), seconds))
    return found


def child(site: Path, names: list[str], seconds: float) -> dict[str, float]:
    """Measures in a process that nothing but the build itself tells from one of the other build.

    Where stack and heap lie depends on how long paths, arguments and environment are: one and the same file took 0.93
    of its time where its path was six characters longer (layer norm of (4096, 768), 125 rounds, Zen 5). So all builds
    have a path of one length, and an environment of random length makes noise of what is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "site"
        link.symlink_to(site, target_is_directory=True)
        command = [sys.executable, str(THIS), "--child", str(link), *names]
        command += ["--seconds", str(seconds)]
        padding = "x" * random.randrange(PADDING)
        environment = {**os.environ, "PYTHONPATH": str(link), "PADDING": padding}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"measuring {site} failed:\n{run.stderr}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def child_main(site: Path, names: list[str], seconds: float) -> None:
    import normkit

    if not Path(normkit.__file__).is_relative_to(site):
        raise SystemExit(f"imported {normkit.__file__}, expected normkit in {site}")
    print(json.dumps(measured(names, seconds)))


# ---- the comparison ----------------------------------------------------------------------------------------------


def chunks(names: list[str]) -> Iterator[list[str]]:
    return (names[k : k + CHUNK] for k in range(0, len(names), CHUNK))


def measure(base: Path, head: Path, names: list[str], pairs: int, seconds: float) -> Ratios:
    """For each run the ratios head / base, one for every pair of processes."""
    found = defaultdict(list)
    for pair in range(pairs):
        for part in chunks(names):
            builds = [("base", base), ("head", head)]
            random.shuffle(builds)
            times = {build: child(site, part, seconds) for build, site in builds}
            for name in part:
                found[name].append(times["head"][name] / times["base"][name])
        print(f"\r{pair + 1} of {pairs} pairs", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return found


def report(found: Verdict) -> None:
    """Prints a line for each run: the ratio, its interval, and what came of a suspect."""
    width = max(map(len, found.first))
    for name, interval in found.first.items():
        told = "faster" if interval.high < 1 - MARGIN else ""
        if again := found.again.get(name):
            told = f"again: {again}  {'SLOWER' if name in found.slower else 'noise'}"
        print(f"{name:{width}}  {interval}  {told}".rstrip())
    print(f"slower: {', '.join(found.slower)}" if found.slower else f"no regression beyond {MARGIN:.0%} and the noise")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, or a folder with normkit in it")
    parser.add_argument("head", help="the same")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas (%(default)s)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of processes (%(default)s)")
    parser.add_argument("--pairs-again", type=int, default=PAIRS_AGAIN, help="a look at suspects (%(default)s)")
    parser.add_argument("--threads", default="1,2", help="numbers, separated by commas (%(default)s)")
    parser.add_argument("--isas", default=DEFAULT_ISA, help="instruction sets, such as avx512,avx2 (%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a run in one process (%(default)s)")
    parser.add_argument("--pip", default="", help="options of pip install, such as --no-build-isolation")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    names = ["/".join(run) for run in product(cases, options.threads.split(","), options.isas.split(","))]
    for pairs, mistakes in ((options.pairs, SHOWN), (options.pairs_again, MISTAKES / LOOKS / len(names))):
        if pairs < (fewest := fewest_pairs(mistakes)):
            parser.error(f"{pairs} pairs tell nothing about {len(names)} runs, expected at least {fewest}")
    base, head = (build(name, options.pip.split()) for name in (options.base, options.head))
    found = verdict(
        names,
        lambda names, pairs: measure(base, head, names, pairs, options.seconds),
        options.pairs,
        options.pairs_again,
    )
    report(found)
    return bool(found.slower)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_parser = argparse.ArgumentParser()
        child_parser.add_argument("--child", type=Path)
        child_parser.add_argument("names", nargs="+")
        child_parser.add_argument("--seconds", type=float)
        given = child_parser.parse_args()
        child_main(given.child, given.names, given.seconds)
    else:
        sys.exit(main())
