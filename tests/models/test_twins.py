"""Image classifiers of transformers through their twin in timm: the same logits, every weight used, anything else refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dfqvit
from dfqvit.errors import UsageError
from dfqvit.models import ModelSpec, Preprocessing
from dfqvit.models.twin_families import OLD, TWINS, _ratio
from dfqvit.models.twins import _rename
from dfqvit.storage.hub import _metadata

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {"image_size": 32, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
CASES = {
    "ViT": ("ViT", "", {**VIT, "intermediate_size": 96}),
    "ViT, grey, no biases": ("ViT", "", {**VIT, "num_channels": 1, "qkv_bias": False, "hidden_act": "gelu_new"}),
    "DeiT": ("DeiT", "", {**VIT, "intermediate_size": 100}),
    "DeiT with teacher": ("DeiT", "WithTeacher", {**VIT, "intermediate_size": 96}),
    "Swin": ("Swin", "", SWIN),
    "DINOv2": ("Dinov2", "", VIT),
    "DINOv2, gated": ("Dinov2", "", {**VIT, "use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegisters", "", {**VIT, "num_register_tokens": 3}),
    "ConvNeXt": ("ConvNext", "", CONVNEXT),
}


def classifier(case):
    """With random weights large enough to matter, also those that transformers sets to 0 or 1."""
    name, more, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**settings, num_labels=7)
    model = getattr(transformers, f"{name}ForImageClassification{more}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=list(CASES))
def model(request, seed):
    return classifier(request.param)


def test_the_twin_computes_the_same_and_is_quantized_like_any_other(model, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = dfqvit.from_transformers(model)
    images = torch.randn(5, model.config.num_channels, 32, 32)
    with torch.no_grad():
        wanted, found = model(images).logits, twin(images)
    assert not twin.training
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    qmodel = dfqvit.quantize(twin, 8, calib=images, rounding="nearest")
    assert float((qmodel(images) - wanted).norm() / wanted.norm()) < 0.2
    assert torch.equal(dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))(images), qmodel(images))


def test_the_card_names_no_weights_of_timm(seed):
    """The twin has the name of a structure of timm, and the weights of another model."""
    qmodel = dfqvit.quantize(
        dfqvit.from_transformers(classifier("ViT")), 8, calib="noise", samples=2, rounding="nearest"
    )
    assert _metadata(qmodel.dfqvit_record, None).base_model is None
    plain = dataclasses.replace(qmodel.dfqvit_record, spec=ModelSpec("vit_base_patch16_224"))
    assert _metadata(plain, None).base_model.startswith("timm/vit_base_patch16_224")


@pytest.mark.parametrize(("hidden", "width"), [(3072, 768), (100, 48), *((3 * k + 1, k) for k in range(7, 400, 13))])
def test_timm_makes_the_hidden_channels_that_are_wanted(hidden, width):
    assert int(width * _ratio(hidden, width)) == hidden


def test_every_family_is_tried():
    assert {f"{name}ForImageClassification{more}" for name, more, _ in CASES.values()} == set(TWINS)


def test_a_weight_that_has_no_place_is_refused(model):
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UsageError, match=r"'extra' is \(3,\) in the one and absent in the other"):
        dfqvit.from_transformers(model)


def test_a_model_that_computes_something_else_is_refused(model):
    """Every tensor has its place, but the forward pass was changed."""
    forward = model.forward

    def doubled(*args, **kwargs):
        found = forward(*args, **kwargs)
        return SimpleNamespace(logits=2 * found.logits)

    model.forward = doubled
    with pytest.raises(UsageError, match=r"whose logits differ from its timm twin's by .* of the greatest"):
        dfqvit.from_transformers(model)


def test_half_precision_and_train_mode_are_read_as_float_in_eval(seed):
    model = classifier("ViT").half().train()
    twin = dfqvit.from_transformers(model)
    assert model.training
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    wanted = classifier("ViT")
    wanted.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(twin(images), wanted(images).logits, atol=1e-5)


def test_images_are_prepared_as_the_processor_says(seed):
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    model = classifier("DINOv2")
    processor = SimpleNamespace(
        **settings, do_center_crop=True, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    found = Preprocessing.of(dfqvit.from_transformers(model, processor))
    assert found == Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.8)
    found = Preprocessing.of(dfqvit.from_transformers(model, SimpleNamespace(**settings, crop_pct=0.875)))
    assert (found.crop_pct, found.interpolation) == (0.875, "bilinear")
    real = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    found = Preprocessing.of(dfqvit.from_transformers(classifier("ViT"), real))
    assert (found.mean, found.std, found.crop_pct) == ((0.5,) * 3, (0.25,) * 3, 1.0)
    with pytest.raises(UsageError, match="processor was a SimpleNamespace; it must be an image processor"):
        dfqvit.from_transformers(model, SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ViT", {**VIT, "hidden_act": "tanh"}, "model has the activation 'tanh'; it may be gelu"),
        ("Swin", {**SWIN, "use_absolute_embeddings": True}, "a Swin with absolute position embeddings"),
        ("Swin", {**SWIN, "hidden_act": "relu"}, "or without GELU"),
        ("ViTMAE", VIT, "model was a ViTMAEModel; it may be of these classes of transformers: ViTForImage"),
        ("BeitForImageClassification", VIT, "model was a BeitForImageClassification; it may be of these"),
    ],
)
def test_what_has_no_twin_is_refused(name, settings, message):
    short = name.removesuffix("ForImageClassification")
    kind = f"{name}Model" if name == "ViTMAE" else f"{short}ForImageClassification"
    model = getattr(transformers, kind)(getattr(transformers, f"{short}Config")(**settings))
    with pytest.raises(UsageError, match=message) as error:
        dfqvit.from_transformers(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), "google/vit-base-patch16-224", None], ids=str)
def test_what_is_not_of_transformers_is_refused(given):
    with pytest.raises(UsageError, match=f"model was a {type(given).__name__}; it may be of these classes"):
        dfqvit.from_transformers(given)


def test_quantize_says_what_to_call(seed):
    with pytest.raises(
        UsageError, match=r"a ViTForImageClassification of transformers; .* give dfqvit.from_transformers\("
    ):
        dfqvit.quantize(classifier("ViT"), calib="noise")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer.3.attention.attention.query.bias", "vit.layers.3.attention.q_proj.bias"),
        ("deit.encoder.layer.0.attention.output.dense.weight", "deit.layers.0.attention.o_proj.weight"),
        ("vit.encoder.layer.0.output.dense.weight", "vit.layers.0.mlp.fc2.weight"),
        ("vit.encoder.layer.11.intermediate.dense.bias", "vit.layers.11.mlp.fc1.bias"),
        ("dinov2.encoder.layer.1.mlp.weights_out.bias", "dinov2.encoder.layer.1.mlp.down_proj.bias"),
        (
            "swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table",
            "swin.encoder.layers.1.blocks.0.attention.relative_position_bias.relative_position_bias_table",
        ),
    ],
)
def test_names_of_transformers_4(old, new):
    """Tried by hand with 4.57.1, on all the cases above."""
    assert _rename(old, OLD) == new
    assert _rename(new, OLD) == new


def test_a_clone_on_the_path_is_not_taken_for_the_package_kernels():
    """transformers imports what is called `kernels`; once that was a second copy of our operators, and both failed."""
    code = "import transformers, dfqvit.kernels, kernels; transformers.ViTForImageClassification; print(dir(kernels))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quant_linear" not in done.stdout
