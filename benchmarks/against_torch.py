"""How much faster than PyTorch's fastest instance norm: `python benchmarks/against_torch.py [threads]`, with torch.

The rival is `native_group_norm` with one channel a group, which leaves `F.instance_norm` far behind. Calls take turns
on the same rotating inputs, answers are compared; printed are medians of the paired ratios, twice: into outputs
that rotate likewise, which compares the kernels, and into new ones, where the allocator and the caches have their say.
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


def ratios(shape):
    n, c, h, w = shape
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for _ in range(INPUTS)]
    weight, bias = np.ones(c, np.float32), np.zeros(c, np.float32)
    tensors, torch_weight, torch_bias = list(map(torch.from_numpy, inputs)), *map(torch.from_numpy, (weight, bias))

    ours_out = [np.zeros(shape, np.float32) for _ in range(INPUTS)]
    theirs_out = [torch.zeros(shape) for _ in range(INPUTS)]
    mean, rstd = torch.zeros(n, c), torch.zeros(n, c)
    rest = torch_weight, torch_bias, n, c, h * w, c, 1e-5
    into = torch.ops.aten.native_group_norm.out

    def paired(theirs, ours):
        return statistics.median(
            seconds(lambda k=k: theirs(k % INPUTS)) / seconds(lambda k=k: ours(k % INPUTS)) for k in range(PAIRS)
        )

    kernels = paired(
        lambda k: into(tensors[k], *rest, out0=theirs_out[k], out1=mean, out2=rstd),
        lambda k: normkit.instance_norm(inputs[k], weight, bias, out=ours_out[k]),
    )
    difference = max(np.abs(a - b.numpy()).max() for a, b in zip(ours_out, theirs_out, strict=True))
    assert difference < 1e-5, f"answers differ by {difference}"
    return kernels, paired(
        lambda k: torch.native_group_norm(tensors[k], *rest),
        lambda k: normkit.instance_norm(inputs[k], weight, bias),
    )


if __name__ == "__main__":
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.set_num_threads(threads)
    normkit.set_num_threads(threads)
    print(f"torch {torch.__version__} / normkit {normkit.__version__} ({normkit.isa()}), float32, threads: {threads}")
    for shape in SHAPES:
        kernels, fresh = ratios(shape)
        print(f"{shape}: outputs given {kernels:.2f}, new {fresh:.2f}")
