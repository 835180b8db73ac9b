"""Parts and tables that were taken away, added or put at a second place, before quantizing or after: a file that gives what the
model gave, or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfqvit

from ..conftest import made_once, small_swin
from ..runtime.test_families import ROTARY
from ..runtime.test_replaced import lively


def rotary():
    return lively("vit_small_patch16_dinov3", ROTARY)


def without_rope(model):
    model.rope = None


def without_masks(model):
    for name, module in model.named_modules():
        if name.endswith("blocks.1"):
            module.attn_mask = None


def twice(model):
    """The second block of a stage, which shifts its windows, is the first then."""
    blocks = model.layers[0].blocks
    blocks[1] = blocks[0]


def one_more(model):
    model.layers[0].blocks.append(nn.Hardtanh(-0.5, 0.5))


CHANGES = {
    "no rope": (rotary, without_rope, "'rope' is not there"),
    "no masks": (small_swin, without_masks, r"'layers.\d.blocks.1.attn_mask' is not there"),
    "one block twice": (small_swin, twice, r"'layers.0.blocks.1.\S+' is"),
    "a block more": (small_swin, one_more, "'layers.0.blocks.2' is a Hardtanh"),
}


@made_once
def quantized(model):
    return dfqvit.quantize(model, 8, calib=torch.randn(3, 3, 32, 32), rounding="nearest", progress=False)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_after_quantizing_is_not_saved(seed, tmp_path, kind):
    make, change, found = CHANGES[kind]
    qmodel, images = quantized(make()), torch.randn(2, 3, 32, 32)
    path, before = dfqvit.save(qmodel, tmp_path / "q.safetensors"), qmodel(images)
    assert torch.equal(dfqvit.load(path)(images), before)
    change(qmodel)
    assert not torch.allclose(qmodel(images), before, rtol=1e-2)
    with pytest.raises(dfqvit.UsageError, match=rf"qmodel was changed after it was quantized \({found}"):
        dfqvit.save(qmodel, tmp_path / "changed.safetensors")
    assert not (tmp_path / "changed.safetensors").exists()


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_before_quantizing_is_refused(seed, kind):
    make, change, found = CHANGES[kind]
    model = make()
    change(model)
    with pytest.raises(dfqvit.UsageError, match=rf"model differs from timm's .* \({found}"):
        quantized(model)


def test_what_does_nothing_in_eval_may_go(seed, tmp_path):
    model, images = rotary(), torch.randn(2, 3, 32, 32)
    model.pos_drop = nn.Identity()
    del model.blocks[0].drop_path1
    model.blocks[0].drop_path1 = nn.Dropout(0.3)
    model.patch_drop = None
    qmodel = quantized(model)
    assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))(images), qmodel(images))
