"""Draws the figures of the README and of the pages.

    python docs/figures.py [--folder docs/figures]

They have no background, and colors that are legible on white and on black.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import normkit as nk
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage import data
from skimage.transform import resize

BLUE, ORANGE, GREEN, GRAY = "#3f8fd2", "#e07b39", "#3fa66b", "#7a828c"
mpl.rcParams.update(
    {f"{part}.color": GRAY for part in ("text", "xtick", "ytick")}
    | {"axes.edgecolor": GRAY, "axes.labelcolor": GRAY, "axes.titlecolor": GRAY, "legend.labelcolor": GRAY}
    | {"savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "normkit", "font.size": 10}
)
LIGHTS = {  # name: contrast and brightness of red, green and blue
    "as taken": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "at dusk": ((0.85, 0.5, 0.35), (0.08, 0.02, 0.04)),
    "in fog": ((0.3, 0.3, 0.3), (0.55, 0.57, 0.6)),
    "by the moon": ((0.2, 0.27, 0.42), (0.0, 0.02, 0.08)),
}


def photograph(name: str, height: int = 180, width: int = 240) -> np.ndarray:
    """(height, width, 3), 0 to 1: the middle of a photograph of scikit-image."""
    x = getattr(data, name)()
    rows, columns = x.shape[0], min(x.shape[1], x.shape[0] * width // height)
    rows = min(rows, columns * height // width)
    top, left = (x.shape[0] - rows) // 2, (x.shape[1] - columns) // 2
    return resize(x[top : top + rows, left : left + columns], (height, width), anti_aliasing=True).astype(np.float32)


def lit(x: np.ndarray, light: str) -> np.ndarray:
    contrast, brightness = np.float32(LIGHTS[light])
    return contrast * x + brightness


def show(axes: Axes, picture: np.ndarray, title: str = "", edge: str | None = None) -> None:
    axes.imshow(picture.clip(0, 1), interpolation="antialiased")
    axes.set(xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set(visible=edge is not None, color=edge, linewidth=3)


def lights() -> Figure:
    """One photograph in four lights, and after instance norm."""
    x = np.stack([lit(photograph("chelsea"), light) for light in LIGHTS])
    weight, bias = x[0].std((0, 1)), x[0].mean((0, 1))  # for all four: so that the screen shows them
    y = nk.instance_norm(x, weight, bias, channel_axis=-1, eps=0.0)
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    grid = figure.subplots(2, len(LIGHTS))
    for k, light in enumerate(LIGHTS):
        show(grid[0, k], x[k], light)
        show(grid[1, k], y[k])
    grid[0, 0].set_ylabel("before")
    grid[1, 0].set_ylabel("after")
    return figure


def drawing(lines: list[tuple[str, object, object]]) -> np.ndarray:
    """Crayon on white paper, (120, 150, 3): lines of a color through points of 0 to 10."""
    figure = Figure(figsize=(1.5, 1.2), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(0, 8))
    with mpl.rc_context({"path.sketch": (0.9, 60, 8)}):
        for color, x, y in lines:
            axes.plot(x, y, color=color, linewidth=3.2, solid_capstyle="round")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255


def circle(x: float, y: float, radius: float, start: float = 0.0, end: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    angle = np.pi * np.linspace(start, end, 40)
    return x + radius * np.cos(angle), y + radius * np.sin(angle)


def drawings() -> np.ndarray:
    """(4, 120, 150, 3): a house, a boat, a flower and a cat."""
    house = [
        ("#c33d2e", [2, 2, 6.5, 6.5, 2], [1, 4, 4, 1, 1]), ("#7a4a21", [1.5, 4.2, 7, 1.5], [4, 6.5, 4, 4]),
        ("#2f62b5", [3.8, 3.8, 4.9, 4.9], [1, 2.7, 2.7, 1]), ("#e2a400", *circle(8.5, 6.6, 0.8)),
        ("#3f8a3a", [0.5, 9.5], [1, 1]),
    ]  # fmt: skip
    boat = [
        ("#7a4a21", [2, 8, 7, 3, 2], [3, 3, 1.6, 1.6, 3]), ("#444444", [5, 5], [3, 7]),
        ("#c33d2e", [5.2, 7.8, 5.2, 5.2], [3.6, 3.8, 6.8, 3.6]), ("#e2a400", [4.8, 3, 4.8, 4.8], [3.6, 3.8, 6, 3.6]),
        ("#2f62b5", np.linspace(0.5, 9.5, 60), 1.2 + 0.25 * np.sin(np.linspace(0, 18, 60))),
    ]  # fmt: skip
    petals = [("#b5439a", *circle(5 + 1.3 * np.cos(a), 5.3 + 1.3 * np.sin(a), 0.75)) for a in np.arange(6) * np.pi / 3]
    flower = [
        *petals, ("#e2a400", *circle(5, 5.3, 0.55)), ("#3f8a3a", [5, 5], [3.2, 0.6]),
        ("#3f8a3a", [5, 6.6, 5], [1.4, 2.4, 1.4]), ("#7a4a21", [2, 8], [0.6, 0.6]),
    ]  # fmt: skip
    cat = [
        ("#444444", *circle(5, 3.8, 2.6)), ("#444444", [2.9, 2.7, 4.1], [5.3, 7.5, 6.2]),
        ("#444444", [5.9, 7.3, 7.1], [6.2, 7.5, 5.3]), ("#3f8a3a", *circle(4, 4.4, 0.35)),
        ("#3f8a3a", *circle(6, 4.4, 0.35)), ("#c33d2e", *circle(5, 2.9, 0.7, 1.1, 1.9)),
        ("#7a4a21", [1.4, 3.6], [3.4, 3.3]), ("#7a4a21", [6.4, 8.6], [3.3, 3.4]),
    ]  # fmt: skip
    return np.stack([drawing(lines) for lines in (house, boat, flower, cat)])


def wall() -> Figure:
    """Drawings in the light of where they hang; all taken together, and each by itself."""
    paper = drawings()
    places = {
        "under a lamp": ((1.0, 0.93, 0.72), (0.0, 0.0, 0.0)), "in a dark corner": ((0.3, 0.3, 0.34), (0.0, 0.0, 0.0)),
        "behind dusty glass": ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5)), "behind blue glass": ((0.35, 0.5, 0.8), (0, 0, 0.1)),
    }  # fmt: skip
    contrast, brightness = (np.float32(part)[:, None, None] for part in zip(*places.values(), strict=True))
    x = contrast * paper + brightness
    weight, bias = paper.std((0, 1, 2)), paper.mean((0, 1, 2))
    rows = {
        "on the wall": x,
        "all measured\ntogether": nk.normalize(x, weight, bias, axis=(0, 1, 2)),
        "each measured\nby itself": nk.instance_norm(x, weight, bias, channel_axis=-1),
    }
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    grid = figure.subplots(len(rows), len(places))
    for axes_of_row, (row, pictures) in zip(grid, rows.items(), strict=True):
        for axes, place, picture in zip(axes_of_row, places, pictures, strict=True):
            show(axes, picture, place if row == "on the wall" else "", edge="#8a6a45")
        axes_of_row[0].set_ylabel(row)
    return figure


def shared() -> Figure:
    """Which elements share a mean and a deviation: three images of four channels of 3 x 3 pixels."""
    images, channels, pixels = 3, 4, 3
    members: dict[str, tuple[Callable[[int, int], bool], str]] = {
        "batch norm": (lambda n, c: c == 0, "one channel of all images"),
        "layer norm": (lambda n, c: n == 0, "one image"),
        "group norm": (lambda n, c: n == 0 and c < 2, "some channels of one image"),
        "instance norm": (lambda n, c: n == c == 0, "one channel of one image"),
    }
    figure = Figure(figsize=(8.4, 2.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    for axes, (title, (shares, words)) in zip(figure.subplots(1, 4), members.items(), strict=True):
        for n, c in np.ndindex(images, channels):
            y, x = np.indices((pixels, pixels))
            style = {"color": BLUE} if shares(n, c) else {"color": GRAY, "alpha": 0.3}
            x, y = c * (pixels + 0.8) + x, -n * (pixels + 0.8) - y
            axes.scatter(x, y, 42, marker="s", linewidth=0, **style)
        axes.set(aspect="equal", xticks=[], yticks=[], title=title)
        axes.set_xlabel(words)
        axes.spines[:].set_visible(False)
    return figure


def alone() -> Figure:
    """The same photograph in two batches."""
    cat, others = photograph("chelsea", 135, 180), {"bright": "coffee astronaut", "dark": "rocket hubble_deep_field"}
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    grid = figure.subplots(2, 5)
    results = []
    for axes, (kind, names) in zip(grid, others.items(), strict=True):
        neighbors = [photograph(name, 135, 180) for name in names.split()]
        batch = np.stack([cat, *neighbors])
        weight, bias = np.full(3, 0.2, np.float32), np.full(3, 0.5, np.float32)
        by_batch = nk.batch_norm(batch, weight, bias, training=True, channel_axis=-1)[0]
        by_instance = nk.instance_norm(batch, weight, bias, channel_axis=-1)[0]
        results.append(by_instance)
        titles = ("a photograph", "two others", "", "after batch norm", "after instance norm")
        for cell, picture, title in zip(axes, (*batch, by_batch, by_instance), titles, strict=True):
            show(cell, picture, title if kind == "bright" else "")
        axes[0].set_ylabel(f"among {kind}")
    assert np.array_equal(*results)
    return figure


def eps() -> Figure:
    """What is left of a channel, by its own deviation."""
    deviation = np.logspace(-6, 0, 200)
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    axes = figure.subplots()
    for value, words, color in ((1e-9, "1e-9", GREEN), (1e-5, "1e-5", BLUE), (1e-3, "1e-3", ORANGE)):
        axes.plot(deviation, deviation / np.sqrt(deviation**2 + value), color=color, label=words)
    axes.axvline(1 / 255 / np.sqrt(12), color=GRAY, linestyle=":", label="pixels of 8 bits, rounded")
    axes.set(xscale="log", xlabel="deviation of the channel", ylabel="deviation of its output", ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="eps", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def far() -> Figure:
    """The largest error of float32, by how far from zero x is; where a line ends, y is NaN."""
    rng = np.random.default_rng(0)
    means = np.logspace(0, 6, 13)
    worst: dict[str, list[float]] = {"E[x²] - E[x]²": [], "mean, then deviations": [], "normkit": []}
    for mean in means:
        x = (rng.standard_normal((1, 1, 128, 128)) + mean).astype(np.float32)
        exact = x.astype(np.float64)
        exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
        first, second = x.mean(), (x * x).mean()
        with np.errstate(all="ignore"):
            answers = (
                (x - first) / np.sqrt(second - first * first + np.float32(1e-5)),
                (x - first) / np.sqrt(x.var() + np.float32(1e-5)),
                nk.instance_norm(x),
            )
        for errors, y in zip(worst.values(), answers, strict=True):
            errors.append(float(np.abs(y - exact).max()))
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    axes = figure.subplots()
    for (name, errors), color in zip(worst.items(), (ORANGE, GREEN, BLUE), strict=True):
        axes.plot(means, errors, "o-", markersize=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="mean of x, whose deviation is 1", ylabel="largest error of y")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES = {lights: "webp", wall: "webp", shared: "svg", alone: "webp", eps: "svg", far: "svg"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "figures", help="(default: %(default)s)")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for draw, kind in FIGURES.items():
        options = {"pil_kwargs": {"quality": 82}} if kind == "webp" else {"metadata": {"Date": None}}
        draw().savefig(folder / f"{draw.__name__}.{kind}", dpi=110, **options)


if __name__ == "__main__":
    main()
