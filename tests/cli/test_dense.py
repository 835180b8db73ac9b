"""`dfqvit evaluate --task`, `dfqvit demo --dense`, and the embedded dense models as MODEL."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

import dfqvit
from dfqvit import UsageError, cli
from dfqvit.evaluation import scenes
from dfqvit.evaluation.dense import evaluate_dense
from dfqvit.evaluation.dense_data import SceneImages, open_dense, write_coco
from dfqvit.models import Preprocessing, dense, load_model

from .. import networks

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
    qmodel = dfqvit.quantize(network, 8, calib="procedural", samples=8, progress=False)
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
    qmodel = dfqvit.quantize(network, 8, calib="procedural", samples=4, build=networks.segmenter, progress=False)
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


def test_demo_prints_every_source_and_writes_pictures(tmp_path, capsys):
    short = ["--images", "20", "--samples", "2", "--iters", "2"]
    status, out, err = output(capsys, "demo", "--dense", "--out", tmp_path, *short, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert len(found["figures"]) == 6
    for row in found["figures"].values():
        assert set(row) == {"float", "data-free", "noise", "real images", "MB"}
        assert 0 < row["MB"] < 1
    page = (tmp_path / "report.html").read_text()
    for name in TASKS:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert f"{name}. Rows from the top" in page
        assert dfqvit.load(tmp_path / f"{name}-w4a8.safetensors").dfqvit_record.calibration == "synthetic"


def test_a_file_of_an_embedded_network_is_described(tmp_path, capsys):
    status, _, err = output(capsys, "quantize", "demo-detector", "--fast", "--out", tmp_path)
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
