"""What the strategy ``"bandit"`` learned, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur._internal.errors import SecateurError
from secateur.report.canvas import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_search(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw every width that was tried: how good it looks, how often it was played, what was ruled out, what was found.

    Args:
        table: ``result.facts["search"]["table"]`` of :func:`secateur.prune` with ``strategy="bandit"``.

    Raises:
        SecateurError: an empty table: no group had a choice of widths.
    """
    if not table:
        raise SecateurError(
            "draw_search: the table is empty, for no group had a choice of widths; give other ratios, see "
            "secateur.Bandit"
        )
    names = list(dict.fromkeys(row["group"] for row in table))
    figure, (axes,) = new_figure(width=6.4, height=1.4 + 0.28 * len(names))
    most = max(row["plays"] for row in table) or 1
    for rows, edge, label in (
        ([row for row in table if row["active"]], "none", "still in the game"),
        ([row for row in table if not row["active"]], COLOURS[1], "ruled out"),
    ):
        if rows:
            drawn = axes.scatter(
                [row["width"] / row["of"] for row in rows], [names.index(row["group"]) for row in rows],
                s=[15 + 85 * row["plays"] / most for row in rows], c=[row["gap"] for row in rows], cmap="YlGnBu_r",
                vmin=0, vmax=max(row["gap"] for row in table) or 1, edgecolors=edge, linewidths=1.2, label=label,
            )  # fmt: skip
    found = [row for row in table if row["found"]]
    axes.plot(
        [row["width"] / row["of"] for row in found], [names.index(row["group"]) for row in found], "|", color="black",
        markersize=14, markeredgewidth=1.6, label="found",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.03), xlabel="width kept, as a part of the group's channels; larger dots: more plays")
    figure.colorbar(drawn, ax=axes, label="gap (reward)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
