"""How much faster than PyTorch's fastest instance norm: `python benchmarks/against_torch.py [threads]`, with torch.

The rival is `native_group_norm` with one channel a group, which leaves `F.instance_norm` far behind. Calls take turns
on the same rotating inputs, both make a new output, answers are compared first; printed is the median of the ratios.
"""

import statistics
import sys
import time

import normkit
import numpy as np
import torch

SHAPES = [(16, 256, 32, 32), (8, 64, 128, 128), (32, 512, 7, 7), (1, 3, 224, 224)]
PAIRS, INPUTS = 60, 4


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(shape):
    n, c, h, w = shape
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for _ in range(INPUTS)]
    weight, bias = np.ones(c, np.float32), np.zeros(c, np.float32)
    tensors, torch_weight, torch_bias = list(map(torch.from_numpy, inputs)), *map(torch.from_numpy, (weight, bias))

    def theirs(k):
        return torch.native_group_norm(tensors[k], torch_weight, torch_bias, n, c, h * w, c, 1e-5)[0]

    def ours(k):
        return normkit.instance_norm(inputs[k], weight, bias)

    difference = np.abs(ours(0) - theirs(0).numpy()).max()
    assert difference < 1e-5, f"answers differ by {difference}"
    ratios = [seconds(lambda k=k: theirs(k % INPUTS)) / seconds(lambda k=k: ours(k % INPUTS)) for k in range(PAIRS)]
    return statistics.median(ratios)


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    normkit.set_num_threads(threads)
    print(f"torch {torch.__version__} / normkit {normkit.__version__} ({normkit.isa()}), float32, threads: {threads}")
    for shape in SHAPES:
        print(f"{shape}: {ratio(shape):.2f}")
