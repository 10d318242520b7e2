"""Every operation and every kernel of a GPU once: `python tests/gpu_check.py`, a step of `benchmarks/gpu.sh`.

Results are compared with float64, within the bounds of the tests, and with the bits that the same kernels have on the
CPU, in a build with NORMKIT_CUDA=shim. There `--record` writes gpu_bits.json, a few digits for each result: a
multiply-add is fused in both places, and exp and erf are formulas of this library. Inputs are whole numbers, scrambled,
which stay the same whatever NumPy's generators become.

compute-sanitizer watches it too: nothing but these kernels runs on the device then.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bounds
import checks
import mirrored
import normkit
import numpy as np
from normkit import _core
from reference import OPERATIONS, REGISTRY, Operation, wide

RECORD = Path(__file__).with_name("gpu_bits.json")
SMALL, EPS = (6, 8, 5, 7), 1e-5
FLOATS = ("float32", "float16", "bfloat16", "float64")
TEAM, SPLIT = 84_000, 3_600_000  # bytes of a statistic: for a cluster of any direction, and for none


def numbers(shape: tuple[int, ...], seed: int, dtype: Any = "float32") -> np.ndarray:
    """Numbers from -2 to 2 in steps of 2^-22, then rounded; as integers where those are wanted."""
    n = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(
        seed * 0x85EBCA6B % 2**32
    )
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        n = (n ^ n >> np.uint32(shift)) * np.uint32(factor)
    n ^= n >> np.uint32(15)
    dtype = dtype_named(dtype)
    if dtype.kind == "u":
        return (n >> np.uint32(24)).astype(dtype).reshape(shape)
    return ((n >> np.uint32(8)).astype(np.float64) / 2**22 - 2).astype(dtype).reshape(shape)


def dtype_named(name: Any) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


# ---- calls -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "options"  # or what else is called: see Judged

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), self.dtype]
        words += ["-".join(map(str, (name, *np.atleast_1d(value)))) for name, value in self.options.items()]
        return " ".join([*words, self.kind] if self.kind != "options" else words)


def kernels(dtype: str) -> Iterator[Call]:
    """Each way through the kernels: rows and lanes; held by a few threads, a block, a cluster, or nobody; with constant
    weights, with weights along the row, and with all else."""
    size = dtype_named(dtype).itemsize
    for size_bytes in (700, 9_000, TEAM, SPLIT):
        n = size_bytes // size // 16 * 16
        kind = "long" if size_bytes >= TEAM else "options"
        several = size_bytes < SPLIT or dtype == "float32"
        yield Call("instance", (2 if several else 1, 1, n + 3), dtype, kind=kind)
        if several:
            yield Call("instance", (2, 1, n + 3), dtype, {"activation": "relu"}, kind)
            yield Call("layer", (2, n), dtype, kind=kind)
    yield Call("layer", (5, 301), dtype)
    yield Call("group", (1, 4, TEAM // size // 2 + 5), dtype)
    yield Call("batch", (7, 2, TEAM // size // 7), dtype)
    for shape in ((3, 7, 5, 33), (2, 700, 12), (1, 300, 200)):
        yield Call("instance-last", shape, dtype)
        yield Call("instance-last", shape, dtype, {"activation": "relu"})
    yield Call("group-last", (2, 700, 12), dtype)
    yield Call("instance-last", (1, SPLIT // 48, 64 // size), dtype, kind="long")


def calls() -> list[Call]:
    found = [Call(op.name, SMALL, dtype) for dtype in FLOATS for op in REGISTRY]
    found += [call for dtype in FLOATS for call in kernels(dtype)]
    found.append(Call("instance", (265, 1, 12_000), kind="many"))  # a block holds two tiles
    found.append(Call("layer", (2, 210_000)))  # more weights than a team holds sums of
    for op in ("instance", "instance-last", "layer"):
        some = ("relu", ("leaky_relu", 0.2), "silu", "gelu", "relu6", "hardswish", "mish", "softplus")
        found += [Call(op, SMALL, options={"activation": a}) for a in some]
        found += [Call(op, SMALL, dtype, kind="prelu") for dtype in ("float32", "float16")]
        found += [Call(op, SMALL, options=o) for o in ({"where": "random"}, {"weight_offset": 1.0})]
        found += [Call(op, SMALL, "uint8"), Call(op, SMALL, "float16", {"out_dtype": "float32"})]
        found += [Call(op, SMALL, dtype, kind="residual") for dtype in ("float32", "float16")]
    found += [Call(op.name, (2, 4, 3, 5), kind="double-backward") for op in REGISTRY]
    found += [Call(op, SMALL, kind=k) for op in ("instance", "instance-last") for k in ("running", "frozen", "phases")]
    return found


class Noted(Operation):
    """An operation that keeps the results of its calls."""

    def __init__(self, op: Operation, notes: dict[str, list[np.ndarray]]) -> None:
        self.__dict__.update(vars(op), notes=notes)

    def _noted(self, kind: str, found: Any) -> Any:
        self.notes[kind] += [a for a in (found if isinstance(found, tuple) else (found,)) if a is not None]
        return found

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self._noted("forward", super().forward(*arguments, **options))

    def backward(self, *arguments: Any, **options: Any) -> Any:
        return self._noted("backward", super().backward(*arguments, **options))

    def double_backward(self, *arguments: Any, **options: Any) -> Any:
        return self._noted("backward", super().double_backward(*arguments, **options))


class Judged:
    """A call that was made and found right, or AssertionError. `judged`: bits that were found right before, if any."""

    def __init__(self, call: Call, judged: str = "") -> None:
        self.call, self.judged, self.notes = call, judged, {"forward": [], "backward": []}
        self.op = Noted(OPERATIONS[call.op], self.notes)
        self.x, self.dy = (numbers(call.shape, seed, call.dtype) for seed in (1, 2))
        own, absent = self.op.weight_shape(call.shape, "channel"), checks.compute(self.x.dtype)
        self.weight, self.bias = (np.asarray(numbers(own, seed, absent)) for seed in (3, 4))
        getattr(self, call.kind.replace("-", "_"))()  # one of the methods below

    def bits(self) -> str:
        """The bits of each result, or of many together, as digits of a hash."""

        def digits(arrays: list[np.ndarray]) -> str:
            return hashlib.blake2b(b"".join(map(np.ndarray.tobytes, arrays)), digest_size=4).hexdigest()

        parts = [[[a] for a in arrays] if len(arrays) < 4 else [arrays] for arrays in self.notes.values()]
        return " / ".join(" ".join(map(digits, part)) for part in parts)

    def options(self) -> None:
        options = dict(self.call.options)
        if "where" in options:
            options["where"] = numbers(self.call.shape, 5) > -1
        checks.check_forward(self.op, self.x, self.weight, self.bias, **options)
        if self.x.dtype.kind == "u" or "out_dtype" in options:
            return
        _, *statistics = self.notes["forward"]
        if "activation" in options:
            options["bias"] = self.bias
        stats = (None, *statistics)[-2:]
        checks.check_backward(self.op, self.dy, self.x, self.weight, stats=stats, **options)

    def prelu(self) -> None:
        from test_prelu import check

        for slopes in (numbers(self.weight.shape, 12), numbers((1,), 12)):
            check(self.op, self.dy, self.x, slopes, self.weight, self.bias)

    def long(self) -> None:
        """Leaves out gradients of weights, which may be many. Bits that have been judged before suffice."""
        options, dtype = self.call.options, self.x.dtype
        y, mean, rstd = self.op.statistics(self.x, weight=self.weight, bias=self.bias, **options)
        given = {"bias": self.bias, **options} if options else {}
        dx, *_ = self.op.backward(self.dy, self.x, mean, rstd, self.weight, need=("dx",), **given)
        if self.bits() == self.judged:
            return
        f = self.op.reference(self.x, self.weight, self.bias, **options)
        b = self.op.reference_backward(self.dy, self.x, mean, rstd, self.weight, **given)
        for found, right, bound in (
            (mean, f.mean, bounds.mean(f, dtype)),
            (rstd, f.rstd, bounds.rstd(f, dtype)),
            (y, f.y, bounds.y(f, dtype)),
            (dx, b.dx, bounds.dx(b, dtype)),
        ):
            assert bounds.excess(found.reshape(right.shape), right, bound) <= 1

    def many(self) -> None:
        """The first and the last statistic have the bits that they have alone."""
        y, mean, rstd = self.op.statistics(self.x, weight=self.weight, bias=self.bias)
        dx, *_ = self.op.backward(self.dy, self.x, mean, rstd, self.weight)
        for one in (slice(0, 1), slice(-1, None)):
            x, stats = self.x[one], (mean[one], rstd[one])
            assert checks.check_forward(self.op, x, self.weight, self.bias).tobytes() == y[one].tobytes()
            found, *_ = checks.check_backward(self.op, self.dy[one], x, self.weight, stats=stats)
            assert found.tobytes() == dx[one].tobytes()

    def residual(self) -> None:
        """The bits of the call on the sum."""
        residual = numbers(self.call.shape, 6, self.call.dtype)
        given = {"weight": self.weight, "bias": self.bias, "return_stats": True}
        *found, s = self.op.forward(self.x, residual=residual, return_residual=True, **given)
        assert s.tobytes() == (self.x + residual).astype(self.x.dtype).tobytes()
        for a, b in zip(found, self.op.forward(s, **given), strict=True):
            assert a.tobytes() == b.tobytes()

    def double_backward(self) -> None:
        from test_double_backward import check

        dds = numbers(self.call.shape, 7), *(np.asarray(numbers(self.weight.shape, seed)) for seed in (8, 9))
        check(self.op, dds, self.dy, self.x, self.weight)

    def running(self) -> None:
        """Running statistics do not change y. They are means of means, which are within their bounds, rounded twice."""
        before = numbers((3, self.weight.size), 10, "float64") + 3
        (mean, var), truth = before[:2].copy(), self.op.reference(self.x)
        y = self.op.forward(self.x, running_mean=mean, running_var=var, momentum=0.25)
        assert y.tobytes() == self.op.forward(self.x).tobytes()
        kept = tuple(a for a in range(truth.mean.ndim) if truth.mean.shape[a] != self.weight.size)
        unbiased = truth.var * truth.members / (truth.members - 1)
        errors = (
            bounds.mean(truth, self.x.dtype).max(),
            4 * bounds.rstd_error(truth, self.x.dtype).max() * unbiased.max(),
        )
        for found, old, new, error in zip((mean, var), before, (truth.mean, unbiased), errors, strict=False):
            expected = 0.75 * old + 0.25 * new.mean(kept).ravel()
            bound = 0.25 * error + 2 * bounds.stored(expected, "float32")
            assert bounds.excess(found, expected, bound) <= 1
        self.notes["forward"] += [mean, var]

    def frozen(self) -> None:
        """Running statistics whose elements lie apart give the bits of those that lie side by side."""
        mean, var = numbers((self.weight.size, 2), 11).T + np.float32(3)
        apart = {"running_mean": mean, "running_var": var, "use_input_stats": False}
        close = {**apart, "running_mean": mean.copy(), "running_var": var.copy()}
        assert not mean.flags.c_contiguous
        found, given, _ = self.op.forward(self.x, self.weight, self.bias, return_stats=True, **apart)
        assert found.tobytes() == self.op.forward(self.x, self.weight, self.bias, **close).tobytes()
        assert (given == mean).all()
        shape = self.op.aligned(self.weight.shape, self.x.shape)
        m, v, w, b = (wide(p).reshape(shape) for p in (mean, var, self.weight, self.bias))
        truth = checks.statistics_of(mean=m, var=v, members=1, farthest=1.0, largest=1.0)
        x_hat = (wide(self.x) - m) * truth.rstd
        expected = x_hat * w + b
        error = 4 * bounds.UNIT["float32"] * (np.abs(x_hat * w) + np.abs(b))  # five roundings, each of half a unit
        assert bounds.excess(found, expected, error) <= 1

    def phases(self) -> None:
        """The bits of the whole call, which has been judged."""
        axis = self.op.reduced(self.x.shape)
        given = dict(zip(("weight", "bias"), (self._aligned(p) for p in (self.weight, self.bias)), strict=True))
        whole = normkit.moments(self.x, axis=axis)
        mean, rstd = whole.mean, whole.rstd(EPS)
        y = normkit.apply(self.x, mean, rstd, axis=axis, **given)
        assert y.tobytes() == self.op.forward(self.x, self.weight, self.bias).tobytes()
        sums = normkit.backward_sums(self.dy, self.x, mean, rstd, given["weight"], axis=axis)
        dx = normkit.apply_backward(self.dy, self.x, mean, rstd, sums, whole.count, given["weight"], axis=axis)
        dx_whole, *_ = self.op.backward(self.dy, self.x, mean, rstd, self.weight)
        assert dx.tobytes() == dx_whole.tobytes()
        self.notes["forward"] += [mean, rstd, y]
        self.notes["backward"] += [sums, dx]

    def _aligned(self, p: np.ndarray) -> np.ndarray:
        return p.reshape(self.op.aligned(p.shape, self.x.shape))


# ---- a run -------------------------------------------------------------------------------------------------------


class Excess:
    """The largest that a test was told of: how much of what a bound allows was wanted."""

    def __init__(self) -> None:
        self.largest, self.original = 0.0, bounds.excess
        bounds.excess = self

    def __call__(self, *arguments: Any) -> float:
        found = self.original(*arguments)
        self.largest = max(self.largest, found)
        return found


def judged(call: Call, recorded: dict[str, str] | None) -> dict[str, Any]:
    """What there is to say of a call."""
    excess, expected = Excess(), (recorded or {}).get(str(call), "")
    try:
        bits = Judged(call, expected).bits()
        failed = ""
    except Exception as error:
        bits, failed = "", f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        bounds.excess = excess.original
    if recorded is not None and not failed and bits != expected:
        failed = f"other bits than on the CPU: {bits}, expected {expected}"
    return {"call": str(call), "of_bound": excess.largest, "bits": bits, **({"failed": failed} if failed else {})}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write what was found there, a line of JSON for each call")
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    parser.add_argument("--bits", type=Path, default=RECORD, help="the record (%(default)s)")
    parser.add_argument("--record", action="store_true", help="write the record: in a build with NORMKIT_CUDA=shim")
    parser.add_argument("--no-launch", action="store_true", help="stop before the first call")
    options = parser.parse_args(arguments)

    every = calls()
    chosen = [call for call in every if options.only in str(call)]
    recorded = None
    if options.record:
        if _core.cuda != "shim":
            parser.error("bits are recorded in a build with NORMKIT_CUDA=shim")
    else:
        recorded = json.loads(options.bits.read_text())
        if others := {*recorded} ^ {*map(str, every)}:
            print(f"{options.bits} is of other calls: {sorted(others)[:5]}, ...")
            return 1
    if options.no_launch:
        print(f"{len(chosen)} calls to make")
        return 0
    start, found = time.monotonic(), []
    for call in chosen:
        line = judged(call, recorded)
        found.append(line)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if "failed" in line:
            print(f"{call}: {line['failed']} ({line['of_bound']:.2g} of the bound)", flush=True)
    failed = sum("failed" in line for line in found)
    print(f"{len(found)} calls, {failed} failed, in {time.monotonic() - start:.0f} s")
    if options.record and not failed:
        lines = [f"{json.dumps(f['call'])}: {json.dumps(f['bits'])}" for f in found]
        options.bits.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return int(failed > 0)


if __name__ == "__main__":
    if _core.cuda != "shim":
        mirrored.install("cupy")
    raise SystemExit(main())
