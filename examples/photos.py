"""Photographs without their brightness and contrast
=================================================

Instance normalization takes brightness and contrast out of photographs.

To run it::

    pip install ".[examples]"
    python examples/photos.py [--output photos.png]

A change of brightness and contrast is x -> contrast * x + brightness. Instance norm undoes any such change, because it
measures each channel of each photograph alone. Batch norm measures a channel over the whole batch, so a photograph that
is darker than its neighbors stays darker.

.. image:: ../photos.jpg
   :alt: Four photographs, as taken and changed: after instance norm both look the same, after batch norm not
"""

import argparse
import statistics
import time
from collections.abc import Callable

import normkit as nk
import numpy as np
from matplotlib.figure import Figure
from skimage import data

# sphinx_gallery_thumbnail_path = 'photos.jpg'
PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket")  # they come with scikit-image
SIZE = 300, 400
CHANGES = {  # name: contrast, brightness
    "darker": (1.0, -0.4),
    "brighter": (1.0, 0.3),
    "flat": (0.25, 0.5),
    "harsh": (1.75, -0.4),
}
# No photograph is constant, so its variance needs no help from eps. The default, 1e-5, would leave a trace of a change
# in contrast, of about eps / variance.
EPS = 0.0


def cropped(photograph: np.ndarray) -> np.ndarray:
    (height, width, _), (rows, columns) = photograph.shape, SIZE
    top, left = (height - rows) // 8, (width - columns) // 2
    return photograph[top : top + rows, left : left + columns]


def numpy_instance_norm(x: np.ndarray) -> np.ndarray:
    mean, var = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
    return (x - mean) / np.sqrt(var + EPS)


def rounding_bound(original: np.ndarray, changed: np.ndarray, contrast: float) -> np.ndarray:
    """How far the rounding of `changed` to float32, and of the answers, can move one answer from the other.

    A changed pixel is rounded twice, by the product and by the sum: an error of d = u * (|contrast * x| + |changed|).
    It moves x_hat = (x - mean) / std by at most (2 + |x_hat|) * d / std: once through x, once through the mean, and
    |x_hat| times through std. Each of the two answers is itself right to a few of its own roundings.
    """
    u = 2.0**-24
    d = u * (np.abs(contrast * original) + np.abs(changed)).max((2, 3))
    std = changed.std((2, 3), dtype=np.float64)
    x_hat = np.abs(original - original.mean((2, 3), keepdims=True)).max((2, 3)) / original.std((2, 3))
    return (2 + x_hat) * d / std + 2 * 4 * u * x_hat


def interleaved(a: Callable[[], object], b: Callable[[], object], pairs: int = 21) -> tuple[float, float, float]:
    """Median milliseconds of a and of b, and the median of a's time over b's, each pair run back to back."""

    def milliseconds(f: Callable[[], object]) -> float:
        start = time.perf_counter()
        f()
        return 1e3 * (time.perf_counter() - start)

    times = [(milliseconds(a), milliseconds(b)) for _ in range(pairs + 2)][2:]  # the first two warm up
    return (
        statistics.median(ta for ta, _ in times),
        statistics.median(tb for _, tb in times),
        statistics.median(ta / tb for ta, tb in times),
    )


def draw(rows: dict[str, list[np.ndarray]], path: str) -> None:
    """Each row: a photograph before, after batch norm and after instance norm; as it was taken and changed each."""
    figure = Figure(figsize=(12, 1.5 * len(rows) + 0.5), layout="constrained", facecolor="white")
    pairs = figure.subfigures(1, 3, wspace=0.03)
    titles = "the photographs", "after batch norm: they differ", "after instance norm: the same"
    for k, (pair, title) in enumerate(zip(pairs, titles, strict=True)):
        pair.suptitle(title, weight="bold")
        for axes_of_row, (change, pictures) in zip(pair.subplots(len(rows), 2), rows.items(), strict=True):
            for axes, picture in zip(axes_of_row, pictures[2 * k : 2 * k + 2], strict=True):
                axes.imshow(np.moveaxis(picture, 0, -1).clip(0, 1))
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            axes_of_row[0].set_xlabel("as taken" if k == 0 else "of that as taken")
            axes_of_row[1].set_xlabel(change if k == 0 else "of the changed one")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="photos.png", help="the picture to write (default: %(default)s)")
    output = parser.parse_args().output

    stored = np.stack([cropped(getattr(data, name)()) for name in PHOTOGRAPHS])  # (4, height, width, 3), uint8
    original = np.ascontiguousarray(np.moveaxis(stored, -1, 1), np.float32) / np.float32(255)
    changed = {name: np.float32(c) * original + np.float32(b) for name, (c, b) in CHANGES.items()}
    batch = np.concatenate([original, *changed.values()])

    after_instance = np.split(nk.instance_norm(batch, eps=EPS), 1 + len(CHANGES))
    after_batch = np.split(nk.normalize(batch, axis=(0, 2, 3), eps=EPS), 1 + len(CHANGES))

    print(f"{len(batch)} photographs of {batch.shape[1:]}, float32: four as they are, then changed")
    print("\nlargest difference from the original, in standard deviations")
    print(f"{'':10}{'contrast':>10}{'brightness':>12}{'batch norm':>12}{'instance norm':>15}{'rounding allows':>17}")
    for k, (name, (contrast, brightness)) in enumerate(CHANGES.items(), start=1):
        left = np.abs(after_instance[k] - after_instance[0]).max((2, 3))
        kept = np.abs(after_batch[k] - after_batch[0]).max()
        bound = rounding_bound(original, changed[name], contrast)
        print(f"{name:10}{contrast:10.2f}{brightness:+12.2f}{kept:12.2f}{left.max():15.1e}{bound.max():17.1e}")
        if not (left <= bound).all():
            raise SystemExit(f"{name}: instance norm left a difference of {left.max()}")

    y = np.moveaxis(nk.instance_norm(stored, channel_axis=-1, eps=EPS), -1, 1)
    print("\nThe files' own bytes, uint8 with channels last, are one more change, of contrast 255:")
    print(f"they differ by {np.abs(y - after_instance[0]).max():.1e}")

    out = np.empty_like(batch)
    calls = {  # a fresh array of this size may cost more than to normalize it
        "into a fresh array": lambda: nk.instance_norm(batch, eps=EPS),
        "into out=": lambda: nk.instance_norm(batch, eps=EPS, out=out),
    }
    print(f"\nmedians of interleaved pairs, {nk.isa()}, threads: {nk.get_num_threads()}")
    for name, call in calls.items():
        numpy_ms, normkit_ms, ratio = interleaved(lambda: numpy_instance_norm(batch), call)
        print(
            f"NumPy's two lines {numpy_ms:6.1f} ms, normkit {name:16} {normkit_ms:6.1f} ms: {ratio:.1f} times as fast"
        )

    # Behind both norms the same weight and bias for all: what a screen shows, in colors as photographs have them.
    weight, bias = original.std((0, 2, 3))[:, None, None], original.mean((0, 2, 3))[:, None, None]
    rows = {}
    for k, (name, (c, b)) in enumerate(CHANGES.items()):
        before = [original[k], changed[name][k]]
        after = [weight * y[part][k] + bias for y in (after_batch, after_instance) for part in (0, k + 1)]
        rows[f"{name}: {c:g} x {'-' if b < 0 else '+'} {abs(b):g}"] = [*before, *after]
    draw(rows, output)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
