"""The page itself: HTML with inline CSS, pictures as data URIs."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.energy import Cost
from ..storage.atomic import atomic
from .charts import Points, line_chart, range_chart
from .measure import Divergence

_CSS = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2128;--soft:#5b6470;--line:#d8dde3;--panel:#f5f7f9;
--c0:#0b66c3;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce}
@media(prefers-color-scheme:dark){:root{--back:#14181d;--text:#e4e8ec;--soft:#9aa5b1;--line:#333b44;--panel:#1c2228;
--c0:#6cb2f7;--c1:#fb923c;--c2:#4ade80;--c3:#c99bff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:2rem 1rem 4rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
p{margin:.5rem 0}.soft,figcaption{color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.25rem 0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;min-width:8rem}
.tiles b{display:block;font-size:1.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
figure{margin:1rem 0}img{max-width:100%;height:auto;image-rendering:pixelated;border-radius:6px;background:var(--panel)}
svg{width:100%;height:auto;background:var(--panel);border-radius:6px}
svg text{fill:var(--soft);font-size:12px}svg .small{font-size:10px}.grid{stroke:var(--line)}
.line{fill:none;stroke-width:2}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.line{stroke:var(--c)}.dot{fill:var(--c)}.bar{fill:var(--c0)}
.legend span{margin-right:1.2rem}.key{display:inline-block;width:1em;height:.3em;margin-right:.4em;vertical-align:middle;
background:var(--c)}
"""


@dataclass
class Report:
    """What a page shows; sections without values are left out."""

    title: str
    label: str  # as "W4/A8"
    bytes: int
    float_bytes: int
    cost: Cost
    energy_note: str = ""
    pictures: Mapping[str, Path] = field(default_factory=dict)  # caption: PNG file
    densities: Mapping[str, Points] = field(default_factory=dict)
    ranges: Sequence[tuple[str, float, float]] = ()
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    accuracy: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None  # headers, rows
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)


def write_report(report: Report, path: Path) -> Path:
    """Writes the page, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The whole page as HTML."""
    sections = "".join(f"<section><h2>{title}</h2>{body}</section>" for title, body in _sections(report) if body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(report.title)} · dfqvit</title><style>{_CSS}</style></head>'
        f"<body><h1>{html.escape(report.title)}</h1>"
        '<p class="soft">Quantized by dfqvit. What the charts mean: docs/report.md.</p>'
        f"{_tiles(report)}{sections}</body></html>\n"
    )


def _sections(report: Report) -> list[tuple[str, str]]:
    blocks = {
        "relative error": {name: list(enumerate(found.relative)) for name, found in report.divergences.items()},
        "KL, nats": {name: list(enumerate(found.kl)) for name, found in report.divergences.items()},
    }
    charts = "".join(line_chart(series, "block", title, logarithmic=True) for title, series in blocks.items())
    sizes = [[kind, f"{size / 1e6:.3f}"] for kind, size in report.sizes.items()]
    sizes += [["the file", f"{report.bytes / 1e6:.3f}"], ["float32 weights", f"{report.float_bytes / 1e6:.3f}"]]
    return [
        ("Accuracy", table(*report.accuracy) if report.accuracy else ""),
        ("Images", "".join(_picture(caption, path) for caption, path in report.pictures.items())),
        (
            "Similarity of patches",
            line_chart(report.densities, "cosine similarity of two patches", "density", logarithmic=True)
            if report.densities
            else "",
        ),
        ("Divergence by block", charts if report.divergences else ""),
        ("Activation ranges", range_chart(report.ranges, "value") if report.ranges else ""),
        ("Size", table(["of", "MB"], sizes) if report.sizes else ""),
        ("Settings", table(["setting", "value"], [[key, _plain(value)] for key, value in report.settings.items()])),
        ("Versions", table(["of", "is"], [[key, _plain(value)] for key, value in report.versions.items()])),
    ]


def _tiles(report: Report) -> str:
    joules = report.cost.total
    tiles = {
        "bits": report.label,
        "MB": f"{report.bytes / 1e6:.2f}",
        "of float32's size": f"{report.bytes / report.float_bytes:.3f}",
        "seconds": f"{report.cost.seconds:.1f}",
    }
    if joules is not None:
        tiles["joules"] = f"{joules:.0f}"
    text = "".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in tiles.items())
    note = f'<p class="soft">{html.escape(report.energy_note)}</p>' if report.energy_note else ""
    return f'<div class="tiles">{text}</div>{note}'


def _picture(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table, or "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
