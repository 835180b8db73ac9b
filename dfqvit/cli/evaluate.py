"""`dfqvit evaluate`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch.utils.data import Subset
from tqdm import tqdm

from ..distributed import rank, world
from ..errors import UsageError
from ..evaluation import evaluate
from ..evaluation.batches import Batches
from ..evaluation.data import open_images
from ..evaluation.dense import TASKS
from ..models import Preprocessing
from ..models.spec import class_count
from ..runtime.record import QuantizationRecord
from ..storage import load
from .dense import check_input, evaluate_network
from .options import adjusted, build_option, common, emit, open_float, pick_device, plain_name


@click.command("evaluate")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="A folder of classes, or an .npz file; for detection and segmentation see --task.",
)
@click.option(
    "--task",
    type=click.Choice(["classification", *TASKS]),
    default="classification",
    show_default=True,
    help="Detection reads DIR/annotations.json (COCO's format) and DIR/images, segmentation DIR/images and DIR/masks (PNG).",
)
@build_option
@click.option(
    "--label-ids", is_flag=True, help="The detector's labels are the ids of the categories, not their places."
)
@click.option("--classes", type=click.Path(path_type=Path), help="Text file: line k is the folder name of class k.")
@click.option("--against", help="The float MODEL to compare with, as a timm name; of a network, module:function.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of --against.")
@click.option("--mean", help="Comma-separated; default the file's.")
@click.option("--std", help="Comma-separated; default the file's.")
@click.option("--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic"]), help="Default the file's.")
@click.option(
    "--unreadable",
    type=click.Choice(["refuse", "skip"]),
    default="refuse",
    show_default=True,
    help="What to do about a file that is no image: end, or leave it out with a warning.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images in one forward pass.")
@click.option("--workers", type=click.IntRange(0), help="Processes that read images; default by data and device.")
@common
def command(**options: Any) -> None:
    """Measure a saved FILE on labelled images: top-1, top-5, and with --against the agreement with the float model.

    With --task: mAP@50 and mAP of a detector, mIoU and pixel accuracy of a segmenter.
    """
    _check_options(options)
    device = pick_device(options["device"])
    model = load(options["file"], device, build=options["build"])
    record: QuantizationRecord = model.dfqvit_record
    preprocessing = adjusted(record.preprocessing, options["mean"], options["std"], options["interpolation"])
    if options["task"] != "classification":
        evaluate_network(model, preprocessing, options, device)
        return
    classes = class_count(model)
    if not classes:
        raise UsageError(f"FILE was '{options['file']}', whose model has no classifier; --task says what else it does")
    images = open_images(options["data"], preprocessing, options["classes"], options["unreadable"], num_classes=classes)
    assumed = images.assumed
    against = None
    if options["against"] is not None:
        against = open_float(record, options["against"], options["checkpoint"], device)
        check_input(options["against"], against, preprocessing, device)
        _warn_of_other_preprocessing(options, against, record, preprocessing)
    if world() > 1:
        images = Subset(images, range(rank(), len(images), world()))  # type: ignore[assignment]
    with tqdm(total=len(images), desc="evaluate", unit="image", dynamic_ncols=True) as bar:
        loader = Batches(images, options["batch_size"], options["workers"], device)
        result = evaluate(model, loader, against, bar.update)
    rows = [[record.recipe.label, result.top1, result.top5]]
    if against is not None:
        rows.append(["float", result.against_top1, result.against_top5])
    text = tabulate(rows, headers=["model", "top-1 %", "top-5 %"], floatfmt=".2f")
    text += (
        f"\n{result.images} images, {result.images_per_second:.1f} images/s by the model alone, "
        f"{result.overall_images_per_second:.1f} in all; {result.waiting:.0f} % of the time waiting for images "
        f"({loader.workers} workers)"
    )
    text += f"\nclasses: {assumed}"
    if against is not None:
        text += f"\nagreement {result.agreement:.2f} %, mean logit error {result.logit_error:.4f}"
    emit(options["as_json"], {"file": str(options["file"]), "classes": assumed, **result.to_dict()}, text)


def _check_options(options: Mapping[str, Any]) -> None:
    """UsageError for an option that would change nothing."""
    task, dense = options["task"], options["task"] != "classification"
    for name, given, use in (
        ("checkpoint", options["checkpoint"] is not None and options["against"] is None, "the weights of --against"),
        ("label-ids", options["label_ids"] and task != "detection", "--task detection"),
        ("classes", options["classes"] is not None and dense, "--task classification"),
        ("unreadable skip", options["unreadable"] == "skip" and dense, "--task classification"),
    ):
        if given:
            raise UsageError(f"--{name} was given; it is for {use}")


def _warn_of_other_preprocessing(
    options: Mapping[str, Any], against: torch.nn.Module, record: QuantizationRecord, preprocessing: Preprocessing
) -> None:
    """Both models get the same images; a float model of another name, or timm's own of another tag, may expect others.

    Of weights of --checkpoint in FILE's architecture nothing says what they expect but FILE.
    """
    name, own, given = options["against"], Preprocessing.of(against).to_dict(), preprocessing.to_dict()
    if plain_name(name) == plain_name(record.spec.architecture) and options["checkpoint"] is not None:
        return
    differing = [key for key in own if own[key] != given[key]]
    if differing:
        theirs, ours = (", ".join(f"{key} {values[key]}" for key in differing) for values in (own, given))
        warnings.warn(
            f"--against {name} was made for {theirs}; it gets the images as FILE does, with {ours}", stacklevel=2
        )
