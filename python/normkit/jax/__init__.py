"""normkit inside JAX: functions for jit, grad, vmap and shard_map, on the CPU and on CUDA.

    import normkit.jax as nj

    y = jax.jit(nj.group_norm, static_argnums=1)(x, 8, weight, bias)  # normkit's names, order and options
    dx = jax.grad(lambda x: nj.layer_norm(x, weight, activation="silu").sum())(x)

All of it is differentiable as often as one likes. Nothing is written to: what running statistics become is returned.
"""

try:
    import jax as _jax  # noqa: F401 - said in words where it is missing
except ImportError as error:
    raise ImportError('normkit.jax needs JAX, which is not installed: pip install "normkit[jax]"') from error

from . import functions
from .functions import *  # noqa: F403 - every function, as listed there

__all__ = [*functions.__all__]
