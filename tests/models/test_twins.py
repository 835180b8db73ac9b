"""Image classifiers of transformers through their twin in timm: the same logits, every weight used, anything else refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

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


def classifier(case, **sizes):
    """With random weights large enough to matter, also those that transformers sets to 0 or 1."""
    name, more, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**settings, **sizes}, num_labels=7)
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


SQUARE = {"height": 32, "width": 32}
HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
CROPPED = {"do_center_crop": True, "crop_size": SQUARE, **HALF}
BIG = {"height": 384, "width": 384}
PROCESSORS = {  # (model, the class of processor, its settings, settings of the model)
    "squashed": ("ViT", "ViT", {"size": SQUARE, **HALF}, {}),
    "not normalised": ("ViT", "ViT", {"size": SQUARE, "do_normalize": False}, {}),
    "pixels from 0 to 2": ("ViT", "ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, **HALF}, {}),
    "neither": ("ViT", "ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, "do_normalize": False}, {}),
    "squashed and cropped": ("DeiT", "DeiT", {"size": {"height": 36, "width": 36}, **CROPPED}, {}),
    "bicubic": ("Swin", "ViT", {"size": SQUARE, "resample": 3, **HALF}, {}),
    "nearest": ("Swin", "ViT", {"size": SQUARE, "resample": 0, **HALF}, {}),
    "Swin of other size": ("Swin", "ViT", {"size": {"height": 64, "width": 64}, **HALF}, {}),
    "shortest edge": ("ViT", "Bit", {"size": {"shortest_edge": 36}, **CROPPED}, {}),
    "no whole share": ("ViT", "Bit", {"size": {"shortest_edge": 49}, **CROPPED}, {}),
    "DINOv2 of other size": ("DINOv2", "Bit", {"size": {"shortest_edge": 36}, **CROPPED}, {"image_size": 56}),
    "registers of other size": (
        "DINOv2 with registers",
        "Bit",
        {"size": {"shortest_edge": 36}, **CROPPED},
        {"image_size": 56},
    ),
    "ConvNeXt": ("ConvNeXt", "ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875, **HALF}, {}),
    "ConvNeXt of 384": ("ConvNeXt", "ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.875, **HALF}, {}),
}


@pytest.mark.parametrize("case", list(PROCESSORS))
@pytest.mark.parametrize(("height", "width"), [(80, 120), (150, 64)])
def test_the_twins_images_are_those_of_the_processor(case, height, width, seed):
    """On images that are not square, up to the filters of PIL and torchvision and the crop's odd pixel."""
    name, kind, settings, sizes = PROCESSORS[case]
    model = classifier(name, **sizes)
    processor = getattr(transformers, f"{kind}ImageProcessor")(**settings)
    twin = dfqvit.from_transformers(model, processor)
    prepared = Preprocessing.of(twin)
    image = waves(height, width)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = prepared.normalise(prepared.transform()(image))
    assert theirs.shape == ours.shape
    off = ((theirs - ours) * torch.tensor(prepared.std).view(-1, 1, 1)).abs().mean()
    assert float(off) < (0.03 if settings.get("resample") == 0 else 0.012)
    with torch.no_grad():
        wanted, found = model(theirs[None]).logits, twin(theirs[None])
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def waves(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    planes = [torch.sin(rows / 9 + 1), torch.sin(columns / 11), torch.sin((rows + 2 * columns) / 17)]
    return Image.fromarray((128 + 100 * torch.stack(planes, dim=-1)).to(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "ViT",
            {"size": SQUARE, "do_rescale": False},
            "processor has do_rescale=False; it must be True, with a rescale",
        ),
        ("ViT", {"size": SQUARE, "do_resize": False}, "processor has do_resize=False; it must be True, so that images"),
        ("ViT", {"size": SQUARE, "resample": 1}, r"processor has resample=1; it may be 0 \(nearest\), 2 \(bilinear\)"),
        ("ViT", {"size": SQUARE, "rescale_factor": 0.0}, "processor has rescale_factor=0.0; it must be greater than 0"),
        (
            "ViT",
            {"size": SQUARE, "image_mean": [0.5]},
            "processor has 1 values in image_mean; the model takes images of 3",
        ),
        (
            "ViT",
            {"size": BIG},
            "processor makes images of 384 x 384 pixels; model was a ViTForImage.* that takes 32 x 32 alone",
        ),
        (
            "Bit",
            {"size": {"shortest_edge": 36}, "do_center_crop": False},
            "and no center crop; beside shortest_edge it must",
        ),
        (
            "Bit",
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 24}},
            "have do_center_crop and a square crop_size",
        ),
        (
            "DeiT",
            {"size": {"height": 36, "width": 40}, "crop_size": SQUARE},
            "resizes to 36 x 40 pixels and crops 32 x 32; both must have the same ratio",
        ),
    ],
)
def test_a_processor_that_timm_cannot_follow_is_refused(kind, settings, message, seed):
    with pytest.raises(UsageError, match=message) as error:
        dfqvit.from_transformers(classifier("ViT"), getattr(transformers, f"{kind}ImageProcessor")(**settings))
    assert "\n" not in str(error.value)


def test_a_processor_that_does_more_than_its_settings_say_is_refused(seed):
    class Mirrored(transformers.ViTImageProcessor):
        def __call__(self, images, **kwargs):
            return super().__call__(images.transpose(Image.Transpose.FLIP_LEFT_RIGHT), **kwargs)

    with pytest.raises(UsageError, match=r"processor was a Mirrored whose images differ from those of its settings by"):
        dfqvit.from_transformers(classifier("ViT"), Mirrored(size=SQUARE))


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
