"""Which layers can become bottlenecks: seen in forwards of the example inputs, before anything is measured or replaced.

A layer is left whole, with the reason, if a bottleneck in its place would compute something else, or would lose what
the layer has: it does not compute its weight times its input, its weight is used elsewhere, it has hooks, or the Python
around it does not bear another module there. The last is tried: a stand-in that calls the layer itself takes its place.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_model, first_argument, tensors_in
from secateur._internal.errors import NothingToPrune, SecateurError
from secateur._internal.state import preserved, without_fast_path
from secateur.curvature.layers import Layer, computes_its_weight, measurable
from secateur.curvature.passes import NOT_RUN, STRANGE, USED_ELSEWHERE
from secateur.surgery.low_rank.bottleneck import Bottleneck, put, three, width
from secateur.tracing.skeleton import copyable

LAST = "the last layer stays as it is, unless layers= names it"
GROUPED = "a grouped convolution"
SHARED = "its weight is used at several places"
HOOKED = "it has hooks or a forward of its own, which a bottleneck would lose"
MORE_STATE = "it has more parameters, buffers or parts than a weight and a bias, which a bottleneck would lose"
NOT_REACHED = "the example inputs never reach it"
OTHERWISE = "the model computes something else with another module in its place"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SAME = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far outputs with stand-ins may be from those without, relative; of other dtypes a tenth."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that can become a bottleneck, or a bottleneck that can become smaller.

    Attributes:
        name: its path.
        core: the path of the layer whose curvature decides.
        module: it.
        positions: how many positions its input and its output have on the example inputs, over all calls.
    """

    name: str
    core: str
    module: Any
    positions: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Probed:
    """What forwards on the example inputs show.

    Attributes:
        candidates: the layers that can become bottlenecks, in the order of the model's modules.
        left: those that were looked at and are left whole -> why.
    """

    candidates: Sequence[Candidate]
    left: Mapping[str, str]


def probe(model: nn.Module, inputs: Inputs, layers: Sequence[str] | None, without: Mapping[str, str]) -> Probed:
    """Find out which layers can become bottlenecks.

    Args:
        model: the model; it is left untouched, since a copy is run.
        inputs: example inputs.
        layers: the paths of those that may; all but the last one if not given.
        without: paths of layers that stay whole -> why.

    Raises:
        NothingToPrune: none can.
        SecateurError: a name that is no linear or convolution, inputs on which the model does not run.
    """
    chosen, left = _chosen(model, layers)
    for part in chosen:
        why = without.get(part.name, without.get(part.core, "")) or _unfit(model, part)
        if why:
            left[part.name] = why
    chosen = [part for part in chosen if part.name not in left]
    if chosen:
        with copyable(model):
            copied = copy.deepcopy(model)
        chosen, more = _run(copied, inputs, chosen)
        left |= more
    if not chosen:
        told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in left.items())
        raise NothingToPrune(f"no layer can become a bottleneck ({told or 'there is no linear and no convolution'})")
    return Probed(chosen, left)


def positions_of(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """How many positions inputs and outputs of layers have in a forward of the example inputs, over all calls."""
    into, out_of = Counter[str](), Counter[str]()
    handles = [
        model.get_submodule(name).register_forward_hook(_count(name, into, out_of), with_kwargs=True) for name in names
    ]
    try:
        _outputs(model, inputs, training=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (into[name], out_of[name]) for name in names}


def _count(name: str, into: Counter[str], out_of: Counter[str]) -> Any:
    """A hook that adds the positions of a layer's input and output to those that were counted."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        first, _, last = three(module)
        given = first_argument(args, kwargs)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            into[name] += given.numel() // width(first, inward=True)
            out_of[name] += output.numel() // width(last, inward=False)

    return hook


def _chosen(model: nn.Module, names: Sequence[str] | None) -> tuple[list[Candidate], dict[str, str]]:
    """The named layers, or all but the last, and the latter as one that is left."""
    inside: set[str] = set()
    every: dict[str, Candidate] = {}
    for name, module in model.named_modules():
        if name in inside:
            continue
        if isinstance(module, Bottleneck):
            inside |= {f"{name}.{i}" for i in range(3)}
            every[name] = Candidate(name, f"{name}.1", module)
        elif measurable(module):
            every[name] = Candidate(name, name, module)
    for name in names or ():
        if name not in every:
            raise SecateurError(
                f"layers: {name!r} is no linear or convolution of this model; there are {', '.join(every)}"
            )
    if names is not None:
        return [every[name] for name in names], {}
    last = list(every)[-1:]
    return [every[name] for name in list(every)[:-1]], dict.fromkeys(last, LAST)


def _unfit(model: nn.Module, part: Candidate) -> str:
    """Why a layer stays as it is, if that can be seen without a forward."""
    first, core, last = three(part.module)
    if getattr(core, "groups", 1) > 1:
        return GROUPED
    places = sum(p is core.weight for module in model.modules() for p in module._parameters.values())
    paths = sum(module is part.module for _, module in model.named_modules(remove_duplicate=False))
    if places > 1 or paths > 1:
        return SHARED
    for module in {id(m): m for m in (part.module, first, core, last)}.values():
        if "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in HOOKS):
            return HOOKED
    known = {"weight", "bias"}
    if core._parameters.keys() - known or core._buffers or core._modules:
        return MORE_STATE
    return ""


# ----------------------------------------------------------------------------------------- what forwards of a copy show


def _run(copied: nn.Module, inputs: Inputs, chosen: list[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that stand both tests, with their positions, and the others -> why."""
    layers = {part.name: Layer(part.core, copied.get_submodule(part.core)) for part in chosen}
    watch = _Watch(layers, {part.name: copied.get_submodule(part.name) for part in chosen})
    wanted: dict[bool, list[Tensor]] = {}  # by whether it is training mode
    with watch.hooks(), without_fast_path():
        try:
            wanted[False] = _outputs(copied, inputs, training=False, watch=watch)
        except Exception as error:
            raise SecateurError(
                f"{type(copied).__name__} fails on the example inputs: {type(error).__name__}: {error}"
            ) from error
        positions = {name: (watch.into[name], watch.out_of[name]) for name in layers}
        left = {name: NOT_REACHED for name in layers if not watch.calls[name] and not watch.uses[name]}
        # a batch norm that sees a single value, say, cannot be trained on these inputs with or without bottlenecks
        with suppress(Exception):
            wanted[True] = _outputs(copied, inputs, training=True, watch=watch)
    left |= watch.left()
    found = [replace(part, positions=positions[part.name]) for part in chosen if part.name not in left]
    left |= _refused(copied, inputs, found, wanted)
    return [part for part in found if part.name not in left], left


def _outputs(model: nn.Module, inputs: Inputs, *, training: bool, watch: _Watch | None = None) -> list[Tensor]:
    """All tensors that the model gives, from a fixed random state; its buffers are as before."""
    given = pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, inputs)
    with torch.inference_mode(False), preserved(model, "as_is"), torch.set_grad_enabled(training):
        model.train(training)
        torch.manual_seed(0)
        with nullcontext() if watch is None else watch:
            outputs = call_model(model, given)
        return [tensor.detach() for tensor in tensors_in(outputs)]


class _Watch(TorchFunctionMode):
    """Looks at each call of the layers, and counts what else their weights go into."""

    def __init__(self, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers, self.modules = layers, modules
        self.names = {id(layer.module.weight): name for name, layer in layers.items()}
        self.calls: Counter[str] = Counter()
        self.uses: Counter[str] = Counter()
        self.into: Counter[str] = Counter()
        self.out_of: Counter[str] = Counter()
        self.strange: dict[str, str] = {}
        self.looking = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Attached to the layers for a while."""
        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.module.register_forward_hook(self._check(name), with_kwargs=True))
            counted = _count(name, self.into, self.out_of)
            handles.append(self.modules[name].register_forward_hook(counted, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            self.calls[name] += 1
            self.looking = True
            with torch.no_grad(), torch.autocast(_device_type(output), enabled=False):
                if not computes_its_weight(self.layers[name], first_argument(args, kwargs), output):
                    self.strange[name] = STRANGE
            self.looking = False

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.looking:
            given = [id(v) for v in pytree.tree_leaves((args, kwargs)) if id(v) in self.names]
            made = {id(v) for v in pytree.tree_leaves(result) if isinstance(v, Tensor)} if given else set()
            # `weight.to(dtype)` gives the weight itself where nothing is to be done
            self.uses.update(self.names[v] for v in given if made - {v})
        return result

    def left(self) -> dict[str, str]:
        """The layers that must stay, by what was seen -> why."""
        elsewhere = {
            name: USED_ELSEWHERE if self.calls[name] else NOT_RUN
            for name in self.layers
            if self.uses[name] > self.calls[name] and name not in self.strange
        }
        return self.strange | elsewhere


def _device_type(output: Any) -> str:
    return output.device.type if isinstance(output, Tensor) else "cpu"


# ------------------------------------------------------------------------------------------------------------ stand-ins


class _StandIn(Bottleneck):
    """Looks like a bottleneck from outside, and calls the layer itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(nn.Identity(), layer, nn.Identity())

    @property
    def weight(self) -> Tensor:
        """As a bottleneck's."""
        weight: Any = self.core.weight
        return torch.empty_like(weight, device="meta")

    @property
    def bias(self) -> Tensor | None:
        """As a bottleneck's."""
        found: Tensor | None = self.core.bias
        return found


def _refused(
    copied: nn.Module, inputs: Inputs, found: Sequence[Candidate], wanted: Mapping[bool, list[Tensor]]
) -> dict[str, str]:
    """The layers in whose place the model bears no bottleneck -> why; all at once, or else one after the other."""
    plain = [part.name for part in found if not isinstance(part.module, Bottleneck)]
    layers = {name: copied.get_submodule(name) for name in plain}
    whole = copied
    for name in plain:
        whole = put(whole, name, _StandIn(layers[name]))
    if not _complaint(whole, inputs, wanted):
        return {}
    for name in plain:
        whole = put(whole, name, layers[name])
    refused = {}
    for name in plain:
        whole = put(whole, name, _StandIn(layers[name]))
        complaint = _complaint(whole, inputs, wanted)
        if complaint:
            refused[name] = complaint
            whole = put(whole, name, layers[name])
    return refused


def _complaint(model: nn.Module, inputs: Inputs, wanted: Mapping[bool, list[Tensor]]) -> str:
    """What is wrong with a model with stand-ins, in eval or in training mode; nothing, mostly.

    Where attention is fused, PyTorch's own modules give other numbers at padded positions; there it must run.
    """
    for training, before in wanted.items():
        try:
            with without_fast_path():
                after = _outputs(model, inputs, training=training)
            _outputs(model, inputs, training=training)
        except Exception as error:
            mode = "training" if training else "eval"
            return f"the model does not run in {mode} mode with another module in its place ({error})"
        if not _same(before, after):
            return OTHERWISE
    return ""


def _same(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    if [t.shape for t in wanted] != [t.shape for t in given]:
        return False
    for a, b in zip(wanted, given, strict=True):
        if not (a.is_floating_point() and b.is_floating_point()):
            continue
        finite = a.isfinite()
        size = float(a[finite].double().norm())
        if not float((a[finite].double() - b[finite].double()).norm()) <= SAME.get(a.dtype, 0.1) * max(size, 1e-30):
            return False
    return True
