"""The figure of a search shows every width, what was ruled out and what was found."""

from __future__ import annotations

import pytest

from secateur._internal.errors import SecateurError
from secateur.report.search import draw_search


def row(group, width, *, active=True, found=False, gap=0.1, plays=3):
    return {
        "group": group, "width": width, "of": 8, "gap": gap, "plays": plays, "active": active, "found": found,
    }  # fmt: skip


TABLE = [row("a", 2), row("a", 4, found=True, gap=0.0), row("b", 4, active=False), row("b", 8, found=True, gap=0.0)]


@pytest.mark.parametrize("table", [TABLE, [r for r in TABLE if r["active"]], [row("a", 1, active=False, plays=0)]])
def test_every_width_is_there(table, tmp_path):
    figure = draw_search(table)
    axes = figure.axes[0]
    dots = sorted((round(8 * x), round(y)) for part in axes.collections for x, y in part.get_offsets().tolist())
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert dots == sorted((r["width"], names.index(r["group"])) for r in table)
    (marks,) = axes.lines
    assert len(marks.get_xdata()) == sum(r["found"] for r in table)
    labels = {part.get_label() for part in axes.collections}
    assert labels == {"still in the game" if r["active"] else "ruled out" for r in table}
    figure.savefig(tmp_path / "search.png")


def test_an_empty_table_is_told():
    with pytest.raises(SecateurError, match="no group had a choice of widths"):
        draw_search([])
