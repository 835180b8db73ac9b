"""Every attention that dfqvit knows: in float as timm's own, quantized near it, in integers as simulated."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Attention, AttentionRope, LayerNorm, RelPosBias, RmsNorm
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as FastVitAttention
from timm.models.gcvit import WindowAttentionGlobal
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.metaformer import Attention as MetaFormerAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from timm.models.vision_transformer_sam import Attention as SamAttention
from torch import nn

from dfqvit.errors import UsageError
from dfqvit.models.adapters.generic import GenericAdapter
from dfqvit.models.adapters.products import KNOWN, quantize_products
from dfqvit.quantization.attention import AttentionOperands
from dfqvit.runtime.attention import IntegerOperands

CHANNELS = 48


def turns(tokens, *heads):
    angles = torch.rand(*heads, tokens, CHANNELS // 3) * 6
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def window_mask(windows, tokens):
    return torch.where(torch.rand(windows, tokens, tokens) < 0.3, -100.0, 0.0)


def attentions():
    """{name: (attention, x, further arguments)}; three heads of 16 channels."""
    tokens = torch.randn(2, 13, CHANNELS)
    windows = torch.randn(8, 12, CHANNELS)
    small = {"dim": CHANNELS, "num_heads": 3}
    relative = {"rel_pos_cls": lambda num_heads, **_: RelPosBias((3, 4), num_heads=num_heads)}
    grid, wide = windows.view(8, 3, 4, CHANNELS), windows.view(8, 3, 4, CHANNELS).permute(0, 3, 1, 2)
    sixteen = {"dim": CHANNELS, "dim_head": 16}
    hiera = {"dim": CHANNELS, "dim_out": CHANNELS, "heads": 3}
    return {
        "plain": (Attention(**small, qkv_bias=True), tokens, {}),
        "norms": (Attention(**small, qk_norm=True, scale_norm=True, norm_layer=LayerNorm), tokens, {}),
        "gated, masked": (Attention(**small, gated=True), tokens, {"attn_mask": torch.rand(13, 13) < 0.8}),
        "a mask for each image": (Attention(**small), tokens, {"attn_mask": torch.randn(2, 1, 13, 13)}),
        "rope": (AttentionRope(**small), tokens, {"rope": turns(12)}),
        "rope, halves": (AttentionRope(**small, rotate_half=True), tokens, {"rope": turns(12)}),
        "rope, grouped": (
            AttentionRope(**small, qkv_fused=False, num_kv_heads=1, qk_norm=True, norm_layer=RmsNorm),
            tokens,
            {"rope": turns(12)},
        ),
        "rope, of each head": (AttentionRope(**small, qkv_fused=False), tokens, {"rope": turns(12, 3)}),
        "parallel": (ParallelScalingBlock(**small), tokens, {}),
        "parallel, apart": (ParallelScalingBlock(**small, qkv_bias=True, fuse_out_proj=True), tokens, {}),
        "eva": (EvaAttention(**small, scale_norm=False), tokens, {"rope": turns(12)}),
        "eva, apart": (EvaAttention(**small, qkv_fused=False, norm_layer=LayerNorm), tokens, {"rope": turns(12)}),
        "eva, none": (EvaAttention(**small, scale_norm=False), tokens, {}),
        "beit": (BeitAttention(**small, qkv_bias=True, window_size=(3, 4)), tokens, {}),
        "beit, shared": (
            BeitAttention(**small, qkv_bias=True),
            tokens,
            {"shared_rel_pos_bias": torch.randn(1, 3, 13, 13)},
        ),
        "relative": (RelPosAttention(**small, **relative), windows, {}),
        "sam": (SamAttention(**small, use_rel_pos=True, input_size=(3, 4)), windows.view(8, 3, 4, CHANNELS), {}),
        "swin": (WindowAttention(**small, window_size=(3, 4)), windows, {"mask": window_mask(4, 12)}),
        "swin, whole": (WindowAttention(**small, window_size=(3, 4)), windows, {}),
        "swin v2": (WindowAttentionV2(**small, window_size=(3, 4)), windows, {"mask": window_mask(4, 12)}),
        "swin v2, whole": (WindowAttentionV2(**small, window_size=(3, 4)), windows, {}),
        "channels last": (AttentionCl(**sixteen, **relative), grid, {}),
        "channels last, kinds first": (AttentionCl(**sixteen, dim_out=96, head_first=False), grid, {}),
        "channels first": (Attention2d(**sixteen, **relative), wide, {}),
        "channels first, kinds first": (
            Attention2d(**sixteen, head_first=False),
            wide,
            {"shared_rel_pos": torch.randn(1, 3, 12, 12)},
        ),
        "caformer": (MetaFormerAttention(CHANNELS, head_dim=16), tokens, {}),
        "fastvit": (FastVitAttention(CHANNELS, head_dim=16), wide, {}),
        "hiera": (MaskUnitAttention(**hiera), windows, {}),
        "hiera, pooled": (MaskUnitAttention(**hiera, q_stride=4), windows, {}),
        "hiera, units": (MaskUnitAttention(**hiera, window_size=3, use_mask_unit_attn=True), windows, {}),
        "hiera, pooled units": (
            MaskUnitAttention(**hiera, q_stride=2, window_size=2, use_mask_unit_attn=True),
            windows,
            {},
        ),
        "sam 2": (MultiScaleAttention(CHANNELS, CHANNELS, 3), grid, {}),
        "sam 2, pooled": (
            MultiScaleAttention(CHANNELS, 96, 6, q_pool=nn.MaxPool2d(2, 2)),
            torch.randn(2, 6, 4, CHANNELS),
            {},
        ),
        "tiny vit": (TinyVitAttention(CHANNELS, 16, num_heads=3, attn_ratio=1, resolution=(3, 4)), windows, {}),
        "tiny vit, wide values": (
            TinyVitAttention(CHANNELS, 16, num_heads=3, attn_ratio=2, resolution=(3, 4)),
            windows,
            {},
        ),
        "gc vit": (WindowAttentionGlobal(**small, window_size=(3, 4), use_global=False), windows, {}),
        "gc vit, global": (
            WindowAttentionGlobal(**small, window_size=(3, 4)),
            windows,
            {"q_global": torch.randn(2, 12, CHANNELS)},
        ),
    }


NAMES = [
    "channels last", "channels last, kinds first", "channels first", "channels first, kinds first", "caformer", "fastvit",
    "hiera", "hiera, pooled", "hiera, units", "hiera, pooled units", "sam 2", "sam 2, pooled", "tiny vit",
    "tiny vit, wide values", "gc vit", "gc vit, global",
    "parallel", "parallel, apart", "rope, of each head",
    "plain", "norms", "gated, masked", "a mask for each image", "rope", "rope, halves", "rope, grouped", "eva",
    "eva, apart", "eva, none", "beit", "beit, shared", "relative", "sam", "swin", "swin, whole", "swin v2", "swin v2, whole",
]  # fmt: skip
SIMULATED = ("sam", "a mask for each image", "tiny vit, wide values")  # which no integer operator has


@pytest.fixture(params=NAMES)
def case(request, seed):
    """(name, timm's attention with values that matter, its quantized twin, x, further arguments)."""
    made = attentions()
    assert sorted(made) == sorted(NAMES)
    attention, x, options = made[request.param]
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    model = nn.Sequential(copy.deepcopy(attention))
    GenericAdapter(model).prepare()
    quantize_products(model, 8, "minmax")
    for each in (attention, model):
        each.eval()  # gives None of TinyViT's
    return request.param, attention, model[0], x, options


@torch.no_grad()
def test_in_float_they_are_timms_own(case):
    _, attention, twin, x, options = case
    assert type(twin) is KNOWN[type(attention)]
    torch.testing.assert_close(twin(x, **options), attention(x, **options), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_quantized_near_float_and_in_integers_as_simulated(case, isa):
    name, attention, twin, x, options = case
    wanted = attention(x, **options)
    twin(x, **options)
    for site in (twin.operands.q, twin.operands.k, twin.operands.v):
        site.freeze()
    simulated = twin(x, **options)
    assert 0 < float((simulated - wanted).norm() / wanted.norm()) < 0.05
    assert IntegerOperands.why_not(twin.operands) == ""
    IntegerOperands.take(twin.operands)
    found = twin(x, **options)
    assert found.dtype == torch.float32
    assert float((found - simulated).norm() / simulated.norm()) < (1e-12 if name in SIMULATED else 5e-3)


def test_a_gradient_comes_by_the_simulated_way(case):
    _, _, twin, x, options = case
    with torch.no_grad():
        twin(x, **options)
    for site in (twin.operands.q, twin.operands.k, twin.operands.v):
        site.freeze()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    twin(theirs, **options).square().sum().backward()
    IntegerOperands.take(twin.operands)
    twin(ours, **options).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert float(ours.grad.abs().sum()) > 0


class Thinned(nn.Module):
    """Of the probabilities [B, heads, N, M] some zero, others two or four times as large, by their places."""

    def forward(self, x):
        return x * (torch.arange(x.shape[1:].numel()) * 7 % 3 * 2).view(x.shape[1:])


@pytest.mark.parametrize("way", ["hook", "module", "training"])
@torch.no_grad()
def test_what_the_probabilities_go_through_counts(case, way):
    """timm calls its attn_drop where attention is not fused; who looks at probabilities or changes them puts something there."""
    _, attention, twin, x, options = case
    if type(attention) in (MaskUnitAttention, MultiScaleAttention, TinyVitAttention):  # which have none
        return
    plain, fuses = attention(x, **options), hasattr(attention, "fused_attn")
    for each in (attention, twin):
        each.fused_attn = False
        if way == "hook":
            each.attn_drop.register_forward_hook(lambda module, given, found: Thinned()(found))
        elif way == "module":
            each.attn_drop = Thinned()
        else:
            each.attn_drop = nn.Dropout(0.5).train()

    def drawn(module):
        torch.manual_seed(5)
        return module(x, **options)

    wanted = drawn(attention)
    assert float((wanted - plain).norm() / plain.norm()) > 0.1
    torch.testing.assert_close(drawn(twin), wanted, rtol=1e-4, atol=1e-5)
    for site in (twin.operands.q, twin.operands.k, twin.operands.v):
        site.freeze()
    simulated = drawn(twin)
    assert 0 < float((simulated - wanted).norm() / wanted.norm()) < 0.05
    IntegerOperands.take(twin.operands)
    assert torch.equal(drawn(twin), simulated)
    if fuses and way != "training":  # where attention is fused, timm calls nothing in between
        attention.fused_attn = twin.fused_attn = True
        fused = attention(x, **options)
        assert float((drawn(twin) - fused).norm() / fused.norm()) < 0.05


def test_the_softmax_of_swin_is_not_hooked_without_a_word(seed):
    """A quantized attention does not call it; where it is fused, nor does timm."""
    attention, x, options = attentions()["swin"]
    attention.fused_attn = False
    twin = nn.Sequential(attention)
    quantize_products(twin, 8, "minmax")
    hook = attention.softmax.register_forward_hook(lambda module, given, found: 0.5 * found)
    with pytest.raises(
        UsageError, match=r"the softmax of a QuantWindowAttention was hooked .* put that on its attn_drop"
    ):
        attention(x, **options)
    hook.remove()
    attention(x, **options)


def test_every_class_is_tried(seed):
    assert {type(attention) for attention, _, _ in attentions().values()} == set(KNOWN)


def test_what_does_not_run_in_integers_says_why(seed):
    operands = AttentionOperands(8, "minmax")
    assert IntegerOperands.why_not(operands) == "its attention's operands are not quantized alike"
    for site in (operands.q, operands.k, operands.v):
        site.frozen = True
    operands.steps = 15
    assert IntegerOperands.why_not(operands) == "its attention's probabilities have fewer than 8 bits"
    operands.steps, operands.k.bits = 255, 4
    assert IntegerOperands.why_not(operands) == "its attention's operands are not quantized alike"
    operands.__class__ = type("Other", (AttentionOperands,), {})
    assert IntegerOperands.why_not(operands) == "its products are those of a Other"
