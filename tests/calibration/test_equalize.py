"""Channels made alike: what the model computes stays, what it loses to rounding falls."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

import dfqvit
from dfqvit.calibration import convert
from dfqvit.calibration.equalize import candidates, equalize
from dfqvit.calibration.fisher import Side
from dfqvit.errors import UsageError
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.quantization.quantizers import ActivationQuantizer
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime.record import QuantizationRecord
from dfqvit.studies.diagnosis import layer_divergence

from ..conftest import SMALL, small_swin, small_vit

KWARGS = SMALL["vit"]


FAMILIES = (
    "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_base_patch16_rope_224", "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
)  # fmt: skip


def small(name: str) -> Any:
    """A small model of one of FAMILIES whose norms and biases differ from channel to channel."""
    model = timm.create_model(name, pretrained=False, **KWARGS).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            values = torch.randn_like(parameter)
            if "gamma" in parameter_name or ".ls" in parameter_name:
                parameter.copy_(0.3 + 0.5 * values.abs())
            elif parameter.dim() == 1:
                parameter.add_(0.2 * values)
            elif "token" in parameter_name or "table" in parameter_name or "pos_embed" in parameter_name:
                parameter.copy_(values)
            else:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
    return model


def quantized(model: nn.Module, w_bits: int, a_bits: int, images: torch.Tensor, **settings: Any) -> Any:
    settings = {"rounding": "nearest", "model_kwargs": KWARGS, **settings}
    return dfqvit.quantize(model, w_bits, a_bits, calib=images, **settings)


@torch.no_grad()
def widen(model: Any, factor: float, channels: int = 3) -> None:
    """A few channels `factor` times wider in every norm, value and query; the function stays what it was."""
    for block in (module for module in model.modules() if hasattr(module, "norm1")):
        for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            chosen = torch.randperm(len(norm.weight))[:channels]
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            layer.weight[:, chosen] /= factor
        width = block.attn.proj.in_features
        chosen, attention = torch.randperm(width)[:channels], block.attn
        separate = getattr(attention, "q_bias", None) is not None
        bias = torch.zeros(3 * width) if separate or attention.qkv.bias is None else attention.qkv.bias
        attention.qkv.weight[2 * width + chosen] *= factor
        attention.proj.weight[:, chosen] /= factor
        bias[2 * width + chosen] *= factor
        if separate:
            attention.v_bias[chosen] *= factor
        if isinstance(attention, (AttentionRope, EvaAttention)):
            continue  # rotations mix the channels of queries, and of keys
        attention.qkv.weight[chosen] *= factor
        attention.qkv.weight[width + chosen] /= factor
        bias[chosen] *= factor
        bias[width + chosen] /= factor
        if separate:
            attention.q_bias[chosen] *= factor


@torch.no_grad()
def add_massive(model: Any, block: int, size: float = 300.0) -> None:
    """A hidden channel that the class token alone drives to about `size`, as pretrained models grow them; fc2 ignores it."""
    images = torch.randn(8, *Preprocessing.of(model).input_size)
    seen: list[torch.Tensor] = []
    mlp = model.blocks[block].mlp
    handle = mlp.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    handle.remove()
    first, others = seen[0][:, 0].mean(0), seen[0][:, 1:].mean((0, 1))
    direction = first - others
    gap = float((first - others) @ direction)
    channel = int(mlp.fc2.weight.norm(dim=0).argmin())
    mlp.fc1.weight[channel] = direction * (2 * size / gap)
    mlp.fc1.bias[channel] = -float((first + others) / 2 @ direction) * (2 * size / gap)
    mlp.fc2.weight[:, channel] = 0


def divergence(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return divergence_of(model(images), other(images))


def divergence_of(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Of logits."""
    wanted, found = (each.float().log_softmax(1) for each in (wanted, found))
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


@pytest.mark.parametrize("a_bits", [4, 8])
@pytest.mark.parametrize("make", [small_vit, small_swin, *FAMILIES])
def test_the_function_stays(make: Any, a_bits: int, seed: int) -> None:
    model = make() if callable(make) else small(make)
    widen(model, 100.0)
    images = torch.randn(6, 3, 32, 32)
    qmodel = convert(model, Recipe(8, a_bits))
    changed = equalize(qmodel, images)
    assert any("norm1" in site for site in changed)
    with torch.no_grad():
        wanted, found = model(images), qmodel(images)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("family", ["", *FAMILIES])
def test_wide_channels_cost_nothing(seed: int, family: str) -> None:
    model = small(family) if family else small_vit()
    plain = copy.deepcopy(model)
    widen(model, 300.0)
    if not family:
        add_massive(model, 1)
    images, settings = torch.randn(16, 3, 32, 32), {"model_kwargs": None} if family else {}
    base = quantized(plain, 8, 8, images, scaling="none", **settings)
    before = quantized(model, 8, 8, images, scaling="none", **settings)
    after = quantized(model, 8, 8, images, **settings)
    assert set(dfqvit.integer_report(after).values()) == {""}
    fresh = torch.randn(16, 3, 32, 32)
    lost = [divergence(*pair, fresh) for pair in ((plain, base), (model, before), (model, after))]
    assert lost[2] < 0.1 * lost[1]
    assert lost[2] < (5 if family else 3) * lost[0]


def test_a_scaled_model_runs_in_integers_and_comes_back_from_its_file(seed: int, tmp_path: Path) -> None:
    model = small_vit()
    with torch.no_grad():  # one hidden channel far beyond the others, and of use
        model.blocks[1].mlp.fc1.bias[5] = 200.0
        model.blocks[1].mlp.fc2.weight[:, 5] *= 0.01
    images = torch.randn(16, 3, 32, 32)
    qmodel = quantized(model, 8, 8, images)
    exponents = qmodel.blocks[1].mlp.fc2.exponents
    assert exponents.dtype == torch.int8
    assert exponents[5] == exponents.max() > 2
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    for runtime in ("simulated", "integer"):
        loaded = dfqvit.load(path, runtime=runtime)
        with torch.no_grad():
            found = loaded(images)
        assert divergence(model, loaded, images) < 1e-3
        assert (found - qmodel(images)).abs().max() < 0.05 * found.abs().max()
    assert torch.equal(dfqvit.load(path)(images), qmodel(images))
    assert max(layer_divergence(model, dfqvit.load(path, runtime="simulated"), images).values()) < 0.01


def test_factors_are_exact_powers_of_two() -> None:
    layer: Any = convert(small_vit(), Recipe()).blocks[0].mlp.fc2
    layer.exponents = torch.arange(-96, 96, dtype=torch.int8)
    assert torch.equal(layer.factor.double(), 2.0 ** torch.arange(-96, 96, dtype=torch.float64))


def test_candidates_bring_far_channels_in() -> None:
    high = torch.ones(64)
    high[7] = 200
    tried = list(candidates(-torch.ones(64), high))
    assert torch.equal(tried[0], torch.ones(64))
    assert any(float((high / factor).max()) <= 8 and float(factor[0]) == 1 for factor in tried)


def test_a_range_is_searched_by_what_errors_cost(seed: int) -> None:
    values = torch.randn(400, 8)
    values[0] = 100.0  # a massive token, whose errors cost nothing
    cost = torch.ones_like(values)
    cost[0] = 0
    side = Side(values, cost, values.amin(0), values.amax(0), 4, 1.0)
    site = ActivationQuantizer(4, "mse")
    side.fit(site)
    site.observe(values)
    low, high = site.range.ends()
    assert 0 < high < 10
    assert low < 0


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="scaling was 'rows'; it may be 'none', 'channels'"):
        Recipe(scaling="rows")
    with pytest.raises(UsageError, match="it is for 'gemm' and 'mse'"):
        Recipe(placement="psaq", scaling="channels")
    with pytest.raises(UsageError, match="softmax_bits was 9"):
        Recipe(softmax_bits=9)
    with pytest.raises(UsageError, match="softmax_bits was 4 and placement 'psaq'"):
        Recipe(placement="psaq", softmax_bits=4)


def test_edges_keep_more_bits_and_old_files_theirs(seed: int) -> None:
    assert Recipe(4, 4).edge_a_bits == 8
    assert Recipe(4, 4, edge_bits=4).edge_a_bits == 4
    assert Recipe(4, 4, placement="psaq").edge_a_bits == 4
    images = torch.randn(4, 3, 32, 32)
    record: QuantizationRecord = quantized(small_vit(), 4, 4, images).dfqvit_record  # type: ignore[assignment]
    assert QuantizationRecord.from_dict(record.to_dict()) == record
    old = record.to_dict()
    for name in ("edge_a_bits", "scaling", "softmax_bits"):
        del old["recipe"][name]
    expected = dataclasses.replace(record.recipe, edge_a_bits=4, scaling="none")
    assert QuantizationRecord.from_dict(old).recipe == expected


def test_bits_of_probabilities_that_no_attention_has_are_refused(seed: int) -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    with pytest.raises(UsageError, match=r"softmax_bits was 6; this ConvNeXt has no attention .*, so it may be 8"):
        dfqvit.quantize(model, 8, calib="noise", samples=2, softmax_bits=6, rounding="nearest")


def test_fewer_bits_of_probabilities(seed: int, tmp_path: Path) -> None:
    model, images = small_vit(), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:96] *= 4  # scores that differ
    losses = []
    for bits in (8, 3, 2):
        qmodel = quantized(model, 8, 8, images, softmax_bits=bits, runtime="integer")
        loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / f"{bits}.safetensors"), runtime="integer")
        assert torch.equal(loaded(images), qmodel(images))
        losses.append(divergence(model, qmodel, images))
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_real_weights_at_8_bits(data: Path, name: str, seed: int) -> None:
    """The norms' gains times up to 300 in a few channels, and a massive class token: W8/A8 loses no more than before."""
    model = load_model(name, data / f"{name}.in1k.safetensors")
    widen(model, 300.0)
    add_massive(model, 6)
    preprocessing = Preprocessing.of(model)
    images = spread_images(open_images(data / "imagenet500", preprocessing, data / "imagenet_wnids.txt"), 56)
    qmodel = dfqvit.quantize(model, 8, 8, calib=images[::7], rounding="nearest", preprocessing=preprocessing)
    held = images[torch.arange(56) % 7 != 0]
    with torch.no_grad():
        wanted, found = model(held), qmodel(held)
    assert (wanted.argmax(1) == found.argmax(1)).float().mean() > 0.9
    assert divergence_of(wanted, found) < 0.03
