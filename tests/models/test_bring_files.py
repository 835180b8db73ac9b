"""What a file of weights is, by its first bytes and what it holds; names of repositories, and folders as the Hub has them."""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch

import dfqvit
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import ModelSpec, Preprocessing, load_model

from .checkpoints import DEMO, SMALL, SWIN, SWIN_SMALL, VIT, created, jax_arrays, loaded, same


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
