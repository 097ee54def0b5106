r"""Matrix pivoting: dense blocks that hold as much of a weight's energy as can be (after arXiv 1712.01084).

A weight's *energy* is a table ``E >= 0`` of rows and columns (of a convolution: filters and input channels). A pattern
is a list of blocks, each some rows and some columns, every row in one block; what lies outside all blocks goes::

    captured = sum over blocks of E[rows, columns]          density = B r c / (m n)       B blocks of r rows, c columns

Three ways to find blocks, from rigid to free:

``diagonal``    no column in two blocks: after permuting rows and columns the matrix is block-diagonal.
``growth``      complete pivoting: a block grows from the largest entry left, row by row and column by column.
``bundles``     every bundle of rows has its own list of columns.

``diagonal`` and ``bundles`` alternate: given the blocks' columns, rows are assigned to blocks (an assignment problem);
given the rows, columns are chosen. Both steps are optimal (of more than 1,024 rows or columns, for random parts of them
in turn), so the captured energy never falls. Only the abstract of the paper is public: this is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from secateur._internal.errors import SecateurError, unknown

LAYOUTS = ("diagonal", "growth", "bundles")
ASSIGNED_AT_ONCE = 1024
"""So many rows or columns are assigned at once, at most; of more, random parts in turn."""
FEWEST_ROWS = 32
"""Rows of a block, at least, if nobody says how many blocks; convolutions of fewer filters hardly get faster."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Dense blocks of a matrix.

    Attributes:
        shape: rows and columns of the matrix, (m, n).
        rows: [blocks, r], each number below m once, ascending in each block; where blocks do not divide m, the last one
            is filled up with ``m``, a row of zeros.
        columns: [blocks, c], ascending in each block.
        layout: how it was found.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray
    layout: str

    def mask(self) -> np.ndarray:
        """What stays, bool [m, n]."""
        m, n = self.shape
        whole = np.zeros((m + 1, n), dtype=bool)
        whole[self.rows[:, :, None], self.columns[:, None, :]] = True
        return whole[:m]

    @property
    def density(self) -> float:
        """The part of the coefficients that a packed layer computes, rows of zeros among them."""
        return self.rows.size * self.columns.shape[1] / (self.shape[0] * self.shape[1])

    def captured(self, energy: np.ndarray) -> float:
        """The part of the energy that is inside."""
        total = float(energy.sum())
        return float(energy[self.mask()].sum()) / total if total > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {
            "shape": list(self.shape), "layout": self.layout, "rows": self.rows.tolist(),
            "columns": self.columns.tolist(),
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Pattern:
        """What :meth:`to_dict` gave.

        Raises:
            SecateurError: damaged data.
        """
        try:
            m, n = data["shape"]
            rows, columns = np.array(data["rows"]), np.array(data["columns"])
            layout = data["layout"]
        except (KeyError, TypeError, ValueError) as error:
            raise SecateurError(f"the pattern is damaged ({type(error).__name__}: {error})") from error
        tables = all(t.ndim == 2 and t.size and np.issubdtype(t.dtype, np.integer) for t in (rows, columns))
        if not tables or layout not in LAYOUTS or not all(isinstance(size, int) and size > 0 for size in (m, n)):
            raise SecateurError("the pattern is damaged: a shape, a layout, rows and columns of blocks are expected")
        own = columns.flatten() if layout == "diagonal" else columns
        sound = (
            len(rows) == len(columns)
            and sorted(rows[rows != m].tolist()) == list(range(m))
            and rows.size - m < rows.shape[1]
            and columns.min() >= 0
            and columns.max() < n
            and bool((np.diff(np.sort(own)) > 0).all())
            and bool((np.diff(rows) >= 0).all() and (np.diff(columns) > 0).all())
        )
        if not sound:
            raise SecateurError("the pattern is damaged: its blocks do not fit its shape")
        return Pattern((m, n), rows, columns, str(data["layout"]))


def find_pattern(
    energy: np.ndarray,
    keep: float,
    *,
    layout: str = "bundles",
    blocks: int | None = None,
    rounds: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> Pattern:
    """Blocks that capture as much energy as can be found.

    Args:
        energy: [m, n], not negative.
        keep: the part of the coefficients that stays, in (0, 1].
        layout: ``"diagonal"``, ``"growth"`` or ``"bundles"``.
        blocks: how many, at most; default: ``1 / keep``, so that no more is gathered than is there, but none of fewer
            than 32 rows. For ``"diagonal"`` there are always ``1 / keep``, rounded up.
        rounds: alternations, at most; they end when they gain less than a part in 10,000.
        restarts: beginnings, of which the best end counts.
        seed: of beginnings, and of the parts in which large problems are taken.

    Raises:
        SecateurError: energy that is no table of numbers from 0 on, keep outside (0, 1], fewer rows than blocks.
    """
    energy = _checked(energy)
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise SecateurError(f"keep={keep!r}: a fraction in (0, 1] is expected")
    m, n = energy.shape
    height = -(-m // _blocks(layout, keep, blocks, m, n))
    count, width = -(-m // height), max(1, int(keep * n + 1e-9))
    of_row = np.repeat(np.arange(count), height)[:m]  # the last block may have fewer rows
    of_column = np.r_[np.repeat(np.arange(count), width), np.full(max(0, n - count * width), -1)]
    rng = np.random.default_rng(seed)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for number in range(1 if layout == "growth" else restarts):
        if layout == "growth" or number == 0:
            rows, columns = _grown(energy, of_row, width, reuse=layout != "diagonal")
        else:
            rows, columns = rng.permutation(m), rng.permutation(n)[: count * width].reshape(count, width)
        if layout != "growth":
            rows, columns = _alternated(energy, rows, of_row, columns, of_column, layout, rounds, rng)
        value = _inside(energy, rows, of_row, columns)
        if best is None or value > best[0]:
            best = (value, rows, columns)
    assert best is not None
    padded = np.r_[best[1], np.full(count * height - m, m)].reshape(count, height)
    return Pattern((m, n), np.sort(padded, axis=1), np.sort(best[2], axis=1), layout)


def blocks_for(keep: float, rows: int) -> int:
    """How many blocks a matrix has if nobody says: ``1 / keep``, but none of fewer than ``FEWEST_ROWS`` rows."""
    return max(1, min(int(1 / keep + 1e-9), rows // FEWEST_ROWS))


def _checked(energy: np.ndarray) -> np.ndarray:
    energy = np.asarray(energy, dtype=np.float64)
    if energy.ndim != 2 or not energy.size or not np.isfinite(energy).all() or (energy < 0).any():
        raise SecateurError(f"energy of shape {list(energy.shape)}: a table of finite numbers from 0 on is expected")
    return energy


def _blocks(layout: str, keep: float, blocks: int | None, m: int, n: int) -> int:
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
        raise SecateurError(f"blocks={blocks!r}: a whole number from 1 on is expected")
    if layout == "diagonal":
        count = int(np.ceil(1 / keep - 1e-9))
        if blocks is not None and blocks != count:
            raise SecateurError(f"blocks={blocks}: with layout='diagonal' and keep={keep:g} there are {count}")
        if count > min(m, n):
            raise SecateurError(
                f"keep={keep:g} leaves less than one block of a {m} x {n} matrix: give keep of 1/{min(m, n)} or more, "
                "or another layout"
            )
        return count
    count = blocks if blocks is not None else blocks_for(keep, m)
    if count > m:
        raise SecateurError(f"blocks={count}: the matrix has {m} rows; give at most so many")
    return count


def _members(items: np.ndarray, blocks: np.ndarray, size: int) -> np.ndarray:
    """Which of ``size`` items are in which block, 1 or 0, [blocks, size]."""
    table = np.zeros((int(blocks.max()) + 1, size))
    table[blocks, items] = 1
    return table


def _by_block(energy: np.ndarray, rows: np.ndarray, of_row: np.ndarray) -> np.ndarray:
    """The energy of every column in the rows of every block, [blocks, columns]."""
    return _members(rows, of_row, len(energy)) @ energy


def _inside(energy: np.ndarray, rows: np.ndarray, of_row: np.ndarray, columns: np.ndarray) -> float:
    return float(np.take_along_axis(_by_block(energy, rows, of_row), columns, 1).sum())


def _grown(energy: np.ndarray, of_row: np.ndarray, width: int, *, reuse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Complete pivoting: each block grows from the largest entry left by the row or column with most to add.

    Args:
        energy: the table.
        of_row: the block of each place for a row.
        width: columns of a block.
        reuse: whether blocks may share columns.

    Returns:
        The rows, block by block, and the columns of each block.
    """
    open_rows, open_columns = (np.ones(size, dtype=bool) for size in energy.shape)
    found_rows: list[int] = []
    found_columns = []
    for height in np.bincount(of_row).tolist():
        left = np.where(open_rows[:, None] & open_columns[None, :], energy, -1.0)
        i, j = np.unravel_index(int(left.argmax()), left.shape)
        taken_rows, taken_columns = [int(i)], [int(j)]
        by_row, by_column = energy[:, j].copy(), energy[i].copy()  # what a row or column would add
        by_row[~open_rows] = by_column[~open_columns] = -np.inf
        by_row[i] = by_column[j] = -np.inf
        while len(taken_rows) < height or len(taken_columns) < width:
            best_row = by_row.max(initial=-np.inf) / len(taken_columns) if len(taken_rows) < height else -np.inf
            best_column = by_column.max(initial=-np.inf) / len(taken_rows) if len(taken_columns) < width else -np.inf
            if best_row >= best_column:
                k = int(by_row.argmax())
                taken_rows.append(k)
                by_row[k] = -np.inf
                by_column += np.where(np.isfinite(by_column), energy[k], 0)
            else:
                k = int(by_column.argmax())
                taken_columns.append(k)
                by_column[k] = -np.inf
                by_row += np.where(np.isfinite(by_row), energy[:, k], 0)
        found_rows += taken_rows
        found_columns.append(taken_columns)
        open_rows[taken_rows] = False
        if not reuse:
            open_columns[taken_columns] = False
    return np.array(found_rows), np.array(found_columns)


def _alternated(
    energy: np.ndarray, rows: np.ndarray, of_row: np.ndarray, columns: np.ndarray, of_column: np.ndarray, layout: str,
    rounds: int, rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Columns given rows, rows given columns, until next to nothing is gained."""
    before, width = -np.inf, columns.shape[1]
    for _ in range(rounds):
        by_block = _by_block(energy, rows, of_row)
        if layout == "bundles":
            columns = np.argsort(-by_block, axis=1, kind="stable")[:, :width]
        else:
            inside = columns.flatten()
            start = np.r_[inside, np.setdiff1d(np.arange(energy.shape[1]), inside)]
            columns = _assigned(by_block.T, start, of_column, rng)[of_column >= 0].reshape(columns.shape)
        mine = _members(columns, np.arange(len(columns))[:, None], energy.shape[1])
        rows = _assigned(energy @ mine.T, rows, of_row, rng)
        value = _inside(energy, rows, of_row, columns)
        if value <= before * (1 + 1e-4):
            break
        before = value
    return rows, columns


def _assigned(gain: np.ndarray, items: np.ndarray, blocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Items to places, for the largest total gain; of many items, random parts keep the places they have together.

    Args:
        gain: [items, blocks], what an item brings in a block.
        items: the item in each place now.
        blocks: the block of each place, -1 for places outside of all, where an item brings nothing.
        rng: draws the parts.

    Returns:
        The item in each place.
    """
    items, padded = items.copy(), np.c_[gain, np.zeros(len(gain))]  # block -1 is the last column
    parts = [np.arange(len(items))]
    if len(items) > ASSIGNED_AT_ONCE:
        parts = [
            part
            for _ in range(2)
            for part in np.array_split(rng.permutation(len(items)), -(-len(items) // ASSIGNED_AT_ONCE))
        ]
    for part in parts:
        own = items[part]
        chosen, where = linear_sum_assignment(padded[own][:, blocks[part]], maximize=True)
        new = np.empty_like(own)
        new[where] = own[chosen]
        items[part] = new
    return items
