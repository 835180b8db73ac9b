"""Checkpoints of JAX: arrays of the original ViT and of big_vision."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import load_model

from .checkpoints import SMALL, VIT, created, jax_arrays, loaded


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
