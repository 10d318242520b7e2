"""What every call gives, to the last bit, as a record: `python tests/golden.py` compares this build with golden.txt.

A refactoring changes no line of the record, and a change that is meant to changes those that it names: `--record`
writes it anew. A cell is one operation on one layout, dtype and set of options, forward and backward: three digits of a
hash of all results, of their dtypes, shapes and strides. Errors are cells too, by type and message. Digits of one line
belong to one operation, dtype and set of options, and to the layouts in their order.

Nothing here depends on the machine: values are whole numbers of 24 bits made by integer arithmetic, and instruction
sets with a fused multiply-add have the same bits, which is checked. Those without have a record of their own.
"""

import argparse
import base64
import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import normkit
import numpy as np
from activations import ACTIVATIONS, name_of
from cases import DTYPES, INTEGERS, LAYOUTS, Guarded, lay
from reference import OPERATIONS, REGISTRY, Operation, Shape

RECORD = Path(__file__).with_name("golden.txt")
SHAPE = (3, 4, 5, 6)
LARGE = (2, 6, 40, 131)  # several chunks, shared among threads, and what is more than a cache line past each
DIGITS = 3  # of base 64, for each cell
LEFT_OUT = "." * DIGITS
UNFUSED = ("sse4",)  # instruction sets
KINDS = DTYPES | {name: INTEGERS[name] for name in ("uint8", "int16")}


# ---- values ------------------------------------------------------------------------------------------------------


def numbers(seed: int, shape: Shape) -> np.ndarray:
    """Uniform from -1 to 1, multiples of 2**-23 (SplitMix64: Steele, Lea and Flood, 2014)."""
    z = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + np.uint64(seed << 32)
    z *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.int64) - (1 << 23)).reshape(shape) / 2.0**23


def data(seed: int, shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    """An array of numbers about 0.5, or over the range of an integer."""
    dtype, values = np.dtype(dtype), numbers(seed, shape)
    if dtype.kind in "iu":
        return np.floor((values + 1) / 2 * 2.0 ** (8 * dtype.itemsize)).astype(np.int64).astype(dtype)
    return (2 * values + 0.5).astype(dtype)


def shortened(state: Any) -> str:
    return base64.urlsafe_b64encode(state.digest())[:DIGITS].decode()


def digits(results: Any) -> str:
    """Digits of a hash of arrays: of what is in them, and of their dtypes, shapes and strides."""
    state = hashlib.sha256()

    def add(result: Any) -> None:
        if isinstance(result, tuple):
            return [add(item) for item in result] and None
        if result is None:
            return state.update(b"none")
        strides = [s for s, extent in zip(result.strides, result.shape, strict=True) if extent > 1]
        state.update(repr((result.dtype.name, result.shape, strides)).encode())
        values = np.ascontiguousarray(result)
        if values.dtype.kind in "fV":  # a NaN is one, whatever its bits
            values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
        return state.update(values.tobytes())

    add(results)
    return shortened(state)


def outcome(call: Callable[[], Any]) -> str:
    """The digits of its results, or of its error."""
    with np.errstate(all="ignore"):
        try:
            return digits(call())
        except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
            return shortened(hashlib.sha256(f"{type(error).__name__}: {error}".encode()))


# ---- cells of values ---------------------------------------------------------------------------------------------


def both_ways(
    op: Operation, shape: Shape, dtype: Any, layout: str, weight: str | None, wide: str | None = "compute",
    forward: dict | None = None, backward: dict | None = None, shared: dict | None = None,
) -> Any:  # fmt: skip
    """y, statistics and gradients, where the dtype has gradients."""
    x, dy = (lay(data(seed, shape, dtype), layout) for seed in (1, 2))
    compute = np.float64 if dtype == np.float64 else np.float32
    params: list[Any] = [None, None]
    if weight is not None:
        kind = {"compute": compute, "wide": np.float64, "same": dtype}[wide or "compute"]
        params = [np.asarray(data(seed, op.weight_shape(shape, weight), kind)) for seed in (3, 4)]
    forward, backward, shared = ({k: v() for k, v in (given or {}).items()} for given in (forward, backward, shared))
    found = op.statistics(x, weight=params[0], bias=params[1], **forward, **shared)[:3]
    if dtype.kind in "iu":
        return found
    bias = {"bias": params[1]} if "activation" in shared else {}
    return found + op.backward(dy, x, *found[1:], params[0], **bias, **backward, **shared)


def options_of(shape: Shape, dtype: Any, layout: str) -> dict[str, dict]:
    """Sets of options, each as what both_ways() takes."""

    def mask(masked: Shape) -> np.ndarray:
        return numbers(9, masked) > -0.4

    def like(seed: int, at: str = layout) -> np.ndarray:
        return lay(data(seed, shape, dtype), at)

    position = (shape[0], 1, *shape[2:])
    silu = {"activation": lambda: "silu"}
    return {
        "weights": {"weight": "channel"},
        "none": {"weight": None},
        "wide": {"weight": "channel", "wide": "wide"},
        "same": {"weight": "channel", "wide": "same"},
        **{kind: {"weight": kind} for kind in ("conditional", "pixel", "kept", "scalar", "image", "last")},
        "silu": {"weight": "channel", "shared": silu | {"weight_offset": lambda: 1.0}},
        "silu-none": {"weight": None, "shared": silu},
        "leaky": {"weight": "pixel", "shared": {"activation": lambda: ("leaky_relu", 0.25)}},
        "mask": {"weight": "channel", "shared": {"where": lambda: mask(shape)}},
        "mask-position": {"weight": "channel", "shared": {"where": lambda: mask(position)}},
        "mask-channel": {"weight": None, "shared": {"where": lambda: mask((shape[1], 1, 1))} | silu},
        "residual": {
            "weight": "channel",
            "forward": {"residual": lambda: like(5)},
            "backward": {"dresidual": lambda: like(6)},
        },
        "residual-elsewhere": {
            "weight": "channel",
            "forward": {"residual": lambda: like(5, "fortran")},
            "backward": {"dresidual": lambda: like(6, "fortran")},
        },
        "frozen": {"weight": "channel", "backward": {"use_input_stats": lambda: False}},
        "dx": {"weight": "channel", "backward": {"need": lambda: ("dx",)}},
        "dparams": {"weight": None, "backward": {"need": lambda: ("dbias", "dweight")}},
        "out": {
            "weight": "channel",
            "forward": {"out": lambda: Guarded(shape, dtype, "fortran").array},
            "backward": {"out": lambda: Guarded(shape, dtype, "channels-last").array},
        },
        **{f"out-{name}": {"weight": "channel", "forward": {"out_dtype": partial(str, name)}} for name in DTYPES},
    }


FEW = ("weights", "none", "residual", "mask-position")
FULL = tuple(options_of(SHAPE, np.dtype(np.float32), "contiguous"))
HALF = (*FEW, "same", "silu", "pixel", "out-float32", "out-float64")  # of what is converted when it is read


def value_cells(options: tuple[str, ...]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The line, the layout and the call."""
    layouts = [name for name in LAYOUTS if not name.startswith("same-")]
    for op in REGISTRY:
        for name, dtype in KINDS.items():
            for option in options if name in ("float32", "float64") else [o for o in options if o in HALF]:
                if dtype.kind in "iu" and option in ("residual", "same"):
                    continue
                if option in ("conditional", "kept", "scalar", "image", "last") and option not in op.weights(SHAPE):
                    continue
                for layout in layouts:
                    yield (
                        f"{op} {name} {option}",
                        layout,
                        lambda c=(op, SHAPE, dtype, layout), o=option: both_ways(*c, **options_of(*c[1:])[o]),
                    )
            for option in FEW[: 2 if dtype.kind in "iu" else None] if name in ("float32", "float64", "uint8") else ():
                for layout in layouts[:6]:
                    yield (
                        f"{op} {name} {option} large",
                        layout,
                        lambda c=(op, LARGE, dtype, layout), o=option: both_ways(*c, **options_of(*c[1:])[o]),
                    )
    yield from other_cells(layouts)


def running(function: Any, dtype: Any, layout: str, kept: Any, **options: Any) -> Any:
    """y, statistics, and running statistics updated or used."""
    mean, var = data(5, SHAPE[1:2], kept), data(6, SHAPE[1:2], kept) ** 2 + 0.5
    x = lay(data(1, SHAPE, dtype), layout)
    found = function(x, running_mean=mean, running_var=var, momentum=0.25, return_stats=True, **options)
    return (*found, mean, var)


def phases(dtype: Any, layout: str, axis: Any, center: bool) -> Any:
    x, dy = (lay(data(seed, SHAPE, dtype), layout) for seed in (1, 2))
    where, weight, bias = numbers(9, SHAPE[1:]) > -0.5, data(3, (4, 1, 1)), data(4, (4, 1, 1))
    parts = [slice(0, 2), slice(2, None)]
    moments = [normkit.moments(x, axis=axis, center=center, where=w) for w in (where, ~where)]
    m = moments[0].merge(moments[1])
    rstd, options = m.rstd(1e-3), {"axis": axis, "bias": bias, "activation": "gelu", "weight_offset": 0.5}
    sums = normkit.backward_sums(dy, x, m.mean, rstd, weight, where=where, **options)
    dx = [
        normkit.apply_backward(dy, x, m.mean, rstd, sums, count, weight, where=where, dresidual=dy, **options)
        for count in (m.count, 7)
    ]
    ys = [normkit.apply(x, m.mean, rstd, weight, bias, axis=axis, out_dtype=name) for name in (None, "float64")]
    found = (m.count, m.m2, m.var(), m._deviation(0.5), rstd, sums, *dx, *ys)
    return (*found, *normkit.normalize(x[parts[0]], axis=axis, center=center, return_stats=True))


def adaptive(dtype: Any, layout: str) -> Any:
    content, dy, style = (lay(data(k, SHAPE, dtype), layout) for k in (1, 2, 3))
    style = style[:, :, 1:]
    y, mean, rstd = normkit.adaptive_instance_norm(content, style, return_stats=True, activation="elu")
    return (
        (y, mean, rstd)
        if dtype.kind in "iu"
        else (
            *(y, mean, rstd),
            *normkit.adaptive_instance_norm_backward(dy, content, style, mean, rstd, activation="elu"),
        )
    )


def double(op: Operation, dtype: Any, layout: str, weighted: bool, frozen: bool, activation: Any = None) -> Any:
    x, dy, ddx = (lay(data(seed, SHAPE, dtype), layout) for seed in (1, 2, 3))
    dds = [np.asarray(data(seed, op.weight_shape(SHAPE, "channel"))) for seed in (4, 5)]
    weight = np.asarray(data(6, op.weight_shape(SHAPE, "channel"))) if weighted else None
    if not weighted:
        dds = [np.asarray(data(seed, op.absent(SHAPE)[0])) for seed in (4, 5)]
    _, mean, rstd = op.statistics(x)
    options = {"use_input_stats": not frozen, "weight_offset": 0.5 * weighted}
    if activation:
        options |= {"activation": activation, "bias": dds[1]}
    return op.double_backward((ddx, *dds), dy, x, mean, rstd, weight, **options)


def prelu(op: Operation, dtype: Any, layout: str, kind: str) -> Any:
    shape = (1,) if kind == "one" else op.weight_shape(SHAPE, kind)
    shared = {"activation": lambda: ("prelu", np.asarray(data(5, shape)))}
    backward = {"need": lambda: ("dx", "dweight", "dbias", "dslopes")}
    return both_ways(op, SHAPE, dtype, layout, "channel", shared=shared, backward=backward)


def other_cells(layouts: list[str]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    for name, dtype in KINDS.items():
        for layout in layouts:
            for kept in ("float32", "float64"):
                for function, switch in ((normkit.instance_norm, "use_input_stats"), (normkit.batch_norm, "training")):
                    for on in (True, False):
                        call = partial(running, function, dtype, layout, np.dtype(kept), **{switch: on})
                        yield f"{function.__name__} {name} running {kept} {switch}={on}", layout, call
            yield f"adaptive {name}", layout, partial(adaptive, dtype, layout)
            if name not in DTYPES:
                continue
            for kind in ACTIVATIONS:
                shared = {"activation": lambda kind=kind: kind}
                call = partial(both_ways, OPERATIONS["instance"], SHAPE, dtype, layout, "channel", shared=shared)
                yield f"activation {name} {name_of(kind)}", layout, call
            for op in REGISTRY:
                for kind in ("channel", "one"):
                    yield f"prelu {op} {name} {kind}", layout, partial(prelu, op, dtype, layout, kind)
            for axis in (1, (2, 3), (0, 3), (0, 1, 2, 3)):
                for center in (True, False):
                    yield f"phases {name} {axis} {center}", layout, partial(phases, dtype, layout, axis, center)
            for op in REGISTRY:
                for weighted, frozen in ((True, False), (False, False), (True, True)):
                    call = partial(double, op, dtype, layout, weighted, frozen)
                    yield f"double {op} {name} weight={weighted} frozen={frozen}", layout, call
                for kind in ("leaky_relu", "silu"):
                    call = partial(double, op, dtype, layout, True, False, kind)
                    yield f"double {op} {name} {kind}", layout, call


# ---- cells of errors ---------------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "list": lambda: [1.0],
    "string": lambda: "swish",
    "three": lambda: 3,
    "minus-one": lambda: -1,
    "huge": lambda: 10**30,
    "nan": lambda: float("nan"),
    "pair": lambda: ("elu", "1"),
    "empty": lambda: (),
    "strange-shape": lambda: np.ones((7, 11), np.float32),
    "more-axes": lambda: np.ones((1, *SHAPE), np.float32),
    "no-axes": lambda: np.ones((), np.float32),
    "complex": lambda: np.ones(SHAPE, np.complex64),
    "int32": lambda: np.ones(SHAPE, np.int32),
    "int16": lambda: np.ones(SHAPE, np.int16),
    "half": lambda: np.ones(SHAPE, np.float16),
    "big-endian": lambda: np.ones(SHAPE, ">f4"),
    "object": lambda: np.ones(SHAPE, object),
    "masked": lambda: np.ma.masked_array(np.ones(SHAPE, np.float32)),
    "read-only": lambda: np.broadcast_to(np.float32(1), SHAPE),
}
RIGHT: dict[str, Callable[[], Any]] = {
    **{name: lambda: data(1, SHAPE) for name in ("x", "dy", "content", "style", "ddx")},
    "num_groups": lambda: 2,
    "training": lambda: True,
    "sums": lambda: numbers(2, (*SHAPE[:3], 3)),
    "count": lambda: 6,
    "ddweight": lambda: None,
    "ddbias": lambda: None,
    "axis": lambda: -1,
}


def right(function: str, name: str) -> Any:
    if name in ("mean", "rstd", "rnorm"):
        per_channel = function.startswith(("instance", "adaptive"))
        shape = SHAPE[:2] if per_channel else (3, 2) if "group" in function else SHAPE[:3]
        return np.full(SHAPE[1:2] if "batch" in function else shape, 0.5)
    return RIGHT[name]()


def error_cells() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Every argument of every function, of each wrong kind: many are right for some."""
    names = [*normkit.functional.__all__, "moments", "apply", "backward_sums", "apply_backward"]
    for function in sorted(names):
        parameters = inspect.signature(getattr(normkit, function)).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty or p.name == "training"]
        for p in parameters:
            for wrong, make in WRONG.items():

                def call(f: str = function, name: str = p.name, needed: Any = tuple(needed), make: Any = make) -> Any:
                    given = {n: right(f, n) for n in needed} | {name: make()}
                    found = getattr(normkit, f)(**given)
                    return () if isinstance(found, normkit.Moments) else found

                yield f"error {function} {p.name}", wrong, call


# ---- the record --------------------------------------------------------------------------------------------------


def lines_of(cells: Iterator[tuple[str, str, Callable[[], Any]]], part: int = 1) -> dict[str, list[tuple[str, str]]]:
    """One cell in `part` of them, by line."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for k, (line, layout, call) in enumerate(cells):
        lines.setdefault(line, []).append((layout, outcome(call) if k % part == 0 else LEFT_OUT))
    return lines


def found_lines(part: int = 1) -> dict[str, list[tuple[str, str]]]:
    """All of this machine's instruction sets: those with a fused multiply-add once."""
    found: dict[str, list[tuple[str, str]]] = lines_of(error_cells(), part)
    for isa in normkit.isas():
        with normkit.use_isa(isa):
            fused = isa not in UNFUSED
            prefix = "" if fused else "unfused "
            for line, cells in lines_of(value_cells(FULL if fused else FEW[:3]), part).items():
                before = found.setdefault(prefix + line, cells)
                if before != cells:
                    sys.exit(f"{line}: {isa} has other bits than the instruction set before it")
    return found


def read(path: Path) -> dict[str, str]:
    rows = (row.rpartition(": ") for row in path.read_text().splitlines())
    return {line: cells for line, _, cells in rows}


def differences(record: dict[str, str], found: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    """The cells that are not as they were. What could not run here, or was left out, is none."""
    for line, cells in found.items():
        before = record.get(line, "")
        for k, (layout, digits) in enumerate(cells):
            was = before[DIGITS * k : DIGITS * (k + 1)]
            if digits not in (LEFT_OUT, was):
                yield f"{line}, {layout}: {was or 'new'} -> {digits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the record instead")
    parser.add_argument("file", nargs="?", type=Path, default=RECORD)
    options = parser.parse_args()
    if os.environ.get("NORMKIT_TEST_ARRAYS"):
        import mirrored

        mirrored.install(os.environ["NORMKIT_TEST_ARRAYS"])
    found = found_lines()
    if options.record:
        text = "".join(f"{line}: {''.join(digits for _, digits in cells)}\n" for line, cells in found.items())
        options.file.write_text(text)
        return
    changed = list(differences(read(options.file), found))
    print(*changed, f"{sum(map(len, found.values()))} cells, {len(changed)} of them changed", sep="\n")
    sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
