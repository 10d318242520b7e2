"""What the named normalizations add to normalize(): running statistics, groups, defaults."""

import normkit
import numpy as np
import pytest
from bounds import UNIT
from cases import lay, uniform

SHAPE = (4, 6, 5, 7)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
@pytest.mark.parametrize("running_dtype", ["float32", "float64"])
def test_batch_norm_keeps_running_statistics(layout, running_dtype, isa, rng):
    x = lay(uniform(rng, SHAPE, offset=3), layout)
    mean, var = rng.uniform(1, 2, (2, 6)).astype(running_dtype)
    wide, members = x.astype(np.float64), x.size // 6
    expected_mean = 0.75 * mean + 0.25 * wide.mean((0, 2, 3))
    expected_var = 0.75 * var + 0.25 * wide.var((0, 2, 3)) * members / (members - 1)
    normkit.batch_norm(x, running_mean=mean, running_var=var, training=True, momentum=0.25)
    # Sums of 140 numbers below 8 are far more exact than one float32 rounding of the result; the store adds another.
    for found, expected in ((mean, expected_mean), (var, expected_var)):
        assert (np.abs(found - expected) <= 16 * UNIT["float32"] * np.abs(expected)).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "crop"])
def test_batch_norm_evaluates_by_running_statistics(layout, isa, rng):
    x = lay(uniform(rng, SHAPE), layout)
    mean, var = rng.uniform(1, 2, (2, 6)).astype(np.float32)
    kept = mean.copy(), var.copy()
    y, used, rstd = normkit.batch_norm(x, running_mean=mean, running_var=var, return_stats=True)
    spread = np.sqrt(var.astype(np.float64) + 1e-5).reshape(6, 1, 1)
    expected = (x.astype(np.float64) - mean.reshape(6, 1, 1)) / spread
    # One rounding each of x - mean, of the scale, of the product.
    assert (np.abs(y - expected) <= 4 * UNIT["float32"] * np.abs(expected)).all()
    assert np.array_equal(used, mean)
    assert np.array_equal(rstd, (1 / spread.ravel()).astype(np.float32))
    assert all(np.array_equal(a, b) for a, b in zip((mean, var), kept, strict=True))


def test_group_norm_between_instance_and_layer(rng):
    """One channel a group is instance norm, one group is layer norm of whole images: one geometry, the same bits."""
    x = uniform(rng, SHAPE)
    assert np.array_equal(normkit.group_norm(x, 6), normkit.instance_norm(x))
    assert np.array_equal(normkit.group_norm(x, 1), normkit.layer_norm(x, axis=(1, 2, 3)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rms_norm_default_eps(dtype, rng):
    x = uniform(rng, SHAPE).astype(dtype)
    eps = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    assert np.array_equal(normkit.rms_norm(x), normkit.rms_norm(x, eps=eps))
    assert not np.array_equal(normkit.rms_norm(x), normkit.rms_norm(x, eps=eps + 1))


def test_only_rms_norm_has_a_default_of_none(rng):
    with pytest.raises(TypeError) as error:
        normkit.layer_norm(uniform(rng, SHAPE), eps=None)
    assert str(error.value) == "eps is None, expected a number that is at least 0"


ERRORS = {
    "groups-do-not-divide": (
        lambda x: normkit.group_norm(x, 4),
        "num_groups is 4, expected a divisor of 6, the channels of x",
    ),
    "no-groups": (lambda x: normkit.group_norm(x, 0), "num_groups is 0, expected a divisor of 6, the channels of x"),
    "layer-weight": (
        lambda x: normkit.layer_norm(x, np.ones(6, np.float32)),
        "weight has shape (6,), expected (7,): the shape of the normalized axes of x",
    ),
    "batch-weight": (
        lambda x: normkit.batch_norm(x, np.ones((4, 6), np.float32), training=True),
        "weight has shape (4, 6), expected (6,): one element per channel of x",
    ),
    "batch-without-statistics": (
        lambda x: normkit.batch_norm(x),
        "training is False, expected running_mean and running_var to normalize with",
    ),
    "batch-of-one": (
        lambda x: normkit.batch_norm(x[:1, :, :1, :1], running_mean=np.zeros(6), running_var=np.ones(6), training=True),
        "x has 1 member per statistic, expected at least 2: running_var takes an unbiased variance",
    ),
    "group-statistics": (
        lambda x: normkit.group_norm_backward(x, x, 3, np.zeros((4, 6)), np.ones((4, 3))),
        "mean has shape (4, 6), expected (4, 3): one element per statistic",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message, rng):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole
        call(uniform(rng, SHAPE))
    assert str(error.value) == message
