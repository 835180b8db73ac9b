"""Checkpoints that people bring, loaded as timm loads them or refused in one sentence."""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import pathlib
import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn

import dfqvit
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import ModelSpec, Preprocessing, load_model

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


@pytest.mark.parametrize("keys", [k for n in (1, 2, 3, 4) for k in itertools.combinations(range(4), n)])
def test_of_several_weights_timms_choice_and_it_is_said(tmp_path, seed, keys):
    names = [("state_dict", "model", "model_ema", "state_dict_ema")[index] for index in keys]
    models = {name: created(VIT, **SMALL) for name in names}
    torch.save({"epoch": 3, **{name: model.state_dict() for name, model in models.items()}}, tmp_path / "c.pth")
    twin = timm.create_model(VIT, **SMALL)
    timm.models.load_checkpoint(twin, str(tmp_path / "c.pth"))  # the oracle
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = loaded(tmp_path / "c.pth")
    assert same(ours, twin)
    used = next(name for name, model in models.items() if same(model, twin))
    if used.endswith("ema") and len(names) > 1:
        assert any(f"'{used}', the averaged weights, was loaded" in str(each.message) for each in said)
    elif len(names) > 1:
        assert any(f"other values, beside '{used}', which was loaded" in str(each.message) for each in said)
    else:
        assert not said


def test_a_checkpoint_as_timms_training_script_saves_it(tmp_path, seed):
    model = created(VIT, **SMALL)
    ema = ModelEmaV2(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model=VIT, lr=1e-3, mean=None, output=str(tmp_path), aug={"a": [1, 2]})
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=12.5)
    with pytest.warns(UserWarning, match="'state_dict' and 'state_dict_ema'; 'state_dict_ema', the averaged weights"):
        ours = loaded(tmp_path / "model_best.pth.tar")
    assert same(ours, ema.module)
    assert not same(ours, model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_wrappers_prefixes(tmp_path, seed, prefix, kind):
    model, path = created(VIT, **SMALL), tmp_path / f"c.{kind}"
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    assert same(loaded(path), model)


def test_more_objects_are_refused_by_name_and_never_unpickled(tmp_path, seed, monkeypatch):
    state = created(VIT, **SMALL).state_dict()
    touched = tmp_path / "touched"

    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (touched,)

    for extra, name in (
        (pathlib.Path("x"), r"pathlib\S*Path"),
        (np.float64(3), r"numpy\S*scalar"),
        (Hostile(), r"Path\.touch|getattr|pathlib"),
    ):
        torch.save({"state_dict": state, "args": argparse.Namespace(a=extra)}, tmp_path / "c.pth")
        with pytest.raises(DfqvitError, match=f"beside tensors it holds Python objects .*({name})") as error:
            loaded(tmp_path / "c.pth")
        assert "\n" not in str(error.value)
    assert not touched.exists()
    torch.save(created(VIT, **SMALL), tmp_path / "c.pth")
    with pytest.raises(DfqvitError, match=r"VisionTransformer.*save the model's state_dict\(\) alone"):
        loaded(tmp_path / "c.pth")


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


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_integers_under_float_names_are_refused(tmp_path, seed, dtype, kind):
    state, path = created(VIT, **SMALL).state_dict(), tmp_path / f"c.{kind}"
    state["blocks.1.mlp.fc1.weight"] = (10 * state["blocks.1.mlp.fc1.weight"]).to(dtype)
    torch.save({"model": state}, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    with pytest.raises(UsageError, match=r"under 'blocks.1.mlp.fc1.weight': its weights are quantized already"):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_taken(tmp_path, seed, dtype):
    model = created(VIT, **SMALL).to(dtype)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert same(loaded(tmp_path / "c.pth"), model.float())


def test_our_own_file_in_the_checkpoints_place(tmp_path):
    qmodel = dfqvit.quantize(load_model("demo"), samples=2, calib="noise")
    path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    with pytest.raises(UsageError, match=r"holds packed weights of a quantized model; dfqvit.load reads such a file"):
        load_model("demo", path)


def test_other_containers_are_named(tmp_path, seed):
    state = created(VIT, **SMALL).state_dict()
    for content, said in (
        ({"net": state, "acc": 93.1, "epoch": 7}, r"entries are 'net', 'acc', 'epoch': save the one"),
        ({"epoch": 7}, r"its entries are 'epoch'"),
        ({"model": "vit", "model_state_dict": state}, r"entries are 'model', 'model_state_dict': save the one"),
        ([1, 2], "but a list"),
        (torch.zeros(3), "but a Tensor"),
        ({"model." + key: value for key, value in state.items()}, r"begin with 'model\.': save it without"),
        ({"state_dict": {"backbone." + k: v for k, v in state.items()}}, r"begin with 'backbone\.': save it without"),
    ):
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises((DfqvitError, UsageError), match=said) as error:
            loaded(tmp_path / "c.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ema", "ema_state_dict", "model_EMA_weights", "swa_model", "averaged"])
@pytest.mark.parametrize("layout", ["flat", "module", "list"])
def test_averaged_weights_where_timm_does_not_look_are_told(tmp_path, seed, name, layout):
    raw, averaged = (created(VIT, **SMALL).state_dict() for _ in range(2))
    entry = {"flat": averaged, "module": {"decay": 0.9, "module": averaged}, "list": {"shadow": [*averaged.values()]}}
    torch.save({"state_dict": raw, name: entry[layout]}, tmp_path / "c.pth")
    with pytest.warns(
        UserWarning, match=f"holds '{name}', by its name averaged weights, beside 'state_dict', which was loaded"
    ):
        found = loaded(tmp_path / "c.pth").state_dict()
    assert all(torch.equal(found[key], raw[key]) for key in raw)


@pytest.mark.parametrize(
    "entry", [{"ema": {"decay": 0.9}}, {"ema": True}, {"schema": {"a": torch.ones(3)}}, {"ema": None}], ids=str
)
def test_what_holds_no_averaged_weights_is_not_told(tmp_path, seed, entry):
    model = created(VIT, **SMALL)
    torch.save({"state_dict": model.state_dict(), **entry}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), model)


@pytest.mark.parametrize(
    ("container", "inner"), [("state_dict", "model"), ("model", "state_dict"), ("state_dict", "module")]
)
@pytest.mark.parametrize(
    ("name", "kind"), [("ema", "by its name averaged weights"), ("last", "with weights of the same names")]
)
def test_weights_that_are_left_one_level_down_are_told(tmp_path, seed, container, inner, name, kind):
    """The first of two sets was loaded without a word."""
    one, other = (created(VIT, **SMALL) for _ in range(2))
    torch.save({container: {inner: one.state_dict(), name: other.state_dict()}}, tmp_path / "c.pth")
    with pytest.warns(
        UserWarning, match=f"holds '{name}', {kind}.*, beside the '{inner}' of '{container}', which was loaded;"
    ):
        assert same(loaded(tmp_path / "c.pth"), one)
    torch.save(
        {container: {inner: one.state_dict(), name: one.state_dict() if name == "last" else 7}}, tmp_path / "c.pth"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), one)


@pytest.mark.parametrize("empty", [{}, None, collections.OrderedDict()], ids=str)
@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_an_average_that_is_empty_holds_no_weights(tmp_path, seed, name, empty):
    model = created(VIT, **SMALL)
    torch.save({"model": model.state_dict(), name: empty}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), model)


@pytest.mark.parametrize("within", ["module", "state_dict", "model"])
def test_weights_one_level_down_in_a_container(tmp_path, seed, within):
    """As an average that was saved whole, beside its decay."""
    raw, averaged = created(VIT, **SMALL), created(VIT, **SMALL)
    content = {"model": raw.state_dict(), "model_ema": {within: averaged.state_dict(), "decay": 0.9}}
    torch.save(content, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="'model_ema', the averaged weights, was loaded"):
        assert same(loaded(tmp_path / "c.pth"), averaged)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_torchs_averaged_model(tmp_path, seed, wrapped):
    model = created(VIT, **SMALL)
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model) if wrapped else model)
    averaged.update_parameters(nn.DataParallel(model) if wrapped else model)
    for content in (averaged.state_dict(), {"model": averaged.state_dict()}):
        torch.save(content, tmp_path / "c.pth")
        if wrapped:
            with pytest.raises(UsageError, match=r"all of its keys begin with 'module\.': save it without"):
                loaded(tmp_path / "c.pth")
        else:
            assert same(loaded(tmp_path / "c.pth"), model)


SURPLUS = {
    "blocks.0.mlp.fc1.weight_mask": torch.zeros(192, 48),
    "blocks.0.attn.qkv.lora_mask_A": torch.ones(4, 3),
    "blocks.0.mask": torch.ones(3, dtype=torch.bool),
    "class_index": torch.arange(7),
    "coords_head.weight": torch.ones(3),
    "my_attn_mask": torch.ones(3),
}


@pytest.mark.parametrize("key", SURPLUS)
def test_surplus_keys_are_named_whatever_words_they_contain(tmp_path, seed, key):
    torch.save({**created(VIT, **SMALL).state_dict(), key: SURPLUS[key]}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=rf"keys 1 unexpected \({re.escape(key)}\)"):
        loaded(tmp_path / "c.pth")


@pytest.mark.parametrize("key", ["blocks.0.attn.relative_position_index", "attn_mask", "a.num_batches_tracked"])
def test_buffers_that_models_compute_are_surplus_to_nobody(tmp_path, seed, key):
    model = created(VIT, **SMALL)
    torch.save({**model.state_dict(), key: torch.ones(3, dtype=torch.int32)}, tmp_path / "c.pth")
    assert same(loaded(tmp_path / "c.pth"), model)


def test_other_libraries_names_are_recognised(tmp_path, seed):
    for state, said in (
        (
            {"vit.embeddings.cls_token": torch.zeros(1, 1, 48), "vit.encoder.layer.0.x": torch.zeros(2)},
            "Hugging Face transformers",
        ),
        ({"embeddings.patch_embeddings.projection.weight": torch.zeros(2)}, "Hugging Face transformers"),
        (torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48).state_dict(), "those of torchvision"),
    ):
        torch.save(state, tmp_path / "c.pth")
        with pytest.raises(UsageError, match=said):
            loaded(tmp_path / "c.pth")
    with pytest.raises(UsageError, match="which is a folder; give the file with the weights in it"):
        loaded(tmp_path)


def test_an_adaption_that_nobody_asked_for_is_said(tmp_path):
    torch.save(load_model("demo", in_chans=3, checkpoint=rgb_demo(tmp_path)).state_dict(), tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="takes images of 3 channels and the model 1: .* --in-chans 3 keeps it"):
        load_model("demo", tmp_path / "c.pth")


def rgb_demo(folder):
    model = created(DEMO, in_chans=3)
    torch.save(model.state_dict(), folder / "rgb.pth")
    return folder / "rgb.pth"


def test_random_changes_of_a_checkpoint_are_never_taken(tmp_path, seed):
    """Any key renamed, dropped or of another shape is one sentence."""
    whole = created(VIT, **SMALL).state_dict()
    keys = list(whole)
    for _ in range(25):
        state = collections.OrderedDict(whole)
        key = keys[int(torch.randint(len(keys), ()))]
        change = int(torch.randint(3, ()))
        if change == 0:
            del state[key]
        elif change == 1:
            state[key.replace("t", "tt", 1) + "x"] = state.pop(key)
        else:
            state[key] = torch.zeros([size + 1 for size in state[key].shape])
        torch.save(state, tmp_path / "c.pth")
        with pytest.raises(UsageError) as error:
            loaded(tmp_path / "c.pth")
        assert "\n" not in str(error.value)
        assert "c.pth" in str(error.value)


def test_original_jax_arrays(tmp_path, seed):
    """An .npz as Google's repository writes it; what it lacks is found."""
    model = created(VIT, **SMALL)
    arrays = jax_arrays(model)
    np.savez(tmp_path / "c.npz", **arrays)
    ours = loaded(tmp_path / "c.npz")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), model(x), atol=1e-5)
    np.savez(
        tmp_path / "c.npz",
        **{**arrays, "head/kernel": np.zeros((48, 9), np.float32), "head/bias": np.zeros(9, np.float32)},
    )
    with pytest.raises(UsageError, match=r"it left out head.weight, head.bias; give the --num-classes of the file"):
        loaded(tmp_path / "c.npz")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DfqvitError, match=r"c.npz' could not be read as MODEL"):
        loaded(tmp_path / "c.npz")


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        ({"depth": 4}, {}, "c.npz' has 4 blocks and the model 2: it is of another MODEL or depth"),
        ({"depth": 1}, {}, "c.npz' has 1 blocks and the model 2"),
        (
            {"num_heads": 4},
            {},
            r"attention of 4 heads under '.*encoderblock.*/query/kernel' and the model 3",
        ),
        ({}, {"num_classes": 0}, "num-classes: .* has a classifier and the model none; give --num-classes 7"),
        (
            {"in_chans": 4},
            {},
            "in-chans: the checkpoint .* takes images of 4 channels and the model 3; give --in-chans 4",
        ),
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_jax_arrays_of_another_model(tmp_path, seed, source, given, message, stacked):
    arrays = jax_arrays(created(VIT, **{**SMALL, **source}))
    np.savez(tmp_path / "c.npz", **(big_vision(arrays) if stacked else arrays))
    kwargs = {key: value for key, value in SMALL.items() if key not in ("num_classes", "img_size")}
    with pytest.raises(UsageError, match=message):
        load_model(VIT, tmp_path / "c.npz", model_kwargs=kwargs, **{"num_classes": 7, "img_size": 32, **given})


def test_jax_arrays_of_other_patches_and_sizes(tmp_path, seed):
    """The patches are the name's, as in a .pth file; a resize of positions is told."""
    sizes = {key: value for key, value in SMALL.items() if key not in ("num_classes", "img_size", "patch_size")}
    np.savez(tmp_path / "c.npz", **jax_arrays(created(VIT, **sizes, patch_size=32, img_size=224, num_classes=7)))
    with pytest.raises(UsageError, match=r"c.npz' has patches of 32 x 32 pixels and the model 16 x 16"):
        load_model(VIT, tmp_path / "c.npz", model_kwargs=sizes, num_classes=7)
    np.savez(tmp_path / "c.npz", **jax_arrays(created(VIT, **sizes, img_size=384, num_classes=7)))
    with pytest.warns(UserWarning, match=r"'pos_embed' \(1, 577, 48\) was resized to .* --img-size 384 keeps it"):
        load_model(VIT, tmp_path / "c.npz", model_kwargs=sizes, num_classes=7)


def test_jax_arrays_as_big_vision_writes_them(tmp_path, seed):
    model = created(VIT, **SMALL)
    np.savez(tmp_path / "c.npz", **big_vision(jax_arrays(model)))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(tmp_path / "c.npz")(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pre_logits/kernel": np.zeros((48, 48), np.float32)}, r"no place for 1 of its arrays \(pre_logits/kernel\)"),
        ({"embedding/bias": np.zeros(48, np.int8)}, "c.npz' holds int8 under 'embedding/bias', which is float"),
    ],
)
def test_jax_arrays_without_a_place_or_quantized(tmp_path, seed, more, message):
    np.savez(tmp_path / "c.npz", **{**jax_arrays(created(VIT, **SMALL)), **more})
    with pytest.raises(UsageError, match=message):
        loaded(tmp_path / "c.npz")


def big_vision(arrays):
    """The newer names, and all blocks in one array."""
    found, blocks = {}, {}
    for key, value in arrays.items():
        key = key.replace("Transformer/posembed_input/pos_embedding", "pos_embedding")
        for old, new in (("LayerNorm_2", "LayerNorm_1"), ("Attention_1", "Attention_0"), ("MlpBlock_3", "MlpBlock_0")):
            key = key.replace(old, new)
        if "/encoderblock_" in key:
            blocks.setdefault(re.sub(r"encoderblock_\d+", "encoderblock", key), []).append(value)
        else:
            found[key] = value
    return {f"params/{key}": value for key, value in {**found, **{k: np.stack(v) for k, v in blocks.items()}}.items()}


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


@pytest.mark.parametrize("name", ["c.bin", "c.pth", "c.SAFETENSORS", "c", "c.npz.ckpt"])
def test_the_first_bytes_say_what_a_file_is(tmp_path, seed, name):
    model = created(VIT, **SMALL)
    safetensors.torch.save_file(model.state_dict(), tmp_path / name)
    assert same(loaded(tmp_path / name), model)
    torch.save(model.state_dict(), tmp_path / f"{name}.safetensors")
    assert same(loaded(tmp_path / f"{name}.safetensors"), model)
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, **jax_arrays(model))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(loaded(arrays.rename(tmp_path / f"{name}.pth"))(x), model(x), atol=1e-5)


INDEX = b'{"metadata": {}, "weight_map": {"head.bias": "model-00001-of-00002.safetensors"}}'


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ".npz", ".json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 22\n", "is a pointer of Git LFS, not the"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page, not the weights; fetch the file itself"),
        (b"<html><body>404</body></html>", "is a web page, not the weights"),
        (INDEX, "is the index of weights that lie in several files; join those in one file"),
        (b'{"architecture": "vit"}', "is a JSON file, which holds no weights"),
        (b"", "is empty; fetch it again"),
        (b"some notes on the weights", "could not be read"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, suffix, content, message):
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    with pytest.raises(DfqvitError, match=message) as error:
        loaded(path)
    said = str(error.value)
    assert "\n" not in said
    assert str(path) in said
    assert "weights_only" not in said
    assert "allow_pickle" not in said


@pytest.mark.parametrize("container", [None, "model"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {**state, 5: torch.zeros(2)},
            "has the key 5 of type int; every key of a state_dict must be a text",
        ),
        (lambda state: {key: value.to("meta") for key, value in state.items()}, "a meta tensor, which has no values,"),
        (
            lambda state: {**state, "head.weight": state["head.weight"].to_sparse()},
            "a sparse tensor under 'head.weight'; it must be dense",
        ),
        (
            lambda state: {**state, "head.weight": state["head.weight"].to_sparse_csr()},
            "a sparse tensor under 'head.weight'; it must be dense",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_keys_and_tensors_that_no_model_has(tmp_path, seed, change, message, container):
    state = change(created(VIT, **SMALL).state_dict())
    torch.save({container: state} if container else state, tmp_path / "c.pth")
    with pytest.raises(DfqvitError, match=message) as error:
        loaded(tmp_path / "c.pth")
    assert "\n" not in str(error.value)


def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "c.pt")
    with pytest.raises(DfqvitError, match="it is a TorchScript archive; save the state_dict"):
        loaded(tmp_path / "c.pt")


@pytest.mark.parametrize("prefix", ["timm/", "hf-hub:timm/", "hf_hub:timm/"])
def test_names_of_timms_repositories(tmp_path, seed, prefix):
    model = created("deit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    ours = load_model(f"{prefix}deit_tiny_patch16_224.fb_in1k", tmp_path / "c.pth", num_classes=3)
    assert same(ours, model)
    assert ours.dfqvit_spec.architecture == "deit_tiny_patch16_224.fb_in1k"


def test_a_folder_as_the_hub_has_it(tmp_path, seed):
    model = created(VIT, **SMALL)
    folder = tmp_path / "hub"
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "input_size": [3, 32, 32],
        "mean": [0.1] * 3,
        "std": [0.3] * 3,
        "num_classes": 7,
        "fixed_input_size": True,
    }
    args = {key: value for key, value in SMALL.items() if key != "num_classes"}
    content = {"architecture": VIT, "num_classes": 7, "model_args": args, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(content))
    ours = load_model(f"local-dir:{folder}")
    assert same(ours, model)
    qmodel = dfqvit.quantize(ours, samples=2, calib="noise")
    again = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert again.dfqvit_record.preprocessing.mean == (0.1,) * 3
    assert again.dfqvit_record.spec.architecture == VIT
    assert isinstance(again.dfqvit_record.spec, ModelSpec)
    other = load_model(f"local-dir:{folder}", folder / "model.safetensors")  # other weights, the same images
    assert same(other, model)
    assert Preprocessing.of(other) == Preprocessing.of(ours)


def test_names_that_are_none(tmp_path, monkeypatch):
    file = tmp_path / "w.pth"
    file.touch()
    for name, said in (
        (
            "google/vit-base-patch16-224",
            "a model of the Hugging Face Hub that timm can load is named 'hf-hub:google/vit",
        ),
        (str(file), "which is a file; it must be a timm name, and the file with its weights goes to --checkpoint"),
        ("resnet18", r"MODEL was 'resnet18', a ResNet, which is not a transformer: its work is in convolutions"),
        ("vit_tiny_patch16_224.nonsense", "timm could not build it"),
        (3, "MODEL was a int; it must be a name"),
    ):
        with pytest.raises(UsageError, match=said):
            load_model(name)
    with pytest.raises(UsageError, match=r"with \{'img_size': 30\}: timm could not build it|with \{'frog': 1\}"):
        load_model(VIT, model_kwargs={"frog": 1})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DfqvitError, match="MODEL 'hf-hub:someone/model': timm could not load it"):
        load_model("hf-hub:someone/model")


def test_a_random_start_gives_way_wholly(tmp_path, seed):
    """No parameter keeps the value that it was initialised with."""
    for name, kwargs in ((VIT, SMALL), (SWIN, SWIN_SMALL), (DEMO, {})):
        model = created(name, **kwargs)
        torch.save(model.state_dict(), tmp_path / "c.pth")
        assert same(loaded(tmp_path / "c.pth", name, kwargs), model)
