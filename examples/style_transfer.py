"""Style transfer: the colors of one photograph on another, and a network that paints
=====================================================================================

What instance norm was found for: a style is, in part, the mean and deviation of each channel of a picture.

    pip install ".[torch,examples]"
    python examples/style_transfer.py [--quick] [--output style_transfer.jpg]

First without any training: ``normkit.adaptive_instance_norm`` gives each channel of one photograph the mean and
deviation of another's (Huang and Belongie 2017, https://arxiv.org/abs/1703.06868). In the space of colors Lab, whose
channels are lightness and two contrasts of colors, that is the color transfer of Reinhard et al. 2001.

Then the experiment of Ulyanov, Vedaldi and Lempitsky 2016 (https://arxiv.org/abs/1607.08022), small: a network learns to
paint any photograph in the style of one picture, once with batch norm and once with instance norm, alike but for that.
Style is compared by products of the features of fixed random filters (Gatys et al. 2015; that random ones suffice:
Ustyuzhaninov et al. 2016, https://arxiv.org/abs/1606.00021), so nothing is downloaded. Photographs that were not learnt
from are then painted as they are and in a dim light.
"""

import argparse
import time
from collections.abc import Callable

import normkit as nk
import normkit.torch as nt
import numpy as np
import torch
from matplotlib.figure import Figure
from skimage import color, data
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from tqdm import tqdm

NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch norm": nt.BatchNorm2d,
    "instance norm": lambda channels, **options: nt.InstanceNorm2d(channels, affine=True, **options),
}
LEARNT = ("coffee", "rocket", "retina", "hubble_deep_field")
UNSEEN = ("chelsea", "astronaut")
LIGHTS = {"as it is": (1.0, 0.0), "dim": (0.3, 0.1)}  # name: contrast, brightness; pixels are 0 to 1
CHANNELS, FILTERS, SIZES = 24, 32, (3, 7, 11)
CROP, BATCH, RATE, STYLE = 64, 4, 3e-3, 1.0


def photograph(name: str, width: int) -> Tensor:
    """(1, 3, height, width), 0 to 1, of the photographs that come with scikit-image."""
    pixels = torch.from_numpy(getattr(data, name)()).movedim(-1, 0)[None] / 255
    return F.interpolate(pixels, (width * pixels.shape[2] // pixels.shape[3], width), mode="area")


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
        value = (STYLE * loss.of_style(painted) + loss.of_content(painted, content)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        bar.update()
    return network.eval(), losses
