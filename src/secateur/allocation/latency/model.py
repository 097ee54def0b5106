r"""How long a forward takes, as a function of widths: fitted to measurements of cut networks.

Every operation has a price per MAC, every group one per channel (norms, activations, sums), and all have a base; none
is negative, so that fewer channels never seem slower::

    ms(k) = base + sum_o price_o macs_o(k) / macs_o(full) + sum_g price_g k_g / full_g

Some dozen networks of random widths are cut and timed as a whole, which sees what a table of single layers does not,
in turn with the uncut one: what slows the machine down for a while slows both, and their ratio counts.
Forwards are those of the model as it is: its hooks run too.
With fewer measurements than prices, what they leave open is as for all: one price for all MACs, one for all channels::

    min over prices >= 0 of   sum_i ((ms(k_i) - ms_i) / ms_i)^2 + NOISE^2 sum_p ((price_p - usual_p) / wide_p)^2
    wide_p = usual_p + longest ms_i / number of prices,    wide_base = longest ms_i
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from scipy.optimize import nnls
from torch import nn

from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.checks import check_seed
from secateur._internal.distributed import broadcast_text, rank
from secateur._internal.errors import CannotCut, SecateurError
from secateur._internal.files import file_at, write_atomically
from secateur.allocation.budget import Budget
from secateur.measure.latency import in_turn, latency, threads_set
from secateur.plan import Plan, make_plan
from secateur.surgery.channels import cut
from secateur.tracing.graph import ChannelGraph, Terms, fingerprint

NOISE = 0.03
"""What a measurement is wrong by, as a part of it: how far prices may differ from the usual for so much."""
EACH, LEAST, MOST = 0.3, 3, 25
"""Seconds that forwards of the whole network may take for each other one, and their least and largest number a turn."""
TURNS, DECIDING, WARM_UP = 4, 10, 3
"""Turns that each network has, for the fit and where the clock decides, and forwards in each that do not count."""
ENOUGH, PATIENCE = 3, 4
"""Networks that can be fitted to, and how many are tried at most for each that is asked for."""
SPREAD = 0.5
"""How far the kept parts of single groups are from that of all, at most."""


class Timing:
    """Measures a model at random widths, and knows then about how long any others take.

    Args:
        model: the traced model, on the device that counts; it is not changed.
        graph: what :func:`secateur.trace` gave.
        inputs: what is timed are forwards of these, so their batch counts; ``None`` for the graph's example inputs.
        samples: how many networks are cut and timed, the whole one and the narrowest among them, four or more;
            in place of one that cannot be cut another is.
        threads: CPU threads; ``None`` for as many as are set.
        round_to: widths of the networks that are timed are multiples of this, as a budget may ask for.
        approximate: also narrow groups that cannot be cut exactly.
        seed: of the widths.
        progress: show a bar with the time left.
        checkpoint: a file that keeps what is measured; what is in it is not measured again, so that what goes by the
            clock and was interrupted ends as it began.

    Attributes:
        whole: milliseconds of the whole network: the least median, one for each sample.
        repeats: forwards of either network in each turn.
        samples: of each network the widths of all groups, and which part of the whole one's time it takes.
        known: likewise which part the plans take that were measured, by the beginning of their JSON's SHA-256.
        error: root mean square of what the fit is wrong by at the samples, as a part of what was measured.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, *, inputs: Inputs | None = None, samples: int = 32,
        threads: int | None = None, round_to: int = 1, approximate: bool = False, seed: int = 0, progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> None:  # fmt: skip
        for name, value, least in (
            ("samples", samples, 4),
            ("round_to", round_to, 1),
            ("threads", 1 if threads is None else threads, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SecateurError(f"{name}={value!r}: a whole number from {least} on is expected")
        check_seed(seed)
        self.checkpoint = file_at(checkpoint)
        self._begin(model, graph, inputs, threads)
        self.settings: dict[str, Any] = {
            "samples": samples,
            "round_to": round_to,
            "approximate": bool(approximate),
            "seed": seed,
        }
        if self._resumed():
            self._fit()
            return
        self._measure(samples, progress)
        self._fit()
        self._save()

    def _measure(self, count: int, progress: bool) -> None:
        rng, approximate, wholes = np.random.default_rng(self.settings["seed"]), self.settings["approximate"], []
        drawn = [random_widths(self.graph, count, self.settings["round_to"], approximate, rng) for _ in range(PATIENCE)]
        self.repeats = self._repeats()
        with Progress(disable=not progress or rank() > 0, transient=True) as bar:
            task = bar.add_task("timing", total=count)
            for own in np.concatenate(drawn):
                gone = {g.name: range(k, len(g)) for g, k in zip(self.graph.groups, own, strict=True) if k < len(g)}
                try:
                    whole, part = self._part(make_plan(self.graph, gone, approximate=approximate), TURNS)
                except CannotCut:
                    continue  # these widths are for no budget either
                wholes.append(whole)
                self.samples.append((own.tolist(), part))
                bar.advance(task)
                if len(self.samples) == count:
                    break
        self.whole = min(wholes, default=math.nan)

    def _begin(self, model: nn.Module, graph: ChannelGraph, inputs: Inputs | None, threads: int | None) -> None:
        if not isinstance(model, nn.Module) or not isinstance(graph, ChannelGraph):
            raise SecateurError("Timing(model, graph): a module and what secateur.trace gave for it are expected")
        if fingerprint(model) != graph.fingerprint:
            raise SecateurError("Timing(model, graph): the graph is of another model; give the one that was traced")
        self.model, self.graph, self.threads = model, graph, threads
        self.samples: list[tuple[list[int], float]] = []
        self.known: dict[str, float] = {}
        self.inputs = graph.inputs if inputs is None else inputs
        if self.where["device"] == "meta" or not self.where["inputs"]:
            raise SecateurError("Timing(model, graph): a model with weights and example inputs with tensors are timed")

    @property
    def where(self) -> dict[str, Any]:
        """What must be the same for times to be so."""
        return {
            "device": next(self.model.parameters()).device.type,
            "inputs": [list(tensor.shape) for tensor in tensors_in(self.inputs)],
            "threads": torch.get_num_threads() if self.threads is None else self.threads,
            "macs": self.graph.macs(),
        }

    def _repeats(self) -> int:
        try:
            once = latency(self.model, self.inputs, repeats=3, warm_up=2, threads=self.threads)["median_ms"]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"Timing(inputs=...): they do not fit the model: {error}") from error
        return int(np.clip(1000 * EACH / TURNS / max(self._told(float(once)), 1e-3), LEAST, MOST))

    def _told(self, value: Any) -> Any:
        """Of several processes all go by what the first has measured."""
        return json.loads(broadcast_text(json.dumps(value), next(self.model.parameters()).device))

    def _fit(self) -> None:
        if len(self.samples) < ENOUGH:
            raise SecateurError(
                "Timing: fewer than three of the networks that were tried could be cut: there is nothing to fit to"
            )
        widths = np.array([own for own, _ in self.samples])
        took = self.whole * np.array([part for _, part in self.samples])
        terms, full = self.graph.macs_terms, self.graph.widths
        macs = terms.each(self.graph.lengths(full)).astype(np.float64)
        shares = np.stack([terms.each(self.graph.lengths(own)) for own in widths]) / np.maximum(macs, 1)
        prices = solved(shares, widths / full, took, macs)
        self.base, per_mac, self.per_channel = prices[0], prices[1 : 1 + len(macs)], prices[1 + len(macs) :] / full
        self.terms = Terms(terms.factor * per_mac / np.maximum(macs, 1), terms.index)
        self.error = float(np.sqrt(np.mean((self.ms(widths) / took - 1) ** 2)))

    def ms(self, widths: np.ndarray) -> np.ndarray:
        """About how many milliseconds a forward takes at these widths, [..., groups] -> [...]."""
        return self.base + self.terms.totals(self.graph.lengths(widths)) + widths @ self.per_channel

    def slope(self, widths: np.ndarray) -> np.ndarray:
        """About how many milliseconds one channel more of each group takes, [groups] -> [groups]."""
        per_length = self.terms.gradient(self.graph.lengths(widths))
        return self.graph.multiplicity.T @ per_length + self.per_channel

    def measured(self, plan: Plan | None = None) -> float:
        """How many milliseconds a forward of the cut network takes: its part of the whole one's time, in turns.

        Asked for the same plan again it says the same; another :class:`Timing` measures anew.
        """
        if plan is None:
            return self.whole
        name = _digest(plan.to_json())
        if name not in self.known:
            self.known[name] = self._part(plan, DECIDING)[1]
            self._save()
        return self.whole * self.known[name]

    def _part(self, plan: Plan, turns: int) -> tuple[float, float]:
        """Milliseconds of the whole network, and which part of it the cut one takes."""
        small = cut(self.model, plan)
        with threads_set(self.threads):
            times = in_turn([self.model, small], self.inputs, self.repeats, WARM_UP, turns)
        whole, own = np.median(times, axis=2)
        found: list[float] = self._told([float(np.median(whole)), float(np.median(own / whole))])
        return found[0], found[1]

    def facts(self, plan: Plan) -> dict[str, float]:
        """Milliseconds ``before`` and ``after`` a plan, the latter measured anew, and the fit's ``error``."""
        after = self.whole * self._part(plan, DECIDING)[1]
        return {"before": self.whole, "after": after, "error": self.error}

    def key(self) -> str:
        """What tells it from another."""
        return _digest(json.dumps(self._fitted()))

    def to_json(self) -> str:
        """What was measured, as JSON text."""
        return json.dumps(self._fitted() | {"known": self.known})

    def _fitted(self) -> dict[str, Any]:
        own = ("where", "threads", "settings", "whole", "repeats", "samples")
        return {"fingerprint": self.graph.fingerprint} | {name: getattr(self, name) for name in own}

    @staticmethod
    def from_json(text: str, model: nn.Module, graph: ChannelGraph, inputs: Inputs | None = None) -> Timing:
        """What :meth:`to_json` gave, of the same model and inputs; nothing is measured again.

        Raises:
            SecateurError: damaged data, or of another model.
        """
        made = object.__new__(Timing)
        made.checkpoint = None
        made._begin(model, graph, inputs, None)
        made._read(text)
        made._fit()
        return made

    def _read(self, text: str) -> None:
        """Take over what :meth:`to_json` gave."""
        try:
            data: dict[str, Any] = json.loads(text)
            self.threads, self.settings = data["threads"], dict(data["settings"])
            if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
                raise ValueError(f"threads {self.threads!r}")
            if data["fingerprint"] != self.graph.fingerprint or data["where"] != self.where:
                raise SecateurError(
                    f"the timing is of another model, device, number of threads or inputs ({data['where']}, here "
                    f"{self.where}): measure anew"
                )
            self.samples[:] = [([int(k) for k in own], float(part)) for own, part in data["samples"]]
            self.known = {str(name): float(part) for name, part in data["known"].items()}
            widths = [own for own, _ in self.samples]
            self.whole, self.repeats = float(data["whole"]), int(data["repeats"])
            times = [self.whole, *(part for _, part in self.samples), *self.known.values()]
            full = self.graph.widths.tolist()
            fits = [len(own) == len(full) and all(0 < k <= n for k, n in zip(own, full, strict=True)) for own in widths]
            if len(widths) < ENOUGH or not all(fits) or not all(0 < t < math.inf for t in times) or self.repeats < 1:
                raise ValueError("samples that do not fit the model")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"the timing is damaged ({type(error).__name__}: {error}): measure anew") from error

    def _resumed(self) -> bool:
        """Whether the checkpoint has it all; of several processes that of the first counts."""
        text = ""
        if self.checkpoint is not None and rank() == 0 and self.checkpoint.exists():
            try:
                text = self.checkpoint.read_text()
            except (OSError, ValueError) as error:
                text = f"no JSON: {error}"  # which all processes shall hear of
        text = self._told(text)
        if not text:
            return False
        wanted = (self.threads, self.settings)
        try:
            self._read(text)
        except SecateurError as error:
            raise SecateurError(f"checkpoint {self.checkpoint}: {error} (delete it, or give another file)") from error
        if (self.threads, self.settings) != wanted:
            raise SecateurError(
                f"checkpoint {self.checkpoint}: it was measured with threads and settings {self.threads}, "
                f"{self.settings}, and not {wanted[0]}, {wanted[1]}: delete it, or give another file"
            )
        return True

    def _save(self) -> None:
        if self.checkpoint is not None and rank() == 0:
            write_atomically(self.checkpoint, self.to_json().encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def random_widths(
    graph: ChannelGraph, count: int, round_to: int, approximate: bool, rng: np.random.Generator
) -> np.ndarray:
    """Widths to measure, int64 [count, groups]: all, the least, and evenly between, each group in its own way."""
    full, movable = graph.widths, np.array([group.exact or approximate for group in graph.groups])
    least = np.where(movable, Budget(latency_ms=1.0, round_to=round_to).floors(graph), full)
    if (least == full).all():
        why = f"all have {round_to} channels or fewer, which round_to= keeps" if movable.any() else "none is exact"
        more = "" if movable.all() else " (approximate=True may allow more)"
        raise SecateurError(f"Timing: no group can be narrowed, {why}{more}: there is nothing to time")
    parts = np.concatenate([[1.0, 0.0], (np.arange(count - 2) + 0.5) / (count - 2)])
    own = parts[:, None] + rng.uniform(-SPREAD, SPREAD, (count, len(full))) * (parts * (1 - parts) * 4)[:, None]
    wanted = least + (full - least) * np.clip(own, 0, 1)
    rounded = round_to * np.round(wanted / round_to).astype(np.int64)
    return np.where(wanted == full, full, np.clip(rounded, least, full))


def solved(macs: np.ndarray, channels: np.ndarray, took: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The prices, float64 [1 + terms + groups]: base, of every term of the MACs, of every group.

    Args:
        macs: of every sample and term, as a part of the whole network's, [samples, terms].
        channels: likewise of every group, [samples, groups].
        took: milliseconds [samples].
        weight: MACs of every term in the whole network, [terms].
    """
    share = weight / max(weight.sum(), 1)
    alike = np.full(channels.shape[1], 1 / max(channels.shape[1], 1))
    ones = np.ones((len(took), 1))
    base, per_mac, per_channel = nnls(
        np.concatenate([ones, macs @ share[:, None], channels @ alike[:, None]], 1) / took[:, None], ones[:, 0]
    )[0]
    usual = np.concatenate([[base], per_mac * share, per_channel * alike])
    wide = usual + took.max() / len(usual)  # what seems to be free may turn out to cost something
    wide[0] = took.max()
    design = np.concatenate([ones, macs, channels], 1) / took[:, None]
    return nnls(
        np.concatenate([design, NOISE * np.diag(1 / wide)]), np.concatenate([ones[:, 0], NOISE * usual / wide])
    )[0]
