"""Checks what nvcc made of the kernels in a build folder that has compile_commands.json: whole vectors at a time.

Spills and local memory are errors of the build itself. Every kernel that walks elements must load 16 bytes at once,
and store as many where it writes elements; the plain forward must have several loads on their way.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST_LOADS = {"RunsForward": 4, "LanesForward": 1, "RunsBackward": 2, "LanesBackward": 2, "RowGradients": 2}
READS_ONLY = {"RowGradients"}


def ptx_of(command: str, folder: str) -> str:
    words = shlex.split(command)
    words[words.index("-c")] = "-ptx"
    with tempfile.TemporaryDirectory() as there:
        out = Path(there) / "kernels.ptx"
        words[words.index("-o") + 1] = str(out)
        subprocess.run(words, cwd=folder, check=True, timeout=120)
        return out.read_text()


def problems(ptx: str) -> list[str]:
    found = []
    seen = set()
    for entry, body in re.findall(r"\.entry (\w+)\((.*?)^}", ptx, re.MULTILINE | re.DOTALL):
        name = re.search("|".join(LEAST_LOADS), entry)
        if not name:
            continue
        seen.add(name[0])
        loads, stores = (len(re.findall(rf"\b{word}\.global(?:\.wb)?\.v4\.\w*32\b", body)) for word in ("ld", "st"))
        if loads < LEAST_LOADS[name[0]]:
            found.append(f"{entry} has {loads} loads of 16 bytes, expected {LEAST_LOADS[name[0]]} or more")
        if stores == 0 and name[0] not in READS_ONLY:
            found.append(f"{entry} has no store of 16 bytes")
    return found + [f"no kernel is called {name}" for name in LEAST_LOADS.keys() - seen]


def main(build: Path) -> int:
    commands = json.loads((build / "compile_commands.json").read_text())
    wanted = [c for c in commands if re.search(r"normkit_cuda_float(32|16)\.dir", c["command"])]
    found = [line for c in wanted for line in problems(ptx_of(c["command"], c["directory"]))]
    print(*found, f"kernels of {len(wanted)} storage types checked", sep="\n")
    return bool(found) or len(wanted) != 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
