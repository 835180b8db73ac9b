"""Checkpoints that people bring, loaded as timm loads them or refused in one sentence: which of a file's weights, and of what kind.

Of other layouts, of JAX and of other kinds of files see the files beside this one.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import re
import warnings

import pytest
import safetensors.torch
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn

import dfqvit
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import load_model

from .checkpoints import DEMO, SMALL, VIT, created, loaded, same


@pytest.mark.parametrize("keys", [k for n in (1, 2, 3, 4) for k in itertools.combinations(range(4), n)])
def test_of_several_weights_timms_choice_and_it_is_said(tmp_path, seed, keys):
    names = [("state_dict", "model", "model_ema", "state_dict_ema")[index] for index in keys]
    models = {name: created(VIT, **SMALL) for name in names}
    torch.save({"epoch": 3, **{name: model.state_dict() for name, model in models.items()}}, tmp_path / "c.pth")
    twin = timm.create_model(VIT, **SMALL)
    timm.models.load_checkpoint(twin, str(tmp_path / "c.pth"))  # the oracle
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = loaded(tmp_path / "c.pth")
    assert same(ours, twin)
    used = next(name for name, model in models.items() if same(model, twin))
    if used.endswith("ema") and len(names) > 1:
        assert any(f"'{used}', the averaged weights, was loaded" in str(each.message) for each in said)
    elif len(names) > 1:
        assert any(f"other values, beside '{used}', which was loaded" in str(each.message) for each in said)
    else:
        assert not said


def test_a_checkpoint_as_timms_training_script_saves_it(tmp_path, seed):
    model = created(VIT, **SMALL)
    ema = ModelEmaV2(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model=VIT, lr=1e-3, mean=None, output=str(tmp_path), aug={"a": [1, 2]})
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=12.5)
    with pytest.warns(UserWarning, match="'state_dict' and 'state_dict_ema'; 'state_dict_ema', the averaged weights"):
        ours = loaded(tmp_path / "model_best.pth.tar")
    assert same(ours, ema.module)
    assert not same(ours, model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_wrappers_prefixes(tmp_path, seed, prefix, kind):
    model, path = created(VIT, **SMALL), tmp_path / f"c.{kind}"
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    assert same(loaded(path), model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_integers_under_float_names_are_refused(tmp_path, seed, dtype, kind):
    state, path = created(VIT, **SMALL).state_dict(), tmp_path / f"c.{kind}"
    state["blocks.1.mlp.fc1.weight"] = (10 * state["blocks.1.mlp.fc1.weight"]).to(dtype)
    torch.save({"model": state}, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    with pytest.raises(UsageError, match=r"under 'blocks.1.mlp.fc1.weight': its weights are quantized already"):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_taken(tmp_path, seed, dtype):
    model = created(VIT, **SMALL).to(dtype)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert same(loaded(tmp_path / "c.pth"), model.float())


def test_our_own_file_in_the_checkpoints_place(tmp_path):
    qmodel = dfqvit.quantize(load_model("demo"), samples=2, calib="noise")
    path = dfqvit.save(qmodel, tmp_path / "q.safetensors")
    with pytest.raises(UsageError, match=r"holds packed weights of a quantized model; dfqvit.load reads such a file"):
        load_model("demo", path)


def test_other_containers_are_named(tmp_path, seed):
    state = created(VIT, **SMALL).state_dict()
    for content, said in (
        ({"net": state, "acc": 93.1, "epoch": 7}, r"entries are 'net', 'acc', 'epoch': save the one"),
        ({"epoch": 7}, r"its entries are 'epoch'"),
        ({"model": "vit", "model_state_dict": state}, r"entries are 'model', 'model_state_dict': save the one"),
        ([1, 2], "but a list"),
        (torch.zeros(3), "but a Tensor"),
        ({"model." + key: value for key, value in state.items()}, r"begin with 'model\.': save it without"),
        ({"state_dict": {"backbone." + k: v for k, v in state.items()}}, r"begin with 'backbone\.': save it without"),
        (
            {f"{wrapper}.{k}": v for wrapper in ("net", "ema") for k, v in state.items()},
            r"names of the model stand behind 'ema\.' and 'net\.' there: save the wanted ones alone, without it",
        ),
        (
            {"loss.weight": torch.ones(3)} | {"net." + k: v for k, v in state.items()},
            r"names of the model stand behind 'net\.' there: save the wanted ones alone, without it",
        ),
    ):
        torch.save(content, tmp_path / "c.pth")
        with pytest.raises((DfqvitError, UsageError), match=said) as error:
            loaded(tmp_path / "c.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ema", "ema_state_dict", "model_EMA_weights", "swa_model", "averaged"])
@pytest.mark.parametrize("layout", ["flat", "module", "list"])
def test_averaged_weights_where_timm_does_not_look_are_told(tmp_path, seed, name, layout):
    raw, averaged = (created(VIT, **SMALL).state_dict() for _ in range(2))
    entry = {"flat": averaged, "module": {"decay": 0.9, "module": averaged}, "list": {"shadow": [*averaged.values()]}}
    torch.save({"state_dict": raw, name: entry[layout]}, tmp_path / "c.pth")
    with pytest.warns(
        UserWarning, match=f"holds '{name}', by its name averaged weights, beside 'state_dict', which was loaded"
    ):
        found = loaded(tmp_path / "c.pth").state_dict()
    assert all(torch.equal(found[key], raw[key]) for key in raw)


@pytest.mark.parametrize(
    "entry", [{"ema": {"decay": 0.9}}, {"ema": True}, {"schema": {"a": torch.ones(3)}}, {"ema": None}], ids=str
)
def test_what_holds_no_averaged_weights_is_not_told(tmp_path, seed, entry):
    model = created(VIT, **SMALL)
    torch.save({"state_dict": model.state_dict(), **entry}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), model)


@pytest.mark.parametrize(
    ("container", "inner"), [("state_dict", "model"), ("model", "state_dict"), ("state_dict", "module")]
)
@pytest.mark.parametrize(
    ("name", "kind"), [("ema", "by its name averaged weights"), ("last", "with weights of the same names")]
)
def test_weights_that_are_left_one_level_down_are_told(tmp_path, seed, container, inner, name, kind):
    """The first of two sets was loaded without a word."""
    one, other = (created(VIT, **SMALL) for _ in range(2))
    torch.save({container: {inner: one.state_dict(), name: other.state_dict()}}, tmp_path / "c.pth")
    with pytest.warns(
        UserWarning, match=f"holds '{name}', {kind}.*, beside the '{inner}' of '{container}', which was loaded;"
    ):
        assert same(loaded(tmp_path / "c.pth"), one)
    torch.save(
        {container: {inner: one.state_dict(), name: one.state_dict() if name == "last" else 7}}, tmp_path / "c.pth"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), one)


@pytest.mark.parametrize("empty", [{}, None, collections.OrderedDict()], ids=str)
@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_an_average_that_is_empty_holds_no_weights(tmp_path, seed, name, empty):
    model = created(VIT, **SMALL)
    torch.save({"model": model.state_dict(), name: empty}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(loaded(tmp_path / "c.pth"), model)


@pytest.mark.parametrize("within", ["module", "state_dict", "model"])
def test_weights_one_level_down_in_a_container(tmp_path, seed, within):
    """As an average that was saved whole, beside its decay."""
    raw, averaged = created(VIT, **SMALL), created(VIT, **SMALL)
    content = {"model": raw.state_dict(), "model_ema": {within: averaged.state_dict(), "decay": 0.9}}
    torch.save(content, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="'model_ema', the averaged weights, was loaded"):
        assert same(loaded(tmp_path / "c.pth"), averaged)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_torchs_averaged_model(tmp_path, seed, wrapped):
    model = created(VIT, **SMALL)
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model) if wrapped else model)
    averaged.update_parameters(nn.DataParallel(model) if wrapped else model)
    for content in (averaged.state_dict(), {"model": averaged.state_dict()}):
        torch.save(content, tmp_path / "c.pth")
        if wrapped:
            with pytest.raises(UsageError, match=r"all of its keys begin with 'module\.': save it without"):
                loaded(tmp_path / "c.pth")
        else:
            assert same(loaded(tmp_path / "c.pth"), model)


SURPLUS = {
    "blocks.0.mlp.fc1.weight_mask": torch.zeros(192, 48),
    "blocks.0.attn.qkv.lora_mask_A": torch.ones(4, 3),
    "blocks.0.mask": torch.ones(3, dtype=torch.bool),
    "class_index": torch.arange(7),
    "coords_head.weight": torch.ones(3),
    "my_attn_mask": torch.ones(3),
}


@pytest.mark.parametrize("key", SURPLUS)
def test_surplus_keys_are_named_whatever_words_they_contain(tmp_path, seed, key):
    torch.save({**created(VIT, **SMALL).state_dict(), key: SURPLUS[key]}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match=rf"keys 1 unexpected \({re.escape(key)}\)"):
        loaded(tmp_path / "c.pth")


@pytest.mark.parametrize("key", ["blocks.0.attn.relative_position_index", "attn_mask", "a.num_batches_tracked"])
def test_buffers_that_models_compute_are_surplus_to_nobody(tmp_path, seed, key):
    model = created(VIT, **SMALL)
    torch.save({**model.state_dict(), key: torch.ones(3, dtype=torch.int32)}, tmp_path / "c.pth")
    assert same(loaded(tmp_path / "c.pth"), model)


def test_an_adaption_that_nobody_asked_for_is_said(tmp_path):
    torch.save(load_model("demo", in_chans=3, checkpoint=rgb_demo(tmp_path)).state_dict(), tmp_path / "c.pth")
    with pytest.warns(UserWarning, match="takes images of 3 channels and the model 1: .* --in-chans 3 keeps it"):
        load_model("demo", tmp_path / "c.pth")


def rgb_demo(folder):
    model = created(DEMO, in_chans=3)
    torch.save(model.state_dict(), folder / "rgb.pth")
    return folder / "rgb.pth"


def test_random_changes_of_a_checkpoint_are_never_taken(tmp_path, seed):
    """Any key renamed, dropped or of another shape is one sentence."""
    whole = created(VIT, **SMALL).state_dict()
    keys = list(whole)
    for _ in range(25):
        state = collections.OrderedDict(whole)
        key = keys[int(torch.randint(len(keys), ()))]
        change = int(torch.randint(3, ()))
        if change == 0:
            del state[key]
        elif change == 1:
            state[key.replace("t", "tt", 1) + "x"] = state.pop(key)
        else:
            state[key] = torch.zeros([size + 1 for size in state[key].shape])
        torch.save(state, tmp_path / "c.pth")
        with pytest.raises(UsageError) as error:
            loaded(tmp_path / "c.pth")
        assert "\n" not in str(error.value)
        assert "c.pth" in str(error.value)
