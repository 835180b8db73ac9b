"""The embedded models: a small DeiT-like ViT (`demo`) and a small Swin (`demo-swin`), trained on Fashion-MNIST.

They are ordinary timm models, registered under `dfqvit_demo_vit` and `dfqvit_demo_swin`, so that every command that takes a timm
name takes them too. `scripts/train_demo.py` trains them; the weights and the test images ship in `dfqvit/models/assets`.
Fashion-MNIST is by Zalando Research, MIT licence (arXiv 1708.07747).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import SwinTransformer, VisionTransformer, register_model

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = {
    "dfqvit_demo_vit": ASSETS / "demo_vit.safetensors",
    "dfqvit_demo_swin": ASSETS / "demo_swin.safetensors",
}
ALIASES = {"demo": "dfqvit_demo_vit", "demo-swin": "dfqvit_demo_swin"}
TEST_IMAGES = (
    ASSETS / "fashion_mnist_test.npz"
)  # images uint8 [10000, 1, 28, 28], labels int64 [10000]: the whole test split
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


@register_model
def dfqvit_demo_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT's structure at 0.45 M parameters: 28 x 28 grey images, patches of 4, 4 blocks of 96 channels, 3 heads."""
    defaults = {
        "img_size": 28,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
    }
    return _build(VisionTransformer, _config("dfqvit_demo_vit", "patch_embed.proj", "head"), defaults, kwargs)


@register_model
def dfqvit_demo_swin(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Swin's structure at 0.30 M parameters: 14 x 14 then 7 x 7 tokens, windows of 7 (shifted in the first stage), 2 + 2 blocks."""
    defaults = {
        "img_size": 28,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 48,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 7,
    }
    return _build(SwinTransformer, _config("dfqvit_demo_swin", "patch_embed.proj", "head.fc"), defaults, kwargs)


__all__ = ["ALIASES", "ASSETS", "CLASSES", "TEST_IMAGES", "TRAIN_SAMPLE", "WEIGHTS"]
