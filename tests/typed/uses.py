"""A user's script without a mistake, with the types that results have."""

from typing import Any, assert_type

import ml_dtypes
import normkit as nk
import numpy as np
import numpy.typing as npt

Arrays = npt.NDArray[Any]


class Dtype:
    is_floating_point: bool = True


class Tensor:
    """A tensor of another library, as far as types go."""

    dtype = Dtype()

    def __dlpack__(self, *, stream: int | None = None) -> object: ...


x = np.random.default_rng(0).random((2, 4, 8)).astype(np.float32)
weight, bias = np.ones((2, 4))
running = np.zeros(4), np.ones(4)

assert_type(nk.instance_norm(x), Arrays)
assert_type(nk.instance_norm(x, weight, bias, eps=0, running_mean=running[0], running_var=running[1]), Arrays)
assert_type(nk.instance_norm(x, return_stats=True), tuple[Arrays, Arrays, Arrays])
assert_type(nk.instance_norm(x, residual=x, return_residual=True), tuple[Arrays, Arrays])
assert_type(
    nk.instance_norm(x, residual=x, return_residual=True, return_stats=True), tuple[Arrays, Arrays, Arrays, Arrays]
)
assert_type(nk.rms_norm(x, return_stats=True), tuple[Arrays, Arrays])
assert_type(nk.normalize(x, axis=-1, return_stats=True), tuple[Arrays, Arrays, Arrays])
assert_type(nk.normalize(x, axis=None, center=False, return_stats=True), tuple[Arrays, Arrays])
assert_type(nk.l2_normalize(x, axis=np.array([1, 2]), return_stats=True), tuple[Arrays, Arrays])
flag = bool(x.sum() > 0)
assert_type(nk.group_norm(x, 2, return_stats=flag), Any)

for data in (x.astype(np.float16), x > 0.5, (100 * x).astype(np.int64), x.astype(ml_dtypes.bfloat16)):
    nk.layer_norm(data, axis=(0, 1), out_dtype=np.float64)
nk.layer_norm(x, out_dtype="bfloat16")
nk.layer_norm(x, out_dtype=float), nk.layer_norm(x, out_dtype=x.dtype), nk.layer_norm(x, out_dtype="f4")
nk.instance_norm(x, where=x > 0, activation="silu"), nk.instance_norm(x, where=True)
nk.group_norm(x, np.int64(2), eps=np.float32(1e-3), channel_axis=np.int8(1), weight_offset=np.float64(1))
nk.batch_norm(x, training=np.True_), nk.instance_norm(x, where=np.True_)
assert_type(nk.instance_norm(x, return_stats=np.bool(flag)), Any)
nk.instance_norm(x, activation=("leaky_relu", 0.2), out=np.empty_like(x))

_, mean, rstd = nk.instance_norm(x, return_stats=True)
assert_type(nk.instance_norm_backward(x, x, mean, rstd, weight), tuple[Arrays, Arrays, Arrays])
dx, dweight, dbias = nk.instance_norm_backward(x, x, mean, rstd, weight, need=["dx"], out=x.copy())
nk.layer_norm_backward(x, x, 0.0, np.float32(1.0))
nk.instance_norm_double_backward(x, None, None, x, x, mean, rstd)
nk.adaptive_instance_norm_backward(x, x, x, mean, rstd, need=("dstyle",))

moments = nk.merge(nk.moments(part, axis=(1, 2)) for part in (x, x))
assert_type(moments, nk.Moments)
nk.apply(x, moments.mean, moments.rstd(), axis=(1, 2)), nk.apply(x, None, 1.0, axis=-1)
nk.Moments(3, 0.5, x).var(np.float32(1)), moments.rstd(np.float64(1e-5))
nk.moments(x, axis=-1, center=np.True_), nk.apply(x, moments, 1.0, axis=(1, 2), weight_offset=np.float32(1))
sums = nk.backward_sums(x, x, mean, rstd, axis=-1)
nk.apply_backward(x, x, mean, rstd, sums, 8, axis=-1)

tensor = Tensor()
assert_type(nk.instance_norm(tensor), Tensor)
assert_type(nk.instance_norm(tensor, return_stats=True), tuple[Tensor, Tensor, Tensor])
assert_type(nk.instance_norm_backward(tensor, tensor, tensor, tensor), tuple[Tensor, Tensor, Tensor])
nk.instance_norm(tensor, tensor, where=tensor, out_dtype=tensor.dtype)
