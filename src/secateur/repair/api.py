"""``apply_repair``: one verb for every repair, built-in or the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.plan import Plan
from secateur.repair.contract import LEFT_WHOLE, REPAIRS, Facts, Repair
from secateur.surgery.channels import check_plan


def apply_repair(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    repair: str | Repair | Sequence[str | Repair],
    *,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    batches: int | None = None,
    group: Group = None,
    progress: bool = False,
) -> Facts:
    """Change the smaller model in place, so that what stays makes up for what went, before any training.

    Args:
        model: the model that the plan was made for; it is left untouched.
        small: what :func:`secateur.cut` made of it by the plan.
        plan: what was removed.
        repair: a name (``secateur list repairs`` shows them) for its defaults, settings such as
            ``Refit(examples=512)``, or several, one after the other.
        data: batches, for repairs that need them; every process gives its shard.
        loss: the loss, likewise.
        batches: use at most so many.
        group: the processes that work along.
        progress: show how far it is.

    Returns:
        What is to be known, such as ``"left whole"``: layers that stay as they were -> why.

    Raises:
        SecateurError: an unknown repair, models and plan that do not belong together, what the repair refuses.
    """
    check_plan(model, plan)
    work = Workload(model, data, loss, batches=batches, group=group, progress=progress)
    return repaired(repairs_of(repair), model, small, plan, work)


def repairs_of(given: Any) -> list[Repair]:
    """The repairs that are meant, in their order.

    Raises:
        SecateurError: one of them is unknown.
    """
    listed = given if isinstance(given, (list, tuple)) else [given]
    return [REPAIRS.make(one) for one in listed]


def repaired(repairs: Sequence[Repair], model: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
    """All repairs, one after the other; what each says is put together."""
    facts: Facts = {}
    for repair in repairs:
        name = getattr(repair, "name", type(repair).__name__)
        work.require(getattr(repair, "needs", Needs()), f"repair {name!r}")
        found = repair.apply(model, small, plan, work)
        if not isinstance(found, dict):
            raise SecateurError(f"repair {name!r}: a dict of facts is expected, it gave a {type(found).__name__}")
        whole = {**facts.get(LEFT_WHOLE, {}), **found.get(LEFT_WHOLE, {})}
        facts |= found
        if whole:
            facts[LEFT_WHOLE] = whole
    return facts
