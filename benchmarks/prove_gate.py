"""Does the gate work? `python benchmarks/prove_gate.py`, on a machine with nothing else to do.

Builds HEAD twice, and a third time with one kernel 10 % slower. compare.py has to pass the two equal builds twenty
times in a row, and then to name the slow kernel, and no other.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from compare import build

TIMES = 20
CASES = "rows,planes,lanes,planes-backward"
SLOW = "lanes/1/default"

# Whatever the kernel waits for, it takes a tenth longer.
SLOWER = """
#include <chrono>
namespace {
template <class Kernel> void slower(const Kernel& kernel) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  kernel();
  const Clock::time_point end = Clock::now();
  while (Clock::now() < end + (end - start) / 10) {}
}
}  // namespace
"""
CALL = "lanes_forward<X, Y>(t, begin, end, scratch)"


def plant(source: Path) -> None:
    path = source / "cpp" / "src" / "kernels.cpp"
    text = path.read_text()
    if text.count(CALL) != 1:
        raise SystemExit(f"kernels.cpp has changed: expected {CALL} once")
    path.write_text(SLOWER + text.replace(CALL, f"slower([&] {{ {CALL}; }})"))


def compared(base: Path, head: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("compare.py")), str(base), str(head), "--cases", CASES]
    command += ["--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip", default="", help="options of pip install, such as --no-build-isolation")
    options = parser.parse_args().pip.split()
    one, two = build("HEAD", options), build("HEAD", options, "-again")
    slow = build("HEAD", options, "-slow", plant)
    passed = 0
    for k in range(TIMES):
        start = time.perf_counter()
        run = compared(one, two)
        passed += run.returncode == 0
        print(f"\n{k + 1} of {TIMES}, {time.perf_counter() - start:.0f} s\n{run.stdout or run.stderr}", flush=True)
    run = compared(one, slow)
    print(f"\n{SLOW} planted 10 % slower\n{run.stdout or run.stderr}")
    found = run.returncode == 1 and f"slower: {SLOW}\n" in run.stdout
    print(f"passed {passed} of {TIMES}; the planted slowdown was {'named' if found else 'MISSED'}")
    return not (passed == TIMES and found)


if __name__ == "__main__":
    sys.exit(main())
