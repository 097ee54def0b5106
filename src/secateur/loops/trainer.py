"""A callback of ``transformers.Trainer`` that prunes while it trains."""

from __future__ import annotations

from typing import Any

from secateur._internal.errors import SecateurError
from secateur._internal.importing import package
from secateur.loops.schedule import PruningSchedule

Base: Any = package("transformers", "secateur.loops.trainer").TrainerCallback


class PruneCallback(Base):
    """Prunes the model that a ``Trainer`` trains.

    ``Trainer(..., callbacks=[PruneCallback(PruningSchedule(inputs, budget, method="increg"))])``. The model of the
    trainer becomes smaller in place. Its configuration does not know of that: save it by ``secateur.export(model,
    folder, inputs, to="hf")``, where the configuration can say the widths, or by :func:`secateur.save`; checkpoints
    that the trainer wrote before a cut do not fit after it.

    Args:
        schedule: what is pruned, and when; its ``cuts`` tell what went.
    """

    def __init__(self, schedule: PruningSchedule) -> None:
        if not isinstance(schedule, PruningSchedule):
            raise SecateurError(f"PruneCallback: a PruningSchedule is expected, not a {type(schedule).__name__}")
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See its base."""
        if getattr(args, "load_best_model_at_end", False):
            raise SecateurError(
                "PruneCallback: load_best_model_at_end would load weights of before a cut; leave it out"
            )
        if state.global_step:
            raise SecateurError("PruneCallback: a training that is resumed has no cuts of before; begin anew")
        self.schedule.begin(given["model"], given["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See its base."""
        self.schedule.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See its base."""
        if abs(state.epoch - round(state.epoch)) < 1e-6:  # it also comes where max_steps ends in the middle of one
            self.schedule.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See its base."""
        self.schedule.end()
