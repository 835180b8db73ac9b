"""Writes the tables of docs/dense.md from the rows of benchmarks/dense.py.

Everything between `<!-- rows: MODEL -->` and `<!-- end -->` is replaced; the rest of the page is written by hand.

python benchmarks/dense_tables.py benchmarks/results/MACHINE/dense.jsonl [--check]     --check writes nothing, and fails if the
                                                                                     page is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    before = options.page.read_text()
    after = before
    for model in FIGURES:
        pattern = rf"(<!-- rows: {model} -->\n).*?(<!-- end -->)"
        text = table([row for row in rows if row["model"] == model], FIGURES[model])
        after = re.sub(pattern, lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", after, flags=re.DOTALL)
    if not options.check:
        options.page.write_text(after)
    elif after != before:
        print(f"{options.page} is not what the rows say; run this script without --check", file=sys.stderr)
        return 1
    return 0


def table(rows: list[dict[str, Any]], figure: str) -> str:
    """One model's: a line for each calibration, quantizer and correction, a column for each width."""
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
    sys.exit(main())
