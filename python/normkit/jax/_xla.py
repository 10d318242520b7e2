"""A phase of an operation as a call that XLA makes: of the core, without Python, or else by way of Python.

Arrays go by the names that the core has for them: dicts of them are what a call is given and what it gives. Only what
is there is in a dict.
"""

import warnings
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import numpy as jnp

from .. import _core as _typed_core
from .. import functional as core
from .. import phases
from .._memory import dtype_named
from .._operations import Frame, Spec, call_of, stand_in

_core: Any = _typed_core  # it takes any arrays, which no stub can say
Arrays: TypeAlias = dict[str, Any]
RUNNING = ("running_mean", "running_var")


class Call(NamedTuple):
    """All of a call that is no array."""

    phase: str  # forward, backward, or moments
    spec: Spec
    wants: tuple[str, ...]  # the outputs, by the names of the core: `out` is y or dx, `sum` is x + residual


# ---- the core's functions ----------------------------------------------------------------------------------------


def _bound(call: Call, arrays: Arrays) -> partial[Any]:
    """The call of the core on arrays of NumPy; running statistics would be updated in place."""
    spec, arrays = call.spec, dict(arrays)
    if call.phase == "moments":
        return partial(phases._moments, **arrays, axis=spec.axes, center=spec.is_centered)
    function, options = call_of(spec, call.phase)
    slopes = arrays.pop("slopes", None)
    more: dict[str, Any] = {} if slopes is None else {"activation": ("prelu", slopes)}
    if call.phase == "forward":
        more |= {"return_stats": "rstd" in call.wants, "return_residual": "sum" in call.wants}
    else:
        more["need"] = tuple("dx" if name == "out" else name for name in call.wants)
        if spec.kind == "uncentered":
            more["mean"] = None
    return partial(function, **arrays, **options, **more)


@lru_cache(1024)
def _described(call: Call, avals: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Any:
    arrays = {name: stand_in(shape, dtype_named(str(dtype))) for name, shape, dtype in avals}
    bound = _bound(call, arrays)
    function: Any = bound.func
    return function._description(*bound.args, **bound.keywords)


def describe(call: Call, arrays: Arrays) -> Any:
    """The numbers that the handler reads, and what has to be packed. Raises what the call itself would raise."""
    return _described(call, tuple((name, a.shape, a.dtype) for name, a in arrays.items()))


# ---- outputs -----------------------------------------------------------------------------------------------------


def compute_dtype(x: Any) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _outputs(call: Call, arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of what a call gives."""
    x, weight = arrays["x"], arrays.get("weight")
    statistics = tuple(Frame(call.spec, x.shape).statistics_shape())
    if call.phase == "moments":
        return {"moments": jax.ShapeDtypeStruct((*statistics, 4), np.float64)}

    def output(name: str) -> jax.ShapeDtypeStruct:
        if name in ("mean", "rstd"):
            return jax.ShapeDtypeStruct(statistics, compute_dtype(x))
        if name in ("dweight", "dbias", "dslopes"):
            param = arrays[name[1:]]
            dtype = param.dtype if name == "dslopes" else compute_dtype(x) if weight is None else weight.dtype
            return jax.ShapeDtypeStruct(param.shape, dtype)
        if name in RUNNING:
            return jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
        is_number = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, x.dtype if is_number else jnp.float32)

    return {name: output(name) for name in call.wants}


# ---- axes of shard_map -------------------------------------------------------------------------------------------


def varying_along(array: Any) -> frozenset[Any]:
    """The axes of a mesh along which an array varies, inside of shard_map."""
    aval = jax.typeof(array)
    mat = getattr(aval, "mat", None)
    found: frozenset[Any] = getattr(aval, "vma", frozenset()) if mat is None else mat.varying
    return found


def vary(array: Any, axes: frozenset[Any]) -> Any:
    missing = tuple(axes - varying_along(array))
    if not missing:
        return array
    return jax.lax.pcast(array, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(array, missing)


def varying_alike(arrays: Arrays, also: frozenset[Any] = frozenset()) -> Arrays:
    """The arrays as if all varied along what one of them varies along: XLA's calls do not mix them."""
    axes = also.union(*map(varying_along, arrays.values()))
    return {name: vary(array, axes) for name, array in arrays.items()} if axes else arrays


# ---- what does not lie as kernels want it ------------------------------------------------------------------------


class _Packed(NamedTuple):
    """An array in the place of an operand: how it is made of that, or that of it. See Temporary in plan.hpp."""

    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    seen: tuple[int, ...]

    @property
    def is_dy(self) -> bool:
        """The operand is dbias, which no kernel writes: dy is added up into it."""
        return not any(self.strides)

    @property
    def order(self) -> list[int]:
        """The axes from the slowest to the fastest."""
        return sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])

    @property
    def lying(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order)

    @property
    def _repeats(self) -> tuple[int, ...]:
        return tuple(axis for axis, extent in enumerate(self.shape) if extent > 1 and self.seen[axis] == 0)

    def pack(self, array: Any) -> Any:
        if array.shape != self.shape:
            repeats = self._repeats
            array = array.reshape([1 if axis in repeats else extent for axis, extent in enumerate(self.shape)])
            array = jnp.broadcast_to(array, self.shape)
        return array.astype(self.dtype).transpose(self.order)

    def unpack(self, array: Any, like: jax.ShapeDtypeStruct) -> Any:
        if self.is_dy:
            array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
        else:
            array = array.transpose([int(axis) for axis in np.argsort(self.order)])
        return array.sum(self._repeats).reshape(like.shape).astype(like.dtype)


# ---- calls -------------------------------------------------------------------------------------------------------

TARGET = f"normkit_{_typed_core.version}"  # its numbers are those of this version


@cache
def _is_known() -> bool:
    """True where XLA takes the handlers; registers them."""
    jax.devices()  # what is registered before there are any is judged when they come
    try:
        for platform, handler in zip(("cpu", "CUDA"), _core.xla_handlers, strict=True):
            jax.ffi.register_ffi_target(TARGET, handler, platform=platform)
    except Exception as error:
        warnings.warn(
            f"normkit.jax calls normkit through Python, which is slow: JAX {jax.__version__} has a foreign function "
            f"interface of a version that this normkit does not know ({error})", stacklevel=2,
        )  # fmt: skip
        return False
    return True


def deviation(style: Any, axis: int, eps: float, dtype: Any) -> tuple[Any, Any]:
    """sqrt(var + eps) and the mean of each channel of each image, from moments in float64."""
    spec = Spec("instance", (axis,), eps=eps)
    call = Call("moments", Frame(spec, style.shape).general(eps), ("moments",))
    if not _is_known():
        statistics = jax.ShapeDtypeStruct(_outputs(call, {"x": style})["moments"].shape[:-1], dtype)

        def by_python(style: Any) -> Any:
            moments = core._moments_of_style(np.asarray(style), axis)
            return moments._deviation(eps).astype(dtype), moments.mean.astype(dtype)

        found: tuple[Any, Any] = jax.pure_callback(by_python, (statistics, statistics), style)
        return found
    with jax.enable_x64(True):  # whatever JAX is told to have
        moments = execute(call, {"x": style})["moments"]
        var = moments[..., 1] / jnp.maximum(moments[..., 2], 1)
        return jnp.sqrt(var + eps).astype(dtype), moments[..., 0].astype(dtype)


def of_images(images: int, statistics: tuple[Any, Any]) -> Arrays:
    """The weight and bias that a style gives so many images."""
    std, mean = statistics
    return {"weight": std[0], "bias": mean[0]} if len(std) == 1 != images else {"weight": std, "bias": mean}


def execute(call: Call, arrays: Arrays) -> Arrays:
    """What the call gives. XLA runs it; nothing here can be differentiated or mapped.

    A style in the place of weight and bias has its own deviation for them, in float64, as `adaptive_instance_norm` has.
    """
    if "style" not in arrays:
        return _execute(call, arrays)
    with jax.enable_x64(True):
        arrays = dict(arrays)
        statistics = deviation(arrays.pop("style"), call.spec.axes[0], call.spec.eps or 0.0, jnp.float64)
        return _execute(call, arrays | of_images(arrays["x"].shape[0], statistics))


def _execute(call: Call, arrays: Arrays) -> Arrays:
    outputs = _outputs(call, arrays)
    numbers, temporaries = describe(call, arrays)
    along = frozenset[Any]().union(*map(varying_along, arrays.values()))
    if arrays["x"].size == 0:
        return {n: arrays[n] if n in RUNNING else jnp.zeros(out.shape, out.dtype) for n, out in outputs.items()}
    if not _is_known():
        return varying_alike(jax.pure_callback(partial(_by_python, call), outputs, arrays), along)
    names = _core.operands
    packed = {names[k]: _Packed(dtype_named(dtype), *lies) for k, dtype, *lies in temporaries}
    given = arrays if "weight" in arrays else arrays | {"weight": jnp.ones((), jnp.float32)}
    inputs = {
        name: packed[name].pack(given[name]) if name in packed else array
        for name, array in given.items()
        if name in arrays or name in packed
    }
    inputs = varying_alike(inputs, along)
    results = {
        name: jax.ShapeDtypeStruct(packed[name].lying, packed[name].dtype) if name in packed else output
        for name, output in outputs.items()
        if name not in packed or not packed[name].is_dy
    }
    found = jax.ffi.ffi_call(
        TARGET, list(results.values()),
        input_output_aliases={[*inputs].index(name): [*results].index(name) for name in RUNNING if name in results},
    )(
        *inputs.values(),
        call=np.array([*numbers, len(inputs), *(names.index(name) for name in (*inputs, *results))], np.int64),
    )  # fmt: skip
    by_name = dict(zip(results, found, strict=True))
    found = {
        name: packed[name].unpack(by_name.get(name, arrays.get("dy")), output) if name in packed else by_name[name]
        for name, output in outputs.items()
    }
    return varying_alike(found, along)


def _by_python(call: Call, arrays: Arrays) -> Arrays:
    arrays = {name: np.array(a) if name in RUNNING else np.asarray(a) for name, a in arrays.items()}
    found = _bound(call, arrays)()
    if call.phase == "moments":
        return {"moments": found[0]}
    order = ["out", "dweight", "dbias", "dslopes"]
    if call.phase == "forward":
        order = [name for name in ("out", "mean", "rstd", "sum") if name in call.wants]
    by_name = dict(zip(order, found if isinstance(found, tuple) else (found,), strict=False))
    return {name: arrays[name] if name in RUNNING else by_name[name] for name in call.wants}
