"""What the figures of the valley show, read back from the figures."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.lab.landscape.mode_connectivity import Curve, along, plane
from secateur.report.mode_connectivity import draw_curve, draw_plane, draw_spectrum


class Bowl(nn.Module):
    """Its output is its own three weights."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, inputs):
        return self.at.expand(len(inputs), 3)


DATA = [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))]
ENDS = [{"at": torch.tensor(p, dtype=torch.float64)} for p in ((0, 0, 0), (1, 2, 0), (2, 0, 0))]
CURVE = Curve(*ENDS)


def height(output, _):
    return output[:, 1].square().mean() + 0.01


def test_the_curve_is_drawn_over_its_length():
    rows = along(Bowl(), CURVE, DATA, DATA, points=5, loss=height, progress=False)
    panels = draw_curve(rows, ends=("a", "b")).axes
    assert [line.get_label() for line in panels[0].lines] == ["train", "test"]
    assert panels[0].lines[0].get_ydata() == pytest.approx([row["train_loss"] for row in rows])
    assert panels[1].lines[0].get_xdata() == pytest.approx([row["length"] for row in rows])
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["a", "b"]
    with pytest.raises(SecateurError, match="two or more"):
        draw_curve(rows[:1])


def test_weights_are_seen_from_above_the_plane():
    seen = plane(Bowl(), CURVE, DATA, steps=5, loss=height, progress=False)
    assert [seen.project(w) for w in ENDS] == [pytest.approx(p) for p in seen.points.values()]
    above = {"at": torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64), "of another": torch.ones(2)}
    assert seen.project(above) == pytest.approx((0.5, 1.0))
    axes = draw_plane(seen, paths={"one": [seen.project(w) for w in (ENDS[0], above, ENDS[2])]}).axes[0]
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert drawn["one"] == pytest.approx(torch.tensor([[0, 0], [0.5, 1], [2, 0]]).double().numpy())
    assert drawn["curve"] == pytest.approx(torch.tensor(seen.path).double().numpy())


def test_the_spectrum_shows_both_signs_and_where_flat_begins():
    axes = draw_spectrum(torch.tensor([8.0, -4.0, 2.0, -1.0]), steep=2).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["positive"] == [[1, 8], [3, 2]]
    assert drawn["negative"] == [[2, 4], [4, 1]]
    assert drawn["steep | flat"][0][0] == 2.5
    with pytest.raises(SecateurError, match="no eigenvalue"):
        draw_spectrum(torch.zeros(0))


def test_without_matplotlib_there_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SecateurError, match=r"secateur\[lab\]"):
        draw_spectrum(torch.ones(3))
