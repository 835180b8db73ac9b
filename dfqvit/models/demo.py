"""The embedded models, trained on Fashion-MNIST: a small DeiT-like ViT (`demo`), a small Swin (`demo-swin`), a small DeiT III
(`demo-deit3`) and a small ConvNeXt (`demo-convnext`).

They are ordinary timm models, registered under `dfqvit_demo_vit` and so on, so that every command that takes a timm name takes
them too. `scripts/train_demo.py` trains them; the weights and the test images ship in `dfqvit/models/assets`.
Fashion-MNIST is by Zalando Research, MIT licence (arXiv 1708.07747).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import ConvNeXt, SwinTransformer, VisionTransformer, register_model

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = {
    "dfqvit_demo_vit": ASSETS / "demo_vit.safetensors",
    "dfqvit_demo_swin": ASSETS / "demo_swin.safetensors",
    "dfqvit_demo_deit3": ASSETS / "demo_deit3.safetensors",
    "dfqvit_demo_convnext": ASSETS / "demo_convnext.safetensors",
}
ALIASES = {
    "demo": "dfqvit_demo_vit",
    "demo-swin": "dfqvit_demo_swin",
    "demo-deit3": "dfqvit_demo_deit3",
    "demo-convnext": "dfqvit_demo_convnext",
}
# The whole test split: images uint8 [10000, 1, 28, 28], labels int64 [10000].
TEST_IMAGES = ASSETS / "fashion_mnist_test.npz"
TRAIN_SAMPLE = ASSETS / "fashion_mnist_train64.npz"  # 64 training images, for the comparison with real-data calibration
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _config(architecture: str, first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "num_classes": len(CLASSES),
        "input_size": (1, 28, 28),
        "mean": (0.2860,),
        "std": (0.3530,),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
    }


def _build(cls: type, config: dict[str, Any], defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    for timm_internal in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(timm_internal, None)
    model = cls(**{**defaults, **kwargs})
    model.pretrained_cfg = model.default_cfg = config
    return model


_GREY: dict[str, Any] = {"in_chans": 1, "num_classes": 10}
_VIT: dict[str, Any] = {**_GREY, "img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}


@register_model
def dfqvit_demo_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT's structure at 0.45 M parameters: 28 x 28 grey images, patches of 4, 4 blocks of 96 channels, 3 heads."""
    return _build(VisionTransformer, _config("dfqvit_demo_vit", "patch_embed.proj", "head"), _VIT, kwargs)


@register_model
def dfqvit_demo_swin(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin's structure at 0.30 M parameters: 14 x 14 then 7 x 7 tokens, windows of 7 (shifted in the first stage), 2 + 2 blocks."""
    sizes = {"img_size": 28, "patch_size": 2, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4), "window_size": 7}
    config = _config("dfqvit_demo_swin", "patch_embed.proj", "head.fc")
    return _build(SwinTransformer, config, {**_GREY, **sizes}, kwargs)


@register_model
def dfqvit_demo_deit3(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT III's structure at 0.45 M parameters: that of `dfqvit_demo_vit` with LayerScale, and with four registers."""
    more = {"no_embed_class": True, "reg_tokens": 4, "init_values": 0.1}
    config = _config("dfqvit_demo_deit3", "patch_embed.proj", "head")
    return _build(VisionTransformer, config, {**_VIT, **more}, kwargs)


@register_model
def dfqvit_demo_convnext(pretrained: bool = False, **kwargs: Any) -> ConvNeXt:
    """ConvNeXt's structure at 0.55 M parameters: 28 x 28, 14 x 14, 7 x 7 and 3 x 3 pixels; 1, 1, 3 and 1 blocks."""
    sizes = {"patch_size": 1, "depths": (1, 1, 3, 1), "dims": (24, 48, 96, 160), "ls_init_value": 0.1}
    return _build(ConvNeXt, _config("dfqvit_demo_convnext", "stem.0", "head.fc"), {**_GREY, **sizes}, kwargs)


__all__ = ["ALIASES", "ASSETS", "CLASSES", "TEST_IMAGES", "TRAIN_SAMPLE", "WEIGHTS"]
