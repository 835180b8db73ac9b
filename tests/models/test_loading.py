"""MODEL names, checkpoints, specs, preprocessing."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.utils.prune

from dfqvit import demo
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import ModelSpec, Preprocessing, load_model

from ..conftest import SMALL, small_distilled, small_swin, small_vit


def write_checkpoint(path, model, **changes):
    state = {**model.state_dict(), **changes}
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items() if value is not None}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "w.safetensors", timm.create_model("vit_tiny_patch16_224", num_classes=3))


def test_unknown_name_lists_the_nearest():
    with pytest.raises(UsageError, match=r"MODEL was 'deit_tny_patch16_224'.*nearest are deit_tiny_patch16_224"):
        load_model("deit_tny_patch16_224")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "densenet121", ""])
def test_other_families_are_refused(name):
    with pytest.raises(UsageError, match="it may be a timm name of the ViT, DeiT or Swin families"):
        load_model(name)


def test_checkpoint_loads_and_gives_the_same_logits(checkpoint, seed):
    model = load_model("vit_tiny_patch16_224", checkpoint, num_classes=3)
    twin = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    twin.load_state_dict(safetensors.torch.load_file(checkpoint))
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model(x), twin(x))


def test_pth_checkpoints_are_read_without_unpickling_code(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    load_model("vit_tiny_patch16_224", tmp_path / "w.pth", num_classes=3)
    torch.save(model, tmp_path / "pickled.pth")
    with pytest.raises(DfqvitError, match="could not be read"):
        load_model("vit_tiny_patch16_224", tmp_path / "pickled.pth", num_classes=3)


def test_a_classifier_that_no_pretrained_weights_have_is_told(tmp_path):
    model = small_vit(num_classes=5)
    write_checkpoint(tmp_path / "model.safetensors", model)
    arguments = {key: value for key, value in SMALL["vit"].items() if key != "num_classes"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments}
    config["pretrained_cfg"] = {"num_classes": 5, "classifier": "head", "first_conv": "patch_embed.proj"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"num_classes": 5}, {"num_classes": 0}, {"num_classes": 3, "pretrained": False}):
            load_model(f"local-dir:{tmp_path}", **options)
    with pytest.warns(UserWarning, match="has pretrained weights of 5 classes, so the classifier of 3 .* is random"):
        load_model(f"local-dir:{tmp_path}", num_classes=3)


def test_wrong_class_count_names_the_right_one(checkpoint):
    with pytest.raises(UsageError, match="has 3 classes and the model 1000; give --num-classes 3"):
        load_model("vit_tiny_patch16_224", checkpoint)


def test_other_architecture_names_the_keys(checkpoint):
    with pytest.raises(UsageError, match=r"is not of MODEL 'swin_tiny_patch4_window7_224': keys \d+ missing \(head.fc"):
        load_model("swin_tiny_patch4_window7_224", checkpoint, num_classes=3)
    with pytest.raises(UsageError, match=r"of another shape \(blocks.0.attn.proj.bias \(192,\) for \(384,\)"):
        load_model("vit_small_patch16_224", checkpoint, num_classes=3)


def test_missing_file_and_truncated_file(tmp_path, checkpoint):
    with pytest.raises(UsageError, match="there is no such file"):
        load_model("vit_tiny_patch16_224", tmp_path / "none.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(DfqvitError, match="could not be read"):
        load_model("vit_tiny_patch16_224", cut)


def test_not_a_number_in_weights_is_named(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")
    path = write_checkpoint(tmp_path / "nan.safetensors", model)
    with pytest.raises(DfqvitError, match=r"weights: 'blocks.1.mlp.fc1.weight' holds NaN or Inf"):
        load_model("vit_tiny_patch16_224", path, num_classes=3)


@pytest.mark.parametrize("name", list(demo.ALIASES))
def test_embedded_models_need_no_network(name):
    model = load_model(name)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True}, {"init_values": 0.1}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}],
    ids=str,
)
def test_spec_needs_the_keywords_that_structure_does_not_tell(options):
    """Where timm did not leave them on the model, as its older versions do not."""
    given = {**SMALL["vit"], **options}
    model = small_vit(**options)
    vars(model).pop("_model_args", None)
    with pytest.raises(UsageError, match="give model_kwargs="):
        ModelSpec.of(model)
    spec = ModelSpec.of(model, given)
    rebuilt = ModelSpec(**json.loads(json.dumps({"architecture": spec.architecture, "kwargs": spec.kwargs}))).build()
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_spec_sees_a_difference_in_heads_that_no_shape_shows():
    model = timm.create_model("vit_tiny_patch16_224", num_heads=6)
    vars(model).pop("_model_args", None)
    with pytest.raises(UsageError, match=r"'blocks.0.attn.num_heads' is 6 here and 3 there"):
        ModelSpec.of(model)


@pytest.mark.parametrize(("make", "pools"), [(small_vit, ("avg", "max", "")), (small_swin, ("max", ""))])
def test_spec_knows_the_pooling_that_reset_classifier_set(make, pools):
    for pooling in pools:
        model = make()
        model.reset_classifier(7, pooling)
        spec = ModelSpec.of(model)
        assert (spec.kwargs["num_classes"], spec.kwargs["global_pool"]) == (7, pooling)
        assert spec.build()(torch.zeros(2, 3, 32, 32)).shape == model(torch.zeros(2, 3, 32, 32)).shape
    model = timm.create_model("test_mambaout")
    model.reset_classifier(7, "max")
    assert ModelSpec.of(model).kwargs["global_pool"] == "max"


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (torch.nn.utils.parametrizations.weight_norm, "torch.nn.utils.parametrize.remove_parametrizations"),
        (lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove"),
    ],
)
def test_weights_that_are_computed_anew_are_to_be_made_permanent(change, way):
    model = small_vit()
    change(model.blocks[1].mlp.fc1)
    with pytest.raises(UsageError, match=rf"make the .* of 'blocks.1.mlp.fc1' permanent \({way}"):
        ModelSpec.of(model)


def test_keywords_are_a_dict():
    with pytest.raises(UsageError, match=r"model_kwargs was \['depth'\]; it may be a dict"):
        ModelSpec.of(small_vit(), ["depth"])


@pytest.mark.parametrize("make", [small_vit, small_swin, small_distilled])
def test_preprocessing_takes_the_models_size(make):
    assert Preprocessing.of(make()).input_size == (3, 32, 32)


def test_preprocessing_of_other_channel_counts():
    found = Preprocessing.of(timm.create_model("vit_tiny_patch16_224", in_chans=5))
    assert found.input_size[0] == len(found.mean) == len(found.std) == 5
    again = Preprocessing.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,)}, "mean had 1 values; the model takes images of 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "std was"),
        ({"interpolation": "cubic"}, "interpolation was 'cubic'; it may be"),
    ],
)
def test_bad_preprocessing(change, message):
    values = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3} | change
    with pytest.raises(UsageError, match=message):
        Preprocessing(**values)


def test_channel_bounds_are_pixels_0_and_1():
    low, high = Preprocessing((1, 4, 4), (0.25,), (0.5,)).channel_bounds()
    assert (low.item(), high.item()) == (-0.5, 1.5)
