"""`dfqvit benchmark`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from ..api import quantize
from ..evaluation.energy import Cost, Energy
from ..evaluation.neighbours import neighbours
from ..evaluation.speed import Speed, calibration_cost, fine_tuning_cost, race
from ..models import Preprocessing, load_model
from ..quantization.recipe import Recipe
from ..runtime import RUNTIMES
from ..runtime.record import QuantizationRecord
from ..storage import load
from .options import build_option, common, emit, open_float, pick_device, refuse_given, setting, whole_numbers

STEPS = 100  # of the fine-tuning that a calibration is compared with


@click.command("benchmark")
@click.argument("model_or_file")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights of the float model; times hardly need them."
)
@build_option
@click.option("--w-bits", type=click.IntRange(2, 8), default=8, show_default=True, help="Bits of the weights of MODEL.")
@click.option("--batch", default="1,32", show_default=True, help="Batch sizes, comma-separated.")
@click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    default="auto",
    show_default=True,
    help="How the quantized model computes: in integers, or simulated in float; auto: integers where there are kernels.",
)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Turns of each model.")
@click.option(
    "--neighbours", type=click.IntRange(0), default=0, show_default=True, help="Busy processes to time beside."
)
@click.option("--energy", is_flag=True, help="Joules an image and a calibration, and those of a light fine-tuning.")
@setting("samples", click.IntRange(1), "Images of the calibration.")
@setting("iters", click.IntRange(1), "Steps of the synthesis.")
@common
def command(**options: Any) -> None:
    """Images a second and latency of a quantized model beside the float one, in turn.

    MODEL_OR_FILE is a file of `dfqvit quantize`, or a MODEL, which is then quantized on noise for the purpose (and has
    random weights without --checkpoint).
    """
    device = pick_device(options["device"])
    if not options["energy"]:
        refuse_given(["samples", "iters"], "without --energy; it is of the calibration whose joules are counted")
    sizes = whole_numbers("--batch", options["batch"], 1)
    torch.manual_seed(options["seed"])
    model, quantized, recipe = _open(options, device)
    energy = Energy(device)
    preprocessing = Preprocessing.of(model)
    turns = tqdm(total=2 * len(sizes) * options["rounds"], desc="benchmark", unit="turn", dynamic_ncols=True)
    with turns as bar, neighbours(options["neighbours"]):
        models = {"float32": model, recipe.label: quantized}
        speeds = race(models, sizes, preprocessing.input_size, energy, rounds=options["rounds"], report=bar.update)
    record = {
        "model": options["model_or_file"],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "neighbours": options["neighbours"],
        "speeds": [asdict(speed) for speed in speeds],
    }
    text = speed_table(speeds, options["energy"]) + f"\n\n{explained(options['rounds'])}"
    if options["neighbours"]:
        count = options["neighbours"]
        text += f"\n\nBeside {count} other busy process{'es' * (count > 1)}."
    if options["energy"]:
        samples, iters, w_bits = options["samples"], options["iters"], recipe.w_bits
        images = torch.randn(samples, *preprocessing.input_size, device=device)
        costs = calibration_cost(model, energy, w_bits=w_bits, samples=samples, iters=iters)
        costs["fine-tuning"] = fine_tuning_cost(model, images, energy, w_bits=w_bits, steps=STEPS)
        record |= {"costs": {key: asdict(cost) for key, cost in costs.items()}, "energy_note": energy.note}
        text += "\n\n" + cost_table(costs, samples, iters) + (f"\n{energy.note}" if energy.note else "")
    emit(options["as_json"], record, text)


def _open(options: dict[str, Any], device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, Recipe]:
    """(float model, quantized model, how it was quantized)."""
    path, checkpoint = Path(options["model_or_file"]), options["checkpoint"]
    if path.is_file() or path.is_dir() or path.suffix == ".safetensors":
        refuse_given(["w_bits"], f"and the file '{path}', whose bits are its own; it is for a MODEL")
        quantized = load(path, device, options["runtime"], build=options["build"])
        record: QuantizationRecord = quantized.dfqvit_record
        model = open_float(record, None, checkpoint, device, pretrained=False)
    else:
        refuse_given(["build"], f"and the MODEL '{path}'; it is for a file of `dfqvit quantize`")
        model = load_model(options["model_or_file"], checkpoint, pretrained=False, device=device)
        quick: dict[str, Any] = {"quantizer": "minmax", "rounding": "nearest", "acm": "none", "progress": False}
        quantized = quantize(model, options["w_bits"], calib="noise", samples=4, runtime=options["runtime"], **quick)
        record = quantized.dfqvit_record
    return model, quantized, record.recipe


def explained(rounds: int) -> str:
    """The last column of `speed_table` in words."""
    return (
        f"x float32: how many times as fast as the float model beside it. Both had {rounds} turns, one after the other: the "
        "median\nof the turns' ratios, and in brackets the least and the greatest. If these are far apart, the machine was busy."
    )


def speed_table(speeds: list[Speed], energy: bool) -> str:
    """For people."""
    headers = ["batch", "model", "images/s", "p50 ms", "p90 ms", "p99 ms", "x float32"]
    rows: list[list[Any]] = [
        [s.batch, s.model, s.images_per_second, s.p50_ms, s.p90_ms, s.p99_ms, s.ratio()] for s in speeds
    ]
    if energy and any(s.joules_per_image is not None for s in speeds):
        headers.append("J/image")
        for row, s in zip(rows, speeds, strict=True):
            row.append(s.joules_per_image)
    return tabulate(rows, headers=headers, floatfmt=".4g")


def cost_table(costs: dict[str, Cost], samples: int, iters: int) -> str:
    """For people: seconds and joules."""
    names = {
        "synthesis": f"synthesis, {samples} images, {iters} steps",
        "calibration": f"calibration on {samples} images",
        "fine-tuning": f"fine-tuning on {samples} images, {STEPS} steps",
    }
    rows = [[names[key], cost.seconds, cost.total] for key, cost in costs.items()]
    headers = ["cost of", "seconds", "joules"]
    if all(cost.total is None for cost in costs.values()):
        rows, headers = [row[:2] for row in rows], headers[:2]
    return tabulate(rows, headers=headers, floatfmt=".4g")
