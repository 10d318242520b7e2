"""Tables and pictures of stored results: `python benchmarks/report.py results.json`, of `pytest --benchmark-json`.

Writes the tables between the lines `<!-- benchmarks -->` and `<!-- /benchmarks -->` of docs/performance.md, and two
pictures into docs/: bars.png, time / limit of each operation beside its rivals, and sizes.png, the share of the limit
against size.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import rivals

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = [rival.name for rival in rivals.RIVALS]

Results = list[dict[str, Any]]


def load(paths: list[Path]) -> Results:
    """What `extra_info` holds, and which function it is of. Of repeated runs the last counts."""
    found = {}
    for path in paths:
        for result in json.loads(path.read_text())["benchmarks"]:
            if "ratio" in result["extra_info"]:
                found[result["fullname"]] = {**result["extra_info"], "function": result["name"].split("[")[0]}
    return list(found.values())


def names_in(results: Results) -> list[str]:
    present = {r["rival"] for r in results}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def title(r: dict[str, Any]) -> str:
    words = [r["operation"], f"({', '.join(map(str, r['shape']))})"]
    words += [f"G={r['groups']}"] * bool(r["groups"]) + ["channels-last"] * r["channels_last"]
    return " ".join([*words, *([r["dtype"]] if r["dtype"] != "float32" else [])])


# ---- tables ------------------------------------------------------------------------------------------------------


def table(results: Results) -> list[str]:
    """One line for each case, one column for each rival; the fastest is bold."""
    names = names_in(results)
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in results:
        rows[title(r)][r["rival"]] = r
    lines = [f"| {results[0]['direction']} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        fastest = min(r["ratio"] for r in row.values())
        cells = [cell(row[n], row[n]["ratio"] == fastest) if n in row else "-" for n in names]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def cell(r: dict[str, Any], fastest: bool) -> str:
    ratio = f"{r['ratio']:.2f}" if r["ratio"] < 10 else f"{r['ratio']:.0f}"
    mantissa, exponent = f"{r['error']:.0e}".split("e")
    return f"{f'**{ratio}**' if fastest else ratio} ({mantissa}e{int(exponent)})"


def tables(results: Results) -> str:
    """For each number of threads: forward, then backward."""
    first = results[0]
    versions = sorted({r["version"] for r in results})
    text = [f"{first['processor']}, {first['isa']}; {', '.join(versions)}. Limit: {first['limit']}.", ""]
    for threads in sorted({r["threads"] for r in results}):
        text += [f"Time / limit, and in brackets the largest error, threads: {threads}", ""]
        for direction in ("forward", "backward"):
            part = [r for r in results if r["threads"] == threads and r["direction"] == direction]
            text += [*table(part), ""] if part else []
    return "\n".join(text)


def between_markers(text: str, content: str) -> str:
    if BEGIN not in text or END not in text:
        raise SystemExit(f"the file lacks the lines {BEGIN} and {END}")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{content}\n{END}", text, flags=re.DOTALL)


# ---- pictures ----------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def bars(results: Results, path: Path) -> None:
    """Geometric means over the float32 cases of each operation; a rival that cannot do all of them has no bar."""
    import matplotlib.pyplot as plt

    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in sorted(results, key=lambda r: r["direction"] == "backward"):
        if r["threads"] == 1 and r["dtype"] == "float32":
            layout = "\nchannels-last" if r["channels_last"] else ""
            groups[f"{r['operation']}\n{r['direction']}{layout}"][r["rival"]][title(r)] = r["ratio"]
    if not groups:
        return
    names = names_in(results)
    figure, axes = plt.subplots(figsize=(1.4 * len(groups) + 2, 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = {
            x: geometric_mean(list(group[name].values()))
            for x, group in enumerate(groups.values())
            if len(group[name]) == max(map(len, group.values()))
        }
        axes.bar([x + (i - (len(names) - 1) / 2) * width for x in heights], heights.values(), width, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(yscale="log", ylim=(0.8, None), ylabel="time / limit, one thread (1 is the speed of memory)")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sizes(results: Results, path: Path) -> None:
    """The share of the limit, limit / time, against the bytes that are moved."""
    import matplotlib.pyplot as plt

    if not results:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    most = max(r["threads"] for r in results)
    for i, name in enumerate(names_in(results)):
        for threads in sorted({r["threads"] for r in results}):
            line = [r for r in results if (r["rival"], r["threads"]) == (name, threads)]
            points = sorted((2 * 4 * math.prod(r["shape"]), 1 / r["ratio"]) for r in line)
            style = "--" if threads == most > 1 else "-"
            label = f"{name}, threads: {threads}"
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=".", color=f"C{i}", label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", ylim=(0, None), xlabel="bytes of x and y", ylabel="share of the limit")
    axes.set_title("instance norm, float32")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of pytest --benchmark-json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="(%(default)s)")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="(%(default)s)")
    options = parser.parse_args()
    results = load(options.results)
    sweep = [r for r in results if r["function"] == "bench_sizes"]
    cases = [r for r in results if r["function"] != "bench_sizes"]
    if cases:
        options.page.write_text(between_markers(options.page.read_text(), tables(cases)))
        bars(cases, options.pictures / "bars.png")
    sizes(sweep, options.pictures / "sizes.png")


if __name__ == "__main__":
    main()
