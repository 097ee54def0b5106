"""``score``: one verb for every criterion, built-in or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError, unknown
from secateur.scoring.directional import directional
from secateur.scoring.hessian import kron_obd, kron_obs, obd, obs
from secateur.scoring.magnitude import bn_scale, magnitude, random
from secateur.scoring.taylor import Loss, taylor
from secateur.tracing.graph import ChannelGraph, fingerprint

Criterion = Callable[..., dict[str, Tensor]]
"""``criterion(model, graph, data, loss_fn, **options)`` -> group name to one score a channel."""

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude, "taylor": taylor, "bn_scale": bn_scale, "random": random,
    "obd": obd, "obs": obs, "kron_obd": kron_obd, "kron_obs": kron_obs, "directional": directional,
}  # fmt: skip


def score(
    model: nn.Module,
    graph: ChannelGraph,
    criterion: str | Criterion = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss_fn: Loss | str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """How much each channel matters: the estimated increase of the loss if it goes.

    Args:
        model: the traced model; nothing of it is changed.
        graph: its graph.
        criterion: ``"magnitude"``, ``"taylor"``, ``"bn_scale"``, ``"random"``, ``"obd"``, ``"obs"``, ``"kron_obd"``,
            ``"kron_obs"``, ``"directional"``, or a callable with their signature.
        data: batches, for criteria that need them.
        loss_fn: the loss, for criteria that need it: a callable, or ``"cross_entropy"``, ``"mse"``.
        **options: the criterion's own.

    Returns:
        Group name -> float64 tensor, one score a channel; lower goes first.

    Raises:
        SecateurError: unknown criterion, a graph of another model, scores of a wrong shape or that are NaN.
    """
    if isinstance(criterion, str) and criterion not in CRITERIA:
        raise unknown("criterion", criterion, CRITERIA)
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError("score: the graph was traced from another model; trace this one")
    if isinstance(criterion, str) and criterion != "random" and any(p.is_meta for p in model.parameters()):
        raise SecateurError("score: the model is on the meta device, without weights that could be judged; load some")
    function = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    try:
        scores = function(model, graph, data, loss_fn, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise SecateurError(f"score: {criterion!r} does not take this option: {error}") from error
        raise
    return _checked(scores, graph)


def _checked(scores: object, graph: ChannelGraph) -> dict[str, Tensor]:
    """What a criterion gave, as tensors, or an error that says what is wrong with it."""
    if not isinstance(scores, Mapping):
        raise SecateurError(
            f"score: a criterion gives a dict from group name to scores, this one gave {type(scores).__name__}"
        )
    result = {}
    for name, values in scores.items():
        due = len(graph.group(name))
        try:
            tensor = torch.as_tensor(values).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SecateurError(f"score: the criterion gave {name!r} no numbers ({error}); {due} are due") from error
        if tensor.shape != (due,) or tensor.isnan().any():
            raise SecateurError(
                f"score: the criterion gave {name!r} a tensor of shape {list(tensor.shape)} "
                f"{'with NaN ' if tensor.isnan().any() else ''}where {due} numbers are due"
            )
        result[name] = tensor
    return result
