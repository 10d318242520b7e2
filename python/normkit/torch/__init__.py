"""normkit inside PyTorch: functions whose gradients PyTorch records, on the CPU and on CUDA.

    import normkit.torch as nt

    y = nt.group_norm(x, 8, weight, bias, activation="silu")  # normkit's name, order and options

They work in torch.compile, torch.export, torch.func and under autocast, and are differentiable twice.
"""

from . import functions
from .functions import *  # noqa: F403 - every function, as listed there

__all__ = [*functions.__all__]
