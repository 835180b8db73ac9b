"""The report: one whole page, nothing loaded, every picture drawn; and the numbers in its charts."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

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


def test_draws_in_a_browser(folder, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    shot = tmp_path / "page.png"
    log = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            *("--window-size=1000,2600", f"--screenshot={shot}", f"--user-data-dir={tmp_path / 'profile'}"),
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in log.stderr
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert len(colours) > 200  # greys of the pictures, hues of the charts
    assert any(blue > red + 100 for _, (red, _, blue) in colours)


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
