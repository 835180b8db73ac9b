"""Options that contradict each other or would change nothing are refused; networks of one's own go through every command."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import ModelCard

import dfqvit
from dfqvit import demo
from dfqvit.kernels.pack_weight import packed_row_bytes
from dfqvit.models import Preprocessing, load_model
from dfqvit.storage.atomic import expect_place

from .. import networks
from ..conftest import said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Quantized demos of several widths: {bits: file}."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"samples": 2, "calib": "noise", "rounding": "nearest", "progress": False}
    return {
        bits: dfqvit.save(dfqvit.quantize(load_model("demo"), bits, **settings), folder / f"w{bits}.safetensors")
        for bits in (8, 3)
    }


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """(file of a quantized network of one's own, its float weights)."""
    folder = tmp_path_factory.mktemp("network")
    model = networks.segmenter()
    settings = {"samples": 4, "calib": "noise", "rounding": "nearest", "progress": False}
    qmodel = dfqvit.quantize(model, 8, build=networks.segmenter, **settings)
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    return dfqvit.save(qmodel, folder / "model.safetensors"), folder / "weights.safetensors"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark", "FILE", "--w-bits", 3], "--w-bits was given and the file"),
        (["benchmark", "demo", "--iters", 3], "--iters was given without --energy"),
        (["benchmark", "demo", "--samples", 3], "--samples was given without --energy"),
        (["benchmark", "demo", "--build", "a:b"], "--build was given and the MODEL 'demo'"),
        (["benchmark", "nowhere.safetensors"], "file was 'nowhere.safetensors'; there is no such file"),
        (["diagnose", "FILE", "--out", "x"], "--out was given without --gradients"),
        (["diagnose", "FILE", "--samples", 3], "--samples was given without --gradients"),
        (["diagnose", "FILE", "--num-classes", 3], "--num-classes was given without --gradients"),
        (["diagnose", "FILE", "--force"], "--force was given without --gradients"),
        (["diagnose", "--gradients", "demo", "--against", "demo"], "--against was given and --gradients"),
        (["diagnose", "--gradients", "demo", "--data", "x"], "--data was given and --gradients"),
        (["diagnose", "--gradients", "demo", "--iters", 1], "--iters was 1; its first and last fifth are compared, so"),
        (["diagnose", "--gradients", "demo", "--force"], "--force was given without --out"),
        (["card", "FILE", "--out", "x", "--private"], "--private was given without --push"),
        (["demo", "--dense", "--model", "demo"], "--model was given with --dense"),
        (["demo", "--all", "--model", "demo"], "--model was given with --all"),
        (
            ["quantize", "demo", "--model-kwargs", "a=1", "--model-kwargs", "a=2", "--out", "x"],
            "--model-kwargs was given twice for 'a'; give one of them",
        ),
        (["info", "--build", "a:b"], "--build was given without a FILE"),
        (["quantize", "demo", "--acm", "none", "--gamma", 2, "--out", "x"], "--gamma was given and --acm none"),
        (
            ["quantize", "demo", "--schedule", "fixed", "--crop-lower", 0.08, "--out", "x"],
            "--crop-lower was given and --schedule fixed",
        ),
        (
            ["ablate", "demo", "--study", "samples", "--samples", 4, "--out", "x"],
            "--samples was given and --study samples, whose own values they are; give --values",
        ),
        (
            ["ablate", "demo", "--study", "steps", "--iters", 4, "--out", "x"],
            "--iters was given and --study steps, whose own values they are; give --values",
        ),
        (
            ["synthesize", "demo", "--schedule", "fixed", "--crop-lower", 0.5, "--out", "x"],
            "--crop-lower was given and --schedule fixed",
        ),
        (["evaluate", "FILE", "--data", demo.TEST_IMAGES, "--unreadable", "skip"], "unreadable was 'skip'"),
    ],
)
def test_options_that_would_change_nothing(run, saved, arguments, message):
    status, out, err = run(*(saved[8] if each == "FILE" else each for each in arguments))
    assert (status, out) == (2, "")
    assert message in said(err)[0]


@pytest.mark.parametrize(
    "options",
    [
        ["--acm", "none", "--acm-shape", "token"],
        ["--acm", "none", "--acm-shrink"],
        ["--acm", "none", "--acm-top", "1"],
        ["--acm", "none", "--acm-blocks", "0"],
        ["--acm-shape", "token"],  # "auto" corrects nothing here
    ],
)
def test_a_correction_that_is_none_is_refused_before_the_synthesis(options, tmp_path, monkeypatch, run):
    """Found here: the refusal came after the synthesis, and the images were lost."""
    monkeypatch.setattr("dfqvit.cli.quantize._calibration", lambda *_: pytest.fail("the synthesis began"))
    status, _, err = run("quantize", "demo", *options, "--out", tmp_path / "out")
    assert status == 2
    assert "it is for acm='sequential'" in said(err)[0]


def test_resume_without_a_synthesis_is_told(tmp_path, run):
    arguments = ["quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest", "--resume"]
    status, _, err = run(*arguments, "--out", tmp_path / "out")
    assert status == 0
    assert sum("--resume was given and --calib noise, which no synthesis makes" in line for line in said(err)) == 1


def test_what_the_model_does_not_allow_is_refused_before_the_synthesis(tmp_path, monkeypatch, run):
    monkeypatch.setattr("dfqvit.cli.quantize._calibration", lambda *_: pytest.fail("the synthesis began"))
    status, _, err = run("quantize", "demo-detector", "--size-budget", 5, "--out", tmp_path / "out")
    assert status == 2
    assert "it compares logits, and the model has no classifier" in said(err)[0]
    status, _, err = run("quantize", "demo-convnext", "--softmax-bits", 4, "--out", tmp_path / "out")
    assert status == 2
    assert "softmax_bits was 4; this ConvNeXt has no attention whose probabilities are quantized" in said(err)[0]


def test_width_and_budget_are_told_apart(tmp_path, monkeypatch, run):
    def stop(**_):
        raise dfqvit.UsageError("it went on")

    monkeypatch.setattr("dfqvit.cli.quantize.open_model", stop)
    arguments = ["quantize", "demo", "--size-budget", 1, "--out", tmp_path / "out"]
    assert said(run(*arguments)[2]) == ["dfqvit: it went on"]
    told = "dfqvit: warning: --w-bits was given and --size-budget, which chooses the bits of the weights itself"
    assert said(run(*arguments, "--w-bits", 3)[2]) == [told, "dfqvit: it went on"]


def test_a_float_model_made_for_images_of_another_frame_is_told(tmp_path, run):
    """Found here: only mean and std of models of another name were looked at, so float's accuracy was of another crop."""
    model = load_model("demo")
    own = Preprocessing.of(model)
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:40], labels=file["labels"][:40])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    settings = {"samples": 2, "calib": "noise", "rounding": "nearest", "progress": False}
    for other, told in (
        (own, ""),
        (
            replace(own, crop_pct=0.5, interpolation="nearest"),
            "interpolation bicubic, crop_pct 1.0; it gets the images",
        ),
        (replace(own, mean=(0.5,)), f"mean {own.mean}; it gets the images as FILE does, with mean (0.5,)"),
    ):
        qmodel = dfqvit.quantize(model, 8, preprocessing=other, **settings)
        path = dfqvit.save(qmodel, tmp_path / "model.safetensors", overwrite=True)
        line = ["evaluate", path, "--data", tmp_path / "test.npz", "--against", "demo"]
        _, _, err = run(*line)
        assert ("was made for" in err) == bool(told)
        assert told in err
        _, _, err = run(*line, "--checkpoint", tmp_path / "weights.safetensors")  # of which nothing else says it
        assert "was made for" not in err


def test_widths_of_a_budget_are_said_as_they_are(tmp_path, run):
    """Found here: `info` and the card said 8 bits of a first and a last layer that had 6 and 5."""
    model = load_model("demo")
    qmodel = dfqvit.quantize(
        model, calib="noise", samples=2, rounding="nearest", size_budget=0.2, progress=False, quantizer="minmax"
    )
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    tensors = safetensors.torch.load_file(path)
    widths = {}
    for name, layer in model.named_modules():
        if f"{name}.weight_packed" in tensors:
            rows, columns = tensors[f"{name}.weight_packed"].shape[0], layer.weight[0].numel()
            bits = [
                b
                for b in range(2, 9)
                if tensors[f"{name}.weight_packed"].numel() == rows * packed_row_bytes(columns, b)
            ]
            widths[name] = bits[0]
    assert min(widths["patch_embed.proj"], widths["head"]) < 8
    said = json.loads(run("info", path, "--json")[1])
    assert said["weight_bits"] == widths
    assert sum(said["bytes_by_kind"].values()) == path.stat().st_size
    counts = ", ".join(
        f"{list(widths.values()).count(bits)} layer{'s' * (list(widths.values()).count(bits) > 1)} W{bits}"
        for bits in sorted({*widths.values()})
    )
    _, table, _ = run("info", path)
    assert f"/A8 ({counts})" in " ".join(table.split())
    run("card", path, "--out", tmp_path / "card")
    text = (tmp_path / "card" / "README.md").read_text()
    assert f"nearest rounding, {counts} |" in text
    assert "first and last" not in text + table


def test_a_report_says_the_widths_of_a_budget_alone(tmp_path, run):
    """Found here: beside `layer_bits` of 6 and 5 for the first and the last layer stood `edge_bits 8`."""
    arguments = ["quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest"]
    for name, extra in (("plain", []), ("budget", ["--size-budget", 0.2])):
        assert run(*arguments, *extra, "--out", tmp_path / name)[0] == 0
        page = (tmp_path / name / "report.html").read_text()
        settings = re.findall(r'<th scope="row">(\w+_bits)</th>', page)
        own = ["w_bits", "edge_bits"] if name == "plain" else ["layer_bits"]
        assert sorted(settings) == sorted(["a_bits", "edge_a_bits", "softmax_bits", *own])


def test_samples_made_for_another_mean_are_normalised_anew(run, tmp_path):
    """Found here: they went in as they were, within what the model's own images may be: darker, and of less contrast."""
    folder = tmp_path / "s"
    made = ["synthesize", "demo", "--samples", 4, "--iters", 2, "--mean", 0.1, "--std", 0.5, "--out", folder]
    assert run(*made)[0] == 0
    images = safetensors.torch.load_file(folder / "samples.safetensors")["images"]
    anew = ((images * torch.tensor(0.5) + torch.tensor(0.1)).clamp(0, 1) - torch.tensor(0.286)) / torch.tensor(0.353)
    assert float((anew - images).abs().mean()) > 0.1
    own = Preprocessing.of(load_model("demo"))
    for options, wanted, preprocessing in (
        ([], anew, own),
        (["--mean", 0.1, "--std", 0.5], images, replace(own, mean=(0.1,), std=(0.5,))),
    ):
        settings = {"calib": wanted, "rounding": "nearest", "preprocessing": preprocessing, "progress": False}
        qmodel = dfqvit.quantize(load_model("demo"), 8, **settings)
        line = ["quantize", "demo", "--w-bits", 8, "--calib", folder / "samples.safetensors", "--rounding", "nearest"]
        status, _, err = run(*line, *options, "--force", "--out", tmp_path / "q")
        assert status == 0, err
        x = torch.randn(8, 1, 28, 28)
        assert torch.equal(dfqvit.load(tmp_path / "q" / "model.safetensors")(x), qmodel(x))


def test_as_many_samples_of_a_file_as_asked_for(run, tmp_path, seed):
    """Found here: --samples was not looked at beside a samples file."""
    safetensors.torch.save_file({"images": torch.randn(5, 1, 28, 28)}, tmp_path / "samples.safetensors")
    arguments = ["quantize", "demo", "--calib", tmp_path / "samples.safetensors", "--companions", 0]
    arguments += ["--rounding", "nearest", "--json", "--force", "--out", tmp_path / "q"]
    status, out, err = run(*arguments, "--samples", 2)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["record"]["samples"] == 2
    status, _, err = run(*arguments, "--samples", 6)
    assert status == 2
    assert "--samples was 6; --calib" in said(err)[-1]
    assert "holds 5 images" in said(err)[-1]


def test_a_card_replaces_no_other_model_unasked(run, saved, tmp_path):
    """Found here: the model of `quantize --out DIR` was lost to `card OTHER --out DIR`."""
    kept = tmp_path / "model.safetensors"
    shutil.copy(saved[8], kept)
    status, _, err = run("card", saved[3], "--out", tmp_path)
    assert status == 2
    assert f"'{kept}' exists already; give --force" in said(err)[0]
    assert filecmp.cmp(kept, saved[8], shallow=False)
    assert not (tmp_path / "README.md").exists()
    assert run("card", kept, "--out", tmp_path)[0] == 0  # the same model
    (tmp_path / "README.md").unlink()
    assert run("card", saved[8], "--out", tmp_path)[0] == 0  # of the same bytes
    assert run("card", saved[3], "--out", tmp_path, "--force")[0] == 0
    assert filecmp.cmp(kept, saved[3], shallow=False)


def test_a_card_takes_figures_in_other_encodings_and_no_others(run, saved, tmp_path):
    """PowerShell writes what a program prints in UTF-16."""
    figures = {"file": str(saved[8]), "images": 500, "top1": 87.5, "top5": 99.5}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(figures), encoding="utf-16")
    os.utime(path)
    assert run("card", saved[8], "--out", tmp_path / "hub", "--evaluation", path)[0] == 0
    assert "87.50 %" in (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    path.write_text(json.dumps({"file": str(saved[8]), "task": "detection", "figures": {"mAP": 1.0}}))
    status, _, err = run("card", saved[8], "--out", tmp_path / "other", "--evaluation", path)
    assert status == 2
    assert "has figures of --task detection; a card holds those of classification" in said(err)[0]


BUILD = ["--build", "tests.networks:segmenter"]


def test_a_network_of_ones_own_is_described(run, network):
    status, _, err = run("info", network[0])
    assert status == 2
    assert "if you trust that code to run" in said(err)[0]
    status, out, err = run("info", network[0], *BUILD, "--json")
    assert status == 0, err
    assert json.loads(out)["spec"]["build_by"] == BUILD[1]


def test_a_network_of_ones_own_is_timed(run, network, monkeypatch):
    found = {}
    monkeypatch.setattr("dfqvit.cli.benchmark.race", lambda models, *_, **__: found.update(models) or [])
    for options in ([], ["--checkpoint", network[1]]):
        status, _, err = run("benchmark", network[0], *BUILD, "--batch", 1, "--rounds", 1, *options)
        assert status == 0, err
    weights, x = safetensors.torch.load_file(network[1]), torch.randn(1, 3, 32, 32)
    assert all(torch.equal(value, weights[key]) for key, value in found["float32"].state_dict().items())
    assert torch.isfinite(found["W8/A8"](x)["out"]).all()


def test_a_network_of_ones_own_is_diagnosed(run, network):
    against = ["--against", "tests.networks:segmenter", "--checkpoint", network[1]]
    status, out, err = run("diagnose", network[0], *BUILD, *against, "--json")
    assert status == 0, err
    assert max(json.loads(out)["measured"]["layers"].values()) < 0.2
    status, _, err = run("diagnose", network[0], *BUILD, "--against", "demo")
    assert status == 2
    assert "against: this VisionTransformer is not what the quantized Segmenter was made from" in said(err)[-1]


def test_a_network_of_ones_own_is_exported(run, network, tmp_path, monkeypatch):
    found = []
    written = {"weights": {}, "nodes": {}, "bytes": 1, "opset": 21}
    monkeypatch.setattr("dfqvit.cli.export.export_onnx", lambda model, *_, **__: found.append(model) or written)
    assert run("export", network[0], *BUILD, "--onnx", tmp_path / "x.onnx")[0] == 0
    assert isinstance(found[0], networks.Segmenter)


def test_the_card_of_a_network_of_ones_own_says_what_it_is(run, network, tmp_path):
    """Found here: it was said to be a vision transformer of timm that classifies, and how it was loaded failed."""
    status, _, err = run("card", network[0], *BUILD, "--out", tmp_path)
    assert status == 0, err
    card = ModelCard.load(tmp_path / "README.md")
    data = yaml.safe_load(card.data.to_yaml())
    assert "pipeline_tag" not in data
    assert "timm" not in data["tags"]
    assert "The network that `tests.networks:segmenter` makes" in card.text
    call = next(line for line in card.text.splitlines() if "dfqvit.load(" in line)
    monkey = {"dfqvit": dfqvit}
    exec(call.replace('"model.safetensors"', repr(str(tmp_path / "model.safetensors"))), monkey)
    assert isinstance(monkey["model"], networks.Segmenter)


@pytest.mark.parametrize("other", ["demo-swin", "demo-convnext"])
def test_another_float_model_is_no_twin(run, saved, other):
    """Found here: a traceback."""
    status, _, err = run("diagnose", saved[8], "--against", other)
    assert status == 2
    assert "is not what the quantized VisionTransformer was made from" in said(err)[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "demo", "--out", "DIR/file/deep/er"],
        ["synthesize", "demo", "--out", "DIR/file/deep"],
        ["export", "FILE", "--onnx", "DIR/file/x.onnx"],
        ["card", "FILE", "--out", "DIR/file/deep"],
    ],
)
def test_a_file_in_place_of_a_folder_is_said_before_the_work(run, saved, tmp_path, arguments):
    """Found here: it came after minutes of work, as "File exists" or "Not a directory"."""
    (tmp_path / "file").write_text("kept")
    line = [saved[8] if each == "FILE" else each.replace("DIR", str(tmp_path)) for each in arguments]
    status, _, err = run(*line)
    assert status == 2
    assert f"'{tmp_path / 'file'}' is no folder" in said(err)[0]


def test_a_folder_that_may_not_be_written_to_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.realpath(path) != os.path.realpath(tmp_path))
    with pytest.raises(dfqvit.DfqvitError, match="cannot be written: nothing may be written to"):
        expect_place(tmp_path / "a" / "b")
    (tmp_path / "there").mkdir()
    expect_place(tmp_path / "there" / "b")
