"""Charts as inline SVG: lines, and ranges as bars. Colours are CSS variables of the page, so that both themes can be read.

They are drawn 480 units wide, so that letters are still letters on a telephone of 390 pixels.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 42
_ROW = 18  # height of a bar with its gap
_NAMES = 168  # of the width, beside the bars
_LONGEST = 24  # letters of a name that fit there
_GREATEST = 1e300  # a span of two such numbers is still one

# What a line shows has the same colour and dash in every chart; other names take those that are free.
STYLES = {
    "synthetic": 0,
    "data-free": 0,
    "without correction": 0,
    "noise": 1,
    "real": 2,
    "given images": 2,
    "with ACM": 2,
    "procedural": 3,
}

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str, *, logarithmic: bool = False) -> str:
    """Lines through (x, y) points, one a series, with a legend. Points of NaN, Inf or beyond 1e300 are left out, and counted.

    With `logarithmic`, y is drawn by its logarithm; points that are not positive are left out then.
    """
    given = sum(map(len, series.values()))
    series = {name: [point for point in points if _drawable(*point)] for name, points in series.items()}
    missing = _missing(given - sum(map(len, series.values())), "points")
    series = {name: [p for p in points if p[1] > 0 or not logarithmic] for name, points in series.items()}
    every = [point for points in series.values() for point in points]
    if not every:
        return f"<p>No values to draw.</p>{missing}"
    rise = math.log10 if logarithmic else float
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low, y_high = min(rise(y) for _, y in every), max(rise(y) for _, y in every)
    if logarithmic:
        y_low, y_high = math.floor(y_low), math.ceil(y_high)
    else:
        y_low = min(y_low, 0.0)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x_low) / x_span * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (y - y_low) / y_span * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y_low, y_high, 4):
        if logarithmic and value != round(value):
            continue
        _, y = at(x_low, value)
        text = f"{10**value:.3g}" if logarithmic else f"{value:g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    whole = all(x == int(x) for x, _ in every)  # as the numbers of blocks
    for value in ticks(x_low, x_high, 6):
        if whole and value != int(value):
            continue
        x, _ = at(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    styles = _styles(series)
    for index, points in zip(styles, series.values(), strict=True):
        places = [at(x, rise(y)) for x, y in points]
        parts.append(f'<polyline class="line c{index}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(places) <= 40:
            parts += [f'<circle class="dot c{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    turn = f'transform="translate(14 {middle:.0f}) rotate(-90)"'
    parts.append(f'<text {turn} text-anchor="middle">{html.escape(y_label)}</text>')
    return _svg(HEIGHT, f"{y_label} by {x_label}: {', '.join(series)}", parts) + _legend(list(series), styles) + missing


def _drawable(*values: float) -> bool:
    return all(abs(value) <= _GREATEST for value in values)  # NaN is not


def _missing(count: int, what: str) -> str:
    """What is said of values that could not be drawn."""
    return f'<p class="soft">{count} {what} are not numbers that can be drawn (NaN or Inf).</p>' if count else ""


def _styles(names: Iterable[str]) -> list[int]:
    """The number of the colour and the dash for each name: its own, or one that no other name of the chart has."""
    names = list(names)
    free = [index for index in range(4) if index not in {STYLES.get(name) for name in names}] or [3]
    return [STYLES[name] if name in STYLES else free[min(k, len(free) - 1)] for k, name in enumerate(names)]


def range_chart(ranges: Sequence[tuple[str, float, float]], label: str) -> str:
    """A bar from least to greatest for each (name, least, greatest); those of NaN or Inf are left out, and counted."""
    given, ranges = len(ranges), [each for each in ranges if _drawable(*each[1:])]
    missing = _missing(given - len(ranges), "ranges")
    if not ranges:
        return f"<p>No values to draw.</p>{missing}"
    left = _NAMES
    low, high = min(0.0, *(r[1] for r in ranges)), max(0.0, *(r[2] for r in ranges))
    span = (high - low) or 1.0
    height = _TOP + _ROW * len(ranges) + _BOTTOM

    def at(value: float) -> float:
        return left + (value - low) / span * (WIDTH - left - _RIGHT)

    parts = []
    for value in ticks(low, high, 4):
        x = at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for row, (name, least, greatest) in enumerate(ranges):
        y = _TOP + _ROW * row
        shown = name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
        width = max(at(greatest) - at(least), 1.0)
        title = f"<title>{html.escape(name)}: {least:.4g} to {greatest:.4g}</title>"
        parts.append(f'<text class="small" x="{left - 6}" y="{y + 12}" text-anchor="end">{html.escape(shown)}</text>')
        parts.append(
            f'<rect class="bar" x="{at(least):.1f}" y="{y + 3}" width="{width:.1f}" height="11">{title}</rect>'
        )
    parts.append(
        f'<text x="{(WIDTH + left) / 2:.0f}" y="{height - 6}" text-anchor="middle">{html.escape(label)}</text>'
    )
    return _svg(height, label, parts) + missing


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )


def _legend(names: Sequence[str], styles: Sequence[int]) -> str:
    items = (
        f'<span><i class="key c{index}"></i>{html.escape(name)}</span>'
        for index, name in zip(styles, names, strict=True)
    )
    return f'<p class="legend">{"".join(items)}</p>'
