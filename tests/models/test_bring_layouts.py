"""Checkpoints in the layouts of the papers' own code and of other libraries, and what timm's conversions change or leave out."""

from __future__ import annotations

import argparse
import re
import warnings

import pytest
import timm
import torch
import torchvision

from dfqvit.errors import UsageError
from dfqvit.models import load_model

from .checkpoints import SMALL, SWIN, SWIN_SMALL, VIT, created, loaded, same


def swin_in_the_original_layout(model):
    """As Microsoft's repository names it: downsampling at the end of a stage, buffers of indices and masks, a plain head."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        state[key.replace("head.fc.", "head.")] = value
    for key in [key for key in state if key.endswith("relative_position_bias_table")]:
        state[key.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    return state


def test_original_swin(tmp_path, seed):
    model = created(SWIN, **SWIN_SMALL)
    state = swin_in_the_original_layout(model)
    assert "layers.0.downsample.reduction.weight" in state
    torch.save({"model": state, "optimizer": {}, "epoch": 1}, tmp_path / "c.pth")
    ours = loaded(tmp_path / "c.pth", SWIN, SWIN_SMALL)
    assert same(ours, model)
    x = torch.randn(2, 3, 56, 56)
    assert torch.equal(ours(x), model(x))


def test_original_deit_and_deit3(tmp_path, seed):
    name = "deit_tiny_distilled_patch16_224"
    model = created(name, **SMALL)
    args = argparse.Namespace(lr=0.1, distributed=True)
    torch.save({"model": model.state_dict(), "args": args, "scaler": {}}, tmp_path / "d.pth")
    assert same(loaded(tmp_path / "d.pth", name), model)
    name = "deit3_small_patch16_224"
    model = created(name, **SMALL)
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in model.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    torch.save({"model": state}, tmp_path / "d3.pth")
    assert same(loaded(tmp_path / "d3.pth", name), model)


def test_original_dino_and_dinov2_backbones(tmp_path, seed):
    headless = {**SMALL, "num_classes": 0}
    model = created(VIT, **headless)
    torch.save(model.state_dict(), tmp_path / "dino.pth")  # as dino_deitsmall16_pretrain.pth: no head
    assert same(loaded(tmp_path / "dino.pth", kwargs=headless), model)
    with pytest.raises(UsageError, match=r"has no classifier \('head.weight'\); give --num-classes 0"):
        loaded(tmp_path / "dino.pth")
    torch.save(created(VIT, **SMALL).state_dict(), tmp_path / "head.pth")
    with pytest.raises(UsageError, match="has a classifier and the model none; give --num-classes 7"):
        loaded(tmp_path / "head.pth", kwargs=headless)
    name, small = "vit_small_patch14_dinov2", {**headless, "img_size": 28, "patch_size": 14}
    model = created(name, **small)
    state = {re.sub(r"ls(\d)\.gamma", r"ls\1.gamma", key): value for key, value in model.state_dict().items()}
    torch.save({**state, "mask_token": torch.zeros(1, 48)}, tmp_path / "v2.pth")
    assert same(loaded(tmp_path / "v2.pth", name, small), model)


@pytest.mark.parametrize("name", [VIT, "deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_position_embeddings_are_resized_as_timm_does(tmp_path, seed, name):
    model = created(name, **SMALL)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    ours = load_model(name, tmp_path / "c.pth", img_size=(48, 64), model_kwargs={**SMALL, "img_size": (48, 64)})
    overlay = {"state_dict": model.state_dict(), "num_classes": 7}
    options = {**SMALL, "img_size": (48, 64)}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert same(ours, theirs)
    assert ours.pos_embed.shape[1] > model.pos_embed.shape[1]


def test_a_resize_that_nobody_asked_for_is_said(tmp_path, seed):
    torch.save(created(VIT, num_classes=2, img_size=384).state_dict(), tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"'pos_embed' \(1, 577, 192\) was resized to \(1, 197, 192\).*--img-size 384"):
        load_model(VIT, tmp_path / "c.pth", num_classes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(VIT, tmp_path / "c.pth", num_classes=2, img_size=384).pos_embed.shape[1] == 577


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", [VIT, SWIN])
def test_rgb_stems_are_adapted_as_timm_does(tmp_path, seed, channels, name):
    kwargs = SMALL if name == VIT else SWIN_SMALL
    model = created(name, **kwargs)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    ours = loaded(tmp_path / "c.pth", name, kwargs, in_chans=channels)
    overlay = {"state_dict": model.state_dict(), "num_classes": 7}
    options = {**kwargs, "in_chans": channels}
    assert same(ours, timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options))
    torch.save(created(name, **kwargs, in_chans=channels).state_dict(), tmp_path / "c.pth")
    if channels != 3:
        with pytest.raises(
            UsageError, match=f"takes images of {channels} channels and the model 3; give --in-chans {channels}"
        ):
            loaded(tmp_path / "c.pth", name, kwargs)


def test_patches_of_another_size_are_another_model(tmp_path, seed):
    torch.save(created("vit_small_patch32_224", num_classes=3).state_dict(), tmp_path / "c.pth")
    with pytest.raises(UsageError, match="has patches of 32 x 32 pixels and the model 16 x 16: it is of another MODEL"):
        load_model("vit_small_patch16_224", tmp_path / "c.pth", num_classes=3)


def as_openai_clip(model, prefix="visual."):
    """The state of a CLIP tower of timm by OpenAI's names, with a text tower beside it."""
    names = (
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("qkv.", "in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("blocks.", "transformer.resblocks."),
    )
    found = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        found[re.sub(r"\bnorm(\d)", r"ln_\1", key).replace("norm.", "ln_post.")] = value
    found["class_embedding"] = found.pop("cls_token")[0, 0]
    found["positional_embedding"] = found.pop("pos_embed")[0]
    found["proj"] = found.pop("head.weight").T.contiguous()
    del found["head.bias"]
    text = {"positional_embedding": torch.randn(77, 20), "transformer.resblocks.0.ln_1.weight": torch.randn(20)}
    return {**{f"{prefix}{key}": value for key, value in found.items()}, **text}


@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_a_tower_of_openais_names_is_asked_the_same(tmp_path, seed, prefix):
    """Patches of another size are another model, and a resize is told, whatever the file calls them."""
    name, small = "vit_base_patch16_clip_224.openai", {"depth": 1, "embed_dim": 24, "num_heads": 2}
    model = created(name, **small, num_classes=5)
    model.head.bias.data.zero_()
    torch.save(as_openai_clip(model, prefix), tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth", name, small, num_classes=5), model)
    with pytest.warns(UserWarning, match=r"'pos_embed' \(197, 24\) was resized to \(1, 577, 24\).*--img-size 224"):
        loaded(tmp_path / "c.pth", "vit_base_patch16_clip_384", small, num_classes=5)
    with pytest.raises(UsageError, match="has patches of 16 x 16 pixels and the model 32 x 32: it is of another MODEL"):
        loaded(tmp_path / "c.pth", "vit_base_patch32_clip_224.openai", small, num_classes=5)


def test_a_conversion_that_takes_no_model(tmp_path, seed):
    small = {
        "depth": ((1, 1, 0),),
        "embed_dim": (24, 48),
        "num_heads": (2, 2),
        "mlp_ratio": (2, 2, 1),
        "num_classes": 3,
    }
    model = created("crossvit_tiny_240", **small)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "c.pth")
    assert same(loaded(tmp_path / "c.pth", "crossvit_tiny_240", small), model)


def test_tables_of_positions_of_any_name_that_are_resized_are_told(tmp_path, seed):
    name, small = "tnt_s_legacy_patch16_224", {"depth": 1, "embed_dim": 24, "inner_dim": 8, "num_classes": 3}
    small |= {"num_heads_inner": 2, "num_heads_outer": 2}
    torch.save(created(name, **small, img_size=64).state_dict(), tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"'patch_pos' \(1, 17, 24\) was resized to \(1, 197, 24\), as timm does"):
        load_model(name, tmp_path / "c.pth", model_kwargs=small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(name, tmp_path / "c.pth", img_size=64, model_kwargs=small)


def test_positions_of_tokens_that_became_the_tokens_are_no_resize(tmp_path, seed):
    """DINOv2 with registers: timm adds the class token's position to the token."""
    name, small = "vit_small_patch14_reg4_dinov2", {**SMALL, "num_classes": 0, "img_size": 28, "patch_size": 14}
    model = created(name, **small)
    state = model.state_dict()
    position = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - position
    torch.save({**state, "mask_token": torch.zeros(1, 48)}, tmp_path / "c.pth")
    kwargs = {key: value for key, value in small.items() if key != "img_size"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(name, tmp_path / "c.pth", img_size=28, model_kwargs=kwargs)
    assert torch.allclose(ours.cls_token, model.cls_token, atol=1e-6)


@pytest.mark.parametrize("container", [None, "model"])
def test_a_layer_before_the_classifier_that_timm_leaves_out(tmp_path, seed, container):
    """Older ViTs had one; without it the classifier's logits are others."""
    state = created(VIT, **SMALL).state_dict()
    more = {"pre_logits.fc.weight": torch.randn(48, 48), "pre_logits.fc.bias": torch.zeros(48)}
    torch.save({container: {**state, **more}} if container else {**state, **more}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=r"no place for pre_logits.fc.weight, which timm's conversion leaves out"):
        loaded(tmp_path / "c.pth")
    backbone = {key: value for key, value in {**state, **more}.items() if not key.startswith("head.")}
    torch.save(backbone, tmp_path / "b.pth")
    assert loaded(tmp_path / "b.pth", kwargs={**SMALL, "num_classes": 0}).num_classes == 0


def as_original_dinov3(model, bias):
    found = {}
    for key, value in model.state_dict().items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        if key.endswith("q_bias"):
            found[key.replace("q_bias", "qkv.bias")] = bias
        elif not key.endswith("v_bias"):
            found[key] = value
    mask = torch.ones(len(bias))
    return found | {"blocks.0.attn.qkv.bias_mask": mask, "rope_embed.periods": torch.ones(4), "mask_token": mask[None]}


def test_a_bias_that_timm_leaves_out_counts_unless_it_is_zero(tmp_path, seed, capsys):
    """DINOv3: models without the bias of queries and values are given files that have it."""
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    model, bias = created("vit_small_patch16_dinov3_qkvb", **small), torch.randn(96)
    torch.save(as_original_dinov3(model, bias), tmp_path / "c.pth")
    with pytest.raises(UsageError, match=r"no place for blocks.0.attn.qkv.bias, which timm's conversion leaves out"):
        loaded(tmp_path / "c.pth", "vit_small_patch16_dinov3", small)
    ours = loaded(tmp_path / "c.pth", "vit_small_patch16_dinov3_qkvb", small)
    assert torch.equal(ours.blocks[0].attn.q_bias, bias[:32])
    assert torch.equal(ours.blocks[0].attn.v_bias, bias[64:])
    torch.save(as_original_dinov3(model, torch.zeros(96)), tmp_path / "z.pth")
    without = loaded(tmp_path / "z.pth", "vit_small_patch16_dinov3", small)
    assert torch.equal(without.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert capsys.readouterr().out == ""  # timm's conversion prints; a command's stdout is its result


def test_other_libraries_names_are_recognised(tmp_path, seed):
    for state, said in (
        (
            {"vit.embeddings.cls_token": torch.zeros(1, 1, 48), "vit.encoder.layer.0.x": torch.zeros(2)},
            "Hugging Face transformers: give the model that loads it there to dfqvit.from_transformers, or take timm's",
        ),
        ({"embeddings.patch_embeddings.projection.weight": torch.zeros(2)}, "Hugging Face transformers"),
        (torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48).state_dict(), "those of torchvision"),
    ):
        torch.save(state, tmp_path / "c.pth")
        with pytest.raises(UsageError, match=said):
            loaded(tmp_path / "c.pth")
    with pytest.raises(UsageError, match="which is a folder; give the file with the weights in it"):
        loaded(tmp_path)


@pytest.mark.parametrize(("name", "kwargs"), [(SWIN, SWIN_SMALL), ("convnext_atto", {})])
def test_what_stands_before_names_is_said_where_timms_conversion_fails(tmp_path, seed, name, kwargs):
    """Found here: of a Lightning checkpoint of Swin nothing was said but "SwinTransformer has no attribute `model`"."""
    state = {"model." + key: value for key, value in created(name, **kwargs).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=r"; all of its keys begin with 'model\.': save it without$"):
        loaded(tmp_path / "c.pth", name, kwargs)


def test_transformers_names_are_recognised_where_timms_conversion_fails(tmp_path):
    bias = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"
    state = {"swin.embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 4, 4), bias: torch.zeros(169, 3)}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(
        UsageError, match=r"conversion failed \(.*\); its names are those of Hugging Face transformers: give"
    ):
        loaded(tmp_path / "c.pth", "swin_tiny_patch4_window7_224", {})
