"""A user's script with a mistake in each marked line: type checkers find those marked `found`, running finds all.

What is marked `at run time` has a type that allows it: `why` follows.
"""

import normkit as nk
import numpy as np
import numpy.typing as npt

x = np.random.default_rng(0).random((2, 3, 8)).astype(np.float32)
weight: npt.NDArray[np.float32] = np.ones(3, np.float32)
mask = np.ones((2, 3, 8), np.float32)
y, mean, rstd = nk.instance_norm(x, return_stats=True)
m = nk.moments(x, axis=-1)

nk.instance_norm("x")  # found
nk.instance_norm(x, [1.0, 1.0, 1.0])  # found
nk.instance_norm(x, activation="swish")  # found
nk.instance_norm(x, activation=("relu", 0.1))  # found
nk.instance_norm(x, weight, None, 1e-5)  # found
nk.instance_norm(x, chanel_axis=1)  # found
nk.instance_norm(x, eps="1e-5")  # found
nk.instance_norm(x, momentum=None)  # found
nk.instance_norm(x, out_dtype=np.int8)  # found
nk.instance_norm(x, out=[0.0])  # found
nk.instance_norm(x, where=mask)  # found
nk.instance_norm(x, where=False)  # found
nk.instance_norm(x, running_mean=0.0, running_var=1.0)  # found
nk.instance_norm(x, return_residual=True)  # found
nk.instance_norm_backward(y, x, mean, rstd, need=("dX",))  # found
nk.layer_norm(x, axis=1.5)  # found
nk.group_norm(x)  # found
nk.merge(m, m)  # found
y, mean, rstd = nk.instance_norm(x)  # at run time: an array can be unpacked
nk.instance_norm(x.astype(np.complex64))  # at run time: bfloat16 has no type of its own among NumPy's
