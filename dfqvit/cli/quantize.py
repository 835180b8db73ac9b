"""`dfqvit quantize`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import click
import safetensors
import torch

from ..api import quantize, settle
from ..calibration.allocation import check_budget
from ..calibration.correction import LAST_BLOCK, MODES, SHAPES, check_correction, choose_blocks
from ..calibration.given import given_images
from ..calibration.images import MADE, calibration_images, companion_count, with_companions
from ..distributed import rank
from ..errors import DfqvitError, UsageError
from ..evaluation.data import open_images, spread_images
from ..evaluation.energy import Energy
from ..models import Preprocessing
from ..models.adapters import find_adapter
from ..quantization.levels import LEVELS
from ..quantization.recipe import PLACEMENTS, ROUNDINGS, SCALINGS, Recipe
from ..report.pictures import save_grid
from ..runtime.record import QuantizationRecord
from ..storage import save
from ..storage.atomic import refuse_existing
from ..synthesis import SynthesisConfig
from .options import (
    SYNTHESIS,
    common,
    emit,
    given,
    model_options,
    open_model,
    pick_device,
    refuse_given,
    synthesis_config,
    synthesis_options,
    whole_numbers,
)
from .report import CURRICULUM, REPORT, SAMPLES, make_report
from .synthesize import SNAPSHOT, run_synthesis

FILE = "model.safetensors"
FAST_SAMPLES = 32


@click.command("quantize")
@model_options
@click.option("--w-bits", type=int, default=4, show_default=True, help="Bits of the weights, 2 to 8.")
@click.option("--a-bits", type=int, default=8, show_default=True, help="Bits of the activations, 2 to 8.")
@click.option(
    "--placement",
    type=click.Choice(PLACEMENTS),
    default="gemm",
    show_default=True,
    help="What is rounded: the operands of products, as the kernels need; or exactly what PSAQ-ViT rounds.",
)
@click.option(
    "--quantizer",
    type=click.Choice(["mse", "minmax"]),
    default="mse",
    show_default=True,
    help="How scales are found: mse searches for the least squared error, minmax takes the greatest value.",
)
@click.option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    help="How weights become integers; default second-order (with gemm and mse), else nearest.",
)
@click.option(
    "--levels",
    type=click.Choice(LEVELS),
    help="What weights of 2 to 4 bits, and what follows a GELU with up to 6, may be: evenly spaced, or closer near 0; default "
    "nonuniform (with gemm and mse).",
)
@click.option("--edge-bits", type=int, help="Bits of the first and last layer; default 8 (gemm) or as --w-bits (psaq).")
@click.option(
    "--softmax-bits", type=int, default=8, show_default=True, help="Bits of attention's probabilities, 2 to 8."
)
@click.option(
    "--scaling",
    type=click.Choice(SCALINGS),
    help="Whether ranges of channels are made alike where that is free; default channels (with gemm and mse), else none.",
)
@click.option(
    "--fast",
    is_flag=True,
    help=f"No synthesis: {FAST_SAMPLES} procedural images, as --calib procedural --samples {FAST_SAMPLES}.",
)
@click.option(
    "--size-budget",
    type=float,
    help="Megabytes of the saved model: chooses the bits of every layer by what it loses, in place of --w-bits.",
)
@click.option(
    "--calib",
    default="synthetic",
    show_default=True,
    help="Synthetic, procedural, noise, or given images: a samples.safetensors of `dfqvit synthesize`, an .npz, or a folder.",
)
@click.option(
    "--companions",
    type=click.IntRange(0),
    help="Procedural images beside the synthetic ones; default 48 with second-order rounding, else 0.",
)
@synthesis_options
@click.option(
    "--reconstruct",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps for each block to tune its rounded weights by, a fallback for few bits (300 are much); 0 is off.",
)
@click.option(
    "--acm",
    type=click.Choice(["auto", *MODES]),
    default="auto",
    show_default=True,
    help="Correction of the blocks' outputs (ACM); auto turns it on where it was measured to help.",
)
@click.option(
    "--acm-shape",
    type=click.Choice(SHAPES),
    default="element",
    show_default=True,
    help="What has a correction of its own: each element, each channel, or each token.",
)
@click.option("--acm-shrink", is_flag=True, help="Shrink corrections by their variance over the images.")
@click.option("--gamma", type=click.IntRange(1), help="Correct every gamma-th block, counted back from the last.")
@click.option("--acm-blocks", help="Correct these blocks: comma-separated, -1 is the last. The default is -1.")
@click.option("--acm-top", type=click.IntRange(1), help="Correct this many blocks, those of the greatest divergence.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@common
def command(**options: Any) -> None:
    """Quantize MODEL without data and save it as DIR/model.safetensors, with DIR/report.html and pictures of its images."""
    out, as_json, force = options.pop("out"), options.pop("as_json"), options.pop("force")
    refuse_existing(out / FILE, force)
    refuse_existing(out / REPORT, force)
    names = ("w_bits", "a_bits", "placement", "quantizer", "rounding", "levels", "edge_bits", "softmax_bits", "scaling")
    bits = {key: options.pop(key) for key in names}
    recipe, budget = Recipe(**bits), options.pop("size_budget")
    if budget is not None and given("w_bits"):
        warnings.warn(
            "--w-bits was given and --size-budget, which chooses the bits of the weights itself", stacklevel=2
        )
        bits.pop("w_bits")  # it has been said
        recipe = Recipe(**bits)
    correction = {key: options.pop(key) for key in ("acm_shape", "acm_shrink")} | _correction(options)
    steps = options.pop("reconstruct")
    if steps and recipe.placement != "gemm":
        raise UsageError(f"--reconstruct was {steps} and --placement {recipe.placement}; it is for gemm")
    companions = options.pop("companions")
    if options.pop("fast"):
        if options["calib"] not in ("synthetic", "procedural"):
            raise UsageError(f"--fast and --calib {options['calib']} were both given; give one of them")
        options["calib"] = "procedural"
        if not given("samples"):
            options["samples"] = FAST_SAMPLES
    made = "synthetic" if options["calib"].endswith(".safetensors") else options["calib"]  # by `dfqvit synthesize`
    companions = companion_count(companions, made, recipe)
    if options["calib"] != "synthetic":
        told = f"and --calib {options['calib']}; it is a setting of the synthesis, so --calib must be 'synthetic'"
        refuse_given([name for name in SYNTHESIS if name not in ("samples", "seed")], told)
        if options["resume"]:
            warnings.warn(
                f"--resume was given and --calib {options['calib']}, which no synthesis makes; it changes nothing",
                stacklevel=2,
            )
    calib, resume, config = options.pop("calib"), options.pop("resume"), synthesis_config(options)
    model, preprocessing = open_model(**options)
    _refuse_early(model, recipe, calib, config.samples, companions, steps, budget, correction)
    energy = Energy(pick_device(options["device"]))
    with energy.account() as cost:
        images, pictures = _calibration(calib, model, preprocessing, config, out, resume)
        if rank() != 0:
            return  # the long part is done; the first process calibrates, writes and prints
        if companions and calib not in MADE:
            given_images(images, preprocessing)  # looked at before others stand beside them
        images = with_companions(images, companions, config.seed, preprocessing)
        qmodel = quantize(
            model,
            samples=config.samples if calib == "noise" else len(images),
            seed=config.seed,
            calib="noise" if calib == "noise" else images,
            preprocessing=preprocessing,
            size_budget=budget,
            reconstruct=steps,
            **bits,
            **correction,
        )
    qmodel.dfqvit_record = _made_from(qmodel.dfqvit_record, calib, config, companions, steps)
    path = save(qmodel, out / FILE)
    if calib == "synthetic":
        (out / SNAPSHOT).unlink(missing_ok=True)
    source = calib if calib in MADE else "given images"
    page = make_report(
        out,
        options["model"],
        model,
        qmodel,
        {source: images},
        cost,
        energy,
        file=path,
        seed=config.seed,
        pictures=pictures,
    )
    floats = sum(parameter.numel() * 4 for parameter in model.parameters())
    record = {
        "out": str(path),
        "report": str(page),
        "bytes": path.stat().st_size,
        "float32_bytes": floats,
        "seconds": round(cost.seconds, 1),
        "joules": cost.total,
        "record": qmodel.dfqvit_record.to_dict(),
    }
    text = (
        f"{path}: {qmodel.dfqvit_record.recipe.label}, {path.stat().st_size / 1e6:.2f} MB "
        f"({path.stat().st_size / floats:.3f}x float32), {cost.seconds:.0f} s\nreport: {page}"
    )
    if pictures:
        text += f"\npictures: {', '.join(str(out / name) for name in pictures)}"
    emit(as_json, record, text)


def _refuse_early(
    model: torch.nn.Module,
    recipe: Recipe,
    calib: str,
    samples: int,
    companions: int,
    reconstruct: int,
    budget: float | None,
    correction: dict[str, Any],
) -> None:
    """UsageError for all that `quantize` would refuse, before the synthesis, which takes long."""
    if calib in MADE:
        if correction["acm"] != "auto":
            check_correction(correction["acm"], correction["acm_shape"], samples)
        asked = {"acm_blocks": LAST_BLOCK, "reconstruct": reconstruct, "size_budget": budget, **correction}
        asked.pop("gamma", None)
        settle(model, recipe, samples + companions, **asked)
    elif budget is not None:
        check_budget(model, recipe, budget)
    chosen = correction.get("gamma", 1), correction.get("acm_blocks"), correction["acm_top"]
    choose_blocks(len(find_adapter(model).blocks()), *chosen)


def _made_from(
    record: QuantizationRecord, calib: str, config: SynthesisConfig, companions: int, reconstruct: int
) -> QuantizationRecord:
    """The record of a model that was calibrated on images made here, which `quantize` takes for given ones."""
    beside = {"companions": companions} if companions else {}
    if calib in ("synthetic", "procedural"):
        made_by = config.to_dict() if calib == "synthetic" else {"seed": config.seed}
        return record.made_from(calib, made_by | beside | ({"reconstruct": reconstruct} if reconstruct else {}))
    return record.made_from(record.calibration, record.settings | beside)


def _calibration(
    calib: str,
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    config: SynthesisConfig,
    out: Path,
    resume: bool,
) -> tuple[torch.Tensor, list[str]]:
    """The images of --calib, and the names of the pictures of them that were written."""
    if calib == "synthetic":
        return run_synthesis(model, preprocessing, config, out, resume, keep=True), [SAMPLES, CURRICULUM]
    if calib in MADE:
        images, _ = calibration_images(
            model, calib, samples=config.samples, iters=0, seed=config.seed, preprocessing=preprocessing
        )
    else:
        images = _read_images(Path(calib), preprocessing, config.samples).to(next(model.parameters()).device)
    if calib == "noise":
        return images, []
    if rank() == 0:
        save_grid(images[:64], out / SAMPLES, preprocessing)
    return images, [SAMPLES]


def _correction(options: dict[str, Any]) -> dict[str, Any]:
    """The ACM settings of `quantize` from --acm, --gamma, --acm-blocks and --acm-top."""
    acm, gamma = options.pop("acm"), options.pop("gamma")
    text, top = options.pop("acm_blocks"), options.pop("acm_top")
    if acm == "none":
        refuse_given(["gamma"], "and --acm none, which corrects no block; give one of them")
    if sum(value is not None for value in (gamma, text, top)) > 1:
        raise UsageError("--gamma, --acm-blocks and --acm-top exclude each other; give one of them")
    result: dict[str, Any] = {"acm": acm, "acm_top": top}
    if gamma is not None:
        result |= {"gamma": gamma, "acm_blocks": None}
    if text is not None:
        result["acm_blocks"] = whole_numbers("--acm-blocks", text)
    return result


def _read_images(path: Path, preprocessing: Preprocessing, count: int) -> torch.Tensor:
    """`count` images of a file or folder; of a samples file all, unless --samples says how many."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safetensors.safe_open(path, "pt") as file:
                images, told = file.get_tensor("images"), (file.metadata() or {}).get("preprocessing")
            made_for = preprocessing if told is None else Preprocessing.from_dict(json.loads(told))
        except (safetensors.SafetensorError, ValueError, TypeError) as error:
            raise DfqvitError(f"--calib '{path}' is not a samples file of `dfqvit synthesize`: {error}") from error
        if (made_for.mean, made_for.std) != (preprocessing.mean, preprocessing.std):
            images = preprocessing.normalise(made_for.pixels(images))
        if not given("samples"):
            return images
        if count > len(images):
            raise UsageError(f"--samples was {count}; --calib '{path}' holds {len(images)} images")
        return images[[index * len(images) // count for index in range(count)]]
    if not path.exists():
        raise UsageError(
            f"--calib was '{path}'; it may be 'synthetic', 'procedural', 'noise', or an existing file or folder of images"
        )
    return spread_images(open_images(path, preprocessing, labelled=False), count)
