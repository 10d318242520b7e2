"""normkit: normalization of NumPy arrays and DLPack tensors, forward and backward, at the speed of memory."""

from ._config import (
    cuda_available,
    get_num_threads,
    isa,
    isas,
    num_threads,
    set_num_threads,
    show_config,
    use_isa,
)
from ._core import version as __version__
from .functional import instance_norm, instance_norm_backward, normalize, normalize_backward

__all__ = [
    "__version__",
    "cuda_available",
    "get_num_threads",
    "instance_norm",
    "instance_norm_backward",
    "isa",
    "isas",
    "normalize",
    "normalize_backward",
    "num_threads",
    "set_num_threads",
    "show_config",
    "use_isa",
]
