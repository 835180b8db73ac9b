"""The folder for the Hugging Face Hub: card and model without the network; the upload only when asked, and its errors."""

from __future__ import annotations

import json

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
    evaluation.write_text(
        json.dumps({"images": 500, "top1": 87.654, "top5": 99.5, "against_top1": 90.0, "against_top5": 99.9})
    )
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
