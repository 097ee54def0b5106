"""The file of a latency clock: the latency model and the plans that were measured.

Of several processes the first one reads and writes the file, and tells the others what it read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur._internal.distributed import broadcast_json, rank, together
from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import text_if_there, write_atomically
from secateur.allocation.latency.model import LatencyModel
from secateur.allocation.latency.sampler import LatencySettings, Stopwatch
from secateur.tracing.graph import ChannelGraph

Known = dict[str, float]
"""Digest of a plan -> which part of the whole network's time it takes."""


class LatencyFile:
    """The file, or nothing at all if no checkpoint is asked for.

    Args:
        settings: say which file, and how its content must have been measured.
        stopwatch: says where its content must have been measured.
    """

    def __init__(self, settings: LatencySettings, stopwatch: Stopwatch) -> None:
        self.settings, self.stopwatch = settings, stopwatch
        given = None if settings.checkpoint is None else str(settings.checkpoint)
        self.name: str | None = broadcast_json(given, stopwatch.device, stopwatch.group)

    def read(self, graph: ChannelGraph) -> tuple[LatencyModel, Known] | None:
        """What the file holds, or None if it is not there.

        Raises:
            BadFile: the file is damaged.
            SecateurError: it was measured of another network, in another place or with other settings.
        """
        if self.name is None:
            return None
        mine = text_if_there(Path(self.name)) if rank(self.stopwatch.group) == 0 else ""
        text = broadcast_json(mine, self.stopwatch.device, self.stopwatch.group)
        if not text:
            return None
        try:
            data = json.loads(text)
            model = LatencyModel.from_json(json.dumps(data["model"]), graph)
            known = {str(name): float(part) for name, part in data["known"].items()}
            if not all(0 < part < float("inf") for part in known.values()):
                raise BadFile("times that are none")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SecateurError) and not isinstance(error, BadFile):
                raise SecateurError(f"checkpoint {self.name}: {error}: {_ADVICE}") from error
            raise BadFile(f"checkpoint {self.name} is damaged ({type(error).__name__}: {error}): {_ADVICE}") from error
        self._check("in another place", model.where, self.stopwatch.where(graph))
        self._check("with other settings", model.settings, self.settings.of_the_samples())
        return model, known

    def write(self, model: LatencyModel, known: Known) -> None:
        """Write the file.

        Raises:
            BadFile: it cannot be written.
        """
        if self.name is None:
            return
        text = json.dumps({"model": json.loads(model.to_json()), "known": known})
        path = Path(self.name)

        def write() -> None:
            if rank(self.stopwatch.group) == 0:
                write_atomically(path, text.encode())

        together(write, self.stopwatch.device, self.stopwatch.group)

    def _check(self, how: str, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = dict.fromkeys([*wanted, *({"backend"} & {*kept})])  # which is not there where it is eager PyTorch
        differs = [name for name in names if kept.get(name) != wanted.get(name)]
        if differs:
            there, here = ({name: some.get(name) for name in differs} for some in (kept, wanted))
            raise SecateurError(f"checkpoint {self.name} was measured {how}, {there} and not {here}: {_ADVICE}")


_ADVICE = "delete it, or give another file"
