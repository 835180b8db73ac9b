"""`dfqvit ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from ..errors import Interrupted, UsageError
from ..evaluation.batches import Batches
from ..evaluation.data import open_images, spread_images
from ..models import Preprocessing
from ..models import demo as embedded
from ..models.spec import class_count
from ..storage.atomic import atomic
from ..studies.ablation import REAL_IMAGES, Bench, Gallery, Table, run_study, weights_digest
from ..studies.named import RECIPES, STUDIES, settings_of
from ..studies.tables import markdown, write_charts
from ..synthesis import Progress
from .options import common, emit, model_options, numbers, open_model, refuse_given, setting, whole_numbers

ROWS, TABLES = "ablations.csv", "ablations.md"


@click.command("ablate")
@model_options
@click.option("--study", "studies", type=click.Choice(list(STUDIES)), multiple=True, help="Default method; repeatable.")
@click.option("--values", help="Comma-separated values in place of the study's own (samples, steps, gamma).")
@click.option(
    "--setting", "chosen", multiple=True, metavar="NAME", help="One of a study's settings, in place of all; repeatable."
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="paper",
    show_default=True,
    help="What is varied: PSAQ-ViT's placement with min-max ranges, or the default of `dfqvit quantize`.",
)
@click.option("--bits", default="8,4,3", show_default=True, help="Widths of the weights, comma-separated.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many, counted up from --seed.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="A folder of classes or an .npz; embedded models have one."
)
@click.option("--classes", type=click.Path(path_type=Path), help="Text file: line k is the folder name of class k.")
@click.option("--images", type=click.IntRange(1), default=1000, show_default=True, help="Evaluated, evenly spread.")
@setting("samples", click.IntRange(1), "Synthetic images.")
@setting("iters", click.IntRange(1), "Steps of synthesis.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@common
def command(**options: Any) -> None:
    """Measure what each piece of the method does: a grid of settings, one row of DIR/ablations.csv for each run.

    Runs whose row is there are skipped, so an interrupted command goes on where it stopped, and other studies, seeds or
    models can be added to the same DIR. Tables go to DIR/ablations.md, pictures beside it, synthetic images to DIR/images.
    """
    out, name = options.pop("out"), options["model"]
    studies = options.pop("studies") or ("method",)
    values, bits = numbers("--values", options.pop("values")), whole_numbers("--bits", options.pop("bits"), 2, 8)
    recipe, samples, iters = options.pop("recipe"), options.pop("samples"), options.pop("iters")
    chosen = options.pop("chosen")
    for study, option in (("samples", "samples"), ("steps", "iters")):
        if set(studies) == {study}:
            refuse_given([option], f"and --study {study}, whose own values they are; give --values")
    seeds = range(options["seed"], options.pop("seed") + options.pop("seeds"))
    data, classes, count = options.pop("data"), options.pop("classes"), options.pop("images")
    as_json = options.pop("as_json")
    settings = {study: settings_of(study, recipe, values, chosen) for study in studies}
    if data is None and name not in embedded.ALIASES:
        raise UsageError("--data was not given; it must be for a MODEL that is not embedded")
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / ROWS)
    model, preprocessing = open_model(**options)
    bench = _bench(data, classes, preprocessing, count, next(model.parameters()).device, class_count(model))
    gallery = Gallery(model, preprocessing, out / "images", weights_digest(model, preprocessing))
    before = len(table.rows)
    with tqdm(desc="synthesis", unit="step", dynamic_ncols=True) as bar:

        def step(_: Progress) -> None:
            bar.update()

        try:
            for study in studies:
                run_study(
                    model,
                    preprocessing,
                    bench,
                    table,
                    gallery,
                    settings[study],
                    study=study,
                    recipe=recipe,
                    architecture=name,
                    seeds=seeds,
                    bits=bits,
                    samples=samples,
                    iters=iters,
                    report=step,
                    announce=lambda text: tqdm.write(text, file=bar.fp),
                )
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; the same command goes on where it stopped") from error
    with atomic(out / TABLES) as temporary:
        temporary.write_text(markdown(table.rows, charts=True), encoding="utf-8")
    pictures = write_charts(table.rows, out)
    record = {
        "rows": str(out / ROWS),
        "tables": str(out / TABLES),
        "charts": [str(path) for path in pictures],
        "measured": len(table.rows) - before,
        "all": len(table.rows),
    }
    text = f"{markdown(table.rows)}\n{record['measured']} runs measured, {before} were there\nrows:   {out / ROWS}\n"
    emit(as_json, record, f"{text}tables: {out / TABLES}, {len(pictures)} pictures beside it")


def _bench(
    data: Path | None,
    classes: Path | None,
    preprocessing: Preprocessing,
    count: int,
    device: torch.device,
    num_classes: int | None,
) -> Bench:
    """Evaluation images and, for real-data calibration, training images of an embedded model or else some of the same."""
    test = open_images(data or embedded.TEST_IMAGES, preprocessing, classes, num_classes=num_classes)
    count = min(count, len(test))
    chosen = [index * len(test) // count for index in range(count)]
    held = list(Batches(torch.utils.data.Subset(test, chosen), 50, device=device))
    source = test if data is not None else open_images(embedded.TRAIN_SAMPLE, preprocessing)
    real = spread_images(source, min(REAL_IMAGES, len(source))).to(device)
    return Bench((data or embedded.TEST_IMAGES).name, held, real)
