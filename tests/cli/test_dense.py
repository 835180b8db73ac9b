"""`dfqvit evaluate --task`, `dfqvit demo --dense`, and the embedded dense models as MODEL."""

from __future__ import annotations

import functools
import json

import pytest
import safetensors.torch
import torch

import dfqvit
from dfqvit import UsageError, cli
from dfqvit.cli.dense import conclude
from dfqvit.cli.options import open_network
from dfqvit.errors import DfqvitError
from dfqvit.evaluation import scenes
from dfqvit.evaluation.dense import evaluate_dense
from dfqvit.evaluation.dense_data import SceneImages, open_dense
from dfqvit.models import Preprocessing, dense, load_model

from .. import networks
from ..coco import write_coco

TASKS = {"demo-detector": "detection", "demo-segmenter": "segmentation"}


def output(capsys, *arguments):
    status = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 held-out scenes on disk."""
    root = tmp_path_factory.mktemp("scenes")
    write_coco(scenes.compose(120), root, dense.CLASSES)
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Enough of them to see that there are figures."""
    root = tmp_path_factory.mktemp("few")
    write_coco(scenes.compose(20), root, dense.CLASSES)
    return root


@pytest.mark.parametrize("name", TASKS)
def test_evaluate_a_file_beside_the_float_network(name, folder, few, tmp_path, capsys):
    network = load_model(name)
    qmodel = dfqvit.quantize(network, 8, calib="procedural", samples=8, rounding="nearest", progress=False)
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    arguments = ["evaluate", path, "--task", TASKS[name], "--data", folder, "--against", name]
    status, out, err = output(capsys, *arguments, "--json")
    assert status == 0, err
    found = json.loads(out)
    data = open_dense(folder, Preprocessing.of(network), TASKS[name])
    for model, figures in ((qmodel, found["figures"]), (network, found["against"])):
        assert figures == pytest.approx(evaluate_dense(model, data.batches(64), TASKS[name]).figures)
    first = next(iter(found["figures"]))
    assert abs(found["figures"][first] - found["against"][first]) < 3
    status, out, _ = output(capsys, *(few if argument is folder else argument for argument in arguments))
    assert status == 0
    assert f"{first} %" in out
    assert "float" in out


def test_the_shipped_weights_are_small_and_do_their_work():
    assert sum(path.stat().st_size for path in dense.WEIGHTS.values()) < 8e6
    for name, figure in (("demo-detector", "mAP@50"), ("demo-segmenter", "mIoU")):
        network = load_model(name)
        held = SceneImages(scenes.compose(100), Preprocessing.of(network), TASKS[name])
        found = evaluate_dense(network, held.batches(50), TASKS[name]).figures[figure]
        fresh = evaluate_dense(dense.BUILDERS[name](), held.batches(50), TASKS[name]).figures[figure]
        assert found > fresh + 20


def test_detections_are_in_the_image_and_do_not_overlap_with_twins(seed):
    network = load_model("demo-detector")
    images = Preprocessing.of(network).normalise(scenes.compose(20, seed % 1000).images)
    with torch.no_grad():
        found = network.detections(network(images))
    assert len(found) == 20
    for each in found:
        assert (each["scores"].diff() <= 0).all()
        assert ((each["boxes"] >= 0) & (each["boxes"] <= dense.SIDE)).all()
        for k in each["labels"].unique():
            boxes = each["boxes"][each["labels"] == k]
            low, high = (
                torch.maximum(boxes[:, None, :2], boxes[None, :, :2]),
                torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]),
            )
            shared, area = (high - low).clamp_min(0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
            iou = shared / (area[:, None] + area - shared).clamp_min(1e-6)
            assert (iou.triu(1) <= 0.6 + 1e-4).all()


def test_a_network_of_ones_own(folder, tmp_path, capsys, seed):
    network = networks.segmenter()
    settings = {"calib": "procedural", "samples": 4, "rounding": "nearest", "progress": False}
    qmodel = dfqvit.quantize(network, 8, build=networks.segmenter, **settings)
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    own = ["--task", "segmentation", "--data", folder, "--batch-size", "40"]
    status, _, err = output(capsys, "evaluate", path, *own)
    assert status == 2
    assert "if you trust that code to run" in err
    build = ["--build", "tests.networks:segmenter"]
    status, _, err = output(capsys, "evaluate", path, *own, *build)
    assert status == 2
    assert "a mask held class" in err
    status, _, err = output(capsys, "evaluate", path, *own, *build, "--against", "tests.networks:segmenter")
    assert status == 2
    assert "--checkpoint must hold its weights" in err
    wrong = ["--against", "tests.networks:pair", "--checkpoint", weights]
    status, _, err = output(capsys, "evaluate", path, *own, *build, *wrong)
    assert status == 1
    assert "does not fit what 'tests.networks:pair' makes" in err


@pytest.mark.parametrize("name", ["demo-segmenter", "tests.networks:segmenter"])
def test_weights_of_a_network_are_floats_of_that_network(tmp_path, seed, name):
    """They were copied as they are: codes of 8 bits for weights, NaN of a network of one's own."""
    model = load_model(name) if name.startswith("demo") else networks.segmenter()
    state, path, cpu = model.state_dict(), tmp_path / "w.safetensors", torch.device("cpu")
    key = next(key for key, value in state.items() if value.dim() == 2 and value.is_floating_point())
    safetensors.torch.save_file({**state, key: state[key].half()}, path)
    assert torch.equal(open_network(name, path, cpu).state_dict()[key], state[key].half().float())
    for change, kind, message in (
        ({key: (9 * state[key]).to(torch.int8)}, UsageError, f"holds torch.int8 under '{key}', which is float"),
        ({key: state[key].to(torch.float8_e4m3fn)}, UsageError, f"holds torch.float8_e4m3fn under '{key}'"),
        ({key: state[key] / 0}, DfqvitError, f"'{key}' holds NaN or Inf"),
        ({key: state[key][:1]}, DfqvitError, f"does not fit what '{name}' makes: Error"),
    ):
        safetensors.torch.save_file({**state, **change}, path)
        with pytest.raises(kind, match=message):
            open_network(name, path, cpu)
    path.write_bytes(b"no weights at all")
    with pytest.raises(DfqvitError, match=f"does not fit what '{name}' makes: Error"):
        open_network(name, path, cpu)


def test_demo_prints_every_source_and_writes_pictures(tmp_path, capsys, monkeypatch):
    """Of one width, rounded to nearest, which takes a sixth of the time."""
    monkeypatch.setattr("dfqvit.cli.dense.quantize", functools.partial(dfqvit.quantize, rounding="nearest"))
    monkeypatch.setattr("dfqvit.cli.dense._BITS", (4,))
    short = ["--images", "20", "--samples", "2", "--iters", "2"]
    status, out, err = output(capsys, "demo", "--dense", "--out", tmp_path, *short, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert len(found["figures"]) == 2
    for row in found["figures"].values():
        assert set(row) == {"float", "data-free", "noise", "real images", "MB"}
        assert 0 < row["MB"] < 4  # convolutions stay float
    page = (tmp_path / "report.html").read_text()
    assert (
        page.index('<div class="verdict')
        < page.index("<h2>Detection and segmentation</h2>")
        < page.index("<h2>Boxes and")
    )
    assert "first answer is right" not in page
    for name in TASKS:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert f"{name}. Rows from the top" in page
        assert dfqvit.load(tmp_path / f"{name}-w4a8.safetensors").dfqvit_record.calibration == "synthetic"


def test_the_verdict_is_what_the_figures_say():
    """A figure for each model and width: float, data-free, noise, real images, megabytes."""
    rows = [
        ["detector W8", 75.0, 75.2, 74.9, 75.1, 0.3],
        ["detector W4", 75.0, 73.6, 70.0, 74.8, 0.2],
        ["detector W3", 75.0, 72.0, 70.1, 73.0, 0.1],
        ["segmenter W8", 60.0, 59.6, 59.9, 59.9, 0.3],
        ["segmenter W4", 60.0, 59.0, 58.0, 59.5, 0.2],
        ["segmenter W3", 60.0, 55.0, 54.0, 56.0, 0.1],
    ]
    serves, verdict, conclusions = conclude(rows)
    assert serves
    assert verdict == "Without data, both models keep their figures at W8/A8 and W4/A8."
    assert conclusions == [
        "At W8/A8 the worse of the two loses 0.4 points; up to 0.5 are allowed.",
        "At W4/A8 the worse of the two loses 1.4 points; up to 1.5 are allowed.",
        "At W3/A8 the worse of the two loses 5.0 points; up to 4.5 are allowed.",
        "With noise instead of synthetic images the figures change by -3.6 to +0.3 points.",
        "With real images instead of synthetic images the figures change by -0.1 to +1.2 points.",
    ]
    rows[0][2] = rows[1][2] = rows[2][2] = 20.0
    serves, verdict, _ = conclude(rows)
    assert not serves
    assert verdict == "Without data, no width keeps the figures."


def test_a_file_of_an_embedded_network_is_described(tmp_path, capsys):
    status, _, err = output(capsys, "quantize", "demo-detector", "--fast", "--rounding", "nearest", "--out", tmp_path)
    assert status == 0, err
    assert (tmp_path / "report.html").exists()
    status, out, err = output(capsys, "info", tmp_path / "model.safetensors")
    assert status == 0, err
    assert "dfqvit.models.dense:demo_detector" in out
    assert "whole, checksum holds, logits finite" in out


def test_options_that_an_embedded_network_has_not():
    with pytest.raises(UsageError, match="num_classes was given; MODEL 'demo-detector' is one embedded network"):
        load_model("demo-detector", num_classes=3)
    with pytest.raises(UsageError, match="name was 'demo-depth'; it may be 'demo-detector', 'demo-segmenter'"):
        dense.load_dense("demo-depth")


def test_a_network_to_compare_with_that_takes_other_images(folder, tmp_path, capsys):
    qmodel = dfqvit.quantize(
        load_model("demo-detector"), 8, calib="noise", samples=2, rounding="nearest", progress=False
    )
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    own = ["evaluate", path, "--task", "detection", "--data", folder]
    status, _, err = output(capsys, *own, "--against", "demo")
    assert status == 2
    assert "--against was 'demo', which takes images 1 x 28 x 28; FILE takes 1 x 56 x 56, and both get the same" in err
    status, _, err = output(capsys, *own, "--against", "demo-segmenter")
    assert status == 2
    assert "the network of against is a DemoSegmenter" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "c.pth"], "--checkpoint was given; it is for the weights of --against"),
        (["--label-ids"], "--label-ids was given; it is for --task detection"),
        (["--task", "segmentation", "--label-ids"], "--label-ids was given; it is for --task detection"),
        (["--task", "segmentation", "--classes", "c.txt"], "--classes was given; it is for --task classification"),
        (
            ["--task", "detection", "--unreadable", "skip"],
            "--unreadable skip was given; it is for --task classification",
        ),
    ],
)
def test_options_that_would_change_nothing(capsys, options, message):
    status, _, err = output(capsys, "evaluate", "model.safetensors", "--data", "data", *options)
    assert status == 2
    assert message in err
