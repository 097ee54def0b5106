"""Structured directional pruning while training: sDprun (arXiv 2107.05328), group-regularised dual averaging.

One step, with ``theta`` the weights, ``v`` the dual accumulator (``v_0 = theta_0``) and ``g`` the threshold::

    v_n = v_{n-1} - lr_n * grad L(theta_{n-1})
    g_n = g_{n-1} + c * lr_n^(1/2 + mu) * (n^mu - (n-1)^mu)
    theta_n = max(0, 1 - w * g_n / ||v_n||) * v_n      for each channel: one norm over all that produces it
    theta_n = v_n                                      for everything else, which is plain SGD and keeps no v

A channel of one element is gRDA (arXiv 2006.09358), the rule for ``g`` included. Near a minimum the steep directions
push ``v`` back, so ``theta ~ theta_SGD - g * P_0 u``: channels move inside the flat valley only, until they are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur._internal.distributed import Group, broadcast_json
from secateur._internal.errors import SecateurError, unknown
from secateur.allocation.budget import Budget
from secateur.methods.budget_monitor import BudgetMonitor
from secateur.plan import Plan
from secateur.surgery.zero_channels import zero_plan
from secateur.tracing.channel_rows import Channels, HasGroups, producer_axes
from secateur.tracing.graph import ChannelGraph, ChannelGroup, fingerprint
from secateur.tracing.selection import Exclude, excluded

WEIGHTS = ("none", "sqrt")
_ALLOWED = {
    "lr": ("a finite number >= 0", lambda x: x >= 0),
    "c": ("a finite number >= 0 (0 prunes nothing)", lambda x: x >= 0),
    "mu": ("a number in (0, 1]", lambda x: 0 < x <= 1),
}
_TIED = ("lr", "c", "mu", "n", "g")  # must agree where one channel spans several param groups
_TINY = 1e-30  # below the root of the smallest float32, and w / _TINY is still finite


def threshold_increment(n: int, lr: float, c: float, mu: float) -> float:
    """``g_n - g_{n-1}`` for n >= 1; at a constant lr the sum up to n is ``c * sqrt(lr) * (n * lr)^mu``."""
    # n^mu - (n-1)^mu, without the cancellation that this difference has for large n
    growth = 1.0 if n == 1 else n**mu * -math.expm1(mu * math.log1p(-1 / n))
    return c * math.pow(lr, 0.5 + mu) * growth


class SDPrun(torch.optim.Optimizer):
    """SGD that drives whole channels to exact zero while the network trains.

    Pruned are the channels of the graph's exact groups. The elements of a channel are all its positions on its group's
    producers (rows of filters and their biases, weights and biases of norms; for a residual stream those of all its
    layers); they share one norm. Plain SGD is everything else, and every parameter in a param group with ``c = 0``,
    which then is no part of the norm. Parameters without ``requires_grad`` stay as they are, and are no part either.
    A batch norm in a group with ``c = 0`` keeps its bias when its filter is zero, so the channel is not dead: leave
    norms in (the default) if channels shall be cut.

    There is no momentum and no weight decay. Either breaks the meaning of ``v``, the sum of the gradients taken at
    ``theta``, and with it what the solver converges to. Learning rates are those of plain SGD.

    ``g`` never falls. It stands with ``n`` in the param group, as float64, and ``v`` in the state: ``state_dict`` holds
    all, and training continues bit for bit. Memory: one buffer a pruned parameter, none for others. Sums over tied
    layers use ``index_add_``: on a GPU, ask for ``torch.use_deterministic_algorithms`` if the last bit matters. Keep
    parameters in float32 or float64: in half precision ``lr * grad`` is lost beside ``v``.

    Args:
        model: the model to train.
        graph: its channel graph, from :func:`secateur.trace`.
        lr: learning rate, >= 0.
        c: strength of the pruning, >= 0; usually 5e-4 to 5e-3; 0 is plain SGD, bit for bit.
        mu: growth of the threshold in time, in (0, 1]; usually 0.4 to 0.7; more means more pruned at the end.
        weights: ``"none"``: ``w = 1``; ``"sqrt"``: the root of the channel's number of elements, so that large channels
            are not spared for their size (a ``c`` smaller by about that root does the same work then); or numbers by
            group name, 1 for groups that are not named.
        exclude: what is not pruned: patterns of group names or module paths, modules, or types of modules.
        budget: what may remain (ours, not of the paper): the threshold grows until the network without its zero
            channels is within the budget, and then stands still; it grows on if channels come back to life. With a
            constant threshold those that stay go to a stationary point of the plain loss, so that nothing is left of
            the shrinkage: choose ``c`` for the budget to be reached well before the end, which
            :attr:`reached` tells. Of several processes, rank 0 decides whether it is met.
        prox_every: K: the threshold grows in each step, but is applied in each K-th only. In between ``theta`` takes
            the same gradient steps as ``v``, from where the last threshold left it, so zeros may move. End the training
            on a multiple of K.
        param_groups: parameters, or dicts with their own ``lr``, ``c`` or ``mu``, as for any optimizer; default: all.
        group: the processes that train along; ``None`` for all there are.

    Raises:
        SecateurError: bad values, a graph of another model, nothing to prune, or a channel that spans param groups with
            different settings.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: HasGroups,
        lr: float = 0.1,
        c: float = 5e-4,
        mu: float = 0.6,
        *,
        weights: str | Mapping[str, float] = "none",
        exclude: Exclude = (),
        budget: Budget | None = None,
        prox_every: int = 1,
        param_groups: Iterable[Any] | None = None,
        group: Group = None,
    ) -> None:
        traced = getattr(graph, "fingerprint", None)
        if traced is not None and traced != fingerprint(model):
            raise SecateurError(
                "SDPrun(graph=...): the graph is of another model (names or shapes of its parameters differ); "
                "use the graph that trace(model, example_inputs) gives for the model that is trained"
            )
        by_name = _check_weights(weights, graph) if isinstance(weights, Mapping) else None
        if by_name is None and weights not in WEIGHTS:
            raise unknown("weights", weights, WEIGHTS)
        self.skipped = _excluded(model, graph, exclude)
        if isinstance(prox_every, bool) or not isinstance(prox_every, int) or prox_every < 1:
            raise SecateurError(f"SDPrun(prox_every={prox_every!r}): a whole number of steps, 1 or more, is expected")
        self._axes = producer_axes(model, _Without(graph, frozenset(self.skipped)))
        self._weights = None if by_name is None else _by_channel(by_name, graph)
        self._monitor: BudgetMonitor | None = None
        if budget is not None:
            if not isinstance(graph, ChannelGraph):
                raise SecateurError("SDPrun(budget=...): the graph must be one that trace(model, inputs) gives")
            self._monitor = BudgetMonitor(model, graph, budget, self.skipped)
        self.group = group
        self._graph: HasGroups | None = graph
        self._names = dict(model.named_parameters())
        self._key: list[Any] | None = None  # what the present _pruned and _plain were made for
        self._pruned: _Pruned
        self._plain: list[list[nn.Parameter]] = []
        kind = "named" if by_name is not None else weights
        defaults = {"lr": lr, "c": c, "mu": mu, "weights": kind, "prox_every": prox_every, "n": 0, "g": 0.0}
        defaults |= {"held": False} if budget is not None else {}
        super().__init__(model.parameters() if param_groups is None else param_groups, defaults)
        self._arrange()
        if not self._pruned.channels.parameters and any(group["c"] > 0 for group in self.param_groups):
            raise SecateurError(
                "SDPrun(graph=...): nothing to prune: no exact group of the graph has a producer among the trained "
                "parameters with c > 0; graph.summary() says why"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings, during training too; their ``n`` and ``g`` start at 0."""
        settings = {**self.defaults, **param_group}
        for name, (allowed, ok) in _ALLOWED.items():
            value = settings[name]
            if not (isinstance(value, int | float | Tensor) and math.isfinite(value) and ok(value)):
                raise SecateurError(f"SDPrun({name}={value!r}): {allowed} is expected")
        for name in ("weights", "prox_every"):
            if settings[name] != self.defaults[name]:
                raise SecateurError(f"SDPrun(param_groups=...): {name} is one for all; give it to SDPrun itself")
        super().add_param_group(param_group)
        self._key = None

    @property
    def reached(self) -> bool:
        """Whether the zero channels met the budget in the last step."""
        return any(group.get("held", False) for group in self.param_groups)

    @property
    def done(self) -> bool:
        """Whether all is zero that shall be: the budget is :attr:`reached`; without a budget there is no end."""
        return self.reached

    @property
    def steps_needed(self) -> int | None:
        """How many steps it takes at least: nobody knows, since it depends on the gradients."""
        return None

    def plan(self) -> Plan:
        """The plan that removes every channel that is zero now, for :func:`secateur.cut`.

        Raises:
            SecateurError: the model was cut already, or the graph is none of :func:`secateur.trace`.
        """
        if self._graph is None:
            raise SecateurError(
                "SDPrun.plan(): the optimizer follows a model that was cut, which its graph does not describe; trace "
                "the smaller model, and call zero_channels(model, graph)"
            )
        if not isinstance(self._graph, ChannelGraph):
            raise SecateurError("SDPrun.plan(): the graph must be one that trace(model, inputs) gives")
        return zero_plan(self._names, self._graph, without=self.skipped)

    def detach(self) -> None:
        """Prune no more: from now on this is plain SGD, from the weights as they are; zeros may move."""
        for group in self.param_groups:
            group["c"], group["g"] = 0.0, 0.0
            if "held" in group:
                group["held"] = False
            for p in group["params"]:
                self.state.pop(p, None)
        self._key = None

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "_axes": self._axes, "_weights": self._weights, "_monitor": self._monitor, "_graph": self._graph,
            "_names": self._names, "skipped": self.skipped, "group": self.group,
        }  # fmt: skip
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict ends here too
        self._key = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients at the present weights.

        Args:
            closure: computes the loss and its gradients again, and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_sparse(p for group in self.param_groups for p in group["params"])
        self._arrange()
        channels = self._pruned.channels
        v = [self._v(p) for p in channels.parameters]
        first = self.param_groups[0]
        apply_threshold = (first["n"] + 1) % first["prox_every"] == 0
        rates: list[float] = []
        for group, plain, part in zip(self.param_groups, self._plain, channels.members, strict=True):
            lr = float(group["lr"])
            group["n"] += 1
            if not group.get("held", False):
                group["g"] += threshold_increment(group["n"], lr, group["c"], group["mu"])
            rates += [lr] * len(v[part])
            params = plain if apply_threshold else group["params"]
            _descend(params, params, lr)
            if not (apply_threshold and channels.on_cpu):
                _descend(v[part], channels.parameters[part], lr)

        def stepped(k: int) -> Tensor:  # one at a time: on a CPU it is measured while it is in the cache
            grad = channels.parameters[k].grad if channels.on_cpu else None
            return v[k] if grad is None else v[k].add_(grad, alpha=-rates[k])

        if apply_threshold and v:
            zero = self._pruned.shrink(v, stepped, [group["g"] for group in self.param_groups])
            if self._monitor is not None:
                held = self._monitor.is_met(zero, self._groups_of)
                held = broadcast_json(held, self._pruned.weight.device, self.group)
                for group in self.param_groups:
                    group["held"] = held
        return loss

    @torch.no_grad()
    def follow_cut(
        self,
        replaced: Mapping[nn.Parameter, nn.Parameter],
        kept: Mapping[nn.Parameter, Mapping[int, Tensor]],
    ) -> None:
        """Go on with the parameters of a cut model. Does it all: replaces them, slices the state and the channels.

        What a cut takes from the other dims of a producer (columns of a filter that read a dead channel) has no
        gradient and would not move; it stays in its channel's norm and size, as a constant. So the cut network trains
        exactly as the uncut one would.

        Args:
            replaced: the new parameter of each old one that changes.
            kept: int64 positions that stay, by old parameter and dim; dims not named stay whole.

        Raises:
            SecateurError: the parameters have been replaced already, so v can no longer be sliced.

        """
        known = {p for group in self.param_groups for p in group["params"]}
        if any(new in known and new is not old for old, new in replaced.items()):
            raise SecateurError(
                "SDPrun.follow_cut(replaced=...): the optimizer holds new parameters already; call this while it "
                "holds the old ones: it replaces them itself and slices their state"
            )
        for old, new in replaced.items():
            where = {dim: stay.to(old.device) for dim, stay in kept.get(old, {}).items()}
            state = self.state.pop(old, {})
            if old in self._axes:
                dim, ids = self._axes.pop(old)
                state |= _cut_off(state.get("v", old), dim, where, state)
                self._axes[new] = (dim, ids[where[dim].cpu()] if dim in where else ids)
            if "v" in state:
                state["v"] = _narrow(state["v"], where)
            if state:
                self.state[new] = state
        for group in self.param_groups:
            group["params"] = [replaced.get(p, p) for p in group["params"]]
        if self._monitor is not None:
            self._monitor.replace_parameters(replaced)
        if replaced:
            self._graph = None
        self._key = None

    def _v(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "v" not in state:
            state["v"] = p.detach().clone(memory_format=torch.preserve_format)
        return state["v"]

    def _arrange(self) -> None:
        """Find the pruned channels anew if devices, dtypes or what is pruned have changed, and check shared ones."""
        pruning = [group["c"] > 0 or group["g"] > 0 for group in self.param_groups]  # once begun, c = 0 only stops g
        parts = [
            [p for p in group["params"] if on and p in self._axes and p.requires_grad]
            for group, on in zip(self.param_groups, pruning, strict=True)
        ]
        key = [[(p.device, p.dtype, id(p)) for p in part] for part in parts]
        if key != self._key:
            self._key = key
            weights = self._weights if self._weights is not None else self.param_groups[0]["weights"]
            self._pruned = _Pruned(Channels(self._axes, parts), self.state, weights)
            if self._monitor is not None:
                pruned = set(self._pruned.channels.parameters)
                self._groups_of = self._monitor.groups_of(pruned, self._pruned.channels.ids).to(
                    self._pruned.weight.device
                )
            members = {p for part in parts for p in part}
            self._plain = [[p for p in group["params"] if p not in members] for group in self.param_groups]
        for i, j, p in self._pruned.channels.tied:
            _refuse_different(i, j, p, self.param_groups)


class _Pruned:
    """Channels with what the threshold needs to know of them."""

    def __init__(self, channels: Channels, state: Mapping[Any, Any], weights: str | Tensor) -> None:
        cuts = {p: state[p] for p in channels.parameters if "cut_size" in state.get(p, ())}
        size = channels.size() + channels.sum({p: cut["cut_size"] for p, cut in cuts.items()})
        self.channels = channels
        self.weight = size.sqrt() if isinstance(weights, str) and weights == "sqrt" else torch.ones_like(size)
        if isinstance(weights, Tensor):
            self.weight[:-1] = weights[channels.ids].to(size)
        self.constant = channels.sum({p: cut["cut_energy"] for p, cut in cuts.items()})

    def shrink(self, v: list[Tensor], measured: Callable[[int], Tensor], g: list[float]) -> Tensor:
        """``theta = max(0, 1 - w * g / ||v||) * v``, with one g a part; ``measured(k)`` gives ``v[k]`` for its norm.

        Returns:
            Which channels are zero now, bool.
        """
        norm = self.channels.energy(measured).add_(self.constant).sqrt_().clamp_min_(_TINY)
        share = torch.div(self.weight, norm)
        for part, threshold in zip(self.channels.slices, g, strict=True):
            share[part].mul_(threshold).clamp_max_(1)
        share[-1] = 0
        self.channels.shrink(share, v)
        return share[:-1] >= 1


@dataclass(frozen=True)
class _Without:
    """A graph without some of its groups."""

    graph: HasGroups
    without: frozenset[str]

    @property
    def groups(self) -> list[ChannelGroup]:
        return [group for group in self.graph.groups if group.name not in self.without]


def _excluded(model: nn.Module, graph: HasGroups, exclude: Exclude) -> dict[str, str]:
    """The groups that are not pruned -> why; of parameters that are not trained a group prunes the others."""
    if isinstance(graph, ChannelGraph):
        return excluded(model, graph, exclude, frozen=False)
    if exclude not in ((), []):
        raise SecateurError("SDPrun(exclude=...): the graph must be one that trace(model, inputs) gives")
    return {}


def _check_groups(names: Iterable[str], graph: HasGroups, argument: str) -> None:
    known = [group.name for group in graph.groups]
    for name in names:
        if name not in known:
            raise unknown(f"group in SDPrun({argument}=...)", name, known)


def _check_weights(weights: Mapping[str, float], graph: HasGroups) -> Mapping[str, float]:
    _check_groups(weights, graph, "weights")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise SecateurError(
                f"SDPrun(weights={{{name!r}: {weight!r}}}): a finite number above 0 is expected; to leave the group "
                "alone, name it in exclude="
            )
    return weights


def _by_channel(weights: Mapping[str, float], graph: HasGroups) -> Tensor:
    """A weight by channel id, float64."""
    found = torch.ones(1 + max((int(g.channels.max(initial=0)) for g in graph.groups), default=0), dtype=torch.float64)
    for group in graph.groups:
        found[torch.as_tensor(group.channels)] = float(weights.get(group.name, 1))
    return found


def _descend(tensors: Iterable[Tensor], params: Iterable[nn.Parameter], lr: float) -> None:
    """``tensor -= lr * gradient`` wherever there is a gradient."""
    moving = [(tensor, p.grad) for tensor, p in zip(tensors, params, strict=True) if p.grad is not None]
    if not moving:
        return
    if hasattr(torch, "_foreach_add_"):
        torch._foreach_add_([tensor for tensor, _ in moving], [grad for _, grad in moving], alpha=-lr)
        return
    for tensor, grad in moving:
        tensor.add_(grad, alpha=-lr)


def _refuse_sparse(params: Iterable[nn.Parameter]) -> None:
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            raise SecateurError(
                f"SDPrun.step: the gradient of a parameter of shape {list(p.shape)} is sparse; dense ones are "
                "expected: build its embedding with sparse=False"
            )


def _refuse_different(i: int, j: int, p: nn.Parameter, groups: list[dict[str, Any]]) -> None:
    for name in _TIED:
        one, other = float(groups[i][name]), float(groups[j][name])
        if one != other:
            raise SecateurError(
                f"SDPrun(param_groups=...): channels of a parameter of shape {list(p.shape)} span param groups {i} and "
                f"{j}, which have {name} = {one:g} and {other:g}; give both the same, or c = 0 to the one that shall "
                "not be pruned"
            )


def _narrow(tensor: Tensor, where: Mapping[int, Tensor]) -> Tensor:
    for dim, stay in where.items():
        tensor = tensor.index_select(dim, stay)
    return tensor


def _cut_off(
    v: Tensor, dim: int, where: Mapping[int, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, " rows"]]:
    """Energy and number of elements that cuts, this one and earlier ones, took from each row of ``dim`` that stays."""
    own = {dim: where[dim]} if dim in where else {}
    rows = _narrow(v, own).to(torch.promote_types(v.dtype, torch.float32))
    energy, size = (
        _narrow(state[key], {0: where[dim]} if own else {}) if key in state else rows.new_zeros(rows.shape[dim])
        for key in ("cut_energy", "cut_size")
    )
    for d, stay in where.items():
        if d != dim:
            gone = torch.ones(rows.shape[d], dtype=torch.bool, device=v.device).index_fill_(0, stay, False)
            off = rows.index_select(d, gone.nonzero().squeeze(1)).movedim(dim, 0).flatten(1)
            energy, size = energy + off.square().sum(1), size + off.shape[1]
            rows = rows.index_select(d, stay)
    return {"cut_energy": energy, "cut_size": size} if size.any() else {}
