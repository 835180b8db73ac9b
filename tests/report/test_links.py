"""Links from the report into the documentation: to pages that exist, and only to where somebody said that it is."""

from __future__ import annotations

import importlib.metadata
import re
from email.message import Message
from pathlib import Path

import pytest

from dfqvit.evaluation.energy import Cost
from dfqvit.report.links import address, link
from dfqvit.report.page import _PAGES, _SAID, Report, render

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def published(monkeypatch):
    """Sets the project URLs of the installed package."""
    monkeypatch.delenv("DFQVIT_DOCS", raising=False)

    def call(*entries):
        message = Message()
        for entry in entries:
            message["Project-URL"] = entry
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: message)

    return call


def page(**more):
    report = Report("a model", "W4/A8", 10, 100, Cost(1.0, {}), sizes={"packed weights": 10}, **more)
    return render(report)


def test_the_address_is_the_variables_or_the_packages(published, monkeypatch):
    published("Source, https://code.example/x", "Documentation, https://docs.example/x/")
    assert address() == "https://docs.example/x"
    monkeypatch.setenv("DFQVIT_DOCS", "https://mirror.example/docs")
    assert address() == "https://mirror.example/docs"
    monkeypatch.setenv("DFQVIT_DOCS", "javascript:alert(1)")
    assert address() == ""


def test_without_an_address_the_page_is_named(published):
    published()
    assert link("accuracy.md", "What to expect") == "What to expect (docs/accuracy.md)"
    text = page(findings=[("two images", "take more")])
    assert "How to read this page (docs/report.md)" in text
    assert "<a " not in text


def test_links_lead_to_pages_that_there_are(published, monkeypatch):
    published()
    monkeypatch.setenv("DFQVIT_DOCS", "https://docs.example/x")
    text = page(findings=[("two images", "take more")], settings={"seed": 1})
    found = re.findall(r'<a href="https://docs.example/x/([^"]+)">([^<]+)</a>', text)
    assert [name for name, _ in found] == ["report.md", "low-accuracy.md", "inference.md", "quick-start.md"]
    for name in {name for name, _ in _PAGES.values()} | {"report.md", "low-accuracy.md"}:
        assert (DOCS / name).is_file()
    assert set(_PAGES) == set(_SAID)


def test_an_address_cannot_break_the_page(published, monkeypatch):
    published()
    monkeypatch.setenv("DFQVIT_DOCS", 'https://x/"><script>')
    assert "<script>" not in page()
