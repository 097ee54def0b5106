"""What always holds, as functions that assert it for one network (items 1 to 5 of what secateur promises)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import secateur as sc
from secateur._internal.errors import NothingToPrune
from secateur.measure.counting import count_macs, count_params
from secateur.surgery.permute import keeps_its_order, permuted

from .networks import Network, Spec, network

DROPOUT = nn.modules.dropout._DropoutNd
Removed = dict[str, list[int]]


@dataclass(frozen=True)
class Restored:
    """A plan after some channels came back: enough for the counts."""

    removed: Mapping[str, list[int]]


# --------------------------------------------------------------------------------------------------- running things


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All output tensors."""
    out = (
        model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    )
    return tree_leaves(out)


def fresh(inputs: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The inputs again, as leaves that want gradients."""

    def leaf(t: Tensor) -> Tensor:
        t = t.detach().clone()
        return t.to(dtype).requires_grad_() if t.is_floating_point() else t

    return tree_map(leaf, inputs)


def set_mode(model: nn.Module, training: bool) -> None:
    """Training mode for all but dropout, which is random."""
    for module in model.modules():
        module.training = training and not isinstance(module, DROPOUT)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    if a.numel() == 0:
        return 0.0
    scale = float(a.detach().abs().max())
    return float((a.detach().double() - b.detach().double()).abs().max()) / (scale if scale > 0 else 1.0)


def kept(tensor: Tensor, removed: Mapping[int, list[int]]) -> Tensor:
    """What a plan leaves of a tensor."""
    for dim, positions in removed.items():
        stay = [i for i in range(tensor.size(dim)) if i not in set(positions)]
        tensor = tensor.index_select(dim, torch.tensor(stay, dtype=torch.long))
    return tensor


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones under their first name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


# --------------------------------------------------------------------------------------------------- 1: it is exact


def gradients(
    model: nn.Module, inputs: Any, outputs: list[Tensor]
) -> tuple[dict[str, Tensor | None], list[Tensor | None]]:
    """Gradients of a fixed, uneven sum of the outputs, with respect to parameters and inputs."""
    loss = torch.zeros((), dtype=torch.float64)
    for y in outputs:
        if y.is_floating_point():
            loss = loss + (y.flatten() * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).cos()).sum()
    parameters = dict(model.named_parameters())
    leaves = [t for t in tree_leaves(inputs) if t.requires_grad]
    found = torch.autograd.grad(loss, [*parameters.values(), *leaves], allow_unused=True)
    return dict(zip(parameters, found, strict=False)), list(found[len(parameters) :])


def scales(small: nn.Module, plan: sc.Plan) -> dict[str, float]:
    """By how much the weights of root-mean-square norms that lost channels are larger than what they were."""
    kind = "root-mean-square norm"
    widths = {path: len(small.get_submodule(path).weight) for path in plan.norms}
    return {f"{p}.weight": (n.width / widths[p]) ** 0.5 for p, n in plan.norms.items() if n.kind == kind}


def check_cut(model: nn.Module, big: nn.Module, small: nn.Module, removed: Any, plan: sc.Plan) -> None:
    """The cut network is the old one without the removed positions: values, names, sharing, modes and flags."""
    scale = scales(small, plan)
    old, masked, new = tensors(model), tensors(big), tensors(small)
    assert list(new) == list(old) == list(masked), "names or sharing changed"
    for name, tensor in new.items():
        pairs = ((old, name), (masked, f"{name} is masked where it stays"))
        # the lengths of other directions are other ones: their products are what they were, which outputs show
        for whole, fault in pairs if name not in plan.weight_norms else ():
            due = kept(whole[name], removed.get(name, {}))
            assert torch.equal(due, tensor) if name not in scale else gap(due * scale[name], tensor) < 1e-12, fault
        assert (tensor.requires_grad, tensor.dtype, type(tensor)) == (
            old[name].requires_grad,
            old[name].dtype,
            type(old[name]),
        )
        assert tensor is not old[name] and (tensor.numel() == 0 or tensor.data_ptr() != old[name].data_ptr()), (
            f"{name} is shared"
        )
    modes = [[m.training for m in module.modules()] for module in (model, big, small)]
    assert modes[0] == modes[1] == modes[2], "training flags changed"


def check_patched(model: nn.Module, small: nn.Module, plan: sc.Plan) -> None:
    """What the modules of the cut network remember is another only where the plan says so, and as it says."""
    old, new = (
        {f"{path}.{k}": v for path, m in network.named_modules() for k, v in _plain(m).items() if k != "training"}
        for network in (model, small)
    )
    of_norms = {f"{path}.{norm.eps}" for path, norm in plan.norms.items()}
    fused = ("activation_relu_or_gelu", "use_nested_tensor")  # say that PyTorch's fused kernels do not fit any more
    of_norms |= {key for key in old if key.endswith(fused) and (plan.attentions or plan.norms) and not new[key]}
    changed = {key: (old[key], new[key]) for key in old if key not in of_norms and old[key] != new[key]}
    assert changed == plan.patched


def check_exact(big: nn.Module, small: nn.Module, removed: Any, inputs: Any, plan: sc.Plan) -> None:
    """The cut network computes what the masked one computes: values, gradients and statistics, in both modes."""
    for model in (big, small):
        model.requires_grad_(True)
    singles = copy.deepcopy(big).float(), copy.deepcopy(small).float()
    for training in (False, True):
        for model in (big, small, *singles):
            set_mode(model, training)
        _compare(big, small, singles, inputs, removed, plan, "training" if training else "eval")


def _compare(
    big: nn.Module, small: nn.Module, singles: Any, inputs: Any, removed: Any, plan: sc.Plan, mode: str
) -> None:
    scale_of = scales(small, plan)
    x, x_small = fresh(inputs), fresh(inputs)
    y, y_small = run(big, x), run(small, x_small)
    assert [t.shape for t in y] == [t.shape for t in y_small], f"{mode}: shapes"
    for a, b in zip(y, y_small, strict=True):
        assert gap(a, b) <= 1e-10, f"{mode}: outputs differ by {gap(a, b):.1e}"
    y32, small32 = (run(m, fresh(inputs, torch.float32)) for m in singles)
    for a, a32, b32 in zip(y, y32, small32, strict=True):
        # what single precision itself loses on this network comes on top
        assert gap(a32, b32) <= 1e-5 + 10 * gap(a, a32), f"{mode}: outputs in float32 differ by {gap(a32, b32):.1e}"

    (g, gx), (g_small, gx_small) = gradients(big, x, y), gradients(small, x_small, y_small)
    times = {name: None if value is None else value * scale_of.get(name, 1.0) for name, value in g_small.items()}
    pairs = {name: (None if g[name] is None else kept(g[name], removed.get(name, {})), times[name]) for name in g}
    pairs |= {f"input {i}": pair for i, pair in enumerate(zip(gx, gx_small, strict=True))}
    scale = max((float(a.abs().max()) for a, _ in pairs.values() if a is not None and a.numel()), default=0.0)
    renormed = {name for length, norm in plan.weight_norms.items() for name in (length, norm.direction)}
    for name, (a, b) in pairs.items():
        if name in renormed:  # the same function of other numbers has other gradients
            continue
        assert (a is None) == (b is None), f"{mode}: gradient of {name} is missing"
        if a is not None and b is not None:
            error = float((a - b).abs().max()) if a.numel() else 0.0
            assert error <= 1e-10 * max(scale, 1e-3), (
                f"{mode}: gradient of {name} differs by {error:.1e} of {scale:.1e}"
            )
    for name, buffer in big.named_buffers():
        a, b = kept(buffer, removed.get(name, {})), tensors(small)[name]
        assert gap(a, b) <= 1e-10, f"{mode}: statistics {name} differ"


# ---------------------------------------------------------------------------------------------- counts are exact


def real_counts(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """MACs and parameters of the network as it is."""
    return count_macs(model, inputs), count_params(model)


def check_counts(model: nn.Module, graph: sc.ChannelGraph, inputs: Any, plan: sc.Plan | None = None) -> None:
    """The graph knows MACs and parameters without building the network."""
    assert (graph.macs(plan), graph.params(plan)) == real_counts(model, inputs), "macs, params"


# ------------------------------------------------------------------------------------- 2: the model is untouched


def disturb(model: nn.Module, seed: int) -> None:
    """Settings that must survive: mixed modes, frozen parameters, a gradient, hooks."""
    source = random.Random(seed)
    for module in model.modules():
        module.training = source.random() < 0.5
    for parameter in model.parameters():
        parameter.requires_grad_(source.random() < 0.8)
    first = next(iter(model.parameters()), None)
    if first is not None:
        first.grad = torch.ones_like(first)
    model.register_forward_hook(_hook)
    model.register_forward_pre_hook(_pre_hook)


def _hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
    """Do nothing."""


def _pre_hook(module: nn.Module, inputs: Any) -> None:
    """Do nothing."""


def snapshot(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Everything about a model, its inputs and the random state that could change."""
    state: dict[str, Any] = {"rng": torch.get_rng_state().numpy().tobytes(), "numpy rng": repr(np.random.get_state())}
    named = [*tensors(model).items(), *((f"input {i}", t) for i, t in enumerate(tree_leaves(inputs)))]
    for name, t in named:
        grad = None if t.grad is None else t.grad.numpy().tobytes()
        values = t.detach().numpy().tobytes()
        state[name] = (id(t), values, grad, t.requires_grad, t.device, t.dtype, t.data_ptr(), t._version)
    for name, module in model.named_modules():
        hooks = {k: tuple(map(id, v.values())) for k, v in vars(module).items() if k.endswith("_hooks")}
        state[f"module {name}"] = (id(module), module.training, list(vars(module)), hooks, _plain(module))
    return state


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}


def check_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Nothing about the model changed."""
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"


# ------------------------------------------------------------------------------------------ 3 and 5: budgets


def random_removal(graph: sc.ChannelGraph, source: random.Random) -> Removed:
    """Some channels of most exact groups, never the last one."""
    removed = {}
    for group in graph.groups:
        if group.exact and len(group) > group.least and source.random() < 0.75:
            number = source.randint(1, len(group) - group.least)
            removed[group.name] = sorted(source.sample(range(len(group)), number))
    return removed


def random_budget(graph: sc.ChannelGraph, source: random.Random) -> sc.Budget:
    """A budget on some units, reachable unless the widths' steps and floors stand in its way."""
    widths = sum(len(g) for g in graph.groups)
    least = sum(g.least if g.exact else len(g) for g in graph.groups)
    ranges = {**graph.feasible(), "channels": (least, widths)}
    units = source.sample(["macs", "params", "channels"], source.choice((1, 1, 2, 3)))
    limits = {}
    for unit in units:
        low, high = ranges[unit]
        if high > 0:
            limits[unit] = max((low + (high - low) * source.random()) / high, 1e-6)
    return sc.Budget(
        **(limits or {"channels": 1.0}), round_to=source.choice((1, 1, 2, 4)), at_least=source.choice((1, 1, 2, 0.5))
    )


def least_widths(graph: sc.ChannelGraph, budget: sc.Budget) -> dict[str, int]:
    """The narrowest that a budget's steps and floors allow every group to be."""
    result = {}
    for group in graph.groups:
        floor = budget.at_least if budget.at_least >= 1 else math.ceil(budget.at_least * len(group))
        floor = max(1, math.ceil(max(floor, group.least) / budget.round_to) * budget.round_to)
        result[group.name] = min(floor, len(group)) if group.exact else len(group)
    return result


def excess(graph: sc.ChannelGraph, budget: sc.Budget, removed: Mapping[str, Any]) -> dict[str, float]:
    """How far each limited unit is above the budget, in units."""
    plan = Restored(dict(removed))
    gone = sum(len(p) for p in removed.values())
    widths = sum(len(g) for g in graph.groups)
    now = {"macs": graph.macs(plan), "params": graph.params(plan), "channels": widths - gone}
    full = {"macs": graph.macs(), "params": graph.params(), "channels": widths}
    limits = {unit: getattr(budget, unit) for unit in now if getattr(budget, unit) is not None}
    return {unit: now[unit] - fraction * full[unit] - 1e-6 for unit, fraction in limits.items()}


def check_budget(graph: sc.ChannelGraph, budget: sc.Budget, allocate: Callable[[sc.Budget], sc.Plan]) -> sc.Plan | None:
    """The budget is met and used up; one that cannot be met is told with what is feasible."""
    least = least_widths(graph, budget)
    narrowest = {g.name: list(range(len(g) - least[g.name])) for g in graph.groups if least[g.name] < len(g)}
    try:
        plan = allocate(budget)
    except sc.SecateurError as error:
        assert "cannot be met" in str(error) and "feasible" in str(error), error
        assert any(over > 0 for over in excess(graph, budget, narrowest).values()), f"{error}, but it can"
        return None

    assert all(over <= 0 for over in excess(graph, budget, plan.removed).values())
    for name, positions in plan.removed.items():
        group = graph.group(name)
        stay = len(group) - len(positions)
        assert stay >= max(least[name], 1) and stay % budget.round_to == 0, f"{name} keeps {stay}"
        assert group.exact and list(positions) == sorted(set(positions))
        back = min(budget.round_to, len(positions))
        more = {**plan.removed, name: positions[back:]}
        assert any(over > 0 for over in excess(graph, budget, more).values()), f"{back} of {name} could stay"
    return plan


def check_slices(graph: sc.ChannelGraph, plan: sc.Plan) -> None:
    """Frozen channels stay, and no axis becomes empty."""
    removed = graph.slices(plan)
    for axis in graph.axes:
        gone = removed.get(axis.name, {}).get(axis.dim, [])
        assert len(gone) < max(len(axis.channels), 1), f"{axis} would be empty"
        assert (axis.channels[gone] > 0).all(), f"frozen positions of {axis} would go"


# ------------------------------------------------------------------------------------ 4: same seed, same plan


def check_repeats(
    spec: Spec, graph: sc.ChannelGraph, plan: sc.Plan, allocate: Callable[[Network, sc.ChannelGraph], sc.Plan]
) -> None:
    """The same network again gives the same graph and plan; the plan as JSON gives the same tensors."""
    model, inputs = network(spec)
    again = sc.trace(model, inputs)
    assert again.summary() == graph.summary()
    assert allocate(model, again).to_json() == plan.to_json()
    read = sc.Plan.from_json(plan.to_json())
    assert read == plan and read.to_json() == plan.to_json()
    one, two = tensors(sc.cut(model, plan)), tensors(sc.cut(model, read))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


# ------------------------------------------------------------------------------------------------- channels in order


def shuffled(graph: sc.ChannelGraph, seed: int) -> dict[str, list[int]]:
    """Another order of the channels of every exact group that may have one."""
    draw = np.random.default_rng(seed)
    free = [g for g in graph.groups if g.exact and not keeps_its_order(graph, g)]
    return {g.name: draw.permutation(len(g)).tolist() for g in free}


def check_relabelled(model: nn.Module, graph: sc.ChannelGraph, inputs: Any, seed: int) -> None:
    """With its channels in another order the network computes what it did."""
    other = permuted(model, graph, shuffled(graph, seed))
    for each in (whole := copy.deepcopy(model), other):
        set_mode(each, training=False)
    with torch.no_grad():
        for a, b in zip(run(whole, fresh(inputs)), run(other, fresh(inputs)), strict=True):
            assert gap(a, b) < 1e-7, "relabelled"  # distances lose half of the digits


def check_everything(spec: Spec) -> bool:
    """One pass over one network; whether there was anything to remove."""
    model, inputs = network(spec)
    disturb(model, spec.seed)
    source = random.Random(spec.seed)
    before = snapshot(model, inputs)
    try:
        graph = sc.trace(model, inputs)
    except NothingToPrune:
        check_untouched(before, snapshot(model, inputs))
        return False

    criterion, strategy = source.choice(("magnitude", "random")), source.choice(("global", "threshold", "uniform"))

    def allocate(model: nn.Module, graph: sc.ChannelGraph, budget: sc.Budget) -> sc.Plan:
        return sc.allocate(graph, sc.score(model, graph, criterion), budget, strategy=strategy)

    budget = random_budget(graph, source)
    plan = sc.make_plan(graph, random_removal(graph, source))
    removed = graph.slices(plan)
    big, small = sc.masked(model, plan), sc.cut(model, plan)
    chosen = check_budget(graph, budget, lambda b: allocate(model, graph, b))
    smaller = None if chosen is None else sc.cut(model, chosen)
    check_untouched(before, snapshot(model, inputs))

    check_slices(graph, plan)
    check_cut(model, big, small, removed, plan)
    check_patched(model, small, plan)
    check_counts(small, graph, inputs, plan)
    check_exact(big, small, removed, inputs, plan)
    check_counts(model, graph, inputs)
    if source.random() < 0.3:
        check_relabelled(model, graph, inputs, spec.seed)
    if chosen is not None and smaller is not None:
        check_slices(graph, chosen)
        check_counts(smaller, graph, inputs, chosen)
        if source.random() < 0.3:  # costly: some are enough
            check_exact(sc.masked(model, chosen), smaller, graph.slices(chosen), inputs, chosen)
            check_repeats(spec, graph, chosen, lambda m, g: allocate(m, g, budget))
    return any(g.exact and len(g) > 1 for g in graph.groups)
