"""A model of torch.nn's modules, converted to normkit's where it stands."""

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from . import modules as ours

__all__ = ["Conversion", "convert"]

_CLASSES: dict[type, type] = {getattr(nn, name): getattr(ours, name) for name in ours.__all__ if hasattr(nn, name)}
_NORMS = (*_CLASSES, *_CLASSES.values())
# What is normalized together when processes share a batch, and when they share each of its samples.
_SHARED: dict[str, Any] = {"batch": ours._BatchNorm, "space": (ours._BatchNorm, ours._InstanceNorm, ours.GroupNorm)}


@dataclass
class Conversion:
    """What `convert` did to a model, by the names of its modules.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.InstanceNorm2d(8), torch.nn.LeakyReLU(0.1))
    >>> done = nt.convert(model)
    >>> done.converted, done.fused, done.left
    ({'1': 'InstanceNorm2d'}, {'1': '2'}, {})
    >>> done.undo()
    >>> type(model[1]) is torch.nn.InstanceNorm2d
    True
    """

    converted: dict[str, str] = field(default_factory=dict)  # module: its class now
    fused: dict[str, str] = field(default_factory=dict)  # module: the activation that is in it now
    left: dict[str, str] = field(default_factory=dict)  # module: why it or its activation stayed
    synchronized: list[str] = field(default_factory=list)  # modules whose statistics are those of all processes
    _undo: list[Any] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"{name}: {kind}{self._with(name)}" for name, kind in self.converted.items()]
        lines += [f"{name}: over all processes" for name in self.synchronized]
        for name, reason in self.left.items():
            lines.append(f"{name}: {'its statistics stay' if name in self.converted else 'it stays'}, {reason}")
        return "\n".join(lines) or "nothing to convert"

    def _with(self, name: str) -> str:
        return f" with {self.fused[name]}" if name in self.fused else ""

    def undo(self) -> None:
        """Makes the model what it was. Parameters and buffers stay as they are now."""
        while self._undo:
            self._undo.pop()()


def convert(
    model: nn.Module, fuse: bool = True, *, process_group: Any = None, split: Literal["batch", "space"] = "batch"
) -> Conversion:
    """Has the normalizations of a model be normkit's, in place: the same modules with another class.

    Parameters, buffers, hooks, modes and devices are therefore the same objects; an optimizer goes on with them. Only
    modules whose class is one of torch.nn itself are converted, not subclasses.

    Parameters
    ----------
    model
        Any module; may be such a normalization itself.
    fuse
        Also compute an activation in the normalization before it, where torch.fx proves that it gets what that gives,
        nobody else does, and neither is shared or has hooks. nn.Identity takes its place. What torch.fx cannot trace is
        taken apart: its modules are taken to be called as wholes, a torch.nn.Sequential among them.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that take statistics together; all of them convert their copies of the model.
    split
        What the processes share. "batch": each has samples of its own, and batch norms are over those of all. "space":
        each has a part of every sample, and instance and group norms are over the whole sample too. A layer or RMS norm
        of the last axis alone is that of one place, and stays as it is; over more axes, it is left to the caller.

    Returns
    -------
    Conversion
        What was done and what was left, and why; its `undo()` takes all of it back.

    Raises
    ------
    ValueError
        If `split` is neither.

    Examples
    --------
    >>> import torch, normkit.torch as nt
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.GroupNorm(8, 64), torch.nn.SiLU())
    >>> print(nt.convert(model))
    1: GroupNorm with 2
    >>> model[1].activation
    'silu'
    """
    if split not in _SHARED:
        raise ValueError(f"split is {split!r}, expected 'batch' or 'space'")
    done = Conversion()
    names = {name: module for name, module in model.named_modules() if type(module) in _NORMS}
    pairs = {norm: rest for norm, *rest in _fusible(model, done)} if fuse else {}
    for name, module in names.items():
        if type(module) in _CLASSES:
            _put_class(module, _CLASSES[type(module)], done)
            done.converted[name] = type(module).__name__
        if module in pairs and module.activation is None:
            activation, places = pairs[module]
            _fuse(model, module, activation, places, done)
            done.fused[name] = places[0]
        if process_group is not None:
            _synchronize(name, module, process_group, split, done)
    for name, module in model.named_modules():
        if isinstance(module, (*_CLASSES, nn.SyncBatchNorm)) and type(module) not in _NORMS:
            done.left[name] = f"{type(module).__name__} is a class of its own"
    return done


def _synchronize(name: str, module: Any, process_group: Any, split: str, done: Conversion) -> None:
    if isinstance(module, _SHARED[split]):
        before = module.process_group
        module.process_group = process_group
        done.synchronized.append(name)
        done._undo.append(lambda: setattr(module, "process_group", before))
    elif split == "space" and len(getattr(module, "normalized_shape", ())) > 1:
        done.left[name] = "its parameters have the shape of whole samples"


def _put_class(module: nn.Module, kind: type, done: Conversion) -> None:
    before = type(module)
    module.__class__ = kind
    done._undo.append(lambda: setattr(module, "__class__", before))


def _fuse(model: nn.Module, module: nn.Module, activation: nn.Module, places: list[str], done: Conversion) -> None:
    """Puts an activation into a module, and nn.Identity into the places that it has."""
    module.activation = _activation_of(activation)

    def put(one: nn.Module) -> None:
        for name in places:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._modules[last] = one

    def undo() -> None:
        del module.activation
        put(activation)

    put(nn.Identity().train(activation.training))
    done._undo.append(undo)


def _activation_of(module: nn.Module) -> Any:
    """The activation that a module is, as functions of normkit take it; None where it is none, or one of its own."""
    kind, m = type(module), module
    plain = {
        nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.ReLU6: "relu6",
        nn.Hardswish: "hardswish", nn.Mish: "mish",
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    if kind is nn.GELU:
        return "gelu_tanh" if m.approximate == "tanh" else "gelu"
    if kind is nn.LeakyReLU:
        return ("leaky_relu", m.negative_slope)
    if kind is nn.ELU:
        return ("elu", m.alpha)
    if kind is nn.Softplus and (m.beta, m.threshold) == (1, 20):
        return "softplus"
    return None


# ---- what may be fused -------------------------------------------------------------------------------------------


def _is_hooked(module: nn.Module) -> bool:
    kinds = [kind for kind in vars(module) if kind.endswith("_hooks") and "state_dict" not in kind]
    return any(len(vars(module)[kind]) for kind in kinds)


def _fusible(model: nn.Module, done: Conversion) -> Iterator[tuple[nn.Module, nn.Module, list[str]]]:
    """Normalizations, the activations that may be in them, and all names of each of these."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    # What a graph shows is proven for modules that have no name outside of what was traced; what a Sequential does, for
    # those that have one name.
    for norm, (activation, traced, again) in _proven(model).items():
        name = places[activation][0]
        for module in (norm, activation):
            names = places[module]
            if module in again or (len(names) > 1 if traced is None else not all(n.startswith(traced) for n in names)):
                done.left[name] = f"{names[0]} is in several places"
            elif _is_hooked(module):
                done.left[name] = f"{names[0]} has hooks"
        if name not in done.left:
            yield norm, activation, places[activation]


_MOST_OPTIONAL = 4  # arguments of a forward, each there or not: 16 graphs, twice


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _NORMS or bool(super().is_leaf_module(m, module_qualified_name))


# The activation that alone gets what a normalization gives, how the names of what was traced begin, and what runs in it
# more than once.
_Proof = tuple[nn.Module, str | None, set[nn.Module]]


def _proven(model: nn.Module, prefix: str = "") -> dict[nn.Module, _Proof]:
    """Pairs that are one in every graph of a model; without graphs, its children's and neighbors in Sequential."""
    if type(model) in _NORMS or _activation_of(model) is not None or not model._modules:
        return {}
    try:
        graphs = list(_graphs(model))
    except Exception:  # a model may do anything when it is traced, and then proves nothing
        found: dict[nn.Module, _Proof] = {}
        for norm, activation in itertools.pairwise(model._modules.values() if type(model) is nn.Sequential else ()):
            if type(norm) in _NORMS and activation is not None and _activation_of(activation) is not None:
                found[norm] = (activation, None, set())
        for name, child in model.named_children():
            found |= _proven(child, f"{prefix}{name}.")
        return found
    called = [_called(graph, model) for graph in graphs]
    again = {module for nodes in called for module, count in Counter(nodes.values()).items() if count > 1}
    first, *others = map(_pairs, called)
    return {
        norm: (act, prefix, again) for norm, act in first.items() if all(pairs.get(norm) is act for pairs in others)
    }


def _graphs(model: nn.Module) -> Iterator[fx.Graph]:
    """In training and not, with any optional arguments: what code decides by these, it does in one of them."""
    parameters = inspect.signature(model.forward).parameters.values()
    optional = [(p.name, p.default) for p in parameters if p.default is not p.empty]
    if len(optional) > _MOST_OPTIONAL:
        raise ValueError(f"{len(optional)} optional arguments can be there or not in too many ways")
    absent = [dict(some) for n in range(len(optional) + 1) for some in itertools.combinations(optional, n)]
    for training, concrete in itertools.product((True, False), absent):
        # Code that is traced may change what it finds; parameters, which it does not, need no copy.
        copied = copy.deepcopy(model, {id(p): p for p in model.parameters()}).train(training)
        yield _Tracer().trace(copied, concrete_args=concrete or None)


def _called(graph: fx.Graph, model: nn.Module) -> dict[fx.Node, nn.Module]:
    return {node: model.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}


def _pairs(called: dict[fx.Node, nn.Module]) -> dict[nn.Module, nn.Module]:
    """Normalizations, and the activation that alone gets what they give."""
    alone = ((norm, next(iter(node.users))) for node, norm in called.items() if len(node.users) == 1)
    pairs = ((norm, called[user]) for norm, user in alone if type(norm) in _NORMS and user in called)
    return {norm: activation for norm, activation in pairs if _activation_of(activation) is not None}
