"""Importing normkit brings in NumPy and its own modules alone, and costs under 50 ms more than importing NumPy."""

import statistics
import subprocess
import sys
import time

OWN = {"normkit", "nanobind_backend"}
LIMIT_MS = 50
NEWCOMERS = """
import sys, numpy
before = set(sys.modules)
import normkit
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - {"numpy", *sys.stdlib_module_names})
"""


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout


def milliseconds(code: str) -> float:
    start = time.perf_counter()
    python(code)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    strangers = set(python(NEWCOMERS).split()) - OWN  # this run also fills the caches for those that are timed
    if strangers:
        sys.exit(f"import normkit also imports {', '.join(sorted(strangers))}")
    pairs = [(milliseconds("import numpy"), milliseconds("import normkit")) for _ in range(7)]
    extra = statistics.median(both - numpy for numpy, both in pairs)
    print(f"import normkit: {extra:+.1f} ms on top of NumPy's {statistics.median(n for n, _ in pairs):.1f} ms")
    if extra >= LIMIT_MS:
        sys.exit(f"the limit is {LIMIT_MS} ms")


if __name__ == "__main__":
    main()
