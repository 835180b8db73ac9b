"""What is changed in an integer model counts, whatever way it is changed: as in the simulated model, or refused in a sentence."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention, DropPath, LayerScale, Mlp, QuickGELU
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate

from ..conftest import made_once, small_swin, small_vit
from .test_blocks import close
from .test_families import CONVNEXT, ROTARY, SWIN_V2

SMALL = {**ROTARY, "init_values": 0.5}
KINDS = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit, part by part": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}),
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "dinov3, part by part": ("vit_small_patch16_dinov3", {**SMALL, "qk_norm": True}),
    "beit": ("beit_base_patch16_224", {**ROTARY, "init_values": 0.5}),
    "swin v2": ("swinv2_tiny_window8_256", SWIN_V2),
    "convnext": ("convnext_tiny", CONVNEXT),
}


def lively(architecture, sizes):
    """A model every part of which matters."""
    model = timm.create_model(architecture, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
            elif "logit_scale" in name:
                parameter.fill_(2.0)
            elif parameter.dim() > 1:
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@made_once
def pair(kind, scaling="channels", **options):
    """(integer, simulated, images): the same quantized model twice."""
    architecture, sizes = KINDS[kind]
    model = lively(architecture, {**sizes, **options})
    images = torch.randn(24, 3, *([64, 64] if kind == "convnext" else [32, 32]))
    recipe = Recipe(8, scaling=scaling)
    simulated = convert(model, recipe)
    calibrate(simulated, images[:8], recipe)
    integer = copy.deepcopy(simulated)
    accelerate(integer)
    return integer, simulated, images[8:]


def first_block(model):
    for name in ("stages", "layers"):
        if hasattr(model, name):
            return getattr(model, name)[0].blocks[0]
    return model.blocks[0]


def check_both(integer, simulated, images, change):
    """The change made to both, after a first call: the same answers, and not those of before."""
    before = [integer(images) for _ in range(2)][-1]
    for model in (integer, simulated):
        change(first_block(model))
    found = integer(images)
    assert close(found, simulated(images))
    assert not torch.equal(found, before)
    assert torch.equal(copy.deepcopy(integer)(images), found)


def clamped(block):
    parent, name = (block.attn, "proj_drop") if hasattr(block, "attn") else (block.mlp, "drop1")
    setattr(parent, name, nn.Hardtanh(-0.1, 0.1))


def dropped(block):
    block.mlp.drop2 = nn.Hardtanh(-0.1, 0.1)


def squashed(block):
    block.mlp.act = nn.ReLU()


def quick(block):
    block.mlp.act = QuickGELU()


def normed(block):
    block.mlp.norm = nn.LayerNorm(block.mlp.fc2.in_features)


def biased(block):
    layer = block.attn.qkv
    layer.bias = nn.Parameter(torch.linspace(-3, 3, layer.out_features), requires_grad=False)


def wrapped(block):
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1, nn.Hardtanh(-0.1, 0.1))


@pytest.mark.parametrize("change", [clamped, dropped, squashed, quick, normed, wrapped])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "swin v2"])
def test_another_module_in_the_place_of_one(seed, kind, change):
    """Where dropout stands, the activation, a norm: after the block was called, so after its constants were prepared."""
    check_both(*pair(kind), change)


def unscaled(block):
    block.gamma_1 = None


def given_gains(block):
    """Of which its class knows nothing."""
    name = "ls1" if "gamma_1" in block._parameters else "gamma_1"
    found = nn.Parameter(torch.full((48,), 5.0), requires_grad=False)
    setattr(block, name, found if name == "gamma_1" else LayerScale(48, 5.0))
    block.norm1.bias.data += 1


GAINS = [kind for kind in KINDS if kind not in ("swin v2", "convnext")]


@pytest.mark.parametrize(
    ("kind", "change"),
    [*((kind, given_gains) for kind in GAINS), *((kind, unscaled) for kind in GAINS if not kind.startswith("vit"))],
)
def test_gains_are_those_that_the_class_of_a_block_applies(seed, kind, change):
    """BEiT without its first has none: the second was applied, logits 33 % off."""
    integer, simulated, images = pair(kind)
    if kind.startswith("vit"):
        for model in (integer, simulated):
            first_block(model).ls1 = nn.Identity()
    check_both(integer, simulated, images, change)


@pytest.mark.parametrize("kind", ["dinov3", "dinov3, part by part"])
def test_a_bias_that_there_was_none_of(seed, kind):
    check_both(*pair(kind, qkv_bias=False), biased)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("blocks.0.mlp", Mlp, "forward"),
        ("blocks.0.attn", Attention, "forward"),
        ("blocks.0.norm1", nn.LayerNorm, "forward"),
        ("blocks.0", Block, "forward"),
        ("layers.0.blocks.0", SwinTransformerBlock, "_attn"),
    ],
)
def test_a_method_replaced_on_a_class_is_refused_until_it_is_undone(monkeypatch, seed, name, kind, method, called):
    """What stands for it would never hear of the new one: the model answered as before."""
    model = small_swin() if "layers" in name else small_vit(depth=1)
    images = torch.randn(4, 3, 32, 32)
    qmodel = dfqvit.quantize(model, 8, calib=images, rounding="nearest", progress=False)
    expected = copy.deepcopy(qmodel)(images)
    within, features = (
        torch.randn(1, *((*first_block(qmodel).input_resolution, 24) if "layers" in name else (17, 48))),
        copy.deepcopy(qmodel).forward_features(images),
    )
    if called:
        qmodel(images)
        first_block(qmodel)(within)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, lambda self, x, *args: 0 * x)
        with pytest.raises(dfqvit.UsageError, match=f"holds '{name}', of .*, on which class {method} was replaced"):
            qmodel(images)
        for run, given in ((first_block(qmodel), within), (qmodel.forward_head, features)):
            with pytest.raises(dfqvit.UsageError, match=f"on which class {method} was replaced"):
                run(given)
    assert torch.equal(qmodel(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(qmodel))(images), expected)


@pytest.mark.parametrize("of", ["model", "block"])
def test_a_compiled_model_refuses_a_method_replaced_on_a_class(monkeypatch, seed, of):
    """Nothing of timm's is in such a program, so torch guarded nothing: it answered as before."""
    torch._dynamo.reset()
    calib = torch.rand(2, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(small_vit(depth=1), 8, calib=calib, rounding="nearest", progress=False)
    run, x = (qmodel, calib) if of == "model" else (qmodel.blocks[0], torch.randn(2, 17, 48))
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = run(x)
        assert torch.equal(compiled(x), expected)
        for kind in (Mlp, Attention, nn.LayerNorm, Block):
            with monkeypatch.context() as patch:
                patch.setattr(kind, "forward", lambda self, x, *args: 0 * x)
                with pytest.raises(Exception, match=r"holds '\w.*', of .*, on which class forward was replaced"):
                    compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(x), expected)


def test_a_compiled_simulated_model_follows_a_method_replaced_on_a_class(monkeypatch, seed):
    torch._dynamo.reset()
    calib = torch.rand(2, 3, 32, 32) * 2 - 1
    options = {"calib": calib, "rounding": "nearest", "runtime": "simulated", "progress": False}
    qmodel = dfqvit.quantize(small_vit(depth=1), 8, **options)
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = qmodel(calib)
        assert torch.equal(compiled(calib), expected)
        monkeypatch.setattr(Mlp, "forward", lambda self, x: 0 * x)
        assert torch.equal(compiled(calib), qmodel(calib))
        assert not torch.equal(compiled(calib), expected)


def test_a_method_replaced_on_a_class_is_followed_where_nothing_stands_for_it(monkeypatch, seed):
    calib = torch.rand(4, 3, 32, 32) * 2 - 1
    options = {"calib": calib, "rounding": "nearest", "runtime": "simulated", "progress": False}
    qmodel = dfqvit.quantize(small_vit(depth=1), 8, **options)
    zeroed = copy.deepcopy(qmodel)
    zeroed.blocks[0].mlp.forward = lambda x: 0 * x
    expected, before = zeroed(calib), qmodel(calib)
    monkeypatch.setattr(Mlp, "forward", lambda self, x: 0 * x)
    assert torch.equal(qmodel(calib), expected)
    assert not torch.equal(before, expected)
    monkeypatch.setattr(Attention, "forward", lambda self, x, *args: 0 * x)
    with pytest.raises(dfqvit.UsageError, match="on which class forward was replaced"):
        qmodel(calib)


@pytest.mark.parametrize("kind", ["beit", "swin v2", "dinov3", "vit"])
def test_tensors_that_a_state_dict_left_on_meta_are_refused(seed, kind):
    """BEiT's positions were looked up by what lay in memory: logits 16 % off, the next time NaN."""
    architecture, sizes = KINDS[kind]
    model, calib = lively(architecture, sizes), torch.rand(4, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(model, 8, calib=calib, rounding="nearest", progress=False)
    images, empty = torch.randn(2, 3, 32, 32), copy.deepcopy(qmodel).to("meta")
    assert empty(images.to("meta")).is_meta
    emptied = copy.deepcopy(empty)
    empty.load_state_dict(qmodel.state_dict(), assign=True)
    if kind == "vit":  # all that it holds is in its state_dict
        emptied.to_empty(device="cpu").load_state_dict(qmodel.state_dict())
        for loaded in (empty, emptied):
            assert torch.equal(loaded(images), qmodel(images))
        return
    for each in (
        emptied,
        nn.Sequential(emptied),
        nn.Sequential(copy.deepcopy(qmodel)),  # with values, which to_empty takes away
    ):  # Swin's and BEiT's positions would be what lies in memory: of zeros, 12 % off
        with pytest.raises(
            dfqvit.UsageError, match=r"'[\w.]+' without values, and no state_dict holds it: load the whole model, by"
        ):
            each.to_empty(device="cpu")
    for _ in range(2):
        with pytest.raises(
            dfqvit.UsageError, match=r"holds '[\w.]+' on meta, without values, .*: load the whole model, by"
        ):
            empty(images)


def test_a_method_replaced_on_the_class_of_the_model_is_followed(monkeypatch, seed):
    qmodel = dfqvit.quantize(small_vit(depth=1), 8, calib=torch.randn(4, 3, 32, 32), rounding="nearest", progress=False)
    images = torch.randn(2, 3, 32, 32)
    features = qmodel.forward_features(images)
    monkeypatch.setattr(VisionTransformer, "forward", lambda self, x: self.forward_features(x))
    assert torch.equal(qmodel(images), features)
    assert torch.equal(qmodel(images), features)


@pytest.mark.parametrize("setting", [("padding_mode", "circular"), ("dilation", (2, 2))])
def test_settings_of_a_convolution(seed, setting):
    name, value = setting

    def change(block):
        setattr(block.conv_dw, name, value)
        if name == "dilation":
            block.conv_dw.padding = (6, 6)
        else:
            block.conv_dw._reversed_padding_repeated_twice = [3, 3, 3, 3]

    check_both(*pair("convnext"), change)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_alone_in_train_draws_anew_in_every_call(seed, kind):
    """Monte Carlo dropout: the model in eval, its dropout in train."""
    more = {"drop_path_rate": 0.5} if kind in ("convnext", "swin v2", "beit") else {"proj_drop_rate": 0.3}
    integer, _, images = pair(kind, **more)
    assert torch.equal(integer(images), integer(images))
    for module in integer.modules():
        if isinstance(module, (nn.Dropout, DropPath)):
            module.train()
    first = integer(images)
    assert not all(torch.equal(integer(images), first) for _ in range(10))  # the same may be drawn twice


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_functional_call_puts_in(seed, kind):
    """As a batch of models or a meta-learner calls it; and back to its own afterwards. The same where another buffer is set."""
    integer, _, images = pair(kind, scaling="none")  # so that both have the same tensors
    other, _, _ = pair(kind, scaling="none")
    expected, own = other(images), [integer(images) for _ in range(2)][-1]
    assert torch.equal(torch.func.functional_call(integer, other.state_dict(), (images,)), expected)
    assert torch.equal(integer(images), own)
    theirs = dict(other.named_modules())
    for name, module in integer.named_modules():
        module._buffers.update({key: value for key, value in theirs[name]._buffers.items() if key != "weight_blocked"})
        module._parameters.update(theirs[name]._parameters)
    assert torch.equal(integer(images), expected)


@pytest.mark.parametrize("kind", ["vit", "vit, part by part", "beit"])
def test_hooks_on_the_operands_of_attention(seed, kind):
    def change(block):
        block.attn.operands.k.register_forward_hook(lambda module, given, found: torch.zeros_like(found))

    integer, simulated, images = pair(kind)
    before = integer(images)
    for model in (integer, simulated):
        change(first_block(model))
    assert close(integer(images), simulated(images))
    assert not close(integer(images), before)


@pytest.mark.parametrize("kind", ["vit", "vit, part by part", "convnext", "swin v2"])
def test_what_load_could_not_build_is_not_saved(seed, kind, tmp_path):
    """Another activation, or a forward of an instance's own; what is as it was is saved and gives the same bits."""
    architecture, sizes = KINDS[kind]
    model = lively(architecture, sizes)
    size = 224 if kind == "convnext" else 32
    qmodel = dfqvit.quantize(model, 8, calib=torch.randn(3, 3, size, size).clamp(-1, 1), rounding="nearest")
    images = torch.randn(2, 3, size, size)
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    assert torch.equal(dfqvit.load(path)(images), qmodel(images))
    mlp = first_block(qmodel).mlp
    before, mlp.act = mlp.act, nn.SiLU()
    with pytest.raises(dfqvit.UsageError, match=r"mlp.act' is a SiLU; load would build a GELU"):
        dfqvit.save(qmodel, tmp_path / "other.safetensors")
    mlp.act = before
    mlp.forward = lambda x: 2 * x
    with pytest.raises(dfqvit.UsageError, match=r"mlp' has a forward of its own; load would build none"):
        dfqvit.save(qmodel, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def gradients(model, images, leaf, **options):
    model(images, **options).square().sum().backward()
    found, leaf.grad = leaf.grad.clone(), None
    return found


@pytest.mark.parametrize(
    "case", ["beit's shared table", "a rope of each block", "an attention mask", "swin v2's scales, padded"]
)
def test_gradients_of_what_enters_a_block_beside_x(seed, case):
    name, options, leaf_of, shape = {
        "beit's shared table": (
            "beit_base_patch16_224", {**ROTARY, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "init_values": 0.5},
            lambda model: model.rel_pos_bias.relative_position_bias_table, 32,
        ),
        "a rope of each block": (
            "vit_small_patch16_rope_mixed_224", {**SMALL, "qk_norm": True}, lambda model: model.rope.freqs, 32
        ),
        "an attention mask": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}, None, 32),
        "swin v2's scales, padded": (
            "swinv2_tiny_window8_256", {**SWIN_V2, "img_size": 36}, lambda model: model.layers[0].blocks[0].attn.logit_scale, 36
        ),
    }[case]  # fmt: skip
    model = lively(name, options)
    images = torch.randn(6, 3, shape, shape)
    simulated = convert(model, Recipe(8))
    calibrate(simulated, images, Recipe(8))
    integer = copy.deepcopy(simulated)
    accelerate(integer)
    integer(images)
    found = []
    for each in (integer, simulated):
        for tensor in each.parameters():
            tensor.requires_grad_(False)
        if leaf_of is None:
            leaf = torch.zeros(1, 1, 17, 17).requires_grad_()
            found.append(gradients(each, images, leaf, attn_mask=leaf))
        else:
            found.append(gradients(each, images, leaf_of(each).requires_grad_()))
    assert float(found[1].abs().sum()) > 0
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-5 * float(found[1].abs().max()))


def test_forward_mode_derivatives_are_refused(seed):
    integer, simulated, images = pair("vit")
    for model in (integer, simulated):
        with pytest.raises(dfqvit.UsageError, match=r"images had a tangent .* which rounding has not"):
            torch.func.jvp(model, (images,), (torch.randn_like(images),))
    assert torch.func.jvp(lambda x: x * 2, (images,), (images,))[1] is not None


@pytest.mark.parametrize("kind", ["dinov3", "dinov3, part by part", "swin v2"])
def test_tensors_on_meta_are_never_taken_for_values(seed, kind):
    """torch's loading of large models leaves the buffers that are in no state_dict on meta."""
    integer, _, images = pair(kind)
    skeleton = copy.deepcopy(integer).to("meta")
    skeleton.load_state_dict(integer.state_dict(), assign=True)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="meta"):
        skeleton(images)
    grid = torch.tensor(0.1), torch.tensor(3.0), 8
    operator, weight = torch.ops.dfqvit.layer_norm_quantize, torch.ones(32, device="meta")
    with pytest.raises(ValueError, match="layer_norm_quantize was given tensors on meta, which hold no values"):
        operator(images, weight, torch.zeros(32), 1e-6, *grid)
    whole = [tensor.to("meta") for tensor in (images, torch.ones(32), torch.zeros(32))]
    parameters = {"scale": torch.tensor(0.1, device="meta"), "zero_point": torch.tensor(3.0, device="meta")}
    assert torch.ops.dfqvit.layer_norm_quantize(*whole, 1e-6, *parameters.values(), 8).device.type == "meta"
