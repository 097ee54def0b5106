r"""Queries and keys of fewer numbers, whose products are as near to the original's as can be.

Channels that two layers write, ``q`` and ``k``, and that no weight reads may be summed over in a product: they are if
the model's outputs stay what they are when ``q`` is multiplied by any invertible ``R`` and ``k`` by ``R^-T``, for each
head its own, which is tried. What is left need not be some of the original's channels then. Of all ``q A`` and ``k B``
of ``r`` numbers, with second moments ``C``, those nearest (the singular value decomposition's, by whitening) have::

    min E |q k^T - q A B^T k^T|^2        A B^T = C_q^-1/2 [C_q^1/2 C_k^1/2]_r C_k^-1/2

``[.]_r`` keeps the ``r`` largest singular values. The layers are then fitted to give ``q A`` and ``k B``, if that is
nearer than what the numbers that are left give as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.batches import copied, tensors_in
from secateur._internal.distributed import all_reduce_, broadcast_
from secateur._internal.state import preserved
from secateur._internal.workload import Workload
from secateur.plan import Plan
from secateur.repair.examples import Part, few_of, forward_part
from secateur.repair.pairs import Pair, Scale
from secateur.tracing.graph import ChannelGroup

DAMPING = 1e-12
"""In units of a moment's mean eigenvalue."""
NOTICED, SAME = 1e-4, 1e-2
"""Outputs notice what changes them by so much of their norm; what changes them by so much of that leaves them alike."""
TRIED = 16
"""With so many examples of every shape it is tried whether products are all that counts."""
NEARER = 0.9
"""What is left is turned where that leaves no more than this of what is missing otherwise."""


def turns(
    model: nn.Module, plan: Plan, pairs: Sequence[Pair], outputs: Mapping[str, Mapping[Any, Tensor]],
    parts: Sequence[Part], work: Workload,
) -> dict[str, Tensor]:  # fmt: skip
    """By what the outputs of queries and keys that lose numbers are multiplied, by the paths of their layers.

    Args:
        model: the original.
        plan: what goes; of one without a graph nothing is known.
        pairs: the layers that can be fitted.
        outputs: samples of the original's outputs, [1, samples, rows], by layer.
        parts: examples.
        work: the processes; all get the same.

    Returns:
        float64 [rows, rows that are left] for each of these layers.
    """
    plain = {
        pair.one.parameter("weight"): pair
        for pair in pairs
        if len(pair.ones) == 1 and pair.last is None and not pair.of_bottleneck and not isinstance(pair.one, Scale)
        if pair.one.groups == 1 and not pair.one.kernel
    }
    found: dict[str, Tensor] = {}
    for name, gone in plan.removed.items() if plan.graph is not None else ():
        assert plan.graph is not None
        group = plan.graph.group(name)
        both = _written_by_two(group, plain)
        if both is None or any(pair.name in found for pair, _ in both):
            continue
        seen = work.together(lambda both=both: _seen_of_products(model, both, parts))  # type: ignore[misc]
        counted = all_reduce_(torch.tensor(seen, device=work.device), work.group).tolist()
        if counted[0] or not counted[1]:
            continue
        q, k = (_moments(pair, at, outputs.get(pair.name, {}), work) for pair, at in both)
        left = [i for i in range(len(group)) if i not in set(gone)]
        matrices = _nearest(q, k, len(left))
        if not work.agree(_is_nearer(q, k, *matrices, left)):
            continue
        for (pair, at), own in zip(both, matrices, strict=True):
            found[pair.name] = _turn(
                len(pair.one.table()[0]), at, left, broadcast_(own.contiguous(), work.group), plan, pair
            )
    return found


def _written_by_two(group: ChannelGroup, plain: Mapping[str, Pair]) -> list[tuple[Pair, np.ndarray]] | None:
    """The two layers that alone write a group that no weight reads, and the rows of every channel [channels, heads]."""
    axes = {axis.name: axis for axis in group.producers}
    pairs = [(plain[name], axis) for name, axis in axes.items() if name in plain]
    names = {pair.one.parameter(what) for pair, _ in pairs for what in ("weight", "bias")}
    if group.consumers or len(pairs) != 2 or not axes.keys() <= names:
        return None
    found = []
    for pair, axis in pairs:
        at = np.flatnonzero(np.isin(axis.channels, group.channels))
        heads, rest = divmod(len(at), len(group))
        rows = at[np.argsort(np.searchsorted(np.sort(group.channels), axis.channels[at]), kind="stable")]
        if rest or not heads or axis.dim != int(pair.one.transposed):
            return None
        found.append((pair, rows.reshape(len(group), heads)[np.argsort(np.argsort(group.channels))]))
    fewer, more = sorted(at.shape[1] for _, at in found)
    return found if more % fewer == 0 else None


def _seen_of_products(model: nn.Module, both: Sequence[tuple[Pair, np.ndarray]], parts: Sequence[Part]) -> list[int]:
    """On how many parts it is seen that more than products of both counts, and on how many that these do."""
    generator = torch.Generator().manual_seed(0)
    channels, heads = len(both[0][1]), min(at.shape[1] for _, at in both)
    basis = torch.linalg.qr(torch.randn(heads, channels, channels, generator=generator, dtype=torch.float64))[0]
    sizes = torch.empty(heads, 1, channels, dtype=torch.float64).uniform_(0.7, 1.4, generator=generator)
    of_shape = {str([list(t.shape[1:]) for t in tensors_in(part.inputs)]): part for part in reversed(parts)}
    more = counts = 0
    with preserved(model, fast_path=False):
        for part in of_shape.values():
            few = few_of(part, TRIED)
            before = _outputs(model, few)
            with _multiplied(both[0], basis * sizes):
                one = _distance(_outputs(model, few), before)
                with _multiplied(both[1], basis / sizes):
                    products = _distance(_outputs(model, few), before)
            counts += one > NOTICED
            more += products > SAME * max(one, NOTICED)
    return [more, counts]


def _outputs(model: nn.Module, part: Part) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors_in(forward_part(model, replace(part, inputs=copied(part.inputs))))]


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """How far outputs are from others, in units of their norms; whole numbers must be the same."""
    found = [0.0]
    for one, other in zip(some, others, strict=True):
        if one.is_floating_point():
            found.append(float((one - other).double().norm() / other.double().norm().clamp(min=1e-300)))
        else:
            found.append(float(not torch.equal(one, other)))
    return max(found)


@contextmanager
def _multiplied(of: tuple[Pair, np.ndarray], matrices: Tensor) -> Iterator[None]:
    """A layer's outputs in these rows multiplied, head by head, by matrices [heads or fewer, channels, channels]."""
    pair, at = of
    rows = torch.from_numpy(at.T.copy())  # [heads, channels]
    each = matrices.repeat_interleave(len(rows) // len(matrices), 0)

    def hook(_: Any, __: Any, y: Tensor) -> Tensor:
        y = y.clone()
        y[..., rows] = torch.einsum("...hc,hcd->...hd", y[..., rows], each.to(y))
        return y

    handle = pair.one.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _moments(pair: Pair, at: np.ndarray, outputs: Mapping[Any, Tensor], work: Workload) -> Tensor:
    """Second moments of each head's outputs, [heads, channels, channels]."""
    rows = torch.from_numpy(at.T.copy())
    total = torch.zeros(len(rows), rows.shape[1], rows.shape[1], dtype=torch.float64, device=work.device)
    for y in outputs.values():
        heads = y[0][:, rows].double().transpose(0, 1)
        total += heads.mT @ heads
    return all_reduce_(total, work.group)


def _nearest(q: Tensor, k: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of each head, [heads, channels, left], from the second moments of its queries and keys.

    Where several heads of the one go with one head of the other, they are multiplied alike.
    """
    fewer = min(len(q), len(k))
    roots, backs = [], []
    for moments in (q, k):
        pooled = moments.unflatten(0, (fewer, -1)).sum(1)
        mean = pooled.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
        pooled.diagonal(dim1=1, dim2=2).add_(DAMPING * mean[:, None])
        values, vectors = torch.linalg.eigh(pooled)
        root = values.clamp(min=1e-300).sqrt()[:, None]
        roots.append((vectors * root) @ vectors.mT)
        backs.append((vectors / root) @ vectors.mT)
    u, s, vh = torch.linalg.svd(roots[0] @ roots[1])
    some = s[:, None, :left].sqrt()
    a, b = backs[0] @ (u[..., :left] * some), backs[1] @ (vh.mT[..., :left] * some)
    return a.repeat_interleave(len(q) // fewer, 0), b.repeat_interleave(len(k) // fewer, 0)


def _is_nearer(q: Tensor, k: Tensor, a: Tensor, b: Tensor, left: Sequence[int]) -> bool:
    """Whether products of what is turned are nearer than those of the numbers that are left as they are."""
    heads = max(len(q), len(k))
    q, k, a, b = (t.repeat_interleave(heads // len(t), 0) for t in (q, k, a, b))
    whole = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    plain = whole.clone()
    plain[left, left] = 0

    def missing(difference: Tensor) -> float:
        return float(torch.einsum("hij,hik,hkl,hjl->", difference, q, difference, k))

    without = missing(plain.expand_as(q))
    rounding = 1e-10 * missing(whole.expand_as(q))
    return without > rounding and missing(whole - a @ b.mT) < NEARER * without


def _turn(rows: int, at: np.ndarray, left: Sequence[int], matrices: Tensor, plan: Plan, pair: Pair) -> Tensor:
    """The matrices of all heads, where the rows of what is left are, as one [rows, rows that are left]."""
    gone = plan.slices.get(pair.one.parameter("weight"), {}).get(int(pair.one.transposed), [])
    stay = [row for row in range(rows) if row not in set(gone)]
    place = {row: number for number, row in enumerate(stay)}
    whole = torch.zeros(rows, len(stay), dtype=torch.float64, device=matrices.device)
    whole[stay, range(len(stay))] = 1.0
    for head, matrix in enumerate(matrices):
        of = torch.from_numpy(at[:, head].copy())
        columns = torch.tensor([place[row] for row in of[list(left)].tolist()])
        whole[of[:, None], columns] = matrix
    return whole
