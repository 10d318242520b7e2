"""A user's scripts: the one with mistakes is refused line by line, and the other one runs."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "typed"
HEAD, MISTAKES = (SCRIPTS / "mistakes.py").read_text(encoding="utf-8").split("\n\nnk.", 1)


@pytest.mark.parametrize("line", ("nk." + MISTAKES).splitlines())
def test_every_mistake_is_refused(line):
    names: dict = {}
    exec(HEAD, names)
    with pytest.raises((TypeError, ValueError)):
        exec(line, names)


def test_what_is_right_runs():
    script = (SCRIPTS / "uses.py").read_text(encoding="utf-8").partition("\ntensor = Tensor()")[0]
    exec(compile(script, "uses.py", "exec"), {"__name__": "uses"})
