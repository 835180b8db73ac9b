"""`DataFreeConfig`: what torchao's `quantize_` makes of a model is what `dfqvit.quantize` makes of it, in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfqvit
from dfqvit.errors import UsageError

from .conftest import small_swin, small_vit
from .fresh import python

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

SETTINGS = {"calib": "noise", "samples": 4, "seed": 3, "rounding": "nearest", "progress": False}


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_a_whole_model_in_place(seed, make, tmp_path):
    model, images = make(), torch.randn(3, 3, 32, 32)
    expected = dfqvit.quantize(model, 3, **SETTINGS)(images)
    config = dfqvit.DataFreeConfig(w_bits=3, **SETTINGS)
    assert quantization.quantize_(model, config, filter_fn=dfqvit.DataFreeConfig.whole_model) is None
    assert torch.equal(model(images), expected)
    assert model.dfqvit_record.recipe.w_bits == 3
    assert "quantized by dfqvit" in repr(model)
    assert torch.equal(dfqvit.load(dfqvit.save(model, tmp_path / "m.safetensors"))(images), expected)


def test_a_model_within_another(seed):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.box = small_vit(num_classes=0), nn.Linear(48, 4)

        def forward(self, x):
            return self.box(self.backbone(x))

    model, images = Detector(), torch.randn(2, 3, 32, 32)
    backbone, box = model.backbone, model.box.weight.clone()
    expected = model.box(dfqvit.quantize(backbone, 4, **SETTINGS)(images))
    config = dfqvit.DataFreeConfig(**SETTINGS)
    quantization.quantize_(model, config, filter_fn=lambda module, name: name == "backbone")
    assert model.backbone is backbone
    assert torch.equal(model(images), expected)
    assert torch.equal(model.box.weight, box)


def test_single_layers_are_refused_and_left_alone(seed):
    model, images = small_vit(), torch.randn(2, 3, 32, 32)
    before = model(images)
    with pytest.raises(UsageError, match=r"gave DataFreeConfig a Linear; it takes the whole model, so .*whole_model"):
        quantization.quantize_(model, dfqvit.DataFreeConfig(**SETTINGS))
    whole = dfqvit.DataFreeConfig.whole_model
    for settings, message in (
        ({"w_bits": 9}, "w_bits was 9"),
        ({"calib": "nothing"}, "calib was 'nothing'"),
        ({"no_such_setting": 1, "calib": "synthetic"}, "no_such_setting"),
    ):
        with pytest.raises(UsageError, match=message):
            quantization.quantize_(model, dfqvit.DataFreeConfig(**{**SETTINGS, **settings}), filter_fn=whole)
    assert torch.equal(model(images), before)


def test_it_stands_beside_torchaos_own_configurations(seed):
    model = small_vit()
    quantization.quantize_(model, dfqvit.DataFreeConfig(**SETTINGS), filter_fn=dfqvit.DataFreeConfig.whole_model)
    with pytest.raises(UsageError, match="quantized by dfqvit already"):
        quantization.quantize_(model, dfqvit.DataFreeConfig(**SETTINGS), filter_fn=dfqvit.DataFreeConfig.whole_model)
    other = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(other, quantization.Int8WeightOnlyConfig())
    assert type(other[0].weight) is not nn.Parameter
    assert repr(dfqvit.DataFreeConfig(samples=2)) == "DataFreeConfig(w_bits=4, a_bits=8, samples=2)"


def test_without_torchao_it_says_so():
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'torchao' else find(name, *more)\n"
        "import dfqvit\ntry:\n    dfqvit.DataFreeConfig()\nexcept dfqvit.UsageError as error:\n    print(error)"
    )
    done = python("-c", code)
    assert done.stdout == "DataFreeConfig is for torchao, which is not installed; call dfqvit.quantize(model) instead\n"
