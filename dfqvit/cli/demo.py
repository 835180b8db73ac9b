"""`dfqvit demo`: the main job on the embedded models, with accuracies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from ..api import quantize
from ..calibration.images import COMPANIONS, with_companions
from ..errors import UsageError
from ..evaluation import evaluate
from ..evaluation.batches import Batches
from ..evaluation.data import open_images, spread_images
from ..evaluation.energy import Cost, Energy
from ..evaluation.speed import race
from ..models import Preprocessing, load_model
from ..models import demo as embedded
from ..models.adapters import find_adapter
from ..storage import save
from ..synthesis import SynthesisConfig
from .dense import demo_dense
from .options import common, emit, pick_device, refuse_given, setting
from .report import CURRICULUM, SAMPLES, make_report
from .synthesize import run_synthesis

_BITS = (8, 4, 3)
# The literature's quantizer, which feels what it is calibrated on.
_PAPERS = {"placement": "psaq", "quantizer": "minmax"}
_ROWS: dict[str, tuple[int, dict[str, Any]]] = {f"W{bits}/A8": (bits, {}) for bits in _BITS}
_ROWS["W3/A8, PSAQ-ViT's"] = (3, _PAPERS)
_PAPERS_TOLD = "PSAQ-ViT's: the literature's quantizer, simulated; what it is calibrated on matters more to it\n"
_REPORTED = 4  # bits of the model that the report is about
_ITERS, _DENSE_ITERS = 300, 100  # of docs/dense.md's tables
_BATCH, _ROUNDS, _SECONDS = 32, 7, 0.1  # of the comparison of speeds: the turns of each model, and how long one is

SPEED = "x float32"  # the column


@click.command("demo")
@click.option(
    "--model",
    type=click.Choice(list(embedded.ALIASES)),
    default="demo",
    show_default=True,
    help="A small DeiT, Swin, DeiT III or ConvNeXt.",
)
@click.option("--all", "all_models", is_flag=True, help="All four, one after the other, each in a folder of its own.")
@click.option("--dense", is_flag=True, help="A small detector and a small segmenter instead: mAP@50 and mIoU.")
@setting("samples", click.IntRange(1), "Synthetic images to make.")
@click.option(
    "--iters",
    type=click.IntRange(1),
    show_default=f"{_ITERS}; with --dense {_DENSE_ITERS}",
    help="Steps of the synthesis.",
)
@click.option("--images", type=click.IntRange(1, 10_000), default=10_000, show_default=True, help="Test images to use.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/demo"),
    show_default=True,
    help="Folder of the results.",
)
@common
def command(**options: Any) -> None:
    """Quantize an embedded model, or all, to W8/A8, W4/A8 and W3/A8 and print top-1 on Fashion-MNIST's test images.

    Calibration on real training images, on noise, and on synthetic images (data-free) stand side by side. Needs no network.
    With --dense: mAP@50 of a detector and mIoU of a segmenter, on scenes composed from these images.
    Replaces its own results of an earlier run.
    """
    device = pick_device(options["device"])
    options["iters"] = options["iters"] or (_DENSE_ITERS if options["dense"] else _ITERS)
    if options["dense"] or options["all_models"]:
        refuse_given(["model"], f"with --{'dense' if options['dense'] else 'all'}, which has models of its own")
    if options["dense"]:
        if options["all_models"]:
            raise UsageError("--all was given with --dense, which has models of its own; it may be given without it")
        demo_dense(options, device)
        return
    if not options["all_models"]:
        record, text = _run(options["model"], options["out"], options, device)
    else:
        found = {name: _run(name, options["out"] / name, options, device) for name in embedded.ALIASES}
        record = {"models": {name: record for name, (record, _) in found.items()}}
        text = "\n\n".join(text for _, text in found.values())
    emit(options["as_json"], record, text)


@dataclass(frozen=True)
class _Saved:
    """A quantized model, its file, and what it cost to quantize it."""

    model: torch.nn.Module
    path: Path
    cost: Cost


def _run(name: str, out: Path, options: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """Quantizes an embedded model in all ways, into the folder `out`; (record, what is told of it)."""
    started, energy = time.perf_counter(), Energy(device)
    model = load_model(name, device=device)
    preprocessing = Preprocessing.of(model)
    test = open_images(embedded.TEST_IMAGES, preprocessing)
    loaded = list(Batches(torch.utils.data.Subset(test, range(options["images"])), 250))
    real = spread_images(open_images(embedded.TRAIN_SAMPLE, preprocessing), min(options["samples"], 64))
    config = SynthesisConfig(samples=options["samples"], iters=options["iters"], seed=options["seed"])
    with energy.account() as cost:
        synthetic = run_synthesis(model, preprocessing, config, out, resume=False)
    sources: dict[str, str | torch.Tensor] = {"real images": real, "noise": "noise", "data-free": synthetic}
    rows, saved = _quantize_all(name, model, preprocessing, loaded, sources, config, out, energy)
    _time_all(model, preprocessing, rows, saved, energy)

    headers = ["top-1 %", "float", *sources, "MB", SPEED]
    cells = [[kind, *(row[key] for key in headers[1:])] for kind, row in rows.items()]
    table = tabulate(cells, headers=headers, floatfmt=("", ".2f", ".2f", ".2f", ".2f", ".2f", ""))
    reported = saved[f"W{_REPORTED}/A8"]
    page = make_report(
        out,
        name,
        model,
        reported.model,
        {"synthetic": synthetic, "real": real.to(device)},
        cost + reported.cost,
        energy,
        file=reported.path,
        seed=config.seed,
        pictures=[SAMPLES, CURRICULUM],
        accuracy=(
            headers,
            [[row[0], *("" if value is None else f"{value:.2f}" for value in row[1:-1]), row[-1]] for row in cells],
        ),
    )
    floats = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6
    text = (
        f"{table}\n\n{name}: {options['images']} test images of Fashion-MNIST; float32: {floats:.2f} MB; "
        f"{config.samples} synthetic images, {config.iters} steps; {time.perf_counter() - started:.0f} s in all\n"
        f"{_PAPERS_TOLD if len(rows) == len(_ROWS) else ''}"
        f"{SPEED}: times as fast as float32 beside it, batch {_BATCH}: median of {_ROUNDS} turns, least to greatest in brackets\n"
        f"models:   {out}/w8a8.safetensors, w4a8.safetensors, w3a8.safetensors\n"
        f"report:   {page}\n"
        f"pictures: {out / 'samples.png'}, {out / 'curriculum.png'}"
    )
    return {"model": name, "images": options["images"], "top1": rows, "out": str(out), "report": str(page)}, text


def _quantize_all(
    name: str,
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    loaded: list[tuple[torch.Tensor, torch.Tensor]],
    sources: dict[str, str | torch.Tensor],
    config: SynthesisConfig,
    out: Path,
    energy: Energy,
) -> tuple[dict[str, dict[str, Any]], dict[str, _Saved]]:
    """The rows of the table, but for the speed, and by row what was saved: the data-free models by our defaults."""
    placements = find_adapter(model).placements
    kinds = {kind: row for kind, row in _ROWS.items() if row[1].get("placement", "gemm") in placements}
    rows: dict[str, dict[str, Any]] = {}
    saved: dict[str, _Saved] = {}
    total = len(loaded) * (1 + len(kinds) * len(sources))
    with tqdm(total=total, desc=f"quantize and evaluate {name}", unit="batch", dynamic_ncols=True) as bar:

        def top1(candidate: torch.nn.Module) -> float:
            return evaluate(candidate, loaded, None, lambda _: bar.update()).top1

        base = top1(model)
        for kind, (bits, settings) in kinds.items():
            rows[kind] = {"float": base, "MB": None, SPEED: ""}
            for source, images in sources.items():
                bar.set_postfix_str(f"{kind}, calibrated on {source}")
                ours = source == "data-free" and not settings
                if ours and isinstance(images, torch.Tensor):
                    images = with_companions(images, COMPANIONS, config.seed, preprocessing)
                with energy.account() as cost:
                    qmodel = quantize(
                        model,
                        bits,
                        samples=config.samples if isinstance(images, str) else len(images),
                        seed=config.seed,
                        calib=images,
                        preprocessing=preprocessing,
                        progress=False,
                        **settings,
                    )
                rows[kind][source] = top1(qmodel)
                if ours:
                    made_by = {**config.to_dict(), "companions": COMPANIONS}
                    qmodel.dfqvit_record = qmodel.dfqvit_record.made_from("synthetic", made_by)
                    saved[kind] = _Saved(qmodel, save(qmodel, out / f"w{bits}a8.safetensors"), cost)
                    rows[kind]["MB"] = saved[kind].path.stat().st_size / 1e6
    return rows, saved


def _time_all(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    rows: dict[str, dict[str, Any]],
    saved: dict[str, _Saved],
    energy: Energy,
) -> None:
    """Writes the speed of what was saved, beside the float model's, into the rows."""
    contenders = {"float32": model, **{kind: each.model for kind, each in saved.items()}}
    with tqdm(total=len(contenders) * _ROUNDS, desc="speed", unit="turn", dynamic_ncols=True) as bar:
        speeds = race(
            contenders,
            [_BATCH],
            preprocessing.input_size,
            energy,
            rounds=_ROUNDS,
            seconds=_SECONDS,
            report=bar.update,
        )
    for speed in speeds[1:]:
        rows[speed.model][SPEED] = speed.ratio(1)
