"""What calls take, for type checkers: they see which names, shapes of results and kinds of arrays there are."""

from collections.abc import Collection, Iterable
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias

import numpy as np


class SupportsDLPack(Protocol):
    """An array of any library that speaks DLPack."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...


class OtherDtype(Protocol):
    """A dtype that is not NumPy's, such as torch.float16."""

    @property
    def is_floating_point(self) -> bool: ...


class OtherMask(SupportsDLPack, Protocol):
    """An array of a library other than NumPy that may hold truth values."""

    @property
    def dtype(self) -> np.dtype[np.bool] | OtherDtype: ...


NDArray: TypeAlias = np.ndarray[tuple[Any, ...], np.dtype[Any]]
Array: TypeAlias = NDArray | SupportsDLPack
Integer: TypeAlias = SupportsIndex
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
Flag: TypeAlias = bool | np.bool
Mask: TypeAlias = np.ndarray[tuple[Any, ...], np.dtype[np.bool]] | OtherMask | Literal[True] | np.bool
Statistics: TypeAlias = Array | Number  # a number stands for all of them
Axes: TypeAlias = SupportsIndex | Iterable[SupportsIndex] | None
Named: TypeAlias = Literal[
    "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "elu", "sigmoid", "tanh", "relu6", "hardswish", "mish",
    "softplus",
]  # fmt: skip
Activation: TypeAlias = Named | tuple[Literal["leaky_relu", "elu"], Number] | tuple[Literal["prelu"], Statistics] | None
Gradient: TypeAlias = Literal["dx", "dweight", "dbias", "dslopes"]
Gradients: TypeAlias = tuple[Gradient, ...] | Collection[Gradient]
AdaptiveGradient: TypeAlias = Literal["dcontent", "dstyle"]
AdaptiveGradients: TypeAlias = tuple[AdaptiveGradient, ...] | Collection[AdaptiveGradient]
# NumPy's floating types are taken, no others of its own. Type checkers know bfloat16 of ml_dtypes by its name alone.
Float: TypeAlias = (
    Literal["float32", "float64", "float16", "bfloat16", "f4", "f8", "f2", "<f4", "<f8", "<f2", "f", "d", "e"]
    | type[np.floating[Any]]
    | type[float]
    | np.dtype[Any]
    | OtherDtype
    | None
)
