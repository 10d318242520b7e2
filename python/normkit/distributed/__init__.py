"""Statistics of arrays that lie in several processes, of MPI or of torch.distributed: one message for all of them.

    import normkit.distributed as ndist
    from mpi4py import MPI

    comm = MPI.COMM_WORLD  # or a process group of torch.distributed
    whole = ndist.merge(nk.moments(part, axis=0), comm)
    y = nk.apply(part, whole, whole.rstd(1e-5), axis=0)
    sums = ndist.add(nk.backward_sums(dy, part, whole, whole.rstd(1e-5), axis=0), comm)
    dx = nk.apply_backward(dy, part, whole, whole.rstd(1e-5), sums, whole.count, axis=0)

Every process gets what all others have and joins it in the order of their ranks, so that all have the same bits, which
a reduction promises neither in MPI nor in torch.distributed. In PyTorch, the functions and modules of normkit.torch do
this, and their gradients, where they have a `process_group`.
"""

import sys
import weakref
import zlib
from typing import Any

import numpy as np

from .._memory import Memory, views_of
from .._types import Array
from ..phases import Moments

__all__ = ["add", "merge"]

_agreed: dict[int, set[str]] = {}  # of each communicator what all its processes have said alike


def merge(moments: Moments, comm: Any) -> Moments:
    """The moments of the parts of all processes together: `normkit.merge` across processes.

    Parts are merged as pairs of neighbors, these as pairs again, and so on. A message has 32 bytes for each statistic,
    and another of 128 goes before the first of each shape.

    Parameters
    ----------
    moments : Moments
        Those of the part of this process, of the same shape in all of them. A part may be empty.
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup, or the name of such a group
        With MPI, arrays are those of the CPU; with torch.distributed, such as its backend sends, or of the CPU.

    Returns
    -------
    Moments
        Those of the whole, with the same bits in all processes.

    Raises
    ------
    TypeError
        If moments are none.
    ValueError
        In all processes, if their moments do not go together.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments is {moments!r}, expected Moments")
    numbers, memory, centered, twofold = moments._numbers, moments._memory, moments._centered, moments._twofold
    with memory:
        what = f"moments of shape {tuple(numbers.shape[:-1])}, {'' if centered else 'not '}centered"
        whole = _joined(_gathered(numbers, comm, f"{what}{', of float64' * twofold}"), memory, twofold)
    return Moments._of(whole, memory, centered, twofold)


def _joined(parts: Any, memory: Memory, twofold: bool) -> Any:
    """The moments of all parts, which lie along the first axis, merged in pairs, and in pairs of pairs."""
    while len(parts) > 1:
        even = len(parts) // 2 * 2
        merged = memory.merged(parts[0:even:2], parts[1:even:2], twofold)
        parts = memory.xp.concatenate([merged, parts[even:]])
    return parts[0]


def add(sums: Array, comm: Any) -> Any:
    """The sums of all processes together: what `normkit.backward_sums` gives for parts, added in the order of ranks.

    Parameters
    ----------
    sums : any shape, float64
        Of the same shape in all processes. With `backward_sums`, a message has 24 bytes for each statistic.
    comm
        As in `merge`.

    Returns
    -------
    the shape of sums
        Their total, with the same bits in all processes.

    Raises
    ------
    ValueError
        In all processes, if their sums do not have one shape.
    """
    views, memory = views_of(sums=sums)
    with memory:
        own = memory.wide(views["sums"])
        return memory.give_back(_gathered(own, comm, f"sums of shape {tuple(own.shape)}").sum(0))


def _gathered(array: Any, comm: Any, what: str) -> Any:
    """The arrays of all processes in the order of their ranks. `what` has to be the same in all of them."""
    if isinstance(comm, str):
        from torch.distributed.distributed_c10d import _resolve_process_group

        comm = _resolve_process_group(comm)
    torch = sys.modules.get("torch")
    if not hasattr(comm, "Allgather") and not (torch and isinstance(comm, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"comm is {comm!r}, expected a communicator of mpi4py, or a process group of torch.distributed that this "
            "process is in, or the name of one"
        )
    if id(comm) not in _agreed:
        _agreed[id(comm)] = set()
        weakref.finalize(comm, _agreed.pop, id(comm))
    if what not in _agreed[id(comm)]:
        letters: Any = np.frombuffer(what.encode().ljust(128)[:128], np.uint8).copy()
        if not isinstance(array, np.ndarray):
            letters = array.new_tensor(letters).byte()
        said = [bytes(part.tolist()).decode("latin-1").rstrip() for part in _exchanged(letters, comm)]
        # A process for which this is nothing new sends numbers, which may be as many bytes.
        said = [text if text.isascii() and text.isprintable() else "numbers of another call" for text in said]
        other = next((rank for rank, theirs in enumerate(said) if theirs != said[0]), None)
        if other is not None:
            raise ValueError(
                f"process 0 has {said[0]}, process {other} has {said[other]}, expected the same in all processes"
            )
        _agreed[id(comm)].add(what)
    if not isinstance(array, np.ndarray):
        return _exchanged(array, comm)
    # A process that has another shape later sends another mark, or too much. To look at it on a GPU would be to wait.
    mark = float(zlib.crc32(what.encode()))
    parts = _exchanged(np.concatenate([[mark], array.ravel()]), comm)
    if (parts[:, 0] != mark).any():
        raise ValueError(f"another process has something else than {what}, expected the same in all processes")
    return parts[:, 1:].reshape(len(parts), *array.shape)


def _exchanged(array: Any, comm: Any) -> Any:
    is_numpy = isinstance(array, np.ndarray)
    if hasattr(comm, "Allgather"):
        if not is_numpy:
            raise TypeError("arrays are those of a GPU, expected those of the CPU: MPI does not wait for streams")
        parts = np.empty((comm.Get_size(), *array.shape), array.dtype)
        comm.Allgather(np.ascontiguousarray(array), parts)
        return parts
    import torch

    own = torch.as_tensor(array).contiguous()
    tensors = own.new_empty((torch.distributed.get_world_size(comm), *own.shape))
    torch.distributed.all_gather([*tensors], own, group=comm)
    return tensors.numpy() if is_numpy else tensors
