"""What each image classifier of transformers is in timm: the structure's name, its keywords, and the names of its tensors.

The names on the left are those of transformers 5; `OLD` turns those of 4 into them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm
from torch import nn

from ..errors import UsageError
from .concat_pool import dfqvit_vit_concat_pool

Renames = Iterable[tuple[str, Any]]
State = dict[str, torch.Tensor]

_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
_ACTIVATIONS |= {"relu": "relu", "silu": "silu", "swish": "silu"}

# Names of transformers 4 -> those of 5.
OLD = (
    (r"\.attention\.(?:attention|self)\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.attention\.self\.relative_position", ".attention.relative_position_bias.relative_position"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.gate_up."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
    (r"^(vit|deit)\.encoder\.layer\.", r"\1.layers."),
)
# Parts that timm keeps in one tensor, in its order.
JOINED = (("q_proj", "k_proj", "v_proj"), "qkv"), (("gate_proj", "up_proj"), "gate_up")
_VIT = (
    (r"^\w+?\.embeddings\.cls_token$", "cls_token"),
    (r"^\w+?\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^\w+?\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^\w+?\.(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:layernorm_before|norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|norm2)\.", ".norm2."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.gate_up\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^\w+?\.layernorm\.", "norm."),
    (r"^(?:cls_)?classifier\.", "head."),
)
_SWIN = (
    (r"^swin\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^swin\.embeddings\.norm\.", "patch_embed.norm."),
    (r"^swin\.encoder\.layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."),
    (r"^swin\.encoder\.layers\.", "layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"^swin\.layernorm\.", "norm."),
    (r"^classifier\.", "head.fc."),
)
_CONVNEXT = (
    (r"^convnext\.embeddings\.patch_embeddings\.", "stem.0."),
    (r"^convnext\.embeddings\.layernorm\.", "stem.1."),
    (r"^convnext\.encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^convnext\.encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.(weight|bias)$", r".norm.\1"),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^convnext\.norm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
)


@dataclass(frozen=True)
class Family:
    """One class of transformers: timm's name of the structure, its keywords by the configuration, and its tensors' names."""

    name: str
    keywords: Callable[[Any], dict[str, Any]]
    renames: Renames
    also: Callable[[State], None] = lambda state: None  # what names alone do not say, in place


def _activation(config: Any) -> str:
    if config.hidden_act not in _ACTIVATIONS:
        raise UsageError(f"model has the activation '{config.hidden_act}'; it may be {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[config.hidden_act]


def _ratio(hidden: int, width: int) -> float:
    """What timm makes `hidden` channels of: it takes the whole part of the product with `width`."""
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _vit(config: Any, **more: Any) -> dict[str, Any]:
    width = config.hidden_size
    hidden = getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio)
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": config.qkv_bias,
        "norm_layer": functools.partial(LayerNorm, eps=config.layer_norm_eps),
        "act_layer": _activation(config),
        **more,
    }


def _dinov2(config: Any) -> dict[str, Any]:
    registers = getattr(config, "num_register_tokens", 0)
    found = _vit(config, init_values=1.0, reg_tokens=registers, no_embed_class=True)
    if config.use_swiglu_ffn:
        hidden = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        packed = functools.partial(GluMlp, gate_last=False)
        found |= {"mlp_layer": packed, "act_layer": "silu", "mlp_ratio": _ratio(2 * hidden, config.hidden_size)}
    return found


def _swin(config: Any) -> dict[str, Any]:
    if config.use_absolute_embeddings or config.hidden_act != "gelu":
        raise UsageError("model was a Swin with absolute position embeddings or without GELU; timm's has neither")
    names = ("window_size", "mlp_ratio", "qkv_bias", "embed_dim", "depths", "num_heads", "patch_size")
    norm = functools.partial(nn.LayerNorm, eps=config.layer_norm_eps)
    return {name: getattr(config, name) for name in names} | {
        "img_size": config.image_size,
        "in_chans": config.num_channels,
        "norm_layer": norm,
    }


def _convnext(config: Any) -> dict[str, Any]:
    return {
        "in_chans": config.num_channels,
        "patch_size": config.patch_size,
        "depths": config.depths,
        "dims": config.hidden_sizes,
        "ls_init_value": config.layer_scale_init_value if config.layer_scale_init_value > 0 else None,
        "act_layer": _activation(config),
    }


def _register_tokens(state: State) -> None:
    """DINOv2 gives the class token a position, and the registers none: timm adds none to either."""
    positions = state["pos_embed"]
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]


_DISTILLATION = r"^deit\.embeddings\.distillation_token$"
_REGISTERS = ((r"^\w+?\.embeddings\.register_tokens$", "reg_token"), *_VIT)
TWINS = {
    "ViTForImageClassification": Family("vit_base_patch16_224", _vit, _VIT),
    # Its class token alone is read out; the other one is a register then.
    "DeiTForImageClassification": Family(
        "deit_base_patch16_224", functools.partial(_vit, reg_tokens=1), ((_DISTILLATION, "reg_token"), *_VIT)
    ),
    "DeiTForImageClassificationWithTeacher": Family(
        "deit_base_distilled_patch16_224",
        _vit,
        ((_DISTILLATION, "dist_token"), (r"^distillation_classifier\.", "head_dist."), *_VIT),
    ),
    "SwinForImageClassification": Family("swin_tiny_patch4_window7_224", _swin, _SWIN),
    "Dinov2ForImageClassification": Family(dfqvit_vit_concat_pool.__name__, _dinov2, _VIT, _register_tokens),
    "Dinov2WithRegistersForImageClassification": Family(
        dfqvit_vit_concat_pool.__name__, _dinov2, _REGISTERS, _register_tokens
    ),
    "ConvNextForImageClassification": Family("convnext_tiny", _convnext, _CONVNEXT),
}
