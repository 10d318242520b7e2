"""What normkit.torch and normkit.jax take, forward and with gradients, beside what their libraries have themselves.

    python benchmarks/gradients.py torch [--threads 1]
    python benchmarks/gradients.py nnunet [--threads 1]
    python benchmarks/gradients.py jax

Both take turns; a figure is the median of the ratios of their times, the library's / normkit's: above 1 normkit is
faster. With `torch`, modules of torch.nn on a tensor so small that a call is what counts; with `nnunet`, all norms of
nnU-Net's network, each with its LeakyReLU, beside eager PyTorch and Inductor; with `jax`, a jitted instance norm
beside the lines of jnp for it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

SMALL = (2, 4, 4, 4)
SIZES = {32: 48, 64: 24, 128: 12, 256: 6}  # of nnU-Net's network: channels, and voxels along an axis
NNUNET = [(channels, size, size, size) for channels, size in SIZES.items() for _ in range(4)] + 2 * [(320, 3, 3, 3)]
SHAPES = [SMALL, (16, 256, 32, 32), (8, 64, 128, 128)]  # of JAX, whose calls run together


Run: TypeAlias = Callable[[int], list[Any]]  # runs a number of times, waits for the end, and returns the last answers


class Pair(NamedTuple):
    name: str
    theirs: Run
    ours: Run
    calls: int


def check(found: list[Any], expected: list[Any]) -> None:
    """Both round: what is more than a thousand roundings of the largest element is wrong."""
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(array) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=1000 * 2**-24 * np.abs(b).max())


def seconds(run: Run, calls: int) -> float:
    start = time.perf_counter()
    run(calls)
    return (time.perf_counter() - start) / calls


def set_threads(threads: int | None) -> None:
    import normkit
    import torch

    if threads:
        torch.set_num_threads(threads)
        normkit.set_num_threads(threads)


def of_torch(threads: int | None) -> Iterator[Pair]:
    import normkit
    import normkit.torch as nt
    import torch

    set_threads(threads)
    modules: dict[str, Callable[[Any], Any]] = {
        "instance": lambda library: library.InstanceNorm2d(4, affine=True),
        "group": lambda library: library.GroupNorm(2, 4),
        "layer": lambda library: library.LayerNorm(SMALL[1:]),
        "batch": lambda library: library.BatchNorm2d(4),
    }
    x, dy = torch.randn(SMALL, requires_grad=True), torch.randn(SMALL)

    def forward(module: Any) -> Run:
        def run(calls: int) -> list[Any]:
            for _ in range(calls):
                y = module(x)
            return [y.detach()]

        return run

    def step(module: Any) -> Run:
        def run(calls: int) -> list[Any]:
            for _ in range(calls):
                module(x).backward(dy)
            return [torch.autograd.grad(module(x), x, dy)[0]]

        return run

    plain, weight, bias = x.detach(), torch.ones(4), torch.zeros(4)
    yield Pair(
        f"group {SMALL}, no gradients", forward(lambda _: torch.nn.functional.group_norm(plain, 2, weight, bias)),
        forward(lambda _: normkit.group_norm(plain, 2, weight, bias)), 500,
    )  # fmt: skip
    for name, made in modules.items():
        theirs, ours = made(torch.nn), made(nt)
        yield Pair(f"{name} {SMALL}, forward", forward(theirs), forward(ours), 200)
        yield Pair(f"{name} {SMALL}, forward and backward", step(theirs), step(ours), 200)


def of_nnunet(threads: int | None) -> Iterator[Pair]:
    import normkit.torch as nt
    import torch

    set_threads(threads)
    torch._dynamo.config.recompile_limit = 4 * len(NNUNET)  # all layers share the code of their forward

    def forward(layers: list[Any], xs: list[Any]) -> Run:
        def run(calls: int) -> list[Any]:
            with torch.inference_mode():
                for layer, x in zip(layers * calls, xs * calls, strict=True):
                    y = layer(x)
            return [y]

        return run

    def step(layers: list[Any], xs: list[Any], dys: list[Any]) -> Run:
        def run(calls: int) -> list[Any]:
            for layer, x, dy in zip(layers * calls, xs * calls, dys * calls, strict=True):
                x.grad = None
                layer(x).backward(dy)
            return [x.grad]

        return run

    for layout in (torch.contiguous_format, torch.channels_last_3d):
        dys = [torch.randn(2, *shape).contiguous(memory_format=layout) for shape in NNUNET]
        xs = [torch.randn_like(dy).requires_grad_() for dy in dys]
        eager = [block(torch.nn, shape[0]) for shape in NNUNET]
        ours = [block(torch.nn, shape[0]) for shape in NNUNET]
        for layer in ours:
            nt.convert(layer)
        rivals = {"eager": eager, "Inductor": [torch.compile(layer, dynamic=False) for layer in eager]}
        for name, theirs in rivals.items():
            where = f"{'channels first' if layout is torch.contiguous_format else 'channels last'}, {name}"
            yield Pair(f"{where}, forward", forward(theirs, dys), forward(ours, dys), 1)
            yield Pair(f"{where}, training", step(theirs, xs, dys), step(ours, xs, dys), 1)


def block(nn: Any, channels: int) -> Any:
    return nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.LeakyReLU(inplace=True))


def of_jax() -> Iterator[Pair]:
    import jax
    import normkit.jax as nj
    from jax import numpy as jnp

    def theirs(x: Any, weight: Any, bias: Any) -> Any:
        mean, var = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]

    def repeated(function: Any, *arrays: Any) -> Run:
        jitted = jax.jit(function)

        def run(calls: int) -> list[Any]:
            for _ in range(calls):
                found = jitted(*arrays)
            return jax.tree.leaves(jax.block_until_ready(found))

        return run

    def gradients(function: Any) -> Any:
        return jax.grad(lambda x, weight, bias, dy: (function(x, weight, bias) * dy).sum(), (0, 1, 2))

    for shape in SHAPES:
        x, dy = (jax.random.normal(jax.random.key(k), shape) for k in range(2))
        arrays, calls = (x, jnp.ones(shape[1]), jnp.zeros(shape[1])), max(1, min(300, 200_000 // x.size))
        forward = [repeated(function, *arrays) for function in (theirs, nj.instance_norm)]
        yield Pair(f"{shape}, forward", *forward, calls)
        both = [repeated(gradients(function), *arrays, dy) for function in (theirs, nj.instance_norm)]
        yield Pair(f"{shape}, gradients", *both, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", choices=["torch", "nnunet", "jax"])
    parser.add_argument("--threads", type=int, help="of PyTorch, and of normkit beside it")
    parser.add_argument("--pairs", type=int, default=20)
    given = parser.parse_args()
    if given.library == "jax" and given.threads:
        parser.error("--threads is of PyTorch: JAX has as many as the process has cores, see taskset")
    pairs_of = {"torch": lambda: of_torch(given.threads), "nnunet": lambda: of_nnunet(given.threads), "jax": of_jax}
    for name, theirs, ours, calls in pairs_of[given.library]():
        check(ours(calls), theirs(calls))
        pairs = [(seconds(theirs, calls), seconds(ours, calls)) for _ in range(given.pairs)]
        ratio = statistics.median(a / b for a, b in pairs)
        fastest = [min(times) * 1e6 for times in zip(*pairs, strict=True)]
        print(f"{name:44} {ratio:6.2f}    {fastest[0]:9.1f} us, normkit {fastest[1]:9.1f}")


if __name__ == "__main__":
    main()
