"""The folder for the Hugging Face Hub: card and model without the network; the upload only when asked, and its errors."""

from __future__ import annotations

import json
import os
import time

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

import dfqvit
from dfqvit import cli
from dfqvit.models import load_model
from dfqvit.storage import hub


def client_error(module, message):
    """What the Hub's HTTP client raises, of which `huggingface_hub` makes nothing of its own."""
    return type("ConnectError", (Exception,), {"__module__": module})(message)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """What was asked of the Hub; anything else would fail."""
    seen = []

    def record(name):
        return lambda self, *args, **kwargs: seen.append((name, args, kwargs)) or "https://hub/owner/name"

    for name in [name for name in dir(HfApi) if name.startswith(("create_", "upload_", "delete_"))]:
        monkeypatch.setattr(HfApi, name, record(name))
    return seen


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "saved.safetensors"
    dfqvit.save(dfqvit.quantize(load_model("demo"), 3, calib="noise", samples=2), path)
    return path


def test_the_folder_holds_model_and_card_and_nothing_is_sent(saved, tmp_path, calls, capsys):
    evaluation = tmp_path / "evaluation.json"
    figures = {
        "file": str(saved),
        "images": 500,
        "top1": 87.654,
        "top5": 99.5,
        "against_top1": 90.0,
        "against_top5": 99.9,
    }
    evaluation.write_text(json.dumps(figures))
    out = tmp_path / "hub"
    assert cli.run(["card", str(saved), "--out", str(out), "--evaluation", str(evaluation)]) == 0
    assert calls == []
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.safetensors"]
    x = torch.randn(2, *dfqvit.load(saved).dfqvit_record.preprocessing.input_size)
    assert torch.equal(dfqvit.load(out / "model.safetensors")(x), dfqvit.load(saved)(x))
    card = ModelCard.load(out / "README.md")
    data = yaml.safe_load(card.data.to_yaml())
    assert data["library_name"] == "dfqvit"
    assert "W3/A8" in data["tags"]
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == [87.654, 99.5]
    for told in (
        "87.65 %, 99.50 % of 500 images",
        "90.00 %",
        "noise",
        "second-order",
        'dfqvit.load("model.safetensors")',
    ):
        assert told in card.text
    assert cli.run(["card", str(saved), "--out", str(out)]) == 2
    assert "give --force to replace it" in capsys.readouterr().err
    assert cli.run(["card", str(saved), "--out", str(out), "--force"]) == 0
    assert "model-index" not in (out / "README.md").read_text()


FIGURES = {"images": 500, "top1": 87.5, "top5": 99.5}


@pytest.fixture
def card(saved, tmp_path, capsys):
    """Runs the command on figures: (exit status, stderr)."""

    def call(**figures):
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps({"file": str(saved), **FIGURES, **figures}))
        status = cli.run(["card", str(saved), "--out", str(tmp_path / "hub"), "--force", "--evaluation", str(path)])
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"top1": None}, "has top1 None; it must be a number from 0 to 100"),
        ({"top5": "99"}, "has top5 '99'; it must be a number from 0 to 100"),
        ({"top1": float("nan")}, "has top1 nan; it must be a number from 0 to 100"),
        ({"top1": 101}, "has top1 101; it must be a number from 0 to 100"),
        ({"top1": True}, "has top1 True; it must be a number from 0 to 100"),
        ({"against_top1": -1, "against_top5": 3}, "has against_top1 -1; it must be a number from 0 to 100"),
        ({"against_top1": 90}, "has one of against_top1 and against_top5; it must have both or none"),
        ({"images": 0}, "has images 0; it must be a whole number, 1 or more"),
        ({"images": "500"}, "has images '500'; it must be a whole number"),
    ],
)
def test_figures_that_are_none(card, tmp_path, figures, message):
    status, err = card(**figures)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "hub").exists()


def test_figures_of_another_file_are_refused(card, saved, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another model")
    status, err = card(file=str(other))
    assert status == 2
    assert f"is of '{other}', which is another model than FILE '{saved}'" in err
    assert not (tmp_path / "hub").exists()
    other.write_bytes(saved.read_bytes())  # a copy
    assert card(file=str(other)) == (0, "")


def test_figures_that_cannot_be_compared_are_taken_with_a_warning(card, saved):
    for file, told in (
        (None, "does not say which file it is of"),
        ("gone", "is of 'gone', which is not there to compare"),
    ):
        status, err = card(file=file)
        assert status == 0
        assert told in err
        assert f"it is taken for '{saved}'" in err
    now = saved.stat()
    os.utime(saved, (now.st_atime, time.time() + 60))
    status, err = card()
    os.utime(saved, (now.st_atime, now.st_mtime))
    assert status == 0
    assert "is newer than --evaluation" in err


def test_push_uploads_the_folder(saved, tmp_path, calls, capsys):
    assert cli.run(["card", str(saved), "--out", str(tmp_path), "--push", "owner/name", "--private", "--json"]) == 0
    (made, arguments, options), (sent, _, upload) = calls
    assert (made, arguments, options["private"]) == ("create_repo", ("owner/name",), True)
    assert (sent, upload["repo_id"], upload["folder_path"]) == ("upload_folder", "owner/name", tmp_path)
    assert set(upload["allow_patterns"]) == {"README.md", "model.safetensors"}
    assert json.loads(capsys.readouterr().out)["uploaded"] == "https://hub/owner/name"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("none"), "knows no token of yours; run `hf auth login` first"),
        (ConnectionError("no route\nto host"), "the upload to 'owner/name' failed: no route"),
        (huggingface_hub.errors.HFValidationError("bad name"), "the upload to 'owner/name' failed: bad name"),
        (client_error("httpx", "no address"), "the upload to 'owner/name' failed: no address"),
        (client_error("httpx2._exceptions", ""), "the upload to 'owner/name' failed: ConnectError"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(saved, tmp_path, monkeypatch, capsys, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)
    assert cli.run(["card", str(saved), "--out", str(tmp_path), "--push", "owner/name"]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": 3}', '"text"'])
def test_evaluations_that_are_none(saved, tmp_path, capsys, text):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    assert cli.run(["card", str(saved), "--out", str(tmp_path / "out"), "--evaluation", str(path)]) == 2
    assert "it must be a file that holds what `dfqvit evaluate FILE --json` printed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_base_model_of_a_timm_name():
    model = dfqvit.quantize(
        load_model("deit_tiny_patch16_224", pretrained=False), 8, calib="noise", samples=1, quantizer="minmax"
    )
    assert hub._metadata(model.dfqvit_record, None).base_model == "timm/deit_tiny_patch16_224.fb_in1k"
