"""Training that does not mind the light
=====================================

What instance norm does to training, and to what a network knows of brightness and contrast.

To run it::

    pip install ".[examples]"
    python examples/training.py [--quick] [--output training.png]

A small network learns to read digits of 8 x 8 pixels: two convolutions, each with a norm and a ReLU, and a linear
layer. It is trained without a norm, with batch norm and with instance norm, each from several seeds, and
then reads digits whose brightness and contrast it has never seen. Instance norm measures each channel of each image
alone, and a convolution without padding makes of contrast * x + brightness the same in each channel: so nothing of a
change is left behind the first norm. The rest is NumPy, and the gradients are normkit's.

.. image:: ../training.png
   :alt: Accuracy of three networks on digits whose contrast and brightness were changed
"""

import argparse

import normkit as nk
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

# sphinx_gallery_thumbnail_path = 'training.png'
CHANGES = {  # name: contrast, brightness; pixels are 0 to 1
    "as is": (1.0, 0.0),
    "x / 4": (0.25, 0.0),
    "x + 1": (1.0, 1.0),
    "2 x - 1": (2.0, -1.0),
    "x / 4 + 1/2": (0.25, 0.5),
}
CLASSES, CHANNELS = 10, (16, 32)
BATCH, RATE, MOMENTUM = 32, 0.05, 0.9


class Unnormalized:
    """A bias and a ReLU, for comparison."""

    def __init__(self, channels: int) -> None:
        self.params = [np.zeros(channels, np.float32)]

    def forward(self, x: np.ndarray, training: bool) -> np.ndarray:
        self.y = np.maximum(x + self.params[0], 0)
        return self.y

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        dx = np.where(self.y > 0, dy, 0)
        return dx, [dx.sum((0, 1, 2))]


class InstanceNorm:
    def __init__(self, channels: int) -> None:
        self.params = [np.ones(channels, np.float32), np.zeros(channels, np.float32)]

    def forward(self, x: np.ndarray, training: bool) -> np.ndarray:
        y, *statistics = nk.instance_norm(x, *self.params, channel_axis=-1, activation="relu", return_stats=True)
        self.saved = x, *statistics
        return y

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        weight, bias = self.params
        dx, *gradients = nk.instance_norm_backward(
            dy, *self.saved, weight, bias=bias, channel_axis=-1, activation="relu"
        )
        return dx, gradients


class BatchNorm:
    def __init__(self, channels: int) -> None:
        self.params = [np.ones(channels, np.float32), np.zeros(channels, np.float32)]
        self.running = {
            "running_mean": np.zeros(channels, np.float32),
            "running_var": np.ones(channels, np.float32),
        }

    def forward(self, x: np.ndarray, training: bool) -> np.ndarray:
        y, *statistics = nk.batch_norm(
            x, *self.params, **self.running, training=training, channel_axis=-1, activation="relu", return_stats=True
        )
        self.saved = x, *statistics
        return y

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        weight, bias = self.params
        dx, *gradients = nk.batch_norm_backward(
            dy, *self.saved, weight, bias=bias, training=True, channel_axis=-1, activation="relu"
        )
        return dx, gradients


NORMS = {"no norm": Unnormalized, "batch norm": BatchNorm, "instance norm": InstanceNorm}


def patches(x: np.ndarray) -> np.ndarray:
    """The 3 x 3 pixels around each inner pixel, with their channels, in one row each."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return windows.reshape(*windows.shape[:3], -1)


class Convolution:
    """3 x 3, without padding, with channels last."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        scale = np.sqrt(2 / (9 * inputs))
        self.params = [(scale * rng.standard_normal((9 * inputs, outputs))).astype(np.float32)]

    def forward(self, x: np.ndarray, training: bool) -> np.ndarray:
        self.rows = patches(x)
        return self.rows @ self.params[0]

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        (weight,) = self.params
        outputs = weight.shape[1]
        gradient = self.rows.reshape(-1, len(weight)).T @ dy.reshape(-1, outputs)
        turned = weight.reshape(-1, 3, 3, outputs)[:, ::-1, ::-1].transpose(3, 1, 2, 0)
        around = np.pad(dy, ((0, 0), (2, 2), (2, 2), (0, 0)))
        return patches(around) @ turned.reshape(9 * outputs, -1), [gradient]


class Linear:
    """Of all pixels of all channels."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        weight = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
        self.params = [weight.astype(np.float32), np.zeros(outputs, np.float32)]

    def forward(self, x: np.ndarray, training: bool) -> np.ndarray:
        self.shape, self.rows = x.shape, x.reshape(len(x), -1)
        return self.rows @ self.params[0] + self.params[1]

    def backward(self, dy: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        return (dy @ self.params[0].T).reshape(self.shape), [self.rows.T @ dy, dy.sum(0)]


class Network:
    def __init__(self, norm: type, rng: np.random.Generator) -> None:
        first, second = CHANNELS
        self.layers = [
            Convolution(1, first, rng), norm(first), Convolution(first, second, rng), norm(second),
            Linear(4 * 4 * second, CLASSES, rng),
        ]  # fmt: skip
        self.speeds = [[np.zeros_like(p) for p in layer.params] for layer in self.layers]

    def scores(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(self.scores(x).argmax(1) == labels))

    def step(self, x: np.ndarray, labels: np.ndarray) -> float:
        """A step of gradient descent with momentum. Returns the cross-entropy before it."""
        scores = self.scores(x, training=True)
        scores = scores - scores.max(1, keepdims=True)
        log_odds = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        dy = (np.exp(log_odds) - np.eye(CLASSES, dtype=np.float32)[labels]) / np.float32(len(x))
        for layer, speeds in zip(self.layers[::-1], self.speeds[::-1], strict=True):
            dy, gradients = layer.backward(dy)
            for param, speed, gradient in zip(layer.params, speeds, gradients, strict=True):
                speed *= MOMENTUM
                speed -= RATE * gradient
                param += speed
        return float(-log_odds[np.arange(len(x)), labels].mean())


def changed(x: np.ndarray, change: str) -> np.ndarray:
    contrast, brightness = CHANGES[change]
    return np.float32(contrast) * x + np.float32(brightness)


def draw(digits: np.ndarray, losses: dict[str, np.ndarray], accuracies: dict[str, np.ndarray], path: str) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    for name, of_seeds in losses.items():
        window = np.ones(20) / 20
        smooth = np.array([np.convolve(loss, window, "valid") for loss in of_seeds])
        steps = np.arange(smooth.shape[1]) + len(window)
        (line,) = axes.plot(steps, smooth.mean(0), label=name)
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="cross-entropy", yscale="log", title=f"training, {len(of_seeds)} seeds")
    axes.legend(frameon=False)
    grid = right.subplots(2, len(CHANGES), height_ratios=(1, 2.2), sharey="row")
    for column, change in enumerate(CHANGES):
        picture, bars = grid[:, column]
        picture.imshow(changed(digits, change)[0, :, :, 0], cmap="gray", vmin=-1, vmax=2)
        picture.set(xticks=[], yticks=[], title=change)
        for k, (name, of_seeds) in enumerate(accuracies.items()):
            mean = of_seeds[:, column].mean()
            bars.bar(k, mean, label=name)
            bars.text(k, mean + 0.02, f"{mean:.2f}", ha="center", fontsize=8)
        bars.set(xticks=[], ylim=(0, 1.1))
        bars.spines[["top", "right"]].set_visible(False)
    grid[1, 0].set_ylabel("accuracy on digits never seen")
    right.suptitle("the same digits in a light that no digit of the training had")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps, in seconds")
    parser.add_argument("--output", default="training.png", help="the picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    seeds, steps = (2, 150) if arguments.quick else (5, 1000)

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(images, labels, random_state=0, stratify=labels)

    losses = {name: np.empty((seeds, steps)) for name in NORMS}
    accuracies = {name: np.empty((seeds, len(CHANGES))) for name in NORMS}
    with tqdm(total=len(NORMS) * seeds * steps, unit="step") as bar:
        for name, norm in NORMS.items():
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                network = Network(norm, rng)
                for step in range(steps):
                    batch = rng.integers(len(train), size=BATCH)
                    losses[name][seed, step] = network.step(train[batch], train_labels[batch])
                    bar.update()
                for k, change in enumerate(CHANGES):
                    accuracies[name][seed, k] = network.accuracy(changed(test, change), test_labels)

    print(f"\n{len(train)} digits to learn from, {len(test)} to read; means of {seeds} seeds after {steps} steps")
    print(f"\n{'':16}{'cross-entropy':>14}" + "".join(f"{change:>13}" for change in CHANGES))
    for name in NORMS:
        row = "".join(f"{accuracy:13.3f}" for accuracy in accuracies[name].mean(0))
        print(f"{name:16}{losses[name][:, -50:].mean():14.4f}{row}")
    by_instance = accuracies["instance norm"]
    away = np.abs(by_instance - by_instance[:, :1]).max()
    print(f"\nlargest difference that a change makes behind instance norm: {away:.3f}")
    if away > 0.02:  # eps is not nothing beside the variance of a pale image
        raise SystemExit("instance norm is to see through brightness and contrast, and does not")
    draw(test[:1], losses, accuracies, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
