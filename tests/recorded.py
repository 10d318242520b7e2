"""The calls whose gradients libraries record: what normkit.torch and normkit.jax are tried on alike."""

from dataclasses import dataclass
from typing import Any

import normkit

SHAPE, CHANNELS, GROUPS = (2, 4, 3, 5), (4,), 2


@dataclass(frozen=True)
class Case:
    """An operation: its name in both libraries, the shape of its weights, and what both libraries are told."""

    name: str
    weight: tuple[int, ...]
    options: dict[str, Any]
    of_backward: tuple[str, ...] = ()  # the options that its backward takes too
    running: bool = False

    def told(self, running: Any) -> dict[str, Any]:
        """Its options and, of a case that wants them, the running statistics."""
        return self.options | (running if self.running else {})


# Statistics of each channel to normalize by: none is 0 or 1, no two are alike.
RUNNING = {"running_mean": [-0.5, -0.2, 0.1, 0.4], "running_var": [0.5, 0.9, 1.3, 2.0]}

CASES = {
    "instance": Case("instance_norm", CHANNELS, {}),
    "instance-images": Case("instance_norm", (2, 4), {}),
    "instance-last": Case("instance_norm", (5,), {"channel_axis": -1}, ("channel_axis",)),
    "instance-frozen": Case("instance_norm", CHANNELS, {"use_input_stats": False}, ("use_input_stats",), running=True),
    "group": Case("group_norm", CHANNELS, {"num_groups": GROUPS}, ("num_groups",)),
    "layer": Case("layer_norm", (3, 5), {"axis": (2, 3)}, ("axis",)),
    "layer-channels": Case("layer_norm", CHANNELS, {"axis": 1}, ("axis",)),
    "layer-apart": Case("layer_norm", (2, 3), {"axis": (0, 2)}, ("axis",)),
    "rms": Case("rms_norm", (5,), {}),
    "batch": Case("batch_norm", CHANNELS, {"training": True}, ("training",)),
    "batch-frozen": Case("batch_norm", CHANNELS, {"training": False}, ("training",), running=True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation": {"activation": "silu"},
    "parametrized": {"activation": ("leaky_relu", 0.3)},
    "prelu": {"activation": "slopes"},
    "residual": {"residual": True},
    "both-sums": {"residual": True, "return_residual": True, "weight_offset": 1.0},
    "masked": {"where": True},
    "all": {"where": True, "residual": True, "activation": "gelu", "weight_offset": 1.0},
}
PARAMS = {"both": (True, True), "weight": (True, False), "bias": (False, True), "none": (False, False)}

# For what takes a library a second: one option for each case, and each option for some case.
SOME = [(case, [*OPTIONS][k % len(OPTIONS)]) for k, case in enumerate(CASES)]


def by_normkit(case: Case, arrays: dict[str, Any], told: dict[str, Any], dys: Any, running: Any) -> tuple[Any, Any]:
    """Results, and gradients by name, by normkit's own functions."""
    names, arrays, told = [*arrays], dict(arrays), dict(told)
    slopes = arrays.pop("slopes", None)
    if slopes is not None:
        told["activation"] = ("prelu", slopes)
    forward, backward = getattr(normkit, case.name), getattr(normkit, f"{case.name}_backward")
    wants_total, has_residual = told.pop("return_residual", False), "residual" in arrays
    y, *others = forward(**arrays, **case.told(running), **told, return_stats=True, return_residual=has_residual)
    total = others.pop() if has_residual else None
    statistics = dict(zip(("rstd",) if len(others) == 1 else ("mean", "rstd"), others, strict=True))
    kept = {k: v for k, v in told.items() if k in ("where", "activation", "weight_offset")}
    needed = [name for name in ("x", "weight", "bias", "slopes") if name in names]
    found = backward(
        dy=dys[0], x=arrays["x"] if total is None else total, **statistics, weight=arrays.get("weight"),
        bias=arrays.get("bias"), **kept, **{k: case.options[k] for k in case.of_backward},
        dresidual=dys[1] if wants_total else None, need=tuple(f"d{name}" for name in needed),
    )  # fmt: skip
    gradients = dict(zip(("x", "weight", "bias", "slopes"), found, strict=False))
    if has_residual:
        gradients["residual"] = gradients["x"]
    return ((y, total) if wants_total else (y,)), {name: gradients[name] for name in names}
