"""Every failure built on purpose and named; none on healthy files."""

from __future__ import annotations

import copy
import csv
import json
import warnings
import xml.etree.ElementTree as ET

import pytest
import torch

import dfqvit
from dfqvit.calibration.health import image_statistics, measure, result_divergence
from dfqvit.models import Preprocessing, load_model
from dfqvit.models.adapters import find_adapter
from dfqvit.studies.diagnosis import MOST_BLOCK, diagnose, layer_divergence
from dfqvit.synthesis import SynthesisConfig

from ..conftest import said


@pytest.fixture(scope="module", params=["demo", "demo-swin"])
def float_model(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def images(float_model):
    return dfqvit.synthesize(float_model, 16, 60, 0)


def quantized(model, **settings):
    """Rounded to nearest, which takes a third of the time, where a test says nothing else."""
    return dfqvit.quantize(model, **{"runtime": "simulated", "acm": "none", "rounding": "nearest", **settings})


@pytest.fixture(scope="module")
def corrected(float_model, images):
    """W3/A8 with a correction of block 1 that nothing is wrong with; copy it to spoil it."""
    settings = {"w_bits": 3, "rounding": None, "acm": "sequential", "acm_blocks": [1]}
    qmodel = quantized(float_model, calib=images, **settings)
    assert names(qmodel) == []
    return qmodel


def names(qmodel, *more):
    return [finding.signature for finding in diagnose(qmodel, *more)[0]]


@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_healthy(float_model, images, w_bits):
    qmodel = quantized(float_model, w_bits=w_bits, calib=images, rounding=None)
    assert names(qmodel) == []
    assert names(qmodel, float_model, images) == []


def test_noisy_samples(float_model):
    assert names(quantized(float_model, calib="noise"))[0] == "noisy samples"
    found, _ = diagnose(quantized(float_model, calib=torch.randn(16, 1, 28, 28)))
    assert found[0].signature == "noisy samples"
    assert found[0].measured > 0.7 > found[0].threshold
    assert "--iters" in found[0].advice


def test_collapsed_samples(float_model, images):
    same = images[:1].repeat(16, 1, 1, 1) + 0.01 * torch.randn(16, 1, 28, 28)
    assert "collapsed samples" in names(quantized(float_model, calib=same))
    assert "collapsed samples" in names(quantized(float_model, calib=0.02 * images))


def test_inverted_schedule_and_too_little_synthesis(float_model):
    settings = {"samples": 2, "iters": 10, "spectrum": "natural"}
    found = names(quantized(float_model, schedule="hard-to-easy", **settings))
    assert found[0] == "inverted schedule"
    assert {"too few samples", "too few steps"} <= set(found)
    assert "inverted schedule" not in names(quantized(float_model, schedule="e2h", **settings))
    assert "inverted schedule" not in names(quantized(float_model, schedule="fixed", **settings))


@pytest.mark.parametrize("value", [4e4, float("inf"), float("nan")])
def test_overflowing_acm(corrected, value):
    qmodel = copy.deepcopy(corrected)
    adapter = find_adapter(qmodel)
    acm = adapter.get_acm(1).clone()
    acm[3, 5] = value
    adapter.set_acm(1, acm)
    assert names(qmodel)[0] == "overflowing ACM"
    acm[3, 5] = 0
    adapter.set_acm(1, acm + 100)  # far within float16, far beyond the block's output
    assert names(qmodel)[0] == "overflowing ACM"


def test_misaligned_acm(float_model, images):
    qmodel = quantized(
        float_model, w_bits=2, edge_bits=2, quantizer="minmax", calib=images, acm="sequential", acm_blocks=[1]
    )
    assert "misaligned ACM" not in names(qmodel, float_model, images)
    adapter = find_adapter(qmodel)
    adapter.set_acm(1, adapter.get_acm(1).roll(adapter.get_acm(1).shape[1] // 3, 1))
    assert "misaligned ACM" in names(qmodel, float_model, images)
    qmodel.dfqvit_record.measured["acm_left"]["1"] = 1.4  # as quantize notes it when it happens at once
    assert "misaligned ACM" in names(qmodel)


def test_large_divergence_names_block_and_layer(float_model, images):
    assert "large divergence" in names(quantized(float_model, w_bits=2, edge_bits=2, quantizer="minmax", calib=images))
    layers = layer_divergence(float_model, quantized(float_model, calib=images), images)
    chosen = next(name for name in layers if name.endswith("mlp.fc1"))
    qmodel = quantized(float_model, w_bits=8, calib=images)
    qmodel.get_submodule(chosen).weight_scale.mul_(2)
    found, measured = diagnose(qmodel, float_model, images)
    assert [finding.signature for finding in found] == ["large divergence"]
    assert f"the output of {chosen} is off" in found[0].what
    assert max(measured["layers"], key=measured["layers"].get) == chosen


def test_results_that_tell_nothing_of_an_image_are_told(float_model, images):
    """Found here: ViT-Ti by PSAQ-ViT's placement is at chance, and its blocks' divergence was called healthy.

    One channel of the residual sums reaches hundreds, so that 8 bits leave nothing of the others.
    """
    model = copy.deepcopy(float_model)
    with torch.no_grad():
        find_adapter(model).blocks()[-2].mlp.fc2.bias[5] = 3000.0
    options = {"w_bits": 8, "calib": images, "quantizer": "minmax", "rounding": "nearest"}
    with pytest.warns(UserWarning, match="results are off by .*%.*tell little of an image"):
        qmodel = quantized(model, placement="psaq", **options)
    measured = qmodel.dfqvit_record.measured
    assert max(measured["divergence"]) < MOST_BLOCK
    assert any("the results are off by" in finding.what for finding in diagnose(qmodel)[0])
    with torch.no_grad():
        wanted, found = model(images).double(), qmodel(images).double()
    expected = (found - wanted).square().mean() / wanted.var(dim=0, correction=0).mean()
    assert measured["results"] == pytest.approx(float(expected), rel=1e-2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the quantized model's results")
        assert quantized(float_model, **options).dfqvit_record.measured["results"] < 0.1


def test_results_that_cannot_be_compared_are_left_out():
    wanted = [torch.randn(2, 3), torch.randn(1, 3)]
    assert result_divergence(wanted, wanted) == 0
    assert result_divergence(wanted, [each.mean(dim=0, keepdim=True).expand_as(each) for each in wanted]) > 0
    assert result_divergence([{"logits": wanted[0]}], [{"logits": wanted[0]}]) is None
    assert result_divergence([wanted[1]], [wanted[1] + 1]) is None  # one image: nothing tells it from another
    assert result_divergence([torch.ones(2, 3)], [torch.zeros(2, 3)]) is None
    for other in (torch.randn(3, 3), torch.randn(2, 4), torch.randn(6), torch.tensor(1.0)):  # what values decide
        assert result_divergence([wanted[0]], [other]) is None
        assert result_divergence([other, wanted[0]], [other, wanted[0]]) == (0 if other.shape == (3, 3) else None)


def test_measurements_are_what_they_say(float_model, images):
    qmodel = quantized(float_model, w_bits=3, calib=images)
    measured = qmodel.dfqvit_record.measured
    kept = []
    for model in (float_model, qmodel):
        handle = find_adapter(model).blocks()[2].register_forward_hook(lambda m, i, o: kept.append(o.double()))
        with torch.no_grad():
            model(images)
        handle.remove()
    wanted, found = kept
    expected = float(((wanted - found) ** 2).sum() / (wanted**2).sum())
    assert measured["divergence"][2] == pytest.approx(expected, rel=1e-2, abs=2e-5)
    assert measured["rms"][2] == pytest.approx(float(wanted.square().mean().sqrt()), rel=1e-3)
    assert measure(float_model, float_model, images, Preprocessing.of(float_model))["divergence"] == [0.0] * 4


def test_image_statistics_of_known_images():
    preprocessing = Preprocessing((1, 32, 32), (0.0,), (1.0,))
    x = torch.arange(32.0)
    wave = 0.5 + 0.2 * torch.sin(2 * torch.pi * x * 12 / 32).expand(1, 1, 32, 32)  # 0.375 cycles a pixel
    slow = 0.5 + 0.2 * torch.sin(2 * torch.pi * x * 2 / 32).expand(1, 1, 32, 32)
    found = image_statistics(torch.cat([wave, slow]), preprocessing)
    assert found["high"] == pytest.approx(0.5, abs=1e-3)
    assert found["contrast"] == pytest.approx(0.2 / 2**0.5, abs=1e-3)
    assert found["likeness"] == pytest.approx(0, abs=1e-3)
    assert image_statistics(torch.cat([slow, slow]), preprocessing)["likeness"] == pytest.approx(1, abs=1e-3)
    assert image_statistics(slow, preprocessing)["likeness"] == 0


def test_command(run, tmp_path):
    out = tmp_path / "q"
    assert run("quantize", "demo", "--calib", "noise", "--samples", 2, "--out", out)[0] == 0
    file = out / "model.safetensors"
    status, stdout, _ = run("diagnose", file)
    assert status == 0
    assert stdout.index("noisy samples: ") < stdout.index("too few samples: ")
    assert "to do: " in stdout
    status, stdout, _ = run("diagnose", file, "--against", "demo", "--json")
    result = json.loads(stdout)
    assert status == 0
    assert result["findings"][0]["signature"] == "noisy samples"
    assert len(result["measured"]["layers"]) == 4 * 4 + 2
    _, _, stderr = run("diagnose", file, "--against", "demo-deit3")  # of the same structure
    assert "against looks like another model, or one of other weights (--checkpoint)" in stderr
    assert "looks like another model" not in run("diagnose", file, "--against", "demo")[2]
    for arguments, message in (
        ([], "FILE and --gradients: give one of them"),
        ([file, "--gradients", "demo"], "FILE and --gradients: give one of them"),
        ([file, "--data", tmp_path], "--data and --checkpoint are for --against, which was not given"),
        ([tmp_path / "none"], "there is no such file"),
    ):
        status, _, err = run("diagnose", *arguments)
        assert status == 2
        assert message in said(err)[0]


def test_gradients(run, tmp_path):
    arguments = ["diagnose", "--gradients", "demo", "--samples", 2, "--iters", 6, "--seed", 4, "--out", tmp_path]
    status, stdout, _ = run(*arguments, "--json")
    norms = json.loads(stdout)["norms"]
    assert status == 0
    assert (tmp_path / "gradients.svg").read_text().count("<polyline") == 2
    ET.parse(tmp_path / "gradients.svg")
    with (tmp_path / "gradients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["e2h"]) for row in rows] == pytest.approx(norms["e2h"])
    model = load_model("demo")
    first = dfqvit.synthesis.Synthesis(model, SynthesisConfig(samples=2, iters=6, seed=4), Preprocessing.of(model))
    first.advance()
    assert norms["e2h"][0] == pytest.approx(float(first.images.grad.norm()), rel=1e-5)
    assert norms["e2h"][0] == pytest.approx(norms["fixed"][0], rel=1e-5)  # both begin with whole images
    assert norms["e2h"][5] != norms["fixed"][5]
    assert run(*arguments)[0] == 2  # not replaced unasked
