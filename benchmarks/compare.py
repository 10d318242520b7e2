"""Two builds, each a commit or a folder with normkit in it: `python benchmarks/compare.py BASE HEAD`.

The gate for regressions. Fresh processes measure a few cases each, base and head by turns, every time as time / limit.
A pair of processes gives one ratio head / base for each case. Of `--pairs` such ratios the median is reported with a
confidence interval that assumes nothing about the noise: order statistics, by the binomial of a sign test, wide enough
for all cases together. A case has regressed if even the lower end is above 1 + MARGIN; then the exit status is 1.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from cases import Case
from limits import cache_folder

MARGIN = 0.02
MISTAKES = 0.05  # the share of runs on equal builds that may fail, were MARGIN 0: with it there are hardly any
CHUNK = 4  # cases of one process
SECONDS = 0.1  # for one case in one process
THIS = Path(__file__).resolve()

# One for every path through the kernels: along the run or across lanes, in registers, in the cache, beyond it, split.
CASES = {
    "registers": Case("instance", (32, 512, 7, 7)),
    "rows": Case("layer", (4096, 768)),
    "rms": Case("rms", (4096, 768)),
    "planes": Case("instance", (8, 64, 64, 64)),
    "beyond-cache": Case("instance", (1, 4, 1024, 1024)),
    "bfloat16": Case("instance", (8, 64, 64, 64), "bfloat16"),
    "float16": Case("layer", (4096, 768), "float16"),
    "lanes": Case("instance", (8, 64, 64, 64), channels_last=True),
    "group-lanes": Case("group", (4, 320, 32, 32), groups=32, channels_last=True),
    "batch": Case("batch", (16, 64, 56, 56)),
    "eval": Case("eval", (16, 64, 56, 56)),
    "registers-backward": Case("instance", (32, 512, 7, 7), direction="backward"),
    "rows-backward": Case("layer", (4096, 768), direction="backward"),
    "planes-backward": Case("instance", (8, 64, 64, 64), direction="backward"),
    "lanes-backward": Case("instance", (8, 64, 64, 64), channels_last=True, direction="backward"),
    "batch-backward": Case("batch", (16, 64, 56, 56), direction="backward"),
}


def confidence(pairs: int, cases: int) -> int:
    """How many of the sorted ratios to leave out at each end, so that the median lies between, in all cases at once.

    The k + 1 smallest of n are above the median with the probability that n coins show heads at most k times.
    """
    allowed, left_out, tail = MISTAKES / cases, -1, 0.0
    while (tail := tail + math.comb(pairs, left_out + 1) / 2**pairs) <= allowed:
        left_out += 1
    return left_out


def fewest_pairs(cases: int) -> int:
    return next(n for n in itertools.count(1) if confidence(n, cases) >= 0)


# ---- builds ------------------------------------------------------------------------------------------------------


def build(name: str, options: list[str]) -> Path:
    """The folder that holds normkit: `name` itself, or what pip made of the commit of that name, once."""
    if (Path(name) / "normkit").is_dir():
        return Path(name).resolve()
    git = ["git", "-C", str(THIS.parent)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], capture_output=True, text=True
    ).stdout.strip()
    if not commit:
        raise SystemExit(f"{name} is neither a commit nor a folder with normkit in it")
    folder = cache_folder() / "builds" / commit
    if not folder.exists():
        print(f"building {name} ({commit[:10]})", flush=True)
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True).stdout.strip()
            tree = subprocess.run(["git", "-C", top, "archive", commit], check=True, capture_output=True).stdout
            source, site = Path(temporary) / "source", Path(temporary) / "site"
            with tarfile.open(fileobj=BytesIO(tree)) as archive:
                archive.extractall(source, filter="data")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
            subprocess.run([*pip, *options, str(source)], check=True)
            site.rename(folder)
    return folder


# ---- one process -------------------------------------------------------------------------------------------------


def measured(names: list[str], threads: int, seconds: float) -> dict[str, float]:
    """Median of time / limit of each case, with the normkit that is imported here."""
    import rivals
    from paired import Pair, ratios
    from workload import Workload

    rival = rivals.Normkit()
    found = {}
    with rival.threads(threads):
        for name in names:
            found[name] = statistics.median(ratios(Pair(Workload(CASES[name]), rival, threads), seconds))
    return found


def child(site: Path, names: list[str], threads: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, str(THIS), "--child", str(site), *names]
    command += ["--threads", str(threads), "--seconds", str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"measuring {site} failed:\n{run.stderr}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def child_main(site: Path, names: list[str], threads: int, seconds: float) -> None:
    import normkit

    if not Path(normkit.__file__).is_relative_to(site):
        raise SystemExit(f"imported {normkit.__file__}, expected normkit in {site}")
    print(json.dumps(measured(names, threads, seconds)))


# ---- the comparison ----------------------------------------------------------------------------------------------


def chunks(names: list[str]) -> Iterator[list[str]]:
    return (names[k : k + CHUNK] for k in range(0, len(names), CHUNK))


def compare(base: Path, head: Path, names: list[str], pairs: int, threads: int, seconds: float) -> dict[str, list]:
    """For each case the ratios head / base, one for every pair of processes."""
    found = defaultdict(list)
    for pair in range(pairs):
        for part in chunks(names):
            order = (base, head) if pair % 2 == 0 else (head, base)
            by_build = [child(site, part, threads, seconds) for site in order]
            first, second = by_build if pair % 2 == 0 else reversed(by_build)
            for name in part:
                found[name].append(second[name] / first[name])
        print(f"\r{pair + 1} of {pairs} pairs", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return found


def report(found: dict[str, list[float]]) -> list[str]:
    """Prints a line for each case; returns the names of those that are slower beyond the noise."""
    width = max(map(len, found))
    slower = []
    for name, ratios in found.items():
        low, *_, high = sorted(ratios)[(out := confidence(len(ratios), len(found))) : len(ratios) - out]
        verdict = "SLOWER" if low > 1 + MARGIN else "faster" if high < 1 - MARGIN else ""
        print(f"{name:{width}}  {statistics.median(ratios):.3f}  [{low:.3f}, {high:.3f}]  {verdict}".rstrip())
        if verdict == "SLOWER":
            slower.append(name)
    return slower


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit, or a folder with normkit in it")
    parser.add_argument("head", help="the same")
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="of processes (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a case in one process (%(default)s)")
    parser.add_argument("--pip", default="", help="options of pip install, such as --no-build-isolation")
    options = parser.parse_args()
    names = options.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.pairs < (fewest := fewest_pairs(len(names))):
        parser.error(f"{options.pairs} pairs tell nothing about {len(names)} cases, expected at least {fewest}")
    base, head = (build(name, options.pip.split()) for name in (options.base, options.head))
    slower = report(compare(base, head, names, options.pairs, options.threads, options.seconds))
    print(f"slower: {', '.join(slower)}" if slower else f"no regression beyond {MARGIN:.0%} and the noise")
    return bool(slower)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child_parser = argparse.ArgumentParser()
        child_parser.add_argument("--child", type=Path)
        child_parser.add_argument("names", nargs="+")
        child_parser.add_argument("--threads", type=int)
        child_parser.add_argument("--seconds", type=float)
        given = child_parser.parse_args()
        child_main(given.child.resolve(), given.names, given.threads, given.seconds)
    else:
        sys.exit(main())
