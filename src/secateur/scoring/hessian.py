r"""Second-order scores: the rise of the loss if a row of a layer goes, to second order (arXiv 1905.05934, section 3).

For a layer with Fisher ``F ~ G (x) A`` and ``w_r`` the weights (and the bias) that write row ``r``::

    obd        1/2 sum_j F_rj w_rj^2                       the diagonal of F; nothing makes up for the row
    kron_obd   1/2 G_rr * w_r^T A w_r                      products within the row count
    obs        1/2 sum_j w_rj^2 / ([G^-1]_rr [A^-1]_jj)    all other weights make up for each single one
    kron_obs   1/2 w_r^T A w_r / [G^-1]_rr                 the other rows make up for the row

A channel's score is the sum over the linears and convolutions that write it. The rows that stay make up for those that
go where ``cut`` is given the same factors (:func:`secateur.cut.compensated`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.curvature.damped_inverse import inverse
from secateur.curvature.eigenbasis import identity_basis, second_moments
from secateur.curvature.kronecker import Curvature, Factors, kronecker_factors
from secateur.curvature.layers import layers_of, measurable
from secateur.scoring.sums import by_group, channel_sums, producers
from secateur.tracing.graph import ChannelGraph

DAMPING = 1e-3


def obd(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, loss_fn: Any = None, **passing: Any
) -> dict[str, Tensor]:
    """C-OBD: the diagonal of the Fisher.

    Args:
        model: the model.
        graph: its graph.
        data: batches ``(inputs, targets)``.
        loss_fn: as for :func:`secateur.kronecker_factors`.
        **passing: ``fisher``, ``samples``, ``batches``, ``seed`` of the pass over the data.
    """
    _check(data, loss_fn, "obd")
    names = _measured(model, graph)
    bases = {layer.name: identity_basis(layer) for layer in layers_of(model, "full", names)}
    bases = second_moments(model, bases, data or (), loss_fn, **passing)
    return _by_group(model, graph, {name: (0.5 * b.energy().double()).sum((2, 3)) for name, b in bases.items()})


def kron_obd(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, loss_fn: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Kron-OBD; the options are those of :func:`kron_obs`, without ``damping``."""
    return _kron(model, graph, data, loss_fn, _kron_obd, **options)


def obs(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, loss_fn: Any = None, *,
    damping: float = DAMPING, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """C-OBS; the options are those of :func:`kron_obs`."""
    return _kron(model, graph, data, loss_fn, lambda f: _obs(f, damping), **options)


def kron_obs(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None = None, loss_fn: Any = None, *,
    damping: float = DAMPING, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Kron-OBS.

    Args:
        model: the model.
        graph: its graph.
        data: batches ``(inputs, targets)``, where ``curvature`` is not given.
        loss_fn: as for :func:`secateur.kronecker_factors`.
        damping: what is added to the factors' diagonals before they are inverted, in units of their mean eigenvalue.
        **options: ``curvature``: factors in full form, taken before; or ``fisher``, ``samples``, ``batches``,
            ``positions``, ``seed`` of the pass over the data.
    """
    return _kron(model, graph, data, loss_fn, lambda f: _kron_obs(f, damping), **options)


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


def _kron(
    model: nn.Module, graph: ChannelGraph, data: Iterable[Any] | None, loss_fn: Any, rows: Callable[[Factors], Tensor],
    *, curvature: Curvature | None = None, **passing: Any,
) -> dict[str, Tensor]:  # fmt: skip
    names = _measured(model, graph)
    if curvature is None:
        _check(data, loss_fn, "this criterion")
        curvature = kronecker_factors(model, data or (), loss_fn, form="full", layers=names, **passing)
    elif passing:
        raise SecateurError(f"curvature= is given, and {', '.join(passing)} for taking it: leave one of them out")
    for name in curvature:
        if curvature[name].layer.form != "full":
            raise SecateurError("curvature: factors in full form are needed, kronecker_factors(..., form='full')")
    own = {name: curvature[name].of(model) for name in names if name in curvature}
    return _by_group(model, graph, {name: rows(factors) for name, factors in own.items()})


def _check(data: Any, loss_fn: Any, who: str) -> None:
    if data is None or loss_fn is None:
        raise SecateurError(f"{who} needs data= (batches of inputs and targets) and loss_fn= ('cross_entropy', ...)")


def _measured(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """The linears and convolutions whose rows write channels."""
    measured = [path for path, module in model.named_modules() if measurable(module)]
    paths = {f"{path}.weight" if path else "weight": path for path in measured}
    names = [paths[a.name] for a in producers(graph) if a.dim == 0 and a.name in paths]
    if not names:
        raise SecateurError("no channel is written by a linear or a convolution: use 'magnitude', for instance")
    return names


def _by_group(model: nn.Module, graph: ChannelGraph, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over producers; a group that anything else writes as well has no score, for it would be too low."""
    known = {f"{name}.weight" if name else "weight": values.flatten() for name, values in rows.items()}
    dims = {name: p.ndim for name, p in model.named_parameters()}
    total = channel_sums(graph, producers(graph), lambda a: known.get(a.name) if a.dim == 0 else None)
    whole = [g for g in graph.groups if all(a.name in known and a.dim == 0 for a in g.producers if dims[a.name] > 1)]
    scores = by_group(graph, total)
    return {g.name: scores[g.name] for g in whole if any(dims[a.name] > 1 for a in g.producers)}
