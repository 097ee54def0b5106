"""``score``: one verb for every criterion, built-in or the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur._internal.state import is_on_meta
from secateur._internal.workload import Needs, Workload
from secateur.scoring.contract import CRITERIA, Criterion, Scores
from secateur.tracing.graph import ChannelGraph, fingerprint


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    batches: int | None = None,
    group: Group = None,
    progress: bool = False,
) -> Scores:
    """How much each channel matters: the estimated increase of the loss if it goes.

    Args:
        model: the traced model; it is left untouched.
        graph: its graph.
        criterion: a name (``secateur list criteria`` shows them) for its defaults, or settings such as
            ``Taylor(batches=50)``.
        data: batches, for criteria that need them (:mod:`secateur._internal.batches`); with ``torch.distributed``,
            every process gives its shard, and all get the scores of the whole.
        loss: the loss, for criteria that need it (:mod:`secateur._internal.losses`).
        batches: use at most so many.
        group: the processes that work along; ``None`` for all there are.
        progress: show how far it is.

    Returns:
        Group name -> float64 tensor, one score a channel; lower goes first. ``skipped`` says which groups have none.

    Raises:
        SecateurError: unknown criterion, a graph of another model, scores of a wrong shape or that are NaN.
    """
    made = CRITERIA.make(criterion)
    work = Workload(model, data, loss, inputs=graph.inputs, batches=batches, group=group, progress=progress)
    return scored(made, graph, work)


def scored(criterion: Criterion, graph: ChannelGraph, work: Workload) -> Scores:
    """What a criterion gives, checked.

    Raises:
        SecateurError: see :func:`score`.
    """
    name = getattr(criterion, "name", type(criterion).__name__)
    if fingerprint(work.model) != graph.fingerprint:
        raise SecateurError("score: the graph was traced from another model; trace this one")
    if name != "random" and is_on_meta(work.model):
        raise SecateurError("score: the model is on the meta device, without weights that could be judged; load some")
    work.require(getattr(criterion, "needs", Needs()), name)
    return _checked(criterion.scores(graph, work), graph)


def _checked(scores: object, graph: ChannelGraph) -> Scores:
    """What a criterion gave, as tensors, or an error that says what is wrong with it."""
    if not isinstance(scores, Mapping):
        raise SecateurError(
            f"score: a criterion gives a dict from group name to scores, this one gave {type(scores).__name__}"
        )
    result = Scores(skipped=getattr(scores, "skipped", {}))
    for name, values in graph.by_name(scores).items():
        result[name] = _numbers(values, len(graph.group(name)), name)
    for name, values in graph.by_name(getattr(scores, "rises", {})).items():
        result.rises[name] = _numbers(values, len(graph.group(name)) + 1, f"the rises of {name}")
    return result


def _numbers(values: object, due: int, name: str) -> Tensor:
    """So many numbers, as a tensor.

    Raises:
        SecateurError: others, or NaN.
    """
    try:
        tensor = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SecateurError(f"score: the criterion gave {name!r} no numbers ({error}); {due} are due") from error
    if tensor.shape != (due,) or tensor.isnan().any():
        raise SecateurError(
            f"score: the criterion gave {name!r} a tensor of shape {list(tensor.shape)} "
            f"{'with NaN ' if tensor.isnan().any() else ''}where {due} numbers are due"
        )
    return tensor
