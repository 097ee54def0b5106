r"""Widths by a factored bandit: which combination of widths keeps the loss lowest under a budget, found by trying.

Factors are the groups, atoms are widths around those of a start that meets the budget. A play is one forward of the
whole network on one mini-batch, with the channels that go zero at their producers; nothing is cut. Its reward is how
much of the loss is kept, and what a width costs is known and need not be learned::

    reward = -tanh((L(masked, batch) - L(whole, batch)) / scale)          known_la = -price * cost_la
    price    the least at which the best-looking combination meets the budget, found anew as estimates move

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.func import functional_call

from secateur.allocate.bandit import FactoredBandit
from secateur.allocate.strategies import STRATEGIES, Problem, fill
from secateur.errors import SecateurError, unknown
from secateur.measure.accuracy import evaluating
from secateur.score.taylor import MEANS, Loss, batch_statistics
from secateur.trace import ChannelGraph, fingerprint
from secateur.train.checkpoint import write_atomically

NORMS = ("batch", "running")
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Atoms: how much wider than at the start."""
EVERY = 10.0
"""Seconds from one checkpoint to the next."""
SAMPLED = 16
"""How many combinations set the scale of the rewards."""


def check_search(given: Mapping[str, Any]) -> None:
    """Raise if these are no settings of a search."""
    known = ("evaluations", "minutes", "start", "ratios", "radius", "dueling", "norms")
    for name in given:
        if name not in known:
            raise unknown("setting of search", name, known)
    evaluations, minutes = given.get("evaluations", SAMPLED), given.get("minutes")
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < SAMPLED:
        raise SecateurError(f"evaluations={evaluations!r}: a whole number from {SAMPLED} on is expected")
    for name, value in (("minutes", minutes), ("radius", given.get("radius"))):
        wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
        if value is not None and wrong:
            raise SecateurError(f"{name}={value!r}: a number above 0 is expected")
    start, norms, ratios = given.get("start", "uniform"), given.get("norms", "batch"), given.get("ratios", RATIOS)
    if start not in STRATEGIES:
        raise unknown("start", start, STRATEGIES)
    if norms not in NORMS:
        raise unknown("norms", norms, NORMS)
    if 1.0 not in ratios or any(not 0 < ratio < math.inf for ratio in ratios):
        raise SecateurError(f"ratios={tuple(ratios)}: numbers above 0 are expected, 1.0 among them")
    if not isinstance(given.get("dueling", False), bool):
        raise SecateurError(f"dueling={given['dueling']!r}: true or false is expected")


class Search:
    """A strategy for :func:`secateur.allocate`: the widths that a factored bandit finds.

    Args:
        model: the traced model; it is not changed.
        data: batches ``(inputs, targets)``; all are kept in memory, and each play takes one of them at random.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the batch; or ``"cross_entropy"``, ``"mse"``.
        evaluations: forwards, at most (of duels two a play).
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
        table: after a search, what was learned, a row an atom: ``group``, ``width``, ``gap``, ``plays``, ``active``.
        price: of the budget, in the end.
        doubts: groups whose best width depends on what the others do, with the two widths.
        losses: what the loss rises by on all batches, of the start and of what was found; the lower one is the answer.
        done: how many forwards there were; fewer than ``evaluations`` if the minutes were up.
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
        if isinstance(loss_fn, str) and loss_fn not in MEANS:
            raise unknown("loss", loss_fn, MEANS)
        self.model, self.loss_fn = model, MEANS[loss_fn] if isinstance(loss_fn, str) else loss_fn
        self.batches = _pairs(data)
        self.evaluations, self.minutes, self.start, self.ratios = evaluations, minutes, start, sorted(set(ratios))
        self.radius, self.dueling, self.norms, self.seed, self.progress = radius, dueling, norms, seed, progress
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.table: list[dict[str, Any]] = []
        self.doubts: dict[str, tuple[int, int]] = {}
        self.price = 0.0
        self.losses = (0.0, 0.0)
        self.done = 0
        self.seconds = {"evaluations": 0.0, "bandit": 0.0}

    def __call__(self, problem: Problem) -> np.ndarray:
        """Items taken from every group."""
        if fingerprint(self.model) != problem.meter.graph.fingerprint:
            raise SecateurError("Search(model=...): the graph is of another model; give the one that was traced")
        factors = Factors(problem, STRATEGIES[self.start](problem), self.ratios)
        if not factors.groups:
            return factors.base
        evaluate = Evaluator(self.model, problem, self.batches, self.loss_fn, self.seed, self.norms)
        bandit = FactoredBandit(
            factors.sizes, radius=self.radius, bounds=(-1.0, 1.0), dueling=self.dueling, seed=self.seed
        )
        state = self._resumed(factors)
        if state is None:
            rng = np.random.default_rng(self.seed)
            drawn = [rng.integers(0, factors.sizes) for _ in range(SAMPLED)]
            losses = [evaluate(factors.taken(atoms), number) for number, atoms in enumerate(drawn)]
            scale, log, done = max(float(np.median(np.abs(losses))), 1e-6), [], SAMPLED
        else:
            bandit = FactoredBandit.from_json(state["bandit"])
            scale, log, done = state["scale"], state["log"], state["done"]
        begun = saved = time.monotonic()
        with Progress(disable=not self.progress, transient=True) as bar:
            task = bar.add_task("search", total=self.evaluations, completed=done)
            while done < self.evaluations:
                now = time.monotonic()
                if self.minutes is not None and now - begun > 60 * self.minutes:
                    break
                if self.checkpoint is not None and now - saved > EVERY:
                    self._save(factors, bandit, scale, log, done)
                    saved = now
                before, started = evaluate.seconds, now
                bandit.known = -factors.price(bandit) * factors.cost
                asked = bandit.ask()
                rewards = []
                for played in asked:
                    sides = [evaluate(factors.taken(atoms), done) for atoms in (played if self.dueling else [played])]
                    value = math.tanh((sides[-1] - sides[0]) / scale) if self.dueling else -math.tanh(sides[0] / scale)
                    rewards.append(value)
                    done += len(sides)
                bandit.tell(rewards)
                log += [[p.tolist(), r] for p, r in zip(asked, rewards, strict=True)]
                self.seconds["evaluations"] += evaluate.seconds - before
                self.seconds["bandit"] += time.monotonic() - started - (evaluate.seconds - before)
                bar.update(task, completed=min(done, self.evaluations))
        self.price, self.done = factors.price(bandit), done
        bandit.known = -self.price * factors.cost
        self.table, self.doubts = factors.named(bandit), factors.doubts(log) if not self.dueling else {}
        if self.checkpoint is not None:
            self._save(factors, bandit, scale, log, done)
        answers = [fill(problem, taken) for taken in (factors.base, factors.taken(factors.best(bandit, self.price)))]
        self.losses = (evaluate.everywhere(answers[0]), evaluate.everywhere(answers[1]))
        return answers[int(self.losses[1] < self.losses[0])]

    def facts(self) -> dict[str, Any]:
        """What was learned, as what JSON can hold."""
        return {
            "table": self.table, "doubts": {name: list(widths) for name, widths in self.doubts.items()},
            "price": self.price, "losses": list(self.losses), "better": self.losses[1] < self.losses[0],
            "forwards": self.done,
        }  # fmt: skip

    def _key(self, factors: Factors) -> str:
        settings = (self.radius, self.dueling, self.norms, self.seed, self.evaluations, len(self.batches))
        own = [factors.atoms, factors.base.tolist(), *settings]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]

    def _save(self, factors: Factors, bandit: FactoredBandit, scale: float, log: list[Any], done: int) -> None:
        assert self.checkpoint is not None
        state = {"key": self._key(factors), "bandit": bandit.to_json(), "scale": scale, "log": log, "done": done}
        write_atomically(self.checkpoint, json.dumps(state).encode())

    def _resumed(self, factors: Factors) -> dict[str, Any] | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        try:
            state = json.loads(self.checkpoint.read_text())
            known = state["key"] == self._key(factors)
            state = {name: state[name] for name in ("bandit", "scale", "log", "done")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SecateurError(
                f"checkpoint {self.checkpoint} is damaged ({error}): delete it to begin anew"
            ) from error
        if not known:
            raise SecateurError(f"checkpoint {self.checkpoint} is of another search: delete it, or give another file")
        return dict(state)


class Factors:
    """The groups that have a choice, their atoms as items taken, and what each costs.

    Args:
        problem: groups, items and the budget.
        base: items taken at the start, within the budget.
        ratios: widths as multiples of those at the start.
    """

    def __init__(self, problem: Problem, base: np.ndarray, ratios: Sequence[float]) -> None:
        self.problem, self.base = problem, base
        self.groups: list[int] = []
        self.atoms: list[list[int]] = []
        for group, count in enumerate(problem.count):
            widths = np.array([problem.widths(_with(base, group, taken))[group] for taken in range(count + 1)])
            wanted = {int(np.abs(widths - ratio * widths[base[group]]).argmin()) for ratio in ratios}
            if len(wanted) > 1:
                self.groups.append(group)
                self.atoms.append(sorted(wanted, reverse=True))  # from narrow to wide
        self.sizes = [len(atoms) for atoms in self.atoms]
        most = max(self.sizes, default=0)
        meter = problem.meter
        zero = self._used(base)
        self.cost = np.zeros((len(self.groups), most))
        for factor, (group, atoms) in enumerate(zip(self.groups, self.atoms, strict=True)):
            for atom, taken in enumerate(atoms):
                self.cost[factor, atom] = self._used(_with(base, group, taken)) - zero
        self.meter = meter

    def _used(self, taken: np.ndarray) -> float:
        meter = self.problem.meter
        return sum(over / meter.full[unit] for unit, over in meter.excess(self.problem.widths(taken)).items())

    def taken(self, atoms: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items that a combination takes from every group."""
        taken = self.base.copy()
        for group, own, atom in zip(self.groups, self.atoms, atoms, strict=True):
            taken[group] = own[atom]
        return taken

    def best(self, bandit: FactoredBandit, price: float) -> np.ndarray:
        """The combination that looks best at a price, of all atoms that were compared."""
        mean = np.nan_to_num(bandit.means()).sum(2) / np.maximum((bandit.matches > 0).sum(2), 1)
        real = np.arange(mean.shape[1]) < np.array(self.sizes)[:, None]
        return np.where(real, mean - price * self.cost, -np.inf).argmax(1)

    def price(self, bandit: FactoredBandit) -> float:
        """The least price at which the best-looking combination meets the budget."""

        def met(price: float) -> bool:
            return self.problem.meter.met(self.problem.widths(self.taken(self.best(bandit, price))))

        if met(0.0):
            return 0.0
        high = 0.01
        while not met(high):
            high *= 2
            if high > 1e9:
                raise SecateurError("no combination of these widths meets the budget; give ratios below 1")
        low = high / 2 if high > 0.01 else 0.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if met(middle) else (middle, high)
        return high

    def named(self, bandit: FactoredBandit) -> list[dict[str, Any]]:
        """The bandit's table with the names of groups and their widths."""
        graph, rows = self.problem.meter.graph, []
        for row in bandit.table():
            group = self.groups[row["factor"]]
            taken = self.atoms[row["factor"]][row["atom"]]
            width = int(self.problem.widths(_with(self.base, group, taken))[group])
            rows.append(
                {"group": graph.groups[group].name, "width": width} | {k: row[k] for k in ("gap", "plays", "active")}
            )
        return rows

    def doubts(self, log: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """Groups whose best width differs, beyond chance, between weak and strong combinations of the others."""
        if len(log) < 20:
            return {}
        played = np.array([entry[0] for entry in log])
        rewards = np.array([entry[1] for entry in log])
        means = []
        for factor, size in enumerate(self.sizes):
            own = [rewards[played[:, factor] == atom] for atom in range(size)]
            means.append(
                np.array([values.mean() if len(values) else rewards.mean() for values in own]) - rewards.mean()
            )
        parts = np.stack([mean[played[:, factor]] for factor, mean in enumerate(means)], 1)
        found = {}
        for factor, size in enumerate(self.sizes):
            others = parts.sum(1) - parts[:, factor]
            halves = [_summary(rewards[side], played[side, factor], size) for side in _halves(others)]
            (weak, weak_error), (strong, strong_error) = halves
            a, b = int(np.nanargmax(weak)), int(np.nanargmax(strong))
            ahead = [(weak[a] - weak[b]) / math.hypot(weak_error[a], weak_error[b])]
            ahead += [(strong[b] - strong[a]) / math.hypot(strong_error[a], strong_error[b])]
            if a != b and min(ahead) > 3:  # either half is sure, by three standard errors
                group = self.groups[factor]
                widths = [
                    int(self.problem.widths(_with(self.base, group, self.atoms[factor][atom]))[group])
                    for atom in (a, b)
                ]
                found[self.problem.meter.graph.groups[group].name] = (widths[0], widths[1])
        return found


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, kind="stable")
    return order[: len(order) // 2], order[len(order) // 2 :]


def _summary(rewards: np.ndarray, atoms: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error by atom; NaN and infinity where there are fewer than three."""
    mean, error = np.full(size, np.nan), np.full(size, np.inf)
    for atom in range(size):
        own = rewards[atoms == atom]
        if len(own) >= 3:
            mean[atom], error[atom] = own.mean(), own.std(ddof=1) / math.sqrt(len(own)) + 1e-12
    return (mean if not np.isnan(mean).all() else np.zeros(size)), error


def _with(taken: np.ndarray, group: int, value: int) -> np.ndarray:
    changed = taken.copy()
    changed[group] = value
    return changed


class Evaluator:
    """What the loss rises by when the first items of every group go: one forward with zeros at their producers.

    Args:
        model: the model.
        problem: which channels the items are.
        batches: pairs.
        loss_fn: a mean over a batch.
        seed: of the choice of batches.
        norms: see :class:`Search`.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        batches: Sequence[tuple[Any, Any]],
        loss_fn: Loss,
        seed: int,
        norms: str = "batch",
    ) -> None:
        self.model, self.problem, self.batches, self.loss_fn, self.seed = model, problem, batches, loss_fn, seed
        self.mode = batch_statistics if norms == "batch" else evaluating
        self.seconds = 0.0
        self.whole: dict[int, float] = {}
        graph: ChannelGraph = problem.meter.graph
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        axes = {(a.name, a.dim): a for g in graph.groups for a in g.producers if a.name in parameters}.values()
        self.parts = [(a.name, a.dim, parameters[a.name], torch.from_numpy(a.channels)) for a in axes]
        self.keep = torch.ones(1 + max(int(a.channels.max(initial=0)) for a in graph.axes))
        self.channels = {i: torch.from_numpy(graph.groups[i].channels[order]) for i, order in problem.orders.items()}

    def __call__(self, taken: np.ndarray, number: int) -> float:
        """Loss with these items gone minus that of the whole network, on the batch that belongs to a play's number."""
        begun = time.monotonic()
        batch = int(np.random.default_rng([self.seed, number]).integers(len(self.batches)))
        if batch not in self.whole:
            self.whole[batch] = self._loss({}, batch)
        value = self._loss(self.without(taken), batch) - self.whole[batch]
        self.seconds += time.monotonic() - begun
        return value

    def everywhere(self, taken: np.ndarray) -> float:
        """The mean over all batches of the loss with these items gone minus that of the whole network."""
        weights, total = self.without(taken), 0.0
        for batch in range(len(self.batches)):
            if batch not in self.whole:
                self.whole[batch] = self._loss({}, batch)
            total += self._loss(weights, batch) - self.whole[batch]
        return total / len(self.batches)

    def without(self, taken: np.ndarray) -> dict[str, Tensor]:
        """The parameters that write channels, zero where they write those that go."""
        keep = self.keep.clone()
        gone = self.problem.start - self.problem.widths(taken)
        for group, channels in self.channels.items():
            keep[channels[: gone[group]]] = 0
        weights: dict[str, Tensor] = {}
        for name, dim, parameter, ids in self.parts:
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            mask = keep[ids].to(parameter).view(shape)
            weights[name] = weights.get(name, parameter.detach()) * mask
        return weights

    def _loss(self, weights: dict[str, Tensor], batch: int) -> float:
        inputs, targets = _moved(self.batches[batch], self.device)
        with torch.no_grad(), self.mode(self.model):
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            loss = float(self.loss_fn(functional_call(self.model, weights, args), targets))
        if not math.isfinite(loss):
            raise SecateurError(
                f"Search: the loss is {loss} on batch {batch}; check the data, or give ratios nearer to 1"
            )
        return loss


def _moved(value: Any, device: torch.device) -> Any:
    move: Callable[[Any], Any] = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
    return torch.utils._pytree.tree_map(move, value)


def _pairs(data: Iterable[Any]) -> list[tuple[Any, Any]]:
    found = []
    for batch in itertools.islice(data, 10**6):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise SecateurError("Search(data=...): batches (inputs, targets) are expected")
        found.append((batch[0], batch[1]))
    if not found:
        raise SecateurError("Search(data=...): there is no batch")
    return found
