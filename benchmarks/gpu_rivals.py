"""normkit and those it is measured against on a GPU, each at its best path: to add one, write a class here.

As in rivals.py, a method such as `layer_forward` makes the call of `Sets`: a function of k that normalizes set k. It
returns y and what else a forward leaves, or (dx, dweight, dbias). Who raises is left out of a case, with a line. A
library is imported when its rival is made, so that nobody waits for those that are not asked for.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rivals
from cases import ACTIVATIONS, HALVES, Case
from rivals import Call, Rival
from workload import EPS

FLOATS = ("float32", *HALVES)


class Device(Rival):
    """A rival that uses CuPy's arrays."""

    dtypes = FLOATS

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def arrays_of(self, answer: Any, sets: Any) -> tuple[Any, ...]:
        """Arrays that `sets` computes with, lying as x does."""
        return answer if isinstance(answer, tuple) else (answer,)

    def recorded(self, timer: Any, run: Callable[[], Any]) -> Callable[[], Any]:
        """All that `run` does, as one launch."""
        return timer.recorded(run)

    def release(self) -> None:
        """Gives memory back that nothing lies in."""


class Normkit(Device, rivals.Normkit):
    """normkit, which writes into given outputs, with new statistics."""

    options = ACTIVATIONS

    def _forward(self, w: Any, function: Callable, *args: Any, **options: Any) -> Call:
        if w.case.operation != "eval":
            options["return_stats"] = True
        return super()._forward(w, function, *args, **options)

    def _backward(self, w: Any, function: Callable, *args: Any, **options: Any) -> Call:
        """The call of a backward whose statistics are each set's own, and not those of one set for all."""
        count = 1 if w.case.operation == "rms" else 2
        first = args[:-count]
        saved = [[s.squeeze(w.case.reduced) for s in both][-count:] for both in w.all_statistics]
        out = w.y
        return lambda k: function(w.dy[k], w.x[k], *first, *saved[k], w.weight, out=out[k], **options)

    def _saved(self, w: Any) -> list[Any]:
        return [None, None]  # places for those of each set


# ---- CuPy: what people write without us --------------------------------------------------------------------------


class TwoLines(Device, rivals.Formulas):
    """The formulas in float32, an array of the whole size for each intermediate result."""

    name, package = "cupy", "cupy"
    options = ()

    def __init__(self, xp: Any) -> None:
        self.xp, self.package = xp, xp.__name__

    def version(self) -> str:
        return f"{self.package} {self.xp.__version__}"

    def call(self, w: Any, function: Callable, arrays: list[list], *constants: Any) -> Call:
        def whole(k: int) -> tuple[Any, ...]:
            given = constants if w.case.direction == "forward" else (*w.all_statistics[k], *constants[2:])
            wide = [sets[k].reshape(w.case.blocks).astype(np.float32) for sets in arrays]
            found = function(*wide, *given)
            first, *rest = found if isinstance(found, tuple) else (found,)
            return first.reshape(w.case.memory).astype(w.dtype), *rest

        return whole

    def backward(self, w: Any, threads: int) -> Call:
        axis, center, weight = w.case.reduced, w.case.operation != "rms", self._parameters(w)[0]
        function = rivals.gradients
        return self.call(w, lambda dy, x, *s: function(dy, x, *s, axis, center), [w.dy, w.x], None, None, weight)

    instance_backward = group_backward = layer_backward = rms_backward = batch_backward = backward


class Kernels(Device):
    """A kernel of CuPy for each reduction and one for the rest: what who knows CuPy writes for speed. A reduction finds
    sums, of which the rest takes `share`, one part of all members."""

    name, package = "cupy-kernels", "cupy"

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)

        def reduction(name: str, arguments: str, term: str) -> Any:
            return cupy.ReductionKernel(arguments, "float32 sum", term, "a + b", "sum = a", "0", name)

        x_hat = "((float)x - mean) * rstd"
        gradients = "T dy, T x, float32 mean, float32 rstd"
        self.total = reduction("total", "T x", "(float)x")
        self.squares = reduction(
            "squares", "T x, float32 total, float32 share", "((float)x - total * share) * ((float)x - total * share)"
        )
        self.sum_g = reduction("sum_g", "T dy, float32 weight", "(float)dy * weight")
        self.sum_gx = reduction("sum_gx", f"{gradients}, float32 weight", f"(float)dy * weight * {x_hat}")
        self.dweight = reduction("dweight", gradients, f"(float)dy * {x_hat}")
        self.forwards = cupy.ElementwiseKernel(
            "T x, float32 total, float32 squares, float32 share, float32 eps, float32 weight, float32 bias",
            "T y",
            "y = (T)(((float)x - total * share) * rsqrtf(squares * share + eps) * weight + bias)",
            "normalize",
        )
        self.backwards = cupy.ElementwiseKernel(
            f"{gradients}, float32 weight, float32 sum_g, float32 sum_gx, float32 share",
            "T dx",
            f"dx = (T)(rstd * ((float)dy * weight - (sum_g + {x_hat} * sum_gx) * share))",
            "gradient",
        )

    def version(self) -> str:
        return f"cupy {self.cupy.__version__}"

    def _seen(self, w: Any, *arrays: list[Any]) -> list[list[Any]]:
        return [[a.reshape(w.case.blocks) for a in sets] for sets in arrays]

    def _share(self, w: Any) -> Any:
        return np.float32(np.prod(w.case.statistics) / w.case.elements)

    def forward(self, w: Any, threads: int) -> Call:
        weight, bias = (p.reshape(w.case.parameters) for p in (w.weight, w.bias))
        (x, y), share, over = self._seen(w, w.x, w.y), self._share(w), {"axis": w.case.reduced, "keepdims": True}
        none = self.cupy.zeros((1,) * len(w.case.blocks), np.float32)

        def call(k: int) -> tuple[Any, ...]:
            total = self.total(x[k], **over) if w.case.operation != "rms" else none
            squares = self.squares(x[k], total, share, **over)
            self.forwards(x[k], total, squares, share, np.float32(EPS), weight, bias, y[k])
            return w.y[k], total, squares

        return call

    def backward(self, w: Any, threads: int) -> Call:
        weight, centered = w.weight.reshape(w.case.parameters), w.case.operation != "rms"
        (dy, x, dx), share, over = self._seen(w, w.dy, w.x, w.y), self._share(w), w.case.reduced
        rest = tuple(a for a, extent in enumerate(w.case.parameters) if extent == 1)

        def call(k: int) -> tuple[Any, ...]:
            given = dy[k], x[k], *w.all_statistics[k]
            sum_g = self.sum_g(dy[k], weight, axis=over, keepdims=True) if centered else np.float32(0)
            sum_gx = self.sum_gx(*given, weight, axis=over, keepdims=True)
            self.backwards(*given, weight, sum_g, sum_gx, share, dx[k])
            return w.y[k], self.dweight(*given, axis=rest), self.total(dy[k], axis=rest)

        return call

    instance_forward = group_forward = layer_forward = rms_forward = batch_forward = forward
    instance_backward = group_backward = layer_backward = rms_backward = batch_backward = backward


# ---- PyTorch and what builds on it -------------------------------------------------------------------------------


class Torch(Device):
    """torch.nn.functional, with gradients recorded, so that forward leaves what backward needs."""

    name, package = "torch", "torch"
    options = ACTIVATIONS

    def __init__(self, cupy: Any) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch without CUDA")
        super().__init__(cupy)
        self.torch, self.functional = torch, torch.nn.functional

    def release(self) -> None:
        self.torch.cuda.empty_cache()

    def stream(self) -> Any:
        """CuPy's current one, on which arrays are made and looked at."""
        return self.torch.cuda.ExternalStream(self.cupy.cuda.get_current_stream().ptr)

    def arrays_of(self, answer: Any, sets: Any) -> tuple[Any, ...]:
        def seen(t: Any) -> Any:
            t = t.detach().float()
            if sets.case.channels_last and t.ndim > 2:
                t = t.permute(0, *range(2, t.ndim), 1)
            return self.cupy.from_dlpack(t.contiguous())

        with self.torch.cuda.stream(self.stream()):
            return tuple(seen(t) for t in (answer if isinstance(answer, tuple) else (answer,)) if t is not None)

    def recorded(self, timer: Any, run: Callable[[], Any]) -> Callable[[], Any]:
        cuda, stream = self.torch.cuda, self.stream()
        graph = cuda.CUDAGraph()
        with cuda.stream(stream):
            for _ in range(3):
                run()
            stream.synchronize()
            with cuda.graph(graph, stream=stream):
                kept = run()

        def launch(memory: Any = kept) -> None:
            with cuda.stream(stream):
                graph.replay()

        return launch

    def prepare(self, w: Any, threads: int) -> Call:
        """Prepares on the stream that all happens on: autograd goes back to the stream that forward was on."""
        cuda, stream = self.torch.cuda, self.stream()
        with cuda.stream(stream):
            call = super().prepare(w, threads)

        def on_stream(k: int) -> Any:
            with cuda.stream(stream):
                return call(k)

        return on_stream

    def tensor(self, a: Any) -> Any:
        if a.dtype.name == "bfloat16":
            return self.torch.from_dlpack(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(a)

    def seen(self, w: Any, arrays: list[Any]) -> list[Any]:
        """The arrays as tensors of (N, C, *spatial), whatever the layout."""
        tensors, last = map(self.tensor, arrays), w.case.channel_axis
        if not w.case.channels_last:
            return list(tensors)
        return [t.permute(0, last, *range(1, last)) for t in tensors]

    def params(self, w: Any) -> list[Any]:
        """Weight and bias in the dtype of x, as kernels of rows and groups want them; in float32 where cuDNN works."""
        own = w.case.operation in ("instance", "batch", "eval")
        dtype = self.torch.float32 if own else getattr(self.torch, w.case.dtype)
        return [self.tensor(p).to(dtype).requires_grad_() for p in (w.weight, w.bias)]

    def function(self, w: Any) -> Callable[..., Any]:
        """The function of x, weight and bias that is measured."""
        f, case = self.functional, w.case
        plain = {
            "instance": lambda x, weight, bias: f.instance_norm(x, weight=weight, bias=bias, eps=EPS),
            "group": lambda x, *p: f.group_norm(x, case.groups, *p, EPS),
            "layer": lambda x, *p: f.layer_norm(x, p[0].shape, *p, EPS),
            "rms": lambda x, weight, bias: f.rms_norm(x, weight.shape, weight, EPS) + bias,
            "batch": lambda x, *p: f.batch_norm(x, None, None, *p, True, 0.1, EPS),
        }[case.operation]
        return (lambda *a: getattr(f, case.option)(plain(*a))) if case.option else plain

    def forward(self, w: Any, threads: int) -> Call:
        x, params, function = self.seen(w, w.x), self.params(w), self.function(w)
        return lambda k: function(x[k], *params)

    def backward(self, w: Any, threads: int) -> Call:
        dy, x = self.seen(w, w.dy), [t.requires_grad_() for t in self.seen(w, w.x)]
        params, function = self.params(w), self.function(w)
        y = [function(t, *params) for t in x]
        return lambda k: self.torch.autograd.grad(y[k], (x[k], *params), dy[k], retain_graph=True)

    instance_forward = group_forward = layer_forward = rms_forward = batch_forward = forward
    instance_backward = group_backward = layer_backward = rms_backward = batch_backward = backward


class Inductor(Torch):
    """The calls of Torch, compiled; instance norm from its formula, as the call of cuDNN would stay what it is."""

    name = "inductor"

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        from torch import _dynamo
        from torch._functorch import config

        self.reset, config.donated_buffer = _dynamo.reset, False  # gradients are taken more than once

    def params(self, w: Any) -> list[Any]:
        return [self.tensor(p).requires_grad_() for p in (w.weight, w.bias)]

    def formula(self, w: Any) -> Callable[..., Any]:
        torch, n, axis = self.torch, len(w.case.shape), tuple(range(2, len(w.case.shape)))

        def function(x: Any, weight: Any, bias: Any) -> Any:
            over = axis if w.case.operation == "instance" else (0, *axis)
            var, mean = torch.var_mean(x.float(), over, correction=0, keepdim=True)
            shape = (1, -1, *(1 for _ in range(n - 2)))
            y = (x.float() - mean) * torch.rsqrt(var + EPS) * weight.view(shape) + bias.view(shape)
            return y.to(x.dtype)

        return function

    def function(self, w: Any) -> Callable[..., Any]:
        self.reset()
        plain = self.formula(w) if w.case.operation in ("instance", "batch") else super().function(w)
        return self.torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)


class Cudnn(Torch):
    """The graph API, outputs given."""

    name, package = "cudnn", "nvidia-cudnn-frontend"
    options = ()

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        import cudnn

        self.cudnn = cudnn

    def _shaped(self, w: Any, arrays: list[Any]) -> list[Any]:
        """Rows as (rows, columns, 1, 1), volumes with their last axes merged."""
        tensors = self.seen(w, arrays)
        if w.case.rows:
            return [t.view(*t.shape, 1, 1) for t in tensors]
        return [t.flatten(3) if t.ndim > 4 else t for t in tensors]

    def _built(self, w: Any, build: Callable[..., list[tuple[Any, Any]]]) -> Call:
        """`build(graph, k)` gives the tensors of a graph and the memory of set k for each of them."""
        cudnn, calls = self.cudnn, []
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=self.cupy.cuda.get_current_stream().ptr)
        for k in range(w.sets):
            graph = cudnn.pygraph(
                handle=handle,
                intermediate_data_type=cudnn.data_type.FLOAT,
                compute_data_type=cudnn.data_type.FLOAT,
            )
            bound = build(graph, k)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
            space = self.torch.empty(graph.get_workspace_size(), device="cuda", dtype=self.torch.uint8)
            memory, *outputs = bound
            calls.append((graph, dict(memory), space, tuple(outputs)))

        def call(k: int) -> tuple[Any, ...]:
            graph, memory, space, outputs = calls[k]
            graph.execute(memory, space, handle=handle)
            return outputs

        return call

    def _name(self, w: Any) -> str:
        return {"instance": "instancenorm", "layer": "layernorm", "rms": "rmsnorm"}[w.case.operation]

    def _parameter(self, p: Any) -> Any:
        return self.tensor(p).view(1, -1, 1, 1)

    def _result(self, tensor: Any, memory: Any) -> tuple[Any, Any]:
        tensor.set_output(True).set_data_type(memory.dtype)
        return tensor, memory

    def forward(self, w: Any, threads: int) -> Call:
        torch, x, y = self.torch, self._shaped(w, w.x), self._shaped(w, w.y)
        scale, bias = map(self._parameter, (w.weight, w.bias))
        eps = torch.full((1, 1, 1, 1), EPS)
        kept = (x[0].shape[0], x[0].shape[1] if w.case.operation == "instance" else 1, 1, 1)

        def build(graph: Any, k: int) -> Any:
            given = [(graph.tensor_like(t), t) for t in (x[k], scale, bias, eps)]
            tensors = dict(zip(("input", "scale", "bias", "epsilon"), (t for t, _ in given), strict=True))
            phase = self.cudnn.norm_forward_phase.TRAINING
            found = getattr(graph, self._name(w))(norm_forward_phase=phase, **tensors)
            memory = [y[k], *(torch.empty(kept, device="cuda") for _ in found[1:])]
            made = [self._result(t, m) for t, m in zip(found, memory, strict=True)]
            return [[*given, *made], self.seen(w, [w.y[k]])[0], *memory[1:]]

        return self._built(w, build)

    def backward(self, w: Any, threads: int) -> Call:
        torch, dy, x, dx = self.torch, *(self._shaped(w, arrays) for arrays in (w.dy, w.x, w.y))
        scale = self._parameter(w.weight)
        kept = (x[0].shape[0], x[0].shape[1] if w.case.operation == "instance" else 1, 1, 1)

        def build(graph: Any, k: int) -> Any:
            saved = dict(zip(("mean", "inv_variance"), map(self.tensor, w.all_statistics[k]), strict=True))
            given = {"grad": dy[k], "input": x[k], "scale": scale, **{n: s.reshape(kept) for n, s in saved.items()}}
            options = {"has_dbias": True} if w.case.operation == "rms" else {}
            if w.case.operation == "rms":
                del given["mean"]
            tensors = {name: graph.tensor_like(t) for name, t in given.items()}
            found = getattr(graph, self._name(w) + "_backward")(**tensors, **options)
            memory = [dx[k], *(torch.empty_like(scale) for _ in found[1:])]
            made = [self._result(t, m) for t, m in zip(found, memory, strict=True)]
            return [[*((tensors[n], given[n]) for n in given), *made], self.seen(w, [w.y[k]])[0], *memory[1:]]

        return self._built(w, build)

    instance_forward = layer_forward = rms_forward = forward
    instance_backward = layer_backward = rms_backward = backward

    def takes(self, case: Case, threads: int) -> bool:
        return case.operation in ("instance", "layer", "rms") and super().takes(case, threads)


class Liger(Torch):
    """The Triton kernels of Liger, called as its autograd functions call them. Its RMS norm has no bias."""

    name, package = "liger", "liger-kernel"
    options = ()
    channels_last = False

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        from liger_kernel.ops import group_norm, layer_norm

        self.group, self.layer = group_norm, layer_norm

    def takes(self, case: Case, threads: int) -> bool:
        return case.operation in ("layer", "group") and super().takes(case, threads)

    def params(self, w: Any) -> list[Any]:
        return [p.detach() for p in super().params(w)]

    def forward(self, w: Any, threads: int) -> Call:
        x, params, case = self.seen(w, w.x), self.params(w), w.case
        if case.operation == "layer":
            return lambda k: self._kept(self.layer.layer_norm_forward(x[k], *params, EPS), (0, 2, 3))
        groups = case.channels, case.groups
        return lambda k: self._kept(self.group.group_norm_forward(x[k], *groups, *params, EPS), (0, 2, 3))

    def _kept(self, found: tuple[Any, ...], which: tuple[int, ...]) -> tuple[Any, ...]:
        return tuple(found[i] for i in which)

    def backward(self, w: Any, threads: int) -> Call:
        dy, x, params, case = self.seen(w, w.dy), self.seen(w, w.x), self.params(w), w.case
        forward = self.forward(w, threads)
        saved = [forward(k)[1:] for k in range(w.sets)]
        if case.operation == "layer":
            return lambda k: self.layer.layer_norm_backward(dy[k], x[k], *params, *saved[k])
        groups = case.channels, case.groups
        return lambda k: self.group.group_norm_backward(dy[k], x[k], *params, *saved[k], *groups)

    group_forward = layer_forward = forward
    group_backward = layer_backward = backward


class Quack(Torch):
    """Rows of RMS norm and layer norm, with float32 weights. It has no gradient of layer norm."""

    name, package = "quack", "quack-kernels"
    options = ()
    dtypes = HALVES

    def __init__(self, cupy: Any) -> None:
        super().__init__(cupy)
        from quack import rmsnorm

        self.quack = rmsnorm

    def takes(self, case: Case, threads: int) -> bool:
        has = case.operation == "rms" or (case.operation, case.direction) == ("layer", "forward")
        return has and super().takes(case, threads)

    def rms_forward(self, w: Any, threads: int) -> Call:
        x, (weight, bias) = self.seen(w, w.x), map(self.tensor, (w.weight, w.bias))
        return lambda k: self.quack.rmsnorm_fwd(x[k], weight, bias=bias, eps=EPS, store_rstd=True)

    def rms_backward(self, w: Any, threads: int) -> Call:
        dy, x, weight = self.seen(w, w.dy), self.seen(w, w.x), self.tensor(w.weight)
        rstd = [self.tensor(s.reshape(-1)) for _, s in w.all_statistics]
        return lambda k: self.quack.rmsnorm_bwd(x[k], weight, dy[k], rstd[k], has_bias=True)[:3]

    def layer_forward(self, w: Any, threads: int) -> Call:
        x, (weight, bias) = self.seen(w, w.x), map(self.tensor, (w.weight, w.bias))
        options = {"bias": bias, "eps": EPS, "return_rstd": True, "return_mean": True}
        return lambda k: self.quack.layernorm_fwd(x[k], weight, **options)


# ---- JAX ---------------------------------------------------------------------------------------------------------


class Jax(TwoLines):
    """XLA, by the clock of the host: it has streams of its own."""

    name, package = "jax", "jax"

    def __init__(self, cupy: Any) -> None:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else it takes three quarters of all memory
        import jax

        if jax.default_backend() != "gpu":
            raise ImportError("jax without CUDA")
        self.jax, self.xp, self.cupy = jax, jax.numpy, cupy

    def prepare(self, w: Any, threads: int) -> Call:
        """Waits until all arrays are written: the streams of JAX do not wait for that of CuPy."""
        call = super().prepare(w, threads)
        self.cupy.cuda.get_current_stream().synchronize()
        return call

    def version(self) -> str:
        return f"jax {self.jax.__version__}"

    def call(self, w: Any, function: Callable, arrays: list[list], *constants: Any) -> Call:
        dtype = self.xp.dtype(w.dtype)

        def of(a: Any) -> Any:
            if a.dtype.name == "bfloat16":
                return self.xp.from_dlpack(a.view(np.int16)).view(self.xp.bfloat16)
            return self.xp.from_dlpack(a)

        @self.jax.jit
        def compiled(wide: Any, given: Any) -> Any:
            found = function(*(a.reshape(w.case.blocks).astype(np.float32) for a in wide), *given)
            first, *rest = found if isinstance(found, tuple) else (found,)
            return first.reshape(w.case.memory).astype(dtype), *rest

        sets = [[of(a[k]) for a in arrays] for k in range(w.sets)]
        if w.case.direction == "forward":
            given = [[of(c) for c in constants]] * w.sets
        else:
            given = [[of(c) for c in (*w.all_statistics[k], *constants[2:])] for k in range(w.sets)]
        return lambda k: compiled(sets[k], given[k])

    def arrays_of(self, answer: Any, sets: Any) -> tuple[Any, ...]:
        return tuple(self.cupy.from_dlpack(a.astype(np.float32)) for a in answer)

    def recorded(self, timer: Any, run: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: self.jax.block_until_ready(run())

    def seconds(self, launch: Callable[[], Any]) -> float:
        start = time.perf_counter()
        self.jax.block_until_ready(launch())
        return time.perf_counter() - start


# All rivals by name, the best known first.
RIVALS = {rival.name: rival for rival in (Normkit, TwoLines, Kernels, Torch, Inductor, Cudnn, Liger, Quack, Jax)}
