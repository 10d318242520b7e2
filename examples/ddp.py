"""Batch norm over all processes
================================

Where each process has a few images alone: training on digits under DDP, with gloo.

To run it::

    pip install ".[examples,torch]"
    python examples/ddp.py [--quick]

The same network is trained three times from the same start, on the same batches: in one process; in four under
DistributedDataParallel, whose batch norms see the images of their process alone; and in four with batch norms over
all of them, by `normkit.torch.convert(model, process_group=...)`, which PyTorch's SyncBatchNorm does on GPUs alone.
"""

import argparse
import tempfile
import time

import normkit.torch as nt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

PROCESSES, IMAGES, RATE = 4, 4, 0.05  # images of a process in a batch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)


def trained(model: nn.Module, steps: int, part: slice) -> tuple[float, float]:
    """What comes out of it: accuracy in evaluation, milliseconds a step. `part`: of each batch."""
    x, labels = digits()
    learn, test = slice(0, 1200), slice(1200, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    draw, start = torch.Generator().manual_seed(1), time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(0, learn.stop, (PROCESSES * IMAGES,), generator=draw)[part]
        loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    took = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == labels[test]).float().mean().item()
    return accuracy, 1e3 * took / steps


def work(rank: int, store: str, steps: int, queue: "torch.multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    part = slice(rank * IMAGES, (rank + 1) * IMAGES)
    for synchronized in (False, True):
        made = network()
        nt.convert(made, process_group=distributed.group.WORLD if synchronized else None)
        found = trained(DistributedDataParallel(made), steps, part)
        if rank == 0:
            queue.put((found, {name: p.detach().numpy() for name, p in made.named_parameters()}))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, in seconds")
    steps = 50 if parser.parse_args().quick else 500

    torch.set_num_threads(1)
    alone = network()
    nt.convert(alone)
    rows = {"one process": (trained(alone, steps, slice(None)), 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.Queue()
        joined = torch.multiprocessing.spawn(work, (f"{folder}/store", steps, queue), nprocs=PROCESSES, join=False)
        for name in ("DDP", "DDP, batch norm over all"):
            found, parameters = queue.get(timeout=600)
            away = [np.abs(p.detach().numpy() - parameters[n]).max() for n, p in alone.named_parameters()]
            rows[name] = (found, max(away))
        joined.join()

    print(f"{steps} steps, {PROCESSES} processes with {IMAGES} images each, or one with {PROCESSES * IMAGES}\n")
    print(f"{'':26}{'accuracy':>10}{'ms a step':>11}{'away from one process':>24}")
    for name, ((accuracy, took), away) in rows.items():
        print(f"{name:26}{accuracy:10.3f}{took:11.1f}{away:24.1e}")
    if rows["DDP, batch norm over all"][1] > 0.1 * rows["DDP"][1]:
        raise SystemExit("four processes are to learn what one does, and do not")


if __name__ == "__main__":
    main()
