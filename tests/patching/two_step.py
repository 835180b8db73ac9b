"""The unfused model that `dfqvit.patch` is compared with: fake-quantize in two steps, in plain torch; and ten timm models."""

from __future__ import annotations

import copy
import re

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ..conftest import SMALL, _lively

VIT = SMALL["distilled"]
SWIN = SMALL["swin"]
MODELS = {
    "vit_tiny_patch16_224": {**VIT, "qk_norm": True, "scale_attn_norm": True},
    "vit_small_patch14_reg4_dinov2": {**VIT, "init_values": 0.5},  # register tokens, LayerScale
    "vit_base_patch32_clip_quickgelu_224": VIT,  # QuickGELU
    "vit_base_patch16_siglip_224": VIT,  # attention pooling, gelu_tanh in some
    "vit_giant_patch14_dinov2": {**VIT, "init_values": 0.5},  # gated MLPs
    "deit_tiny_patch16_224": {**VIT, "drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
    "deit_small_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": {**VIT, "init_values": 0.5},
    "swin_tiny_patch4_window7_224": {**SWIN, "drop_path_rate": 0.4},
    "swin_s3_tiny_224": {**SWIN, "img_size": 40},  # windows that need padding
}
LAYER = re.compile(r"(attn\.(qkv|proj|gate)|mlp\.(fc1|fc2|fc1_g|fc1_x)|downsample\.reduction)$")


def build(name, **kwargs):
    return _lively(timm.create_model(name, **{**MODELS[name], **kwargs}))


def images_for(model, count=2):
    parameter = next(model.parameters())
    return torch.randn(count, 3, *model.patch_embed.img_size, dtype=parameter.dtype)


class TwoStep(nn.Module):
    """Fake-quantize the input, fake-quantize the weight, multiply: nothing fused, nothing of dfqvit."""

    def __init__(self, linear, w_bits, a_bits):
        super().__init__()
        self.weight, self.bias, self.w_bits, self.a_bits, self.ends = linear.weight, linear.bias, w_bits, a_bits, None

    def forward(self, x):
        low, high = self.ends or (x.detach().min().float(), x.detach().max().float())
        steps = 2**self.a_bits - 1
        scale = (high.clamp(min=0) - low.clamp(max=0)) / steps
        zero = (-low.clamp(max=0) / scale).round().clamp(0, steps)
        half = 2 ** (self.w_bits - 1)
        w_scale = self.weight.detach().abs().amax(1, keepdim=True).float() / ((2**self.w_bits - 1) / 2)
        fake_x = fake(x, scale.to(x.dtype), zero.to(x.dtype), 0, steps)
        return F.linear(fake_x, fake(self.weight, w_scale.to(x.dtype), 0, -half, half - 1), self.bias)


def fake(value, scale, zero, low, high):
    """The straight-through estimator, written out: the gradient of `value` is 1 where it was not clamped, else 0."""
    q = (value.detach() / scale).round() + zero
    grid = (q.clamp(low, high) - zero) * scale
    return grid + (value - value.detach()) * ((q >= low) & (q <= high))


def two_step(model, w_bits, a_bits):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and LAYER.search(name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, TwoStep(module, w_bits, a_bits))
    return model


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else sum(y)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    """All there is to know about a model's modules: identity, class, and the identity of everything they hold."""
    return {
        name: (id(module), type(module), {k: v if k == "training" else id(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    }


def buffers(model):
    return {
        name: (tuple(module._buffers), set(module._non_persistent_buffers_set))
        for name, module in model.named_modules()
    }
