"""`dfqvit ablate`: what is measured is what a plain call gives, each run once, and bad input by one line."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

import dfqvit
from dfqvit import demo
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.data import open_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.studies.ablation import Bench, Gallery, Row, Table, read_rows, score, weights_digest
from dfqvit.studies.charts import chart
from dfqvit.studies.named import STUDIES, settings_of
from dfqvit.studies.tables import markdown
from dfqvit.synthesis import SynthesisConfig, synthesize

from ..conftest import said

QUICK = ["--images", 60, "--samples", 2, "--iters", 2, "--bits", 3]


def row(**values):
    filler = {
        "model": "m",
        "weights": "0",
        "data": "d",
        "images": 1,
        "study": "s",
        "recipe": "paper",
        "setting": "a",
        "x": None,
    }
    filler |= {
        "seed": 0,
        "w_bits": 4,
        "a_bits": 8,
        "samples": 2,
        "iters": 3,
        "float_top1": 90.0,
        "top1": 1.0,
        "top5": 2.0,
    }
    return Row(**(filler | {"agreement": 3.0, "kl": 0.5, "seconds": 1.0, "synthesis_seconds": 0.0} | values))


def test_a_row_is_what_plain_calls_give(run, tmp_path):
    status, stdout, err = run("ablate", "demo", "--study", "schedule", *QUICK, "--seed", 3, "--out", tmp_path, "--json")
    assert status == 0, err
    assert json.loads(stdout)["measured"] == 3
    found = {row.setting: row for row in read_rows(tmp_path / "ablations.csv")}
    assert list(found) == ["e2h", "fixed", "hard-to-easy"]
    model = load_model("demo")
    test = open_images(demo.TEST_IMAGES, Preprocessing.of(model))
    chosen = [index * len(test) // 60 for index in range(60)]
    x, y = torch.stack([test[i][0] for i in chosen]), torch.tensor([test[i][1] for i in chosen])
    settings = {"samples": 2, "iters": 2, "seed": 3, "schedule": "fixed", "spectrum": "free"}
    qmodel = dfqvit.quantize(model, 3, placement="psaq", quantizer="minmax", acm="none", **settings)
    expected = evaluate(qmodel, [(x, y)], model)  # logits of this placement have ties, so argmax and topk may differ
    assert found["fixed"].top1 == pytest.approx(expected.top1, abs=1e-3)
    assert found["fixed"].top5 == pytest.approx(expected.top5, abs=1e-3)
    assert found["fixed"].agreement == pytest.approx(expected.agreement, abs=1e-3)
    assert found["fixed"].float_top1 == pytest.approx(expected.against_top1, abs=1e-3)


def test_runs_that_are_there_are_not_run_again(run, tmp_path):
    quick = ["--images", 60, "--iters", 2, "--bits", 3]
    arguments = ["ablate", "demo", "--study", "samples", "--values", "2,3", *quick, "--out", tmp_path, "--json"]
    assert run(*arguments)[0] == 0
    before = (tmp_path / "ablations.csv").read_bytes()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(made) == 2
    _, stdout, _ = run(*arguments)
    assert (json.loads(stdout)["measured"], json.loads(stdout)["all"]) == (0, 2)
    assert (tmp_path / "ablations.csv").read_bytes() == before
    _, stdout, _ = run(*arguments, "--bits", 4)  # another width, the same images
    assert json.loads(stdout)["measured"] == 2
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert "| 3 |" in (tmp_path / "ablations.md").read_text()
    picture = next(tmp_path.glob("*samples-paper.svg"))
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_kept_images_are_those_of_synthesize(tmp_path):
    model = load_model("demo-swin")
    gallery = Gallery(model, Preprocessing.of(model), tmp_path, "w")
    for spectrum in ("free", "natural"):
        found, _ = gallery.images(SynthesisConfig(samples=2, iters=2, seed=5, spectrum=spectrum))
        assert torch.equal(found, synthesize(model, 2, 2, 5, spectrum=spectrum))
    assert len(list(tmp_path.iterdir())) == 1
    next(tmp_path.iterdir()).write_bytes(b"x")
    with pytest.raises(DfqvitError, match="could not be read"):
        gallery.images(SynthesisConfig(samples=2, iters=2, seed=5))


def test_an_interrupted_run_serves_images_of_another_finish(tmp_path):
    """Found here: a study that went on by another recipe refused the snapshot of its first."""
    model = load_model("demo-swin")
    gallery = Gallery(model, Preprocessing.of(model), tmp_path, "w")

    def interrupt(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gallery.images(SynthesisConfig(samples=2, iters=4, seed=5, spectrum="free"), interrupt)
    steps = []
    found, _ = gallery.images(SynthesisConfig(samples=2, iters=4, seed=5), lambda progress: steps.append(progress.step))
    assert steps == [3, 4]
    assert torch.equal(found, synthesize(model, 2, 4, 5))


def test_digests_tell_weights_and_normalisation_apart():
    """Once they did not hold the latter: images made for one mean were given to another."""
    model = load_model("demo")
    preprocessing = Preprocessing.of(model)
    digests = {weights_digest(model, preprocessing), weights_digest(model, replace(preprocessing, mean=(0.1,)))}
    model.head.bias.data[0] += 1
    digests.add(weights_digest(model, preprocessing))
    assert len(digests) == 3
    assert weights_digest(model, Preprocessing.of(model)) in digests


@pytest.mark.parametrize("change", [{"act_layer": "quick_gelu"}, {"norm_layer": "layernormfp32"}, {"num_heads": 4}])
def test_digests_tell_structures_of_the_same_weights_apart(change):
    """Found here: a model of another activation was given the images and figures of the one before it."""
    models = [load_model("demo", model_kwargs=kwargs) for kwargs in ({}, change, {})]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    one, other, again = (weights_digest(model, Preprocessing.of(model)) for model in models)
    assert one == again != other
    models[0](torch.zeros(2, 1, 28, 28))
    assert weights_digest(models[0], Preprocessing.of(models[0])) == one  # a call changes nothing


def test_score():
    wanted, logits = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    labels = torch.randint(7, (40,))
    top1, top5, agreement, kl = score(logits, wanted, labels)
    assert top1 == pytest.approx(100 * sum(int(z.argmax() == y) for z, y in zip(logits, labels, strict=True)) / 40)
    ranks = [(z > z[y]).sum() for z, y in zip(logits, labels, strict=True)]
    assert top5 == pytest.approx(100 * sum(int(rank < 5) for rank in ranks) / 40)
    assert agreement == pytest.approx(100 * float((logits.argmax(1) == wanted.argmax(1)).double().mean()))
    expected = torch.nn.functional.kl_div(logits.log_softmax(1), wanted.softmax(1), reduction="batchmean")
    assert kl == pytest.approx(float(expected))


def test_every_study_names_settings_that_quantize_takes():
    model, images = load_model("demo"), torch.randn(4, 1, 28, 28)
    for study in STUDIES:
        for recipe in ("paper", "default"):
            settings = settings_of(study, recipe)
            assert len({setting.name for setting in settings}) == len(settings)
            for setting in settings:
                SynthesisConfig(**setting.synthesis)
    for setting in settings_of("acm", "paper"):
        dfqvit.quantize(model, 3, calib=images, **setting.quantization)
    assert [setting.x for setting in settings_of("gamma", "paper", [2, 5])] == [2, 5]
    assert [setting.name for setting in settings_of("schedule", "paper", chosen=["fixed", "e2h"])] == ["e2h", "fixed"]
    assert [setting.synthesis["iters"] for setting in settings_of("steps", "default", [7])] == [7]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["vit_tiny_patch16_224"], 2, "--data was not given; it must be for a MODEL that is not embedded"),
        (["demo", "--study", "method", "--values", "2"], 2, "values were given for the study 'method'"),
        (["demo", "--study", "steps", "--values", "2.5"], 2, "values held 2.5; they must be whole numbers"),
        (["demo", "--study", "steps", "--values", "9.99999999"], 2, "values held 9.99999999; they must be whole"),
        (["demo", "--bits", "9"], 2, "--bits was '9'; it must be whole numbers from 2 to 8"),
    ],
)
def test_wrong_use(run, tmp_path, arguments, status, message):
    found, _, err = run("ablate", *arguments, "--out", tmp_path / "o")
    assert (found, message in said(err)[0]) == (status, True)
    assert not (tmp_path / "o").exists()


def test_a_table_of_another_kind_is_refused(run, tmp_path):
    (tmp_path / "ablations.csv").write_text("a,b\n1,2\n")
    status, _, err = run("ablate", "demo", *QUICK, "--out", tmp_path)
    assert status == 1
    assert "is no table of `dfqvit ablate`" in said(err)[0]
    with pytest.raises(UsageError, match="study was 'all'; it may be 'method'"):
        settings_of("all", "paper")
    with pytest.raises(UsageError, match="recipe was 'best'; it may be 'paper', 'default'"):
        settings_of("acm", "best")
    with pytest.raises(UsageError, match="setting was 'easy'; of the study 'schedule' it may be 'e2h', 'fixed'"):
        settings_of("schedule", "paper", chosen=["e2h", "easy"])


def test_rows_survive_the_file_and_the_table_shows_mean_and_spread(tmp_path):
    table = Table(tmp_path / "t.csv")
    for seed, top1 in ((0, 80.0), (1, 83.0)):
        table.add(row(seed=seed, top1=top1, setting="a, or b"))
    table.add(row(setting="c", x=2.5, w_bits=3))
    assert Table(tmp_path / "t.csv").rows == table.rows
    with (tmp_path / "t.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 4
    text = markdown(table.rows)
    assert "| a, or b | 81.5 (80.0 to 83.0) | 0.500 |" in text
    assert "seeds 0, 1" in text


def test_charts_are_well_formed_and_to_scale():
    numeric = chart("a < b", [("4", 4), ("16", 16), ("64", 64)], {"W4": [(70, 69, 71), None, (80, 80, 80)]})
    root = ET.fromstring(numeric)
    circles = [element for element in root if element.tag.endswith("circle")]
    low, high = (float(circle.get("cy")) for circle in circles)
    assert low > high  # greater is higher up
    evenly = ET.fromstring(chart("t", [("4", 4), ("16", 16), ("64", 64)], {"W4": [(1, 1, 1), (2, 2, 2), (3, 3, 3)]}))
    x = [float(element.get("cx")) for element in evenly if element.tag.endswith("circle")]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # a wide axis is logarithmic
    bars = ET.fromstring(chart("t", [("a", None), ("b", None)], {"W4": [(50, 40, 60), (0, 0, 0)], "W3": [None, None]}))
    heights = [float(element.get("height")) for element in bars if element.get("fill-opacity")]
    assert heights[0] > heights[1] > 0


def test_rows_of_other_images_under_the_same_name_are_refused(tmp_path):
    """Found here: with another folder of the same name, or another order of its classes, the old rows were shown as the new."""
    table = Table(tmp_path / "rows.csv")
    table.add(row(float_top1=200 / 3))
    table = Table(tmp_path / "rows.csv")
    table.expect_same("m", "0", "d", 1, 200 / 3)
    table.expect_same("m", "0", "other", 1, 50.0)
    table.expect_same("m", "1", "d", 1, 50.0)
    with pytest.raises(DfqvitError, match=r"has rows of other images under the name 'd': .* 66.67 % .* 50.00 % now"):
        table.expect_same("m", "0", "d", 1, 50.0)


def test_logits_that_are_no_numbers_are_not_scored(seed):
    model = torch.nn.Linear(3, 4)
    bench = Bench("d", [(torch.randn(2, 3), torch.zeros(2, dtype=torch.long))], torch.empty(0))
    assert bench.logits(model).shape == (2, 4)
    model.bias.data[1] = float("nan")
    with pytest.raises(DfqvitError, match="gave logits that hold NaN or Inf"):
        bench.logits(model)


def test_charts_leave_out_what_is_no_number():
    nan = float("nan")
    drawn = chart("t", [("a", 1.0), ("b", 2.0)], {"s": [(nan, nan, nan), (1.0, 0.5, 2.0)]})
    assert drawn == chart("t", [("a", 1.0), ("b", 2.0)], {"s": [None, (1.0, 0.5, 2.0)]})
