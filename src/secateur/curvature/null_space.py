r"""The projector on the flat directions of the loss, ``P_0`` (directional pruning, arXiv 2006.09358, section 2).

Three ways to know which directions are steep; everything else is flat::

    exact     all eigenpairs of the curvature             P_0 x = x - V V^T x          a few thousand parameters
    lanczos   its k largest by size, matrix-free          P_0 x = x - V V^T x          any network, slowly
    kfe       the Kronecker-factored eigenbasis           (P_0 x)' = x' * 1[curvature <= tau]          any network, fast
              of each layer, hard or soft                 (P_0 x)' = x' * tau / (tau + curvature)

``x'`` are coordinates in the basis. Steep is the smallest set of directions that carries a share of the curvature's
mass, the sum of its absolute eigenvalues, in the whole network; so the rule does not depend on the loss's scale.

The matrix of the first two is Gauss and Newton's unless the Hessian is asked for. Both agree where every example is
fitted. Before, the Hessian has hundreds of small eigenvalues of both signs besides, which are no walls of a valley, but
would count as steep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from secateur._internal.checks import (
    check_choice,
    check_count,
    check_flag,
    check_open_fraction,
    check_positive,
    check_seed,
)
from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.registry import options_of
from secateur._internal.workload import Workload
from secateur.curvature.damped_inverse import check_damping
from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, second_moments
from secateur.curvature.fisher import Fisher
from secateur.curvature.hessian_products import MATRICES, Products, Vector
from secateur.curvature.kronecker import Factors, factors_of
from secateur.curvature.layers import FORMS
from secateur.curvature.obs_update import obs_update_columns, obs_update_rows
from secateur.tracing.channel_rows import along

Fixed = Mapping[str, Mapping[int, Tensor]]
EXACT_PARAMETERS = 20_000
"""Parameters up to which all eigenpairs are found."""


class NullSpaceProjector(ABC):
    """What all three can do.

    Attributes:
        shapes: the parameters it knows, with their shapes; others are in no direction.
        facts: how it was found: the number of steep directions, where curvature was cut off, and so on.
    """

    shapes: Mapping[str, torch.Size]
    facts: Mapping[str, Any]
    side: ClassVar[str]
    """Where the rest can make up for channels that go: at their ``"producers"`` or their ``"consumers"``."""

    def check_model(self, model: nn.Module) -> None:
        """Raise if it was found on a model with other parameters."""
        own = {name: p.shape for name, p in model.named_parameters()}
        for name, shape in self.shapes.items():
            if own.get(name) != shape:
                raise SecateurError(
                    f"the projector was found on another model: {name!r} has shape {list(shape)} there and "
                    f"{list(own[name]) if name in own else 'is not'} here; find it on this model"
                )

    @abstractmethod
    def project(self, vector: Vector) -> dict[str, Tensor]:
        """``P_0 vector``, one tensor for each parameter it knows; what the vector lacks is zero."""

    @abstractmethod
    def complete(self, moved: Vector, fixed: Fixed, *, damping: float | None = None) -> dict[str, Tensor]:
        """How all else should move, for the loss to rise least, if some parameters move as given.

        Args:
            moved: the given displacement, zero where nothing is given.
            fixed: which positions of a dim are given, bool, by parameter and dim.
            damping: keeps all else from moving far for little; in units of the least steep curvature (default 1), or
                for ``"kfe"`` of the mean eigenvalue of the factor that is inverted (default 0.001).

        Returns:
            The whole displacement: as given in the fixed rows, the answer elsewhere.
        """


@dataclass(frozen=True)
class NullSpace:
    """How the flat directions are found.

    Attributes:
        basis: ``"kfe"``, ``"lanczos"`` or ``"exact"``.
        share: in (0, 1), the share of the curvature's mass that is steep; with ``"lanczos"``, ``k`` decides.
        soft: of ``"kfe"``: flatness falls gradually.
        ekfac: of ``"kfe"``: second moments are taken in the eigenbasis, in a second pass over the data.
        form: of ``"kfe"``: see :func:`secateur.kronecker_factors`.
        fisher: of ``"kfe"``: likewise.
        samples: of ``"kfe"``: likewise.
        layers: of ``"kfe"``: paths of the layers that have directions; all if not given.
        positions: of ``"kfe"`` in full form: likewise.
        k: of ``"lanczos"``: how many steep directions.
        tolerance: of ``"lanczos"``: of the eigenvalues.
        iterations: of ``"lanczos"``: at most so many.
        matrix: of ``"lanczos"`` and ``"exact"``: ``"gauss_newton"`` or ``"hessian"``.
        batches: use at most so many batches.
        seed: of the drawn targets and of Lanczos' first vector.

    Raises:
        SecateurError: an unknown basis, a setting that is not its own or has no such value.
    """

    basis: str = "kfe"
    share: float = 0.99
    soft: bool | None = None
    ekfac: bool | None = None
    form: str | None = None
    fisher: str | None = None
    samples: int | None = None
    layers: tuple[str, ...] | None = None
    positions: int | None = None
    k: int | None = None
    tolerance: float | None = None
    iterations: int | None = None
    matrix: str | None = None
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("basis", self.basis, OF_BASIS)
        check_open_fraction("share", self.share)
        own = OF_BASIS[self.basis]
        for name in {name for names in OF_BASIS.values() for name in names}:
            if getattr(self, name) is not None and name not in own:
                raise SecateurError(f"{name}: basis {self.basis!r} has no such option; it takes {', '.join(own)}")
        for name in ("soft", "ekfac"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))
        if self.form is not None:
            check_choice("form", self.form, FORMS)
        if self.matrix is not None:
            check_choice("matrix", self.matrix, MATRICES)
        for name in ("k", "iterations", "batches", "positions"):
            check_count(name, getattr(self, name), optional=True)
        check_positive("tolerance", self.tolerance, optional=True)
        check_seed(self.seed)
        self.targets()

    def targets(self) -> Fisher:
        """Where the targets of a Fisher come from."""
        return Fisher(self.fisher or "sampled", self.samples or 1, self.batches, self.seed)


OF_BASIS = {
    "kfe": ("soft", "ekfac", "form", "fisher", "samples", "layers", "positions"),
    "lanczos": ("k", "tolerance", "iterations", "matrix"),
    "exact": ("matrix",),
}
"""The settings that belong to one basis."""


def null_space_projector(
    model: nn.Module, data: Iterable[Any], loss: Any = None, *, group: Group = None, progress: bool = False,
    **settings: Any,
) -> NullSpaceProjector:  # fmt: skip
    """The projector on the flat directions of a trained model's loss, in eval mode.

    Args:
        model: any module; it is left untouched.
        data: batches (inputs, targets).
        loss: ``"cross_entropy"``, ``"mse"`` (half the squared error) or another, see
            :func:`secateur.kronecker_factors`.
        group: the processes, each with its shard of the data.
        progress: show how far it is.
        **settings: of :class:`NullSpace`.

    Raises:
        SecateurError: unknown settings, data that does not fit, Lanczos that does not converge, a loss that cannot be
            differentiated twice, no flat direction.
    """
    for name in settings:
        if name not in options_of(NullSpace):
            raise unknown("option of null_space_projector", name, options_of(NullSpace))
    return projector_of(Workload(model, data, loss, group=group, progress=progress), NullSpace(**settings))


def projector_of(work: Workload, settings: NullSpace) -> NullSpaceProjector:
    """:func:`null_space_projector` at a table that is laid; what was found there before is not found again."""
    found = {"kfe": _kronecker, "lanczos": _lanczos, "exact": _exact}[settings.basis]
    return work.once(("null space", settings), lambda: found(work, settings))


def steep(curvature: Tensor, share: float, times: Tensor | None = None) -> tuple[int, float]:
    """How many of the largest values carry a share of the whole, and the least of them.

    Args:
        curvature: a value for each direction, from 0 on.
        share: in (0, 1).
        times: of how many directions each value is; 1 if not given.

    Raises:
        SecateurError: there is no curvature at all, or there are no others.
    """
    values, order = curvature.double().flatten().sort(descending=True)
    times = torch.ones_like(order) if times is None else times.flatten()[order]
    total = (values * times).cumsum(0)
    if not len(values) or not float(total[-1]) > 0:
        raise SecateurError("the loss has no curvature on this data: every direction is flat; check data and loss")
    last = int((total < share * total[-1]).sum())
    if last >= len(values) - 1:
        raise SecateurError(
            f"every direction is steep: all {int(times.sum()):,} are needed for share={share} of it; give less"
        )
    return int(times[: last + 1].sum()), float(values[last])


# ------------------------------------------------------------------------------------------- eigenpairs of the Hessian


@dataclass(frozen=True, eq=False)
class Deflated(NullSpaceProjector):
    """Known eigenpairs, of which the first ones are steep.

    Attributes:
        products: of the matrix the eigenpairs are of.
        values: eigenvalues, largest in absolute value first.
        vectors: [size, pairs], orthonormal columns.
        count: how many are steep.
    """

    side = "producers"

    products: Products
    values: Tensor
    vectors: Tensor
    count: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:  # type: ignore[override]
        """All parameters that want a gradient."""
        return self.products.shapes

    def project(self, vector: Vector) -> dict[str, Tensor]:
        """``P_0 vector``."""
        x = self.products.join(vector).to(self.vectors)
        steep_ones = self.vectors[:, : self.count]
        return self.products.split(x - steep_ones @ (steep_ones.T @ x))

    def complete(self, moved: Vector, fixed: Fixed, *, damping: float | None = None) -> dict[str, Tensor]:
        """See :meth:`NullSpaceProjector.complete`."""
        # with H = V L V^T + e I: the rest moves by -(V_R L V_R^T + e I)^-1 V_R L V_Z^T d, inverted in the few
        # coordinates of V; only steep directions answer, and negative eigenvalues count by their size
        damping = 1.0 if damping is None else damping
        check_damping(damping)
        vectors, size = self.vectors[:, : self.count], self.values[: self.count].abs()
        x = self.products.join(moved).to(vectors)
        shapes = self.products.shapes
        given = self.products.join({
            name: _positions(dims, x.new_zeros(shapes[name])) for name, dims in fixed.items() if name in shapes
        }).bool()  # fmt: skip
        rest = vectors[~given]
        inner = rest.T @ rest + torch.diag(max(damping, 1e-12) * size.min() / size)
        x[~given] = -rest @ torch.linalg.solve(inner, vectors[given].T @ x[given])
        return self.products.split(x)


def _positions(dims: Mapping[int, Tensor], zeros: Tensor) -> Tensor:
    """Ones where any of the dims' positions is."""
    for dim, positions in dims.items():
        zeros = zeros.masked_fill(along(positions, dim, zeros), 1)
    return zeros


def _exact(work: Workload, settings: NullSpace) -> Deflated:
    share, matrix = settings.share, settings.matrix or "gauss_newton"
    products = Products(work, matrix=matrix, batches=settings.batches)
    if products.size > EXACT_PARAMETERS:
        raise SecateurError(
            f"basis='exact' is for up to {EXACT_PARAMETERS:,} parameters, this model has {products.size:,}: "
            "use 'kfe' or 'lanczos'"
        )
    p = next(iter(products.parameters.values()))
    eye = torch.eye(products.size, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    whole = torch.cat([products(block) for block in eye.split(64)]).double()
    values, vectors = torch.linalg.eigh((whole + whole.T) / 2)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    count, cutoff = steep(values.abs(), share)
    facts = {
        "basis": "exact", "matrix": matrix, "examples": int(products.examples), "directions": products.size,
        "steep": count, "cutoff": cutoff, "largest": float(values[0]), "share": share,
    }  # fmt: skip
    return Deflated(products, values, vectors, count, facts)


def _lanczos(work: Workload, settings: NullSpace) -> Deflated:
    k, matrix = settings.k or 50, settings.matrix or "gauss_newton"
    products = Products(work, matrix=matrix, batches=settings.batches)
    if k >= products.size:
        raise SecateurError(
            f"null_space_projector(k={k!r}): a whole number of steep directions, from 1 to {products.size - 1:,} (the "
            f"model has {products.size:,} parameters that want a gradient), is expected"
        )
    p = next(iter(products.parameters.values()))
    dtype = torch.promote_types(p.dtype, torch.float32)
    tolerance = 1e-3 if settings.tolerance is None else settings.tolerance

    def times(x: np.ndarray) -> np.ndarray:
        found = products(torch.as_tensor(x.reshape(1, -1), dtype=dtype, device=p.device))
        return found[0].cpu().numpy()

    width = np.dtype(str(dtype).removeprefix("torch."))
    operator = LinearOperator((products.size, products.size), matvec=times, dtype=width)
    start = np.random.default_rng(settings.seed).standard_normal(products.size).astype(width)
    try:
        found, basis = eigsh(operator, k=k, which="LM", v0=start, tol=tolerance, maxiter=settings.iterations)
    except ArpackNoConvergence as error:
        raise SecateurError(
            f"Lanczos found {len(error.eigenvalues)} of k={k} steep directions and did not converge: give fewer, a "
            f"larger tolerance (now {tolerance:g}), more iterations, or more data"
        ) from error
    except ArpackError as error:
        raise SecateurError(f"Lanczos failed: {error}; is there any curvature on this data?") from error
    order = np.argsort(-np.abs(found))
    values = torch.as_tensor(found[order].copy(), device=p.device).double()
    vectors = torch.as_tensor(basis[:, order].copy(), device=p.device)
    steep(torch.cat([values.abs(), values.new_zeros(1)]), 1 - 1e-12)  # there is some curvature
    facts = {
        "basis": "lanczos", "matrix": matrix, "examples": int(products.examples), "directions": products.size,
        "steep": k, "cutoff": float(values[-1].abs()), "largest": float(values[0]),
    }  # fmt: skip
    return Deflated(products, values.to(vectors), vectors, k, facts)


# ------------------------------------------------------------------------------- the Kronecker-factored eigenbasis


@dataclass(frozen=True, eq=False)
class Kronecker(NullSpaceProjector):
    """Every direction of a layer has a curvature, in the eigenbasis of its factors.

    Attributes:
        factors: by layer, of isometric tables (a bias is spread over the taps so that norms are kept).
        bases: their eigenbases.
        cutoff: the curvature from which on a direction is steep.
        soft: whether flatness falls gradually there.
    """

    side = "consumers"

    factors: Mapping[str, Factors]
    bases: Mapping[str, Eigenbasis]
    cutoff: float
    soft: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:  # type: ignore[override]
        """Weights and biases of the layers that have factors."""
        return {
            name: tensor.shape
            for factors in self.factors.values()
            for name, tensor in zip(_names(factors), _tensors(factors), strict=False)
        }

    def project(self, vector: Vector) -> dict[str, Tensor]:
        """``P_0 vector``."""
        found: dict[str, Tensor] = {}
        for name, basis in self.bases.items():
            factors = self.factors[name]
            curvature = basis.curvature()
            flat = self.cutoff / (self.cutoff + curvature) if self.soft else (curvature < self.cutoff).to(curvature)
            found |= _vector(factors, basis.back(basis.rotate(_table(factors, vector)) * flat))
        return found

    def complete(self, moved: Vector, fixed: Fixed, *, damping: float | None = None) -> dict[str, Tensor]:
        """See :meth:`NullSpaceProjector.complete`; a layer answers for itself alone."""
        damping = 1e-3 if damping is None else damping
        check_damping(damping)
        found: dict[str, Tensor] = {}
        for factors in self.factors.values():
            table = _table(factors, moved).double()
            dims = fixed.get(_names(factors)[0], {})
            if len(dims) > 1:
                raise SecateurError(f"rows and columns of {factors.layer.name!r} are given: give one of them")
            for dim, given in dims.items():
                table = (obs_update_rows if dim == 0 else obs_update_columns)(factors, table, given, damping)
            found |= _vector(factors, table)
        return found


def _kronecker(work: Workload, settings: NullSpace) -> Kronecker:
    model, share, form = work.model, settings.share, settings.form or "channel"
    soft, ekfac, how = bool(settings.soft), bool(settings.ekfac), settings.targets()
    curvature = factors_of(work, how, form=form, layers=settings.layers, positions=settings.positions)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {
        name: _isometric(own) for name, own in curvature.items() if all(n in trained for n in _names(own))
    }  # fmt: skip
    if not factors:
        raise SecateurError("no linear or convolution has weights that want a gradient: nothing can be projected")
    skipped = {**curvature.skipped, **{name: "it wants no gradient" for name in curvature if name not in factors}}
    bases = {name: eigenbasis_of(own) for name, own in factors.items()}
    if ekfac:
        moments = second_moments(work, bases, how)
        bases, skipped = dict(moments.bases), {**skipped, **moments.skipped}
        factors = {name: factors[name] for name in bases}
    every = {name: basis.curvature() for name, basis in bases.items()}
    values = torch.cat([c.flatten() for c in every.values()])
    times = torch.cat([  # where taps share their curvature, each value is that of several directions
        torch.full((c.numel(),), bases[name].layer.taps // c.shape[2], device=c.device) for name, c in every.items()
    ])  # fmt: skip
    count, cutoff = steep(values, share, times)
    facts = {
        "basis": "kfe", "form": form, "soft": soft, "ekfac": ekfac, "examples": curvature.examples,
        "directions": int(times.sum()), "steep": count, "cutoff": cutoff, "largest": float(values.max()),
        "share": share, "skipped": skipped,
    }  # fmt: skip
    return Kronecker(factors, bases, cutoff, soft, facts)


def _names(factors: Factors) -> list[str]:
    at = f"{factors.layer.name}." if factors.layer.name else ""
    return [f"{at}weight", f"{at}bias"] if factors.layer.bias else [f"{at}weight"]


def _tensors(factors: Factors) -> tuple[Tensor, ...]:
    return factors.layer.module.weight, factors.layer.module.bias


def _scale(factors: Factors) -> float:
    """A table repeats a bias for each tap; by this factor its norm is that of the bias."""
    return factors.layer.taps**-0.5


def _isometric(factors: Factors) -> Factors:
    """The factors of tables that have the norm of the weights they stand for."""
    if not factors.layer.bias or factors.layer.taps == 1:
        return factors
    scale = torch.ones(factors.a.shape[-1], dtype=factors.a.dtype, device=factors.a.device)
    scale[-1] = 1 / _scale(factors)  # the input of a smaller number is larger
    return replace(factors, a=factors.a * scale * scale[:, None])


def _table(factors: Factors, vector: Vector) -> Tensor:
    pairs = zip(_names(factors), _tensors(factors), strict=False)
    weight, *bias = (vector[n].detach() if n in vector else torch.zeros_like(t) for n, t in pairs)
    return factors.layer.table_of(weight, bias[0] * _scale(factors) if bias else None)


def _vector(factors: Factors, table: Tensor) -> dict[str, Tensor]:
    weight, bias = factors.layer.weights(table)
    return dict(zip(_names(factors), (weight, None if bias is None else bias / _scale(factors)), strict=False))  # type: ignore[arg-type]
