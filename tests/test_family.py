"""What the named normalizations add to normalize(): running statistics, groups, defaults; and PyTorch as a witness."""

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


def close(found, expected):
    """Both sides are float32: each within a hundred roundings of the truth, of numbers of the size of the largest."""
    expected = expected.detach().numpy()
    assert found.dtype == expected.dtype
    assert np.abs(found - expected).max() <= 200 * UNIT["float32"] * max(1.0, np.abs(expected).max())


def test_like_torch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    functional = torch.nn.functional
    x, dy = uniform(rng, SHAPE), uniform(rng, SHAPE)
    channel, last = rng.standard_normal((2, 6)).astype(np.float32), rng.standard_normal((2, 7)).astype(np.float32)

    def compare(ours, backward, theirs, params):
        leaves = [torch.from_numpy(a.copy()).requires_grad_() for a in (x, *params)]
        y, *stats = ours(x, *params)
        expected = theirs(*leaves)
        close(y, expected)
        gradients = torch.autograd.grad(expected, leaves, torch.from_numpy(dy))
        for found, gradient in zip(backward(stats, params[0]), gradients, strict=False):
            close(found, gradient)

    compare(
        lambda x, w, b: normkit.group_norm(x, 3, w, b, return_stats=True),
        lambda stats, w: normkit.group_norm_backward(dy, x, 3, *stats, w),
        lambda x, w, b: functional.group_norm(x, 3, w, b),
        channel,
    )
    compare(
        lambda x, w, b: normkit.layer_norm(x, w, b, return_stats=True),
        lambda stats, w: normkit.layer_norm_backward(dy, x, *stats, w),
        lambda x, w, b: functional.layer_norm(x, (7,), w, b),
        last,
    )
    compare(
        lambda x, w: normkit.rms_norm(x, w, return_stats=True),
        lambda stats, w: normkit.rms_norm_backward(dy, x, *stats, w)[:2],
        lambda x, w: functional.rms_norm(x, (7,), w),
        last[:1],
    )
    ours, theirs = np.ones((2, 6), np.float32), torch.ones((2, 6))
    compare(
        lambda x, w, b: normkit.batch_norm(
            x, w, b, running_mean=ours[0], running_var=ours[1], training=True, return_stats=True
        ),
        lambda stats, w: normkit.batch_norm_backward(dy, x, *stats, w),
        lambda x, w, b: functional.batch_norm(x, theirs[0], theirs[1], w, b, training=True),
        channel,
    )
    close(ours, theirs)
    close(
        normkit.batch_norm(x, *channel, running_mean=ours[0], running_var=ours[1]),
        functional.batch_norm(torch.from_numpy(x), theirs[0], theirs[1], *map(torch.from_numpy, channel)),
    )
