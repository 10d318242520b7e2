"""A volume that no process holds
=================================

A slab of it in each process, normalized as one: forward and backward, by MPI.

To run it::

    pip install ".[mpi]" mpich  # or another MPI
    mpiexec -n 4 python -m mpi4py examples/mpi.py [--quick]

Planes are drawn by their numbers, so it is the same volume for any number of processes. It grows brighter from the
first plane to the last: what a process would find for its slab alone is not what holds for the whole. `-m mpi4py` has
an error in one process end all of them.
"""

import argparse
import time

import normkit as nk
import normkit.distributed as ndist
import numpy as np
from mpi4py import MPI

CHANNELS, EPS = 4, 1e-5


def plane(k: int, of: int, edge: int) -> np.ndarray:
    """Both x and dy, each of the shape (channels, edge, edge)."""
    drawn = np.random.default_rng(k).standard_normal((2, CHANNELS, edge, edge), np.float32)
    drawn[0] += 100 + 5 * np.float32(k / of)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="planes of 64 x 64, not of 256 x 256")
    edge, planes = (64, 50) if parser.parse_args().quick else (256, 200)
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()

    # Uneven slabs: the first process has the fewest planes.
    cuts = [round(planes * (k / size) ** 1.5) for k in range(size + 1)]
    slab = np.stack([plane(k, planes, edge) for k in range(cuts[rank], cuts[rank + 1])], 2)
    x, dy = (np.ascontiguousarray(a) for a in slab)
    axis = (1, 2, 3)

    times = [time.perf_counter()]
    own = nk.moments(x, axis=axis)
    times.append(time.perf_counter())
    ndist.merge(own, comm)  # the first message of a shape is preceded by one about the shape
    comm.Barrier()  # waiting for the slowest is no part of the message
    times.append(time.perf_counter())
    whole = ndist.merge(own, comm)
    times.append(time.perf_counter())
    rstd = whole.rstd(EPS)
    y = nk.apply(x, whole, rstd, axis=axis)
    sums = ndist.add(nk.backward_sums(dy, x, whole, rstd, axis=axis), comm)
    dx = nk.apply_backward(dy, x, whole, rstd, sums, whole.count, axis=axis)
    times.append(time.perf_counter())

    # The truth, in float64 and two passes over all slabs, and what a normalized array has to be.
    wide = x.astype(np.float64)
    mean = comm.allreduce(wide.sum(axis)) / whole.count
    var = comm.allreduce(((wide - mean[:, None, None, None]) ** 2).sum(axis)) / whole.count
    x_hat = (wide - mean[:, None, None, None]) / np.sqrt(var + EPS)[:, None, None, None]
    error = comm.allreduce(np.abs(y - x_hat).max(initial=0), MPI.MAX)
    no_change = comm.allreduce(dx.sum(axis, dtype=np.float64))  # adding a constant to x changes nothing
    bits = comm.allgather((whole.mean.tobytes(), whole.m2.tobytes(), sums.tobytes()))
    alone = comm.gather((x.shape[1], own.mean[0], own.std()[0]))
    if rank == 0:
        print(f"{planes} planes of {edge} x {edge} with {CHANNELS} channels in {size} processes")
        for k, (count, of_slab, std) in enumerate(alone):
            print(f"  process {k}: {count:4} planes, mean {of_slab:8.4f}, deviation {std:.4f} of the first channel")
        print(f"  the whole:  {planes:4} planes, mean {whole.mean[0]:8.4f}, deviation {whole.std()[0]:.4f}")
        print(f"largest error of y {error:.1e}, sum of dx {np.abs(no_change).max():.1e}")
        print(f"statistics and sums have the same bits in all processes: {len(set(bits)) == 1}")
        passes, _, message, rest = 1e3 * np.diff(times)
        print(f"moments {passes:.1f} ms, a message of {32 * CHANNELS} bytes {message:.2f} ms, the rest {rest:.1f} ms")
        if error > 1e-5 or len(set(bits)) > 1:
            raise SystemExit("the slabs are to be normalized as one, and are not")


if __name__ == "__main__":
    main()
