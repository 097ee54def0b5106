"""The valley between two solutions as figures: along the curve, from above, and the walls' steepness.

Every function returns a ``matplotlib.figure.Figure`` that nothing else refers to: ``figure.savefig("valley.png")``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from secateur._internal.errors import SecateurError
from secateur.report.canvas import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from secateur.lab.landscape.mode_connectivity import Plane

ENDS = ("start", "end")


def draw_curve(rows: Sequence[Mapping[str, float]], *, ends: tuple[str, str] = ENDS) -> Figure:
    """Loss and error along a curve.

    Args:
        rows: from :func:`secateur.lab.landscape.mode_connectivity.along`.
        ends: what the ends are called.
    """
    if len(rows) < 2:
        raise SecateurError(f"draw_curve: {len(rows)} points given, a curve has two or more; see measure.valley.along")
    figure, panels = new_figure(2, width=4.2)
    way = [row["length"] for row in rows]
    for axes, key, title, factor in ((panels[0], "loss", "loss", 1.0), (panels[1], "error", "error (%)", 100.0)):
        for side, colour in zip(("train", "test"), COLOURS, strict=False):
            name = f"{side}_{key}"
            if name in rows[0]:
                axes.plot(way, [factor * row[name] for row in rows], color=colour, label=side)
        axes.set(xlabel="way along the curve", ylabel=title, ylim=(0, None))
        axes.set_xticks([way[0], way[-1]], ends)
        axes.legend(frameon=False)
    return figure


def draw_plane(
    plane: Plane,
    *,
    ends: tuple[str, str] = ENDS,
    paths: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    levels: int = 14,
) -> Figure:
    """The loss on the plane of a curve as a contour, logarithmic, with the curve and the ways of the trainings.

    Args:
        plane: from :func:`secateur.lab.landscape.mode_connectivity.plane`.
        ends: what the ends are called.
        paths: label -> where a training went, see ``plane.project``.
        levels: how many lines of equal loss.
    """
    figure, (axes,) = new_figure(width=6.2, height=4.4)
    loss = np.asarray(plane.loss)
    floor = max(loss[loss > 0].min(initial=np.inf), 1e-12) if (loss > 0).any() else 1e-12
    height = np.log10(np.maximum(loss, floor))
    filled = axes.contourf(plane.x, plane.y, height, levels=levels, cmap="YlGnBu_r")
    axes.contour(plane.x, plane.y, height, levels=levels, colors="white", linewidths=0.4)
    figure.colorbar(filled, ax=axes, label="log10 of the training loss")
    for colour, (name, points) in zip(itertools.cycle(COLOURS[1:]), (paths or {}).items(), strict=False):
        axes.plot(*zip(*points, strict=True), ".-", color=colour, linewidth=0.9, markersize=3, label=name)
    axes.plot(*zip(*plane.path, strict=True), "--", color="black", linewidth=1.2, label="curve")
    for name, at in zip((ends[0], "control point", ends[1]), plane.points.values(), strict=True):
        axes.plot(*at, "x" if name == "control point" else "o", color="black", markersize=5)
        axes.annotate(name, at, (5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlim=(plane.x[0], plane.x[-1]), ylim=(plane.y[0], plane.y[-1]), xlabel="from end to end", ylabel="across")
    axes.legend(fontsize=8, loc="upper right")
    return figure


def draw_spectrum(values: Tensor, *, steep: int | None = None) -> Figure:
    """Eigenvalues of the loss's second derivatives, largest first, both signs.

    Args:
        values: eigenvalues, ``null_space_projector(..., basis="lanczos").values`` for instance.
        steep: how many of them are walls of the valley, in the order of ``values``.
    """
    given = values.detach().double().cpu().numpy()
    if not len(given):
        raise SecateurError("draw_spectrum: no eigenvalue given")
    size, rank = np.abs(given), np.arange(1, len(given) + 1)
    figure, (axes,) = new_figure()
    for chosen, colour, label in ((given > 0, COLOURS[0], "positive"), (given < 0, COLOURS[1], "negative")):
        if chosen.any():
            axes.plot(rank[chosen], size[chosen], ".", color=colour, markersize=4, label=label)
    if steep is not None:
        axes.axvline(steep + 0.5, color=COLOURS[3], linewidth=0.8, linestyle="--", label="steep | flat")
    axes.set(yscale="log" if (size > 0).any() else "linear", xlabel="rank", ylabel="size of the eigenvalue")
    axes.legend(frameon=False)
    return figure
