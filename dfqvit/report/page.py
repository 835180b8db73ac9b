"""The page itself: HTML with inline CSS, pictures as data URIs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.energy import Cost
from ..storage.atomic import atomic
from .charts import Points, line_chart, range_chart
from .links import link
from .measure import Divergence
from .pictures import for_page

_CSS = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2128;--soft:#5b6470;--line:#d8dde3;--panel:#f5f7f9;
--c0:#0b66c3;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce}
@media(prefers-color-scheme:dark){:root{--back:#14181d;--text:#e4e8ec;--soft:#9aa5b1;--line:#333b44;--panel:#1c2228;
--c0:#6cb2f7;--c1:#fb923c;--c2:#4ade80;--c3:#c99bff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:2rem 1rem 4rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
a{color:var(--c0)}p{margin:.5rem 0}.soft,figcaption{color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.25rem 0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;min-width:8rem}
.tiles b{display:block;font-size:1.3rem}
.verdict{background:var(--panel);border-left:.4rem solid var(--c2);border-radius:6px;padding:.6rem 1rem;margin:1.25rem 0}
.verdict.bad{border-color:var(--c1)}.verdict b{font-size:1.15rem}.verdict ul{margin:.4rem 0;padding-left:1.2rem}
.wide{overflow-x:auto;background:
linear-gradient(90deg,var(--back) 50%,transparent) 0 0/2.5rem 100% no-repeat local,
linear-gradient(270deg,var(--back) 50%,transparent) 100% 0/2.5rem 100% no-repeat local,
linear-gradient(90deg,var(--soft),transparent) 0 0/.7rem 100% no-repeat scroll,
linear-gradient(270deg,var(--soft),transparent) 100% 0/.7rem 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th{font-weight:600}th,td{padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
figure{margin:1rem 0}img{max-width:100%;height:auto;image-rendering:pixelated;border-radius:6px;background:var(--panel)}
svg{display:block;width:100%;max-width:46rem;height:auto;background:var(--panel);border-radius:6px;margin:.5rem 0}
svg text{fill:var(--soft);font-size:15px}svg .small{font-size:12px}.grid{stroke:var(--line)}
@media(min-width:40rem){svg text{font-size:10px}svg .small{font-size:9.5px}}
.line{fill:none;stroke-width:2}.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.line{stroke:var(--c)}.line.c1{stroke-dasharray:6 4}.line.c2{stroke-dasharray:2 3}
.line.c3{stroke-dasharray:9 3 2 3}.dot{fill:var(--c)}.bar{fill:var(--c0)}
.legend span{margin-right:1.2rem;white-space:nowrap}.key{display:inline-block;width:1.8em;margin-right:.4em;
vertical-align:middle;border-top:3px solid var(--c)}.key.c1{border-top-style:dashed}.key.c2{border-top-style:dotted}
.key.c3{border-top-style:double}
"""


@dataclass(frozen=True)
class Dense:
    """What a page shows of detectors and segmenters."""

    serves: bool  # whether they keep their figures without data
    verdict: str
    conclusions: Sequence[str]
    figures: tuple[Sequence[str], Sequence[Sequence[Any]]]  # headers, rows
    pictures: Mapping[str, Path]  # caption: PNG file


@dataclass
class Report:
    """What a page shows; sections without values are left out."""

    title: str
    label: str  # as "W4/A8"
    bytes: int
    float_bytes: int
    cost: Cost
    findings: Sequence[tuple[str, str]] | None = None  # what was found wrong and what to do; None where nobody looked
    energy_note: str = ""
    pictures: Mapping[str, Path] = field(default_factory=dict)  # caption: PNG file
    densities: Mapping[str, Points] = field(default_factory=dict)
    ranges: Sequence[tuple[str, float, float]] = ()
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    accuracy: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None  # headers, rows
    dense: Dense | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)


def write_report(report: Report, path: Path) -> Path:
    """Writes the page, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The whole page as HTML."""
    sections = "".join(
        f"<section><h2>{title}</h2>{_said(title)}{body}</section>" for title, body in _sections(report) if body
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(report.title)} · dfqvit</title><style>{_CSS}</style></head>'
        f"<body><main><h1>{html.escape(report.title)}</h1>"
        f"<p>{html.escape(_meaning(report.label))} Quantized by dfqvit. {link('report.md', 'How to read this page')}.</p>"
        f"{_verdict(report)}{_tiles(report)}{sections}</main></body></html>\n"
    )


def _meaning(label: str) -> str:
    """W4/A8 in words."""
    found = re.fullmatch(r"W([\d-]+)/A(\d+)", label)
    if found is None:
        return label
    return f"{label}: weights are stored in {found[1]} bits, values between layers are rounded to {found[2]} bits."


def _verdict(report: Report) -> str:
    """First of all: whether something is known to be wrong."""
    if report.dense is not None:
        items = "".join(f"<li>{html.escape(each)}</li>" for each in report.dense.conclusions)
        kind = "verdict" if report.dense.serves else "verdict bad"
        return f'<div class="{kind}"><b>{html.escape(report.dense.verdict)}</b><ul>{items}</ul></div>'
    if report.findings is None:
        return ""
    last = [found.relative[-1] for found in report.divergences.values() if found.relative]
    drift = (
        f" On these images the last block's values differ from the float model's by {100 * last[-1]:.2g} % of their energy."
        if last
        else ""
    )
    if not report.findings:
        checked = "The images, the settings and every block were checked for the known failures."
        return f'<div class="verdict"><b>Nothing wrong was found.</b> {checked}{drift}</div>'
    items = "".join(f"<li>{html.escape(what)}: {html.escape(advice)}.</li>" for what, advice in report.findings)
    count = len(report.findings)
    said = f"<b>{count} thing{'s' if count > 1 else ''} to look at.</b>"
    return f'<div class="verdict bad">{said}{drift}<ul>{items}</ul>{link("low-accuracy.md", "When accuracy is low")}.</div>'


_SAID = {
    "Accuracy": "How often the first answer is right, on labelled images that took no part in the quantization.",
    "Detection and segmentation": (
        "mAP@50: how well boxes are found and named, where a box counts as found if it shares half its area with the true one. "
        "mIoU: how far the pixels given to a class agree with the true ones, a mean over the classes. Measured on scenes that "
        "took no part in the quantization; noise and real images are other calibrations of the same model."
    ),
    "Boxes and masks": "What the models see in the first of these scenes.",
    "Images": "What the model was calibrated on: the ranges of all values in it were read off while it saw these images.",
    "Similarity of patches": (
        "How alike two patches of an image look to the model's attention: 1 is the same direction, 0 is unrelated. Where real "
        "images are drawn too, the curve of the synthetic ones should be nearer to theirs than that of noise is."
    ),
    "Divergence by block": (
        "How far the quantized model's values are from the float model's after each block, on the images above. Slow growth is "
        "normal; a jump shows the block that loses most. KL compares how the values are distributed, in nats."
    ),
    "Activation ranges": (
        "From which least to which greatest value each layer's input can be represented. A bar far longer than its neighbours has "
        "coarse steps: its layer is the first to look at."
    ),
    "Size": "What takes the bytes of the file. All of it travels with the model; nothing else is needed to run it.",
    "Settings": "Everything that is needed to make this model again.",
}


_PAGES = {  # that say more
    "Accuracy": ("accuracy.md", "What to expect"),
    "Detection and segmentation": ("dense.md", "All figures, and what they say"),
    "Boxes and masks": ("dense.md", "The models"),
    "Images": ("method.md", "How they are made"),
    "Similarity of patches": ("kernels/patch_similarity_entropy.md", "What is measured"),
    "Divergence by block": ("low-accuracy.md", "What to do about a jump"),
    "Activation ranges": ("low-accuracy.md", "What to do about a long bar"),
    "Size": ("inference.md", "What it takes to run"),
    "Settings": ("quick-start.md", "The commands"),
}


def _said(title: str) -> str:
    """What is said below a heading."""
    if title not in _SAID:
        return ""
    return f"<p>{_SAID[title]} {link(*_PAGES[title])}.</p>"


def _sections(report: Report) -> list[tuple[str, str]]:
    blocks = {
        "relative error": {name: list(enumerate(found.relative)) for name, found in report.divergences.items()},
        "KL, nats": {name: list(enumerate(found.kl)) for name, found in report.divergences.items()},
    }
    charts = "".join(line_chart(series, "block", title, logarithmic=True) for title, series in blocks.items())
    sizes = [[kind, f"{size / 1e6:.3f}"] for kind, size in report.sizes.items()]
    sizes += [["the file", f"{report.bytes / 1e6:.3f}"], ["float32 weights", f"{report.float_bytes / 1e6:.3f}"]]
    dense = report.dense
    drawn = dense.pictures.items() if dense else ()
    return [
        ("Accuracy", table(*report.accuracy) if report.accuracy else ""),
        ("Detection and segmentation", table(*dense.figures) if dense else ""),
        ("Boxes and masks", "".join(_picture(caption, path) for caption, path in drawn)),
        ("Images", "".join(_picture(caption, path) for caption, path in report.pictures.items())),
        (
            "Similarity of patches",
            line_chart(report.densities, "cosine similarity of two patches", "density", logarithmic=True)
            if report.densities
            else "",
        ),
        ("Divergence by block", charts if report.divergences else ""),
        ("Activation ranges", range_chart(report.ranges, "value") if report.ranges else ""),
        ("Size", table(["part", "MB"], sizes) if report.sizes else ""),
        ("Settings", table(["setting", "value"], [[key, _plain(value)] for key, value in report.settings.items()])),
        ("Versions", table(["package", "version"], [[key, _plain(value)] for key, value in report.versions.items()])),
    ]


def _tiles(report: Report) -> str:
    joules = report.cost.total
    tiles = {
        "bits": report.label,
        "MB": f"{report.bytes / 1e6:.2f}",
        "of float32's size": f"{report.bytes / report.float_bytes:.3f}",
        "seconds of work": f"{report.cost.seconds:.1f}",
    }
    if joules is not None:
        tiles["joules"] = f"{joules:.0f}"
    text = "".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in tiles.items())
    note = f'<p class="soft">{html.escape(report.energy_note)}</p>' if report.energy_note else ""
    return f'<div class="tiles">{text}</div>{note}'


def _picture(caption: str, path: Path) -> str:
    kind, content = for_page(path)
    data, text = base64.b64encode(content).decode(), html.escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:{kind};base64,{data}"><figcaption>{text}</figcaption></figure>'


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table, or "" without rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in headers)
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(row[0]))}</th>'
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    label = html.escape(f"table: {', '.join(map(str, headers))}", quote=True)
    frame = f'<div class="wide" role="region" tabindex="0" aria-label="{label}">'
    return f"{frame}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
