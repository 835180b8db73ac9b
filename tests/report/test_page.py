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
from dfqvit.evaluation.energy import Cost
from dfqvit.models import load_model
from dfqvit.report import Divergence, Report, activation_ranges, divergence, similarity_density
from dfqvit.report.charts import line_chart, range_chart, ticks
from dfqvit.report.page import render
from dfqvit.report.pictures import for_page

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
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    for tag, attributes in page.found:
        assert tag not in ("script", "iframe", "object")
        for key in ("src", "href", "data", "srcset"):
            assert attributes.get(key, "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import", text)
    assert "with ACM" in text
    assert '<th scope="row">seed</th><td>7</td>' in text
    torch_version = torch.__version__.split("+")[0]
    assert f'<th scope="row">torch</th><td>{torch_version}' in text
    assert all("scope" in attributes for tag, attributes in page.found if tag == "th")
    regions = [attributes["aria-label"] for _, attributes in page.found if attributes.get("role") == "region"]
    assert len(set(regions)) == len(regions) >= 3
    assert len(text) < 1_000_000


def test_the_verdict_comes_first(folder, tmp_path):
    """Two images of three steps are too few of both; sixteen images that nobody faults are not."""
    text = (folder / "report.html").read_text()
    assert text.index('class="verdict bad"') < text.index('class="tiles"')
    assert "things to look at.</b>" in text
    assert "<li>2 calibration images beside 6 procedural ones: quantize again with --samples 16 or more.</li>" in text
    assert "<li>the synthesis took 3 steps: quantize again with --iters 250" in text
    arguments = [
        "quantize",
        "demo",
        "--calib",
        "procedural",
        "--samples",
        "16",
        "--w-bits",
        "8",
        "--rounding",
        "nearest",
    ]
    assert cli.run([*arguments, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "<b>Nothing wrong was found.</b>" in text
    shown = re.search(r"values differ from the float model's by ([\d.e-]+) % of their energy", text)[1]
    qmodel = dfqvit.load(tmp_path / "model.safetensors")
    assert float(shown) == pytest.approx(100 * qmodel.dfqvit_record.measured["divergence"][-1], rel=0.1)


def test_captions_say_what_the_rows_are(folder):
    text = (folder / "report.html").read_text()
    assert "Rows from the top: noise, then after steps 1, 2, 3." in text
    assert "finished: the shapes are those that the synthesis found" in text


def test_large_pictures_are_put_into_a_page_as_small_jpegs(tmp_path):
    """As those of DeiT-T: 8 images of 224 pixels beside each other, noise, which compresses worst."""
    path = tmp_path / "large.png"
    Image.effect_noise((1828, 1372), 60).convert("RGB").save(path)
    assert path.stat().st_size > 1_500_000
    kind, data = for_page(path)
    assert kind == "image/jpeg"
    assert len(data) < 300_000
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (960, 721)
    Image.new("L", (40, 30)).save(path)
    assert for_page(path) == ("image/png", path.read_bytes())


def test_colours_and_dashes_are_of_the_name_not_of_the_place():
    for names in (["noise", "synthetic"], ["synthetic", "real", "noise"], ["mine", "noise"]):
        text = line_chart({name: [(0, 1), (1, 2)] for name in names}, "x", "y")
        lines = re.findall(r'class="line c(\d)"', text)
        keys = re.findall(r'class="key c(\d)"></i>(\w+)', text)
        assert [number for number, _ in keys] == lines
        assert len(set(lines)) == len(lines)
        assert all(number == {"synthetic": "0", "noise": "1", "real": "2"}.get(name, number) for number, name in keys)


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
            timeout=900,
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_axe_finds_nothing(browser, folder, tmp_path, width, scheme):
    """The accessibility checker, in a frame of the width: a browser without a screen has none narrower than 500 pixels."""
    package = importlib.util.find_spec("axe_core_python")
    if package is None:
        pytest.skip("axe is not here: pip install axe-core-python")
    axe = (Path(package.submodule_search_locations[0]) / "axe.min.js").read_text().replace("</script", "<\\/script")
    found = """axe.run().then(found => parent.postMessage({
        width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches,
        sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth, passes: found.passes.length,
        faults: found.violations.map(fault => [fault.id, fault.impact, fault.nodes[0].html])}, "*"))"""
    text = (folder / "report.html").read_text()
    (tmp_path / "inside.html").write_text(
        text.replace("</body>", f"<script>{axe}; onload = () => {found}</script></body>")
    )
    outside = tmp_path / "outside.html"
    tell = "onmessage = event => { document.body.dataset.found = JSON.stringify(event.data) }"
    outside.write_text(
        f'<body><script>{tell}</script><iframe src="inside.html" width="{width}" height="900" frameborder="0">'
    )
    options = (f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--window-size=1400,1000")
    log = browser(outside, tmp_path / "profile", *options, "--dump-dom", "--virtual-time-budget=20000")
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', log.stdout)[1]))
    assert found["faults"] == []
    assert found["passes"] > 20
    assert found["sideways"] <= 0
    assert (found["width"], found["dark"]) == (width, scheme == "dark")


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
    assert (first, last) == ("60.0,198.0", "468.0,10.0")
    assert "&lt;a&gt;" in text
    assert "No values" in line_chart({"a": [(0, 0)]}, "x", "y", logarithmic=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_what_is_no_number_is_left_out_and_counted(value, logarithmic):
    """Found here: a traceback, after all the work of a quantization."""
    text = line_chart({"a": [(0, 1.0), (1, value), (2, 3.0)]}, "x", "y", logarithmic=logarithmic)
    assert text == line_chart({"a": [(0, 1.0), (2, 3.0)]}, "x", "y", logarithmic=logarithmic) + missing("1 points")
    assert line_chart({"a": [(0, value)]}, "x", "y") == f"<p>No values to draw.</p>{missing('1 points')}"
    text = range_chart([("a", -1.0, value), ("b", -1.0, 2.0)], "x")
    assert text == range_chart([("b", -1.0, 2.0)], "x") + missing("1 ranges")
    assert range_chart([("a", value, value)], "x") == f"<p>No values to draw.</p>{missing('1 ranges')}"


def missing(what):
    return f'<p class="soft">{what} are not numbers that can be drawn (NaN or Inf).</p>'


def test_names_cannot_break_the_page():
    name = "<script>\"&'"
    report = Report(name, name, 1, 1, Cost(1.0, {}), [(name, name)], name, ranges=[(name, 0.0, 1.0)], sizes={name: 1})
    report.densities, report.divergences = {name: [(0, 1.0)]}, {name: Divergence([0.1], [0.1])}
    report.accuracy, report.settings, report.versions = ([name], [[name]]), {name: [name]}, {name: {name: name}}
    text = render(report)
    Page(text)
    assert "<script" not in text
    assert text.count(html.escape(name)) >= 10
