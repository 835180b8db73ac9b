"""Writes the API reference as HTML, from the docstrings; `make docs`. Needs pdoc (`pip install 'dfqvit[docs]'`)."""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path

import pdoc

MODULES = ("dfqvit", "dfqvit.models", "dfqvit.synthesis", "dfqvit.patching", "dfqvit.errors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pages")
    out = parser.parse_args().out
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    for name in MODULES:
        importlib.import_module(name)  # first: what other packages warn of at import is not about these pages
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*MODULES, output_directory=out)
    print(out / "index.html")


if __name__ == "__main__":
    main()
