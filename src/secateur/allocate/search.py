r"""Widths by a factored bandit: which combination of widths keeps the loss lowest under a budget, found by trying.

Factors are the groups, atoms are widths around those of a start that meets the budget. A play is one forward of the
whole network on one mini-batch, with the channels that go zero at their producers; nothing is cut. Its reward is how
much of the loss is kept, and what a width costs is known and need not be learned::

    reward = -tanh((L(masked, batch) - L(whole, batch)) / scale)          known_la = -price * cost_la
    price    the least at which the best-looking combination meets the budget, found anew as plays come in

The bandit decides what is played. What its plays say of every width together
(:class:`secateur.allocate.factors.Effects`) nominates some combinations, and the last quarter of the forwards compares
these and the start on the same batches.

The loss of the whole network on the same batch takes away what makes a batch hard or easy; a duel does so by playing
two combinations on one batch. The bandit asks that a group's best width is best whatever the other groups do
(uniform identifiability); :attr:`Search.doubts` tells where what was seen speaks against it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.allocate.bandit import FactoredBandit
from secateur.allocate.evaluator import Evaluator
from secateur.allocate.factors import Effects, Factors
from secateur.allocate.strategies import STRATEGIES, Problem, fill
from secateur.errors import SecateurError, check_seed, unknown
from secateur.processes import rank, summed, told
from secateur.score.taylor import Loss, mean_of
from secateur.trace import fingerprint
from secateur.train.checkpoint import write_atomically

NORMS = ("batch", "running")
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Atoms: how much wider than at the start."""
EVERY = 10.0
"""Seconds from one checkpoint to the next."""
AGAIN = 1.2
"""How many times more plays there are when what atoms are worth is fitted again."""
FINAL, NOMINEES = 4, 15
"""One of so many forwards is for the last comparison, and so many combinations at most take part beside the start."""
SAMPLED, LEAST = 16, 32
"""How many combinations set the scale of the rewards, and the least number of forwards of a search."""


def check_search(given: Mapping[str, Any], more: Sequence[str] = ()) -> None:
    """Raise if these are no settings of a search (``more``: what else may be there, and is not looked at)."""
    if not isinstance(given, Mapping):
        raise SecateurError(f"search={given!r}: settings by name are expected, for instance {{'evaluations': 1000}}")
    known = ("evaluations", "minutes", "start", "ratios", "radius", "dueling", "norms")
    for name in given:
        if name not in (*known, *more):
            raise unknown("setting of search", name, (*known, *more))
    evaluations, minutes = given.get("evaluations", LEAST), given.get("minutes")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < LEAST:
        raise SecateurError(f"evaluations={evaluations!r}: a whole number from {LEAST} on is expected")
    for name, value in (("minutes", 1 if minutes is None else minutes), ("radius", given.get("radius", 1))):
        if not _positive(value):
            raise SecateurError(f"{name}={value!r}: a number above 0 is expected")
    for name, names in (("start", tuple(STRATEGIES)), ("norms", NORMS)):
        value = given.get(name, names[0])
        if not isinstance(value, str) or value not in names:
            raise unknown(name, value, names)
    ratios = given.get("ratios", RATIOS)
    listed = isinstance(ratios, Sequence) and not isinstance(ratios, str)
    if not listed or not all(_positive(ratio) for ratio in ratios) or 1 not in ratios or len(set(ratios)) < 2:
        raise SecateurError(f"ratios={ratios!r}: two or more numbers above 0 are expected, 1.0 among them")
    if not isinstance(given.get("dueling", False), bool):
        raise SecateurError(f"dueling={given['dueling']!r}: true or false is expected")


def _positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf


class Search:
    """A strategy for :func:`secateur.allocate`: the widths that a factored bandit finds.

    Args:
        model: the traced model; it is not changed.
        data: batches ``(inputs, targets)``; all are kept in memory, and each play takes one of them at random.
            Where ``torch.distributed`` runs, give every process the same ones: they share the evaluations, and all
            get the same answer, which is that of one process alone.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the batch; or ``"cross_entropy"``, ``"mse"``.
        evaluations: how many forwards, 32 or more (of duels two a play), the last comparison among them; what the
            bandit asked for last is played to its end. The whole network's own on every batch are not counted.
        minutes: or so long, at most.
        start: a strategy that meets the budget; widths are looked for around its own.
        ratios: the atoms: widths as multiples of those at the start, 1 among them.
        radius: of the bandit's confidence intervals, see :class:`secateur.allocate.bandit.FactoredBandit`.
        dueling: play two combinations on the same mini-batch.
        norms: ``"batch"``: batch norms use the mini-batch's statistics, as after :func:`secateur.recalibrate`;
            ``"running"``: their running ones, of the whole network.
        seed: of the bandit and the batches.
        progress: show a bar with the time left.
        checkpoint: a file; a search that was interrupted goes on from there, and ends with the same answer.

    Attributes:
        table: after a search, what was learned, a row an atom, see :meth:`secateur.allocate.factors.Factors.learned`;
            :func:`secateur.report.draw_search` draws it.
        price: of the budget, in the end.
        explained: the part of the rewards' variance that the worth of single widths explains; noise and what widths
            do together are the rest.
        doubts: groups whose best width depends on what the others do, with the two widths; not looked for in duels.
        losses: what the loss rises by, of the start and of what was found, on the same batches (those of the last
            comparison, all if the evaluations allow it); the lower one is the answer.
        done: how many forwards there were.
        late: whether the minutes were up before.
        seconds: how long the forwards took, and everything else (``"evaluations"``, ``"bandit"``).
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], loss_fn: Loss | str = "cross_entropy", *, evaluations: int = 2000,
        minutes: float | None = None, start: str = "uniform", ratios: Sequence[float] = RATIOS, radius: float = 0.1,
        dueling: bool = False, norms: str = "batch", seed: int = 0, progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> None:  # fmt: skip
        check_search(
            {
                "evaluations": evaluations, "minutes": minutes, "start": start, "ratios": ratios, "radius": radius,
                "norms": norms, "dueling": dueling,
            }
        )  # fmt: skip
        check_seed(seed)
        if not isinstance(model, nn.Module):
            raise SecateurError(f"Search(model): a torch.nn.Module is expected, {type(model).__name__} was given")
        self.model, self.loss_fn = model, mean_of(loss_fn)
        self.batches = _pairs(data)
        self.evaluations, self.minutes, self.start, self.ratios = evaluations, minutes, start, sorted(set(ratios))
        self.radius, self.dueling, self.norms, self.seed, self.progress = radius, dueling, norms, seed, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        if self.checkpoint is not None and (self.checkpoint.is_dir() or not self.checkpoint.parent.is_dir()):
            raise SecateurError(f"checkpoint={str(checkpoint)!r}: a file in a folder that is there is expected")
        self._written: set[str] = set()
        self.table: list[dict[str, Any]] = []
        self.doubts: dict[str, tuple[int, int]] = {}
        self.price = 0.0
        self.explained = 0.0
        self.losses = (0.0, 0.0)
        self.done = 0
        self.late = False
        self.seconds = {"evaluations": 0.0, "bandit": 0.0}

    def __call__(self, problem: Problem) -> np.ndarray:
        """Items taken from every group."""
        if fingerprint(self.model) != problem.meter.graph.fingerprint:
            raise SecateurError("Search(model=...): the graph is of another model; give the one that was traced")
        entered, self.late = time.monotonic(), False
        factors = Factors(problem, STRATEGIES[self.start](problem), self.ratios)
        if not factors.groups:
            return factors.base
        key, device = self._key(factors), next(self.model.parameters()).device
        agreed = json.dumps([key, self.minutes, self.checkpoint is None])
        if summed(np.array([float(told(agreed, device) != agreed)]), device)[
            0
        ]:  # before they work on anything together
            raise SecateurError("Search: the processes differ; give all the same model, data and settings")
        evaluate = Evaluator(self.model, problem, self.batches, self.loss_fn, self.seed, self.norms)
        course = self._resumed(key, factors, device) or self._begun(factors, evaluate)
        begun = saved = time.monotonic()
        with Progress(disable=not self.progress or rank() > 0, transient=True) as bar:
            task = bar.add_task("search", total=self.evaluations, completed=course.done)
            while course.done < self.evaluations - self.evaluations // FINAL:
                self.late = self._late(begun, device)
                if self.late:
                    break
                if time.monotonic() - saved > EVERY:
                    self._save(key, course)
                    saved = time.monotonic()
                self._play(course, factors, evaluate)
                bar.update(task, completed=course.done)
            self._save(key, course)
            answer = self._answer(course, factors, evaluate)
        self.seconds = {"evaluations": evaluate.seconds, "bandit": time.monotonic() - entered - evaluate.seconds}
        return answer

    def _begun(self, factors: Factors, evaluate: Evaluator) -> Course:
        """Some combinations at random set the scale of the rewards."""
        rng = np.random.default_rng(self.seed)
        drawn = [rng.integers(0, factors.sizes) for _ in range(SAMPLED)]
        losses = evaluate([(factors.taken(atoms), number) for number, atoms in enumerate(drawn)])
        bandit = FactoredBandit(
            factors.sizes, radius=self.radius, bounds=(-1.0, 1.0), dueling=self.dueling, seed=self.seed
        )
        return Course(bandit, Effects(factors.sizes), max(float(np.median(np.abs(losses))), 1e-6), [], SAMPLED, 0)

    def _play(self, course: Course, factors: Factors, evaluate: Evaluator) -> None:
        """What the bandit asks for next."""
        bandit, effects = course.bandit, course.effects
        if effects.plays >= AGAIN * course.fitted:
            course.fitted = effects.plays
            bandit.known = -factors.price(effects.table()) * factors.cost
        asked = bandit.ask()
        sides = 2 if self.dueling else 1  # of a duel, both on the same batch
        numbers = course.done + sides * np.arange(len(asked)).repeat(sides)
        combinations = [factors.taken(atoms) for atoms in asked.reshape(-1, len(factors.sizes))]
        rises = evaluate(list(zip(combinations, numbers.tolist(), strict=True))).reshape(-1, sides)
        rewards = np.tanh((rises[:, 1] - rises[:, 0] if self.dueling else -rises[:, 0]) / course.scale)
        bandit.tell(rewards)
        effects.add(asked, rewards)
        course.done += rises.size
        course.log += [[played.tolist(), reward] for played, reward in zip(asked, rewards.tolist(), strict=True)]

    def _answer(self, course: Course, factors: Factors, evaluate: Evaluator) -> np.ndarray:
        """The best of the start and of what looks best, by trying."""
        worth = course.effects.table()
        self.price, self.done, self.explained = factors.price(worth), course.done, course.effects.explained
        course.bandit.known = -self.price * factors.cost
        self.table = factors.learned(course.bandit, worth, self.price)
        self.doubts = factors.doubts(course.log) if not self.dueling else {}
        forwards = course.done // (FINAL - 1)
        nominees = min(forwards // 8, NOMINEES) if course.effects.plays else 0
        start = fill(factors.problem, factors.base)
        distinct = {start.tobytes(): start}  # filled up, several may be the same
        for atoms in factors.nominated(worth, self.price, 4 * nominees):
            answer = fill(factors.problem, factors.taken(atoms))
            distinct[answer.tobytes()] = answer
            if len(distinct) > nominees:
                break
        answers = list(distinct.values())
        found = self._final(answers, evaluate, forwards)
        return answers[found if self.losses[1] < self.losses[0] else 0]

    def _final(self, answers: Sequence[np.ndarray], evaluate: Evaluator, forwards: int) -> int:
        """The best but the first, which stays in to the end: on ever more batches, ever half of the others."""
        order, used = np.random.default_rng(self.seed).permutation(len(self.batches)), 0
        rises: list[list[float]] = [[] for _ in answers]
        left = list(range(1, len(answers)))

        def mean(number: int) -> float:
            return float(np.mean(rises[number]))

        while used < len(order):
            rounds, share = max(1, math.ceil(math.log2(max(len(left), 1)))), len(left) + 1
            more = order[used : used + max(1, forwards // rounds // share)]
            for number in (0, *left):
                rises[number] += evaluate.on(answers[number], more.tolist()).tolist()
            used, forwards, self.done = used + len(more), forwards - len(more) * share, self.done + len(more) * share
            if len(left) <= 2:
                break
            left = sorted(left, key=mean)[: math.ceil(len(left) / 2)]
        found = min(left, key=mean, default=0)
        self.losses = (mean(0), mean(found))
        return found

    def facts(self) -> dict[str, Any]:
        """What was learned, as what JSON can hold."""
        return {
            "table": self.table, "doubts": {name: list(widths) for name, widths in self.doubts.items()},
            "price": self.price, "explained": self.explained, "losses": list(self.losses),
            "better": self.losses[1] < self.losses[0], "forwards": self.done, "late": self.late,
        }  # fmt: skip

    def _late(self, begun: float, device: torch.device) -> bool:
        """Whether the minutes are up, for one of the processes and so for all."""
        if self.minutes is None:
            return False
        over = time.monotonic() - begun > 60 * self.minutes * (1 - 1 / FINAL)
        return bool(summed(np.array([float(over)]), device)[0])

    def _key(self, factors: Factors) -> str:
        settings = (self.radius, self.dueling, self.norms, self.seed, self.evaluations)
        orders = [order.tolist() for order in factors.problem.orders.values()]
        loss = getattr(self.loss_fn, "__qualname__", type(self.loss_fn).__qualname__)
        found = hashlib.sha256(json.dumps([factors.atoms, factors.base.tolist(), orders, loss, *settings]).encode())
        tensors = pytree.tree_leaves([list(self.model.state_dict().values()), self.batches])
        for tensor in (t for t in tensors if isinstance(t, Tensor)):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def _save(self, key: str, course: Course) -> None:
        self._written.add(key)
        if self.checkpoint is not None and rank() == 0:
            write_atomically(self.checkpoint, json.dumps({"key": key, **course.to_dict()}).encode())

    def _resumed(self, key: str, factors: Factors, device: torch.device) -> Course | None:
        if self.checkpoint is None:
            return None
        text = ""
        if rank() == 0 and self.checkpoint.exists():
            try:
                text = self.checkpoint.read_text()
            except (OSError, ValueError) as error:
                text = f"no JSON: {error}"  # which all processes shall hear of
        text = told(text, device)
        if not text:
            return None
        try:
            state = json.loads(text)
            if state["key"] != key and state["key"] in self._written:
                return None  # of this search, with groups that cannot be pruned after all
            course = Course.from_dict(state, factors) if state["key"] == key else None
        except (ValueError, KeyError, TypeError, IndexError, SecateurError) as error:
            raise SecateurError(
                f"checkpoint {self.checkpoint} is damaged ({error}): delete it to begin anew"
            ) from error
        if course is None:
            raise SecateurError(f"checkpoint {self.checkpoint} is of another search: delete it, or give another file")
        return course


@dataclass
class Course:
    """How far a search has come.

    Attributes:
        bandit: what it knows.
        effects: what is fitted to the plays.
        scale: of the rewards.
        log: of each play the atoms, and the reward.
        done: forwards.
        fitted: how many plays there were when the price was last found.
    """

    bandit: FactoredBandit
    effects: Effects
    scale: float
    log: list[Any]
    done: int
    fitted: int

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        own = {name: getattr(self, name) for name in ("scale", "log", "done", "fitted")}
        return {"bandit": self.bandit.to_json(), **own}

    @staticmethod
    def from_dict(state: Mapping[str, Any], factors: Factors) -> Course:
        """What :meth:`to_dict` gave."""
        effects, log = Effects(factors.sizes), state["log"]
        if log:
            effects.add(np.array([played for played, _ in log]), np.array([reward for _, reward in log]))
        bandit = FactoredBandit.from_json(state["bandit"])
        return Course(bandit, effects, float(state["scale"]), log, int(state["done"]), int(state["fitted"]))


def _pairs(data: Iterable[Any]) -> list[tuple[Any, Any]]:
    if not isinstance(data, Iterable):
        raise SecateurError(f"Search(data={data!r}): batches (inputs, targets) are expected")
    found = []
    for batch in itertools.islice(data, 10**6):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise SecateurError("Search(data=...): batches (inputs, targets) are expected")
        found.append((batch[0], batch[1]))
    if not found:
        raise SecateurError("Search(data=...): there is no batch")
    return found
