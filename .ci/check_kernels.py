"""Checks what nvcc made of the kernels in a build folder that has compile_commands.json: whole vectors at a time.

Spills and local memory are errors of the build itself. Every kernel that walks elements must copy 16 bytes at once to
shared memory, past the registers, and store as many where it writes elements.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST_LOADS = {"RunsForward": 1, "LanesForward": 1, "RunsBackward": 1, "LanesBackward": 2, "RowGradients": 2}
COPY = r"\bcp\.async\.cg\.shared\.global[\w:.]* \[\S+\], \[\S+\], 16;"
LOAD, STORE = (rf"\b{word}\.global(?:\.\w+)?\.v4\.\w*32\b" for word in ("ld", "st"))
READS_ONLY = {"RowGradients"}


def ptx_of(command: str, folder: str) -> str:
    words = [word for word in shlex.split(command) if not word.startswith("--generate-code")]
    words[words.index("-c")] = "-ptx"
    words.append("-arch=compute_90")
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
        copies, loads, stores = (len(re.findall(pattern, body)) for pattern in (COPY, LOAD, STORE))
        loads = loads if name[0] in READS_ONLY else copies
        if loads < LEAST_LOADS[name[0]]:
            found.append(f"{entry} reads 16 bytes at {loads} places, expected {LEAST_LOADS[name[0]]} or more")
        if stores == 0 and name[0] not in READS_ONLY:
            found.append(f"{entry} has no store of 16 bytes")
    return found + [f"no kernel is called {name}" for name in LEAST_LOADS.keys() - seen]


def main(build: Path) -> int:
    commands = json.loads((build / "compile_commands.json").read_text())
    (command,) = (c for c in commands if "normkit_cuda_kernels.dir" in c["command"])
    found = problems(ptx_of(command["command"], command["directory"]))
    print(*found, "kernels checked", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
