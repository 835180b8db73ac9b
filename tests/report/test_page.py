"""The report: one whole page, nothing loaded, every picture drawn; and the numbers in its charts."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

import dfqvit
from dfqvit import cli
from dfqvit.models import load_model
from dfqvit.report import activation_ranges, divergence, similarity_density
from dfqvit.report.charts import line_chart, ticks

VOID = {"meta", "link", "img", "br", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Collects tags, attributes and headings, and fails on a tag that is closed out of turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.headings, self.at = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        self.at = tag

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.at == "h2" and self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    arguments = ["quantize", "demo", "--samples", "2", "--iters", "3", "--acm", "sequential", "--seed", "7"]
    assert cli.run([*arguments, "--out", str(out)]) == 0
    return out


def test_page_is_whole_and_loads_nothing(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.headings == [
        "Images",
        "Similarity of patches",
        "Divergence by block",
        "Activation ranges",
        "Size",
        "Settings",
        "Versions",
    ]
    pictures = [attributes["src"] for tag, attributes in page.found if tag == "img"]
    assert len(pictures) == 2
    for picture in pictures:
        kind, _, data = picture.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    for tag, attributes in page.found:
        assert tag not in ("script", "iframe", "object")
        for key in ("src", "href", "data", "srcset"):
            assert attributes.get(key, "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import", text)
    assert "with ACM" in text
    assert "<td>seed</td><td>7</td>" in text
    assert f"<td>torch</td><td>{torch.__version__.split('+')[0]}" in text


@pytest.fixture(scope="module")
def browser():
    """Runs a headless Chromium: the machine's own, or the one that playwright brought."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None and importlib.util.find_spec("playwright") is not None:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            path = playwright.chromium.executable_path
        program = path if Path(path).exists() else None
    if program is None:
        pytest.skip("no Chromium on this machine: none on PATH, and none of playwright")

    def call(page, profile, *options):
        common = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
        return subprocess.run(
            [program, *common, f"--user-data-dir={profile}", *options, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return call


def test_draws_in_a_browser(browser, folder, tmp_path):
    shot = tmp_path / "page.png"
    size = ("--window-size=1000,2600", f"--screenshot={shot}")
    log = browser(folder / "report.html", tmp_path / "profile", *size)
    assert "CONSOLE" not in log.stderr
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 200  # greys of the pictures, hues of the charts
    assert any(blue > red + 100 for _, (red, _, blue) in colours)


def test_every_picture_and_chart_has_a_size_in_a_browser(browser, folder, tmp_path):
    """A copy of the page with a script that asks the browser; the page itself has none."""
    text = (folder / "report.html").read_text()
    script = """<script>onload = () => { document.body.dataset.found = JSON.stringify({
        pictures: [...document.images].map(i => i.complete ? i.naturalWidth : 0),
        charts: [...document.querySelectorAll("svg")].map(c => c.getBoundingClientRect().width),
        sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth}) }</script>"""
    copy = tmp_path / "asked.html"
    copy.write_text(text.replace("</body>", script + "</body>"))
    log = browser(copy, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=5000")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', log.stdout)[1]))
    assert len(found["pictures"]) == text.count("<img") > 0
    assert len(found["charts"]) == text.count("<svg") > 0
    assert min(found["pictures"] + found["charts"]) > 100
    assert found["sideways"] <= 0  # nothing sticks out of the window


def test_activation_ranges_and_divergence():
    model = load_model("demo")
    x = torch.randn(3, 1, 28, 28)
    qmodel = dfqvit.quantize(model, 3, calib=x, acm="sequential", acm_blocks=[1], rounding="nearest")
    site = qmodel.get_submodule("blocks.1.mlp.fc1").input
    ranges = {name: ends for name, *ends in activation_ranges(qmodel)}
    grid = (torch.arange(256) - site.zero_point) * site.scale
    assert ranges["blocks.1.mlp.fc1"] == pytest.approx([float(grid[0]), float(grid[-1])])

    before = qmodel(x)
    found = divergence(model, qmodel, x)
    assert torch.equal(qmodel(x), before)  # the correction is back in its place
    assert list(found) == ["without correction", "with ACM"]
    assert found["with ACM"].relative[0] == found["without correction"].relative[0]
    assert found["with ACM"].relative[1] < found["without correction"].relative[1]
    outputs = []
    for net in (model, dfqvit.quantize(model, 3, calib=x, acm="none", rounding="nearest")):
        handle = net.blocks[2].register_forward_hook(lambda *args: outputs.append(args[2].detach()))
        net(x)
        handle.remove()
    wanted = float((outputs[0] - outputs[1]).square().sum() / outputs[0].square().sum())
    assert found["without correction"].relative[2] == pytest.approx(wanted, rel=1e-4)
    assert min(found["with ACM"].kl) > 0
    same = divergence(model, model, x)["without correction"]
    assert max(same.relative + same.kl) == 0


def test_density_is_one_and_knows_equal_patches():
    model = load_model("demo-swin")
    points = similarity_density(model, torch.randn(2, 1, 28, 28))
    assert sum(density for _, density in points) * (points[1][0] - points[0][0]) == pytest.approx(1)
    flat = similarity_density(load_model("demo"), torch.zeros(1, 1, 28, 28))
    assert max(flat, key=lambda point: point[1])[0] > 0.9


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (5, 5, [5]),
        (0.0011, 0.0019, [0.0012, 0.0014, 0.0016, 0.0018]),
    ],
)
def test_ticks(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_chart_places_its_points():
    text = line_chart({"<a>": [(0, 1), (10, 100)]}, "x", "y", logarithmic=True)
    first, last = re.search(r'points="([\d.]+,[\d.]+) ([\d.]+,[\d.]+)"', text).groups()
    assert (first, last) == ("64.0,220.0", "708.0,10.0")
    assert "&lt;a&gt;" in text
    assert "No values" in line_chart({"a": [(0, 0)]}, "x", "y", logarithmic=True)
