"""Small models with weights that matter, for the tests of checkpoints."""

from __future__ import annotations

import numpy as np
import timm
import torch

from dfqvit.models import load_model

from .. import conftest

DEMO = "dfqvit_demo_vit"
SMALL = conftest.SMALL["distilled"]
VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
SWIN_SMALL = {"img_size": 56, "embed_dim": 12, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "num_classes": 7}


def created(name, seed=None, **kwargs):
    if seed is not None:
        torch.manual_seed(seed)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def loaded(path, name=VIT, kwargs=SMALL, **options):
    return load_model(name, path, model_kwargs=kwargs, **options)


def same(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def jax_arrays(model):
    def put(prefix, layer, transpose=True):
        found[f"{prefix}/kernel"] = layer.weight.detach().numpy().T if transpose else layer.weight.detach().numpy()
        found[f"{prefix}/bias"] = layer.bias.detach().numpy()

    def norm(prefix, layer):
        found[f"{prefix}/scale"], found[f"{prefix}/bias"] = layer.weight.detach().numpy(), layer.bias.detach().numpy()

    found = {
        "embedding/kernel": model.patch_embed.proj.weight.detach().permute(2, 3, 1, 0).numpy(),
        "embedding/bias": model.patch_embed.proj.bias.detach().numpy(),
        "cls": model.cls_token.detach().numpy(),
        "Transformer/posembed_input/pos_embedding": model.pos_embed.detach().numpy(),
    }
    put("head", model.head)
    norm("Transformer/encoder_norm", model.norm)
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    for index, block in enumerate(model.blocks):
        prefix = f"Transformer/encoderblock_{index}"
        norm(f"{prefix}/LayerNorm_0", block.norm1)
        norm(f"{prefix}/LayerNorm_2", block.norm2)
        attention = f"{prefix}/MultiHeadDotProductAttention_1"
        for part, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            found[f"{attention}/{part}/kernel"] = weight.detach().numpy().T.reshape(width, heads, -1)
            found[f"{attention}/{part}/bias"] = bias.detach().numpy().reshape(heads, -1)
        found[f"{attention}/out/kernel"] = block.attn.proj.weight.detach().numpy().T.reshape(heads, -1, width)
        found[f"{attention}/out/bias"] = block.attn.proj.bias.detach().numpy()
        put(f"{prefix}/MlpBlock_3/Dense_0", block.mlp.fc1)
        put(f"{prefix}/MlpBlock_3/Dense_1", block.mlp.fc2)
    return {key: np.ascontiguousarray(value) for key, value in found.items()}
