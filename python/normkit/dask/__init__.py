"""normkit on dask arrays: lazily, of any chunking, without rechunking or gathering.

    import normkit.dask as nd

    y = nd.instance_norm(x, weight, bias)  # normkit's names, order and options
    nd.normalize(volume, axis=None).to_zarr("standardized.zarr")

x is read once where each statistic lies within a chunk, and else twice; the bits of a result depend on the chunks, not
on who computes them.
"""

try:
    import dask.array as _dask  # noqa: F401 - said in words where it is missing
except ImportError as error:
    raise ImportError('normkit.dask needs dask, which is not installed: pip install "normkit[dask]"') from error

from . import functions
from .functions import *  # noqa: F403 - every function, as listed there

__all__ = [*functions.__all__]
