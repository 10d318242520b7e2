"""What type checkers say of a user's scripts: nothing of uses.py, and of mistakes.py each line marked `found`."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "tests" / "typed"


def by_mypy(script: str) -> set[int]:
    command = [sys.executable, "-m", "mypy", "--strict", "--output=json", "--config-file=", script]
    out = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS)
    found = [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]
    return {f["line"] for f in found if f["severity"] == "error"}


def by_pyright(script: str) -> set[int]:
    """The engine of pyright, in a package that brings what it runs on."""
    command = ["basedpyright", "--outputjson", "--pythonpath", sys.executable, script]
    out = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS)
    found = json.loads(out.stdout)["generalDiagnostics"]
    return {f["range"]["start"]["line"] + 1 for f in found if f["severity"] == "error"}


for script in ("uses.py", "mistakes.py"):
    lines = (SCRIPTS / script).read_text(encoding="utf-8").splitlines()
    expected = {k for k, line in enumerate(lines, 1) if line.endswith("# found")}
    for checker in (by_mypy, by_pyright):
        if (found := checker(script)) != expected:
            sys.exit(f"{checker.__name__}: {script} has errors in lines {sorted(found)}, expected {sorted(expected)}")
        print(f"{checker.__name__}: {script} has errors in {len(found)} lines, as expected")
