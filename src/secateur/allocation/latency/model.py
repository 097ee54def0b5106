r"""A latency model: how long a forward takes, as a function of widths.

Every operation has a price per MAC. Every group has a price per channel, for norms, activations and sums. All share a
base. No price is negative, so that fewer channels never seem slower::

    ms(k) = base + sum_o price_o macs_o(k) / macs_o(full) + sum_g price_g k_g / full_g

The prices are fitted to some dozen networks of random widths, each of which was cut and timed as a whole. That sees
what a table of single layers does not. Each was timed in turn with the uncut network: what slows the machine down for a
while slows both, and their ratio is what counts.

There may be fewer measurements than prices. Then a ridge draws the prices to the *usual* ones, where all MACs have one
price and all channels have one::

    min over prices >= 0 of   sum_i ((ms(k_i) - ms_i) / ms_i)^2 + NOISE^2 sum_p ((price_p - usual_p) / wide_p)^2
    wide_p = usual_p + longest ms_i / number of prices,    wide_base = longest ms_i
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import nnls

from secateur._internal.errors import BadFile, SecateurError
from secateur.tracing.graph import ChannelGraph, Terms

NOISE = 0.03
"""The relative error of a measurement. Prices may differ from the usual ones as far as that explains."""
LEAST_SAMPLES = 3
"""With fewer measured networks nothing is fitted."""

Sample = tuple[tuple[int, ...], float]
"""The widths of all groups, and which part of the whole network's time the network took."""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """About how long forwards take at any widths, fitted to measurements.

    Attributes:
        graph: of the network that was measured.
        where: what must be the same for times to be the same: device, shapes of the inputs, CPU threads, MACs.
        settings: how the networks were chosen, see :class:`secateur.LatencySettings`.
        whole_ms: milliseconds of the whole network: the least median, of one for each sample.
        repeats: forwards of either network in each turn.
        samples: what was measured.

    Raises:
        SecateurError: too few samples.
    """

    graph: ChannelGraph = field(repr=False)
    where: Mapping[str, Any]
    settings: Mapping[str, Any]
    whole_ms: float
    repeats: int
    samples: tuple[Sample, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.samples) < LEAST_SAMPLES:
            raise SecateurError(
                f"latency: fewer than {LEAST_SAMPLES} of the networks that were tried could be cut: there is nothing "
                "to fit to"
            )

    def ms(self, widths: np.ndarray) -> np.ndarray:
        """About how many milliseconds a forward takes at these widths, [..., groups] -> [...]."""
        base, terms, per_channel = self._fitted
        return base + terms.totals(self.graph.lengths(widths)) + widths @ per_channel

    def slope(self, widths: np.ndarray) -> np.ndarray:
        """About how many milliseconds one channel more of each group takes, [groups] -> [groups]."""
        _, terms, per_channel = self._fitted
        return self.graph.multiplicity.T @ terms.gradient(self.graph.lengths(widths)) + per_channel

    @cached_property
    def error(self) -> float:
        """Root mean square of the fit's relative errors at the samples."""
        widths, took = self._measured
        return float(np.sqrt(np.mean((self.ms(widths) / took - 1) ** 2)))

    @property
    def _measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Widths [samples, groups] and milliseconds [samples]."""
        widths = np.array([own for own, _ in self.samples])
        return widths, self.whole_ms * np.array([part for _, part in self.samples])

    @cached_property
    def _fitted(self) -> tuple[float, Terms, np.ndarray]:
        """The base, terms that count milliseconds in place of MACs, and the price of a channel of each group."""
        widths, took = self._measured
        terms, full = self.graph.macs_terms, self.graph.widths
        macs = terms.each(self.graph.lengths(full)).astype(np.float64)
        shares = np.stack([terms.each(self.graph.lengths(own)) for own in widths]) / np.maximum(macs, 1)
        prices = fitted_prices(shares, widths / full, took, macs)
        base, per_mac, per_channel = prices[0], prices[1 : 1 + len(macs)], prices[1 + len(macs) :] / full
        return float(base), Terms(terms.factor * per_mac / np.maximum(macs, 1), terms.index), per_channel

    def key(self) -> str:
        """What tells it from another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """What was measured, as JSON text."""
        return json.dumps(
            {
                "fingerprint": self.graph.fingerprint, "where": dict(self.where), "settings": dict(self.settings),
                "whole_ms": self.whole_ms, "repeats": self.repeats, "samples": self.samples,
            }
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str, graph: ChannelGraph) -> LatencyModel:
        """What :meth:`to_json` gave, of the same network traced with the same inputs.

        Raises:
            BadFile: damaged data.
            SecateurError: it is of another network.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data["fingerprint"] != graph.fingerprint or data["where"]["macs"] != graph.macs():
                raise SecateurError(
                    "the latency model is of another network, or of one that was traced with other inputs: measure anew"
                )
            samples = tuple((tuple(int(k) for k in own), float(part)) for own, part in data["samples"])
            made = cls(
                graph, dict(data["where"]), dict(data["settings"]), float(data["whole_ms"]), int(data["repeats"]),
                samples,
            )  # fmt: skip
            _check_samples(made)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, SecateurError) and not isinstance(error, BadFile):
                raise
            raise BadFile(f"the latency model is damaged ({type(error).__name__}: {error}): measure anew") from error
        return made


def _check_samples(model: LatencyModel) -> None:
    full = model.graph.widths.tolist()
    for own, _ in model.samples:
        if len(own) != len(full) or not all(0 < k <= n for k, n in zip(own, full, strict=True)):
            raise BadFile("samples that do not fit the network")
    times = [model.whole_ms, *(part for _, part in model.samples)]
    if not all(0 < t < math.inf for t in times) or model.repeats < 1:
        raise BadFile("times that are none")


def fitted_prices(macs: np.ndarray, channels: np.ndarray, took: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The prices, float64 [1 + terms + groups]: the base, that of every term of the MACs, that of every group.

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
