"""Links from the report into the documentation on the web, where it is known where that is."""

from __future__ import annotations

import html
import importlib.metadata
import os

VARIABLE = "DFQVIT_DOCS"  # an address to put in place of the package's own, as "https://example.org/docs"
LABEL = "documentation"  # of the address among the package's project URLs


def address() -> str:
    """Where the folder docs/ is to be read, without a slash at the end; "" where nobody said it.

    DFQVIT_DOCS says it, or else the project URL "Documentation" of the installed package.
    """
    given = os.environ.get(VARIABLE, "")
    if not given:
        try:
            entries = importlib.metadata.metadata("dfqvit").get_all("Project-URL") or []
        except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
            entries = []
        found = dict(entry.split(", ", 1) for entry in entries)
        given = next((url for label, url in found.items() if label.lower() == LABEL), "")
    return given.rstrip("/") if given.startswith(("https://", "http://")) else ""


def link(page: str, text: str) -> str:
    """HTML that leads to a page of docs/, as "accuracy.md"; where there is no address, the text and the page's name."""
    base = address()
    if not base:
        return f"{html.escape(text)} (docs/{html.escape(page)})"
    return f'<a href="{html.escape(f"{base}/{page}", quote=True)}">{html.escape(text)}</a>'
