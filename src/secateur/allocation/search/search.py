r"""Widths by a factored bandit: which combination of widths keeps the loss lowest under a budget, found by trying.

Factors are the groups, atoms are widths around those of a start that meets the budget; the first third of the forwards
finds one (:mod:`secateur.allocation.sensitivity`). A play is one forward of the whole network on one mini-batch, with
the
channels that go zero at their producers; nothing is cut. Its reward is how much of the loss is kept, and what a width
costs is known and need not be learned::

    reward = -tanh((L(masked, batch) - L(whole, batch)) / scale)          known_la = -price * cost_la
    price    the least at which the best-looking combination meets the budget, found anew as plays come in

The bandit decides what is played. What its plays say of every width together
(:class:`secateur.allocation.search.arms.Effects`) nominates some combinations: the best-looking one is the bandit's
favourite, near which it stays, and the last quarter of the forwards compares several and the start on the same batches.

The loss of the whole network on the same batch takes away what makes a batch hard or easy, and how much it minds any
cut is fitted; a duel takes away both by playing two combinations on one batch. The bandit asks that a group's best
width is best whatever the other groups do (uniform identifiability); :attr:`Search.doubts` tells where what was seen
speaks against it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur._internal.batches import read_batches
from secateur._internal.checks import check_seed
from secateur._internal.distributed import all_reduce, broadcast_text, rank, world_size
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.files import file_at, write_atomically
from secateur._internal.losses import read_loss
from secateur._internal.state import device_of
from secateur._internal.workload import Needs, Workload
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.problem import Problem, fill
from secateur.allocation.search.arms import Effects, Factors
from secateur.allocation.search.bandit import FactoredBandit
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.search.history import History, Plays
from secateur.allocation.sensitivity import alone, greedy, tried_alone
from secateur.tracing.graph import fingerprint

NORMS = ("batch", "running")
SENSITIVITY = "sensitivity"
STARTS = (SENSITIVITY, "global", "threshold", "uniform")
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Atoms: how much wider than at the start."""
EVERY = 10.0
"""Seconds from one checkpoint to the next."""
AGAIN = 1.2
"""How many times more plays there are when what atoms are worth is fitted again."""
FIRST, FINAL, NOMINEES = 3, 4, 15
"""One of so many forwards is for the start's sensitivities, one of so many for the last comparison, and so many
combinations at most take part in that beside the start."""
DWELL = 4
"""How often a factor plays its favourite more than its other atoms: of a dozen three or four are away at a time."""
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
    for name, names in (("start", STARTS), ("norms", NORMS)):
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

    Groups that are not exact (``approximate=True``) are played like the others, with zeros at their producers, which
    is not
    quite what is cut.

    Args:
        model: the traced model; it is not changed.
        data: batches ``(inputs, targets)``; all are kept in memory, and each play takes one of them at random.
            Where ``torch.distributed`` runs, give every process the same ones: they share the evaluations, and all
            get the same answer, which is that of one process alone.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the batch; or ``"cross_entropy"``, ``"mse"``.
        evaluations: how many forwards at most, 32 or more (of duels two a play), the start's and those of the last
            comparison among them. The whole network's own on every batch are not counted.
        minutes: or so long, at most, the whole network's forwards among it: a third for the start, a quarter for the
            last comparison.
        start: what meets the budget, and around whose widths others are looked for: another strategy, or
            ``"sensitivity"``, which narrows every group alone and then takes greedily what costs the least loss.
        ratios: the atoms: widths as multiples of those at the start, 1 among them.
        radius: of the bandit's confidence intervals, see :class:`secateur.allocation.search.bandit.FactoredBandit`.
        dueling: play two combinations on the same mini-batch.
        norms: ``"batch"``: batch norms use the mini-batch's statistics, as after :func:`secateur.recalibrate`;
            ``"running"``: their running ones, of the whole network.
        seed: of the bandit and the batches.
        progress: show a bar with the time left.
        checkpoint: a file; a search that was interrupted goes on from there, and ends with the same answer. It holds
            those of all budgets that one object looked at; another search than these is refused.

    Attributes:
        started: with which start: ``"uniform"`` if evaluations or minutes were too few for sensitivities.
        table: after a search, what was learned, a row an atom, see
        :meth:`secateur.allocation.search.arms.Factors.learned`;
            :func:`secateur.report.draw_search` draws it.
        price: of the budget, in the end.
        explained: the part of the rewards' variance, but for that between batches, that the worth of single widths
            explains; noise and what widths do together are the rest.
        doubts: groups whose best width depends on what the others do, with the two widths; not looked for in duels.
        losses: what the loss rises by, of the start and of what was found, on the same batches (those of the last
            comparison, all if the evaluations allow it); the lower one is the answer. Of a budget in milliseconds the
            clock may still change some channels after that.
        done: how many forwards there were.
        late: whether the minutes were up before.
        seconds: how long the forwards took, and everything else (``"evaluations"``, ``"bandit"``).
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any], loss: Any = "cross_entropy", *, evaluations: int = 2000,
        minutes: float | None = None, start: str = SENSITIVITY, ratios: Sequence[float] = RATIOS, radius: float = 0.1,
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
        self.model, self.loss = model, read_loss(loss)
        self.batches = list(read_batches(data, device_of(model)))
        self.evaluations, self.minutes, self.start, self.ratios = evaluations, minutes, start, sorted(set(ratios))
        self.radius, self.dueling, self.norms, self.seed, self.progress = radius, dueling, norms, seed, progress
        self.checkpoint = file_at(checkpoint)
        self._own: set[str] = set()  # keys of the searches that this object has begun or gone on with
        self._kept: dict[str, Any] = {}  # what the checkpoint holds, by key
        self._saved = 0.0
        self._forget()

    def _forget(self) -> None:
        self.started, self.price, self.explained, self.losses, self.done, self.late = "", 0.0, 0.0, (0.0, 0.0), 0, False
        self.table: list[dict[str, Any]] = []
        self.doubts: dict[str, tuple[int, int]] = {}
        self.seconds = {"evaluations": 0.0, "bandit": 0.0}

    def __call__(self, problem: Problem) -> np.ndarray:
        """Items taken from every group."""
        if fingerprint(self.model) != problem.meter.graph.fingerprint:
            raise SecateurError("Search(model=...): the graph is of another model; give the one that was traced")
        self._forget()
        entered = time.monotonic()
        key, device = self._key(problem), next(self.model.parameters()).device
        if self.norms == "batch" and world_size() > 1:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.SyncBatchNorm):
                    raise SecateurError(
                        f"Search: {name} takes its statistics from all processes, which play different combinations; "
                        "give norms='running', or search in one process"
                    )
        agreed = json.dumps([key, self.minutes, self.checkpoint is None])
        # before they work on anything together
        if all_reduce(np.array([float(broadcast_text(agreed, device) != agreed)]), device)[0]:
            raise SecateurError("Search: the processes differ; give all the same model, data and settings")
        begun = self._saved = time.monotonic()
        evaluate = Evaluator(self.model, problem, self.batches, self.loss, self.seed, self.norms)
        course = self._resumed(key, evaluate) or History(evaluate.whole.tolist())
        with Progress(disable=not self.progress or rank() > 0, transient=True) as bar:
            task = bar.add_task("search", total=self.evaluations, completed=course.done)

            def shown() -> None:
                bar.update(task, completed=course.done)
                if time.monotonic() - self._saved > EVERY:
                    self._save(key, course)

            base = self._base(problem, course, evaluate, lambda: self._late(begun, 1 / FIRST, device), shown)
            self.done, factors, answer = course.done, Factors(problem, base, self.ratios), base
            if factors.groups:
                plays = course.plays = course.plays or self._begun(factors, course, evaluate)
                limit = self.evaluations - self.evaluations // FINAL
                while course.done + self._sides * len(plays.bandit.ask()) <= limit:
                    self.late = self._late(begun, 1 - 1 / FINAL, device)
                    if self.late:
                        break
                    self._play(course, plays, factors, evaluate)
                    shown()
                self._save(key, course)
                answer = self._answer(course, plays, factors, evaluate)
        self.seconds = {"evaluations": evaluate.seconds, "bandit": time.monotonic() - entered - evaluate.seconds}
        return answer

    def _base(
        self,
        problem: Problem,
        course: History,
        evaluate: Evaluator,
        late: Callable[[], bool],
        shown: Callable[[], None],
    ) -> np.ndarray:
        """Items taken at the start."""
        self.started = self.start
        if self.start == SENSITIVITY:
            if not problem.count.any():
                return np.zeros_like(problem.count)
            tried = tried_alone(problem, self.evaluations // FIRST)
            often = self.evaluations // FIRST // max(sum(map(len, tried)), 1)
            batches = self._order()[::-1][:often].tolist()  # the last comparison begins with others
            due = [(own, batch) for batch in batches for own in tried]
            while course.plays is None and len(course.rises) < len(due) and not late():
                own, batch = due[len(course.rises)]
                course.rises.append(evaluate.on([alone(problem, *one) for one in own], [batch])[:, 0].tolist())
                course.done += len(own)
                shown()
            rises = course.alone(len(tried))
            if rises:
                return greedy(problem, tried, rises)
            self.started = "uniform"
        return problem.taken(STRATEGIES.make(self.started).widths(problem, Workload(self.model)))

    def _begun(self, factors: Factors, course: History, evaluate: Evaluator) -> Plays:
        """Some combinations at random set the scale of the rewards."""
        rng, count = np.random.default_rng(self.seed), min(SAMPLED, self.evaluations // 8)
        drawn = [(factors.taken(rng.integers(0, factors.sizes)), course.done + number) for number in range(count)]
        scale = max(float(np.median(np.abs(evaluate(drawn)))), 1e-6)
        course.done += count
        dwell = min(DWELL, max(1, self.evaluations // 8 // max(factors.sizes)))
        bandit = FactoredBandit(
            factors.sizes, radius=self.radius, bounds=(-1.0, 1.0), dueling=self.dueling, dwell=dwell, seed=self.seed
        )
        bandit.favourite = factors.start
        return Plays(bandit, Effects(factors.sizes), scale)

    def _play(self, course: History, plays: Plays, factors: Factors, evaluate: Evaluator) -> None:
        """What the bandit asks for next."""
        bandit, effects = plays.bandit, plays.effects
        asked, sides = bandit.ask(), self._sides
        numbers = course.done + sides * np.arange(len(asked)).repeat(sides)
        combinations = [factors.taken(atoms) for atoms in asked.reshape(-1, len(factors.sizes))]
        rises = evaluate(list(zip(combinations, numbers.tolist(), strict=True))).reshape(-1, sides)
        rewards = np.tanh((rises[:, 1] - rises[:, 0] if self.dueling else -rises[:, 0]) / plays.scale)
        bandit.tell(rewards)
        batches = [evaluate.batch(number) for number in numbers[::sides].tolist()]
        effects.add(asked, rewards, batches)
        course.done += rises.size
        plays.log += [list(play) for play in zip(asked.tolist(), rewards.tolist(), batches, strict=True)]
        if effects.plays >= AGAIN * plays.fitted:
            plays.fitted = effects.plays
            worth = effects.table()
            price = factors.price(worth)
            bandit.known = -price * factors.cost
            if effects.plays >= sum(factors.sizes):  # of fewer plays than unknowns the favourite would be a guess
                bandit.favourite = factors.nominated(worth, price, 1)[0]

    def _answer(self, course: History, plays: Plays, factors: Factors, evaluate: Evaluator) -> np.ndarray:
        """The best of the start and of what looks best, by trying."""
        worth = plays.effects.table()
        self.price, self.done, self.explained = factors.price(worth), course.done, plays.effects.explained
        plays.bandit.known = -self.price * factors.cost
        self.table = factors.learned(plays.bandit, worth, self.price)
        self.doubts = factors.doubts(plays.log) if not self.dueling else {}
        forwards = course.done // (FINAL - 1) if self.late else self.evaluations - course.done
        nominees = min(forwards // 8, NOMINEES) if plays.log else 0
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
        order, used = self._order(), 0
        rises: list[list[float]] = [[] for _ in answers]
        left = list(range(1, len(answers)))

        def mean(number: int) -> float:
            return float(np.mean(rises[number]))

        while used < len(order):
            rounds, share = max(1, math.ceil(math.log2(max(len(left), 1)))), len(left) + 1
            more = order[used : used + max(1, forwards // rounds // share)]
            for number in (0, *left):
                rises[number] += evaluate.on([answers[number]], more.tolist())[0].tolist()
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
            "start": self.start, "started": self.started, "table": self.table,
            "doubts": {name: list(widths) for name, widths in self.doubts.items()},
            "price": self.price, "explained": self.explained, "losses": list(self.losses),
            "better": self.losses[1] < self.losses[0], "forwards": self.done, "late": self.late,
        }  # fmt: skip

    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self.batches))

    @property
    def _sides(self) -> int:
        return 2 if self.dueling else 1

    def _late(self, begun: float, share: float, device: torch.device) -> bool:
        """Whether this share of the minutes is up, for one of the processes and so for all."""
        if self.minutes is None:
            return False
        over = time.monotonic() - begun > 60 * self.minutes * share
        return bool(all_reduce(np.array([float(over)]), device)[0])

    def _key(self, problem: Problem) -> str:
        settings = (
            self.start, self.ratios, self.radius, self.dueling, self.norms, self.seed, self.evaluations,
            self.loss.name,
        )  # fmt: skip
        orders = [order.tolist() for order in problem.orders.values()]
        items = [problem.start.tolist(), problem.group.tolist(), problem.size.tolist(), problem.score.tolist()]
        timed = None if problem.meter.timing is None else problem.meter.timing.key()
        found = hashlib.sha256(json.dumps([settings, problem.meter.allowed, timed, orders, items]).encode())
        tensors = pytree.tree_leaves([list(self.model.state_dict().values()), self.batches])
        for tensor in (t for t in tensors if isinstance(t, Tensor)):
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def _save(self, key: str, course: History) -> None:
        self._own.add(key)
        self._saved = time.monotonic()
        if self.checkpoint is not None and rank() == 0:
            self._kept[key] = course.to_dict()
            write_atomically(self.checkpoint, json.dumps({"searches": self._kept}).encode())

    def _resumed(self, key: str, evaluate: Evaluator) -> History | None:
        self._kept = {}
        if self.checkpoint is None:
            return None
        text = ""
        if rank() == 0 and self.checkpoint.exists():
            try:
                text = self.checkpoint.read_text()
            except (OSError, ValueError) as error:
                text = f"no JSON: {error}"  # which all processes shall hear of
        text = broadcast_text(text, evaluate.device)
        if not text:
            return None
        try:
            self._kept = dict(json.loads(text)["searches"])
            course = History.from_dict(self._kept[key]) if key in self._kept else None
        except (ValueError, KeyError, TypeError, IndexError, SecateurError) as error:
            raise SecateurError(
                f"checkpoint {self.checkpoint} is damaged ({error}): delete it to begin anew"
            ) from error
        if course is None and set(self._kept) <= self._own:
            return None  # a next budget, or groups that cannot be pruned after all
        if course is None or not course.fits(evaluate.whole):
            raise SecateurError(f"checkpoint {self.checkpoint} is of another search: delete it, or give another file")
        self._own.add(key)
        return course


@STRATEGIES.register("bandit")
@dataclass(frozen=True)
class Bandit:
    """Widths that a factored bandit finds by trying, see :class:`Search`."""

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    evaluations: int = 2000
    minutes: float | None = None
    start: str = SENSITIVITY
    ratios: tuple[float, ...] = RATIOS
    radius: float = 0.1
    dueling: bool = False
    norms: str = "batch"
    seed: int = 0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        check_search({k: v for k, v in own.items() if k not in {"seed", "checkpoint"}})
        check_seed(self.seed)
        file_at(self.checkpoint)

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """The widths that were found."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        search = work.once(self, lambda: Search(work.model, work.data or (), work.loss, progress=work.progress, **own))
        found = problem.widths(search(problem))
        work.facts["search"] = search.facts()
        return found
