"""A volume larger than memory
==============================

On disk, and larger than the memory of all workers, standardized as a whole.

To run it::

    pip install ".[dask,examples]" distributed zarr
    python examples/zarr_volume.py [--quick] [--output zarr_volume.png]

A microscope's volume has one mean and one deviation, which networks and thresholds want taken out. Two worker processes
with a limit of memory each read it from Zarr, chunk by chunk, once for the statistics and once to write what is
standardized. Beside it stands what is written today, ``(x - x.mean()) / x.std()``: dask keeps each chunk that it has
read until both statistics are known, so it needs the memory of the whole volume, and workers with the limit are killed.
The camera's offset of 10,000 counts also shows what a mean and a deviation in float32 are worth.

.. image:: ../zarr_volume.png
   :alt: A section through the volume, as it was read and standardized
"""

import argparse
import logging
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import normkit.dask as nd
import numpy as np
import zarr
from distributed import Client, KilledWorker, LocalCluster, progress
from matplotlib.figure import Figure
from psutil import Process
from skimage.data import binary_blobs
from tqdm import tqdm

WORKERS, LIMIT = 2, 250  # MB each
OFFSET, CONTRAST, NOISE = 10_000, 3, 1
# No spilling to disk and no pauses: a worker stays below its limit, or it is killed.
STRICT = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.scheduler.allowed-failures": 0,
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "normkit": lambda x: nd.normalize(x, axis=None, eps=0),
    "mean, std": lambda x: (x - x.mean()) / x.std(),
}


def make(path: Path, extent: int, chunk: int) -> tuple[float, float]:
    """Writes cells in the light of a lamp that fades, and returns the mean and the deviation, in float64."""
    volume = zarr.create_array(path, shape=(extent,) * 3, chunks=(chunk,) * 3, dtype="f4", compressors=None)
    rng = np.random.default_rng(0)
    cells = CONTRAST * binary_blobs(chunk, blob_size_fraction=0.15, n_dim=3, volume_fraction=0.3, rng=0)
    count = extent // chunk
    total = squares = 0.0
    for place in tqdm(list(np.ndindex(count, count, count)), desc="making", unit="chunk"):
        fade = np.linspace(place[0], place[0] + 1, chunk)[:, None, None] / count
        noise = NOISE * rng.standard_normal(cells.shape, np.float32)
        values = (OFFSET + (1 - 0.7 * fade) * np.roll(cells, place, (0, 1, 2)) + noise).astype(np.float32)
        volume[tuple(slice(k * chunk, (k + 1) * chunk) for k in place)] = values
        near = values.astype(np.float64) - OFFSET
        total, squares = total + near.sum(), squares + (near**2).sum()
    mean = total / extent**3
    return OFFSET + mean, float(np.sqrt(squares / extent**3 - mean**2))


def peak_megabytes() -> float:
    """Of this process alone: getrusage() begins with that of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def read_bytes() -> int:
    return Process().io_counters().read_chars


def run(way: str, path: Path, out: Path, limit: float | None) -> dict[str, Any]:
    """Standardizes the volume with workers of their own, and says what it took."""
    memory = f"{limit} MB" if limit else None
    with (
        dask.config.set(STRICT),
        LocalCluster(WORKERS, threads_per_worker=1, memory_limit=memory, dashboard_address=":0",
                     silence_logs=logging.CRITICAL) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        x = da.from_zarr(path)
        y = WAYS[way](x)
        target = zarr.create_array(out, shape=y.shape, chunks=y.chunksize, dtype="f4", compressors=None, overwrite=True)
        idle, before = client.run(peak_megabytes), client.run(read_bytes)
        start = time.perf_counter()
        done = client.compute(y.store(target, lock=False, compute=False))
        progress(done, notebook=False)
        try:
            done.result()
        except KilledWorker:
            return {"is_killed": True}
        seconds, peak, after = time.perf_counter() - start, client.run(peak_megabytes), client.run(read_bytes)
        return {
            "is_killed": False,
            "seconds": seconds,
            "peak": max(peak.values()),
            "above": max(peak[worker] - idle[worker] for worker in peak),
            "reads": sum(after[worker] - before[worker] for worker in after) / x.nbytes,
        }


def error(path: Path, out: Path, mean: float, deviation: float, chunk: int) -> float:
    """The largest of the first and the last chunk, in units of the deviation."""
    x, y = zarr.open_array(path, mode="r"), zarr.open_array(out, mode="r")
    corners = [(slice(0, chunk),) * 3, (slice(-chunk, None),) * 3]
    return max(float(np.abs((x[at].astype(np.float64) - mean) / deviation - y[at]).max()) for at in corners)


def draw(path: Path, out: Path, output: str) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, volume, title in zip(figure.subplots(1, 2), (path, out), ("as it was read", "standardized"), strict=True):
        array = zarr.open_array(volume, mode="r")
        picture = axes.imshow(array[:, array.shape[1] // 2][::2, ::2], cmap="gray")
        axes.set(xticks=[], yticks=[], title=title)
        figure.colorbar(picture, ax=axes)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small volume, in seconds, which fits the memory")
    parser.add_argument("--output", default="zarr_volume.png", help="the picture to write (default: %(default)s)")
    arguments = parser.parse_args()
    extent, chunk = (192, 64) if arguments.quick else (768, 128)
    megabytes = 4 * extent**3 / 1e6

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "volume.zarr"), Path(folder, "standardized.zarr")
        mean, deviation = make(path, extent, chunk)
        print(f"{extent}^3 voxels, {megabytes:.0f} MB; {WORKERS} workers of {LIMIT} MB each")
        print(f"mean {mean:.4f}, deviation {deviation:.4f}\n")
        rows = []
        for way, limit in (("mean, std", LIMIT), ("mean, std", None), ("normkit", LIMIT)):
            found = run(way, path, out, limit)
            row = f"{way:10} {f'{limit} MB' if limit else 'no limit':>9} "
            if found["is_killed"]:
                rows.append(f"{row}   killed")
                continue
            found["error"] = error(path, out, mean, deviation, chunk)
            rows.append(row + "{seconds:6.1f} s {reads:5.2f} {peak:7.0f} {above:7.0f} {error:10.1e}".format(**found))
        print(f"\n\n{'':20} {'time':>8} {'reads':>5} {'peak MB':>7} {'of data':>7} {'error':>10}", *rows, sep="\n")
        print("\nreads: bytes read / those of the volume; peak: of a worker; error: the largest, in deviations")
        draw(path, out, arguments.output)
    print(f"wrote {arguments.output}")
    if found["is_killed"] or found["error"] > 1e-5 or found["reads"] > 2.2:
        raise SystemExit("normkit is to stay below the limit, exact, with two reads, and does not")


if __name__ == "__main__":
    main()
