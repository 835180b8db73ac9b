"""Checkpoints with several sets of weights: none is chosen without a word."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from dfqvit.errors import UsageError
from dfqvit.models import load_model

from ..conftest import SMALL, small_distilled

VIT = "vit_tiny_patch16_224"


def weights(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return load_model(VIT, pretrained=False, model_kwargs=SMALL["vit"]).state_dict()


def loaded(path: Any) -> dict[str, Any]:
    return load_model(VIT, path, model_kwargs=SMALL["vit"]).state_dict()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("first", [True, False])
def test_two_sets_under_names_that_are_one_to_timm_are_refused(tmp_path, seed, prefix, first):
    plain, other = weights(seed), {prefix + key: value for key, value in weights(seed + 1).items()}
    torch.save({**plain, **other} if first else {**other, **plain}, tmp_path / "c.pth")
    with pytest.raises(
        UsageError, match=r"holds two sets of weights, '.*cls_token' and '.*cls_token' among them, .* alone"
    ):
        loaded(tmp_path / "c.pth")


def test_the_same_weights_under_both_names_are_taken(tmp_path, seed):
    plain = weights(seed)
    torch.save({**plain, **{f"module.{key}": value for key, value in plain.items()}}, tmp_path / "c.pth")
    assert all(torch.equal(value, plain[key]) for key, value in loaded(tmp_path / "c.pth").items())


@pytest.mark.parametrize(
    ("chosen", "other"), [("state_dict", "model"), ("model", "best_state_dict"), ("model", "best_model")]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_other_weights_beside_those_that_were_loaded_are_told(tmp_path, seed, chosen, other, prefix):
    one, two = weights(seed), {prefix + key: value for key, value in weights(seed + 1).items()}
    torch.save({other: two, chosen: one}, tmp_path / "c.pth")
    with pytest.warns(
        UserWarning, match=f"holds '{other}', with weights of the same names .* beside '{chosen}', which was loaded"
    ):
        found = loaded(tmp_path / "c.pth")
    assert all(torch.equal(found[key], one[key]) for key in one)


@pytest.mark.parametrize("beside", ["the same", "another model", "an optimizer"])
def test_what_is_no_second_choice_is_not_told(tmp_path, seed, beside):
    one = weights(seed)
    entries = {
        "the same": dict(one),
        "another model": small_distilled().state_dict(),
        "an optimizer": {"state": {0: {"step": torch.ones(2)}}, "param_groups": []},
    }
    torch.save({"model": one, "teacher": entries[beside]}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(tmp_path / "c.pth")
