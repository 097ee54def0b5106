r"""Where structured directional pruning leaves the weights, before channels are cut (arXiv 2107.05328).

With ``theta`` the trained weights, ``lambda`` the strength that takes the plan's channels ``Z``, and ``H`` the loss's
second derivatives as the projector knows them::

    radial    theta_g <- max(0, 1 - lambda * s_g / ||theta_g||) * theta_g         each channel along itself
    valley    d_Z = -theta_Z,  d_R = -(H_RR + e I)^-1 H_RZ d_Z                    the rest R makes up for Z

In theory the valley's end is reached along ``-lambda * P_0 u`` first (``shift=1``), which costs nothing where the loss
is quadratic. In networks, at the strength that a budget asks for, this way is as long as the weights themselves and
costs more than it brings: the default is to leave it out.

``Z`` are the producers of the channels where the projector knows how layers are coupled (``"exact"``, ``"lanczos"``).
The Kronecker-factored one takes layers as independent; there ``Z`` are the consumers' weights, which are as good as
gone once a channel is, and it is the consumers that make up for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_choice, check_nonnegative, is_number
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.curvature.null_space import NullSpace, NullSpaceProjector, projector_of
from secateur.plan import Plan
from secateur.repair.contract import REPAIRS, Facts, copy_remaining
from secateur.scoring.directional import Directions, null_space_of
from secateur.surgery.channels import check_plan
from secateur.tracing.channel_rows import along

MODES = ("valley", "radial")


def directed_weights(
    model: nn.Module, plan: Plan, flat: NullSpaceProjector, *, mode: str = "valley", shift: float = 0.0,
    damping: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The weights, of full size, where the pruning ends; the plan's channels stay as they were.

    Args:
        model: the model that the plan was made for, by ``"directional"`` scores; it is left untouched.
        plan: what goes.
        flat: the model's projector.
        mode: ``"valley"`` or ``"radial"``.
        shift: of ``"valley"``: the fraction of the way ``-lambda * P_0 u`` that is gone before channels are taken out.
        damping: of ``"valley"``: keeps the rest from moving far for little, see the projector's ``complete``.

    Returns:
        Parameters that change, by name.

    Raises:
        SecateurError: an unknown mode, a shift outside [0, 1], a plan without its graph or of another model.
    """
    Directed(mode=mode, shift=shift, damping=damping)
    check_plan(model, plan)
    if plan.graph is None:
        raise SecateurError("directed(plan): the plan has no graph (it came from JSON): trace the model and remake it")
    found = Directions(model, plan.graph, flat)
    gone = gone_of(plan, len(found.norm))
    strength = found.strength()
    reached = strength[gone & strength.isfinite()]
    size = float(reached.max()) if len(reached) else 0.0
    if mode == "valley":
        return _valley(model, plan, found, flat, shift * size, damping)
    ratio = torch.where(found.norm > 0, size * found.score / found.norm, torch.zeros_like(found.norm))
    factor = torch.where(gone | (ratio >= 1), 1.0, 1 - ratio)  # one that must stay although it is due stays whole
    factor[0] = 1
    parameters = dict(model.named_parameters())
    return {a.name: found.scaled(a, parameters[a.name].detach(), factor) for a in found.axes}


@REPAIRS.register("directed")
@dataclass(frozen=True)
class Directed(NullSpace):
    """Move what stays along the flat valley of the loss; the projector's settings are those of the criterion.

    Attributes:
        mode: ``"valley"`` or ``"radial"``.
        shift: see :func:`directed_weights`, like ``damping``.
        damping: likewise.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True, plan=True)
    mode: str = "valley"
    shift: float = 0.0
    damping: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, MODES)
        if not is_number(self.shift) or not 0 <= self.shift <= 1:
            raise SecateurError(f"shift={self.shift!r}: a number in [0, 1] is expected")
        if self.damping is not None:
            check_nonnegative("damping", self.damping)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`directed_weights`."""
        flat = projector_of(work, null_space_of(self))
        new = directed_weights(original, plan, flat, mode=self.mode, shift=self.shift, damping=self.damping)
        copy_remaining(new, small, plan)
        return {"flat": dict(flat.facts)}


def gone_of(plan: Plan, size: int) -> Tensor:
    """Which channel ids a plan removes, bool [size]."""
    assert plan.graph is not None
    gone = torch.zeros(size, dtype=torch.bool)
    for name, positions in plan.removed.items():
        gone[torch.as_tensor(plan.graph.group(name).channels[list(positions)])] = True
    return gone


def _valley(
    model: nn.Module, plan: Plan, found: Directions, flat: NullSpaceProjector, size: float, damping: float | None
) -> dict[str, Tensor]:
    start = {name: p.detach() for name, p in model.named_parameters() if name in flat.shapes}
    start = {name: value - size * found.eta[name] if size else value for name, value in start.items()}
    written = {(a.name, a.dim) for a in found.axes}
    fixed: dict[str, dict[int, Tensor]] = {}
    moved: dict[str, Tensor] = {}
    for name, dims in plan.slices.items():
        for dim, positions in dims.items() if name in start else ():
            chosen = (name, dim) in written if flat.side == "producers" else dim == 1 and start[name].ndim > 1
            if chosen:
                where = torch.zeros(start[name].shape[dim], dtype=torch.bool)
                where[positions] = True
                fixed.setdefault(name, {})[dim] = where
                moved[name] = -start[name] * along(where, dim, start[name])
    rest = flat.complete(moved, fixed, damping=damping)
    original = dict(model.named_parameters())
    result = {}
    for name, value in start.items():
        result[name] = value + rest[name].to(value)
        for dim, where in fixed.get(name, {}).items():  # what goes stays as it was, until it goes
            result[name] = torch.where(along(where, dim, value), original[name].detach(), result[name])
    return result
