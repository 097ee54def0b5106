r"""Second-order scores: the rise of the loss if a row of a layer goes, to second order (arXiv 1905.05934, section 3).

For a layer with Fisher ``F ~ G (x) A`` and ``w_r`` the weights (and the bias) that write row ``r``::

    obd        1/2 sum_j F_rj w_rj^2                       the diagonal of F; nothing makes up for the row
    kron_obd   1/2 G_rr * w_r^T A w_r                      products within the row count
    obs        1/2 sum_j w_rj^2 / ([G^-1]_rr [A^-1]_jj)    all other weights make up for each single one
    kron_obs   1/2 w_r^T A w_r / [G^-1]_rr                 the other rows make up for the row

A channel's score is the sum over the linears and convolutions that write it. The repair ``"compensate"`` lets the rows
that stay make up for those that go, with the same factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.errors import CannotMeasure
from secateur._internal.workload import Needs, Workload
from secateur.curvature.damped_inverse import inverse
from secateur.curvature.eigenbasis import identity_basis, second_moments
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import Curvature, Factors, factors_of
from secateur.curvature.layers import Layer, layers_of, measurable, turned, why_not
from secateur.curvature.projections import projections
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.sums import by_group, channel_sums, producers
from secateur.tracing.graph import Axis, ChannelGraph

DAMPING = 1e-3


@dataclass(frozen=True)
class SecondOrder:
    """What all four take: how the Fisher is found, see :class:`secateur.curvature.fisher.Fisher`."""

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    fisher: str = "sampled"
    samples: int = 1
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.targets()
        if self.fisher == "outputs":
            object.__setattr__(self, "needs", Needs(data=True))

    def targets(self) -> Fisher:
        """Where the targets come from."""
        return Fisher(self.fisher, self.samples, self.batches, self.seed)


@CRITERIA.register("obd")
@dataclass(frozen=True)
class OBD(SecondOrder):
    """C-OBD: the diagonal of the Fisher.

    Attributes:
        fisher: ``"sampled"``, ``"exact"``, ``"empirical"`` or ``"outputs"``.
        samples: how many targets are drawn for each example.
        batches: use at most so many batches.
        seed: of the drawn targets.
    """

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """One number a channel."""
        with projections(work.model):
            names = producing_layers(work.model, graph)
            bases = {layer.name: identity_basis(layer) for layer in layers_of(work.model, "full", names)}
            found = second_moments(work, bases, self.targets())
            rows = {name: (0.5 * b.energy().double()).sum((2, 3)) for name, b in found.bases.items()}
            return _by_group(work.model, graph, rows, found.skipped)


@dataclass(frozen=True)
class _Kronecker(SecondOrder, ABC):
    """Scores of Kronecker factors in full form.

    Attributes:
        positions: use so many positions of each batch, spread over all of it.
    """

    positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("positions", self.positions, optional=True)

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        """One number a channel."""
        with projections(work.model):
            curvature = producing_factors(graph, work, self.targets(), self.positions)
            rows = {name: self.rows(factors) for name, factors in curvature.items()}
            return _by_group(work.model, graph, rows, curvature.skipped)

    @abstractmethod
    def rows(self, factors: Factors) -> Tensor:
        """The rise of the loss for each row of a layer, [groups, rows]."""


@CRITERIA.register("kron_obd")
@dataclass(frozen=True)
class KronOBD(_Kronecker):
    """Kron-OBD: products within a row count; nothing makes up for it."""

    def rows(self, factors: Factors) -> Tensor:
        """See the module."""
        return _kron_obd(factors)


@dataclass(frozen=True)
class _Damped(_Kronecker):
    damping: float = DAMPING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonnegative("damping", self.damping)


@CRITERIA.register("obs")
@dataclass(frozen=True)
class OBS(_Damped):
    """C-OBS: all other weights make up for each single one.

    Attributes:
        damping: what is added to the factors' diagonals before they are inverted, in units of their mean eigenvalue.
    """

    def rows(self, factors: Factors) -> Tensor:
        """See the module."""
        return _obs(factors, self.damping)


@CRITERIA.register("kron_obs")
@dataclass(frozen=True)
class KronOBS(_Damped):
    """Kron-OBS: the other rows make up for a row.

    Attributes:
        damping: as for :class:`OBS`.
    """

    def rows(self, factors: Factors) -> Tensor:
        """See the module."""
        return _kron_obs(factors, self.damping)


# ------------------------------------------------------------------------------------ rows of one layer, [groups, rows]


def _quadratic(factors: Factors) -> Tensor:
    """``1/2 w_r^T A w_r``."""
    table = factors.layer.table().double().squeeze(2)
    return 0.5 * ((table @ factors.a.double()) * table).sum(-1)


def _kron_obd(factors: Factors) -> Tensor:
    return _quadratic(factors) * factors.g.double().diagonal(dim1=1, dim2=2)


def _kron_obs(factors: Factors, damping: float) -> Tensor:
    return _quadratic(factors) / inverse(factors.g, damping).diagonal(dim1=1, dim2=2)


def _obs(factors: Factors, damping: float) -> Tensor:
    table = factors.layer.table().double().squeeze(2)
    columns = inverse(factors.a, damping).diagonal(dim1=1, dim2=2)[:, None]
    rows = inverse(factors.g, damping).diagonal(dim1=1, dim2=2)
    return 0.5 * (table.square() / columns).sum(-1) / rows


# ------------------------------------------------------------------------------------------------ from rows to channels


def producing_factors(graph: ChannelGraph, work: Workload, how: Fisher, positions: int | None = None) -> Curvature:
    """Kronecker factors, in full form, of the layers whose rows write channels; measured once."""
    names = producing_layers(work.model, graph)
    return factors_of(work, how, form="full", layers=names, positions=positions)


def producing_layers(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """The linears and convolutions whose rows write channels."""
    measured = _measured(model)
    names = [
        measured[a.name].name for a in producers(graph) if a.name in measured and a.dim == measured[a.name].transposed
    ]
    if not names:
        raise CannotMeasure("no channel is written by a linear or a convolution: use 'magnitude', for instance")
    return names


def _measured(model: nn.Module) -> dict[str, Layer]:
    """The linears and convolutions, by the names of their weights."""
    layers = [
        Layer(path, module, "full") for path, module in model.named_modules() if measurable(module) or turned(module)
    ]
    return {layer.parameter("weight"): layer for layer in layers}


def _by_group(model: nn.Module, graph: ChannelGraph, rows: Mapping[str, Tensor], skipped: Mapping[str, str]) -> Scores:
    """Sums over producers; a group that anything else writes as well has no score, for it would be too low."""
    measured = _measured(model)
    known = {weight: rows[layer.name].flatten() for weight, layer in measured.items() if layer.name in rows}
    dims = {name: p.ndim for name, p in model.named_parameters()}

    def of_rows(axis: Axis) -> Tensor | None:
        return known.get(axis.name) if axis.name in known and axis.dim == measured[axis.name].transposed else None

    total = channel_sums(graph, producers(graph), of_rows)
    sums, found = by_group(graph, total), Scores()
    for group in graph.groups:
        filters = [a for a in group.producers if dims[a.name] > 1]
        missing = [a for a in filters if of_rows(a) is None]
        if filters and not missing:
            found[group.name] = sums[group.name]
        elif missing:
            found.skipped[group.name] = ": ".join(why_not(model, missing[0].name, skipped))
        else:
            found.skipped[group.name] = "no linear or convolution writes it"
    return found
