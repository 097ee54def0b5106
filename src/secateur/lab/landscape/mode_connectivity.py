r"""Whether two solutions lie in the same valley of the loss (arXiv 1802.10026, section 3; arXiv 2006.09358, section 4).

Between the ends ``theta_0`` and ``theta_1`` runs a quadratic Bezier curve with one trained point::

    phi(u) = (1 - u)^2 theta_0 + 2 u (1 - u) theta_c + u^2 theta_1          theta_c minimises the mean of L(phi(u))

If the loss stays low all along it, no barrier parts the ends. Batch norms are re-estimated wherever a loss is measured:
their running statistics belong to one point alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur._internal.errors import SecateurError
from secateur._internal.losses import read_loss
from secateur._internal.progress import tracked
from secateur.curvature.null_space import NullSpaceProjector
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import loss_and_accuracy
from secateur.repair.recalibrate import recalibrate

Weights = Mapping[str, Tensor]
"""One tensor for each parameter, by its name."""
Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Curve:
    """A quadratic Bezier curve in the space of the parameters.

    Attributes:
        start: the weights at u = 0.
        control: the point that bends it.
        end: the weights at u = 1.
    """

    start: Weights
    control: Weights
    end: Weights

    def at(self, u: float) -> dict[str, Tensor]:
        """The weights at ``u`` in [0, 1]."""
        return _bezier(self.start, self.control, self.end, u)


def _bezier(start: Weights, control: Weights, end: Weights, u: float | Tensor) -> dict[str, Tensor]:
    a, b, c = (1 - u) ** 2, 2 * u * (1 - u), u**2
    return {name: a * start[name] + b * control[name] + c * end[name] for name in start}


class _Bent(nn.Module):
    """The network at a random point of a curve, in training; in each forward another one."""

    def __init__(self, start: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(start).requires_grad_(False)
        self.names = [name for name, _ in start.named_parameters()]
        ends = [dict(start.named_parameters()), dict(end.named_parameters())]
        self.control = nn.ParameterList((ends[0][n].detach() + ends[1][n].detach()) / 2 for n in self.names)
        for side, weights in zip(("start", "end"), ends, strict=True):
            for number, name in enumerate(self.names):
                self.register_buffer(f"{side}{number}", weights[name].detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.rand(()).item()
        start, end = (
            {name: getattr(self, f"{side}{n}") for n, name in enumerate(self.names)} for side in ("start", "end")
        )
        control = dict(zip(self.names, self.control, strict=True))
        return functional_call(self.network, _bezier(start, control, end, u), (x,))


def connect(
    start: nn.Module,
    end: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    loss: Any = "cross_entropy",
    schedule: str = "grda",
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Curve:
    """Train the curve between two solutions of one network.

    Args:
        start: one trained network; it is not changed.
        end: the same network with other weights; pruned channels are zero, not cut off.
        data: sized batches ``(x, y)``, as for the training loop.
        epochs: how often to pass over the data; 0 gives the straight line.
        lr: learning rate of the control point.
        momentum: its momentum.
        loss: see :mod:`secateur._internal.losses`.
        schedule: of the learning rate, a name in ``secateur.lab.training.schedule.SCHEDULES``.
        seed: of the points on the curve, one a batch.
        checkpoint_dir: where to keep checkpoints and to resume from.
        progress: show a bar with the time left.
        **options: others of :func:`secateur.lab.training.loop.fit`.

    Raises:
        SecateurError: the ends are not the same network; what the loop refuses.
    """
    _check_ends(start, end)
    bent = _Bent(start, end).train()
    if epochs:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fit(
                bent, torch.optim.SGD(bent.control.parameters(), lr=lr, momentum=momentum), data, epochs=epochs,
                loss_fn=read_loss(loss).mean, schedule=schedule, checkpoint_dir=checkpoint_dir, progress=progress,
                **options,
            )  # fmt: skip
    ends = _weights(start), _weights(end)
    control = {name: p.detach().to(ends[0][name], copy=True) for name, p in zip(bent.names, bent.control, strict=True)}
    return Curve(ends[0], control, ends[1])


def along(
    model: nn.Module,
    curve: Curve,
    train: Iterable[tuple[Tensor, Tensor]],
    test: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    points: int = 61,
    loss: Any = "cross_entropy",
    progress: bool = False,
) -> list[Row]:
    """Loss and error at evenly spread points of a curve.

    Args:
        model: the network; it is not changed.
        curve: from :func:`connect`.
        train: training batches; batch norms are re-estimated on them at every point.
        test: test batches.
        points: how many, both ends included.
        loss: see :mod:`secateur._internal.losses`.
        progress: show a bar with the time left.

    Returns:
        One row a point: ``u``, ``length`` (of the way so far, Euclidean), ``train_loss``, ``train_error`` and, with
        ``test``, ``test_loss`` and ``test_error``; errors are fractions.
    """
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise SecateurError(f"along(points={points!r}): a whole number from 2 on is expected, usually 61")
    _check_curve(model, curve)
    rows: list[Row] = []
    before, length = curve.at(0), 0.0
    for number in tracked(range(points), "along the curve", points, progress):
        u = number / (points - 1)
        weights = curve.at(u)
        length += _distance(weights, before)
        rows.append({"u": u, "length": length, **_measured(model, weights, train, test, loss)})
        before = weights
    return rows


def barrier(rows: Sequence[Mapping[str, float]], key: str = "train_loss") -> float:
    """By how much the highest point of a curve is above the higher of its ends; 0 if an end is the highest."""
    if len(rows) < 2:
        raise SecateurError(f"barrier: {len(rows)} points given, a curve has two or more; see along")
    values = [row[key] for row in rows]
    return max(values) - max(values[0], values[-1])


@dataclass(frozen=True)
class Plane:
    """The loss on the plane through both ends and the control point of a curve.

    Attributes:
        x: coordinates along the line from start to end, Euclidean.
        y: coordinates across it, towards the control point.
        loss: mean training loss, ``loss[j][i]`` at ``(x[i], y[j])``.
        points: coordinates of ``start``, ``control``, ``end``.
        path: coordinates of the curve.
        axes: ``start`` and the two unit vectors.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float]]
    points: dict[str, tuple[float, float]]
    path: list[tuple[float, float]]
    axes: tuple[Weights, Weights, Weights] = field(repr=False)

    def project(self, weights: Weights) -> tuple[float, float]:
        """Where weights are when looked at from above the plane: a point of a training's path, for instance."""
        start, e1, e2 = self.axes
        way = _difference({name: weights[name] for name in start}, start)
        return _dot(way, e1), _dot(way, e2)


def plane(
    model: nn.Module,
    curve: Curve,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int = 21,
    margin: float = 0.2,
    loss: Any = "cross_entropy",
    progress: bool = False,
) -> Plane:
    """The loss on the plane of a curve.

    Args:
        model: the network; it is not changed.
        curve: from :func:`connect`.
        data: batches; batch norms are re-estimated on them at every point.
        steps: points a side.
        margin: how far the plane reaches beyond the three points, as a fraction of its sides.
        loss: see :mod:`secateur._internal.losses`.
        progress: show a bar with the time left.

    Raises:
        SecateurError: both ends are the same point.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise SecateurError(f"plane(steps={steps!r}): a whole number from 2 on is expected, usually 21")
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < math.inf:
        raise SecateurError(f"plane(margin={margin!r}): a number from 0 on is expected")
    _check_curve(model, curve)
    start, across = curve.start, _difference(curve.end, curve.start)
    width = _norm(across)
    if not width > 0:
        raise SecateurError("plane: both ends of the curve are the same point")
    e1 = {name: d / width for name, d in across.items()}
    up = _difference(curve.control, start)
    at = _dot(up, e1)
    rest = {name: d - at * e1[name] for name, d in up.items()}
    height = _norm(rest)
    flat = not height > 1e-6 * width  # the curve is straight: any direction would do, there is none to show
    e2 = {name: torch.zeros_like(d) if flat else d / height for name, d in rest.items()}
    height = width if flat else height
    low, high = min(0.0, at), max(width, at)
    x = [low - margin * (high - low) + (1 + 2 * margin) * (high - low) * i / (steps - 1) for i in range(steps)]
    y = [-margin * height + (1 + 2 * margin) * height * j / (steps - 1) for j in range(steps)]
    table = [[0.0] * steps for _ in y]
    for cell in tracked(range(steps * steps), "on the plane", steps * steps, progress):
        j, i = divmod(cell, steps)
        weights = {name: w + x[i] * e1[name] + y[j] * e2[name] for name, w in start.items()}
        table[j][i] = _measured(model, weights, data, None, loss)["train_loss"]
    three: dict[str, tuple[float, float]] = {
        "start": (0.0, 0.0),
        "control": (at, 0.0 if flat else height),
        "end": (width, 0.0),
    }
    shares = [((1 - u) ** 2, 2 * u * (1 - u), u**2) for u in (k / 60 for k in range(61))]
    path = [
        tuple(sum(s * p[d] for s, p in zip(share, three.values(), strict=True)) for d in (0, 1)) for share in shares
    ]
    return Plane(x, y, table, three, path, (start, e1, e2))  # type: ignore[arg-type]


def steep_share(start: nn.Module, end: nn.Module, directions: NullSpaceProjector) -> float:
    """How much of the way ``d`` between two solutions goes along steep directions: ``||d - P_0 d|| / ||d||``.

    It is taken over the parameters that the projector knows. By chance it would be the root of the share of directions
    that are steep. The mini-batches of both trainings must be the same, or the way holds their noise.

    Args:
        start: the network the directions were found at.
        end: the same network with other weights.
        directions: from ``null_space_projector(start, ...)``, of any basis.

    Raises:
        SecateurError: the ends are not the same network, or not the one of the projector.
    """
    _check_ends(start, end)
    directions.check_model(start)
    way = _difference(_weights(end), _weights(start))
    way = {name: way[name] for name in directions.shapes}
    flat = directions.project(way)
    steep = {name: d.double() - flat[name].double() for name, d in way.items()}
    return _norm(steep) / _norm(way) if _norm(way) > 0 else 0.0


def _check_ends(start: nn.Module, end: nn.Module) -> None:
    one, other = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (start, end))
    if one != other:
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        raise SecateurError(
            f"both ends must be the same network: {names[0]!r} has shape {one.get(names[0])} and {other.get(names[0])}"
            "; give the trained network as it was before it was cut, its pruned channels zero"
        )


def _check_curve(model: nn.Module, curve: Curve) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != {name: t.shape for name, t in curve.start.items()}:
        raise SecateurError("the curve is of another network: give the one that it was trained between")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _difference(one: Weights, other: Weights) -> dict[str, Tensor]:
    return {name: one[name] - other[name] for name in one}


def _dot(one: Weights, other: Weights) -> float:
    return float(sum((one[name].double() * other[name].double()).sum() for name in one))


def _norm(weights: Weights) -> float:
    return math.sqrt(_dot(weights, weights))


def _distance(one: Weights, other: Weights) -> float:
    return _norm(_difference(one, other))


def _measured(
    model: nn.Module,
    weights: Weights,
    train: Iterable[tuple[Tensor, Tensor]],
    test: Iterable[tuple[Tensor, Tensor]] | None,
    loss: Any,
) -> Row:
    """Loss and error of the network with these weights, its batch norms re-estimated."""
    here = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in here.named_parameters():
            p.copy_(weights[name])
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in here.modules()):
        recalibrate(here, train)
    row: Row = {}
    for side, data in (("train", train), ("test", test)):
        if data is not None:
            value, right = loss_and_accuracy(here, data, loss)
            row |= {f"{side}_loss": value, f"{side}_error": 1 - right}
    return row
