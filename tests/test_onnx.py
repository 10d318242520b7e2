"""The node tests that ONNX ships, run through normkit: what a runtime would have to write for each of its operators."""

import importlib
import math
import pkgutil
import warnings
from types import SimpleNamespace

import normkit
import numpy as np
import pytest
from bounds import UNIT

onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
node_tests = pytest.importorskip("onnx.backend.test.case.node", reason="ONNX came without its tests")


def instance_norm(node, x, weight, bias):
    return (normkit.instance_norm(x, weight, bias, eps=node.epsilon),)


def group_norm(node, x, weight, bias):
    """Weights of channels, since opset 21."""
    return (normkit.group_norm(x, node.num_groups, weight, bias, eps=node.epsilon),)


def layer_norm(node, x, weight, bias):
    """`axis` is the first of the normalized axes. The statistics keep them, with an extent of 1."""
    axis = tuple(range(node.axis % x.ndim, x.ndim))
    y, *statistics = normkit.layer_norm(x, weight, bias, axis=axis, eps=node.epsilon, return_stats=True)
    return (y, *(np.expand_dims(s, axis) for s in statistics))


def rms_norm(node, x, weight):
    return (normkit.rms_norm(x, weight, axis=tuple(range(node.axis % x.ndim, x.ndim)), eps=node.epsilon),)


def batch_norm(node, x, weight, bias, mean, var):
    """`momentum` is the share of what was there before, and the running variance is the biased one."""
    if not node.training_mode:
        return (normkit.batch_norm(x, weight, bias, running_mean=mean, running_var=var, eps=node.epsilon),)
    y, now, rstd = normkit.batch_norm(x, weight, bias, training=True, eps=node.epsilon, return_stats=True)
    biased = rstd.astype(np.float64) ** -2 - node.epsilon
    running = (node.momentum * old + (1 - node.momentum) * new for old, new in ((mean, now), (var, biased)))
    return (y, *(r.astype(np.float32) for r in running))


def mean_variance_norm(node, x):
    """ONNX adds 1e-9 to the standard deviation, not to the variance: less than half an ulp of those above 1 / 59, as
    all are here. A constant channel gives 0 by either rule."""
    return (normkit.normalize(x, axis=tuple(node.axes), eps=0.0),)


# How an operator is called, and its members, one row for each statistic.
OPERATORS = {
    "InstanceNormalization": (instance_norm, lambda node, x: x.reshape(x.shape[0] * x.shape[1], -1)),
    "GroupNormalization": (group_norm, lambda node, x: x.reshape(x.shape[0] * node.num_groups, -1)),
    "LayerNormalization": (layer_norm, lambda node, x: x.reshape(math.prod(x.shape[: node.axis % x.ndim]), -1)),
    "RMSNormalization": (rms_norm, lambda node, x: x.reshape(math.prod(x.shape[: node.axis % x.ndim]), -1)),
    "BatchNormalization": (batch_norm, lambda node, x: np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)),
    "MeanVarianceNormalization": (mean_variance_norm, lambda node, x: np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)),
}


def collect():
    """Operator, model, inputs and outputs of every node test; not those of the functions that operators expand to.

    ONNX makes the tests of an operator when its module is imported. All modules take ten seconds, the others'
    pooling most of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"onnx\.backend\.test\.case\.")  # some divide by zero, on purpose
        for module in pkgutil.iter_modules(node_tests.__path__, f"{node_tests.__name__}."):
            if "normalization" in module.name:
                importlib.import_module(module.name)
    for case in node_tests._NodeTestCases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS and "_expanded" not in case.name:
            for inputs, outputs in case.data_sets:
                yield case.name.removeprefix("test_"), case.model, inputs, outputs


CASES = list(collect())


def attributes(model):
    """The attributes of the only node, with the defaults of its opset."""
    (node,), (opset,) = model.graph.node, model.opset_import
    schema = onnx.defs.get_schema(node.op_type, opset.version, node.domain)
    defaults = [a.default_value for a in schema.attributes.values() if a.default_value.name]
    return SimpleNamespace(**{a.name: onnx.helper.get_attribute_value(a) for a in (*defaults, *node.attribute)})


def bounds(operator, rows, inputs, outputs):
    """How far two float32 results may be apart, one bound for each output.

    NumPy, which made the expected ones, adds in eight accumulators: a term meets at most members / 8 + 12 roundings, in
    normkit fewer. So many are in the mean, of numbers of the size of x; seen through 1 / std and the weight they are
    in y. So many are in the variance, twice as many where it is E[x^2] - E[x]^2, of numbers of the size of E[x^2]; half
    of them are in rstd, and in y - bias. Fifteen more of y and of bias stand for all that is done once per element.
    """
    x, *params = inputs
    largest = [np.abs(p).max() for p in params[:2]]
    weight, bias = largest + [1.0, 0.0][len(largest) :]
    roundings = rows.shape[1] / 8 + 12
    square, var = (rows**2).mean(1), rows.var(1)
    one_pass = (square / var).max() if operator == "MeanVarianceNormalization" else 1 / 2
    y = np.abs(outputs[0]).max() + bias
    of_y = (roundings * one_pass + 15) * y + roundings * np.sqrt(square / var).max() * weight
    of_statistics = (max(np.abs(x).max(), np.abs(s).max()) * (roundings + 15) for s in outputs[1:])
    return [2 * UNIT["float32"] * count for count in (of_y, *of_statistics)]


@pytest.mark.parametrize(("model", "inputs", "outputs"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_like_onnx(model, inputs, outputs):
    operator, node = model.graph.node[0].op_type, attributes(model)
    call, members = OPERATORS[operator]
    found = call(node, *inputs)
    limits = bounds(operator, members(node, inputs[0].astype(np.float64)), inputs, outputs)
    for y, expected, limit in zip(found, outputs, limits, strict=True):
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        assert np.abs(y - expected).max() <= limit


def test_every_operator_has_cases():
    """Operators that do more than one thing have cases of each: statistics of layer norm, both modes of batch norm."""
    found = {(model.graph.node[0].op_type, len(outputs)) for _, model, _, outputs in CASES}
    assert {operator for operator, _ in found} == set(OPERATORS)
    assert found >= {("LayerNormalization", 3), ("BatchNormalization", 1), ("BatchNormalization", 3)}
