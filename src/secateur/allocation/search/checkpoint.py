"""The file of a search of widths: what was done so far, so that an interrupted search goes on.

A file belongs to one *experiment*: a model, data, a loss, settings and an order in which channels go. It holds the
searches of several budgets, each under a key of its own. So one file serves several calls, also of other processes and
of another number of them. A file of another experiment is refused, with what differs.

Of several processes the first one reads and writes the file, and tells the others what it read.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur._internal.distributed import rank, together
from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import text_if_there, write_atomically
from secateur._internal.serial import digest_of
from secateur.allocation.problem import Problem
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.search.history import History

if TYPE_CHECKING:
    from secateur.allocation.search.bandit_strategy import Bandit

SECONDS_BETWEEN_SAVES = 10.0
NOT_OF_THE_EXPERIMENT = ("checkpoint", "minutes")
"""Settings that do not change what a search finds when it is not stopped by them."""


def settings_of(bandit: Bandit) -> dict[str, Any]:
    """The settings that make a search another one."""
    return {name: value for name, value in asdict(bandit).items() if name not in NOT_OF_THE_EXPERIMENT}


class SearchFile:
    """The file of a search, or nothing at all if no checkpoint is asked for.

    Args:
        bandit: the settings.
        problem: groups, items and the budget.
        evaluate: has the model, the data and the loss.
    """

    def __init__(self, bandit: Bandit, problem: Problem, evaluate: Evaluator) -> None:
        self.work = evaluate.work
        self.name = self.work.agree(None if bandit.checkpoint is None else str(bandit.checkpoint))
        self._kept: dict[str, Any] = {}
        self._saved = time.monotonic()
        if self.name is not None:
            self._key, self._orders, self._whole = _key(problem), _orders(problem), evaluate.whole.tolist()
            self._experiment = _experiment(bandit, problem, evaluate)

    def read(self) -> History:
        """The history to go on from; a new one if there is none for this budget.

        Raises:
            BadFile: the file is damaged.
            SecateurError: it is of another experiment.
        """
        if self.name is None:
            return History()
        text = self.work.agree(text_if_there(Path(self.name)) if rank(self.work.group) == 0 else "")
        if not text:
            return History()
        try:
            self._kept = json.loads(text)
            differs = self._differs(self._kept)
            state = self._kept["searches"].get(self._key)
            history = History() if state is None else History.from_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadFile(f"checkpoint {self.name} is damaged ({error}): delete it to begin anew") from error
        if differs:
            raise SecateurError(
                f"checkpoint {self.name} is of another search, with another {' and another '.join(differs)}: delete "
                "it, or give another file"
            )
        return history

    def save_now_and_then(self, history: History) -> None:
        """Write the history, if the last time is long enough ago."""
        if self.name is not None and self.work.agree(time.monotonic() - self._saved >= SECONDS_BETWEEN_SAVES):
            self.save(history)

    def save(self, history: History) -> None:
        """Write the history, beside those of other budgets.

        Raises:
            BadFile: it cannot be written.
        """
        if self.name is None:
            return
        orders = {**self._kept.get("orders", {}), **self._orders}
        searches = {**self._kept.get("searches", {}), self._key: history.to_dict()}
        self._kept = {"experiment": self._experiment, "whole": self._whole, "orders": orders, "searches": searches}
        together(self._write, self.work.device, self.work.group)
        self._saved = time.monotonic()

    def _write(self) -> None:
        if self.name is not None and rank(self.work.group) == 0:
            write_atomically(Path(self.name), json.dumps(self._kept).encode())

    def _differs(self, kept: Mapping[str, Any]) -> list[str]:
        """What is different in the experiment of a file."""
        found = [name for name, own in self._experiment.items() if kept["experiment"][name] != own]
        # a loss function has no better name than what it gives
        if not found and not np.allclose(kept["whole"], self._whole, rtol=1e-4, atol=1e-6):
            found.append("loss")
        both = self._orders.keys() & kept["orders"].keys()  # groups that cannot go after all are in none
        if any(kept["orders"][name] != self._orders[name] for name in both):
            found.append("order of the channels (scores)")
        return found


def _experiment(bandit: Bandit, problem: Problem, evaluate: Evaluator) -> dict[str, Any]:
    """What makes a search another one, beside the budget, as what JSON can hold."""
    work, latency = evaluate.work, problem.meter.latency
    return {
        "settings": json.loads(json.dumps(settings_of(bandit))),
        "model": digest_of(list(work.model.state_dict().values())).hex(),
        "data": evaluate.batches.digest,
        "loss": work.loss.name,
        "latency": None if latency is None else latency.key(),
    }


def _orders(problem: Problem) -> dict[str, str]:
    """By the name of a group, the order in which its channels go."""
    groups = problem.meter.graph.groups
    return {groups[i].name: _digest(order.tolist()) for i, order in problem.orders.items()}


def _key(problem: Problem) -> str:
    """What tells one budget of an experiment from another."""
    items = [problem.start.tolist(), problem.group.tolist(), problem.size.tolist(), problem.score.tolist()]
    return _digest([problem.meter.allowed, items])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
