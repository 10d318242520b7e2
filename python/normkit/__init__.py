"""normkit: normalization of NumPy arrays and DLPack tensors, forward and backward, at the speed of memory."""

from contextlib import suppress as _suppress

# _core imports it unseen, unless it was linked in: by this line tools that freeze programs take it along.
with _suppress(ImportError):
    import nanobind_backend as _nanobind_backend  # type: ignore[import-untyped]  # noqa: F401 - for _core

from . import _config, _documentation, _threadpoolctl, functional  # noqa: F401 - it registers
from ._config import (
    cache_size,
    clear_cache,
    cuda_available,
    get_cache_limit,
    get_num_threads,
    isa,
    isas,
    num_threads,
    set_cache_limit,
    set_num_threads,
    show_config,
    use_isa,
)
from ._core import version as __version__
from .functional import *  # noqa: F403 - every normalization, as listed there
from .phases import Moments, apply, apply_backward, backward_sums, merge, moments

_described = (*functional.__all__, "apply", "apply_backward", "backward_sums", "merge", "moments")
_documentation.complete({name: globals()[name] for name in _described})
_config.check_environment()

__all__ = [
    *functional.__all__,
    "Moments",
    "__version__",
    "apply",
    "apply_backward",
    "backward_sums",
    "cache_size",
    "clear_cache",
    "cuda_available",
    "get_cache_limit",
    "get_num_threads",
    "isa",
    "isas",
    "merge",
    "moments",
    "num_threads",
    "set_cache_limit",
    "set_num_threads",
    "show_config",
    "use_isa",
]
