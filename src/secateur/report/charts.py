"""Charts that are simple enough to be drawn as SVG: in the colours of the page, light or dark, without a library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 34
COLOURS = ("var(--blue)", "var(--orange)", "var(--green)", "var(--violet)", "var(--dim)")


def line_chart(series: Mapping[str, Points], x: str, y: str, *, dots: bool = False) -> str:
    """Lines over a common axis.

    Args:
        series: what each is called, and its points; what is not finite is left out.
        x: what the horizontal axis says.
        y: what the vertical axis says.
        dots: mark the points.
    """
    lines = {name: _finite(points) for name, points in series.items()}
    if not any(lines.values()):
        return _chart(x, y, (0, 1), (0, 1), ["<text x='60' y='40'>nothing that is finite</text>"], {})
    (left, right), (low, high) = (
        _range([p[0] for ps in lines.values() for p in ps]),
        _range([p[1] for ps in lines.values() for p in ps]),
    )
    drawn, colours = [], {}
    for (name, points), colour in zip(lines.items(), _repeated(len(lines)), strict=True):
        at = [_at(p, (left, right), (low, high)) for p in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        if dots or len(at) == 1:
            drawn += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"/>' for a, b in at]
        colours[name] = colour
    return _chart(x, y, (left, right), (low, high), drawn, colours)


def scatter_chart(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]], x: str, y: str,
    points: Mapping[str, Points] = {}, *, higher: bool = True,
) -> str:  # fmt: skip
    """Means with their spread, joined in the order of the horizontal axis, and what they are the mean of.

    Args:
        series: what each is called, and ``(x, y, spread of x, spread of y)``.
        x: what the horizontal axis says.
        y: what the vertical axis says.
        points: single ones, of the same names.
        higher: whether more of ``y`` is better; what no other is better than at no more of ``x`` gets a ring.
    """
    sign = 1 if higher else -1
    means = {name: [m for m in some if all(map(math.isfinite, m))] for name, some in series.items()}
    singles = {name: _finite(points.get(name, ())) for name in series}
    all_x = [v for some in means.values() for m in some for v in (m[0] - m[2], m[0] + m[2])]
    all_y = [v for some in means.values() for m in some for v in (m[1] - m[3], m[1] + m[3])]
    across = _range(all_x + [p[0] for some in singles.values() for p in some])
    up = _range(all_y + [p[1] for some in singles.values() for p in some])
    drawn, colours = [], {}
    every = [(m[0], sign * m[1]) for some in means.values() for m in some]
    best = {m for m in every if not any(o[0] <= m[0] and o[1] >= m[1] and o != m for o in every)}
    for (name, some), colour in zip(means.items(), _repeated(len(means)), strict=True):
        at = [_at((a, b), across, up) for a, b, *_ in sorted(some)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-opacity=".5" points="{path}"/>')
        for a, b, da, db in some:
            for one, other in (((a - da, b), (a + da, b)), ((a, b - db), (a, b + db))):
                (x1, y1), (x2, y2) = _at(one, across, up), _at(other, across, up)
                drawn.append(f'<line stroke="{colour}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
            cx, cy = _at((a, b), across, up)
            if (a, sign * b) in best:
                drawn.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="7.5" fill="none" stroke="{colour}"/>')
            told = escape(f"{name}: {x} {a:.4g}, {y} {b:.4g}")
            drawn.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour}"><title>{told}</title></circle>')
        for p in singles[name]:
            cx, cy = _at(p, across, up)
            drawn.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="1.8" fill="{colour}" fill-opacity=".6"/>')
        colours[name] = colour
    return _chart(x, y, across, up, drawn, colours)


def score_chart(scores: Sequence[tuple[float, float]]) -> str:
    """The scores of a group, from low to high, coloured by whether they went.

    Args:
        scores: ``(score, share of the channels there that went)``, from low to high.
    """
    sizes = sorted(abs(score) for score, _ in scores if math.isfinite(score))
    most = sizes[-1] if sizes and sizes[-1] else 1.0
    least = next((size for size in sizes if size), most)
    low = max(least, 1e-6 * most)
    logarithmic = most > 100 * low
    wide = 150 / max(len(scores), 1)
    bars = []
    for number, (score, gone) in enumerate(scores):
        size = abs(score) if math.isfinite(score) else most
        part = 0.1 + 0.9 * math.log(max(size, low) / low) / math.log(most / low) if logarithmic else size / most
        tall = max(40 * part, 0.6)
        colour = "var(--orange)" if gone > 0.5 else "var(--blue)"
        bars.append(
            f'<rect x="{number * wide:.2f}" y="{42 - tall:.2f}" width="{max(wide - 0.3, 0.4):.2f}" '
            f'height="{tall:.2f}" fill="{colour}"/>'
        )
    return (
        f'<svg viewBox="0 0 150 43" role="img"><line class="axis" x2="150" y1="42.5" y2="42.5"/>{"".join(bars)}</svg>'
    )


# ---------------------------------------------------------------------------------------------------------------- parts


def _chart(
    x: str, y: str, across: tuple[float, float], up: tuple[float, float], drawn: Sequence[str],
    colours: Mapping[str, str],
) -> str:  # fmt: skip
    """Axes with ticks, what is drawn, and a legend below where there are several."""
    legend, bottom = _legend(colours) if len(colours) > 1 else ("", HEIGHT)
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom}" role="img" aria-label="{escape(f"{y} over {x}", quote=True)}">']
    for value in _ticks(*up):
        _, at = _at((across[0], value), across, up)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="dim" x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in _ticks(*across, whole=x == "epoch"):
        at, _ = _at((value, up[0]), across, up)
        parts.append(
            f'<text class="dim" x="{at:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">{escape(y)}</text>'
    )
    return "".join([*parts, *drawn, legend, "</svg>"])


def _legend(colours: Mapping[str, str]) -> tuple[str, int]:
    """Names with their colours in lines, and where they end."""
    parts, x, y = [], LEFT, HEIGHT + 10
    for name, colour in colours.items():
        wide = 16 + 6.2 * len(name)
        if x > LEFT and x + wide > WIDTH:
            x, y = LEFT, y + 15
        parts.append(f'<rect x="{x}" y="{y - 8}" width="9" height="9" fill="{colour}"/>')
        parts.append(f'<text x="{x + 13}" y="{y}">{escape(name)}</text>')
        x += math.ceil(wide) + 8
    return "".join(parts), y + 8


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the most, with some room where they are one."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _at(point: tuple[float, float], across: tuple[float, float], up: tuple[float, float]) -> tuple[float, float]:
    x = LEFT + (point[0] - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (point[1] - up[0]) / (up[1] - up[0]) * (HEIGHT - TOP - BOTTOM)
    return x, y


def _ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers between both."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    step = max(step, 1) if whole else step
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def _repeated(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]
