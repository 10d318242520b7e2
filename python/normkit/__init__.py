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
from .functional import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    normalize,
    normalize_backward,
    rms_norm,
    rms_norm_backward,
)

__all__ = [
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "cuda_available",
    "get_num_threads",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "isa",
    "isas",
    "layer_norm",
    "layer_norm_backward",
    "normalize",
    "normalize_backward",
    "num_threads",
    "rms_norm",
    "rms_norm_backward",
    "set_num_threads",
    "show_config",
    "use_isa",
]
