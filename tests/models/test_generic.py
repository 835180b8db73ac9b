"""Models of families without an adapter of their own: what is quantized, what stays float, files, corrections, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelThingsBlock
from timm.utils.model import reparameterize_model
from torch import nn

import dfqvit
from dfqvit.calibration import convert
from dfqvit.cli.info import describe_file
from dfqvit.errors import UsageError
from dfqvit.models import ModelSpec, Preprocessing
from dfqvit.models.adapters import find_adapter
from dfqvit.models.adapters.generic import GenericAdapter
from dfqvit.models.arithmetic import OTHER, multiply_adds
from dfqvit.quantization.layers import QuantLinear, QuantPatchProjection
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime.convert import parts_not_integer
from dfqvit.synthesis import synthesize

from .. import conftest
from ..conftest import small_vit

SMALL_VIT = conftest.SMALL["distilled"]
SMALL = {
    "convnext_atto": {"dims": (16, 24, 32, 40), "depths": (1, 1, 2, 1), "num_classes": 7},
    "poolformer_s12": {"num_classes": 7},
    "eva02_tiny_patch14_224": {**SMALL_VIT, "ref_feat_shape": (4, 4)},
    "beit_base_patch16_224": SMALL_VIT,
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "num_classes": 7,
    },
    "vit_base_patch16_xp_224": SMALL_VIT,
    "vit_small_patch16_18x2_224": SMALL_VIT,
    "mixer_s16_224": {"img_size": 64, "mlp_ratio": (0.25, 0.25), "num_classes": 7},
    "mobilevit_xxs": {"num_classes": 7},
}


def small(name, **changes):
    """A small model of the family whose every part matters to its output."""
    model = timm.create_model(name, **{**SMALL[name], **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.5 + 0.5 * torch.rand_like(parameter))
    return model


def images_for(model, count=4):
    return torch.randn(count, *Preprocessing.of(model).input_size)


def apart(found, wanted):
    return float((found - wanted).norm() / (wanted - wanted.mean()).norm())


@pytest.fixture(params=list(SMALL))
def family(request, seed):
    return small(request.param)


@torch.no_grad()
def test_quantized_saved_and_loaded_with_the_same_bits(family, tmp_path):
    assert isinstance(find_adapter(family), GenericAdapter)
    x, before = images_for(family), copy.deepcopy(family.state_dict())
    wanted = family(x)
    assert apart(convert(family, Recipe(8))(x), wanted) < 1e-3
    qmodel = dfqvit.quantize(family, 8, calib=x, rounding="nearest")
    found = qmodel(x)
    assert apart(found, wanted) < 0.25
    assert not torch.equal(found, wanted)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "model.safetensors"))
    assert torch.equal(loaded(x), found)
    assert set(dfqvit.integer_report(loaded).values()) <= {""}
    assert all(torch.equal(before[key], value) for key, value in family.state_dict().items())


def test_images_are_made_of_every_family(family):
    images = synthesize(family, samples=2, iters=2)
    assert images.shape == images_for(family, 2).shape
    assert torch.isfinite(images).all()


@torch.no_grad()
def test_features_are_what_attention_passes_to_its_projection(seed):
    model = small("beit_base_patch16_224")
    x, seen = images_for(model), []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with find_adapter(model).capture() as features:
        model(x)
    assert len(features.tensors) == len(seen) == 2
    for found, values in zip(features.tensors, seen, strict=True):
        assert torch.allclose(found, values[:, 1:].unflatten(-1, (3, 16)).mean(2), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("visformer_tiny", 3),  # stage1, stage2, stage3
        ("convmixer_768_32", 32),  # blocks that are nn.Sequential
        ("efficientvim_m1", 3),  # stages that give tuples
        ("rdnet_tiny", 7),  # dense_stages
    ],
)
def test_stages_of_other_names_and_results_serve_too(seed, name, stages):
    model = timm.create_model(name, num_classes=5).eval()
    with find_adapter(model).capture() as features, torch.no_grad():
        model(images_for(model, 2))
    assert len(features.tensors) == stages
    assert all(len(tensor) == 2 and tensor.dim() == 3 for tensor in features.tensors)


@torch.no_grad()
def test_windows_of_an_image_are_told_apart(seed):
    model = small("swinv2_tiny_window8_256")
    with find_adapter(model).capture() as features:
        model(images_for(model, 3))
    assert features.windows == [16, 16, 4, 4]
    assert [len(tensor) for tensor in features.tensors] == [48, 48, 12, 12]


@torch.no_grad()
def test_stages_serve_where_there_is_no_attention(seed):
    model, seen = small("convnext_atto"), []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, output: seen.append(output))
    with find_adapter(model).capture() as features:
        model(images_for(model, 2))
    assert features.tensors[0].shape == (2, 28 * 28, 16)  # 56 x 56, averaged in twos
    for found, output in zip(features.tensors[1:], seen[1:], strict=True):
        assert torch.equal(found, output.flatten(2).transpose(1, 2))


def test_what_is_quantized_and_what_stays_float(seed):
    kinds = {name: type(module) for name, module in convert(small("convnext_atto"), Recipe(4)).named_modules()}
    assert kinds["stem.0"] is QuantPatchProjection
    assert kinds["stages.1.downsample.1"] is QuantPatchProjection
    assert kinds["stages.0.blocks.0.conv_dw"] is nn.Conv2d
    assert issubclass(kinds["stages.0.blocks.0.mlp.fc1"], QuantLinear)
    assert kinds["head.fc"] is QuantLinear
    beit = convert(small("beit_base_patch16_224"), Recipe(4))
    assert isinstance(beit.get_submodule("blocks.0.attn.qkv"), QuantLinear)


def test_edges_keep_eight_bits(seed):
    qmodel = convert(small("convnext_atto"), Recipe(4))
    bits = {name: module.w_bits for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}
    assert {name for name, width in bits.items() if width == 8} == {"stem.0", "head.fc"}


class ReadsItsWeights(nn.Module):
    """A block whose second layer is read, whose third is both called and read, whose fourth is never reached."""

    def __init__(self, width=48):
        super().__init__()
        self.called, self.read, self.both, self.unused = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        y = F.linear(self.called(x), self.read.weight, self.read.bias)
        return x + self.both(y) * self.both.weight.mean()


def test_a_layer_whose_weight_is_read_stays_float(seed):
    model = small("beit_base_patch16_224")
    model.blocks[1].mlp = ReadsItsWeights()
    x = images_for(model)
    layers = find_adapter(model).layers()
    inside = {name.rpartition(".")[2] for name in layers if name.startswith("blocks.1.mlp.")}
    assert inside == {"called"}
    assert type(model.blocks[1].mlp.called) is nn.Linear
    assert apart(convert(model, Recipe(8))(x), model(x)) < 1e-3


def test_a_layer_at_two_places_stays_float_and_is_saved(seed, tmp_path):
    timm.models.register_model(_shared)
    model = timm.create_model("_shared").eval()
    x = images_for(model)
    qmodel = dfqvit.quantize(model, 8, calib=x, rounding="nearest")
    assert type(qmodel.get_submodule("blocks.0.mlp.fc1")) is nn.Linear
    assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))(x), qmodel(x))


def _shared(pretrained=False, **kwargs):
    model = timm.create_model("beit_base_patch16_224", **{**SMALL_VIT, **kwargs})
    model.blocks[1].mlp.fc1 = model.blocks[0].mlp.fc1
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "_shared"}
    return model


def test_corrections(seed, tmp_path):
    """ACM on blocks of any layout; shapes that need channels last are refused."""
    model = small("convnext_atto")
    x = images_for(model)
    qmodel = dfqvit.quantize(model, 3, calib=x, rounding="nearest", acm="sequential", acm_blocks=None)
    left = qmodel.dfqvit_record.measured["acm_left"]
    assert len(left) == 5
    assert max(left.values()) < 1.02
    assert min(left.values()) < 0.95
    assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))(x), qmodel(x))
    with pytest.raises(UsageError, match="acm_shape was 'channel'; in this ConvNeXt it may be 'element'"):
        dfqvit.quantize(model, 3, calib=x, acm="sequential", acm_shape="channel")
    with pytest.raises(UsageError, match="acm was 'sequential'; no blocks are known in this ByobNet"):
        dfqvit.quantize(small("mobilevit_xxs"), 3, calib=torch.randn(4, 3, 256, 256), acm="sequential")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "psaq"}, "placement was 'psaq' and the model a ConvNeXt; it may be 'gemm'"),
        ({"reconstruct": 3}, "reconstruct was 3; in a ConvNeXt it may be 0"),
        ({"layer_bits": {"stages.0.blocks.0.conv_dw": 4}}, "layer_bits named 'stages.0.blocks.0.conv_dw'"),
    ],
)
def test_settings_that_do_not_fit(seed, settings, message):
    with pytest.raises(UsageError, match=message):
        dfqvit.quantize(small("convnext_atto"), calib="noise", samples=2, **settings)


class TwoInputs(nn.Module):
    """As a model of images and texts."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"architecture": "none", "input_size": (3, 32, 32)}
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images, text):
        return self.head(self.first(images) + text)


@pytest.mark.parametrize(
    "make", [TwoInputs, lambda: timm.create_model("resnet18"), lambda: nn.Sequential(nn.Linear(2, 2))]
)
@pytest.mark.parametrize("work", [lambda model: dfqvit.quantize(model, calib="noise"), dfqvit.synthesize, dfqvit.patch])
def test_what_cannot_be_quantized_is_refused_in_one_sentence(make, work):
    model = make()
    with pytest.raises(UsageError, match=f"model was a {type(model).__name__}; it may be a timm model"):
        work(model)


def test_a_model_that_cannot_be_run_is_refused(seed):
    model = small("convnext_atto")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 2, 2)}
    with pytest.raises(UsageError, match=r"model was a ConvNeXt, which one image \[1, 3, 2, 2\] cannot be run through"):
        dfqvit.quantize(model, calib="noise", samples=2)


def round_trip(model, tmp_path):
    """The model at W8/A8, after a trip through a file; and the images that it was calibrated on."""
    images = torch.randn(2, *Preprocessing.of(model).input_size) * 0.5
    qmodel = dfqvit.quantize(model, w_bits=8, calib=images, rounding="nearest", progress=False)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "model.safetensors"))
    assert torch.equal(loaded(images), qmodel(images))
    return loaded, images


@pytest.mark.parametrize("name", ["mixer_s16_224", "mobilevit_xxs"])
def test_the_size_that_was_asked_for_is_that_of_the_images(seed, name, tmp_path):
    """Of families whose models do not say it, one that takes no other size and one that takes any."""
    model = small(name, img_size=64)
    loaded, images = round_trip(model, tmp_path)
    assert Preprocessing.of(loaded).input_size == tuple(images.shape[1:]) == (3, 64, 64)
    assert torch.allclose(loaded(images), model(images), rtol=0, atol=0.5 * float(model(images).std()))


@pytest.mark.parametrize("name", ["efficientvit_m0", "shvit_s1"])
def test_families_whose_classifier_cannot_be_asked_for_once_it_is_gone(seed, name, tmp_path):
    loaded, images = round_trip(timm.create_model(name, num_classes=0).eval(), tmp_path)
    assert loaded.dfqvit_record.spec.kwargs["num_classes"] == 0
    assert loaded(images).dim() == 2


def test_a_model_that_was_called_before_is_quantized_alike(seed, tmp_path):
    """ConViT makes tables in its first call, from a weight that it reads."""
    model = timm.create_model(
        "convit_tiny", img_size=32, patch_size=8, depth=3, local_up_to_layer=2, num_classes=5
    ).eval()
    fresh, images = round_trip(copy.deepcopy(model), tmp_path)
    model(images)
    called, images = round_trip(model, tmp_path)
    assert fresh.state_dict().keys() == called.state_dict().keys()
    assert isinstance(called.blocks[0].attn.qk, nn.Linear)


@torch.no_grad()
@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_backbones_without_a_classifier(seed, rounding, tmp_path):
    convnext = small("convnext_atto", num_classes=0)
    convnext.pretrained_cfg = {**convnext.pretrained_cfg, "input_size": (3, 64, 64)}
    for model in (small_vit(num_classes=0), convnext):
        x = images_for(model, 6)
        kwargs = (
            {**SMALL_VIT, "depth": 3, "num_classes": 0} if isinstance(model, timm.models.VisionTransformer) else None
        )
        settings = {"samples": 4, "iters": 2, "companions": 4, "rounding": rounding, "model_kwargs": kwargs}
        qmodel = dfqvit.quantize(model, 8, **settings)
        assert apart(qmodel(x), model(x)) < 0.5
        assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))(x), qmodel(x))
        with pytest.raises(UsageError, match=r"acm was 'checked'; it compares logits"):
            dfqvit.quantize(model, 4, calib=x, acm="checked", model_kwargs=kwargs)
        with pytest.raises(UsageError, match=r"size_budget was 9; it compares logits"):
            dfqvit.quantize(model, 4, calib=x, size_budget=9, model_kwargs=kwargs)


def test_second_order_rounding_keeps_features_better_than_nearest(seed):
    """On the calibration images, of a model whose features are correlated."""
    model = small_vit(num_classes=0, depth=2)
    mixed = torch.randn(12, 4, 1, 1) * torch.randn(1, 4, 3 * 32 * 32, 1)[..., 0, None]
    x = mixed.sum(1).view(12, 3, 32, 32) / 2
    kwargs, errors = {**SMALL_VIT, "num_classes": 0}, {}
    for rounding in ("nearest", "second-order"):
        qmodel = dfqvit.quantize(model, 3, calib=x, rounding=rounding, model_kwargs=kwargs)
        with torch.no_grad():
            errors[rounding] = apart(qmodel(x), model(x))
    assert errors["second-order"] < errors["nearest"]


def test_the_mlps_of_parallel_blocks_can_be_patched(seed):
    model = timm.create_model("vit_small_patch16_18x2_224", **SMALL_VIT).eval()
    assert type(model.blocks[0]) is ParallelThingsBlock
    with dfqvit.patch(model) as handle:
        assert {name.rpartition(".")[2] for name in handle.patched} == {"fc1", "fc2"}
        assert len(handle.patched) == 8


def test_a_structure_that_only_a_tag_has_is_found():
    """timm gives the tag another aligner than the plain name."""
    name = "deepseek_vit_412m_enc.deepseek_v4_flash_vision_exp"
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert ModelSpec.of(model) == ModelSpec(name, {"depth": 1})


def test_multiply_adds_of_a_vit_by_hand():
    """Per token: 3 DD + DD + 8 DD of the layers, 2 N D of attention's products."""
    shares = multiply_adds(ModelSpec("vit_tiny_patch16_224", SMALL_VIT))
    tokens, width = 17, 48
    block = tokens * (12 * width**2 + 2 * tokens * width)
    whole = 2 * block + 16 * 192 * width + 7 * width
    assert shares["blocks.1.mlp.fc2"] == pytest.approx(tokens * 4 * width**2 / whole)
    assert shares[OTHER] == pytest.approx(2 * 2 * tokens**2 * width / whole)
    assert sum(shares.values()) == pytest.approx(1)


def test_info_says_what_stays_float(seed, tmp_path):
    model = small("convnext_atto")
    path = dfqvit.save(
        dfqvit.quantize(model, 8, calib="noise", samples=2, rounding="nearest"), tmp_path / "m.safetensors"
    )
    found = describe_file(path, torch.device("cpu"), 0)["float"]
    assert set(found) == {f"stages.{stage}.blocks.{k}.conv_dw" for stage, k in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))}
    assert 0 < sum(found.values()) < 0.5


@torch.no_grad()
def test_layers_that_mix_heads_stay_float(seed):
    model = timm.create_model("cait_xxs24_224", img_size=64, depth=2, num_heads=4, num_classes=7).eval()
    images = images_for(model)
    qmodel = dfqvit.quantize(model, 8, calib=images, rounding="nearest")
    attention = qmodel.blocks[0].attn
    assert type(attention.qkv) is QuantLinear
    assert type(attention.proj_l) is type(attention.proj_w) is nn.Linear
    assert apart(qmodel(images), model(images)) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["gcvit_xxtiny", "iformer_s"])
def test_blocks_without_products_count_as_integer(seed, name):
    """Pooling of GC ViT and positions of iFormer, by a depthwise convolution, stand among the blocks."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    blocks = {module: part for part, module in model.named_modules()}
    idle = [
        blocks[block]
        for block in find_adapter(model).blocks()
        if not any(isinstance(part, nn.Linear) or getattr(part, "groups", None) == 1 for part in block.modules())
    ]
    assert idle
    assert not any(parts_not_integer(model.get_submodule(part)) for part in idle)
    with_products = next(block for block in blocks if type(block) is nn.Linear)
    assert parts_not_integer(with_products) == "it stays float"


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "fastvit_t8"])
@torch.no_grad()
def test_fusing_a_quantized_model_is_refused(seed, name, tmp_path):
    """It ended in "unsupported operand type(s) for *: 'NoneType' and 'Tensor'", of a weight that is packed."""
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, *Preprocessing.of(model).input_size)
    qmodel = dfqvit.quantize(model, 8, calib=images, rounding="nearest", progress=False)
    expected = qmodel(images)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "q.safetensors"))
    for each in (qmodel, loaded, pickle.loads(pickle.dumps(qmodel))):
        with pytest.raises(UsageError, match="a quantized model cannot be fused"):
            reparameterize_model(each)
        assert torch.equal(each(images), expected)
