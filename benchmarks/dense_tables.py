"""Writes the tables of docs/dense.md from the rows of benchmarks/dense.py.

Everything between `<!-- rows: MODEL -->` and `<!-- end -->` is replaced; the rest of the page is written by hand.

python benchmarks/dense_tables.py benchmarks/results/MACHINE/dense.jsonl [--check]     --check writes nothing, and fails if the
                                                                                     page is not up to date
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from accuracy_tables import keep_page

PAGE = Path(__file__).parents[1] / "docs" / "dense.md"
NAMES = {
    "synthetic": "synthetic, no class term",
    "objective": "synthetic, with an objective",
    "procedural": "procedural",
    "noise": "noise",
    "real": "real scenes",
}
RECIPES = {"default": "default", "paper": "paper's"}
FIGURES = {"demo-detector": "mAP@50", "demo-segmenter": "mIoU"}


def main() -> int:
    return keep_page(__doc__, PAGE, table)


def table(rows: list[dict[str, Any]], model: str) -> str:
    """One model's: a line for each calibration, quantizer and correction, a column for each width."""
    figure, rows = FIGURES[model], [row for row in rows if row["model"] == model]
    if not rows:
        return "No rows yet.\n"
    widths = sorted({row["w_bits"] for row in rows}, reverse=True)
    base = rows[0][f"float {figure}"]
    lines = [
        f"{figure} in percent, float {base:.1f}, {rows[0]['scenes']} scenes (difference; greatest less least of seeds):",
        "",
    ]
    lines += ["| calibration | quantizer | ACM | " + " | ".join(f"W{bits}/A8" for bits in widths) + " |"]
    lines += ["| --- | --- | --- |" + " --- |" * len(widths)]
    for recipe, called in RECIPES.items():
        for source, name in NAMES.items():
            for acm in ("none", "sequential"):
                kind = [r for r in rows if (r["recipe"], r["calibration"], r["acm"]) == (recipe, source, acm)]
                if kind:
                    cells = [cell([r[figure] for r in kind if r["w_bits"] == bits], base) for bits in widths]
                    lines.append(
                        f"| {name} | {called} | {'every block' if acm != 'none' else 'none'} | {' | '.join(cells)} |"
                    )
    return "\n".join(lines) + "\n"


def cell(values: list[float], base: float) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    spread = f"; {max(values) - min(values):.1f} of {len(values)}" if len(values) > 1 else ""
    return f"{mean:.1f} ({mean - base:+.1f}{spread})"


if __name__ == "__main__":
    raise SystemExit(main())
