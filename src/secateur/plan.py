"""A plan: the channels to remove, as data. The whole difference between the big and the small network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur._internal.errors import CannotCut, SecateurError
from secateur.tracing.graph import ChannelGraph

VERSION = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What to remove from which model.

    Attributes:
        removed: group name to sorted positions in ``group.channels``.
        slices: the same for the weights: tensor name to dim to sorted positions.
        fingerprint: names and shapes of the model it was made for, hashed.
        skipped: group name to the reason for which it was left alone.
        patched: attributes of the model's own modules that the cut changes (``"path.attribute": [old, new]``).
        graph: the graph it was made with, where there is one (not part of the data).
    """

    removed: Mapping[str, Sequence[int]]
    slices: Mapping[str, Mapping[int, list[int]]]
    fingerprint: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    patched: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    graph: ChannelGraph | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._data() == other._data()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __len__(self) -> int:
        return sum(len(positions) for positions in self.removed.values())

    def _data(self) -> dict[str, Any]:
        return {
            "secateur_plan": VERSION,
            "fingerprint": self.fingerprint,
            "removed": {name: list(positions) for name, positions in self.removed.items()},
            "slices": {name: {str(d): p for d, p in dims.items()} for name, dims in self.slices.items()},
            "skipped": dict(self.skipped),
            "patched": {name: list(values) for name, values in self.patched.items()},
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self._data())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from JSON text.

        Raises:
            SecateurError: the text is not a plan, or of a version that this release does not know.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise SecateurError(f"Plan.from_json: not JSON ({error})") from error
        if not isinstance(data, dict) or "secateur_plan" not in data:
            raise SecateurError("Plan.from_json: this JSON is not a plan (it has no 'secateur_plan')")
        if data["secateur_plan"] != VERSION:
            raise SecateurError(
                f"Plan.from_json: version {data['secateur_plan']!r} is given, version {VERSION} is known"
            )
        try:
            return cls(
                removed={str(name): _positions(p, name) for name, p in data["removed"].items()},
                slices={
                    str(name): {_dim(d, name): _some_positions(p, name) for d, p in dims.items()}
                    for name, dims in data["slices"].items()
                },
                fingerprint=str(data["fingerprint"]),
                skipped={str(k): str(v) for k, v in data.get("skipped", {}).items()},
                patched={str(k): (int(v[0]), int(v[1])) for k, v in data.get("patched", {}).items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"Plan.from_json: the plan is damaged ({type(error).__name__}: {error})") from error


def _dim(given: str, name: object) -> int:
    if int(given) < 0:
        raise SecateurError(f"Plan.from_json: dimensions of {name!r} must be whole numbers from 0 on, not {given}")
    return int(given)


def _some_positions(given: object, name: object) -> list[int]:
    if given == []:
        raise SecateurError(f"Plan.from_json: a slice of {name!r} has no positions")
    return _positions(given, name)


def _positions(given: object, name: object) -> list[int]:
    if not isinstance(given, list) or any(type(p) is not int or p < 0 for p in given):
        raise SecateurError(f"Plan.from_json: positions of {name!r} must be a list of whole numbers from 0 on")
    if given != sorted(set(given)):
        raise SecateurError(f"Plan.from_json: positions of {name!r} must be sorted and different")
    return given


def make_plan(
    graph: ChannelGraph,
    removed: Mapping[str, Iterable[int]],
    *,
    skipped: Mapping[str, str] | None = None,
    approximate: bool = False,
) -> Plan:
    """A plan that removes these positions of these groups, checked against the graph.

    Args:
        graph: the traced graph.
        removed: group name to positions in ``group.channels``.
        skipped: groups left alone, with reasons, for the record.
        approximate: allow groups whose removal changes more than the removed channels.

    Raises:
        SecateurError: an unknown group, positions out of range, a group that would keep too few channels, an
        approximate
            group that was not asked for.
        CannotCut: a combination that the model's Python does not bear.
    """
    clean: dict[str, list[int]] = {}
    for name, given in removed.items():
        group, positions = graph.group(name), sorted({int(p) for p in given})
        if not positions:
            continue
        if positions[0] < 0 or positions[-1] >= len(group):
            raise SecateurError(f"plan: group {name!r} has positions 0 to {len(group) - 1}, {positions} were given")
        if len(positions) == len(group):
            raise SecateurError(f"plan: all {len(group)} channels of group {name!r} would go; one must stay")
        if len(group) - len(positions) < group.least:
            raise SecateurError(
                f"plan: group {name!r} would keep {len(group) - len(positions)} of {len(group)} channels; "
                f"{group.least} must stay, since with fewer the model's forward takes another path"
            )
        if not group.exact and not approximate:
            raise SecateurError(
                f"plan: group {name!r} is not exact ({group.reason}); ask for approximate=True to cut it"
            )
        clean[name] = positions
    plan = Plan(clean, {}, graph.fingerprint, dict(skipped or {}), {}, graph)
    if clean:
        object.__setattr__(plan, "slices", graph.slices(plan))
        wrong = graph.verify(plan)
        if wrong:
            raise CannotCut(f"plan: this combination of channels cannot be removed from the model: {wrong}")
    return plan
