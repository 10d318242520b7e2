"""Every case that is measured: a normalization, a shape, a dtype, a layout, a direction."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
HALVES = ("float16", "bfloat16")
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
ACTIVATIONS = ("relu", "silu")
# What counts in the statistics: the frames of a batch that are no padding, the voxels of a volume within a ball.
MASKS = ("where", "mask")
# Parts of larger arrays, and arrays in another order, by the name of an option: the shape of the array in memory, from
# that of what is seen, and what is seen of it.
VIEWS: dict[str, tuple[Callable[[Shape], Shape], Callable[[Any], Any]]] = {
    "crop": (lambda s: (*s[:-2], s[-2] + 16, s[-1] + 16), lambda a: a[..., 8:-8, 8:-8]),
    "step": (lambda s: (*s[:-1], 2 * s[-1]), lambda a: a[..., ::2]),
    "flip": (lambda s: s, lambda a: a[..., ::-1]),
    "mirrored": (lambda s: s, lambda a: a[..., ::-1, :]),
    "opaque": (lambda s: (*s[:-1], s[-1] + 1), lambda a: a[..., :-1]),  # channels last, without that of transparency
    "swap": (lambda s: (s[0], s[2], s[1], *s[3:]), lambda a: a.swapaxes(1, 2)),
    "misaligned": (
        lambda s: (s[0] + 1, *s[1:]),
        lambda a: a.reshape(-1).view("u1")[1 : 1 + a[1:].nbytes].view(a.dtype).reshape(a[1:].shape),
    ),
}


@dataclass(frozen=True)
class Case:
    """`shape` is (N, C, *spatial), or (rows, members) of layer and RMS norm; channels-last it lies in memory as
    (N, *spatial, C). The properties describe what lies in memory."""

    operation: str  # instance, group, layer, rms, batch, or eval: batch norm by its running statistics
    shape: Shape
    dtype: str = "float32"  # uint8: of x alone, and y is float32
    channels_last: bool = False
    direction: str = "forward"
    groups: int = 0
    option: str = ""  # an activation, residual, a view of x, or a mask
    smoke: bool = False

    def __str__(self) -> str:
        groups = f"-G{self.groups}" if self.groups else ""
        layout = "-last" if self.channels_last else ""
        option = f"-{self.option}" if self.option else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.operation}{groups}{option}-{shape}-{self.dtype}{layout}-{self.direction}"

    @property
    def rows(self) -> bool:
        return self.operation in ("layer", "rms")

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def memory(self) -> Shape:
        """The shape of x in memory."""
        n, c, *spatial = self.shape
        return (n, *spatial, c) if self.channels_last else self.shape

    @property
    def channel_axis(self) -> int:
        return len(self.shape) - 1 if self.channels_last else 1

    @property
    def blocks(self) -> Shape:
        """The shape of x in memory, with the channels split into groups, where there are any."""
        a, shape = self.channel_axis, self.memory
        return (*shape[:a], self.groups, shape[a] // self.groups, *shape[a + 1 :]) if self.groups else shape

    @property
    def reduced(self) -> Shape:
        """The axes of `blocks` that a statistic is taken over."""
        kept = {0, self.channel_axis}
        if self.rows:
            kept = {0}
        elif self.operation in ("batch", "eval"):
            kept = {self.channel_axis}
        return tuple(a for a in range(len(self.blocks)) if a not in kept)

    @property
    def statistics(self) -> Shape:
        """The shape of mean and rstd, broadcasting against `blocks`."""
        return tuple(1 if a in self.reduced else extent for a, extent in enumerate(self.blocks))

    @property
    def parameters(self) -> Shape:
        """The shape of weight and bias, broadcasting against `blocks`."""
        a = 1 if self.rows else self.channel_axis
        own = range(a, a + 2) if self.groups else (a,)
        return tuple(extent if axis in own else 1 for axis, extent in enumerate(self.blocks))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def result_dtype(self) -> str:
        return "float32" if self.dtype == "uint8" else self.dtype

    @property
    def array_bytes(self) -> int:
        """The bytes of x."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def moved_bytes(self) -> int:
        """The fewest that any implementation must move: x and y, perhaps a residual or a mask as well, or dy, x, dx."""
        read = self.array_bytes * (2 if self.direction == "backward" or self.option == "residual" else 1)
        masks = self.elements if self.option == "mask" else 0
        return read + masks + self.elements * ITEM_BYTES[self.result_dtype]


OF_PICTURES = ("mirrored", "opaque")  # of VIEWS
VOLUME = (1, 1, 256, 256, 256)
PICTURES = (8, 3, 512, 512)

FORWARD = [
    Case("instance", (2, 8, 32, 32), smoke=True),
    *(
        Case("instance", shape)
        for shape in (
            (16, 256, 32, 32),
            (8, 64, 128, 128),
            (1, 64, 512, 512),
            (8, 128, 16000),  # audio
            (32, 512, 7, 7),
            (1, 3, 224, 224),
            (2, 32, 96, 96, 96),
            VOLUME,
        )
    ),
    Case("instance", (16, 256, 32, 32), channels_last=True),
    Case("instance", (8, 64, 128, 128), channels_last=True),
    Case("group", (8, 320, 64, 64), groups=32),
    Case("group", (8, 320, 64, 64), groups=32, channels_last=True),
    *(Case(operation, s) for operation in ("layer", "rms") for s in ((4096, 768), (4096, 4096), (65536, 128))),
    *(
        Case(operation, (32, 64, 112, 112), channels_last=last)
        for operation in ("batch", "eval")
        for last in (False, True)
    ),
    Case("batch", (32, 512, 7, 7)),
    Case("eval", (32, 256, 14, 14)),
    Case("eval", (8, 512, 7, 7)),
    Case("instance", (8, 64, 128, 128), "float64"),
    *(Case("instance", shape, dtype) for shape in ((8, 64, 128, 128), VOLUME) for dtype in HALVES),
    *(Case("layer", (4096, 4096), dtype) for dtype in HALVES),
    *(
        Case("group", (8, 320, 64, 64), dtype, groups=32, channels_last=last)
        for last in (False, True)
        for dtype in HALVES
    ),
    *(Case("instance", (8, 64, 128, 128), option=activation) for activation in ACTIVATIONS),
    Case("instance", (32, 512, 7, 7), option="relu"),
    *(Case(*case, option="residual") for case in (("instance", (16, 256, 32, 32)), ("layer", (4096, 768)))),
    Case("instance", (8, 128, 16000), option="where"),
    *(
        Case("instance", (8, 64, 128, 128), option=view, smoke=view == "misaligned")
        for view in VIEWS
        if view not in OF_PICTURES
    ),
    *(Case("instance", PICTURES, "uint8", channels_last=True, option=view) for view in OF_PICTURES),
    *(
        Case("instance", PICTURES, dtype, channels_last=last, smoke=dtype == "uint8")
        for dtype in ("float32", "uint8")
        for last in (False, True)
    ),
    *(Case("instance", (8, channels, 512, 512), channels_last=True) for channels in (1, 2, 4, 8)),
    Case("instance", VOLUME, option="mask", smoke=True),
]

BACKWARD = [
    Case("layer", (256, 256), direction="backward", smoke=True),
    *(
        Case("instance", shape, direction="backward")
        for shape in ((16, 256, 32, 32), (8, 64, 128, 128), (1, 64, 512, 512), VOLUME)
    ),
    *(Case("instance", (8, 64, 128, 128), dtype, direction="backward") for dtype in HALVES),
    Case("group", (8, 320, 64, 64), groups=32, direction="backward"),
    *(Case("batch", shape, direction="backward") for shape in ((32, 64, 112, 112), (32, 512, 7, 7))),
    *(Case("layer", shape, direction="backward") for shape in ((4096, 768), (4096, 4096), (65536, 128))),
    *(Case("rms", shape, direction="backward") for shape in ((4096, 768), (4096, 4096))),
]

# Cases from 1 KB to 1 GB of x and y together.
SIZES = [Case("instance", (64, 1, 2**k)) for k in range(1, 22, 2)]
