"""Docstrings in full: the parameters and errors that one leaves out are those of a function that describes them.

So each option is described once, and `help` and documentation tools show all of them for each function.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any


@cache
def _sections(doc: str) -> dict[str, str]:
    """By title; what stands before the first one has none."""
    parts = re.split(r"^(\w[\w ]*)\n-+\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@cache
def _entries(section: str) -> list[tuple[list[str], str, str]]:
    """Names, type and description of each: several that are alike share one."""
    found = []
    for entry in re.split(r"^(?=\S)", section, flags=re.MULTILINE):
        head, _, text = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        if names:
            found.append((names.split(", "), kind, text.rstrip()))
    return found


def _kind(function: Callable[..., Any], name: str) -> str:
    """The type of a parameter that has none in words, and its default."""
    defaults = {**(function.__kwdefaults__ or {})}
    kind = str(function.__annotations__[name])
    if name not in defaults:
        return kind
    return f"{kind}, optional" if defaults[name] is None else f"{kind}, default {defaults[name]!r}"


def completed(function: Callable[..., Any], others: Iterable[Callable[..., Any]]) -> str:
    """The docstring of a function, with what is left out as `others` have it, the first one that does."""
    code = function.__code__
    names = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    sections, chosen = _sections(function.__doc__ or ""), []
    left = set(names)
    for other in (function, *others):
        theirs = _sections(other.__doc__ or "")
        sections = theirs | sections
        for entry, kind, text in _entries(theirs.get("Parameters", "")):
            mine = [name for name in entry if name in left]
            if mine:
                chosen.append((mine, kind or _kind(function, mine[0]), text))
                left -= set(mine)
    chosen.sort(key=lambda entry: names.index(entry[0][0]))
    described = "\n".join(f"{', '.join(n)} : {kind}\n{text}" for n, kind, text in chosen)
    sections = sections | {"Parameters": described}
    parts = [f"{t}\n{'-' * len(t)}\n{sections[t].rstrip()}" for t in ("Parameters", "Returns", "Raises", "Examples")]
    return "\n\n".join([sections[""].rstrip(), *parts]) + "\n"


def complete(functions: dict[str, Callable[..., Any]]) -> None:
    """A forward is as `instance_norm` but for what it says, a backward as its backward, and all are as `normalize`."""
    plain = {name: inspect.unwrap(function) for name, function in functions.items()}
    if not plain["instance_norm"].__doc__:  # python -OO
        return
    made = {}
    for name, function in plain.items():
        forward, backward, double = (plain[f"instance_norm{kind}"] for kind in ("", "_backward", "_double_backward"))
        others = [forward, plain["normalize"]]
        if "backward" in name:
            others.insert(0, backward)
        if "double" in name:
            others.insert(0, double)
        made[name] = completed(function, others)
    for name, function in functions.items():
        function.__doc__ = plain[name].__doc__ = made[name]
