"""A folder ready for the Hugging Face Hub: the saved model and a card; and its upload, which only `push` makes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from torch import nn

from ..errors import DfqvitError, first_line
from ..models.network import NetworkSpec
from ..models.spec import class_count
from ..runtime.record import QuantizationRecord, counted, widths_of
from ..version import __version__
from .atomic import atomic
from .file import sizes

WEIGHTS, CARD = "model.safetensors", "README.md"
_CLIENTS = ("httpx", "httpcore", "requests", "urllib")
_PAPER = "https://arxiv.org/abs/2507.14481"
# A model that was given one of these has other weights than timm's of its name.
_SIZES = {"embed_dim", "depth", "dims", "depths"}


def write_card(model: nn.Module, file: Path, folder: Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Copies the saved `file` of `model` into `folder` with a model card beside it; the card's path.

    Args:
        model: what `dfqvit.load` made of the file.
        file: the file of `dfqvit.save`.
        folder: made if need be; a card and weights there are replaced.
        evaluation: what `dfqvit evaluate --json` printed for this file: its accuracies stand in the card.
    """
    record: QuantizationRecord = model.dfqvit_record  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    if file.resolve() != (folder / WEIGHTS).resolve():
        with atomic(folder / WEIGHTS) as temporary:
            shutil.copyfile(file, temporary)
    classes = class_count(model)
    metadata = _metadata(record, evaluation, "image-classification" if classes else None)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{_text(model, file, evaluation)}")
    with atomic(folder / CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return folder / CARD


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder of `write_card` to the Hub, making the repository if there is none; its address.

    Raises:
        DfqvitError: no token, no network, or the Hub refuses.
    """
    api = HfApi()
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[WEIGHTS, CARD])
    except LocalTokenNotFoundError as error:
        raise DfqvitError("the Hugging Face Hub knows no token of yours; run `hf auth login` first") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DfqvitError(_failed(repo_id, error)) from error
    except Exception as error:  # the errors of the Hub's HTTP client, whose package differs with its version
        if type(error).__module__.partition(".")[0].rstrip("0123456789") not in _CLIENTS:
            raise
        raise DfqvitError(_failed(repo_id, error)) from error
    return str(made)


def _failed(repo_id: str, error: Exception) -> str:
    return f"the upload to '{repo_id}' failed: {first_line(error)}"


def _metadata(record: QuantizationRecord, evaluation: dict[str, Any] | None, task: str | None = None) -> ModelCardData:
    pretrained = timm.models.get_pretrained_cfg(record.spec.architecture)
    base = None if record.spec.kwargs.keys() & _SIZES else getattr(pretrained, "hf_hub_id", None)
    results = None
    if evaluation is not None:
        results = [
            EvalResult("image-classification", "custom", f"{evaluation['images']} images", "accuracy", evaluation[key],
                       metric_name=name)
            for key, name in (("top1", "top-1 %"), ("top5", "top-5 %"))
        ]  # fmt: skip
    return ModelCardData(
        library_name="dfqvit",
        pipeline_tag=task,
        base_model=base,
        base_model_relation="quantized" if base else None,
        tags=[
            *([] if isinstance(record.spec, NetworkSpec) else ["timm"]),
            "quantization",
            *([] if record.calibration == "images" else ["data-free"]),
            record.recipe.label,
        ],
        model_name=f"{record.spec.architecture} {record.recipe.label}" if results else None,
        eval_results=results,
    )


def _text(model: nn.Module, file: Path, evaluation: dict[str, Any] | None) -> str:
    record: QuantizationRecord = model.dfqvit_record  # type: ignore[assignment]
    recipe, preprocessing = record.recipe, record.preprocessing
    kind, call = "A model of timm", f'dfqvit.load("{WEIGHTS}")  # an nn.Module: float images in, float logits out'
    if isinstance(record.spec, NetworkSpec):
        kind = f"The network that `{record.spec.build_by}` makes"
        call = f'dfqvit.load("{WEIGHTS}", build="{record.spec.build_by}")  # an nn.Module; that function must be importable'
    source = "on images that were given" if record.calibration == "images" else "without data"
    kinds = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in sizes(file).items())
    settings = ", ".join(f"{key} {value}" for key, value in record.settings.items() if value != "")
    widths = f"first and last layer {recipe.edge_bits} bits" if recipe.layer_bits is None else counted(widths_of(model))
    lines = [
        f"# {record.spec.architecture}, {recipe.label}",
        "",
        f"{kind}, quantized to {recipe.label} {source} and without fine-tuning ([DFQ-ViT]({_PAPER})) by dfqvit {__version__}."
        + (" It runs in integer arithmetic." if recipe.placement == "gemm" else ""),
        "",
        "```python",
        "import dfqvit",
        "",
        f"model = {call}",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| input | {list(preprocessing.input_size)}, mean {list(preprocessing.mean)}, std {list(preprocessing.std)}, "
        f"{preprocessing.interpolation}, crop {preprocessing.crop_pct} |",
        f"| arguments of timm | {record.spec.kwargs or 'none'} |",
        f"| calibration | {record.samples} images, {record.calibration}{f': {settings}' if settings else ''} |",
        f"| weights | {recipe.quantizer} scales, {recipe.levels} levels, {recipe.rounding} rounding, {widths} |",
        f"| activations | {recipe.a_bits} bits, placement {recipe.placement} |",
        f"| correction | {record.acm}, blocks {record.acm_blocks} |",
        f"| size | {os.path.getsize(file) / 1e6:.2f} MB: {kinds} |",
        f"| torch, timm | {torch.__version__}, {timm.__version__} |",
    ]
    if evaluation is not None:
        lines.append(
            f"| top-1, top-5 | {evaluation['top1']:.2f} %, {evaluation['top5']:.2f} % of {evaluation['images']} images |"
        )
        if evaluation.get("against_top1") is not None:
            lines.append(
                f"| the float model's | {evaluation['against_top1']:.2f} %, {evaluation['against_top5']:.2f} % |"
            )
    return "\n".join(lines) + "\n"
