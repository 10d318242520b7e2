"""Tables and pictures of stored results: `python benchmarks/report.py results.json`, of `pytest --benchmark-json`.

Writes between the lines `<!-- benchmarks -->` and `<!-- /benchmarks -->` of two files: all tables into
docs/performance.md, the rows that HEADLINES names into README.md. Two pictures go into docs/: bars.png, time / limit of
each operation beside its rivals, and sizes.png, the share of the limit against size. `--store` keeps of the results
what all this is made from.

Results of gpu.py, stored or in the lines that it wrote (.jsonl), are printed as a table. Their pictures are
docs/gpu-bars.png, the share of a copy of the same bytes, and docs/gpu-sizes.png, that of every case against its bytes.
"""

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import rivals
from cases import Case

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = [rival.name for rival in rivals.RIVALS]
OURS, OURS_NEW = (rival.name for rival in (rivals.Normkit, rivals.NormkitNew))

HEADLINES = [
    "instance (16, 256, 32, 32)",
    "instance (8, 64, 128, 128)",
    "instance (8, 64, 128, 128) channels-last",
    "instance (8, 64, 128, 128) bfloat16",
    "instance (8, 64, 128, 128) crop",
    "instance (8, 3, 512, 512) channels-last uint8",
    "instance (8, 3, 512, 512) channels-last uint8 mirrored",
    "instance (1, 1, 256, 256, 256)",
    "instance (1, 1, 256, 256, 256) mask",
    "group (8, 320, 64, 64) G=32",
    "layer (4096, 768)",
    "rms (4096, 768)",
    "batch (32, 64, 112, 112)",
    "eval (32, 64, 112, 112)",
    "instance (8, 64, 128, 128) backward",
    "batch (32, 64, 112, 112) backward",
    "batch (32, 512, 7, 7) backward",
    "layer (4096, 768) backward",
]

# What bars.png calls an operation, how wide a bar is, and how many elements are the suite's own check, no case.
KINDS = {"batch": "batch, training", "eval": "batch, evaluation"}
BAR, SMALL = 0.11, 1 << 17
SMALL_ON_GPU = 1 << 22  # elements: what lies in the cache, and is over before the memory is at full speed

# Okabe and Ito's, which color-blind readers tell apart; ours is the warm one.
COLORS = ["#D55E00", "#F0A884", "#999999", "#E69F00", "#F0E442", "#009E73", "#000000", "#56B4E9", "#CC79A7", "#0072B2"]

Results = list[dict[str, Any]]


def load(paths: list[Path]) -> dict[str, Any]:
    """Results that `pytest --benchmark-json` or `--store` wrote: date, commit, command and benchmarks, each with its
    name and `extra_info`. The last of repeated runs counts."""
    whole: dict[str, Any] = {}
    found, commands, commits = {}, [], []
    for path in paths:
        read = of_lines(lines_of(path)) if path.suffix == ".jsonl" else json.loads(path.read_text())
        whole["date"] = read.get("date") or read["datetime"][:10]
        commits.append(read.get("commit") or read["commit_info"]["id"][:7])
        commands.append(read["command"])
        found |= {r["fullname"]: r for r in read["benchmarks"] if "ratio" in r["extra_info"]}
    whole["commit"] = ", then ".join(dict.fromkeys(commits))
    whole["command"] = ", then ".join(dict.fromkeys(commands))
    whole["benchmarks"] = [{key: r[key] for key in ("fullname", "name", "extra_info")} for r in found.values()]
    return whole


def lines_of(path: Path) -> Results:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_lines(lines: Results) -> dict[str, Any]:
    """The lines with figures that gpu.py wrote, as load() gives results."""
    measured = [line for line in lines if "ratio" in line]
    names = [f"gpu[{line['case']}-{line['rival']}]" for line in measured]
    return {
        "date": max((line["date"] for line in measured), default=""),
        "commit": ", then ".join(dict.fromkeys(line["commit"] for line in measured)),
        "command": "benchmarks/gpu.sh",
        "benchmarks": [
            {"fullname": f"gpu.py::{name}", "name": name, "extra_info": line}
            for name, line in zip(names, measured, strict=True)
        ],
    }


def store(whole: dict[str, Any], path: Path) -> None:
    """One line a run, four digits a number."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    runs = [{**r, "extra_info": {k: short(v) for k, v in r["extra_info"].items()}} for r in whole["benchmarks"]]
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in runs)
    head = json.dumps({**whole, "benchmarks": None})
    path.write_text(head.replace("null", f"[\n{lines}\n]") + "\n")


def names_in(results: Results) -> list[str]:
    present = {r["rival"] for r in results}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def title(r: dict[str, Any]) -> str:
    """The name of a case, but for its direction."""
    words = [r["operation"], f"({', '.join(map(str, r['shape']))})"]
    words += [f"G={r['groups']}"] * bool(r["groups"]) + ["channels-last"] * r["channels_last"]
    words += [r["dtype"]] * (r["dtype"] != "float32") + [r.get("option", "")] * bool(r.get("option"))
    return " ".join(words)


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
    ratio = f"{r['ratio']:.2f}" if r["ratio"] < 9.95 else f"{r['ratio']:.0f}"
    return f"{bold(ratio, fastest)} ({digit(r['error'])})"


def digit(error: float) -> str:
    if math.isinf(error):
        return "nan"
    mantissa, exponent = f"{error:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def source(whole: dict[str, Any], results: Results) -> str:
    """A line that says where the figures are from."""
    first = results[0]
    versions = ", ".join(sorted({r["version"] for r in results}))
    return (
        f"`{whole['command']}`, {whole['date']}, commit {whole['commit']}, {first['processor']}, {first['isa']}; "
        f"{versions}. Limit: {first['limit']}."
    )


def worst(results: Results, key: str) -> float:
    return max((r[key] for r in results), default=math.nan)


def accuracy(results: Results) -> list[str]:
    """The largest error of each rival over the float32 cases of an operation, near zero and far from it."""
    known = [r for r in results if r.get("error_far") is not None and r["rival"] != OURS_NEW]
    names = names_in(known)
    lines = [f"| mean of x 0 / 10⁴ | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in dict.fromkeys((r["operation"], r["direction"]) for r in known):
        row = [[r for r in known if (r["operation"], r["direction"], r["rival"]) == (*kind, name)] for name in names]
        cells = [f"{digit(worst(c, 'error'))} / {digit(worst(c, 'error_far'))}" if c else "-" for c in row]
        lines.append(f"| {' '.join(kind)} | {' | '.join(cells)} |")
    return lines if known else []


def headlines(results: Results) -> list[str]:
    """One thread, ours and the best of the others: the fastest, and the closest to the truth far from zero."""
    lines = [
        "| one thread | normkit | the fastest rival | normkit, mean 10⁴ | the closest rival, mean 10⁴ |",
        "|---|---|---|---|---|",
    ]
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in results:
        if r["threads"] == 1 and r["rival"] != OURS_NEW:
            rows[title(r) + " backward" * (r["direction"] == "backward")][r["rival"]] = r
    for name in HEADLINES:
        ours, others = rows[name].get(OURS), [r for r in rows[name].values() if r["rival"] != OURS]
        if not ours or not others:
            continue
        fastest = min(others, key=lambda r: r["ratio"])
        cells = [cell(ours, False), f"{cell(fastest, False)} {fastest['rival']}", "-", "-"]
        if ours.get("error_far") is not None:
            closest = min((r for r in others if r.get("error_far") is not None), key=lambda r: r["error_far"])
            cells[2:] = digit(ours["error_far"]), f"{digit(closest['error_far'])} {closest['rival']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def tables(results: Results) -> str:
    """Tables for each number of threads, forward, then backward; then a table of the errors."""
    text = []
    for threads in sorted({r["threads"] for r in results}):
        text += [f"Time / limit, and in brackets the largest error, threads: {threads}", ""]
        for direction in ("forward", "backward"):
            part = [r for r in results if r["threads"] == threads and r["direction"] == direction]
            text += [*table(part), ""] if part else []
    if errors := accuracy(results):
        text += ["The largest error over the float32 cases, near zero and far from it", "", *errors, ""]
    return "\n".join(text)


def gpu(whole: dict[str, Any], results: Results) -> str:
    """The table of gpu.py's results: one line for each case, bold where normkit reaches the goal, one column for each
    rival, bold where it is faster; the source above."""
    if not results:
        return "nothing was measured"
    rivals = [name for name in dict.fromkeys(r["rival"] for r in results) if name != OURS]
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in results:
        rows[f"{title(r)}{' backward' * (r['direction'] == 'backward')}"][r["rival"]] = r
    head = ["case", "% of a copy", "goal", "us", "us, plain", "error", "copy, GB/s", *(f"{n} / {OURS}" for n in rivals)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        any_of = next(iter(row.values()))
        cells, ours = ["-"] * len(head), row.get(OURS)
        cells[0], cells[2] = name, f"{100 * any_of['goal']:.0f}"
        cells[6] = f"{statistics.median(r['limit_gb_per_s'] for r in row.values()):.0f}"
        if ours:
            cells[1] = bold(f"{100 / ours['ratio']:.0f}", 1 / ours["ratio"] >= ours["goal"])
            cells[3], cells[4], cells[5] = f"{ours['us']:.3g}", f"{ours['us_plain']:.3g}", digit(ours["error"])
            for k, rival in enumerate(rivals, 7):
                if r := row.get(rival):
                    cells[k] = bold(f"{r['ratio'] / ours['ratio']:.2f}", r["ratio"] < ours["ratio"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([source(whole, results), "", *lines])


def bold(text: str, so: bool) -> str:
    return f"**{text}**" if so else text


def write(path: Path, content: str) -> None:
    """Writes text between the markers of a page."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}")
    path.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{content}\n{END}", text, flags=re.DOTALL))


# ---- pictures ----------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def color(name: str, order: list[str]) -> str:
    return COLORS[order.index(name) % len(COLORS)]


def caption(whole: dict[str, Any], results: Results) -> str:
    return f"{results[0]['processor']}, {results[0]['isa']}, {whole['date']}, commit {whole['commit']}"


class Unit(NamedTuple):
    """What bars show: `of` a ratio, and what stands where the ratio is 1, the speed of memory."""

    of: Callable[[float], float]
    foot: float
    ticks: tuple[int, ...]
    axis: dict[str, Any]
    label: str


TIME = Unit(
    lambda ratio: ratio, 1, (1, 2, 5, 10, 20), {"yscale": "log", "ylim": (0.9, 50)},
    "time / limit, one thread, float32: 1 is the speed of memory, lower is better",
)  # fmt: skip
SHARE = Unit(
    lambda ratio: 100 / ratio, 0, (0, 20, 40, 60, 80, 100), {"ylim": (0, None)},
    "% of the speed of a copy of the same bytes: higher is better",
)  # fmt: skip


def bar_group(panel: Any, x: float, heights: dict[str, float], unit: Unit, order: list[str]) -> None:
    """Bars with their figures."""
    for i, (name, height) in enumerate(heights.items()):
        at = x + (i - (len(heights) - 1) / 2) * BAR
        shade = color(name, order)
        panel.bar(at, height - unit.foot, BAR, bottom=unit.foot, color=shade, edgecolor="white", linewidth=0.5)
        told = f"{height:.1f}" if height < 9.95 else f"{height:.0f}"
        style = {"ha": "center", "fontsize": 7, "weight": "bold" if name == OURS else "normal"}
        panel.annotate(told, (at, max(height, unit.foot)), (0, 2), textcoords="offset points", **style)


def bars(whole: dict[str, Any], results: Results, path: Path, unit: Unit, order: list[str]) -> None:
    """Geometric means over the cases of each `group`; a rival that cannot do all of them has no bar."""
    import matplotlib.pyplot as plt

    if not results:
        return
    present = {r["rival"] for r in results}
    names = [name for name in order if name in present]
    figure, panels = plt.subplots(3, 1, figsize=(11, 9), layout="constrained", sharey=True)
    kinds = (("forward", False), ("forward", True), ("backward", False))
    for panel, (direction, last) in zip(panels, kinds, strict=True):
        groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in results:
            if (r["direction"], r["channels_last"]) == (direction, last):
                groups[r["group"]][r["rival"]].append(unit.of(r["ratio"]))
        for x, group in enumerate(groups.values()):
            complete = [n for n in names if len(group[n]) == max(map(len, group.values()))]
            bar_group(panel, x, {name: geometric_mean(group[name]) for name in complete}, unit, order)
        panel.axhline(unit.of(1), color="black", linewidth=1)
        panel.set(**unit.axis, title=direction + ", channels-last" * last, xlim=(-0.5, max(len(groups), 1) - 0.5))
        panel.set_xticks(range(len(groups)), list(groups))
        panel.set_yticks(unit.ticks, list(map(str, unit.ticks)))
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.5)
        panel.set_axisbelow(True)
        panel.minorticks_off()
        panel.tick_params(axis="x", length=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supylabel(unit.label)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color(name, order)) for name in names]
    columns = -(-len(names) // (1 + len(names) // 8))  # one row of nine is wider than the picture
    figure.legend(handles, names, ncols=columns, loc="outside upper center", frameon=False)
    figure.supxlabel(caption(whole, results), fontsize=8, color="#555555")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bars_of_cpu(whole: dict[str, Any], results: Results, path: Path) -> None:
    """The float32 cases at one thread."""
    shown = [r for r in results if (r["threads"], r["dtype"], r.get("option", "")) == (1, "float32", "")]
    shown = [r for r in shown if r["rival"] != OURS_NEW and math.prod(r["shape"]) > SMALL]
    grouped = [{**r, "group": KINDS.get(r["operation"], r["operation"])} for r in shown]
    bars(whole, grouped, path, TIME, ORDER)


def order_on_gpu(results: Results) -> list[str]:
    """The rivals as they come, but ours first, so that ours have the colors of the CPU's picture."""
    return list(dict.fromkeys([OURS, OURS_NEW, *(r["rival"] for r in results)]))


def bars_of_gpu(whole: dict[str, Any], results: Results, path: Path) -> None:
    shown = [r for r in results if not r["option"]]
    small = [", small" * (math.prod(r["shape"]) < SMALL_ON_GPU) for r in shown]
    grouped = [{**r, "group": r["operation"] + word} for r, word in zip(shown, small, strict=True)]
    bars(whole, grouped, path, SHARE, order_on_gpu(results))


class Panel(NamedTuple):
    title: str
    results: Results
    lines: bool


def sizes(whole: dict[str, Any], panels: list[Panel], path: Path, order: list[str], words: str) -> None:
    """The share of the limit, limit / time, against the bytes that are moved."""
    import matplotlib.pyplot as plt

    panels = [panel for panel in panels if panel.results]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4), layout="constrained", sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in order:
            points = sorted((moved_bytes(r), 1 / r["ratio"]) for r in panel.results if r["rival"] == name)
            style = {"marker": "o", "markersize": 4, "linestyle": "-" if panel.lines else "", "label": name}
            if points:
                axis.plot(*zip(*points, strict=True), color=color(name, order), **style)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", ylim=(0, None), xlabel="bytes that are moved", title=panel.title)
        axis.set_xticks([2**10, 2**15, 2**20, 2**25, 2**30], ["1 KB", "32 KB", "1 MB", "32 MB", "1 GB"])
        axis.minorticks_off()
        axis.grid(color="#DDDDDD", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of the speed of memory")
    axes[0][0].legend(frameon=False)
    figure.supxlabel(f"{words}; {caption(whole, panels[0].results)}", fontsize=8, color="#555555")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def moved_bytes(r: dict[str, Any]) -> int:
    return Case(r["operation"], r["shape"], r["dtype"], direction=r["direction"], option=r["option"]).moved_bytes


def sizes_of_cpu(whole: dict[str, Any], results: Results, path: Path) -> None:
    panels = [
        Panel(
            "one thread" if threads == 1 else f"{threads} threads",
            [r for r in results if r["threads"] == threads],
            True,
        )
        for threads in sorted({r["threads"] for r in results})
    ]
    sizes(whole, panels, path, ORDER, "instance norm of 64 instances, float32")


def sizes_of_gpu(whole: dict[str, Any], results: Results, path: Path) -> None:
    """Every case is a point."""
    panels = [
        Panel(direction, [r for r in results if r["direction"] == direction and not r["option"]], False)
        for direction in ("forward", "backward")
    ]
    sizes(whole, panels, path, order_on_gpu(results), "every case of every operation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of pytest --benchmark-json, or stored")
    parser.add_argument("--store", type=Path, help="write the results there, shortened")
    parser.add_argument("--root", type=Path, default=ROOT, help="of README.md and docs (%(default)s)")
    options = parser.parse_args()
    whole = load(options.results)
    if options.store:
        store(whole, options.store)
    results = [{**r["extra_info"], "function": r["name"].split("[")[0]} for r in whole["benchmarks"]]
    sweep = [r for r in results if r["function"] == "bench_sizes"]
    of_gpu = [r for r in results if r["function"] == "gpu"]
    cases = [r for r in results if r["function"] not in ("bench_sizes", "gpu")]
    docs = options.root / "docs"
    docs.mkdir(exist_ok=True)
    if of_gpu:
        print(gpu(whole, of_gpu))
        bars_of_gpu(whole, of_gpu, docs / "gpu-bars.png")
        sizes_of_gpu(whole, of_gpu, docs / "gpu-sizes.png")
    if cases:
        told = source(whole, cases)
        write(docs / "performance.md", f"{told}\n\n{tables(cases)}")
        write(options.root / "README.md", "\n".join([*headlines(cases), "", told]))
        bars_of_cpu(whole, cases, docs / "bars.png")
    sizes_of_cpu(whole, sweep, docs / "sizes.png")


if __name__ == "__main__":
    main()
