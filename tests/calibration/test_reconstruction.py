"""Block-wise reconstruction: lower error on images it did not see, the same file format, everything else as it was."""

from __future__ import annotations

import json

import pytest
import torch

import dfqvit
from dfqvit.calibration import convert, freeze, observe
from dfqvit.calibration.reconstruction import reconstruct_blocks
from dfqvit.errors import UsageError
from dfqvit.models import load_model
from dfqvit.models.adapters import find_adapter
from dfqvit.progress import showing
from dfqvit.quantization.attention import AttentionOperands
from dfqvit.quantization.layers import QuantLinear
from dfqvit.quantization.recipe import Recipe


@pytest.fixture(scope="module", params=["demo", "demo-swin"])
def models(request):
    model = load_model(request.param)
    return model, dfqvit.synthesize(model, 16, 30, 0)


def integers_of(qmodel):
    return {name: tensor for name, tensor in qmodel.state_dict().items() if name.endswith("weight_packed")}


def test_lowers_the_error_on_other_images(models):
    model, images = models
    others = dfqvit.synthesize(model, 16, 30, 9)
    plain = dfqvit.quantize(model, 2, calib=images, runtime="simulated")
    tuned = dfqvit.quantize(model, 2, calib=images, runtime="simulated", reconstruct=60)
    with torch.no_grad():
        wanted = model(others)
        before, after = ((q(others) - wanted).square().mean() for q in (plain, tuned))
    # the small Swin gains nothing from so few images
    assert after < (0.95 if hasattr(model, "pos_embed") else 1.1) * before
    changed = [name for name, packed in integers_of(plain).items() if not torch.equal(packed, integers_of(tuned)[name])]
    assert changed
    assert all(".blocks." in f".{name}" for name in changed)
    assert tuned.dfqvit_record.settings["reconstruct"] == 60


def test_is_saved_like_any_other_and_computes_what_was_tuned(models, tmp_path):
    model, images = models
    recipe = Recipe(3)
    qmodel = convert(model, recipe)
    observe(qmodel, images, recipe)
    told = []
    with showing(False, told.append):
        left = reconstruct_blocks(model, qmodel, images, 3)
    assert len(left) == 4
    assert all(0 < share <= 1 for share in left)
    steps = [(each.stage, each.step, each.total) for each in told]
    assert steps == [("reconstruct blocks", done, 4) for done in range(5)]
    with torch.no_grad():
        before = qmodel(images)
        freeze(qmodel)
        # up to activations that round the other way
        assert float((qmodel(images) - before).norm() / before.norm()) < 1e-2
    again = dfqvit.quantize(model, 3, calib=images, reconstruct=2)
    dfqvit.save(again, tmp_path / "m.safetensors")
    assert torch.equal(dfqvit.load(tmp_path / "m.safetensors")(images), again(images))


def test_a_block_that_does_not_get_better_keeps_its_integers(models, monkeypatch):
    model, images = models
    monkeypatch.setattr("dfqvit.calibration.reconstruction.RATE", 1e6)  # diverges at once
    plain = dfqvit.quantize(model, 4, calib=images[:4], rounding="nearest")
    tuned = dfqvit.quantize(model, 4, calib=images[:4], rounding="nearest", reconstruct=2)
    assert all(torch.equal(packed, integers_of(tuned)[name]) for name, packed in integers_of(plain).items())


def test_the_float_model_is_left_alone_and_seeds_repeat(models):
    model, images = models
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"rounding": "nearest", "reconstruct": 3, "seed": 5}
    one, two = (dfqvit.quantize(model, 3, calib=images[:4], **settings) for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(packed, integers_of(two)[name]) for name, packed in integers_of(one).items())
    assert all(not parameter.requires_grad for parameter in one.parameters())


def test_gradients_pass_attention_straight_through(seed):
    operands = AttentionOperands(8, "minmax")
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    operands(q, k, v, 0.3)
    for site in (operands.q, operands.k, operands.v):
        site.freeze()
    weights = torch.randn(2, 3, 9, 8)
    found = torch.autograd.grad((operands(q, k, v, 0.3) * weights).sum(), (q, k, v))
    float_result = (q @ k.mT * 0.3).softmax(-1) @ v
    expected = torch.autograd.grad((float_result * weights).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
    with torch.no_grad():
        assert torch.allclose(operands(q, k, v, 0.3), operands(q.detach(), k.detach(), v.detach(), 0.3))


def test_wrong_use_and_the_command(run, tmp_path):
    model = load_model("demo")
    for settings, message in (
        ({"reconstruct": -1}, "reconstruct was -1; it may be a number of steps, or 0"),
        ({"reconstruct": True}, "reconstruct was True; it may be"),
        ({"reconstruct": 5, "placement": "psaq"}, "reconstruct was 5 and placement 'psaq'; it is for 'gemm'"),
    ):
        with pytest.raises(UsageError, match=message):
            dfqvit.quantize(model, calib="noise", **settings)
    out = ["quantize", "demo", "--samples", 4, "--iters", 2, "--w-bits", 3, "--reconstruct", 2, "--rounding", "nearest"]
    status, stdout, err = run(*out, "--out", tmp_path, "--json")
    assert status == 0, err
    assert json.loads(stdout)["record"]["settings"]["reconstruct"] == 2
    assert "reconstruct blocks: 100%" in err
    assert run(*out, "--placement", "psaq", "--out", tmp_path / "p")[0] == 2


def test_auto_corrects_where_rounding_is_coarse(seed):
    model, images = load_model("demo"), torch.randn(6, 1, 28, 28)
    for settings, mode in (
        ({"w_bits": 3, "placement": "psaq", "quantizer": "minmax"}, "checked"),
        ({"w_bits": 4, "placement": "psaq", "quantizer": "minmax"}, "none"),
        ({"w_bits": 3}, "none"),
        ({"w_bits": 3, "acm_blocks": [0]}, "sequential"),
    ):
        assert dfqvit.quantize(model, calib=images, **settings).dfqvit_record.acm == mode
    coarse = {"w_bits": 3, "placement": "psaq", "quantizer": "minmax"}
    assert dfqvit.quantize(model, calib=images[:3], **coarse).dfqvit_record.acm == "none"
    qmodel = dfqvit.quantize(model, calib=images, **coarse)
    kept = [index for index in range(4) if find_adapter(qmodel).get_acm(index) is not None]
    assert kept == qmodel.dfqvit_record.acm_blocks
    assert any(isinstance(module, QuantLinear) for module in qmodel.modules())
