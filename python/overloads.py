"""Writes the stub of a module of functions: what each returns depends on its options and on whose arrays x is.

    python overloads.py functional.py functional.pyi

A function that gives y comes in four for NumPy, four for other libraries, by `return_stats` and `return_residual`, and
one for options whose value is not known; one that gives gradients in two, since those that `need` leaves out are None.
"""

import ast
import copy
import sys
from pathlib import Path

RMS = ("rms_norm", "l2_normalize")  # y and one statistic; others have a mean too
ARRAYS = ("NDArray", "A")  # of NumPy, whose types say the dtype, which may change; and of any other library
HEAD = """\
from typing import Any, Literal, TypeVar, overload
from ._types import *

A = TypeVar("A", bound=SupportsDLPack)
"""


def arguments_of(function: ast.FunctionDef) -> dict[str, ast.arg]:
    return {a.arg: a for a in (*function.args.args, *function.args.kwonlyargs)}


def without_default(function: ast.FunctionDef, name: str) -> None:
    at = [a.arg for a in function.args.kwonlyargs].index(name)
    function.args.kw_defaults[at] = None


def overload(function: ast.FunctionDef, array: str | None, returns: str, **types: str | None) -> ast.FunctionDef:
    """`types`: those of options that have to be passed; None: of what is left out, or has its default."""
    made = copy.deepcopy(function)
    arguments = arguments_of(made)
    if array:
        arguments["content" if "content" in arguments else "x"].annotation = ast.Name(array)
    for name, kind in types.items():
        if kind is None:
            arguments[name].annotation = ast.parse("Literal[False]", mode="eval").body
        else:
            arguments[name].annotation = ast.parse(kind, mode="eval").body
            without_default(made, name)
    made.returns = ast.parse(returns, mode="eval").body
    made.decorator_list, made.body = [ast.Name("overload")], [ast.Expr(ast.Constant(...))]
    return made


def results(count: int, array: str) -> str:
    return array if count == 1 else f"tuple[{', '.join([array] * count)}]"


def forward(function: ast.FunctionDef) -> list[ast.FunctionDef]:
    arguments, made = arguments_of(function), []
    statistics = 1 if function.name in RMS else 2
    for array in ARRAYS:
        for residual in (None, "Literal[True]") if "return_residual" in arguments else (None,):
            for stats in (None, "Literal[True]"):
                types = {"return_stats": stats}
                if "return_residual" in arguments:
                    types["return_residual"] = residual
                if residual:
                    types["residual"] = "Array"
                count = 1 + statistics * bool(stats) + bool(residual)
                returns = results(count, array)
                if stats and "center" in arguments:  # without centering there is no mean
                    returns = f"tuple[{array}, ...]"
                    made.append(overload(function, array, results(count - 1, array), **types, center="Literal[False]"))
                    centered = overload(function, array, results(count, array), **types)
                    arguments_of(centered)["center"].annotation = ast.parse("Literal[True]", mode="eval").body
                    made.append(centered)
                made.append(overload(function, array, returns, **types))
    return [*made, overload(function, None, "Any", return_stats="Flag")]


def stub_of(function: ast.FunctionDef) -> list[ast.FunctionDef]:
    arguments = arguments_of(function)
    if "return_stats" in arguments:
        return forward(function)
    made = []
    for array in ARRAYS:
        if "need" in arguments:
            count = 2 if "content" in arguments else 3
            need = ast.unparse(arguments["need"].annotation or ast.Name("Any"))
            found = overload(function, array, results(count, array))
            at = [a.arg for a in found.args.kwonlyargs].index("need")
            del found.args.kwonlyargs[at], found.args.kw_defaults[at]
            made += [found, overload(function, array, "tuple[Any, ...]", need=need)]
        elif "ddx" in arguments:
            made.append(overload(function, array, f"tuple[{array}, {array}, Any]"))
        else:
            made.append(overload(function, array, array))
    return made


def stub(source: str) -> str:
    body: list[ast.stmt] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            body.append(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            body += stub_of(node)
    return f"{HEAD}\n{ast.unparse(ast.Module(body, type_ignores=[]))}\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(stub(Path(sys.argv[1]).read_text(encoding="utf-8")), encoding="utf-8")
