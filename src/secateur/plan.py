"""A plan: the channels to remove, as data. The whole difference between the big and the small network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur._internal.errors import CannotCut, SecateurError
from secateur.tracing.display import LONGEST, html_table, listed
from secateur.tracing.graph import ChannelGraph
from secateur.tracing.norms import KINDS, Norm
from secateur.tracing.probe import Chosen
from secateur.tracing.proof import has_skeleton, verify
from secateur.tracing.slices import Patched, Value
from secateur.tracing.weight_norms import WeightNorm

VERSION = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """What to remove from which model.

    Attributes:
        removed: group name to sorted positions in ``group.channels``.
        slices: the same for the weights: tensor name to dim to sorted positions.
        fingerprint: names and shapes of the model it was made for, hashed.
        skipped: group name to the reason for which it was left alone.
        patched: what the cut changes in the model's modules: ``"path.attribute"`` to the values before and after, such
            as ``"conv1.out_channels": (16, 8)``. Values are whole numbers; ``normalized_shape`` is a tuple of them, a
            list in JSON.
        norms: paths of the norms whose statistics go on over what they were taken over, with what they need for it.
        weight_norms: names of the lengths of normalised weights whose directions lose positions, and how they are
            normalised.
        attentions: paths of ``nn.MultiheadAttention`` modules that lose channels, and become others for that.
        graph: the graph it was made with, where there is one (not part of the data).
        proven: whether a cut skeleton has shown that the model bears it. Where none has, as for plans from a copy of a
            graph, :func:`secateur.cut` proves it first. Plans are equal whether they are proven or not.
    """

    removed: Mapping[str, Sequence[int]]
    slices: Mapping[str, Mapping[int, list[int]]]
    fingerprint: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    patched: Patched = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)
    weight_norms: Mapping[str, WeightNorm] = field(default_factory=dict)
    attentions: Sequence[str] = ()
    graph: ChannelGraph | None = field(default=None, repr=False)
    proven: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._data() == other._data()

    def __hash__(self) -> int:
        return hash(json.dumps(self._data()))

    def __len__(self) -> int:
        return sum(len(positions) for positions in self.removed.values())

    def __repr__(self) -> str:
        parts = [f"{name}: {len(positions)}" for name, positions in self.removed.items()]
        text = f"<Plan: {len(self):,} channels go ({listed(parts, LONGEST, 4)})" if parts else "<Plan: nothing goes"
        if self.graph is not None and parts:
            macs, params = self._parts()
            text += f"; {macs:.1%} of the MACs and {params:.1%} of the params stay"
        if self.skipped:
            text += f"; {len(self.skipped)} group{'s are' if len(self.skipped) > 1 else ' is'} left alone"
        return text + ("" if self.proven else "; not proven yet") + ">"

    def _repr_html_(self) -> str:
        of = {g.name: len(g) for g in self.graph.groups} if self.graph is not None else {}
        rows: list[tuple[object, ...]] = [("group", "channels", "go", "stay", "left alone")]
        for name in dict.fromkeys((*of, *self.removed, *self.skipped)):
            gone = len(self.removed.get(name, ()))
            rows.append(
                (name, of.get(name, ""), gone, of[name] - gone if name in of else "", self.skipped.get(name, ""))
            )
        return html_table(rows, repr(self)[1:-1])

    def _parts(self) -> tuple[float, float]:
        """The parts of MACs and params that stay."""
        assert self.graph is not None
        whole = max(self.graph.macs(), 1), max(self.graph.params(), 1)
        return self.graph.macs(self) / whole[0], self.graph.params(self) / whole[1]

    def _data(self) -> dict[str, Any]:
        return {
            "secateur_plan": VERSION,
            "fingerprint": self.fingerprint,
            "removed": {name: list(positions) for name, positions in self.removed.items()},
            "slices": {name: {str(d): p for d, p in dims.items()} for name, dims in self.slices.items()},
            "skipped": dict(self.skipped),
            "patched": {key: [_listed(v) for v in values] for key, values in self.patched.items()},
            "norms": {path: asdict(norm) for path, norm in self.norms.items()},
            "weight_norms": {name: asdict(norm) for name, norm in self.weight_norms.items()},
            "attentions": list(self.attentions),
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self._data() | {"proven": self.proven})

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
                patched={str(key): _change(values, key) for key, values in data.get("patched", {}).items()},
                norms={str(path): _norm(given, path) for path, given in data.get("norms", {}).items()},
                weight_norms={
                    str(name): WeightNorm(str(given["direction"]), _dim(given["dim"], name))
                    for name, given in data.get("weight_norms", {}).items()
                },
                attentions=[str(path) for path in data.get("attentions", ())],
                proven=_flag(data.get("proven", True)),  # what was written without this was proven
            )
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"Plan.from_json: the plan is damaged ({type(error).__name__}: {error})") from error


def _listed(value: Value) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value


def _change(given: object, key: object) -> tuple[Value, Value]:
    """What a module remembers before and after."""
    if not isinstance(given, list) or len(given) != 2:
        raise SecateurError(f"Plan.from_json: 'patched' must say what {key!r} is before and after, not {given!r}")
    values = [tuple(v) if isinstance(v, list) else v for v in given]
    flat = [n for v in values for n in (v if isinstance(v, tuple) else (v,))]
    if any(type(n) is not int or n < 0 for n in flat):
        raise SecateurError(f"Plan.from_json: {key!r} must be whole numbers from 0 on, or lists of them, not {given!r}")
    return values[0], values[1]


def _norm(given: Any, path: object) -> Norm:
    """What a norm needs to be cut exactly."""
    norm = Norm(**given)
    types = (type(norm.kind), type(norm.width), type(norm.eps))
    if (
        types != (str, int, str)
        or norm.kind not in KINDS
        or norm.width < 1
        or not isinstance(norm.offset, (int, float))
        or norm.dim not in (-1, 1)
    ):
        raise SecateurError(f"Plan.from_json: the norm {path!r} must have one of the kinds {KINDS}, not {given!r}")
    return norm


def _flag(given: object) -> bool:
    if not isinstance(given, bool):
        raise SecateurError(f"Plan.from_json: 'proven' must be true or false, not {given!r}")
    return given


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
        removed: group name (or what else :meth:`secateur.ChannelGraph.group` takes) to positions in ``group.channels``.
        skipped: groups left alone, with reasons, for the record.
        approximate: allow groups whose removal changes more than the removed channels.

    Raises:
        SecateurError: an unknown group, positions out of range, a group that would keep too few channels, an
            approximate group that was not asked for.
        CannotCut: a combination that the model's Python does not bear. Of a copy of a graph, :func:`secateur.cut`
            raises it.
    """
    clean: dict[str, list[int]] = {}
    for name, given in graph.by_name(removed).items():
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
    chosen = Chosen(clean)
    proven = has_skeleton(graph)
    if proven and (wrong := verify(None, graph, chosen)):
        raise cannot_cut(wrong)
    slices = graph.slices(chosen)
    patched = graph.patches(chosen)
    return Plan(
        clean,
        slices,
        graph.fingerprint,
        dict(skipped or {}),
        patched,
        norms=graph.narrowed(chosen),
        weight_norms=graph.rescaled(chosen),
        attentions=graph.freed(chosen),
        graph=graph,
        proven=proven,
    )


def cannot_cut(wrong: str) -> CannotCut:
    """The error for a combination that the model's Python does not bear."""
    return CannotCut(f"plan: this combination of channels cannot be removed from the model: {wrong}")
