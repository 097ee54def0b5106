"""A callback of Lightning that prunes while its ``Trainer`` trains."""

from __future__ import annotations

from typing import Any

from secateur._internal.errors import SecateurError
from secateur._internal.importing import package
from secateur.loops.schedule import PruningSchedule

Base: Any = package("lightning.pytorch", "secateur.loops.lightning", "lightning").Callback


class PruneCallback(Base):
    """Prunes the module that a ``Trainer`` trains, by its one optimizer.

    ``Trainer(..., callbacks=[PruneCallback(PruningSchedule(inputs, budget, after=3, data=loader))])``. The module
    becomes smaller in place, what its ``forward`` makes of the example inputs is what counts. Save it by
    :func:`secateur.save`; checkpoints of before a cut do not fit after it.

    Args:
        schedule: what is pruned, and when; its ``cuts`` tell what went.
    """

    def __init__(self, schedule: PruningSchedule) -> None:
        if not isinstance(schedule, PruningSchedule):
            raise SecateurError(f"PruneCallback: a PruningSchedule is expected, not a {type(schedule).__name__}")
        self.schedule, self._seen = schedule, 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """See its base."""
        if len(trainer.optimizers) != 1:
            raise SecateurError(f"PruneCallback: one optimizer is expected, this module has {len(trainer.optimizers)}")
        if trainer.global_step:
            raise SecateurError("PruneCallback: a training that is resumed has no cuts of before; begin anew")
        if trainer.world_size > 1:
            raise SecateurError("PruneCallback: one process is expected, for a wrapper for several holds whole weights")
        self._seen = 0
        self.schedule.begin(module, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """See its base; batches whose gradients are accumulated are no step."""
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.schedule.step()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """See its base."""
        self.schedule.end_epoch()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """See its base."""
        self.schedule.end()
