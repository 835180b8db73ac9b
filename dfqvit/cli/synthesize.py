"""`dfqvit synthesize`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import click
import torch

from ..distributed import rank
from ..models import Preprocessing
from ..progress import showing
from ..report.pictures import save_curriculum, save_grid
from ..storage.atomic import refuse_existing
from ..synthesis import Synthesis, SynthesisConfig
from ..synthesis.writing import write_tensors
from .options import common, emit, model_options, open_model, synthesis_config, synthesis_options

SAMPLES = "samples.safetensors"
SNAPSHOT = "synthesis.snapshot.safetensors"


@click.command("synthesize")
@model_options
@synthesis_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--force", is_flag=True, help="Replace existing results.")
@common
def command(**options: Any) -> None:
    """Optimise images from noise against the float MODEL.

    Writes samples.safetensors (float32 [n, C, H, W], normalised), samples.png and curriculum.png to --out.
    """
    out, as_json = options.pop("out"), options.pop("as_json")
    refuse_existing(out / SAMPLES, options.pop("force"))
    resume, config = options.pop("resume"), synthesis_config(options)
    model, preprocessing = open_model(**options)
    images = run_synthesis(model, preprocessing, config, out, resume)
    if rank() != 0:
        return
    told = {"format": "dfqvit-samples", "preprocessing": json.dumps(preprocessing.to_dict())}
    write_tensors(out / SAMPLES, {"images": images.cpu()}, told)
    record = {"samples": len(images), "iters": config.iters, "seed": config.seed, "out": str(out)}
    emit(as_json, record, f"{len(images)} images: {out / SAMPLES}, {out / 'samples.png'}, {out / 'curriculum.png'}")


def run_synthesis(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    config: SynthesisConfig,
    out: Path,
    resume: bool,
    keep: bool = False,
) -> torch.Tensor:
    """Synthesises with a progress bar and a snapshot in `out`, which goes when the run is complete; writes the pictures.

    `keep`: the last step stays as SNAPSHOT, for a command that may be interrupted afterwards and removes it itself.
    """
    out.mkdir(parents=True, exist_ok=True)
    snapshot = out / SNAPSHOT
    run = Synthesis(model, config, preprocessing, snapshot)
    if resume and not run.resume():
        warnings.warn(f"--resume found no snapshot in '{out}'; the synthesis starts at its first step", stacklevel=2)
    elif not resume and snapshot.exists():
        warnings.warn(
            f"'{out}' holds the snapshot of an interrupted synthesis; this run starts anew and replaces it, where --resume "
            "would go on from it",
            stacklevel=2,
        )
    with showing() as told:
        images = run.run(told)
    if rank() != 0:
        return images
    save_grid(images, out / "samples.png", preprocessing)
    save_curriculum(run.frames, out / "curriculum.png", preprocessing)
    if keep:
        run.save_snapshot()
    else:
        snapshot.unlink(missing_ok=True)
    return images
