"""Subclasses of timm's ViT, registered by the user: layers that are shared, read, unused or called elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import VisionTransformer, _registry
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.utils import weight_norm

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.equalize import equalize
from dfqvit.calibration.rotate import rotate_heads
from dfqvit.errors import UsageError
from dfqvit.quantization.layers import QuantLinear
from dfqvit.quantization.recipe import Recipe

from ..conftest import SMALL, _lively


class Fused(Attention):
    """Reads the weight of qkv itself, in three parts."""

    def forward(self, x: torch.Tensor, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        heads = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for weight, bias in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        )
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class FusedBlock(Block):
    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.attn = Fused(dim, num_heads, qkv_bias=True)


class Reading(VisionTransformer):
    """Calls a norm of a block at a further place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.forward_features(x)
        return self.forward_head(tokens + self.blocks[0].norm2(tokens))


class Values(VisionTransformer):
    """Of its last attention it calls the layers alone, as MaskCLIP does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, last = self.blocks[:-1](self._pos_embed(self.patch_embed(x))), self.blocks[-1]
        return self.forward_head(self.norm(last.attn.proj(last.attn.qkv(last.norm1(x)).chunk(3, -1)[2])))


def _shared_layer(model: Any) -> None:
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    model.blocks[1].attn.qkv = model.blocks[0].attn.qkv


def _tied_weight(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight


def _unused(model: Any) -> None:
    model.auxiliary = nn.Linear(48, 5)


def _normed_head(model: Any) -> None:
    model.head = weight_norm(model.head)


@pytest.fixture
def registered(monkeypatch):
    """Makes a model by an entrypoint of the user's own, which timm knows during one test; some of its channels are wide."""

    def made(kind: Any = VisionTransformer, change: Any = None, **options: Any) -> Any:
        def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            model = kind(**{**SMALL["distilled"], **options})
            if change is not None:
                change(model)
            model.pretrained_cfg = {"architecture": "own_vit", "mean": (0.5,) * 3, "std": (0.5,) * 3}
            return model

        entrypoint.__module__ = __name__
        monkeypatch.setitem(_registry._model_entrypoints, "own_vit", entrypoint)
        model: Any = _lively(timm.create_model("own_vit"))
        with torch.no_grad():
            for block in model.blocks:
                for norm in (block.norm1, block.norm2):
                    norm.weight[torch.randperm(48)[:2]] *= 60
        return model

    return made


@pytest.mark.parametrize(
    ("options", "floats"),
    [
        ({"change": _shared_layer}, {"blocks.0.mlp.fc1", "blocks.0.attn.qkv"}),
        ({"change": _tied_weight}, {"blocks.1.mlp.fc1", "blocks.0.attn.qkv"}),
        ({"block_fn": FusedBlock}, {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}),
        ({"change": _unused}, {"auxiliary"}),
        ({"change": _normed_head}, {"head"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@torch.no_grad()
def test_layers_that_are_not_one_layers_own_stay_float(seed, registered, options, floats):
    model, images = registered(**options), torch.randn(2, 3, 32, 32)
    wanted = model(images)
    qmodel = convert(model, Recipe(8))
    layers = {name for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}
    assert not floats & layers
    assert {"blocks.0.attn.proj", "blocks.1.mlp.fc2", "patch_embed.proj"} <= layers
    equalize(qmodel, images)
    rotate_heads(qmodel)
    assert (qmodel(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
def test_a_file_of_a_model_with_layers_that_are_not_called(seed, registered, tmp_path):
    qmodel = dfqvit.quantize(registered(change=_unused), 8, samples=2, calib="noise", rounding="nearest")
    images = torch.randn(2, 3, 32, 32)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert torch.equal(loaded(images), qmodel(images))


def test_a_norm_that_a_subclass_reads_elsewhere_is_not_scaled_without_a_word(seed, registered):
    model = registered(Reading)
    with pytest.raises(UsageError, match=r"scaling was 'channels' and the model a Reading, .* it may be 'none'"):
        calibrate(convert(model, Recipe(8)), torch.randn(4, 3, 32, 32), Recipe(8))


def test_a_part_that_is_never_called_is_named_before_the_work(seed, registered, monkeypatch):
    model = registered(Values)
    monkeypatch.setattr("dfqvit.api.calibration_images", None)
    with pytest.raises(
        UsageError, match=r"model was a Values that never calls 'blocks\.1\.attn' for an image; take that"
    ):
        dfqvit.quantize(model, 8, samples=2, iters=2)


def test_a_class_that_is_made_anew_in_each_call_is_named(seed, registered):
    def local(**options: Any) -> nn.Module:
        class Local(VisionTransformer):
            pass

        return Local(**options)

    with pytest.raises(
        UsageError, match=r"the model is a Local here and a Local there: its class is made anew in each"
    ):
        dfqvit.quantize(registered(local), calib="noise", samples=2)
