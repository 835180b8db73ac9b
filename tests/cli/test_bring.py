"""What people bring to the command line: one sentence and the right status for all that does not fit."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import dfqvit
from dfqvit import cli, demo
from dfqvit.models import load_model

from ..conftest import PATHS_SAID, said
from ..fresh import python

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
KWARGS = [part for key, value in SMALL.items() for part in ("--model-kwargs", f"{key}={value}")]


@pytest.fixture
def saved(tmp_path):
    """A quantized demo."""
    qmodel = dfqvit.quantize(load_model("demo"), samples=2, calib="noise", rounding="nearest")
    return dfqvit.save(qmodel, tmp_path / "q.safetensors")


def program(*arguments, **environment):
    return python("-m", "dfqvit", *arguments, env={**os.environ, **environment})


@pytest.mark.parametrize("backend", ["cuda", "quant_linear=cpuu"])
def test_a_backend_that_cannot_serve_is_one_line(tmp_path, backend):
    if backend == "cuda" and torch.cuda.is_available():
        pytest.skip("it can serve here")
    done = program(
        "quantize",
        "demo",
        "--iters",
        1,
        "--samples",
        1,
        "--rounding",
        "nearest",
        "--out",
        tmp_path,
        DFQVIT_BACKEND=backend,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(said(done.stderr)) == 1
    assert re.search(r"backend (was )?'\w*'", said(done.stderr)[0])


def test_a_cpu_path_that_there_is_not_is_one_line():
    done = program("info", DFQVIT_CPU_ISA="avx9")
    if "not built" in done.stdout:
        pytest.skip("dfqvit._C is not built")
    assert done.returncode == 2
    assert said(done.stderr) == [f"dfqvit: DFQVIT_CPU_ISA: isa was 'avx9'; it may be {PATHS_SAID}"]


def test_an_error_that_nobody_foresaw_is_one_line_and_a_log(run, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TypeError("first line\nsecond line")

    monkeypatch.setattr("dfqvit.cli.info.load", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, out, err = run("info", "some.safetensors")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    found = re.fullmatch(r"dfqvit: unexpected TypeError: first line; please report it with '(.*)', where .*\n", err)
    log = Path(found[1]).read_text()
    assert "second line" in log
    assert "Traceback (most recent call last)" in log
    assert "['info', 'some.safetensors']" in log
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    status, _, err = run("info", "some.safetensors")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "could not be written" in err


def test_ctrl_c_is_status_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dfqvit.cli.info.load", interrupted)
    status, out, err = run("info", "some.safetensors")
    assert (status, out) == (130, "")
    assert len(said(err)) == 1


@pytest.mark.parametrize("command", ["sweep", "ablate"])
def test_ctrl_c_in_long_commands_is_status_130(run, monkeypatch, tmp_path, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dfqvit.cli.sweep.run_all", interrupted)
    monkeypatch.setattr("dfqvit.cli.ablate.run_study", interrupted)
    (tmp_path / "sweep.yaml").write_text("models: [demo]")
    arguments = [tmp_path / "sweep.yaml"] if command == "sweep" else ["demo", "--images", 4]
    status, _, err = run(command, *arguments, "--out", tmp_path / "out")
    assert status == 130
    assert said(err) == ["dfqvit: interrupted; the same command goes on where it stopped"]


def test_a_training_checkpoint_to_a_measured_file(run, tmp_path):
    """Averaged weights beside raw ones and a Namespace, from the file to the accuracy."""
    good = load_model("demo").state_dict()
    raw = {key: value + 0.3 * torch.randn_like(value) for key, value in good.items()}
    wrapped = {f"module.{key}": value for key, value in good.items()}
    torch.save({"state_dict": raw, "state_dict_ema": wrapped, "args": argparse.Namespace(a=1)}, tmp_path / "c.pth.tar")
    model = ["demo", "--checkpoint", tmp_path / "c.pth.tar"]
    status, _, err = run("quantize", *model, "--calib", demo.TRAIN_SAMPLE, "--rounding", "nearest", "--out", tmp_path)
    assert status == 0, err
    assert "warning: checkpoint" in err
    assert "'state_dict_ema', the averaged weights, was loaded" in err
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:200], labels=file["labels"][:200])
    status, out, _ = run("evaluate", tmp_path / "model.safetensors", "--data", tmp_path / "test.npz", "--json")
    found = json.loads(out)
    assert found["top1"] > 85
    assert found["classes"] == "the labels are the model's classes, counted from 0"


def test_keywords_reach_the_file_and_the_float_model(run, tmp_path, seed):
    whole = {**SMALL, "num_classes": 4, "act_layer": "relu", "qk_norm": True, "init_values": 0.5}
    model = timm.create_model("vit_tiny_patch16_224", **whole).eval()
    torch.save(model.state_dict(), tmp_path / "c.pth")
    more = ["--model-kwargs", "act_layer=relu", "--model-kwargs", "qk_norm=True", "--model-kwargs", "init_values=0.5"]
    named = ["vit_tiny_patch16_224", "--checkpoint", tmp_path / "c.pth", "--num-classes", 4, *KWARGS, *more]
    status, _, err = run("quantize", *named, "--w-bits", 8, "--calib", "noise", "--out", tmp_path)
    assert status == 0, err
    x = torch.rand(40, 3, 32, 32).mul(255).byte()
    np.savez(tmp_path / "t.npz", images=x.numpy(), labels=np.arange(40) % 4)
    arguments = ["evaluate", tmp_path / "model.safetensors", "--data", tmp_path / "t.npz"]
    against = ["--against", "timm/vit_tiny_patch16_224", "--checkpoint", tmp_path / "c.pth"]
    status, out, err = run(*arguments, *against, "--json")
    assert status == 0, err
    assert json.loads(out)["agreement"] >= 75
    for bad in ("frog", "=3", "a b=1"):
        status, _, err = run("quantize", *named, "--model-kwargs", bad, "--out", tmp_path / "x")
        assert (status, said(err)) == (2, [f"dfqvit: --model-kwargs was '{bad}'; it must be KEY=VALUE"])
    status, _, err = run("quantize", *named, "--model-kwargs", "frog=3", "--out", tmp_path / "x")
    assert status == 2
    assert "timm could not build it" in said(err)[0]


def picture_folders(root, names, seed=0):
    generator = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        Image.fromarray(generator.integers(0, 256, (28, 28), dtype=np.uint8)).save(root / name / "x.png")
    return root


def test_folders_are_refused_or_told(run, tmp_path, saved):
    few = picture_folders(tmp_path / "few", [f"c{index}" for index in range(4)])
    status, out, err = run("evaluate", saved, "--data", few)
    assert (status, out) == (2, "")
    assert "has 4 folders and the model 10 classes" in said(err)[0]
    (tmp_path / "classes.txt").write_text("\n".join(f"c{index}" for index in range(10)))
    status, out, _ = run("evaluate", saved, "--data", few, "--classes", tmp_path / "classes.txt")
    assert status == 0
    assert "classes: the classes file says which folder is which class" in out
    ten = picture_folders(tmp_path / "ten", [f"c{index}" for index in range(10)])
    status, out, _ = run("evaluate", saved, "--data", ten)
    assert status == 0
    assert "classes: the 10 folders in order are the classes 0 to 9" in out


def test_wordnet_ids_need_no_classes_file(run, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    file = dfqvit.save(dfqvit.quantize(model, samples=2, calib="noise"), tmp_path / "q.safetensors")
    names = ImageNetInfo().label_names()
    root = picture_folders(tmp_path / "data", [names[index] for index in (3, 800, 21)])
    status, out, err = run("evaluate", file, "--data", root, "--json")
    assert status == 0, err
    assert json.loads(out)["classes"] == "the folders are WordNet ids, in the order of imagenet-1k"


def test_labels_counted_from_one_are_refused(run, tmp_path, saved):
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "one.npz", images=file["images"][:50], labels=file["labels"][:50] + 1)
    status, _, err = run("evaluate", saved, "--data", tmp_path / "one.npz")
    assert status == 2
    assert "counted from 1" in said(err)[0]


def test_a_flat_folder_calibrates_and_says_nothing_of_labels(run, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 65536, (40, 40), dtype=np.uint16)
        Image.fromarray(values).save(flat / f"{index}.png")
    quick = ["--samples", 3, "--rounding", "nearest"]
    status, out, err = run("quantize", "demo", "--calib", flat, *quick, "--out", tmp_path / "o", "--json")
    assert status == 0, err
    measured = json.loads(out)["record"]["measured"]["images"]
    assert measured["outside"] == 0.0
    assert measured["contrast"] > 0.1  # cut off at 255, sixteen bits are white
    status, _, err = run("evaluate", tmp_path / "o" / "model.safetensors", "--data", flat)
    assert status == 2
    assert "it has no folders of classes" in said(err)[0]


def test_samples_that_were_not_normalised_are_refused(run, tmp_path):
    images = torch.from_numpy(np.load(demo.TRAIN_SAMPLE)["images"][:8]).float()
    safetensors.torch.save_file({"images": images}, tmp_path / "s.safetensors")
    status, _, err = run("quantize", "demo", "--calib", tmp_path / "s.safetensors", "--out", tmp_path / "o")
    assert status == 2
    assert "like pixels from 0 to 255" in said(err)[0]
    assert not (tmp_path / "o" / "model.safetensors").exists()


def test_mean_and_std_of_the_command_line_reach_timm(run, tmp_path):
    arguments = ["quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest", "--out", tmp_path]
    assert run(*arguments, "--mean", "0.1", "--std", "0.7")[0] == 0
    config = timm.data.resolve_model_data_config(dfqvit.load(tmp_path / "model.safetensors"), use_test_size=True)
    assert (config["mean"], config["std"]) == ((0.1,), (0.7,))


def test_a_model_without_a_head_is_not_evaluated(run, tmp_path, seed):
    torch.save(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=0).state_dict(), tmp_path / "dino.pth")
    named = ["vit_tiny_patch16_224", "--checkpoint", tmp_path / "dino.pth", *KWARGS, "--calib", "noise", "--samples", 2]
    status, _, err = run("quantize", *named, "--out", tmp_path / "o")
    assert status == 2
    assert "give --num-classes 0" in said(err)[0]
    status, _, err = run("quantize", *named, "--num-classes", 0, "--out", tmp_path / "o")
    assert status == 0, err
    status, _, err = run("evaluate", tmp_path / "o" / "model.safetensors", "--data", demo.TEST_IMAGES)
    assert status == 2
    assert "whose model has no classifier" in said(err)[0]


def test_the_wrong_file_is_one_line(run, tmp_path, saved):
    for arguments, message in (
        (["evaluate", "demo", "--data", demo.TEST_IMAGES], "file was 'demo'; there is no such file"),
        (["info", tmp_path], "which is a folder; give the file in it"),
        (["quantize", saved, "--out", tmp_path / "o"], "which is a file; it must be a timm name"),
        (["quantize", "demo", "--checkpoint", saved, "--out", tmp_path / "o"], "dfqvit.load reads such a file"),
        (["quantize", "google/vit-base-patch16-224", "--out", tmp_path / "o"], "'hf-hub:google/vit-base-patch16-224'"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, ""), err
        assert message in said(err)[0]


@pytest.mark.parametrize(
    "kind", [KeyError, AttributeError, RecursionError, AssertionError, ZeroDivisionError, RuntimeError]
)
def test_every_command_has_a_log_for_what_nobody_foresaw(monkeypatch, tmp_path, capsys, kind):
    """Whatever a command raises, wherever: one line, status 1."""

    def broken(*_, **__):
        raise kind

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli.program, "main", broken)
    assert cli.run(["info"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"unexpected {kind.__name__}: no message; please report it" in err
    assert len(list(tmp_path.glob("dfqvit-*.log"))) == 1


def test_processes_that_do_not_find_each_other_are_one_line():
    done = program("info", RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(said(done.stderr)) == 1


def test_a_float_model_of_another_input_size_is_one_line(run, tmp_path, saved, seed):
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "c.pth")
    named = ["--against", "deit_tiny_patch16_224", "--checkpoint", tmp_path / "c.pth"]
    status, _, err = run("evaluate", saved, "--data", demo.TEST_IMAGES, *named)
    assert status == 2, err
    wanted = "--against was 'deit_tiny_patch16_224', which takes images 3 x 224 x 224; FILE takes 1 x 28 x 28"
    assert wanted in said(err)[-1]
