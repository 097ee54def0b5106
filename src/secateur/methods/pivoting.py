r"""Pivoting while training: ever less stays, in blocks that are looked for anew each time, then the last ones are kept.

At update ``t`` of ``T`` (the cubic schedule of arXiv 1710.01878)::

    keep_t = keep + (1 - keep) (1 - t / T)^3        the blocks of keep_t are found, and all outside becomes zero

Between updates all weights train, so what was outside may grow and come back; after the last the masks are fixed. What
is block-diagonal keeps a half, a third, a quarter, ...: the next of these that is no more than ``keep_t``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_seed
from secateur._internal.errors import SecateurError
from secateur.surgery.blocks.pattern import Pattern
from secateur.surgery.blocks.pivots import (
    apply,
    check_patterns,
    check_pivot,
    check_some,
    eligible,
    mask_of,
    patterns_of,
    remembered,
)


class Pivoting:
    """A handle beside any optimizer: ``step()`` after ``optimizer.step()``; then :func:`secateur.pack`.

    Args:
        model: the model that is trained.
        keep: the part of each layer's coefficients that stays in the end, in (0, 1]. Without it the patterns of a
            model from :func:`secateur.pivot` are kept.
        every: steps from one update to the next.
        times: how many updates there are.
        layout: see :func:`secateur.pivot`, as are ``blocks``, ``exclude`` and ``seed``.
        blocks: how many a layer has, at most.
        exclude: layers that shall stay whole.
        seed: of the search.
        patterns: instead of all these, patterns to be kept from the beginning.

    Attributes:
        patterns: by layer, what stays now; empty before the first update.
        skipped: the layers that stay whole, and why.
        steps: how often :meth:`step` was called.
        done: whether the patterns are the last ones. Go on calling :meth:`step`: it keeps the zeros.

    Raises:
        SecateurError: bad values, an unknown layer, no layer that can have blocks, patterns of another model.
    """

    def __init__(
        self, model: nn.Module, keep: float | None = None, *, every: int = 100, times: int = 10,
        layout: str = "bundles", blocks: int | None = None, exclude: Sequence[str] = (), seed: int = 0,
        patterns: Mapping[str, Pattern] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise SecateurError(f"Pivoting(model): a torch.nn.Module is expected, {type(model).__name__} was given")
        if keep is not None and patterns is not None:
            raise SecateurError("give either keep=, a fraction of each layer's coefficients, or patterns= to be kept")
        if keep is None and patterns is None:
            patterns = remembered(model)
        for name, value in (("every", every), ("times", times)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SecateurError(f"{name}={value!r}: a whole number from 1 on is expected")
        self.model, self.every, self.times = model, every, times
        self.steps = self.updates = 0
        self.patterns: dict[str, Pattern] = {}
        self.skipped: dict[str, str] = {}
        self._settings: dict[str, Any] = {"layout": layout, "blocks": blocks, "seed": seed}
        self._masks: list[tuple[Tensor, Tensor]] = []
        self._names: list[str] = []
        self.keep = 1.0 if keep is None else keep
        if patterns is not None:
            check_patterns(model, patterns)
            self.patterns, self.updates = dict(patterns), times
            apply(model, self.patterns)
        else:
            check_pivot(keep, layout, blocks)
            check_seed(seed)
            self._names, self.skipped = eligible(model, self.keep, layout, exclude)
            check_some(self._names, self.skipped, "Pivoting")

    @property
    def done(self) -> bool:
        """Whether the patterns are the last ones."""
        return self.updates >= self.times

    @property
    def steps_needed(self) -> int:
        """How many steps it takes until the patterns are the last ones."""
        return self.every * self.times

    def keep_at(self, update: int) -> float:
        """What stays after so many updates, a fraction."""
        return self.keep + (1 - self.keep) * (1 - update / self.times) ** 3

    def step(self) -> None:
        """To be called after the optimizer's step."""
        self.steps += 1
        if not self.done and self.steps % self.every == 0:
            self.updates += 1
            now = self.keep_at(self.updates)
            self.patterns = patterns_of(self.model, self._names, now, final=self.keep, **self._settings)
            self._masks = []
            apply(self.model, self.patterns)
        elif self.done:
            self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        weights: list[Any] = [self.model.get_submodule(name).weight for name in self.patterns]
        known = zip(weights, self._masks, strict=False)
        if len(self._masks) != len(weights) or any(w is not p or w.device != out.device for w, (p, out) in known):
            pairs = zip(weights, self.patterns.values(), strict=True)
            self._masks = [(weight, mask_of(pattern, weight) == 0) for weight, pattern in pairs]
        for weight, outside in self._masks:
            weight.masked_fill_(outside, 0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        patterns = json.dumps({name: pattern.to_dict() for name, pattern in self.patterns.items()})
        return {"steps": self.steps, "updates": self.updates, "settings": self._own(), "patterns": patterns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, by a handle of the same settings.

        Raises:
            SecateurError: the state of a handle with other settings; nothing is changed.
        """
        found = state.get("settings") if isinstance(state, Mapping) else type(state).__name__
        if found != self._own():
            raise SecateurError(f"the state is of pivoting with {found}, this handle has {self._own()}")
        try:
            patterns = {name: Pattern.from_dict(p) for name, p in json.loads(state["patterns"]).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SecateurError(f"the state of pivoting is damaged ({type(error).__name__}: {error})") from error
        if patterns:
            check_patterns(self.model, patterns)
        self.steps, self.updates, self.patterns = int(state["steps"]), int(state["updates"]), patterns
        self._masks = []

    def _own(self) -> str:
        return json.dumps(
            {"keep": self.keep, "every": self.every, "times": self.times, "layers": self._names, **self._settings}
        )
