"""`dfqvit sweep`: every combination once, resumed, failures told and the rest done, bad configurations refused by name."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from dfqvit import cli, demo
from dfqvit.cli import runs
from dfqvit.cli.process import Ended
from dfqvit.cli.runs import Run, read_config

CONFIG = {
    "models": ["demo", {"model": "demo-swin", "w-bits": 8}],
    "quantize": {"w-bits": [4, 3], "seed": [0, 1], "calib": "noise", "samples": 2},
    "evaluate": {"batch-size": 500},
}


@pytest.fixture
def sweep(tmp_path, capsys):
    """Runs the command on a configuration: (exit status, stdout, stderr)."""

    def call(config, *arguments):
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False))
        status = cli.run(["sweep", str(path), "--out", str(tmp_path / "out"), *arguments])
        return status, *capsys.readouterr()

    return call


def written(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return read_config(path)


def test_every_combination_once(tmp_path):
    runs = written(tmp_path, CONFIG)
    found = [(run.model, run.quantize["w-bits"], run.quantize["seed"]) for run in runs]
    assert found == [*product(["demo"], [4, 3], [0, 1]), *product(["demo-swin"], [8], [0, 1])]
    assert len({run.name for run in runs}) == len(runs)
    assert written(tmp_path, CONFIG | {"models": ["demo", "demo"]}) == runs[:4]
    assert runs[0].evaluate["batch-size"] == 500
    assert runs[0].evaluate["data"].endswith("fashion_mnist_test.npz")


def test_the_example_is_read():
    runs = read_config(Path(__file__).parent.parent.parent / "examples" / "sweep.yaml")
    assert len(runs) == 8
    assert {run.quantize["iters"] for run in runs if run.model == "demo-swin"} == {100}


def here(arguments, _):
    """What a process with these arguments would end with, without Python's and torch's start."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.run(arguments[3:])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_resumes_and_goes_on_past_a_failure(sweep, tmp_path, monkeypatch):
    """The commands are processes at first, and run here the second time."""
    missing = str(tmp_path / "nowhere.safetensors")
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:200], labels=file["labels"][:200])
    config = {
        "evaluate": {"data": str(tmp_path / "test.npz")},
        "models": ["demo", {"model": "deit_tiny_patch16_224", "checkpoint": missing, "evaluate": {"data": missing}}],
        "quantize": {"calib": "noise", "samples": 2, "w-bits": [4], "rounding": "nearest"},
    }
    status, out, err = sweep(config, "--json")
    assert status == 1
    assert "1 of 2 runs failed; the table says why, the same command tries them again" in err
    good, bad = json.loads(out)["runs"]
    assert good["evaluate"]["images"] == 200
    assert "nowhere.safetensors" in bad["error"]
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [row["model"] for row in rows] == ["demo", "deit_tiny_patch16_224"]
    assert float(rows[0]["top-1"]) == pytest.approx(good["evaluate"]["top1"], abs=0.01)
    assert rows[1]["error"] == bad["error"]
    assert rows[1]["top-1"] == ""

    made = (tmp_path / "out" / good["name"] / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "out" / good["name"] / "evaluate.json").write_text("{")  # as after a crash
    shutil.copy(Path(__file__).parent.parent.parent / "dfqvit" / "models" / "assets" / "demo_vit.safetensors", missing)
    monkeypatch.setattr(runs, "_finished", here)
    _, out, _ = sweep(config, "--json")
    again, other = json.loads(out)["runs"]
    assert again["evaluate"]["top1"] == good["evaluate"]["top1"]
    assert (tmp_path / "out" / good["name"] / "model.safetensors").stat().st_mtime_ns == made
    assert other["error"] != bad["error"]  # tried again: those are weights of another model


def test_what_the_commands_warn_of_is_told(tmp_path, monkeypatch, sweep):
    """Found here: labels counted from 1 gave a table of accuracies near 0 and no word; the processes' warnings were left out."""
    monkeypatch.setattr(runs, "_finished", here)
    with np.load(demo.TEST_IMAGES) as file:
        images, labels = file["images"][:300], file["labels"][:300]
    kept = labels < 9
    np.savez(tmp_path / "test.npz", images=images[kept], labels=labels[kept] + 1)
    config = {"models": ["demo"], "quantize": {"calib": "noise", "samples": 2, "rounding": "nearest", "w-bits": 8}}
    config["evaluate"] = {"data": str(tmp_path / "test.npz")}
    for _ in range(2):  # the second finds the run there
        status, out, err = sweep(config, "--json")
        assert status == 0
        [found] = json.loads(out)["runs"]
        [told] = [each for each in found["evaluate"]["warnings"] if "labels" in each]
        assert told.startswith("labels look counted from 1, or one too high")
        assert f"{found['name']}: warning: {told}" in err
        [row] = csv.DictReader((tmp_path / "out" / "sweep.csv").open())
        assert told in row["warnings"]
        assert told in (tmp_path / "out" / "sweep.md").read_text()


def test_a_run_that_was_not_interrupted_resumes_nothing(tmp_path, monkeypatch, sweep):
    """Found here: every run that synthesises was told, in the table too, that --resume found no snapshot."""
    monkeypatch.setattr(runs, "_finished", here)
    models = [{"model": "demo", "iters": 2}, {"model": "demo", "calib": "procedural"}]
    config = {"models": models, "quantize": {"samples": 2, "rounding": "nearest"}}
    status, out, _ = sweep(config, "--json")
    assert status == 0
    made, other = json.loads(out)["runs"]
    for found in (made, other):
        assert not [each for each in found["quantize"].get("warnings", []) if "resume" in each]
    folder = tmp_path / "out" / made["name"]
    (folder / "quantize.json").unlink()
    (folder / "synthesis.snapshot.safetensors").write_bytes(b"of an interrupted run")
    status, out, _ = sweep(config, "--json")
    assert status == 1
    assert "synthesis.snapshot.safetensors' could not be read" in json.loads(out)["runs"][0]["error"]


def test_weights_in_a_folder_and_images_behind_links_are_looked_at(tmp_path):
    """Found here: neither changed a run that was there."""
    weights, elsewhere, data = tmp_path / "model" / "w.safetensors", tmp_path / "elsewhere", tmp_path / "data"
    for folder in (weights.parent, elsewhere, data):
        folder.mkdir()
    weights.write_text("first")
    (elsewhere / "a.png").write_text("first")
    (data / "0").symlink_to(elsewhere)
    run = Run(f"local-dir:{weights.parent}", {}, {"data": str(data), "against": f"local-dir:{weights.parent}"})

    def states():
        return [runs._files(run, command, tmp_path / "run") for command in ("quantize", "evaluate")]

    quantized, evaluated = states()
    (elsewhere / "a.png").write_text("another")
    assert states()[0] == quantized
    assert states()[1] != evaluated
    evaluated = states()[1]
    weights.write_text("another")
    assert states()[0] != quantized
    assert states()[1] != evaluated


def test_changed_files_are_measured_again(tmp_path, monkeypatch):
    """The commands are stubs: each prints how often it ran."""
    count = {"quantize": 0, "evaluate": 0}

    def stub(arguments, _):
        command, out = arguments[3], arguments
        count[command] += 1
        if command == "quantize":
            Path(out[out.index("--out") + 1], "model.safetensors").write_text(f"{count}")
        return subprocess.CompletedProcess(arguments, 0, json.dumps({"ran": count[command]}), "")

    monkeypatch.setattr(runs, "_finished", stub)
    files = {name: tmp_path / f"{name}.npz" for name in ("checkpoint", "data", "classes")}
    for path in files.values():
        path.write_text("first")
    run = Run(
        "demo",
        {"checkpoint": str(files["checkpoint"]), "calib": "noise"},
        {"data": str(files["data"]), "classes": str(files["classes"])},
    )

    def ran():
        result = runs._make(run, tmp_path / "run", "cpu", set())
        return result["quantize"]["ran"], result["evaluate"]["ran"]

    assert ran() == (1, 1)
    assert ran() == (1, 1)
    for name, wanted in {"data": (1, 2), "classes": (1, 3), "checkpoint": (2, 4)}.items():
        files[name].write_text("another")
        assert ran() == wanted
        assert ran() == wanted
    os.utime(files["data"], ns=(1, 1))  # of the same size
    assert ran() == (2, 5)
    files["data"].unlink()  # a folder now, with files in folders
    (files["data"] / "0").mkdir(parents=True)
    assert ran() == (2, 6)
    (files["data"] / "0" / "a.png").write_text("x")
    assert ran() == (2, 7)
    assert ran() == (2, 7)
    (tmp_path / "run" / "evaluate.files.json").unlink()  # of a sweep before there was one
    assert ran() == (2, 8)
    (tmp_path / "run" / "model.safetensors").unlink()
    assert ran() == (3, 9)


def test_settings_of_one_name_stand_apart(tmp_path):
    """Found here: those of `evaluate` stood in the place of those of `quantize`, so that rows told of other weights and means."""
    quantize = {"checkpoint": ["a.pth", "b.pth"], "mean": "0.5", "batch-size": [4, 8], "calib": "noise"}
    evaluate = {"data": "x.npz", "against": "demo", "checkpoint": "float.pth", "mean": "0.4", "batch-size": 99}
    found = written(tmp_path, {"models": ["demo"], "quantize": quantize, "evaluate": evaluate})
    result = {"quantize": {"bytes": 10**6, "seconds": 1}, "evaluate": {"top1": 50.0, "top5": 90.0}}
    result["evaluate"] |= {"against_top1": 51.234, "agreement": 88.0}
    runs.write_tables([(run, result) for run in found], tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    wanted = [("a.pth", "4"), ("a.pth", "8"), ("b.pth", "4"), ("b.pth", "8")]
    assert [(row["checkpoint"], row["batch-size"]) for row in rows] == wanted
    assert {(row["mean"], row["evaluate mean"], row["evaluate checkpoint"], row["data"]) for row in rows} == {
        ("0.5", "0.4", "float.pth", "x.npz")
    }
    first, *_ = (tmp_path / "sweep.md").read_text().splitlines()
    shown = ["model", "checkpoint", "batch-size", "top-1", "top-5", "float top-1", "agreement", "MB", "seconds"]
    assert [each.strip() for each in first.strip("|").split("|")] == shown
    assert {(row["float top-1"], row["agreement"]) for row in rows} == {("51.23", "88.0")}


def test_a_failed_run_leaves_no_older_result(tmp_path, monkeypatch):
    told = [subprocess.CompletedProcess([], 0, "{}", ""), subprocess.CompletedProcess([], 2, "", "dfqvit: no\n")]
    monkeypatch.setattr(runs, "_finished", lambda *_: told.pop(0))
    (tmp_path / "w").write_text("first")
    run = Run("demo", {"checkpoint": str(tmp_path / "w")}, None)
    assert runs._make(run, tmp_path / "run", "cpu", set()) == {"quantize": {}}
    (tmp_path / "w").write_text("another")
    assert runs._make(run, tmp_path / "run", "cpu", set()) == {"error": "no"}
    assert not (tmp_path / "run" / "quantize.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("models: [", "is no YAML"),
        ("- demo", r"CONFIG was \['demo'\]; it must be a mapping of models, quantize, evaluate"),
        (
            "models: [demo]\nquantize: {samples: 2}\nquantize: {a-bits: 4}",
            "'quantize' twice, again in line 3; give it once",
        ),
        ("models: [{model: demo, w-bits: 4, w-bits: 8}]", "CONFIG had 'w-bits' twice, again in line 1"),
        ({"models": []}, r"models was \[\]; it must be a list of names"),
        ({"models": [3]}, "models held 3; it must be a name, or a mapping with `model`"),
        ({"models": ["demo"], "bits": 4}, "CONFIG had 'bits'; it may have models, quantize, evaluate"),
        ({"models": ["demo"], "quantize": {"w_bits": 4}}, "quantize had 'w_bits'; it may have .*w-bits"),
        ({"models": ["demo"], "quantize": {"out": "x"}}, "quantize had 'out'; it may have"),
        ({"models": ["demo"], "quantize": {"w-bits": []}}, "CONFIG had an empty list"),
        ({"models": ["demo"], "quantize": {"w-bits": {}}}, r"quantize.w-bits was {}; it may be a number, a text"),
        ({"models": ["demo"], "quantize": {"acm-shrink": 1}}, "quantize.acm-shrink was 1; it may be true or false"),
        ({"models": ["demo"], "quantize": {"w-bits": "four"}}, "quantize in CONFIG: Invalid value for '--w-bits'"),
        ({"models": ["demo"], "evaluate": {"workers": -1}}, "evaluate in CONFIG: Invalid value for '--workers'"),
    ],
)
def test_bad_configurations(tmp_path, config, message, sweep):
    status, out, err = sweep(config)
    assert status == 2
    assert not out
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_configuration_and_unknown_device(sweep, tmp_path, capsys):
    assert cli.run(["sweep", str(tmp_path / "no.yaml"), "--out", str(tmp_path)]) == 2
    assert "which could not be read" in capsys.readouterr().err
    status, _, err = sweep(CONFIG, "--devices", "tpu")
    assert status == 2
    assert "--device was 'tpu'" in err


@pytest.mark.parametrize("interruption", [Ended(signal.SIGTERM), KeyboardInterrupt()])
def test_a_signal_that_comes_to_the_sweep_alone_ends_its_processes(tmp_path, monkeypatch, interruption):
    """Found here: `kill` left them behind, and after Ctrl-C the sweep waited for one that began as it came, or `kill -INT`."""
    finished, ended = runs._finished, []

    def stub(line, running):
        slow = "slow" in line
        while not slow and not running:  # the slow one has been started
            time.sleep(0.01)
        body = "import time; time.sleep(600)" if slow else 'print(\'{"bytes": 1, "seconds": 1}\')'
        ended.append(finished([sys.executable, "-c", body], running))
        return ended[-1]

    def end(*_):
        raise interruption

    monkeypatch.setattr(runs, "_finished", stub)
    both = [Run(name, {}, None) for name in ("quick", "slow")]
    with pytest.raises(type(interruption)):
        runs.run_all(both, tmp_path, ["cpu", "cpu"], end)
    assert sorted(done.returncode for done in ended) == [-signal.SIGTERM, 0]
