"""Style transfer: the colors of a photograph, and a network that paints
=====================================================================

Photographs in the colors of others, and in the style of a drawing: what instance norm was found for.

To run it::

    pip install ".[torch,examples]"
    python examples/style_transfer.py [--quick] [--output style_transfer.png]

First without any training: ``normkit.adaptive_instance_norm`` gives each channel of one photograph the mean and
deviation of another's (Huang and Belongie 2017, https://arxiv.org/abs/1703.06868). In the space of colors Lab, whose
channels are lightness and two contrasts of colors, it goes well both ways.

Then the experiment of Ulyanov, Vedaldi and Lempitsky 2016 (https://arxiv.org/abs/1607.08022), small: a network learns
to paint photographs in the style of a drawing, once with batch norm and once with instance norm, alike but for that.
Style is what products of features are, summed over a picture (Gatys, Ecker and Bethge 2015); the features are those of
fixed random filters (Ustyuzhaninov et al. 2016, https://arxiv.org/abs/1606.00021), so that nothing is downloaded.
Photographs that the network has not seen are then painted as they were taken and in a dim light.

.. image:: ../style_transfer.jpg
   :alt: With instance norm the loss falls lower, and paintings of a photograph in two lights are the same
"""

import argparse
import time
from collections.abc import Callable

import normkit as nk
import normkit.torch as nt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from skimage import color, data
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from tqdm import tqdm

# sphinx_gallery_thumbnail_path = 'style_transfer.jpg'
NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch norm": nt.BatchNorm2d,
    "instance norm": lambda channels, **options: nt.InstanceNorm2d(channels, affine=True, **options),
}
LEARNT = ("coffee", "rocket", "retina", "hubble_deep_field")
UNSEEN = ("chelsea", "astronaut")
DIM = 0.3, 0.1  # contrast, brightness; pixels are 0 to 1
CHANNELS, FILTERS, SIZES = 24, 32, (3, 7, 11)
CROP, BATCH, RATE, STYLE = 64, 4, 1e-3, 5.0


def photograph(name: str, width: int) -> Tensor:
    """(1, 3, height, width), 0 to 1, of those that come with scikit-image; height is a multiple of 4."""
    pixels = torch.from_numpy(getattr(data, name)()).movedim(-1, 0)[None] / 255
    height = width * pixels.shape[2] // pixels.shape[3] // 4 * 4
    return F.interpolate(pixels, (height, width), mode="area")


def drawing(size: int = 160) -> Tensor:
    """(1, 3, size, size): stripes, twirled about three points."""
    y, x = (axis / size for axis in np.mgrid[:size, :size])
    for x0, y0, turn in ((0.3, 0.3, 5.0), (0.75, 0.65, -6.0), (0.2, 0.85, -4.0)):
        dx, dy = x - x0, y - y0
        angle = turn * np.exp(-(dx**2 + dy**2) / 0.03)
        x, y = x0 + np.cos(angle) * dx - np.sin(angle) * dy, y0 + np.sin(angle) * dx + np.cos(angle) * dy
    colors = np.float32([[18, 42, 112], [40, 98, 178], [235, 190, 60], [245, 235, 205], [200, 70, 40], [18, 42, 112]])
    place = 5 * (2.2 * (x + 0.4 * y) % 1)
    painted = [np.interp(place, np.arange(6), channel) for channel in colors.T / 255]
    return torch.from_numpy(np.stack(painted)[None]).float()


def in_colors_of(content: np.ndarray, style: np.ndarray) -> np.ndarray:
    """The photograph `content`, (height, width, 3) as `style`, with the colors of that."""
    content, style = color.rgb2lab(content), color.rgb2lab(style)
    painted = nk.adaptive_instance_norm(content[None], style[None], channel_axis=-1)[0]
    lightness = painted[..., :1].clip(0, 100)
    return color.lab2rgb(np.concatenate([lightness, painted[..., 1:]], -1)).clip(0, 1)


def painter(norm: Callable[..., nn.Module]) -> nn.Module:
    def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        padding = size // 2
        convolution = nn.Conv2d(inputs, outputs, size, stride, padding, padding_mode="reflect", bias=False)
        return [convolution, norm(outputs, activation="relu")]

    return nn.Sequential(
        *layer(3, CHANNELS, 5), *layer(CHANNELS, 2 * CHANNELS, 3, 2),
        *layer(2 * CHANNELS, 2 * CHANNELS, 3), *layer(2 * CHANNELS, 2 * CHANNELS, 3),
        nn.Upsample(scale_factor=2), *layer(2 * CHANNELS, CHANNELS, 3),
        nn.Conv2d(CHANNELS, 3, 5, padding=2, padding_mode="reflect"), nn.Sigmoid(),
    )  # fmt: skip


class Loss:
    """How far a painting is from the style of one picture, and from the content of another."""

    def __init__(self, style: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.filters = []
        for size in SIZES:
            filters = torch.randn(FILTERS, 3, size, size, generator=generator)
            filters -= filters.mean((1, 2, 3), keepdim=True)
            self.filters.append(filters / filters.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
        self.goal = self.products(style)

    def __call__(self, painted: Tensor, content: Tensor) -> Tensor:
        return (STYLE * self.of_style(painted) + self.of_content(painted, content)).mean()

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Of each size of filters, on the pictures and on their halves."""
        halves = F.avg_pool2d(pictures, 2)
        return [F.relu(F.conv2d(x, filters)) for x in (pictures, halves) for filters in self.filters]

    def products(self, pictures: Tensor) -> list[Tensor]:
        """Gram matrices of the features and of the colors."""
        rows = [x.flatten(2) for x in (*self.features(pictures), pictures)]
        return [x @ x.mT / x.shape[2] for x in rows]

    def of_style(self, painted: Tensor) -> Tensor:
        """Of each painting: 0 where it has the products of the style, 1 where it has none."""
        distances = [
            (ours - goal).square().sum((1, 2)) / goal.square().sum()
            for ours, goal in zip(self.products(painted), self.goal, strict=True)
        ]
        return torch.stack(distances).mean(0)

    def of_content(self, painted: Tensor, content: Tensor) -> Tensor:
        """Of each painting: how little its grays follow those of the content, whatever their contrast: 0 to 2."""
        x, y = (F.avg_pool2d(pictures.mean(1), 4).flatten(1) for pictures in (painted, content))
        return 1 - F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), eps=1e-3)


def crops(photographs: list[Tensor], count: int) -> Tensor:
    """Parts of photographs, at random."""

    def one() -> Tensor:
        x = photographs[int(torch.randint(len(photographs), ()))]
        row, column = (int(torch.randint(extent - CROP + 1, ())) for extent in x.shape[2:])
        return x[..., row : row + CROP, column : column + CROP]

    return torch.cat([one() for _ in range(count)])


def train(
    norm: Callable[..., nn.Module], loss: Loss, photographs: list[Tensor], steps: int, bar: tqdm
) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    network, losses = painter(norm), []
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(steps):
        content = crops(photographs, BATCH)
        painted = network(content)
        value = loss(painted, content)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        bar.update()
    return network.eval(), losses


def show(colored: dict[str, np.ndarray], style: Tensor, losses: dict[str, list[float]], rows: dict[str, list[Tensor]],
         path: str) -> None:  # fmt: skip
    def picture(axes: Axes, pixels: np.ndarray, title: str) -> None:
        axes.imshow(pixels)
        axes.set(xticks=[], yticks=[], title=title)
        axes.spines[:].set_visible(False)

    figure = Figure(figsize=(12, 7.4), layout="constrained", facecolor="white")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2.4))
    for axes, (title, pixels) in zip(above.subplots(1, len(colored)), colored.items(), strict=True):
        picture(axes, pixels, title)
    left, right = below.subfigures(1, 2, width_ratios=(1, 2.6))
    of_style, of_losses = left.subplots(2, 1)
    picture(of_style, style[0].movedim(0, -1).numpy(), "the style")
    for name, values in losses.items():
        window = min(20, len(values))
        of_losses.plot(np.convolve(values, np.ones(window) / window, "valid"), label=name)
    of_losses.set(xlabel="step", yscale="log", title="loss")
    of_losses.legend(frameon=False)
    for axes_of_row, (name, pictures) in zip(right.subplots(len(rows), 2 * len(UNSEEN)), rows.items(), strict=True):
        for axes, pixels, light in zip(axes_of_row, pictures, ("as taken", "dim") * len(UNSEEN), strict=True):
            picture(axes, pixels[0].movedim(0, -1).numpy(), light if name == "photograph" else "")
        axes_of_row[0].set_ylabel(name)
    figure.savefig(path, dpi=90, pad_inches=0.1, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, in seconds")
    parser.add_argument("--output", default="style_transfer.png", help="the picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    steps = 10 if arguments.quick else 400

    cat, rocket = data.chelsea(), data.rocket()
    colored = {
        "a cat by day": cat, "in the colors of the rocket": in_colors_of(cat, rocket),
        "a rocket at night": rocket, "in the colors of the cat": in_colors_of(rocket, cat),
    }  # fmt: skip

    style = drawing()
    loss = Loss(style)
    learnt = [photograph(name, width) for name in LEARNT for width in (128, 256)]
    unseen = [photograph(name, 240)[:, :, :156] for name in UNSEEN]
    seen = [changed for x in unseen for changed in (x, DIM[0] * x + DIM[1])]
    losses, rows, table = {}, {"photograph": seen}, []
    with tqdm(total=len(NORMS) * steps, unit="step") as bar:
        for name, norm in NORMS.items():
            start = time.perf_counter()
            network, losses[name] = train(norm, loss, learnt, steps, bar)
            milliseconds = 1e3 * (time.perf_counter() - start) / steps
            with torch.no_grad():
                rows[name] = [network(x) for x in seen]
                value = np.mean([float(loss(y, x)) for y, x in zip(rows[name], seen, strict=True)])
            pairs = zip(rows[name][::2], rows[name][1::2], strict=True)
            moved = max(float((bright - dim).abs().mean()) for bright, dim in pairs)
            table.append(f"{name:16}{np.mean(losses[name][-50:]):10.2f}{value:10.2f}{moved:22.4f}{milliseconds:14.0f}")
            if name == "instance norm" and moved > 0.01:  # eps is not nothing beside the variance of a dim photograph
                raise SystemExit(f"instance norm is to paint the same in any light, and differs by {moved}")

    print(f"\n{'':16}{'loss':>10}{'unseen':>10}{'moved by dim light':>22}{'ms a step':>14}")
    print("\n".join(table))
    show(colored, style, losses, rows, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
