"""Writes the tables of docs/accuracy.md from the rows of benchmarks/accuracy.py.

Everything between `<!-- rows: MODEL -->` and `<!-- end -->` is replaced; the rest of the page is written by hand.

python benchmarks/accuracy_tables.py benchmarks/results/MACHINE/accuracy.jsonl [--check]     --check writes nothing, and fails
                                                                                            if the page is not up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
ORDER = ("ceiling", "real", "synthetic", "procedural", "noise")
NAMES = {
    "ceiling": "500 real images, of the other set",
    "real": "32 real images",
    "synthetic": "**16 synthetic and 48 procedural** (the default)",
    "procedural": "32 procedural (`--fast`)",
    "noise": "32 of noise",
}
SUFFIXES = {
    "default": "",
    "uniform": ", `--levels uniform`",
    "unscaled": ", `--scaling none`",
    "paper": ", the paper's quantizer",
    "reconstructed": ", `--reconstruct 100`",
    "alone": ", `--companions 0`",
}


def main() -> int:
    return keep_page(__doc__, PAGE, tables)


def keep_page(doc: str | None, place: Path, tables_of: Callable[[list[dict[str, Any]], str], str]) -> int:
    """Fills the page with what `tables_of` makes of the rows for each model, or checks it; the exit status of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--page", type=Path, default=place)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    before = options.page.read_text()
    pattern = re.compile(r"(<!-- rows: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    after = pattern.sub(lambda found: f"{found[1]}\n{tables_of(rows, found[2])}\n{found[3]}", before)
    if not options.check:
        options.page.write_text(after)
    elif after != before:
        print(f"{options.page} is not what the rows say; run this script without --check", file=sys.stderr)
        return 1
    return 0


def tables(rows: list[dict[str, Any]], model: str) -> str:
    """One table for every image set of a model: a line for each calibration, a column for each pair of widths."""
    rows = [row for row in rows if row["model"] == model]
    rows = [row for row in rows if "agreement" in row]  # those of before have neither intervals nor divergences
    texts = []
    for place in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == place]
        widths = sorted({(row["w_bits"], row["a_bits"]) for row in here}, key=lambda pair: (-pair[1], -pair[0]))
        heads = [f"W{w}/A{a}" for w, a in widths]
        lines = [
            f"{place}, float {here[0]['float_top1']:.1f}, {here[0]['images']} images:",
            "",
            f"| calibration | {' | '.join(heads)} |",
            f"| --- |{' --- |' * len(heads)}",
        ]
        kinds = sorted(
            {(row["recipe"], row["calibration"]) for row in here},
            key=lambda kind: (list(SUFFIXES).index(kind[0]), ORDER.index(kind[1])),
        )
        for recipe, source in kinds:
            mine = [row for row in here if (row["recipe"], row["calibration"]) == (recipe, source)]
            cells = [cell([row for row in mine if (row["w_bits"], row["a_bits"]) == pair]) for pair in widths]
            lines.append(f"| {NAMES[source]}{SUFFIXES[recipe]} | {' | '.join(cells)} |")
        texts.append("\n".join(lines) + "\n")
    return "\n".join(texts)


def cell(rows: list[dict[str, Any]]) -> str:
    """The mean over seeds of top-1, its difference from float with the interval, and of KL; how many seeds if several."""
    if not rows:
        return ""

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    change = mean("top1") - mean("float_top1")
    seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
    return f"{mean('top1'):.1f} ({change:+.1f}; {mean('low'):+.1f} to {mean('high'):+.1f}), KL {mean('kl'):.3f}{seeds}"


if __name__ == "__main__":
    raise SystemExit(main())
