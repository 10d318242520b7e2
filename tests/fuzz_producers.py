"""Calls on what hostile producers export, at random: `python tests/fuzz_producers.py --seconds 600`.

For a build with the address sanitizer, see CONTRIBUTING.md: what is read or written beside an array ends the process.
Fields are right, a bit off, or anything; what is refused is refused by TypeError or ValueError, and what is not refused
gives what NumPy arrays that lie the same give.
"""

import argparse
import time
from typing import Any

import normkit
import numpy as np
from hostile import Producer

EXTENTS = (0, 1, 1, 2, 3, 4, 5, 17)
# Numbers that no memory has: a lie that could be true cannot be found out.
ODD = {"extent": (-1, 2**62, -(2**63), 2**63 - 1), "stride": (2**62, -(2**63), 2**63 - 1)}
DTYPES = ("f4", "f4", "f4", "f8", "f2", "u1", "i2", "c8", "i8", "?")
FIELDS: dict[str, tuple[Any, ...]] = {
    "ndim": (-1, 0, 65, 2**31 - 1),
    "code": (1, 3, 4, 5, 6, 7, 200),
    "bits": (0, 7, 8, 16, 128, 255),
    "lanes": (0, 2, 65535),
    "data": (None,),
}
CALLS = {
    "instance_norm": ("x", "weight", "bias", "out", "residual", "where"),
    "batch_norm": ("x", "weight", "out", "running_mean", "running_var"),
    "layer_norm": ("x", "weight", "bias", "residual"),
    "normalize": ("x", "weight", "bias", "out", "where"),
    "group_norm": ("x", "weight", "bias"),
    "instance_norm_backward": ("dy", "x", "mean", "rstd", "weight", "bias", "out", "dresidual"),
    "normalize_backward": ("dy", "x", "mean", "rstd", "weight", "where"),
    "moments": ("x", "where"),
    "apply_backward": ("dy", "x", "mean", "rstd", "sums", "count"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "batch_norm": {"training": True},
    "normalize": {"axis": (0, -1)},
    "group_norm": {"num_groups": 1},
    "normalize_backward": {"axis": -1},
    "moments": {"axis": 0},
    "apply_backward": {"axis": -1},
}
REFUSED = (TypeError, ValueError)


def one_of(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def array(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape, in some layout, in memory of its own."""
    dtype = np.dtype(one_of(rng, *DTYPES[:3]) if rng.random() < 0.8 else one_of(rng, *DTYPES))
    steps = [int(one_of(rng, 1, 1, 2)) for _ in shape]
    whole = np.ones([extent * step for extent, step in zip(shape, steps, strict=True)], dtype)
    order = rng.permutation(len(shape)) if rng.random() < 0.3 else np.arange(len(shape))
    whole = whole.transpose(order).copy().transpose(np.argsort(order))
    seen = whole[tuple(slice(None, None, step * int(one_of(rng, 1, 1, 1, -1))) for step in steps)]
    return seen if isinstance(seen, np.ndarray) and seen.shape == shape else np.ones(shape, dtype)


def producer(rng: np.random.Generator, values: np.ndarray) -> tuple[Producer, bool]:
    """A producer that shows `values`, or does not: True where what it says of them is so."""
    options: dict[str, Any] = {"versioned": rng.random() < 0.7, "flags": int(rng.random() < 0.05)}
    if rng.random() < 0.85:
        if rng.random() < 0.2 and values.flags.c_contiguous:
            options["strides"] = None
        return Producer(values, **options), True
    kind = one_of(rng, "field", "field", "extent", "stride", "axes", "capsule", "major")
    if kind == "field":
        name = one_of(rng, *FIELDS)
        options[name] = one_of(rng, *FIELDS[name])
        if options[name] == 16 and values.itemsize == 1:  # a lie that could be true, and is read beside the array
            del options[name]
    elif kind in ("extent", "stride"):
        of = list(values.shape if kind == "extent" else [s // values.itemsize for s in values.strides]) or [1]
        of[int(rng.integers(len(of)))] = int(one_of(rng, *ODD[kind]))
        options["shape" if kind == "extent" else "strides"] = tuple(of)
    elif kind == "axes" and values.size:
        options |= {"shape": (1,) * int(one_of(rng, 9, 33, 64, 65, 200)), "strides": None}
    elif kind == "capsule":
        options["name"] = one_of(rng, b"used_dltensor", b"", b"dltensor_versione")
    elif kind == "major":
        options |= {"versioned": True, "major": 2**32 - 1}
    return Producer(values, **options), False


def shape_of(rng: np.random.Generator, name: str, x: tuple[int, ...], call: str) -> tuple[int, ...]:
    if rng.random() < 0.05:
        return tuple(int(one_of(rng, *EXTENTS)) for _ in range(int(rng.integers(0, 5))))
    if name in ("x", "dy", "out", "residual", "dresidual"):
        return x
    if name in ("mean", "rstd", "count", "sums"):
        kept = x[:2] if call.startswith("instance") else x[:-1]
        return (*kept, 3) if name == "sums" else kept
    if call == "layer_norm":
        return x[-1:]
    return tuple(one_of(rng, x[1:2], x[1:2], x)) if name != "where" else x[-1:]


def one_call(rng: np.random.Generator) -> bool:
    """True where it was not refused."""
    call = one_of(rng, *CALLS)
    x = tuple(int(one_of(rng, *EXTENTS)) for _ in range(int(one_of(rng, 1, 2, 3, 3, 3, 4, 6))))
    given, plain, honest = {}, {}, True
    for name in CALLS[call]:
        if name not in ("x", "dy", "mean", "rstd", "sums", "count") and rng.random() < 0.7:
            continue
        values = array(rng, shape_of(rng, name, x, call))
        if name == "where" and rng.random() < 0.8:
            values = np.asarray(values > 0)
        if name in ("sums", "count"):
            values = np.ones(values.shape)
        given[name], is_honest = producer(rng, values)
        plain[name] = values.copy(order="K") if name in ("out", "running_mean", "running_var") else values
        honest = honest and is_honest and not given[name].flags
    options = OPTIONS.get(call, {})
    function = getattr(normkit, call)
    try:
        found = function(**given, **options)
    except REFUSED:
        return False
    if honest:
        expected = function(**plain, **options)
        for f, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
            f = f.values if isinstance(f, Producer) else f
            assert isinstance(f, normkit.Moments) or f is e is None or f.tobytes() == e.tobytes(), (call, x)
    return True


def run(seed: int, seconds: float, least: int = 0) -> tuple[int, int]:
    """Calls that were made, and those of them that were not refused."""
    rng, calls, taken = np.random.default_rng(seed), 0, 0
    end = time.monotonic() + seconds
    with np.errstate(all="ignore"):
        while calls < least or time.monotonic() < end:
            calls, taken = calls + 1, taken + one_call(rng)
    return calls, taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    calls, taken = run(options.seed, options.seconds)
    print(f"{calls} calls, {taken} of them not refused")
