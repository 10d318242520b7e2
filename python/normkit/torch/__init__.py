"""normkit inside PyTorch: functions and modules whose gradients PyTorch records, on the CPU and on CUDA.

    import normkit.torch as nt

    y = nt.group_norm(x, 8, weight, bias, activation="silu")  # a function: normkit's name, order and options
    norm = nt.GroupNorm(8, 64, activation="silu")             # a module: torch.nn's name and constructor
    print(nt.convert(model))                                  # a model of torch.nn's modules, converted in place

All of it works in torch.compile, torch.export, torch.func and under autocast, and is differentiable twice.
"""

from . import functions, modules
from .convert import Conversion, convert
from .functions import *  # noqa: F403 - every function, as listed there
from .modules import *  # noqa: F403 - every module, as listed there

__all__ = [*functions.__all__, *modules.__all__, "Conversion", "convert"]
