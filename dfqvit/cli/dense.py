"""What `dfqvit evaluate --task` and `dfqvit demo --dense` do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from ..api import quantize
from ..errors import UsageError
from ..evaluation import scenes
from ..evaluation.dense import evaluate_dense, meter, understood
from ..evaluation.dense_data import SceneImages, open_dense
from ..evaluation.energy import Energy
from ..models import Preprocessing, demo, load_model
from ..models import dense as embedded
from ..models.frame import evaluating
from ..report import Dense, Report, write_report
from ..report.dense_pictures import save_boxes, save_masks
from ..runtime.record import QuantizationRecord
from ..storage import save
from ..synthesis import SynthesisConfig
from .options import emit, open_network
from .synthesize import run_synthesis

_TASKS = {"demo-detector": ("detection", "mAP@50"), "demo-segmenter": ("segmentation", "mIoU")}
_BITS, _DRAWN = (8, 4, 3), 8
_KEPT = {8: 0.5, 4: 1.5, 3: 4.5}  # points of the figure that may be lost where a width is said to serve
_HELD_OUT, _REAL_SEED = 500, 1  # scenes to measure on; seed of those of training items
_BATCH = 50


def evaluate_network(
    network: torch.nn.Module, preprocessing: Preprocessing, options: Mapping[str, Any], device: torch.device
) -> None:
    """Measures a loaded network as `dfqvit evaluate` asks, and prints the figures."""
    record: QuantizationRecord = network.dfqvit_record  # type: ignore[assignment]
    data = open_dense(Path(options["data"]), preprocessing, options["task"], options["label_ids"])
    against = None
    if options["against"] is not None:
        against = open_network(options["against"], options["checkpoint"], device)
        check_input(options["against"], against, preprocessing, device)
    with tqdm(total=len(data), desc="evaluate", unit="image", dynamic_ncols=True) as bar:
        found = evaluate_dense(
            network,
            data.batches(options["batch_size"], options["workers"] or 0),
            options["task"],
            against,
            bar.update,
            data.categories,
        )
    rows = [[record.recipe.label, *found.figures.values()]]
    rows += [["float", *found.against.values()]] if found.against is not None else []
    text = tabulate(rows, headers=["model", *(f"{name} %" for name in found.figures)], floatfmt=".2f")
    text += f"\n{found.images} images, {found.images_per_second:.1f} images/s by the network alone"
    emit(options["as_json"], {"file": str(options["file"]), "task": options["task"], **found.to_dict()}, text)


@torch.no_grad()
def check_input(name: str, against: torch.nn.Module, preprocessing: Preprocessing, device: torch.device) -> None:
    """UsageError where the model of --against is made for other images than FILE's and cannot run on those."""
    given = preprocessing.input_size
    try:
        with evaluating(against):
            against(torch.zeros(1, *given, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        own = Preprocessing.of(against).input_size
        if own == given:
            raise
        theirs, ours = (" x ".join(map(str, size)) for size in (own, given))
        raise UsageError(
            f"--against was '{name}', which takes images {theirs}; FILE takes {ours}, and both get the same"
        ) from error


def demo_dense(options: Mapping[str, Any], device: torch.device) -> None:
    """Quantizes both embedded dense models by three sources of images and prints what is left of their figures."""
    out: Path = options["out"]
    started, energy = time.perf_counter(), Energy(device)
    for task, _ in _TASKS.values():
        meter(task)  # the packages are there, before any work
    held = scenes.compose(min(options["images"], _HELD_OUT))
    config = SynthesisConfig(samples=options["samples"], iters=options["iters"], seed=options["seed"])
    rows: list[list[Any]] = []
    pictures: dict[str, Path] = {}
    with energy.account() as cost:
        for name in embedded.BUILDERS:
            rows += _measured(name, held, config, out, device, pictures)
    headers = ["", "float", "data-free", "noise", "real images", "MB"]
    table = tabulate(rows, headers=headers, floatfmt=("", ".2f", ".2f", ".2f", ".2f", ".2f"))
    floats = sum(p.numel() * 4 for name in embedded.BUILDERS for p in embedded.BUILDERS[name]().parameters())
    files = [out / f"{name}-w4a8.safetensors" for name in embedded.BUILDERS]
    shown = [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in rows]
    dense = Dense(*conclude(rows), (headers, shown), pictures)
    report = Report(
        title="A detector and a segmenter",
        label="W4/A8",
        bytes=sum(path.stat().st_size for path in files),
        float_bytes=floats,
        cost=cost,
        energy_note=energy.note,
        dense=dense,
        settings={"samples": config.samples, "iters": config.iters, "seed": config.seed, "scenes": len(held)},
    )
    page = write_report(report, out / "report.html")
    text = (
        f"{table}\n\n{dense.verdict} {' '.join(dense.conclusions)}\n"
        f"{len(held)} held-out scenes of Fashion-MNIST items; {config.samples} synthetic images, {config.iters} steps; "
        f"{time.perf_counter() - started:.0f} s in all\nreport:   {page}\n"
        f"pictures: {', '.join(str(path) for path in pictures.values())}"
    )
    names = ("float", "data-free", "noise", "real images", "MB")
    figures = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
    emit(options["as_json"], {"scenes": len(held), "figures": figures, "out": str(out), "report": str(page)}, text)


def conclude(rows: Sequence[Sequence[Any]]) -> tuple[bool, str, list[str]]:
    """Whether data-free quantization serves at W8 and W4, the verdict in a sentence, and what else the figures say.

    `rows`: [what, float, data-free, noise, real images, MB], for each model one of each width, the widest first.
    """
    lost = {bits: [row[1] - row[2] for row in rows[place :: len(_BITS)]] for place, bits in enumerate(_BITS)}
    serving = [bits for bits in _BITS if max(lost[bits]) <= _KEPT[bits]]
    worst = {bits: max(0.0, *lost[bits]) for bits in _BITS}
    widths = [f"W{bits}/A8" for bits in serving]
    said = " and ".join([", ".join(widths[:-1]), widths[-1]] if len(widths) > 1 else widths)
    verdict = (
        f"Without data, both models keep their figures at {said}."
        if serving
        else "Without data, no width keeps the figures."
    )
    conclusions = [
        f"At W{bits}/A8 the worse of the two loses {worst[bits]:.1f} points; up to {_KEPT[bits]} are allowed."
        for bits in _BITS
    ]
    for place, source in ((3, "noise"), (4, "real images")):
        changes = [row[place] - row[2] for row in rows]
        conclusions.append(
            f"With {source} instead of synthetic images the figures change by {min(changes):+.1f} to {max(changes):+.1f} points."
        )
    return {8, 4} <= set(serving), verdict, conclusions


def _measured(
    name: str,
    held: scenes.Scenes,
    config: SynthesisConfig,
    out: Path,
    device: torch.device,
    pictures: dict[str, Path],
) -> list[list[Any]]:
    """The rows of one model; what was drawn is added to `pictures`."""
    task, figure = _TASKS[name]
    network = load_model(name, device=device)
    preprocessing = Preprocessing.of(network)
    data = SceneImages(held, preprocessing, task)
    items = scenes.items_of(demo.TRAIN_SAMPLE)
    real = preprocessing.normalise(scenes.compose(config.samples, _REAL_SEED, items).images)
    synthetic = run_synthesis(network, preprocessing, config, out / name, resume=False)
    sources: dict[str, Any] = {"data-free": synthetic, "noise": "noise", "real images": real}
    rows, drawn = [], {"float": network}
    with tqdm(total=1 + len(_BITS) * len(sources), desc=name, unit="model", dynamic_ncols=True) as bar:

        def measure(candidate: torch.nn.Module) -> float:
            value = evaluate_dense(candidate, data.batches(_BATCH), task).figures[figure]
            bar.update()
            return value

        base = measure(network)
        for bits in _BITS:
            row: list[Any] = [f"{name} {figure} % W{bits}/A8", base]
            for source, images in sources.items():
                options = {"samples": config.samples, "seed": config.seed, "calib": images, "progress": False}
                qmodel = quantize(network, bits, **options)
                row.append(measure(qmodel))
                if source == "data-free":
                    qmodel.dfqvit_record = qmodel.dfqvit_record.made_from("synthetic", config.to_dict())
                    path = save(qmodel, out / f"{name}-w{bits}a8.safetensors")
                    drawn[f"W{bits}/A8"] = qmodel
            rows.append([*row, path.stat().st_size / 1e6])
    caption = f"{name}. Rows from the top: the truth, then by {', '.join(drawn)}, quantized without data."
    pictures[caption] = _draw(name, drawn, held, preprocessing, out / f"{name}.png")
    return rows


@torch.no_grad()
def _draw(
    name: str, networks: Mapping[str, torch.nn.Module], held: scenes.Scenes, preprocessing: Preprocessing, path: Path
) -> Path:
    shown = next(scenes.batches(held, _DRAWN))
    device = next(networks["float"].parameters()).device
    task, _ = _TASKS[name]
    images = preprocessing.normalise(shown.images).to(device)
    found = {key: understood(network, network(images), task) for key, network in networks.items()}
    if task == "segmentation":
        masks = {key: logits.argmax(1).cpu() for key, logits in found.items()}
        return save_masks(shown.images, {"truth": shown.masks, **masks}, path)
    truth = [{"boxes": b, "labels": k} for b, k in zip(shown.boxes, shown.labels, strict=True)]
    drawn = {key: [{n: v.cpu() for n, v in each.items()} for each in rows] for key, rows in found.items()}
    return save_boxes(shown.images, {"truth": truth, **drawn}, path)
