r"""What stays makes up for what goes (Optimal Brain Surgeon on Kronecker factors, arXiv 1905.05934, section 3).

Channels go, and the least rise of the loss of one layer under it has a closed form, for all of them jointly::

    producers    W[stay, :] += G[stay, stay]^-1 G[stay, gone] W[gone, :]       the published one: the rows that stay
    consumers    W[:, stay] += W[:, gone] A[gone, stay] A[stay, stay]^-1       ours: the columns that stay

A consumer whose input vanishes predicts it from its other inputs, by least squares over the data (compare arXiv
1707.06168); no label is needed. A producer's rows can make up only for what moves the loss in the same direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_choice, check_count, check_nonnegative
from secateur._internal.workload import Needs, Workload
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import Curvature, factors_of
from secateur.curvature.layers import Layer, reads_by, why_not
from secateur.curvature.obs_update import obs_update_columns, obs_update_rows
from secateur.plan import Plan
from secateur.repair.contract import LEFT_WHOLE, REPAIRS, Facts, copy_remaining
from secateur.scoring.hessian import producing_factors
from secateur.tracing.channel_rows import along

DAMPING = 1e-3
SIDES = {"producers": (0, obs_update_rows), "consumers": (1, obs_update_columns)}
"""By name: the dim of the weight that loses channels, and what makes up for it."""


def compensated_weights(
    model: nn.Module, plan: Plan, curvature: Curvature, *, at: str = "producers", damping: float = DAMPING
) -> dict[str, Tensor]:
    """The weights, of full size, in which what stays makes up for what the plan removes; what goes is as it was.

    Args:
        model: the model that the plan was made for; it is left untouched.
        plan: what goes.
        curvature: factors of the model's layers, in either form; layers without any are not among the answer.
        at: ``"producers"`` or ``"consumers"`` of the channels.
        damping: added to the diagonal of the factor that is inverted, in units of its mean eigenvalue.

    Returns:
        Weights and biases that change, by name.

    Raises:
        SecateurError: unknown side, factors of another model, singular factors.
    """
    check_choice("at", at, SIDES)
    dim, obs_update = SIDES[at]
    found: dict[str, Tensor] = {}
    for factors in curvature.values():
        weight_name, axis = factors.layer.parameter("weight"), dim ^ int(factors.layer.transposed)
        removed = plan.slices.get(weight_name, {}).get(axis, [])
        if not removed:
            continue
        layer = factors.of(model).layer
        gone = torch.zeros(layer.module.weight.shape[axis], dtype=torch.bool)
        gone[removed] = True
        before = layer.table().double()
        weight, bias = layer.weights(before + obs_update(factors, -before, gone, damping))
        gone = gone.to(weight.device)
        old = layer.module.weight.detach()
        found[weight_name] = torch.where(along(gone, axis, weight), old.to(weight), weight)
        if bias is not None:
            found[layer.parameter("bias")] = (
                torch.where(gone, layer.module.bias.detach().to(bias), bias) if dim == 0 else bias
            )
    return found


@REPAIRS.register("compensate")
@dataclass(frozen=True)
class Compensate:
    """The OBS update: by Kronecker factors, what stays makes up for what goes.

    With the same settings as the criterion (``obs``, ``kron_obd``, ``kron_obs``) the same factors are used.

    Attributes:
        at: ``"producers"`` or ``"consumers"`` of the channels.
        damping: added to the diagonal of the factor that is inverted, in units of its mean eigenvalue.
        fisher: as for :class:`secateur.OBS`, like the rest.
        samples: draws of targets for each example.
        batches: use at most so many batches.
        seed: of the drawn targets.
        positions: use so many positions of each batch.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True, plan=True)
    at: str = "producers"
    damping: float = DAMPING
    fisher: str = "sampled"
    samples: int = 1
    batches: int | None = None
    seed: int = 0
    positions: int | None = None

    def __post_init__(self) -> None:
        check_choice("at", self.at, SIDES)
        check_nonnegative("damping", self.damping)
        check_count("positions", self.positions, optional=True)
        self.targets()

    def targets(self) -> Fisher:
        """Where the targets come from."""
        return Fisher(self.fisher, self.samples, self.batches, self.seed)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`compensated_weights`."""
        how = self.targets()
        if self.at == "producers" and plan.graph is not None:
            curvature = producing_factors(plan.graph, work, how, self.positions)
        else:
            curvature = factors_of(work, how, form="full", positions=self.positions)
        new = compensated_weights(original, plan, curvature, at=self.at, damping=self.damping)
        copy_remaining(new, small, plan)
        axes = {name: SIDES[self.at][0] for name, p in original.named_parameters() if p.ndim > 1}
        layers = [Layer(path, m) for path, m in original.named_modules() if reads_by(m) is not None]
        axes |= {layer.parameter("weight"): SIDES[self.at][0] ^ int(layer.transposed) for layer in layers}
        due = [name for name, dims in plan.slices.items() if axes.get(name) in dims and name not in new]
        left = dict(sorted(why_not(original, name, curvature.skipped) for name in due))
        return {"compensated": sorted({name.rpartition(".")[0] for name in new}), LEFT_WHOLE: left}
