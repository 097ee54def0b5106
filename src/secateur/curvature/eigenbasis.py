"""The Kronecker-factored eigenbasis (EigenDamage, arXiv 1905.05934, section 4; second moments arXiv 1806.03884).

With ``A = Qa diag(a) Qa^T`` and ``G = Qg diag(g) Qg^T`` the Fisher of a layer is diagonal in the coordinates::

    W'[row, tap, column] = Qg^T W[:, tap, :] Qa        curvature[row, tap, column] = g[row] * a[column]

and removing coordinates costs half the sum of their energies ``W'^2 * curvature``. EKFAC replaces the curvature by the
mean over examples of the squared gradient in these coordinates, the best diagonal that the basis allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur._internal.distributed import all_reduce_
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Workload
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import Factors
from secateur.curvature.layers import Layer, input_samples, output_samples, wide, with_sharers
from secateur.curvature.passes import NO_GRADIENT, NOT_REACHED, watch

NULL = 1e-10
"""Eigenvalues up to this fraction of the largest count as zero."""
GRADIENTS_AT_ONCE = 2**26
"""Numbers that gradients of single examples may take at a time."""


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The eigenbasis of one layer's factors; eigenvalues ascend.

    Attributes:
        layer: whose it is.
        qa: [groups, columns, columns], orthonormal columns.
        a: eigenvalues of the inputs' factor, [groups, columns], zero in the null space.
        qg: [groups, rows, rows].
        g: eigenvalues of the gradients' factor, [groups, rows].
        moments: second moments of the gradient in this basis, [groups, rows, taps, columns], where there are any.
    """

    layer: Layer
    qa: Tensor
    a: Tensor
    qg: Tensor
    g: Tensor
    moments: Tensor | None = None

    def rotate(self, table: Tensor) -> Tensor:
        """A table [groups, rows, taps, columns] in the coordinates of the basis."""
        return _both(table, self.qg.mT, self.qa)

    def back(self, table: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`."""
        return _both(table, self.qg, self.qa.mT)

    def curvature(self) -> Tensor:
        """The diagonal of the Fisher in these coordinates, [groups, rows, taps, columns] (or 1 tap for all)."""
        if self.moments is not None:
            return self.moments
        return self.g[:, :, None, None] * self.a[:, None, None, :]

    def energy(self) -> Tensor:
        """Twice what removing each coordinate of the layer's weight costs, [groups, rows, taps, columns]."""
        return self.rotate(self.layer.table().to(self.qa)).square() * self.curvature()


def _both(table: Tensor, left: Tensor, right: Tensor) -> Tensor:
    groups, rows, taps, columns = table.shape
    out = left @ table.to(left).reshape(groups, rows, taps * columns)
    return out.reshape(groups, -1, columns).matmul(right).reshape(groups, -1, taps, right.shape[-1])


def eigenbasis_of(factors: Factors) -> Eigenbasis:
    """The eigenbasis of a layer's factors, computed in float64 and kept in the factors' precision."""
    qa, a = eigen(factors.a)
    qg, g = eigen(factors.g)
    return Eigenbasis(factors.layer, qa, a, qg, g)


def sorted_by_damage(basis: Eigenbasis) -> Eigenbasis:
    """The basis with rows and columns by what their removal costs, the dearest first."""
    damage = basis.energy()[0].sum(1)
    rows, columns = damage.sum(1).argsort(descending=True), damage.sum(0).argsort(descending=True)
    moments = None if basis.moments is None else basis.moments[:, rows][..., columns]
    return replace(
        basis, qa=basis.qa[..., columns], a=basis.a[:, columns], qg=basis.qg[..., rows], g=basis.g[:, rows],
        moments=moments,
    )  # fmt: skip


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and ascending eigenvalues of a factor, computed in float64, in its own precision."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = torch.where(values > NULL * values[:, -1:].clamp_min(0), values, torch.zeros_like(values))
    return vectors.to(matrix), values.to(matrix)


@dataclass(frozen=True, eq=False)
class Moments:
    """Bases with second moments, and the layers that have none, with reasons."""

    bases: Mapping[str, Eigenbasis]
    skipped: Mapping[str, str]


def identity_basis(layer: Layer) -> Eigenbasis:
    """The basis in which the coordinates are the weights themselves (curvature unknown until moments are taken)."""
    table = wide(layer.table())
    groups, rows, _, columns = table.shape

    def eye(size: int) -> Tensor:
        return torch.eye(size, dtype=table.dtype, device=table.device).expand(groups, size, size)

    return Eigenbasis(layer, eye(columns), table.new_zeros(groups, columns), eye(rows), table.new_zeros(groups, rows))


def second_moments(work: Workload, bases: Mapping[str, Eigenbasis], how: Fisher) -> Moments:
    """The bases with the mean over examples of the squared gradient in their coordinates (EKFAC's second pass).

    In the identity's coordinates this is the diagonal of the Fisher. The gradient of a weight that several layers hold
    is the sum over all its uses; the first of them has the moments.

    Args:
        work: the model that the bases are of, the data and the loss.
        bases: by the layers' names.
        how: the targets.

    Raises:
        SecateurError: as for the factors; an input without a batch dim.
    """
    layers = with_sharers(work.model, [basis.layer for basis in bases.values()])
    owner = {id(layer.module.weight): layer.name for layer in reversed(layers)}
    with torch.inference_mode(False):
        sums = {name: torch.zeros_like(_both(b.layer.table().to(b.qa), b.qg.mT, b.qa)) for name, b in bases.items()}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def on_gradient(layer: Layer, g: Tensor, x: Tensor) -> None:
        calls.setdefault(owner[id(layer.module.weight)], []).append((x, g))

    def on_draw() -> None:
        for name, own in calls.items():
            sums[name] += _squares(bases[name], own)
        calls.clear()

    seen = watch(
        work, layers, on_input=lambda layer, x: x.clone(), on_gradient=on_gradient, on_draw=on_draw, how=how,
        what="second moments",
    )  # fmt: skip
    for moments in sums.values():
        all_reduce_(moments, work.group)
    strange = {id(layer.module.weight): seen.strange[layer.name] for layer in layers if layer.name in seen.strange}
    ran, learns = ({id(layer.module.weight) for layer in layers if n[layer.name]} for n in (seen.calls, seen.gradients))
    left: dict[str, str] = {}
    for layer in layers:
        weight = id(layer.module.weight)
        if weight in strange:
            left[layer.name] = strange[weight]
        elif owner[weight] != layer.name:
            left[layer.name] = f"its weight is that of {owner[weight]}, which has the moments of both"
        elif weight not in learns:
            left[layer.name] = NO_GRADIENT if weight in ran else NOT_REACHED
    found = {
        name: replace(basis, moments=sums[name] / (seen.examples * seen.how.samples))
        for name, basis in bases.items()
        if name not in left
    }
    return Moments(found, left)


def _squares(basis: Eigenbasis, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over examples of their squared gradients in the basis, [groups, rows, taps, columns]."""
    layer = basis.layer
    batch = {x.shape[0] for x, _ in calls}
    if len(batch) != 1 or any(x.ndim < len(layer.kernel) + 2 - (not layer.kernel) for x, _ in calls):
        raise SecateurError(f"second moments of {layer.name!r}: each of its inputs must begin with the batch")
    x, g = calls[0]
    if len(calls) == 1 and not layer.kernel and x.ndim == 2:  # one position: a gradient is a product, and so its square
        samples, slopes = input_samples(layer, wide(x)), output_samples(layer, wide(g))
        seen = (samples[0, :, 0, 0].to(basis.qa) @ basis.qa[0]).square()
        wanted = (slopes[0, :, 0].to(basis.qa) @ basis.qg[0]).square()
        return (wanted.mT @ seen)[None, :, None]
    return sum(part.square().sum(0) for part in _parts(basis, calls, batch.pop()))  # type: ignore[return-value]


def _parts(basis: Eigenbasis, calls: list[tuple[Tensor, Tensor]], batch: int) -> Iterable[Tensor]:
    """Gradients of single examples in the basis, [examples, groups, rows, taps, columns], a part of the batch each."""
    groups, rows, taps, columns = basis.layer.table().shape
    step = max(1, GRADIENTS_AT_ONCE // (groups * rows * taps * columns))
    for begin in range(0, batch, step):
        end = begin + step
        yield sum(_gradients(basis, wide(x[begin:end]), wide(g[begin:end])) for x, g in calls)  # type: ignore[misc]


def _gradients(basis: Eigenbasis, x: Tensor, g: Tensor) -> Tensor:
    samples = input_samples(basis.layer, x).to(basis.qa)  # [groups, batch, positions, taps, columns]
    slopes = output_samples(basis.layer, g).to(basis.qa)  # [groups, batch, positions, rows]
    positions, taps, columns = samples.shape[2:]
    if positions < slopes.shape[-1]:  # rotating the samples is less work than rotating the gradients
        samples, slopes = samples @ basis.qa[:, None, None], slopes @ basis.qg[:, None]
        return (slopes.mT @ samples.flatten(3)).unflatten(-1, (taps, columns)).transpose(0, 1)
    found = (slopes.mT @ samples.flatten(3)).unflatten(-1, (taps, columns))
    found = torch.einsum("gor,gboki->gbrki", basis.qg, found)
    return (found @ basis.qa[:, None, None]).transpose(0, 1)
