"""What people bring is rebuilt from its file exactly, or refused before any work."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import warnings

import pytest
import timm
import torch
from timm.models import VisionTransformer, register_model
from torch import nn
from torch.nn.utils import prune

import dfqvit
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import ModelSpec, Preprocessing, load_model
from dfqvit.storage.export import OPSET, qdq_model
from dfqvit.storage.file import read, sizes
from dfqvit.storage.rebuild import held

from .. import networks
from ..conftest import small_swin, small_vit, threads
from ..fresh import python

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}
ARCHITECTURES = {
    **{
        name: {**SMALL, "img_size": 4 * patch, "patch_size": patch}
        for name, patch in {
            "aimv2_large_patch14_224": 14,
            "beit3_base_patch16_224": 16,
            "deit3_small_patch16_224": 8,
            "deit_base_distilled_patch16_384": 8,
            "deit_small_patch16_224": 8,
            "eva_large_patch14_196": 14,
            "flexivit_small": 8,
            "vit_large_patch14_clip_quickgelu_336": 14,
            "vit_base_patch14_dinov2": 14,
            "vit_base_patch14_reg4_dinov2": 14,
            "vit_base_patch16_224_miil": 8,
            "vit_base_patch16_clip_224": 8,
            "vit_base_patch16_clip_quickgelu_224": 8,
            "vit_base_patch16_gap_224": 8,
            "vit_base_patch16_rpn_224": 8,
            "vit_base_patch16_siglip_224": 8,
            "vit_base_patch16_siglip_gap_256": 8,
            "vit_base_patch32_clip_448": 8,
            "vit_giant_patch14_dinov2": 14,
            "vit_intern300m_patch14_448": 14,
            "vit_mediumd_patch16_reg4_gap_256": 8,
            "vit_so400m_patch14_siglip_378": 14,
            "vit_so150m_patch16_reg4_map_256": 8,
            "vit_tiny_patch16_384": 8,
            "vit_wee_patch16_reg1_gap_256": 8,
        }.items()
    },
    "test_vit": {"num_classes": 5, "img_size": 64},
    "test_vit3": {"num_classes": 5, "img_size": 64},
    "swin_tiny_patch4_window7_224": {**SWIN, "img_size": 56},
    "swin_base_patch4_window12_384": {**SWIN, "img_size": 48, "window_size": 6},
    "swin_s3_tiny_224": {**SWIN, "img_size": 56, "window_size": (7, 7)},
    "dfqvit_demo_swin": {},
    "dfqvit_demo_deit3": {},
    "dfqvit_demo_convnext": {},
}

LOADER = """
import sys, torch, dfqvit
torch.set_num_threads(1)
for name in sys.argv[2:]:
    kept = torch.load(f"{sys.argv[1]}/{name}.pt")
    found = dfqvit.load(f"{sys.argv[1]}/{name}.safetensors")(kept["x"])
    print(name, torch.equal(found, kept["y"]))
"""


def quantized(model, **options):
    preprocessing = Preprocessing.of(model)
    torch.manual_seed(3)
    low, high = preprocessing.channel_bounds()
    images = low + (high - low) * torch.rand(3, *preprocessing.input_size)
    return dfqvit.quantize(model, calib=images, rounding="nearest", **options), images


def small(**options):
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, "patch_size": 8, **SMALL, **options}).eval()


def test_thirty_architectures_load_in_a_fresh_process_to_the_same_bits(tmp_path, seed):
    assert len(ARCHITECTURES) >= 30
    with threads(1):
        for name, kwargs in ARCHITECTURES.items():
            qmodel, x = quantized(timm.create_model(name, **kwargs))
            dfqvit.save(qmodel, tmp_path / f"{name}.safetensors")
            torch.save({"x": x, "y": qmodel(x)}, tmp_path / f"{name}.pt")
    done = python("-c", LOADER, tmp_path, *ARCHITECTURES)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == dict.fromkeys(ARCHITECTURES, "True")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)},
        {"act_layer": nn.ReLU},
        {"act_layer": "silu"},
        {"act_layer": "quick_gelu"},
        {"act_layer": functools.partial(nn.GELU, approximate="tanh")},
        {"norm_layer": timm.layers.RmsNorm},
        {"qk_norm": True, "init_values": 0.3, "reg_tokens": 2},
        {"class_token": False, "global_pool": "avg", "mlp_ratio": 2.5},
        {"drop_path_rate": 0.2, "drop_rate": 0.1},
        {"img_size": (16, 40)},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_keywords_are_recorded_and_used_whole(tmp_path, seed, kwargs, given):
    model = small(**kwargs)
    whole = {"img_size": 32, "patch_size": 8, **SMALL, **kwargs}
    qmodel, x = quantized(model, **({"model_kwargs": whole} if given else {}))
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert torch.equal(loaded(x), qmodel(x))
    twin = loaded.dfqvit_record.spec.build()  # what --against builds
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


class Mine(nn.GELU):
    pass


def test_what_a_file_cannot_name_is_refused_before_any_work(seed):
    model = small(act_layer=Mine)
    with pytest.raises(UsageError, match=r"model_kwargs\['act_layer'\] was .*Mine.*, which a file cannot name"):
        quantized(model, model_kwargs={"img_size": 32, "patch_size": 8, **SMALL, "act_layer": Mine})
    with pytest.raises(UsageError, match=r"'blocks.0.mlp.act' is a Mine here and a GELU there"):
        quantized(model)
    with pytest.raises(UsageError, match=r"model_kwargs\['act_layer'\] was <function"):
        quantized(model, model_kwargs={"act_layer": lambda: nn.GELU()})


def test_a_file_names_no_code_but_layers():
    for name in ("os.system", "torch.nn.init.ones_", "timm.models.load_checkpoint", "torch.nn.modules.activation.F"):
        with pytest.raises(UsageError, match=r"names (the layer )?'"):
            ModelSpec("vit_tiny_patch16_224", {"act_layer": {"callable": name}}).build("meta")


@pytest.mark.parametrize("told", [None, 1000, 10])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_classes_are_those_of_a_replaced_head(tmp_path, seed, told, name):
    if name == "vit":
        model = small(num_classes=1000)
        model.head = nn.Linear(32, 10)
        kwargs = {"img_size": 32, "patch_size": 8, **SMALL, "num_classes": told}
    else:
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **{**SWIN, "num_classes": 1000})
        model.head.fc = nn.Linear(24, 10)
        kwargs = {"img_size": 56, **SWIN, "num_classes": told}
    qmodel, x = quantized(model, **({} if told is None else {"model_kwargs": kwargs}))
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert loaded(x).shape == (3, 10)
    assert torch.equal(loaded(x), qmodel(x))
    assert qmodel.num_classes == loaded.num_classes == 10
    assert model.num_classes == 1000  # the caller's, as it was
    made = dfqvit.synthesize(model, 2, 1)  # aims at classes that there are
    assert made.shape[0] == 2


def test_flags_that_change_no_output_do_not_matter(seed, tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, **SMALL)
    model.set_grad_checkpointing(True)
    model.set_distilled_training(True)
    model.train()
    qmodel, x = quantized(model)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert loaded(x).shape == (3, 5)


@pytest.mark.parametrize("momentum", [0.01, None])
def test_the_momentum_of_batch_normalisation_does_not_matter(momentum):
    model = timm.create_model("levit_128s")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    assert ModelSpec.of(model).architecture == "levit_128s"
    norms[0].eps = 0.01
    with pytest.raises(UsageError, match=r"'stem.conv1.bn.eps' is 0.01 here and 1e-05 there"):
        ModelSpec.of(model)


def test_what_stands_at_two_places_is_named():
    model = small()
    model.blocks[1] = model.blocks[0]
    said = r"'blocks.1.attn.proj.bias' is shared with 'blocks.0.attn.proj.bias' here, and not there: give each place a copy"
    with pytest.raises(UsageError, match=said):
        ModelSpec.of(model)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert ModelSpec.of(model).architecture == "vit_tiny_patch16_224"
    model.blocks[1].norm2.weight = model.norm.weight
    with pytest.raises(UsageError, match=r"'norm.weight' is shared with 'blocks.1.norm2.weight' here"):
        ModelSpec.of(model)


def test_a_changed_forward_or_depth_is_refused(seed):
    model = small()
    model.blocks[1].forward = lambda x: x
    with pytest.raises(UsageError, match=r"'blocks.1' has a forward of its own here"):
        quantized(model)
    model = small()
    model.pool = lambda x: x[:, 0]
    with pytest.raises(UsageError, match=r"the model has a pool of its own here"):
        quantized(model)
    model = small(depth=3)
    model.blocks = model.blocks[:1]
    with pytest.raises(UsageError, match="model differs from timm's 'vit_tiny_patch16_224'"):
        quantized(model)


def test_a_head_or_depth_changed_after_quantizing_is_not_saved(seed, tmp_path):
    for change in (
        lambda q: q.reset_classifier(9),
        lambda q: q.reset_classifier(5, global_pool="avg"),
        lambda q: setattr(q, "head", nn.Identity()),
        lambda q: setattr(q, "blocks", q.blocks[:1]),
        lambda q: setattr(q, "global_pool", "avg"),
    ):
        qmodel, _ = quantized(small())
        change(qmodel)
        with pytest.raises(UsageError, match="qmodel was changed after it was quantized"):
            dfqvit.save(qmodel, tmp_path / "q.safetensors")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "method"), [("", "forward"), ("", "forward_features"), ("blocks.1.attn", "forward")])
def test_a_method_replaced_after_quantizing_is_not_saved(seed, tmp_path, place, method):
    qmodel, _ = quantized(small())
    part = qmodel.get_submodule(place)
    computes = getattr(part, method)
    setattr(part, method, lambda *args, **kwargs: 2 * computes(*args, **kwargs))
    where = f"'{place}'" if place else "the model"
    with pytest.raises(UsageError, match=rf"\({where} has a {method} of its own; load would build none\)"):
        dfqvit.save(qmodel, tmp_path / "q.safetensors")


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["", "blocks.0", "blocks.1.mlp.fc1", "head"])
def test_hooks_that_no_file_holds_are_named(seed, tmp_path, place, kind):
    qmodel, x = quantized(small())
    before = qmodel(x)
    hook = getattr(qmodel.get_submodule(place), kind)(lambda module, values, *_: None)
    where = f"'{place}'" if place else "the model"
    with pytest.warns(UserWarning, match=f"qmodel has forward hooks on {where}, which the file does not hold"):
        path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    assert torch.equal(dfqvit.load(path)(x), before)
    hook.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dfqvit.save(qmodel, path)


@pytest.mark.parametrize("options", [{"placement": "psaq"}, {"acm": "sequential", "acm_blocks": [0, -1]}], ids=str)
def test_dfqvit_s_own_hooks_are_held(seed, tmp_path, options):
    """Of sites on outputs, and of corrections on what is no layer: here on a LayerScale."""
    qmodel, x = quantized(small(init_values=0.3), **options)
    assert any(module._forward_hooks for module in qmodel.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert torch.equal(loaded(x), qmodel(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda q: nn.utils.parametrizations.weight_norm(q.blocks[0].norm1, dim=None),
        lambda q: nn.utils.parametrize.register_parametrization(q.blocks[0].norm1, "weight", nn.Tanh()),
        lambda q: prune.l1_unstructured(q.blocks[0].norm1, "weight", 3),
    ],
    ids=["weight_norm", "parametrized", "pruned"],
)
def test_parameters_computed_from_others_are_not_saved(seed, tmp_path, change):
    qmodel, _ = quantized(small())
    change(qmodel)
    with pytest.raises(UsageError, match="qmodel was changed after it was quantized"):
        dfqvit.save(qmodel, tmp_path / "q.safetensors")


ROUNDED = ("eva02_tiny_patch14_224", "vit_base_patch16_rope_224", "vit_relpos_small_patch16_224")  # by half precision
SWIN_T = "swin_tiny_patch4_window7_224"
TABLES = {
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "vit_base_patch16_rope_224": {**SMALL, "img_size": 32, "patch_size": 8},
    "vit_relpos_small_patch16_224": {**SMALL, "img_size": 32, "patch_size": 8},
    SWIN_T: {**SWIN, "img_size": 56},
    "convit_tiny": {"depth": 1, "num_classes": 5},
}


def tables(model):
    held = model.state_dict().keys()
    return {key: value for key, value in model.named_buffers() if key not in held and value.is_floating_point()}


@pytest.mark.parametrize("change", ["none", "half", "bfloat16", "table"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_that_no_state_dict_holds_are_saved_where_they_are_others(seed, tmp_path, name, change):
    """Computed by the structure; of a model in half precision they are rounded, and the user may set them."""
    model = timm.create_model(name, **TABLES[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    if change in ("half", "bfloat16"):
        model = model.to(getattr(torch, change))
    if change == "table":
        for table in tables(model).values():
            table.mul_(0.7)
    qmodel, x = quantized(model)
    path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    loaded = dfqvit.load(path)
    assert torch.equal(loaded(x), qmodel(x))
    again = dfqvit.load(dfqvit.save(loaded, tmp_path / "again.safetensors"))
    assert torch.equal(again(x), qmodel(x))
    assert sum(sizes(path).values()) == path.stat().st_size  # the tables too, and the header
    beside = read(path)[1].keys() - qmodel.state_dict().keys()
    assert bool(beside) == (change != "none" and (name in ROUNDED or (change, name) == ("table", SWIN_T)))
    exported = dict(qdq_model(*held(qmodel, "export_onnx"), OPSET).named_buffers())
    assert all(torch.equal(exported[key], table) for key, table in tables(dfqvit.load(path)).items() if key in exported)


def test_tables_of_a_network_of_the_user_are_saved(seed, tmp_path):
    network = networks.rotary()
    network.left.rope.pos_embed.mul_(0.7)
    qmodel = dfqvit.quantize(network, samples=2, calib="noise", rounding="nearest", build="tests.networks:rotary")
    x = torch.randn(2, 3, 32, 32)
    path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    assert torch.equal(dfqvit.load(path, build="tests.networks:rotary")(x), qmodel(x))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit", {"img_size": (48, 64)}),
        ("swin", {"img_size": (112, 56)}),
        ("swin", {"img_size": (112, 112), "window_size": (7, 7)}),
    ],
)
def test_another_input_size_set_after_quantizing_is_saved(seed, tmp_path, name, sizes):
    model = small() if name == "vit" else timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **SWIN)
    qmodel, _ = quantized(model, acm="none")
    qmodel.set_input_size(**sizes)
    x = torch.randn(2, 3, *sizes["img_size"])
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    assert torch.equal(loaded(x), qmodel(x))
    assert loaded.dfqvit_record.preprocessing.input_size == tuple(x.shape[1:])
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == tuple(x.shape[1:])


@pytest.mark.parametrize("name", ["vit", "swin", "eva02_tiny_patch14_224"])
def test_patches_of_another_size_are_set_on_the_float_model(seed, name):
    if name == "vit":
        model = small()
    else:
        model = timm.create_model(
            {"swin": SWIN_T}.get(name, name), **{"swin": TABLES[SWIN_T]}.get(name, TABLES.get(name))
        )
    qmodel, x = quantized(model, acm="none")
    patch = model.patch_embed.patch_size
    for size in (2 * patch[0], (patch[0], 2 * patch[1])):
        with pytest.raises(UsageError, match=re.escape(f"patch_size was {size}; a quantized model keeps its {patch}")):
            qmodel.set_input_size(patch_size=size)
        with pytest.raises(
            UsageError, match=re.escape(f"patch_size was another one; a quantized model keeps its {patch}")
        ):
            qmodel.patch_embed.set_input_size(patch_size=(2 * patch[0], patch[1]))
    wanted = qmodel(x)
    for size in (patch[0], patch, list(patch)):
        qmodel.set_input_size(x.shape[-2:], size)
        assert torch.equal(qmodel(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(qmodel))(x), wanted)


def test_patches_of_a_model_within_a_network_keep_their_size(seed):
    """timm looked for what a convolution has, and ended in an AttributeError."""
    network = networks.Segmenter(depth=1)
    qmodel = dfqvit.quantize(network, 8, calib=torch.rand(4, 3, 32, 32) * 2 - 1, rounding="nearest", progress=False)
    images = torch.randn(2, 3, 32, 32)
    expected = qmodel(images)["out"]
    with pytest.raises(UsageError, match=r"patch_size was another one; a quantized model keeps its \(8, 8\)"):
        qmodel.backbone.set_input_size(patch_size=4)
    assert torch.equal(qmodel(images)["out"], expected)


@pytest.mark.parametrize("acm_blocks", [[0], [-1]])
def test_a_correction_of_another_number_of_tokens_is_said(seed, acm_blocks):
    """Of Swin V2's blocks it lies behind a norm; torch said that a shape was invalid."""
    sizes = {**SWIN, "img_size": 32, "window_size": 4, "depths": (1, 1)}
    model = timm.create_model("swinv2_tiny_window8_256", **sizes)
    calib = torch.rand(4, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(model, 8, calib=calib, acm="sequential", acm_blocks=acm_blocks, rounding="nearest")
    qmodel.set_input_size((64, 64), window_size=(4, 4))
    with pytest.raises(ValueError, match=r"acm was made for \d+ tokens an image; these have \d+: quantize for this"):
        qmodel(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_correction_is_of_places(seed, tmp_path, name):
    """Of images 16 x 64 there are as many tokens as of 32 x 32: the corrections were added to others."""
    calib, other = torch.rand(4, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 16, 64)
    model = small_vit(depth=1, dynamic_img_size=True) if name == "vit" else small_swin()
    options = {"calib": calib, "rounding": "nearest", "progress": False}
    qmodel, plain = (dfqvit.quantize(model, 8, acm=acm, **options) for acm in ("sequential", "none"))
    if name == "swin":
        for each in (qmodel, plain):
            each.set_input_size((16, 64), window_size=(2, 2))
        with pytest.raises(
            UsageError, match=r"images were 16 x 64; the corrections \(acm\) are for the places of 32 x 32"
        ):
            dfqvit.save(qmodel, tmp_path / "q.safetensors")
    with pytest.raises(UsageError, match=r"images were 16 x 64; the corrections \(acm\) are for the places of 32 x 32"):
        qmodel(other)
    torch._dynamo.reset()
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="images were 16 x 64; the corrections"):
        compiled(other)
    assert plain(other).shape == (2, 7)


def test_only_models_of_several_input_sizes_have_set_input_size(seed):
    model = timm.create_model("mixer_s32_224", img_size=64)
    assert not hasattr(dfqvit.quantize(model, samples=2, calib="noise", rounding="nearest"), "set_input_size")


@register_model
def bring_test_vit(pretrained=False, **kwargs):
    """A user's own entrypoint, which says nothing to timm's builder."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    model = VisionTransformer(**{"img_size": 32, "patch_size": 8, **SMALL, **kwargs})
    model.pretrained_cfg = {"architecture": "bring_test_vit", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@register_model
def bring_renamed_vit(pretrained=False, **kwargs):
    """One whose models carry the name of a model of timm's."""
    options = {"img_size": 32, "patch_size": 8, **SMALL, **kwargs}
    return timm.models.vision_transformer._create_vision_transformer("vit_small_patch16_224", **options)


def test_registered_models_of_the_user(tmp_path, seed):
    """A process that has not registered them says which they are."""
    names = ["bring_test_vit", "bring_renamed_vit"]
    for name in names:
        qmodel, x = quantized(timm.create_model(name, num_classes=4))
        path = dfqvit.save(qmodel, tmp_path / name)
        assert torch.equal(dfqvit.load(path)(x), qmodel(x))
        assert read(path)[0].spec.architecture == name
    code = "import sys; from dfqvit import cli; print([cli.run(['info', path]) for path in sys.argv[1:]])"
    paths = [str(tmp_path / name) for name in names]
    done = python("-c", code, *paths)
    assert done.stdout == "[1, 1]\n", done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        assert f"names the model '{name}'" in line
        assert "import the module that registers it first" in line


def test_what_timm_says_on_a_second_line_is_told(monkeypatch, tmp_path, seed):
    def fails(*_):
        raise ValueError("\n  a depth of 2\n  is too deep")

    qmodel, _ = quantized(small_vit())
    build, calls = ModelSpec.build, []
    qmodel.norm.eps = 0.5

    def fails_for_other_sizes(*args):
        calls.append(args)
        return build(*args) if len(calls) == 1 else fails()

    monkeypatch.setattr(ModelSpec, "build", fails_for_other_sizes)
    with pytest.raises(UsageError, match=r"after it was quantized \('norm.eps' is 0.5; load would build 1e-06\)"):
        dfqvit.save(qmodel, tmp_path / "q.safetensors")
    assert len(calls) > 1
    monkeypatch.setattr(ModelSpec, "build", fails)
    with pytest.raises(UsageError, match=r"after it was quantized \(a depth of 2\), and load could not"):
        dfqvit.save(qmodel, tmp_path / "q.safetensors")


def test_a_model_of_no_name_is_refused(seed):
    with pytest.raises(UsageError, match=r"model has no timm architecture name|model differs from timm's"):
        quantized(VisionTransformer(img_size=40, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3))


def test_preprocessing_travels_to_timm(tmp_path):
    model = load_model("demo")
    chosen = Preprocessing((1, 28, 28), (0.4,), (0.2,), "bilinear", 0.8)
    qmodel = dfqvit.quantize(model, samples=2, calib="noise", preprocessing=chosen)
    model.pretrained_cfg["mean"] = (0.2860,)  # the caller's own stays as it was
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    for found in (qmodel, loaded):
        for use_test_size in (False, True):
            config = timm.data.resolve_model_data_config(found, use_test_size=use_test_size)
            assert config["mean"] == (0.4,)
            assert config["std"] == (0.2,)
            assert (config["interpolation"], config["crop_pct"], config["input_size"]) == ("bilinear", 0.8, (1, 28, 28))
        assert Preprocessing.of(found) == chosen
    assert Preprocessing.of(model).mean == (0.2860,)


def test_preprocessing_of_a_test_size_travels(seed):
    model = timm.create_model("deit3_small_patch16_224", img_size=32, patch_size=8, **SMALL)
    model.pretrained_cfg |= {"test_input_size": (3, 64, 64), "test_crop_pct": 1.0}
    qmodel, _ = quantized(model)
    config = timm.data.resolve_model_data_config(qmodel, use_test_size=True)
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == qmodel.dfqvit_record.preprocessing.crop_pct
    assert model.pretrained_cfg["test_input_size"] == (3, 64, 64)


def test_load_leaves_every_generator(tmp_path, seed):
    import random

    import numpy as np

    qmodel, _ = quantized(small())
    path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dfqvit.load(path)
    dfqvit.save(qmodel, path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_float_checkpoint_is_no_file_of_ours(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        dfqvit.load("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match=r"is a folder; give the file in it"):
        dfqvit.load(tmp_path)
    torch.save(load_model("demo").state_dict(), tmp_path / "w.pth")
    with pytest.raises(DfqvitError, match="is no whole safetensors file"):
        dfqvit.load(tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_a_file_does_not_keep_are_said(seed, kind):
    model = small()
    getattr(model.blocks[1].norm1, kind)(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"model has a forward hook on 'blocks.1.norm1', which a file .* does not keep"
    ):
        quantized(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized(small(), placement="psaq", acm="sequential")  # with hooks of our own
