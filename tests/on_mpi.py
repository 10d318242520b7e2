"""What every process of MPI does for test_distributed.py: mpiexec -n 2 python tests/on_mpi.py [dead | torch]."""

import os
import signal
import sys

import normkit as nk
import normkit.distributed as ndist
import numpy as np
import pytest
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
if "dead" in sys.argv and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)

rng = np.random.default_rng(0)
x = (rng.standard_normal((3, 20)) + 100).astype(np.float32)
dy, weight = rng.standard_normal((3, 20)).astype(np.float32), np.float32([[2], [3], [4]])
cuts = [0, *sorted(rng.integers(0, 20, size - 1)), 20]
own = np.s_[:, cuts[rank] : cuts[rank + 1]]

m = ndist.merge(nk.moments(x[own], axis=1), comm)
rstd = m.rstd(1e-5)
sums = ndist.add(nk.backward_sums(dy[own], x[own], m, rstd, weight, axis=1), comm)
y = nk.apply(x[own], m, rstd, weight, axis=1)
dx = nk.apply_backward(dy[own], x[own], m, rstd, sums, m.count, weight, axis=1)

# All have the same bits.
assert {a.tobytes() for a in comm.allgather(np.stack([m.count, m.mean, m.m2, m.mean_low]))} == {
    np.stack([m.count, m.mean, m.m2, m.mean_low]).tobytes()
}
assert len({a.tobytes() for a in comm.allgather(sums)}) == 1

# In float64, as one has it who has all. Of x in float32, y and dx are of order 10 and some dozen roundings off.
wide = x.astype(np.float64)
x_hat = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
g = dy * weight.astype(np.float64)
expected = g - g.mean(1, keepdims=True) - x_hat * (g * x_hat).mean(1, keepdims=True)
expected /= np.sqrt(wide.var(1, keepdims=True) + 1e-5)
assert np.abs(y - (x_hat * weight)[own]).max(initial=0) < 2e-5
assert np.abs(dx - expected[own]).max(initial=0) < 2e-5

if size > 1:
    for shape in ((3, 5), (4, 5)) if rank else ((4, 5), (3, 5)):
        with pytest.raises(ValueError, match="expected the same in all processes"):
            ndist.merge(nk.moments(np.ones(shape), axis=1), comm)

if "torch" in sys.argv:  # a communicator in the place of a process group
    import normkit.torch as nt
    import torch

    part = torch.from_numpy(x[None, own[0], own[1]].copy()).requires_grad_()
    given = nt.instance_norm(part, torch.from_numpy(weight[:, 0].copy()), process_group=comm)
    given.backward(torch.from_numpy(dy[None, own[0], own[1]].copy()))
    assert given.detach().numpy().tobytes() == y.tobytes()
    assert part.grad.numpy().tobytes() == dx.tobytes()
else:
    assert "torch" not in sys.modules
print("done", flush=True)
