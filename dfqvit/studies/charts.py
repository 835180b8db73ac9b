"""Charts as SVG text: lines over a numeric axis, or bars for named settings, with the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float, float]  # mean, least, greatest

_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 130, 32, 64
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#8a6d1b", "#444444")
_LOG_SPAN = 8  # a positive axis that spans more than this is logarithmic


def chart(
    title: str,
    places: Sequence[tuple[str, float | None]],
    series: Mapping[str, Sequence[Point | None]],
    linear: bool = False,
) -> str:
    """An SVG picture.

    Args:
        title: above the picture.
        places: (label, position) of each place on the horizontal axis; bars unless every place has a position.
        series: {name: a point for each place, None where nothing was measured}. One that holds NaN or Inf is not drawn.
        linear: keeps a wide axis from becoming logarithmic.
    """
    series = {
        name: [point if point is not None and all(map(math.isfinite, point)) else None for point in points]
        for name, points in series.items()
    }
    values = [value for points in series.values() for point in points if point is not None for value in point]
    least, greatest = _bounds(values or [0.0, 1.0])
    numeric = all(position is not None for _, position in places) and len(places) > 1
    positions = [float(position or 0) for _, position in places]
    across = _axis(positions, linear) if numeric else [(index + 0.5) / len(places) for index in range(len(places))]
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(share: float) -> float:
        return _LEFT + share * plot_width

    def y(value: float) -> float:
        return _TOP + (greatest - value) / (greatest - least) * plot_height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for step in range(5):
        value = least + (greatest - least) * step / 4
        parts.append(f'<line x1="{_LEFT}" x2="{x(1)}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for (label, _), share in zip(places, across, strict=True):
        place = f'x="{x(share):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
        turn = "" if numeric else f' transform="rotate(18 {x(share):.1f} {_HEIGHT - _BOTTOM + 16})"'
        parts.append(f'<text {place} text-anchor="{"middle" if numeric else "start"}"{turn}>{escape(label)}</text>')
    bar = plot_width / max(len(places) * (len(series) + 1), 1)
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<rect x="{x(1) + 14}" y="{_TOP + 16 * index}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x(1) + 30}" y="{_TOP + 9 + 16 * index}">{escape(name)}</text>')
        corners = []
        for share, point in zip(across, points, strict=True):
            if point is None:
                continue
            mean, low, high = point
            middle = x(share) if numeric else x(share) + (index - (len(series) - 1) / 2) * bar
            if numeric:
                corners.append(f"{middle:.1f},{y(mean):.1f}")
                parts.append(f'<circle cx="{middle:.1f}" cy="{y(mean):.1f}" r="3" fill="{colour}"/>')
            else:
                height = y(least) - y(mean)
                parts.append(
                    f'<rect x="{middle - bar / 2:.1f}" y="{y(mean):.1f}" width="{bar:.1f}" height="{height:.1f}" '
                    f'fill="{colour}" fill-opacity="0.8"/>'
                )
            parts.append(
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{colour}"/>'
            )
        if len(corners) > 1:
            parts.append(f'<polyline points="{" ".join(corners)}" fill="none" stroke="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The ends of the vertical axis, a little beyond the values."""
    least, greatest = min(values), max(values)
    margin = 0.08 * (greatest - least) or max(abs(greatest), 1.0) * 0.05
    return least - margin, greatest + margin


def _axis(positions: Sequence[float], linear: bool) -> list[float]:
    """Shares of the width, 0.04 to 0.96."""
    if not linear and min(positions) > 0 and max(positions) / min(positions) > _LOG_SPAN:
        positions = [math.log(position) for position in positions]
    span = max(positions) - min(positions) or 1.0
    return [0.04 + 0.92 * (position - min(positions)) / span for position in positions]
