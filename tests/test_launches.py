"""Launches are counted as they are: arithmetic tells what some kernels must read and write."""

import normkit
import numpy as np
import pytest
from launches import Bytes, recorded
from normkit import _core

pytestmark = pytest.mark.skipif(_core.cuda != "shim", reason="only in a build with NORMKIT_CUDA=shim are bytes counted")
SECTOR = 32  # bytes
WARP = 32  # threads


def aligned(shape, dtype, rng):
    """An array whose sectors are its own."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 2 * SECTOR, np.uint8)
    start = -memory.ctypes.data % SECTOR
    array = memory[start : start + size].view(dtype).reshape(shape)
    array[...] = rng.standard_normal(shape)
    return array


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_a_block_holds(dtype, rng):
    """x once, y once; a row of a whole number of sectors, whose first element all threads ask for once more."""
    x = aligned((6, 4, 32, 64), dtype, rng)
    out = aligned(x.shape, dtype, rng)
    normkit.instance_norm(x, out=out)
    for _ in range(2):  # nothing is left of what was counted before
        with recorded() as launches:
            normkit.instance_norm(x, out=out)
        (one,) = launches
        assert (one.kernel, one.cluster) == ("RunsForward", 1)
        assert one.blocks * one.threads * one.shared_bytes > 0
        assert one.workspace.asked == one.workspace.by_block == Bytes(0, 0)
        assert one.arrays.by_block == one.arrays.once == Bytes(x.nbytes, x.nbytes)
        assert one.arrays.asked == Bytes(x.nbytes + one.blocks * one.threads * x.itemsize, x.nbytes)


def test_a_statistic_that_nobody_holds(rng, monkeypatch):
    """Three launches: two read x, one writes y. 24 bytes a tile and 16 a statistic go through the workspace."""
    monkeypatch.setenv("NORMKIT_SHIM_EXTENT", "plain")
    x, out = (aligned((1, 1, 8 * 8192), np.float32, rng) for _ in range(2))
    with recorded() as launches:
        normkit.instance_norm(x, out=out)
    assert [launch.kernel for launch in launches] == ["RunsForward", "ForwardFinish", "RunsForward"]
    sums, finish, rest = launches
    assert sums.arrays.once == Bytes(x.nbytes, 0)
    assert rest.arrays.once == Bytes(x.nbytes, x.nbytes)
    assert finish.arrays.asked == Bytes(0, 0)
    tiles = sums.blocks
    assert sums.workspace.asked == Bytes(0, 24 * tiles)
    assert finish.workspace.asked == Bytes(24 * tiles, 16)
    assert rest.workspace.asked == Bytes(16 * rest.blocks * WARP, 0)  # one warp of each block
    assert rest.workspace.once == Bytes(SECTOR, 0)


def test_what_blocks_share_is_counted_for_each_and_once(rng):
    """Every row of a layer norm reads all weights and biases."""
    x, out = (aligned((64, 512), np.float32, rng) for _ in range(2))
    weight, bias = (aligned((512,), np.float32, rng) for _ in range(2))
    with recorded() as launches:
        normkit.layer_norm(x, weight, bias, out=out)
    (one,) = launches
    shared = weight.nbytes + bias.nbytes
    assert one.arrays.once == Bytes(x.nbytes + shared, x.nbytes)
    assert one.arrays.by_block == Bytes(x.nbytes + one.blocks * shared, x.nbytes)


def test_sectors_are_whole(rng):
    """Sectors in which an array begins or ends are read as a whole."""
    x = aligned((1, 1, 264), np.float32, rng)[..., 4:260]
    with recorded() as launches:
        normkit.instance_norm(x)
    (one,) = launches
    assert one.arrays.once.loaded == x.nbytes + SECTOR
