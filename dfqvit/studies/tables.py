"""Tables and charts of the rows that `ablation` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..storage.atomic import atomic
from .ablation import Row
from .charts import Point, chart

Group = tuple[str, str, str, int, str, str]  # model, weights, data, images, study, recipe: what one table holds


def groups(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """The rows of each table, in the order in which they were measured."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.weights, row.data, row.images, row.study, row.recipe), []).append(row)
    return found


def markdown(rows: Sequence[Row], charts: bool = False) -> str:
    """A section for each table: top-1 by setting and width, mean (least to greatest) over seeds, and KL from float.

    With `charts`, each links the picture that `write_charts` makes.
    """
    parts = []
    for (model, weights, data, images, study, recipe), held in groups(rows).items():
        synthetic = [row for row in held if row.iters > 0] or held
        samples, iters = ({getattr(row, name) for row in synthetic} for name in ("samples", "iters"))
        seeds = sorted({row.seed for row in held})
        widths = _widths(held)
        heads = [f"W{width} {what}" for width in widths for what in ("top-1", "KL")]
        lines = [
            f"## {study}: {model}, {recipe} recipe",
            "",
            f"{images} images of {data}, float {held[0].float_top1:.2f} %, weights `{weights}`; {_span(samples)} synthetic "
            f"images of {_span(iters)} steps, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
            "",
            f"| setting | {' | '.join(heads)} |",
            f"| --- |{' ---: |' * len(heads)}",
        ]
        for name, _ in _places(held):
            cells = []
            for width in widths:
                cells.append(_cell(_point(held, name, width, "top1"), 1))
                cells.append(_cell(_point(held, name, width, "kl"), 3))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if charts:
            lines += ["", f"![{study}]({chart_name(held[0])})"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def write_charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A picture of top-1 for each table, as SVG."""
    written = []
    for held in groups(rows).values():
        places = _places(held)
        series = {f"W{width}": [_point(held, name, width, "top1") for name, _ in places] for width in _widths(held)}
        path = folder / chart_name(held[0])
        title = f"{held[0].study}: {held[0].model}, top-1 % on {held[0].images} images of {held[0].data}"
        with atomic(path) as temporary:
            temporary.write_text(chart(title, places, series), encoding="utf-8")
        written.append(path)
    return written


def chart_name(row: Row) -> str:
    """The file of a table's picture."""
    return f"{row.model}-{row.weights}-{Path(row.data).stem}-{row.images}-{row.study}-{row.recipe}.svg"


def _places(rows: Sequence[Row]) -> list[tuple[str, float | None]]:
    places = list(dict.fromkeys((row.setting, row.x) for row in rows))
    return sorted(places, key=lambda place: place[1] or 0) if all(x is not None for _, x in places) else places


def _widths(rows: Sequence[Row]) -> list[int]:
    return sorted({row.w_bits for row in rows}, reverse=True)


def _point(rows: Sequence[Row], setting: str, width: int, field: str) -> Point | None:
    values = [getattr(row, field) for row in rows if row.setting == setting and row.w_bits == width]
    return (sum(values) / len(values), min(values), max(values)) if values else None


def _cell(point: Point | None, digits: int) -> str:
    if point is None:
        return ""
    mean, least, greatest = point
    text = f"{mean:.{digits}f}"
    return text if least == greatest else f"{text} ({least:.{digits}f} to {greatest:.{digits}f})"


def _span(values: set[int]) -> str:
    return f"{min(values)}" if len(values) == 1 else f"{min(values)} to {max(values)}"
