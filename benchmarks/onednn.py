"""The normalizations of oneDNN, which speaks C alone: the library that `pip install onednn` brings, through ctypes."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

# The libraries it wants lie beside it, where the loader does not look: loaded before, in this order, they are there.
LIBRARIES = ("libintlc.so.5", "libimf.so", "libirng.so", "libsvml.so", "libtbb.so.12", "libsycl.so.9", "libdnnl.so.3")

CPU, IN_ORDER = 1, 1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
GLOBAL_STATS, SCALE, SHIFT, RMS = 1, 2, 4, 32
ARGUMENTS = {"src": 1, "dst": 17, "mean": 49, "variance": 50, "scale": 51, "shift": 52}
ARGUMENTS |= {"diff_src": 129, "diff_dst": 145, "diff_scale": 255, "diff_shift": 256}
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
UNIMPLEMENTED = 3

Array = np.ndarray


class Argument(ctypes.Structure):
    _fields_ = (("name", ctypes.c_int), ("memory", ctypes.c_void_p))


class GlobalControl(ctypes.Structure):
    """oneTBB's global_control, whose constructor is these three and a call; parameter 0 is the most threads."""

    _fields_ = (("value", ctypes.c_size_t), ("reserved", ctypes.c_ssize_t), ("parameter", ctypes.c_int))


class Engine:
    """An engine of oneDNN on the CPU, which SYCL reaches through OpenCL: its driver is beside the library as well."""

    def __init__(self) -> None:
        folder = next(f.locate().resolve().parent for f in metadata.files("onednn") or () if f.name == LIBRARIES[-1])
        os.environ.setdefault("OCL_ICD_FILENAMES", str(folder / "libintelocl.so"))
        libraries = {name: ctypes.CDLL(str(folder / name)) for name in LIBRARIES}
        self._dnnl, self._tbb = libraries["libdnnl.so.3"], libraries["libtbb.so.12"]
        self._engine = self._made("dnnl_engine_create", CPU, ctypes.c_size_t(0))
        self._stream = self._made("dnnl_stream_create", self._engine, IN_ORDER)

    def _made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Lives until the process ends."""
        made = ctypes.c_void_p()
        status = getattr(self._dnnl, function)(ctypes.byref(made), *arguments)
        if status == UNIMPLEMENTED:
            raise NotImplementedError(function)
        if status:
            raise OSError(f"{function}: status {status}")
        return made

    def described(self, array: Array) -> ctypes.c_void_p:
        extents = ctypes.c_int64 * array.ndim
        strides = extents(*(stride // array.itemsize for stride in array.strides))
        shape = array.ndim, extents(*array.shape), DTYPES[array.dtype.name], strides
        return self._made("dnnl_memory_desc_create_with_strides", *shape)

    def normalization(self, kind: str, sets: list[dict[str, Array]], *own: Any, flags: int, eps: float) -> Callable:
        """A function of k that runs on the k-th set of named arrays. `own` is what this kind alone has."""
        x = self.described(sets[0]["src"])
        backward, create = "diff_src" in sets[0], f"dnnl_{kind}_normalization_%s_primitive_desc_create"
        rest = *own, ctypes.c_float(eps), flags
        plan = self._made(create % "forward", self._engine, TRAINING if backward else INFERENCE, x, x, *rest, None)
        if backward:
            plan = self._made(create % "backward", self._engine, BACKWARD, x, x, x, *rest, plan, None)
        primitive = self._made("dnnl_primitive_create", plan)

        def memory(array: Array) -> ctypes.c_void_p:
            pointer = ctypes.c_void_p(array.ctypes.data)
            return self._made("dnnl_memory_create", self.described(array), self._engine, pointer)

        arguments = [[Argument(ARGUMENTS[name], memory(a).value) for name, a in arrays.items()] for arrays in sets]
        packed = [(Argument * len(a))(*a) for a in arguments]
        execute, wait, stream = self._dnnl.dnnl_primitive_execute, self._dnnl.dnnl_stream_wait, self._stream

        def call(k: int, sets: Any = sets) -> None:  # whose memory the arguments point to
            if execute(primitive, stream, len(packed[k]), packed[k]) or wait(stream):
                raise OSError(f"{kind} normalization failed")

        return call

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        control = ctypes.byref(GlobalControl(count, 0, 0))
        self._tbb._ZN3tbb6detail2r16createERNS0_2d114global_controlE(control)
        yield
        self._tbb._ZN3tbb6detail2r17destroyERNS0_2d114global_controlE(control)
