"""nnU-Net, converted in one line
==============================

nnU-Net's network, its normalizations converted to normkit's in one line.

To run it::

    pip install ".[torch,examples]" dynamic-network-architectures
    python examples/segment.py [--quick] [--output segment.png]

nnU-Net segments medical volumes by convolutions, instance norms and leaky ReLUs. The network here is the one of its own
package, `dynamic-network-architectures`. First its output and gradients are compared with those in float64, before the
conversion and after it; then a training step and inference are timed, with channels first and with channels last, both
networks in turn.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import normkit.torch as nt
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

# sphinx_gallery_thumbnail_path = 'figures/shared.svg'
CLASSES, BATCH = 3, 2  # nnU-Net's own batch; of one volume PyTorch does convolutions without oneDNN
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last_3d}
# What a profile calls the operations of PyTorch and of normkit, and in what the picture puts them together.
PARTS = {
    "convolution": ("conv",),
    "normalization": ("batch_norm", "instance_norm", "_Forward", "_Backward"),
    "activation": ("leaky_relu",),
    "copies": ("copy_", "repeat", "CopySlices"),
}


def network(features: list[int]) -> PlainConvUNet:
    """As nnU-Net plans it for a volume of one channel."""
    stages = len(features)
    return PlainConvUNet(
        1, stages, features, nn.Conv3d, 3, [1] + [2] * (stages - 1), [2] * stages, CLASSES, [2] * (stages - 1),
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=False,
    )  # fmt: skip


def step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """A training step, but for the optimizer, which does the same for both."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()


def infer(model: nn.Module, x: Tensor, _: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def results(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and all gradients one after another."""
    model.zero_grad()
    y = model(x)
    nn.functional.cross_entropy(y, labels).backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distances(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest difference from what is exact, in units of its largest element."""
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


def seconds(work: Callable[..., None], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def profile(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> dict[str, float]:
    """Milliseconds of a training step in each part of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(steps):
            step(model, x, labels)
    found = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profiler.key_averages():
        part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "the rest")
        found[part] += event.self_cpu_time_total / 1e3 / steps
    return found


def draw(bars: dict[str, dict[str, float]], path: str) -> None:
    figure = Figure(figsize=(9, 0.6 * len(bars) + 1.4), layout="constrained")
    axes = figure.subplots()
    names = [*bars][::-1]
    begin = dict.fromkeys(names, 0.0)
    for part in [*PARTS, "the rest"]:
        axes.barh(names, [bars[name][part] for name in names], left=[begin[name] for name in names], label=part)
        begin = {name: begin[name] + bars[name][part] for name in names}
    axes.set(xlabel="milliseconds of a training step", title="nnU-Net's network on the CPU: where the time goes")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small network, in seconds")
    parser.add_argument("--output", default="segment.png", help="the picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    features, size, pairs = ([8, 16, 32], 16, 2) if arguments.quick else ([32, 64, 128], 48, 5)

    torch.manual_seed(0)
    before = network(features)
    after = copy.deepcopy(before)
    done = nt.convert(after)  # the one line
    models = {"before": before, "after": after}
    print(f"converted: {len(done.converted)} instance norms, {len(done.fused)} with their leaky ReLU\n")
    x, labels = torch.randn(BATCH, 1, size, size, size), torch.randint(CLASSES, (BATCH, size, size, size))

    part = x[..., :16, :16, :16], labels[..., :16, :16, :16]  # of which float64 is not too slow
    exact = results(copy.deepcopy(before).double(), part[0].double(), part[1])
    away = {name: distances(results(model, *part), exact) for name, model in models.items()}
    print("largest errors, in units of the largest element    output  gradients")
    for name, (of_output, of_gradients) in away.items():
        print(f"{name:50}{of_output:7.1e}{of_gradients:11.1e}")
    if any(a > 4 * b for a, b in zip(away["after"], away["before"], strict=True)):  # which one is nearer is chance
        raise SystemExit("the converted network is further from the truth than rounding explains")

    works = {"a training step": step, "inference": infer}
    bar = tqdm(total=len(LAYOUTS) * (len(works) * (pairs + 1) + 1))
    ratios, bars = [], {}
    for layout, memory_format in LAYOUTS.items():
        arranged = x.to(memory_format=memory_format)
        for model in models.values():
            model.to(memory_format=memory_format)
        for name, work in works.items():
            times = []
            for _ in range(pairs + 1):  # the first pair warms up
                times.append([seconds(work, model, arranged, labels) for model in models.values()])
                bar.update()
            a, b = (1e3 * statistics.median(column) for column in zip(*times[1:], strict=True))
            ratio = statistics.median(a / b for a, b in times[1:])
            ratios.append(f"{layout:16}{name:18}{a:10.0f} ms{b:10.0f} ms{ratio:10.2f}")
        for name, model in models.items():
            bars[f"{name}, {layout}"] = profile(model, arranged, labels, pairs)
        bar.update()
    bar.close()

    title = f"medians of {pairs} pairs, {torch.get_num_threads()} threads"
    print(f"\n{title:34}{'before':>13}{'after':>13}{'ratio':>10}")
    print("\n".join(ratios))
    print(f"\n{'milliseconds of a training step':34}" + "".join(f"{part:>15}" for part in [*PARTS, "the rest"]))
    for name, parts in bars.items():
        print(f"{name:34}" + "".join(f"{milliseconds:15.1f}" for milliseconds in parts.values()))
    draw(bars, arguments.output)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
