"""normkit and those it is measured against, each at its best path: to add one, write a class here.

A rival is a subclass of Rival. A method named after an operation and a direction, such as `instance_forward`, makes the
call of a workload: a function of k that normalizes set k and returns what it found, y or (dx, dweight, dbias). What has
no method is left out, and so is a rival that cannot be imported.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import limits
import normkit
import numpy as np
from cases import ACTIVATIONS, HALVES, MASKS, VIEWS, Case
from workload import EPS, Workload

Call = Callable[[int], Any]


def everywhere() -> int:
    """All CPUs that this process may use: the other number of threads that is measured, beside 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Rival:
    """`package` is what has a version; `dtypes`, `options` and `channels_last` are what the methods can do. `threaded`
    tells whether threads help, `lingers` for how many seconds idle threads keep the cores busy after a call, so that
    the limit has to wait; the first call after that is not timed."""

    name: str
    package: str
    dtypes: tuple[str, ...] = ("float32", "float64", *HALVES, "uint8")
    options: tuple[str, ...] = ()
    channels_last = True
    threaded = True
    lingers = 0.0

    def takes(self, case: Case, threads: int) -> bool:
        return (
            hasattr(self, self._method(case))
            and case.dtype in self.dtypes
            and case.option in ("", *self.options)
            and (self.channels_last or not case.channels_last)
            and (self.threaded or threads == 1)
        )

    def prepare(self, w: Workload, threads: int) -> Call:
        return getattr(self, self._method(w.case))(w, threads)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Has calls within the block use so many threads."""
        yield

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def version(self) -> str:
        return f"{self.package} {version(self.package)}"

    def _method(self, case: Case) -> str:
        return f"{case.operation}_{case.direction}"


# ---- normkit -----------------------------------------------------------------------------------------------------


class Normkit(Rival):
    """normkit, which writes into given outputs."""

    name, package = "normkit", "normkit"
    options = (*ACTIVATIONS, *VIEWS, "residual", *MASKS)
    given = True

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        with normkit.num_threads(count):
            yield

    def _out(self, w: Workload) -> list[np.ndarray | None]:
        return w.y if self.given else [None] * w.sets

    def _forward(self, w: Workload, function: Callable, *args: Any, **options: Any) -> Call:
        options |= {"activation": w.case.option} if w.case.option in ACTIVATIONS else {}
        arrays = {"out": self._out(w), "residual": w.residual, "where": w.where}
        given = [{name: a[k] for name, a in arrays.items() if a} for k in range(w.sets)]
        return lambda k: function(w.x[k], *args, w.weight, w.bias, eps=EPS, **given[k], **options)

    def _backward(self, w: Workload, function: Callable, *args: Any, **options: Any) -> Call:
        out = self._out(w)
        return lambda k: function(w.dy[k], w.x[k], *args, w.weight, out=out[k], **options)

    def _saved(self, w: Workload) -> list[np.ndarray]:
        """mean and rstd with the shape that the forward gives them: without the axes they were taken over."""
        return [s.squeeze(w.case.reduced) for s in w.statistics]

    def instance_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, normkit.instance_norm, channel_axis=w.case.channel_axis)

    def group_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, normkit.group_norm, w.case.groups, channel_axis=w.case.channel_axis)

    def layer_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, normkit.layer_norm)

    def rms_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, normkit.rms_norm)

    def batch_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, normkit.batch_norm, training=True, channel_axis=w.case.channel_axis)

    def eval_forward(self, w: Workload, threads: int) -> Call:
        running = {"running_mean": w.running_mean, "running_var": w.running_var}
        return self._forward(w, normkit.batch_norm, **running, channel_axis=w.case.channel_axis)

    def instance_backward(self, w: Workload, threads: int) -> Call:
        return self._backward(w, normkit.instance_norm_backward, *self._saved(w), channel_axis=w.case.channel_axis)

    def group_backward(self, w: Workload, threads: int) -> Call:
        saved = w.case.groups, *self._saved(w)
        return self._backward(w, normkit.group_norm_backward, *saved, channel_axis=w.case.channel_axis)

    def layer_backward(self, w: Workload, threads: int) -> Call:
        return self._backward(w, normkit.layer_norm_backward, *self._saved(w))

    def rms_backward(self, w: Workload, threads: int) -> Call:
        return self._backward(w, normkit.rms_norm_backward, self._saved(w)[1])

    def batch_backward(self, w: Workload, threads: int) -> Call:
        return self._backward(w, normkit.batch_norm_backward, *self._saved(w), channel_axis=w.case.channel_axis)


class NormkitNew(Normkit):
    """normkit, which writes into new outputs, as every rival does that cannot be given any."""

    name = "normkit, new y"
    given = False
    threaded = False  # what differs is the allocator, which threads do not change


# ---- the formulas, for NumPy and jax -----------------------------------------------------------------------------


def two_lines(xp: Any, x: Any, weight: Any, bias: Any, *where: Any, axis: tuple[int, ...], center: bool) -> Any:
    masked = {"where": where[0]} if where else {}
    x = x - x.mean(axis, keepdims=True, **masked) if center else x
    return x / xp.sqrt((x * x).mean(axis, keepdims=True, **masked) + EPS) * weight + bias


def evaluated(xp: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
    return (x - mean) / xp.sqrt(var + EPS) * weight + bias


def gradients(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, axis: tuple[int, ...], center: bool) -> Any:
    x_hat = (x - mean) * rstd
    g = dy * weight
    mean_g = g.mean(axis, keepdims=True) if center else 0
    dx = rstd * (g - mean_g - x_hat * (g * x_hat).mean(axis, keepdims=True))
    rest = tuple(a for a, extent in enumerate(weight.shape) if extent == 1)
    return dx, (dy * x_hat).sum(rest, keepdims=True), dy.sum(rest, keepdims=True)


class Formulas(Rival):
    """What is written above, by `call` of a module that has the interface of NumPy; x seen in blocks."""

    options = MASKS

    def call(self, w: Workload, function: Callable, arrays: list[list], *constants: Any) -> Call:
        raise NotImplementedError

    xp: Any

    def _parameters(self, w: Workload) -> list[np.ndarray]:
        return [p.reshape(w.case.parameters) for p in (w.weight, w.bias)]

    def forward(self, w: Workload, threads: int) -> Call:
        sets = {"axis": w.case.reduced, "center": w.case.operation != "rms"}
        constants = *self._parameters(w), *w.where[:1]
        return self.call(w, lambda x, *p: two_lines(self.xp, x, *p, **sets), [w.x], *constants)

    def eval_forward(self, w: Workload, threads: int) -> Call:
        running = [s.reshape(w.case.parameters) for s in (w.running_mean, w.running_var)]
        xp = self.xp
        return self.call(w, lambda x, *p: evaluated(xp, x, *p), [w.x], *self._parameters(w), *running)

    def backward(self, w: Workload, threads: int) -> Call:
        axis, center = w.case.reduced, w.case.operation != "rms"
        mean, rstd = w.statistics
        weight = self._parameters(w)[0]
        return self.call(w, lambda dy, x, *s: gradients(dy, x, *s, axis, center), [w.dy, w.x], mean, rstd, weight)

    instance_forward = group_forward = layer_forward = rms_forward = batch_forward = forward
    instance_backward = group_backward = layer_backward = rms_backward = batch_backward = backward


class NumPy(Formulas):
    name, package, xp = "NumPy, two lines", "numpy", np
    options = (*VIEWS, *MASKS)
    threaded = False
    dtypes = ("float32", "float64", "float16", "uint8")  # bfloat16 takes many times as long as anything else

    def call(self, w: Workload, function: Callable, arrays: list[list], *constants: Any) -> Call:
        dtype = w.y[0].dtype
        constants = tuple(c if c.dtype == bool else c.astype(dtype) for c in constants)
        seen = [[a.reshape(w.case.blocks) for a in sets] for sets in arrays]
        return lambda k: function(*(sets[k].astype(dtype, copy=False) for sets in seen), *constants)


class Numba(Rival):
    """The loops of loops.py, outputs given; views are copied first, which takes less than loops over their strides.
    Threads share statistics, or with channels last images, and divide none."""

    name, package = "numba", "numba"
    dtypes = ("float32", "float64", "uint8")
    options = (*VIEWS, *MASKS)
    lingers = 0.01

    def __init__(self) -> None:
        import loops
        import numba

        self.loops, self.numba = loops, numba

    def takes(self, case: Case, threads: int) -> bool:
        return super().takes(case, threads) and not (case.groups and case.channels_last)

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        before = self.numba.get_num_threads()
        self.numba.set_num_threads(count)
        yield
        self.numba.set_num_threads(before)

    def _run(self, w: Workload, loop: Callable, seen: Callable, *parameters: np.ndarray) -> Call:
        """The call of loop(x, [where,] *parameters, y), with what `seen` makes of dense arrays."""
        where = [[seen(np.broadcast_to(a, w.case.memory))] for a in w.where] or [[]] * w.sets
        y = [seen(a) for a in w.y]

        def call(k: int) -> np.ndarray:
            loop(seen(np.ascontiguousarray(w.x[k])), *where[k], *parameters, y[k])
            return w.y[k]

        return call

    def group_forward(self, w: Workload, threads: int) -> Call:
        n, c, *_ = w.case.shape
        if w.case.channels_last and c > 3:
            return self._run(w, self.loops.pixels, lambda a: a.reshape(n, -1, c), w.weight, w.bias)
        if w.where:
            return self._run(w, self.loops.masked, lambda a: a.reshape(n, c, -1), w.weight, w.bias)
        groups = w.case.groups or c
        parameters = (p.reshape(groups, -1) for p in (w.weight, w.bias))
        if w.case.channels_last:  # of so few channels planes are faster, at strides
            return self._run(w, self.loops.planes, lambda a: np.moveaxis(a.reshape(n, 1, -1, c), 3, 1), *parameters)
        return self._run(w, self.loops.planes, lambda a: a.reshape(n, groups, c // groups, -1), *parameters)

    instance_forward = group_forward

    def layer_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, self.loops.rows, np.asarray, w.weight, w.bias)


class Jax(Formulas):
    """JAX, compiled. It has a thread for every CPU from the start: for fewer, the process is kept to fewer CPUs."""

    name, package = "jax", "jax"
    dtypes = ("float32", *HALVES, "uint8")

    def __init__(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        self.jax, self.xp = jax, jax.numpy

    def call(self, w: Workload, function: Callable, arrays: list[list], *constants: Any) -> Call:
        jax, dtype = self.jax, self.xp.dtype(w.y[0].dtype)
        given = [jax.numpy.asarray(c) for c in constants]

        @jax.jit
        def compiled(*arrays: Any) -> Any:
            wide = [a.reshape(w.case.blocks).astype(np.float32) for a in arrays[: -len(given)]]
            found = function(*wide, *arrays[-len(given) :])
            first, *rest = found if isinstance(found, tuple) else (found,)
            return first.reshape(w.case.memory).astype(dtype), *rest

        seen = [[jax.numpy.asarray(a) for a in sets] for sets in arrays]
        return lambda k: jax.block_until_ready(compiled(*(sets[k] for sets in seen), *given))

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        tasks = [int(t.name) for t in Path("/proc/self/task").glob("*")] if hasattr(os, "sched_setaffinity") else []
        allowed = os.sched_getaffinity(0) if tasks else set()
        fewer = sorted(allowed)[-count:]

        def keep_to(cpus: Any) -> None:
            for task in tasks:
                if Path(f"/proc/self/task/{task}").exists():
                    os.sched_setaffinity(task, cpus)

        keep_to(fewer)
        try:
            yield
        finally:
            keep_to(allowed)


# ---- frameworks --------------------------------------------------------------------------------------------------


class Torch(Rival):
    """Instance norm is `native_group_norm` with one channel a group, or backward `native_batch_norm_backward` of a
    single image of N * C channels, which leave `F.instance_norm` behind. The `out=` of the native calls is a call and a
    copy, so outputs are new."""

    name, package = "torch", "torch"
    # No stride is negative there.
    options = (*ACTIVATIONS, *(view for view in VIEWS if view not in ("flip", "mirrored")), "residual")
    lingers = 0.01

    def __init__(self) -> None:
        import torch

        self.torch, self.aten = torch, torch.ops.aten

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        before = self.torch.get_num_threads()
        self.torch.set_num_threads(count)
        yield
        self.torch.set_num_threads(before)

    def to_numpy(self, array: Any) -> np.ndarray:
        array = array.detach()
        array = array.permute(0, *range(2, array.ndim), 1) if self._is_last(array) else array
        return (array.float() if array.dtype == self.torch.bfloat16 else array).numpy()

    def _is_last(self, array: Any) -> bool:
        return array.ndim == 4 and not array.is_contiguous() and array.permute(0, 2, 3, 1).is_contiguous()

    def _seen(self, w: Workload, arrays: list[np.ndarray]) -> list[Any]:
        """The arrays as tensors of (N, C, *spatial), whatever the layout."""
        torch, last = self.torch, w.case.channel_axis if w.case.channels_last else None

        def seen(a: np.ndarray) -> Any:
            t = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if w.case.dtype == "bfloat16" else None
            t = torch.from_numpy(a) if t is None else t
            return t if last is None else t.permute(0, last, *range(1, last))

        return [seen(a) for a in arrays]

    def _run(self, function: Callable, arrays: list[list[Any]], *constants: Any) -> Call:
        return lambda k: function(*(sets[k] for sets in arrays), *constants)

    def _forward(self, w: Workload, function: Callable) -> Call:
        """The call of function(x, weight, bias), with what the option of the case adds."""
        arrays, option = [self._seen(w, w.x)], w.case.option
        constants = map(self.torch.from_numpy, (w.weight, w.bias))
        if option in VIEWS:  # which the native calls refuse, and `F.group_norm` copies
            return self._run(lambda x, *p: function(x.contiguous().float(), *p), arrays, *constants)
        if w.case.dtype == "uint8":
            return self._run(lambda x, *p: function(x.float(), *p), arrays, *constants)
        if option == "residual":
            arrays.append(self._seen(w, w.residual))
            return self._run(lambda x, residual, *p: function(x + residual, *p), arrays, *constants)
        if option in ACTIVATIONS:
            activation = getattr(self.torch.nn.functional, option)
            return self._run(lambda *a: activation(function(*a)), arrays, *constants)
        return self._run(function, arrays, *constants)

    def _backward(self, w: Workload, function: Callable, *statistics: int) -> Call:
        """The call of function(dy, x, mean, rstd, weight); mean and rstd have the shape `statistics`, or their own."""
        saved = [self.torch.from_numpy(s.reshape(statistics or s.shape)) for s in w.statistics]
        return self._run(function, [self._seen(w, w.dy), self._seen(w, w.x)], *saved, self.torch.from_numpy(w.weight))

    def group_forward(self, w: Workload, threads: int) -> Call:
        n, c, *_ = w.case.shape
        rest = n, c, w.case.elements // (n * c), w.case.groups or c, EPS
        return self._forward(w, lambda x, *p: self.aten.native_group_norm(x, *p, *rest)[0])

    instance_forward = group_forward

    def layer_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, lambda x, *p: self.aten.native_layer_norm(x, p[0].shape, *p, EPS)[0])

    def rms_forward(self, w: Workload, threads: int) -> Call:
        return self._forward(w, lambda x, weight, bias: self.aten.rms_norm(x, weight.shape, weight, EPS).add_(bias))

    def _batch(self, w: Workload, training: bool) -> Call:
        running = [self.torch.from_numpy(s.copy()) for s in (w.running_mean, w.running_var)]
        return self._forward(w, lambda x, *p: self.aten.native_batch_norm(x, *p, *running, training, 0.1, EPS)[0])

    def batch_forward(self, w: Workload, threads: int) -> Call:
        return self._batch(w, True)

    def eval_forward(self, w: Workload, threads: int) -> Call:
        return self._batch(w, False)

    def _batch_backward(self, w: Workload, images: int) -> Call:
        """The gradient of batch norm; `images` of them share the weight, but no statistics."""
        c = w.case.channels
        shape, last = (-1, images * c, *w.case.shape[2:]), (True, EPS, (True, True, True))

        def function(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            dy, x, weight = dy.view(shape), x.view(shape), weight.repeat(images)
            found = self.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, rstd, *last)
            return found[0], *(p.view(images, c).sum(0) if images > 1 else p for p in found[1:])

        return self._backward(w, function, -1)

    def instance_backward(self, w: Workload, threads: int) -> Call:
        return self._batch_backward(w, w.case.shape[0])

    def batch_backward(self, w: Workload, threads: int) -> Call:
        return self._batch_backward(w, 1)

    def group_backward(self, w: Workload, threads: int) -> Call:
        n, c, *_ = w.case.shape
        rest = n, c, w.case.elements // (n * c), w.case.groups or c, (True, True, True)

        def function(dy: Any, x: Any, *saved: Any) -> Any:
            dx, *parameters = self.aten.native_group_norm_backward(dy, x, *saved, *rest)
            return dx.to(x.dtype), *parameters  # compiled it is float32

        return self._backward(w, function, n, -1)

    def layer_backward(self, w: Workload, threads: int) -> Call:
        def function(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Any:
            rest = weight, weight, (True, True, True)  # for the bias, of which only the shape counts
            return self.aten.native_layer_norm_backward(dy, x, weight.shape, mean, rstd, *rest)

        return self._backward(w, function)

    def rms_backward(self, w: Workload, threads: int) -> Call:
        """The gradient of RMS norm through autograd, which adds some microseconds: there is no native call."""
        dy, x = self._seen(w, w.dy), [t.requires_grad_() for t in self._seen(w, w.x)]
        weight, bias = (self.torch.from_numpy(p).requires_grad_() for p in (w.weight, w.bias))
        y = [self.aten.rms_norm(t, weight.shape, weight, EPS) + bias for t in x]
        return lambda k: self.torch.autograd.grad(y[k], (x[k], weight, bias), dy[k], retain_graph=True)


class TorchIo(Torch):
    """What people normalize volumes with by a mask, `ZNormalization`, less what it does about files."""

    name, package = "torchio", "torchio"
    dtypes, options = ("float32",), ("mask",)

    def __init__(self) -> None:
        super().__init__()
        from torchio import ZNormalization

        self.normalized = ZNormalization.znorm

    def takes(self, case: Case, threads: int) -> bool:
        return super().takes(case, threads) and case.option == "mask"

    def instance_forward(self, w: Workload, threads: int) -> Call:
        return self._run(self.normalized, [self._seen(w, w.x), self._seen(w, w.where)])


class Inductor(Torch):
    """The calls of Torch, compiled from what it takes them apart into: group norm's gradient is the better for it."""

    name = "inductor"

    def __init__(self) -> None:
        super().__init__()
        if not limits.compiler():
            raise ImportError("no C++ compiler")
        from torch import _dynamo
        from torch._inductor import config

        self.config, self.reset = config, _dynamo.reset

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        with super().threads(count), self.config.patch({"cpp.threads": count}):
            yield

    def _run(self, function: Callable, arrays: list[list[Any]], *constants: Any) -> Call:
        self.reset()  # the code of earlier cases, which would count as variants of this
        return super()._run(self.torch.compile(function, dynamic=False), arrays, *constants)

    instance_backward = Torch.group_backward

    def rms_backward(self, w: Workload, threads: int) -> Call:
        return self._backward(w, lambda dy, x, _, rstd, weight: gradients(dy, x, 0, rstd, weight[None], (1,), False))


class OnnxRuntime(Rival):
    """One node, outputs given."""

    name, package = "onnxruntime", "onnxruntime"
    dtypes = ("float32",)
    channels_last = False
    lingers = 0.01

    def __init__(self) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime

    def _run(self, w: Workload, threads: int, operator: str, *more: np.ndarray, **attributes: Any) -> Call:
        helper, ort = self.onnx.helper, self.runtime
        shapes = [("x", w.case.memory), ("y", w.case.memory)]
        x, y = (helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, shape) for name, shape in shapes)
        given = [self.onnx.numpy_helper.from_array(a, str(i)) for i, a in enumerate([w.weight, w.bias, *more])]
        node = helper.make_node(operator, ["x", *(g.name for g in given)], ["y"], epsilon=EPS, **attributes)
        graph = helper.make_graph([node], "norm", [x], [y], given)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        value = ort.OrtValue.ortvalue_from_numpy
        bindings = []
        for k in range(w.sets):
            bindings.append(session.io_binding())
            bindings[k].bind_ortvalue_input("x", value(w.x[k]))
            bindings[k].bind_output("y", "cpu", 0, np.float32, w.y[k].shape, w.y[k].ctypes.data)

        def call(k: int) -> np.ndarray:
            session.run_with_iobinding(bindings[k])
            return w.y[k]

        return call

    def instance_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, threads, "InstanceNormalization")

    def group_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, threads, "GroupNormalization", num_groups=w.case.groups)

    def layer_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, threads, "LayerNormalization")

    def eval_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, threads, "BatchNormalization", w.running_mean, w.running_var)


class OpenVino(Rival):
    """One graph, compiled for float32, outputs given."""

    name, package = "openvino", "openvino"
    dtypes = ("float32",)
    channels_last = False

    def __init__(self) -> None:
        import openvino
        from openvino import opset13

        self.ov, self.ops = openvino, opset13

    def _run(self, w: Workload, threads: int, graph: Callable[[Any], Any]) -> Call:
        ov = self.ov
        x = self.ops.parameter(w.case.memory, np.float32)
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        compiled = ov.compile_model(ov.Model([graph(x)], [x]), "CPU", settings)
        requests = []
        for k in range(w.sets):
            requests.append(compiled.create_infer_request())
            requests[k].set_input_tensor(ov.Tensor(w.x[k], shared_memory=True))
            requests[k].set_output_tensor(ov.Tensor(w.y[k], shared_memory=True))

        def call(k: int) -> np.ndarray:
            requests[k].infer()
            return w.y[k]

        return call

    def _scaled(self, w: Workload, x: Any) -> Any:
        weight, bias = (p.reshape(w.case.parameters) for p in (w.weight, w.bias))
        return self.ops.add(self.ops.multiply(x, self.ops.constant(weight)), self.ops.constant(bias))

    def _normalized(self, w: Workload, threads: int) -> Call:
        axes = self.ops.constant(np.array(w.case.reduced, np.int64))
        return self._run(w, threads, lambda x: self._scaled(w, self.ops.mvn(x, axes, True, EPS, "inside_sqrt")))

    instance_forward = layer_forward = batch_forward = _normalized

    def group_forward(self, w: Workload, threads: int) -> Call:
        p = [self.ops.constant(a) for a in (w.weight, w.bias)]
        return self._run(w, threads, lambda x: self.ops.group_normalization(x, *p, w.case.groups, EPS))

    def rms_forward(self, w: Workload, threads: int) -> Call:
        ops, axis = self.ops, self.ops.constant(np.array([1], np.int64))

        def graph(x: Any) -> Any:
            square = ops.reduce_mean(ops.power(x, np.float32(2)), axis, keep_dims=True)
            return self._scaled(
                w, ops.multiply(x, ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(EPS)))))
            )

        return self._run(w, threads, graph)

    def eval_forward(self, w: Workload, threads: int) -> Call:
        p = [self.ops.constant(a) for a in (w.weight, w.bias, w.running_mean, w.running_var)]
        return self._run(w, threads, lambda x: self.ops.batch_norm_inference(x, *p, EPS))


class OneDnn(Rival):
    """One primitive, outputs given. Instance norm is group norm with one channel a group, or backward batch norm of a
    single image of N * C channels. Group norm's gradient, views and half types but of rows run code that is there for
    reference, at 100 times the limit, and the gradient of RMS norm is that of layer norm: they are left out."""

    name, package = "oneDNN", "onednn"
    dtypes = ("float32", "bfloat16")
    options = ("misaligned",)

    def __init__(self) -> None:
        import onednn

        self.dnn, self.engine = onednn, onednn.Engine()

    def takes(self, case: Case, threads: int) -> bool:
        return super().takes(case, threads) and (case.dtype == "float32" or case.rows)

    def threads(self, count: int) -> AbstractContextManager[None]:
        return self.engine.threads(count)

    def _run(self, w: Workload, kind: str, *own: Any, flags: int = 0, images: int = 1, **statistics: Any) -> Call:
        """`images` of them share the weight, but no statistics."""
        weight, bias = np.tile(w.weight, images), np.tile(w.bias, images)
        forward = w.case.direction == "forward"
        names, arrays = (("src", "dst"), (w.x, w.y)) if forward else (("src", "diff_dst", "diff_src"), (w.x, w.dy, w.y))
        given = {"scale": weight, **statistics}
        gradients = () if forward else (np.empty_like(weight), np.empty_like(weight))
        given |= {"shift": bias} if forward else dict(zip(("diff_scale", "diff_shift"), gradients, strict=True))

        def seen(a: np.ndarray) -> np.ndarray:
            """The array as (N, C, *spatial), whatever the layout."""
            a = np.moveaxis(a, -1, 1) if w.case.channels_last else a
            return a if images == 1 else a.reshape(1, -1, *a.shape[2:])

        sets = [{**dict(zip(names, map(seen, a), strict=True)), **given} for a in zip(*arrays, strict=True)]
        flags |= self.dnn.SCALE | self.dnn.SHIFT
        run = self.engine.normalization(kind, sets, *own, flags=flags, eps=EPS)

        def call(k: int) -> Any:
            run(k)
            return w.y[k], *(g.reshape(images, -1).sum(0) if images > 1 else g for g in gradients)

        return call

    def _saved(self, w: Workload) -> dict[str, np.ndarray]:
        """Statistics as oneDNN wants them: the variance, not rstd."""
        mean, rstd = (s.reshape(-1) for s in w.statistics)
        return {"mean": mean, "variance": (rstd.astype(np.float64) ** -2 - EPS).astype(np.float32)}

    def group_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "group", ctypes.c_int64(w.case.groups or w.case.channels))

    instance_forward = group_forward

    def instance_backward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "batch", images=w.case.shape[0], **self._saved(w))

    def layer_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "layer", None)

    def rms_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "layer", None, flags=self.dnn.RMS)

    def layer_backward(self, w: Workload, threads: int) -> Call:
        saved = self._saved(w)
        return self._run(w, "layer", self.engine.described(saved["mean"]), **saved)

    def batch_forward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "batch")

    def batch_backward(self, w: Workload, threads: int) -> Call:
        return self._run(w, "batch", **self._saved(w))

    def eval_forward(self, w: Workload, threads: int) -> Call:
        running = {"mean": w.running_mean, "variance": w.running_var}
        return self._run(w, "batch", flags=self.dnn.GLOBAL_STATS, **running)


RIVALS = (Normkit, NormkitNew, NumPy, Numba, Torch, Inductor, OnnxRuntime, OneDnn, OpenVino, Jax, TorchIo)


@cache
def available() -> tuple[dict[str, Rival], list[str]]:
    """Rivals that can be imported, by name, and a line about each of the others."""
    found: dict[str, Rival] = {}
    left_out = []
    for rival in RIVALS:
        try:
            found[rival.name] = rival()
        except (ImportError, OSError) as error:
            left_out.append(f"{rival.name} left out: {error}")
    return found, left_out
