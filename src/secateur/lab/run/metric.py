"""What a run measures on data: accuracy, or a function of the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur._internal.importing import import_string
from secateur._internal.state import preserved
from secateur.measure.accuracy import accuracy
from secateur.report.metrics import ACCURACY, Measured

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        shown: what it is called, its unit, whether higher is better.
        function: of the model, in eval mode without gradients, and the batches of a split.
        where: what it is called in messages.
    """

    shown: Measured
    function: Callable[[nn.Module, Iterable[Any]], Any]
    where: str

    def of(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """The number; the model is left untouched.

        Raises:
            SecateurError: the function raises, or gives no finite number.
        """
        if self.function is accuracy:
            return accuracy(model, batches)
        try:
            with preserved(model, "eval", gradients=False), torch.no_grad():
                given = self.function(model, batches)
        except SecateurError:
            raise
        except Exception as error:  # whatever a user's function raises
            raise SecateurError(f"{self.where}: it fails ({type(error).__name__}: {error})") from error
        try:
            value = float(given)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SecateurError(f"{self.where}: a number is expected, it gave {given!r}") from error
        if not math.isfinite(value):
            raise SecateurError(f"{self.where}: it gave {value}; a finite number is expected")
        return value


def metric_of(given: str | dict[str, Any] | None) -> Metric:
    """The metric that a recipe names: None is accuracy.

    Args:
        given: ``package.module:function`` of a model and batches, or a mapping of ``function`` and what it is called
            (``name``), its ``unit``, and which is ``better``: higher or lower.

    Raises:
        SecateurError: it cannot be imported, or does not take a model and batches.
    """
    if given is None:
        return Metric(ACCURACY, accuracy, "measure.metric")
    words = {"function": given} if isinstance(given, str) else dict(given)
    where = f"measure.metric {words['function']}"
    function = import_string("measure.metric", words["function"])
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise SecateurError(f"{where}: a function of (model, batches) is expected ({error})") from error
    name = str(words.get("name") or words["function"].rpartition(":")[2])
    return Metric(Measured(name, str(words.get("unit", "")), words.get("better", HIGHER) == HIGHER), function, where)
