"""Draws the charts of README and docs from rows under benchmarks/results, as SVG text: the same rows give the same bytes.

    python scripts/charts.py [--check]      writes docs/images/{speed,accuracy}-{light,dark}.svg; --check writes nothing, and
                                            fails where a file is not what the rows say

Every chart shows one run, named below: numbers of different runs are not put side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from drawing import framed, write_or_check

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
ROWS = ROOT / "benchmarks" / "results" / "epyc-avx512-2-cores"

SPEED_RUN = "d653201"  # the commit of its rows
SPEED_MODEL = "deit_tiny"
CONTENDERS = {
    "eager-float32": "PyTorch float32",
    "compile-bf16": "torch.compile bfloat16",
    "openvino": "OpenVINO bfloat16",
    "openvino-int8": "OpenVINO int8 (NNCF)",
    "dfqvit-w8a8": "dfqvit W8/A8",
    "dfqvit-w4a8": "dfqvit W4/A8, even levels",
}
ACCURACY_MODELS = ("DeiT-T", "ViT-Ti")
ACCURACY_DATA = "imagenet500"
WIDTHS = ((8, 8), (6, 6), (4, 8), (3, 8), (4, 4))

THEMES = {  # text, text of less weight, grid, bars of others, our bars, whiskers
    "light": ("#1c2128", "#57606a", "#d8dde3", "#b1bac4", "#54a0f0", "#1c2128"),
    "dark": ("#e6edf3", "#9aa5b1", "#333b44", "#5b6570", "#1f6feb", "#e6edf3"),
}
WIDTH, LEFT, RIGHT, ROW = 560, 178, 52, 24


@dataclass(frozen=True)
class Bar:
    """One line of a panel: its name, value, and the ends of its whisker; `ours` is drawn in the strong colour."""

    name: str
    value: float
    low: float
    high: float
    ours: bool


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def speed(rows: Iterable[Mapping[str, Any]], batch: int) -> list[Bar]:
    """Images a second, with the range over the rounds; slowest first, ours last."""
    chosen = {
        row["contender"]: row
        for row in rows
        if (row["commit"], row["model"], row["batch"]) == (SPEED_RUN, SPEED_MODEL, batch) and "skipped" not in row
    }
    return [
        Bar(name, row["images_per_s"], row["lowest"], row["highest"], key.startswith("dfqvit"))
        for key, name in CONTENDERS.items()
        for row in [chosen[key]]
    ]


def accuracy(rows: Iterable[Mapping[str, Any]], model: str) -> list[Bar]:
    """Top-1 by the default recipe from synthetic images, seed 0; the whisker is the 95 % interval of the difference from float."""
    kind = (model, ACCURACY_DATA, "default", "synthetic", 0)
    names = ("model", "data", "recipe", "calibration", "seed")
    found = {
        (row["w_bits"], row["a_bits"]): row
        for row in rows
        if "agreement" in row and tuple(row[name] for name in names) == kind
    }
    base = found[WIDTHS[0]]["float_top1"]
    bars = [Bar("float32", base, base, base, False)]
    for w_bits, a_bits in WIDTHS:
        row = found[w_bits, a_bits]
        bars.append(Bar(f"W{w_bits}/A{a_bits}", row["top1"], base + row["low"], base + row["high"], True))
    return bars


def chart(title: str, foot: str, panels: Mapping[str, Sequence[Bar]], form: str, top: float, theme: str) -> str:
    """Horizontal bars, panel under panel, on one axis from 0 to `top`.

    Args:
        title: what is shown, also for who cannot see it.
        foot: where it comes from.
        panels: {heading: bars}.
        form: of the numbers, as ".0f".
        top: the end of the axis, not less than any whisker.
        theme: "light" or "dark".
    """
    text, soft, grid, others, ours, whisker = THEMES[theme]
    scale = (WIDTH - LEFT - RIGHT) / top
    parts, y = [], 34
    for heading, bars in panels.items():
        parts.append(f'<text x="0" y="{y + 14}" font-weight="600" fill="{text}">{escape(heading)}</text>')
        y += 24
        for step in range(5):
            x = LEFT + scale * top * step / 4
            parts.append(f'<path d="M{x:.1f} {y}V{y + ROW * len(bars)}" stroke="{grid}"/>')
        for bar in bars:
            middle, end = y + ROW / 2, LEFT + scale * bar.value
            low, high = LEFT + scale * bar.low, LEFT + scale * bar.high
            weight = ' font-weight="600"' if bar.ours else ""
            parts.append(
                f'<text x="{LEFT - 8}" y="{middle + 5:.1f}" text-anchor="end" fill="{text}"{weight}>{escape(bar.name)}</text>'
            )
            fill = ours if bar.ours else others
            parts.append(f'<rect x="{LEFT}" y="{y + 4}" width="{end - LEFT:.1f}" height="{ROW - 8}" fill="{fill}"/>')
            if high > low:
                parts.append(
                    f'<path d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8" '
                    f'stroke="{whisker}" fill="none"/>'
                )
            place = max(end, high) + 6
            parts.append(f'<text x="{place:.1f}" y="{middle + 5:.1f}" fill="{text}">{bar.value:{form}}</text>')
            y += ROW
        y += 12
    height = y + 18
    said = "; ".join(
        f"{head}: " + ", ".join(f"{b.name} {b.value:{form}}" for b in bars) for head, bars in panels.items()
    )
    foot = f'<text x="0" y="{height - 8}" font-size="12" fill="{soft}">{escape(foot)}</text>'
    return framed(WIDTH, height, title, said, text, [*parts, foot])


def charts() -> dict[str, str]:
    """{file name: SVG text}."""
    inference, accuracies = read(ROWS / "inference.jsonl"), read(ROWS / "accuracy.jsonl")
    fast = {f"batch {batch}": speed(inference, batch) for batch in (1, 32)}
    right = {model: accuracy(accuracies, model) for model in ACCURACY_MODELS}
    made = {}
    for theme in THEMES:
        made[f"speed-{theme}.svg"] = chart(
            "DeiT-T on two CPU cores, images a second",
            "AMD EPYC (Zen 4, no AMX); one run, all in turn; whiskers: slowest and fastest of 9 rounds.",
            fast,
            ".0f",
            600,
            theme,
        )
        made[f"accuracy-{theme}.svg"] = chart(
            "ImageNet top-1 without data or fine-tuning, %",
            "500 images, one seed; whiskers: 95 % interval of the difference from float32.",
            right,
            ".1f",
            100,
            theme,
        )
    return made


def main() -> int:
    return write_or_check(__doc__, {IMAGES / name: text for name, text in charts().items()}, "the rows")


if __name__ == "__main__":
    raise SystemExit(main())
