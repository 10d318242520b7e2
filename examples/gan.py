"""A critic with a gradient penalty
================================

Why the critic of a Wasserstein GAN wants a norm of each sample, and double backward.

To run it::

    pip install ".[torch,examples]"
    python examples/gan.py [--quick] [--output gan.png]

A generator learns to draw digits of 8 x 8 pixels. Its critic is held to a slope of 1 by a gradient penalty
(Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028), a function of the critic's gradient at each sample, whose own
gradient goes through the norms twice. That is per sample only where samples do not mix: under batch norm the score of a
sample depends on all others, and the penalty means something else. Both critics are trained here, alike but for the
norm.

.. image:: ../gan.png
   :alt: Distance from real digits against steps, and digits drawn by both
"""

import argparse
import time
from collections.abc import Callable

import normkit.torch as nt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

# sphinx_gallery_thumbnail_path = 'gan.png'
NOISE, CHANNELS = 16, 32
LEAKY = ("leaky_relu", 0.2)
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "instance norm": lambda channels: nt.InstanceNorm2d(channels, affine=True, activation=LEAKY),
    "batch norm": lambda channels: nt.BatchNorm2d(channels, activation=LEAKY),
}
BATCH, CRITIC_STEPS, RATE, PENALTY = 64, 4, 1e-3, 10.0


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NOISE, 2 * CHANNELS * 4 * 4), nn.Unflatten(1, (2 * CHANNELS, 4, 4)),
        nt.BatchNorm2d(2 * CHANNELS, activation="relu"), nn.ConvTranspose2d(2 * CHANNELS, CHANNELS, 4, 2, 1),
        nt.BatchNorm2d(CHANNELS, activation="relu"), nn.Conv2d(CHANNELS, 1, 3, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def critic(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, padding=1), norm(CHANNELS),
        nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, 2, 1), norm(2 * CHANNELS),
        nn.Flatten(), nn.Linear(2 * CHANNELS * 4 * 4, 1),
    )  # fmt: skip


def gradient_penalty(judge: nn.Module, real: Tensor, drawn: Tensor) -> Tensor:
    """How far the slope of the critic is from 1 between real samples and drawn ones."""
    share = torch.rand(len(real), 1, 1, 1)
    between = (share * real + (1 - share) * drawn).requires_grad_()
    (slopes,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


def influence(judge: nn.Module, samples: Tensor) -> float:
    """The largest slope of the first sample's score along any other sample."""
    samples = samples.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(judge(samples)[0].sum(), samples)
    return float(slopes[1:].abs().max())


def distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two sets of pictures, as normal distributions of pixels: 0 where they are alike."""
    a, b = (pictures.flatten(1).double() for pictures in (a, b))
    shared = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * shared)


def train(norm: Callable[[int], nn.Module], digits: Tensor, steps: int, every: int, bar: tqdm) -> tuple[nn.Module, ...]:
    """A generator, its critic, and the distance of what it draws from the digits after each `every` steps."""
    torch.manual_seed(0)
    draw, judge = generator(), critic(norm)
    of_draw, of_judge = (torch.optim.Adam(m.parameters(), RATE, betas=(0.0, 0.9)) for m in (draw, judge))
    distances = []
    for step in range(steps):
        for _ in range(CRITIC_STEPS):
            real = digits[torch.randint(len(digits), (BATCH,))]
            drawn = draw(torch.randn(BATCH, NOISE)).detach()
            loss = judge(drawn).mean() - judge(real).mean() + PENALTY * gradient_penalty(judge, real, drawn)
            of_judge.zero_grad()
            loss.backward()
            of_judge.step()
        of_draw.zero_grad()
        (-judge(draw(torch.randn(BATCH, NOISE))).mean()).backward()
        of_draw.step()
        bar.update()
        if (step + 1) % every == 0:
            with torch.no_grad():
                distances.append(distance(draw(torch.randn(len(digits), NOISE)), digits))
    return draw, judge, distances


def show(digits: Tensor, drawn: dict[str, Tensor], distances: dict[str, list[float]], every: int, path: str) -> None:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    curve, *pictures = figure.subplots(1, 2 + len(drawn), width_ratios=(1.4, *[1] * (1 + len(drawn))))
    for name, of_steps in distances.items():
        curve.plot(every * np.arange(1, len(of_steps) + 1), of_steps, label=f"{name} in the critic")
    curve.set(xlabel="step of the generator", ylabel="Frechet distance from real digits", yscale="log")
    curve.legend(frameon=False)
    for axes, (name, samples) in zip(pictures, {"real digits": digits, **drawn}.items(), strict=True):
        framed = nn.functional.pad(samples[:36, 0], (1, 1, 1, 1))
        rows = framed.reshape(6, 6, 10, 10).transpose(1, 2).reshape(60, 60)
        axes.imshow(rows.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=name)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, in seconds")
    parser.add_argument("--output", default="gan.png", help="the picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    steps, every = (20, 10) if arguments.quick else (500, 20)

    torch.set_num_threads(1)  # of tensors as small as these: more cost more than they bring
    images, _ = load_digits(return_X_y=True)
    digits = torch.from_numpy(images.reshape(-1, 1, 8, 8) / 16).float()
    drawn, distances, rows = {}, {}, []
    with tqdm(total=len(NORMS) * steps, unit="step") as bar:
        for name, norm in NORMS.items():
            start = time.perf_counter()
            draw, judge, distances[name] = train(norm, digits, steps, every, bar)
            milliseconds = 1e3 * (time.perf_counter() - start) / steps
            with torch.no_grad():
                drawn[name] = draw(torch.randn(36, NOISE))
            mixed = influence(judge, digits[:BATCH])
            rows.append(f"{name:16}{mixed:24.1e}{distances[name][-1]:28.2f}{milliseconds:16.0f}")
            if name == "instance norm" and mixed != 0:
                raise SystemExit("under instance norm no sample is to be disturbed by the others, and one is")

    print(f"\n{'critic with':16}{'slope along others':>24}{'distance from real digits':>28}{'ms a step':>16}")
    print("\n".join(rows))
    show(digits[torch.randperm(len(digits))], drawn, distances, every, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
