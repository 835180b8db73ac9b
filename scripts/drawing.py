"""What the scripts that draw docs/images have in common: the frame of a picture, and `--check`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path


def framed(width: int, height: int, title: str, said: str, colour: str, parts: Sequence[str]) -> str:
    """A picture as SVG text: `title` above it in `colour`, `said` for who does not see it, and its parts."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'role="img" font-family="system-ui, sans-serif" font-size="14">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(said)}</desc>",
            f'<text x="0" y="16" font-size="16" font-weight="600" fill="{colour}">{escape(title)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def write_or_check(doc: str | None, drawn: Mapping[Path, str], source: str) -> int:
    """The `main` of a script: writes each picture, or with --check fails where a file is not what `source` say now."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, 0
    for path, text in drawn.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what {source} say; run scripts/{Path(sys.argv[0]).name}", file=sys.stderr)
            stale = 1
    return stale
