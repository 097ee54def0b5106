"""What all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateur._internal.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0b5fa5", "#b5410a", "#2f7d32", "#777777")


def new_figure(panels: int = 1, *, width: float = 5.0, height: float = 3.5) -> tuple[Figure, Any]:
    """An empty figure and its axes, one a panel.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with extra("lab", "a figure"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
