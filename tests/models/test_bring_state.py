"""The float reference whatever state the caller's model and frame are in; and what is no float timm model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
import re
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dfqvit
from dfqvit.errors import UsageError
from dfqvit.models import Preprocessing, load_model
from dfqvit.models.adapters import is_network
from dfqvit.models.foreign import _TWINS
from dfqvit.models.frame import evaluating, float_reference, undisturbed

from ..conftest import made_once, small_swin, small_vit

DROPPING = {"drop_rate": 0.3, "drop_path_rate": 0.3, "pos_drop_rate": 0.2, "attn_drop_rate": 0.2, "proj_drop_rate": 0.2}


quantized_once = made_once(dfqvit.quantize)  # in the usual frame, which tests compare with


def images(count=6, size=32):
    return torch.rand(count, 3, size, size) * 2 - 1


def same(ours, theirs):
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "recipe",
    [
        {"w_bits": 3, "acm": "sequential", "acm_blocks": None},
        {"w_bits": 3, "acm": "checked", "acm_blocks": None, "acm_shrink": True, "rounding": "nearest"},
        {"w_bits": 2, "reconstruct": 3, "rounding": "nearest"},
        {"w_bits": 4, "placement": "psaq", "acm_top": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_train_mode_changes_nothing(seed, make, recipe):
    model, x = make(**{key: value for key, value in DROPPING.items() if "pos" not in key}), images()
    wanted = dfqvit.quantize(model, calib=x, **recipe)
    model.train()
    found = dfqvit.quantize(model, calib=x, **recipe)
    assert same(found, wanted)
    assert found.dfqvit_record == wanted.dfqvit_record
    assert model.training
    assert not found.training


def test_train_mode_changes_no_bits_under_a_size(seed):
    model = small_vit(depth=1, embed_dim=24, **DROPPING)
    options = {"calib": images(), "size_budget": 0.03, "rounding": "nearest"}
    wanted = dfqvit.quantize(model, **options)
    assert same(dfqvit.quantize(model.train(), **options), wanted)


def test_every_flag_gradient_hook_and_generator_stays(seed):
    model = small_vit(**DROPPING)
    for module in model.modules():
        module.training = bool(torch.rand(()) < 0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(torch.rand(()) < 0.5))
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    flags = [module.training for module in model.modules()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dfqvit.quantize(model, 3, samples=2, iters=2, reconstruct=1, acm="sequential", rounding="nearest")
    dfqvit.synthesize(model, 2, 2)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    found = [parameter.grad for parameter in model.parameters()]
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert same(model, types.SimpleNamespace(state_dict=lambda: state))
    assert handle.id in model.head._forward_hooks
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]


def test_flags_are_put_back_after_an_error(seed):
    model = small_vit().train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(UsageError):
        dfqvit.quantize(model, calib=images(), layer_bits={"frog": 3})
    with pytest.raises(ZeroDivisionError), float_reference(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


FRAMES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "double": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize("options", [{"calib": "synthetic", "iters": 2}, {"reconstruct": 1}], ids=str)
def test_frames_change_nothing(seed, tmp_path, frame, options):
    model, x = small_vit(), images()
    options = {"calib": x, "samples": 2, "rounding": "nearest", **options}
    wanted = quantized_once(model, 3, **options)
    path = dfqvit.save(wanted, tmp_path / "q.safetensors")
    with FRAMES[frame]():
        found = dfqvit.quantize(model, 3, **options)
        loaded = dfqvit.load(path)
        again = dfqvit.save(found, tmp_path / "again.safetensors")
    assert same(found, wanted)
    assert same(loaded, wanted)
    assert again.read_bytes() == path.read_bytes()
    assert not any(tensor.is_inference() for tensor in loaded.state_dict().values())
    assert torch.equal(found(x), wanted(x))


def test_models_and_images_made_in_inference_mode(seed):
    with torch.inference_mode():
        model, x = small_vit(), images()
    assert next(model.parameters()).is_inference()
    made = dfqvit.quantize(model, 3, calib=x, reconstruct=2, rounding="nearest")
    assert not any(tensor.is_inference() for tensor in made.state_dict().values())
    assert dfqvit.synthesize(model, 2, 2).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_brought_to_float32(seed, dtype):
    model, x = small_vit().to(dtype), images().to(dtype)
    reference = copy.deepcopy(model).float()
    for options in ({"calib": x}, {"calib": "synthetic", "samples": 2, "iters": 2}):
        options["rounding"] = "nearest"
        found = dfqvit.quantize(model, **options)
        wanted = dfqvit.quantize(
            reference, **{key: v.float() if torch.is_tensor(v) else v for key, v in options.items()}
        )
        assert same(found, wanted)
        assert found(x.float()).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_model_of_two_dtypes(seed):
    model = small_vit()
    model.blocks[0].half()
    found = dfqvit.quantize(model, calib=images(), rounding="nearest")
    assert {value.dtype for value in found.state_dict().values() if value.dtype == torch.float16} == set()
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float16


def test_undisturbed_and_evaluating_restore():
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(module):
        assert not any(each.training for each in module.modules())
    assert [each.training for each in module.modules()] == [True, True, False]
    with torch.inference_mode(), undisturbed():
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    with default_dtype(torch.float64):
        with pytest.raises(KeyError), undisturbed():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64


def of_transformers(source, **config):
    """Stands for a transformers model: its class's module, and the configuration that names its weights."""
    kind = type("ViTForImageClassification", (nn.Linear,), {"__module__": "transformers.models.vit.modeling_vit"})
    model = kind(2, 2)
    model.config = types.SimpleNamespace(_name_or_path=source, **config)
    return model


def foreign():
    model, in_place = small_vit(), small_vit()
    in_place.blocks[1].compile(backend="eager")
    quantized = dfqvit.quantize(model, calib="noise", samples=2, rounding="nearest")
    yield (
        "vit_tiny_patch16_224",
        r"'vit_tiny_patch16_224', a name; give the model itself, dfqvit.models.load_model\('vit_tiny",
    )
    yield "out/model.safetensors", r"a path; give the model itself, dfqvit.load\('out/model.safetensors'\)"
    yield model.state_dict(), "an? OrderedDict, such as a state_dict; give the model that it is loaded into"
    yield timm.models.VisionTransformer, "the class VisionTransformer; give a model made of it"
    yield timm.create_model, "a function; call it; it must be a timm model"
    yield None, "a NoneType; it must be a timm model"
    yield torch.compile(model), "compiled by torch.compile; give model._orig_mod"
    yield in_place, r"compiled in place by compile\(\); give copy.deepcopy\(model\), which is not"
    yield nn.DataParallel(model), "wrapped in DataParallel; give model.module"
    yield AveragedModel(model), "wrapped in AveragedModel, which averages weights; give model.module"
    yield ModelEmaV2(model), "wrapped in ModelEmaV2, which averages weights; give model.module"
    yield ModelEmaV3(model), "wrapped in ModelEmaV3, which averages weights; give model.module"
    yield torch.jit.trace(model, images(1)), "a TorchScript module .*; give the timm model that it was made from"
    yield torch.export.export(model, (images(1),)).module(), "a GraphModule of torch.fx or torch.export"
    yield quantized, "quantized by dfqvit already"
    yield quantized.blocks[0], "quantized by dfqvit already"
    yield (
        torchvision.models.vit_b_32(),
        r"a VisionTransformer of torchvision.*timm.create_model\('vit_base_patch32_224'",
    )
    yield torchvision.models.swin_t(), r"a SwinTransformer of torchvision.*'swin_tiny_patch4_window7_224'"
    yield (
        nn.Sequential(nn.Identity(), nn.Linear(3, 3)),
        r"model was a Sequential; it may be .* or a network that holds one",
    )
    yield timm.create_model("resnet18"), r"model was a ResNet; it may be"
    yield small_vit().to("meta"), "on the meta device, where it has no weights"
    yield nn.Identity(), "a Identity without parameters"
    yield torch.ao.quantization.quantize_dynamic(copy.deepcopy(model)), "quantized by another library already"
    yield (
        of_transformers("google/vit-base-patch16-224"),
        r"timm.create_model\('vit_base_patch16_224', pretrained=True\)",
    )
    yield of_transformers("facebook/deit-tiny-patch16-224"), r"'deit_tiny_patch16_224.fb_in1k'"
    yield of_transformers("microsoft/swin-tiny-patch4-window7-224"), r"'swin_tiny_patch4_window7_224'"
    yield of_transformers("facebook/dinov2-base"), r"'vit_base_patch14_dinov2.lvd142m'"
    yield of_transformers("facebook/dino-vits16"), r"'vit_small_patch16_224.dino'"
    sizes = {"hidden_size": 384, "patch_size": 16, "image_size": 224, "model_type": "vit"}
    yield (
        of_transformers("someone/else", **sizes),
        r"of the same structure is timm.create_model\('vit_small_patch16_224'",
    )


@pytest.mark.filterwarnings("ignore")
def test_the_wrong_thing_in_the_models_place_is_one_sentence():
    count = 0
    for thing, said in foreign():
        for work in (dfqvit.quantize, dfqvit.synthesize):
            with pytest.raises(UsageError, match=said) as error:
                work(thing)
            assert "\n" not in str(error.value)
        count += 1
    assert count > 22


def test_twins_of_transformers_models_exist_in_timm():
    for pattern, twin in _TWINS:
        choices = [found.strip("()").split("|") for found in re.findall(r"\([^)]*\)", pattern)]
        known = 0
        for chosen in itertools.product(*choices):
            name = twin
            for index, value in enumerate(chosen, 1):
                name = name.replace(f"\\{index}", value)
            architecture, _, tag = name.partition(".")
            known += timm.is_model(architecture) and (not tag or name in timm.list_pretrained())
        assert known, (pattern, twin)


def test_classes_for_the_synthesis_are_the_heads(seed):
    model = load_model("demo")
    model.head = nn.Linear(96, 4)
    assert dfqvit.synthesize(model, 6, 1).shape[0] == 6
    assert dfqvit.quantize(model, samples=6, iters=1, rounding="nearest")(torch.zeros(1, 1, 28, 28)).shape == (1, 4)
    assert Preprocessing.of(model).input_size == (1, 28, 28)


def test_preprocessing_of_another_size_is_refused(seed):
    for size in ((3, 64, 64), (1, 32, 32)):
        other = Preprocessing(size, (0.5,) * size[0], (0.5,) * size[0])
        with pytest.raises(UsageError, match=r"preprocessing had input_size .*; the model takes \(3, 32, 32\)"):
            dfqvit.quantize(small_vit(), calib="noise", samples=2, preprocessing=other)


RGB = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (123.7, 116.3, 103.5)}, "mean was .*; it is of pixels from 0 to 1, .* of 0 to 255; divide by 255"),
        ({"std": (58.4, 57.1, 57.4)}, "std was .*; it is of pixels from 0 to 1, .* of 0 to 255; divide by 255"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean was .*; every value must be a finite number"),
        ({"mean": (0.5, "0.5", 0.5)}, "mean was .*; every value must be a finite number"),
        ({"mean": (1e30, 0.5, 0.5)}, "mean was .*; it is of pixels from 0 to 1"),
        ({"std": (0.5, math.inf, 0.5)}, "std was .*; every value must be a finite number"),
        ({"std": (0.5, 1e-46, 0.5)}, "std was .*; every value must be 1e-06 or more"),
        ({"crop_pct": math.nan}, "crop_pct was nan; it may be a number above 0, 2 at most"),
        ({"crop_pct": 0}, "crop_pct was 0; it may be a number above 0"),
        ({"crop_pct": "0.9"}, "crop_pct was '0.9'; it may be a number above 0"),
        ({"crop_mode": "centre"}, "crop_mode was 'centre'; it may be 'center', 'squash' or 'border'"),
    ],
)
def test_preprocessing_of_another_scale_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        Preprocessing(**RGB | change)


def test_a_pretrained_configuration_of_another_scale_is_refused():
    model = small_vit()
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (123.7, 116.3, 103.5)}
    with pytest.raises(UsageError, match="divide by 255"):
        Preprocessing.of(model)


def test_a_configuration_as_timms_dataclass_is_taken(seed):
    model = small_vit()
    wanted, own = Preprocessing.of(model), model.pretrained_cfg
    model.pretrained_cfg = timm.models.PretrainedCfg(**own)
    assert Preprocessing.of(model) == wanted
    qmodel = dfqvit.quantize(model, calib=images(), rounding="nearest")
    assert qmodel.dfqvit_record.preprocessing == wanted
    assert Preprocessing.of(qmodel) == wanted
    network = nn.Sequential(model, nn.Linear(model.num_classes, 2))
    assert is_network(network)
    assert Preprocessing.of(network) == wanted


def test_none_of_timms_configurations_is_refused():
    names = timm.list_pretrained()
    assert len(names) > 1000
    for name in names:
        known = timm.models.get_pretrained_cfg(name)
        own = {"interpolation": known.interpolation, "crop_pct": known.crop_pct, "crop_mode": known.crop_mode}
        for crop in {known.crop_pct, known.test_crop_pct or known.crop_pct}:
            Preprocessing(known.input_size, tuple(known.mean), tuple(known.std), **own | {"crop_pct": crop})


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "pixels had dtype int64; it must be uint8, or float from 0 to 1"),
        (torch.zeros(3, 8, 8, dtype=torch.uint16), "pixels had dtype uint16; it must be uint8"),
        (
            torch.rand(3, 8, 8) * 200 + 50,
            "pixels held values from .* to .*; floats must lie from 0 to 1; divide by 255",
        ),
        (torch.rand(3, 8, 8) * 2 - 1, "pixels held values from .* to .*; floats must lie from 0 to 1$"),
        (torch.full((3, 8, 8), math.nan), "pixels held values from nan to nan; floats must lie from 0 to 1$"),
        (torch.rand(2, 1, 8, 8), r"pixels had shape \(2, 1, 8, 8\); it must be \[..., 3, H, W\]"),
        (torch.rand(8, 8), r"pixels had shape \(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), "pixels was a ndarray; it must be a tensor"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_pixels_of_another_kind_are_refused(pixels, message):
    with pytest.raises(UsageError, match=message):
        Preprocessing(**RGB).normalise(pixels)


def test_a_mean_of_one_channel_is_not_stretched_over_three():
    with pytest.raises(UsageError, match=r"it must be \[..., 1, H, W\]"):
        Preprocessing((1, 8, 8), (0.3,), (0.3,)).normalise(torch.rand(2, 3, 8, 8))


def test_pixels_with_a_small_margin_and_none_at_all():
    found = Preprocessing(**RGB).normalise(torch.tensor([-1e-3, 1.001, 0.5]).view(3, 1, 1))
    assert found.flatten().tolist() == pytest.approx([-1.002, 1.002, 0])
    assert Preprocessing(**RGB).normalise(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wbits": 2}, "quantize has no setting 'wbits'; did you mean 'w_bits'?"),
        ({"calib": "noise", "zzz": 2}, "quantize has no setting 'zzz'$"),
        ({"learning_rate": 0.1}, "learning_rate was 0.1 and calib given images; it is a setting of the synthesis, so"),
        ({"calib": "noise", "schedule": "fixed"}, "schedule was 'fixed' and calib 'noise'; it is a setting of the"),
        ({"calib": "procedural", "warmup": 0.1}, "warmup was 0.1 and calib 'procedural'"),
        ({"calib": "synthetic", "warmup": 2}, "warmup was 2; it is a share"),
        ({"calib": "nois"}, "calib was 'nois'; it may be 'synthetic', 'procedural', 'noise' or images"),
        *(({"calib": "noise", "samples": value}, f"samples was {value!r}; it must be") for value in (0, "16", 2.5, -1)),
        *(
            ({"calib": "noise", "seed": value}, f"seed was {value!r}; it must be a whole")
            for value in ("0", None, -1, 0.5)
        ),
        ({"layer_bits": [1]}, r"layer_bits was \[1\]; it may be a dict of names of layers to bits"),
        ({"acm_blocks": 3}, "acm_blocks was 3; it may be a list of indices of blocks"),
        ({"acm_blocks": ["last"]}, r"acm_blocks was \['last'\]; it may be a list of indices of blocks"),
        (
            {"preprocessing": "imagenet"},
            "preprocessing was 'imagenet'; it may be a dfqvit.models.Preprocessing, or None",
        ),
        ({"size_budget": math.inf}, "size_budget was inf MB; it must be finite and above 0"),
        ({"size_budget": math.nan}, "size_budget was nan MB; it must be finite and above 0"),
        ({"size_budget": -1}, "size_budget was -1 MB; it must be finite and above 0"),
        ({"size_budget": "1"}, "size_budget was '1'; it must be a number of megabytes"),
    ],
)
def test_arguments_of_quantize_are_refused_in_a_sentence(options, message):
    with pytest.raises(UsageError, match=message):
        dfqvit.quantize(small_vit(), **{"calib": images(), "rounding": "nearest", **options})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 2}, "gamma was 2; it counts blocks where acm_blocks is None"),
        ({"gamma": 2, "acm": "sequential"}, "gamma was 2; it counts blocks where acm_blocks is None"),
        ({"acm": "none", "acm_blocks": [0]}, r"acm_blocks was \[0\] and acm 'none'; it is for acm='sequential'"),
        ({"acm": "none", "acm_top": 2}, "acm_top was 2 and acm 'none'"),
        ({"acm": "none", "acm_shrink": True}, "acm_shrink was True and acm 'none'"),
        ({"acm_shape": "channel"}, "acm_shape was 'channel' and acm 'auto', which corrects nothing here"),
        ({"acm_top": 1, "acm_blocks": [0]}, r"acm_top was 1 and acm_blocks \[0\]; give one of them"),
        ({"report": 3}, "report was 3; it may be a function of a Progress, or None"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        dfqvit.quantize(small_vit(), 4, calib="procedural", samples=2, **settings)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("checkpoint_path", "w.pth", r"give it as checkpoint \(--checkpoint\)"),
        ("device", "meta", r"give it as device \(--device\)"),
        ("dtype", torch.float16, "a float model is read in float32"),
        ("pretrained", True, "weights are timm's own where no checkpoint is given"),
    ],
)
def test_keywords_that_are_no_part_of_a_structure_are_refused(key, value, said):
    """Found here: two of them changed nothing without a word; a file held the path, and `load` wanted the weights there."""
    with pytest.raises(UsageError, match=f"model_kwargs held '{key}', which is no part of a model's structure; {said}"):
        load_model("vit_tiny_patch16_224", model_kwargs={"depth": 1, key: value}, pretrained=False)


def test_a_setting_given_twice_is_refused():
    for key, values in (("num_classes", (10, 5)), ("img_size", (32, 64)), ("in_chans", (1, 3))):
        with pytest.raises(
            UsageError, match=f"{key} was {values[0]}, and {values[1]} in model_kwargs; give one of them"
        ):
            load_model("vit_tiny_patch16_224", **{key: values[0]}, model_kwargs={key: values[1]}, pretrained=False)


def test_threads_quantize_one_model_one_after_the_other(seed):
    """Each result is its own, and the model is left as it was: in train mode."""
    model, x = small_vit().train(), torch.randn(2, 3, 32, 32)
    kinds = [{"calib": "synthetic", "iters": 3, "samples": 2 + k, "seed": k} for k in range(3)]
    kinds += [{"calib": "procedural", "samples": 3, "w_bits": 3}]

    def made(settings):
        return dfqvit.quantize(model, rounding="nearest", progress=False, **settings)(x)

    alone = [made(settings) for settings in kinds]
    with ThreadPoolExecutor(len(kinds)) as pool:
        together = list(pool.map(made, kinds))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
