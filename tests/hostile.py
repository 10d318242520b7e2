"""Capsules of DLPack, field by field: those that no library would make, too."""

import ctypes
from typing import Any

import numpy as np

CPU = 1
CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
POINTER, KEEP = ctypes.c_void_p, ctypes.pythonapi


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", POINTER),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", POINTER),
        ("strides", POINTER),
        ("byte_offset", ctypes.c_uint64),
    )


class Managed(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", POINTER), ("deleter", POINTER))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", POINTER),
        ("deleter", POINTER),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


LENT: dict[int, tuple[Any, ...]] = {}  # by the address of what was exported: whose it is, and what it points to


# A function that lives as long as the process: one that belonged to a Producer could be collected before it is called.
@ctypes.CFUNCTYPE(None, POINTER)
def give_back(address: int) -> None:
    LENT.pop(address)[0].deleted += 1


new_capsule = KEEP.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (POINTER, ctypes.c_char_p, POINTER)


class Producer:
    """Exports `values`, but for the fields of the tensor that are given otherwise.

    `deleted` counts how often what it exported was given back.
    """

    def __init__(
        self, values: np.ndarray, *, versioned: bool = True, major: int = 1, flags: int = 0, name: bytes | None = None,
        device: tuple[int, int] = (CPU, 0), strides: Any = ..., shape: Any = ..., **fields: Any,
    ) -> None:  # fmt: skip
        self.values, self.device, self.deleted, self.exported = values, device, 0, 0
        self.versioned, self.major, self.flags, self.fields = versioned, major, flags, fields
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")
        self.shape = values.shape if shape is ... else shape
        steps = tuple(step // values.itemsize for step in values.strides)
        self.strides = steps if strides is ... else strides

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        self.exported += 1
        managed = Versioned() if self.versioned else Managed()
        if self.versioned:
            managed.major, managed.flags = self.major, self.flags
        shape, strides = ((ctypes.c_int64 * len(a))(*a) if a is not None else None for a in (self.shape, self.strides))
        address = self.values.__array_interface__["data"][0]
        code = CODES.get(self.values.dtype.kind, 2)
        given = {
            "data": address, "device_type": self.device[0], "device_id": self.device[1], "ndim": len(self.shape),
            "code": code, "bits": 8 * self.values.itemsize, "lanes": 1, "byte_offset": 0,
            "shape": ctypes.addressof(shape), "strides": None if strides is None else ctypes.addressof(strides),
        } | self.fields  # fmt: skip
        for field, value in given.items():
            setattr(managed.tensor, field, value)
        managed.deleter = ctypes.cast(give_back, POINTER)
        lent = ctypes.addressof(managed)
        LENT[lent] = self, managed, shape, strides
        return new_capsule(lent, self.name, None)


def of_library(name: str) -> type:
    """Producers that belong to a library of that name."""
    return type("Array", (), {**vars(Producer), "__module__": name})
