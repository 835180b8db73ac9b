"""The command line as a user sees it: results, one line for every error, exit statuses, nothing half-written."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys

import click
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import dfqvit.cli
from dfqvit import cli, demo
from dfqvit.cli.options import emit
from dfqvit.models import load_model

from ..conftest import QUICK, said
from ..fresh import python


@pytest.fixture
def small_test(tmp_path):
    """200 of the test images, to evaluate on."""
    with np.load(demo.TEST_IMAGES) as file:
        np.savez(tmp_path / "test.npz", images=file["images"][:200], labels=file["labels"][:200])
    return tmp_path / "test.npz"


def test_size_budget(run, tmp_path):
    out, arguments = tmp_path / "out", ["quantize", "demo", "--calib", demo.TRAIN_SAMPLE, "--samples", 4]
    arguments += ["--rounding", "nearest"]
    status, stdout, err = run(*arguments, "--size-budget", 0.25, "--out", out)
    assert status == 0, err
    assert (out / "model.safetensors").stat().st_size <= 250_000
    assert re.search(r"model.safetensors: W\d-\d/A8, 0\.2\d MB", stdout)
    status, stdout, _ = run("info", out / "model.safetensors")
    assert status == 0
    assert re.search(r"W\d-\d/A8 \(\d+ layers W", stdout)
    status, _, err = run(*arguments, "--size-budget", 0.01, "--out", tmp_path / "small")
    assert status == 2
    assert "size_budget was 0.01 MB; this model needs" in said(err)[0]


@pytest.mark.parametrize("name", list(demo.ALIASES))
def test_quantize_evaluate_info(run, tmp_path, small_test, name):
    out = tmp_path / "out"
    status, stdout, _ = run("quantize", name, "--w-bits", 8, "--calib", demo.TRAIN_SAMPLE, "--out", out, "--json")
    record = json.loads(stdout)
    assert status == 0
    assert record["bytes"] == (out / "model.safetensors").stat().st_size
    assert record["record"]["calibration"] == "images"

    status, stdout, _ = run("evaluate", out / "model.safetensors", "--data", small_test, "--against", name, "--json")
    result = json.loads(stdout)
    assert status == 0
    assert result["images"] == 200
    assert result["against_top1"] > 85
    assert abs(result["top1"] - result["against_top1"]) <= 3
    assert result["agreement"] > 90

    status, stdout, _ = run("info", out / "model.safetensors")
    assert status == 0
    assert "whole, checksum holds, logits finite" in stdout
    assert "W8/A8" in stdout


def test_synthesize_then_quantize_from_the_samples(run, tmp_path):
    status, _, err = run("synthesize", "demo", *QUICK, "--out", tmp_path / "s")
    assert status == 0
    assert "entropy=" in err
    assert "onehot=" in err
    assert "tv=" in err
    assert "crop=" in err
    assert sorted(os.listdir(tmp_path / "s")) == ["curriculum.png", "samples.png", "samples.safetensors"]
    assert Image.open(tmp_path / "s" / "samples.png").size[0] > 100
    samples = tmp_path / "s" / "samples.safetensors"
    assert run("quantize", "demo", "--calib", samples, "--rounding", "nearest", "--out", tmp_path / "q")[0] == 0


def test_one_call_equals_two(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dfqvit.calibration.images.COMPANIONS", 4)
    run("quantize", "demo", *QUICK, "--out", tmp_path / "one")
    run("synthesize", "demo", *QUICK, "--out", tmp_path / "s")
    run("quantize", "demo", "--calib", tmp_path / "s" / "samples.safetensors", "--out", tmp_path / "two")
    x = torch.randn(2, 1, 28, 28)
    one, two = (dfqvit.load(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert torch.equal(one(x), two(x))
    assert one.dfqvit_record.calibration == "synthetic"
    assert one.dfqvit_record.settings["iters"] == 2


def test_fast_takes_as_many_procedural_images_as_asked_for(run, tmp_path):
    arguments = [
        "quantize",
        "demo",
        "--fast",
        "--rounding",
        "nearest",
        "--json",
        "--out",
        tmp_path / "o",
        "--samples",
        "3",
    ]
    assert json.loads(run(*arguments)[1])["record"]["samples"] == 3


def test_fast_takes_procedural_images(run, tmp_path):
    status, stdout, err = run(
        "quantize", "demo", "--fast", "--seed", 5, "--rounding", "nearest", "--out", tmp_path / "f", "--json"
    )
    assert status == 0, err
    record = json.loads(stdout)["record"]
    assert (record["calibration"], record["samples"], record["settings"]) == ("procedural", 32, {"seed": 5})
    assert (tmp_path / "f" / "samples.png").exists()
    same = dfqvit.quantize(load_model("demo"), calib="procedural", samples=32, seed=5, rounding="nearest")
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(dfqvit.load(tmp_path / "f" / "model.safetensors")(x), same(x))
    status, _, err = run("quantize", "demo", "--fast", "--calib", "noise", "--out", tmp_path / "n")
    assert (status, said(err)) == (2, ["dfqvit: --fast and --calib noise were both given; give one of them"])


def test_bits_of_probabilities_and_scaling(run, tmp_path):
    arguments = ("quantize", "demo", "--calib", "noise", "--samples", 4, "--softmax-bits", 4, "--scaling", "none")
    status, stdout, _ = run(*arguments, "--out", tmp_path, "--json")
    assert status == 0
    recipe = json.loads(stdout)["record"]["recipe"]
    assert (recipe["softmax_bits"], recipe["scaling"]) == (4, "none")
    status, _, err = run("quantize", "demo", "--calib", "noise", "--softmax-bits", 1, "--out", tmp_path / "other")
    assert (status, said(err)) == (2, ["dfqvit: softmax_bits was 1; it may be a whole number from 2 to 8"])


def test_results_are_not_replaced_without_force(run, tmp_path):
    arguments = ("quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest", "--out", tmp_path)
    assert run(*arguments)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    status, _, err = run(*arguments)
    assert status == 2
    assert said(err) == [f"dfqvit: '{tmp_path / 'model.safetensors'}' exists already; give --force to replace it"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert run(*arguments, "--force")[0] == 0
    run("synthesize", "demo", *QUICK, "--out", tmp_path)
    assert run("synthesize", "demo", *QUICK, "--out", tmp_path)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["quantize", "deit_tny_patch16_224"], 2, "MODEL was 'deit_tny_patch16_224'; .* nearest are deit_tiny"),
        (
            ["quantize", "resnet50"],
            2,
            "MODEL was 'resnet50', a ResNet, which is not a transformer: .* may be a timm name",
        ),
        (["quantize", "demo", "--w-bits", "1"], 2, "w_bits was 1; it may be a whole number from 2 to 8"),
        (["quantize", "demo", "--a-bits", "9"], 2, "a_bits was 9"),
        (["quantize", "demo", "--w-bits", "four"], 2, "'four' is not a valid integer"),
        (["quantize", "demo", "--acm-blocks", "99", "--calib", "noise"], 2, "the model has blocks 0 to 3"),
        (["quantize", "demo", "--acm-blocks", "x"], 2, "--acm-blocks was 'x'"),
        (["quantize", "demo", "--acm-blocks", "1", "--gamma", "2"], 2, "exclude each other"),
        (
            ["quantize", "demo", "--fast", "--iters", "9"],
            2,
            "--iters was given and --calib procedural; it is a setting of",
        ),
        (
            ["quantize", "demo", "--calib", "noise", "--crop-lower", "0.08"],
            2,
            "--crop-lower was given and --calib noise",
        ),
        (
            ["quantize", "demo", "--acm", "none", "--acm-blocks", "0", "--fast"],
            2,
            r"acm_blocks was \[0\] and acm 'none'",
        ),
        (["quantize", "demo", "--calib", "nothing.npz"], 2, "--calib was 'nothing.npz'; it may be"),
        (["quantize", "demo", "--checkpoint", "none.safetensors"], 2, "checkpoint was 'none.safetensors'"),
        (["quantize", "demo", "--num-classes", "3"], 2, "has 10 classes and the model 3; give --num-classes 10"),
        (["quantize", "demo", "--mean", "1,2"], 2, "mean had 2 values; the model takes images of 1 channels"),
        (["quantize", "demo", "--std", "abc"], 2, "--std was 'abc'; it must be numbers"),
        (["quantize", "demo", "--mean", "nan"], 2, r"mean was \(nan,\); every value must be a finite number"),
        (["quantize", "demo", "--std", "inf"], 2, r"std was \(inf,\); every value must be a finite number"),
        (["quantize", "demo", "--mean", "72.9"], 2, r"mean was \(72.9,\); .* values of 0 to 255; divide by 255"),
        (
            ["quantize", "demo", "--calib", "noise", "--size-budget", "inf"],
            2,
            "size_budget was inf MB; it must be finite and above 0",
        ),
        (
            ["quantize", "demo", "--calib", "noise", "--size-budget", "nan"],
            2,
            "size_budget was nan MB; it must be finite and above 0",
        ),
        (["quantize", "demo", "--device", "tpu"], 2, "--device was 'tpu'; it may be cpu, cuda or cuda:N"),
        (["quantize", "demo", "--device", "cuda:77"], 2, "--device was 'cuda:77'; torch sees"),
        (["quantize", "demo", "--crop-lower", "2"], 2, "crop bounds were 2.0 and 1.0"),
        (["quantize", "demo", "--schedule", "easy"], 2, "'easy' is not one of"),
        (["quantize", "demo", "--no-such-option"], 2, "No such option"),
        (["quantize"], 2, "Missing argument 'MODEL'"),
        (["paint"], 2, "No such command 'paint'; it may be ablate, benchmark, .*, synthesize$"),
        (["quantise"], 2, r"No such command 'quantise'; did you mean 'quantize'\?$"),
        (["quantize", "demo", "--w-bit", "4"], 2, "No such option.*--w-bits"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, status, message):
    out = tmp_path / "out"
    extra = ["--out", out] if len(arguments) > 1 else []
    found, stdout, err = run(*arguments, *extra)
    assert found == status
    assert stdout == ""
    (line,) = said(err)
    assert __import__("re").search(message, line), line
    assert "Traceback" not in err
    assert not (out / "model.safetensors").exists()


def test_checkpoint_of_another_architecture_names_keys(run, tmp_path):
    safetensors.torch.save_file(load_model("demo").state_dict(), tmp_path / "w.safetensors")
    status, _, err = run("quantize", "demo-swin", "--checkpoint", tmp_path / "w.safetensors", "--out", tmp_path / "o")
    assert status == 2
    assert "is not of MODEL 'demo-swin': keys" in said(err)[0]
    assert "missing (" in said(err)[0]
    assert not (tmp_path / "o").exists()


def test_not_a_number_in_weights_is_a_failure(run, tmp_path):
    weights = load_model("demo").state_dict()
    weights["norm.bias"][3] = float("nan")
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    status, _, err = run("quantize", "demo", "--checkpoint", tmp_path / "w.safetensors", "--out", tmp_path / "o")
    assert status == 1
    assert said(err) == ["dfqvit: weights: 'norm.bias' holds NaN or Inf"]


def test_evaluate_errors(run, tmp_path, small_test):
    assert run("evaluate", tmp_path / "none", "--data", small_test)[0] == 2
    (tmp_path / "junk").write_bytes(b"x" * 100)
    status, _, err = run("evaluate", tmp_path / "junk", "--data", small_test)
    assert status == 1
    assert "is no whole safetensors file" in said(err)[0]
    run("quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest", "--out", tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    assert run("evaluate", file, "--data", tmp_path / "nowhere")[0] == 2
    folder = tmp_path / "images" / "0"
    folder.mkdir(parents=True)
    Image.new("L", (28, 28)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    for other in range(1, 10):
        (folder.parent / str(other)).mkdir()
    status, _, err = run("evaluate", file, "--data", folder.parent)
    assert status == 1
    assert "bad.png' is not a readable image" in said(err)[0]
    status, stdout, err = run("evaluate", file, "--data", folder.parent, "--unreadable", "skip", "--json")
    assert status == 0
    assert json.loads(stdout)["images"] == 1
    assert "skipped" in said(err)[0]


def test_info(run):
    status, stdout, _ = run("info", "--json")
    record = json.loads(stdout)
    assert status == 0
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["packages"]["timm"] == timm.__version__
    assert record["backends"]["quant_linear"]["reference"] == "live"
    status, stdout, _ = run("info")
    assert "backends:" in stdout


def test_help_lists_the_commands(run):
    status, stdout, _ = run("--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert command in stdout
        assert run(command, "--help")[0] == 0


def test_every_option_says_what_it_is():
    for name in cli.COMMANDS:
        command = importlib.import_module(f"dfqvit.cli.{name}").command
        assert command.help
        for option in (each for each in command.params if isinstance(each, click.Option)):
            assert option.help, f"{name} {option.opts[0]}"
            assert option.help[0].isupper(), f"{name} {option.opts[0]}: {option.help}"
            assert option.help[-1] in ".)", f"{name} {option.opts[0]}: {option.help}"


def test_info_of_a_file_is_a_table(run, tmp_path):
    out = tmp_path / "out"
    run("quantize", "demo", "--calib", "noise", "--samples", 2, "--rounding", "nearest", "--seed", 5, "--out", out)
    status, stdout, _ = run("info", out / "model.safetensors")
    assert status == 0
    title, blank, *lines = stdout.rstrip("\n").split("\n")
    assert title == f"{out / 'model.safetensors'}: whole, checksum holds, logits finite"
    assert blank == ""
    begin = lines[0].index("dfqvit_demo_vit")
    assert all(line[begin - 2 : begin] == "  " and line[begin] != " " for line in lines)  # one column of values
    table = {line[:begin].strip(): line[begin:] for line in lines if line[:begin].strip()}
    assert table["bits"] == "W4/A8: weights 4, first and last layer 8, activations 8"
    assert table["calibrated on"] == "2 images: noise"
    assert table["settings"] == "seed 5"
    assert table["input"] == "1 x 28 x 28 (channels, height, width)"
    assert table["mean"] == "0.286"
    assert max(map(len, lines)) < 120
    assert not re.search(r"[{}\[\]']", stdout.replace(str(out), ""))  # nothing as Python writes it


def test_benchmark_explains_its_ratio(run):
    status, stdout, err = run("benchmark", "demo", "--batch", 1, "--rounds", 3)
    assert status == 0, err
    found = re.search(r"W8/A8 .* ([\d.]+) \(([\d.]+) to ([\d.]+)\)$", stdout, re.MULTILINE)
    middle, low, high = map(float, found.groups())
    assert low <= middle <= high
    assert "how many times as fast as the float model beside it. Both had 3 turns" in stdout


@pytest.fixture
def short_demo(monkeypatch):
    """Few turns of the race of speeds, each a short one, and few companions."""
    monkeypatch.setattr("dfqvit.cli.demo._ROUNDS", 3)
    monkeypatch.setattr("dfqvit.cli.demo._SECONDS", 0.02)
    monkeypatch.setattr("dfqvit.cli.demo.COMPANIONS", 2)


def test_demo_on_a_few_images(run, tmp_path, short_demo):
    status, stdout, _ = run("demo", "--images", 100, *QUICK, "--out", tmp_path, "--json")
    top1 = json.loads(stdout)["top1"]
    assert status == 0
    assert set(top1) == {"W8/A8", "W4/A8", "W3/A8", "W3/A8, PSAQ-ViT's"}
    assert top1["W8/A8"]["real images"] > 85
    assert re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", top1["W8/A8"]["x float32"])  # a speed with its spread
    assert (tmp_path / "w3a8.safetensors").exists()
    assert json.loads(stdout)["report"] == str(tmp_path / "report.html")
    assert "<h2>Accuracy</h2>" in (tmp_path / "report.html").read_text()


def test_demo_of_all_models(run, tmp_path, monkeypatch, short_demo):
    """Of two here: one has no such places as PSAQ-ViT quantizes at. Quickly: to few widths, rounded to nearest."""
    rows = importlib.import_module("dfqvit.cli.demo")._ROWS
    monkeypatch.delitem(rows, "W3/A8")
    monkeypatch.setattr("dfqvit.cli.demo.quantize", functools.partial(dfqvit.quantize, rounding="nearest"))
    monkeypatch.setattr(
        "dfqvit.cli.demo.embedded.ALIASES", {n: demo.ALIASES[n] for n in ("demo-deit3", "demo-convnext")}
    )
    status, stdout, err = run("demo", "--all", "--images", 100, *QUICK, "--out", tmp_path, "--json")
    assert status == 0, err
    models = json.loads(stdout)["models"]
    assert {name: len(record["top1"]) for name, record in models.items()} == {"demo-deit3": 3, "demo-convnext": 2}
    for name, record in models.items():
        assert record["report"] == str(tmp_path / name / "report.html")
        assert record["top1"]["W8/A8"]["data-free"] > 85
        assert (tmp_path / name / "w4a8.safetensors").exists()
    status, _, err = run("demo", "--all", "--dense", "--out", tmp_path)
    assert status == 2
    assert "--all was given with --dense" in said(err)[0]


def test_ctrl_c_ends_in_one_line_and_resume_gives_the_same_model(run, tmp_path):
    """A real process and a real signal."""
    arguments = ["quantize", "demo", "--samples", "2", "--iters", "8", "--rounding", "nearest"]
    code = (
        "import os, signal, sys\nfrom dfqvit import cli\nfrom dfqvit.synthesis.step import Step\n"
        "step = Step.__call__\ndef stepping(self):\n    if self.taken == 4: os.kill(os.getpid(), signal.SIGINT)\n"
        "    step(self)\nStep.__call__ = stepping\ncli.main(sys.argv[1:])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--out", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell's children ignore it
    )
    assert found.returncode == 130
    assert said(found.stderr) == [
        "dfqvit: interrupted; the same command with --resume goes on where a synthesis stopped"
    ]
    assert "Traceback" not in found.stderr
    assert os.listdir(tmp_path / "a") == ["synthesis.snapshot.safetensors"]
    for folder, extra in (("a", ["--resume"]), ("b", [])):
        assert run(*arguments, "--out", tmp_path / folder, *extra)[0] == 0
    x = torch.randn(2, 1, 28, 28)
    one, two = (dfqvit.load(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert torch.equal(one(x), two(x))
    assert sorted(os.listdir(tmp_path / "a")) == ["curriculum.png", "model.safetensors", "report.html", "samples.png"]


def test_ctrl_c_after_the_synthesis_keeps_it(run, tmp_path, monkeypatch):
    """Found here: the line named --resume, and the images were gone with the calibration that was interrupted."""
    arguments = ["quantize", "demo", "--samples", "2", "--iters", "3", "--rounding", "nearest", "--out"]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def taken(_):
        raise AssertionError("a step was taken again")

    monkeypatch.setattr("dfqvit.cli.quantize.quantize", interrupted)
    status, _, err = run(*arguments, tmp_path / "a")
    assert (status, said(err)[-1]) == (
        130,
        "dfqvit: interrupted; the same command with --resume goes on where a synthesis stopped",
    )
    monkeypatch.undo()
    assert run(*arguments, tmp_path / "b")[0] == 0
    monkeypatch.setattr("dfqvit.synthesis.step.Step.__call__", taken)
    assert run(*arguments, tmp_path / "a", "--resume")[0] == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    assert not (tmp_path / "a" / "synthesis.snapshot.safetensors").exists()


@pytest.mark.parametrize(
    ("command", "given", "wanted"),
    [
        ("info", {}, {"GOMP_SPINCOUNT": cli.SPINS}),
        ("info", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("info", {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ("benchmark", {}, {}),
    ],
)
def test_the_program_bounds_how_long_torchs_threads_spin(command, given, wanted):
    """In its own process, before torch comes; what the user set holds, and what is timed is torch as it is."""
    code = (
        "import os, sys, dfqvit.cli as cli\n"
        "def run(_):\n"
        "    print('torch' in sys.modules, {k: os.environ[k] for k in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY') if k in os.environ})\n"
        "cli.run = run\n"
        f"cli.main(['{command}'])\n"
    )
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **given}
    )
    assert found.stdout.strip() == f"False {wanted}"


def test_json_has_no_nan(capsys):
    record = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (float("-inf"), 2, "x", None, True)}]}
    emit(True, record, "")
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None, {"c": [None, 2, "x", None, True]}]}


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path):
    """A real limit, as a disk that is full; pictures and report come after the model."""
    code = (
        "import resource, sys; from dfqvit import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "cli.main(sys.argv[1:])"
    )
    arguments = [
        "quantize",
        "demo",
        "--calib",
        "noise",
        "--samples",
        2,
        "--rounding",
        "nearest",
        "--out",
        tmp_path / "q",
    ]
    found = python("-c", code, *arguments)
    assert found.returncode == 1
    assert said(found.stderr) == [f"dfqvit: File too large: '{tmp_path / 'q' / 'model.safetensors'}'"]
    assert list((tmp_path / "q").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["quantize", "demo"], "interrupted; the same command with --resume goes on where a synthesis stopped"),
        (["evaluate", "x"], "interrupted"),
    ],
)
def test_ctrl_c_while_modules_are_imported(arguments, wanted, tmp_path):
    """A module that swallows KeyboardInterrupt, as some do; the handler of before is back when the command runs."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in range(1000):\n        pass\n"
        "except BaseException:\n    pass\nprint('went on')\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "dfqvit", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, "", f"dfqvit: {wanted}\n")


def test_ctrl_c_raises_as_usual_when_a_command_runs():
    code = (
        "import signal, sys, types, click, dfqvit.cli as cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def pressed():\n    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except BaseException as error:\n        print(isinstance(error, KeyboardInterrupt))\n"
        "sys.modules['dfqvit.cli.info'] = types.SimpleNamespace(command=click.Command('info', callback=pressed))\n"
        "cli.main(['info'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


@pytest.mark.parametrize(("name", "resumes"), [("info", False), ("evaluate", False), ("synthesize", True)])
def test_ctrl_c_offers_resume_where_there_is_one(name, resumes, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.program, "main", interrupt)
    assert cli.run([name]) == 130
    assert ("--resume" in capsys.readouterr().err) == resumes
