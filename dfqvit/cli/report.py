"""The report that `quantize` and `demo` write, from what these commands have at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..evaluation.energy import Cost, Energy
from ..progress import showing, tracked
from ..report import Report, activation_ranges, divergence, similarity_density, write_report
from ..runtime.record import QuantizationRecord, widths_of
from ..storage import environment, sizes
from ..studies.diagnosis import diagnose
from ..synthesis import frame_steps

REPORT = "report.html"
SAMPLES, CURRICULUM = "samples.png", "curriculum.png"


def _caption(picture: str, record: QuantizationRecord) -> str:
    """What a picture shows."""
    settings = record.settings
    if picture == SAMPLES:
        if record.calibration not in ("synthetic", "procedural"):
            return "The images of the calibration."
        if record.calibration == "procedural":
            return (
                "The images of the calibration: dead leaves, opaque shapes that hide one another. No model made them."
            )
        if settings.get("spectrum", "natural") == "natural":
            return (
                "The images of the calibration, finished: the shapes are those that the synthesis found; spectrum, contrast and "
                "colours are drawn as those of photographs are."
            )
        return "The images of the calibration, as they were optimised (--spectrum free)."
    _, *steps = frame_steps(settings.get("iters", 0)) or [0]
    rows = ", ".join(str(step) for step in steps)
    return f"How the first images grew, before the finish. Rows from the top: noise, then after steps {rows}."


def make_report(
    out: Path,
    name: str,
    model: nn.Module,
    qmodel: nn.Module,
    images: Mapping[str, torch.Tensor],
    cost: Cost,
    energy: Energy,
    *,
    file: Path,
    seed: int,
    pictures: Sequence[str],
    accuracy: tuple[list[str], list[list[Any]]] | None = None,
) -> Path:
    """Measures what the report shows, and writes `out/report.html`.

    Args:
        out: the folder of the results.
        name: of the model, for people.
        model: the float model.
        qmodel: what was made of it.
        images: by name, for the densities; the blocks are compared on the first. [n, C, H, W] each.
        cost: of the work so far.
        energy: what counted it.
        file: the saved model.
        seed: of the run.
        pictures: names of the PNG files in `out` that this run made.
        accuracy: headers and rows of a table.
    """
    record: QuantizationRecord = qmodel.dfqvit_record  # type: ignore[assignment]
    first = next(iter(images.values()))
    noise = torch.randn(first[:16].shape, generator=torch.Generator().manual_seed(seed)).to(first.device)
    collected = environment.collect()
    cpu = collected["cpu"]
    recipe = record.to_dict()["recipe"]
    if widths_of(qmodel).keys() == (recipe["layer_bits"] or {}).keys():  # as a budget chose them: they say it all
        recipe |= {"w_bits": None, "edge_bits": None}
    settings = {"model": name, **record.spec.kwargs, **recipe, "calibration": record.calibration}
    settings |= {"samples": record.samples, "seed": seed, **record.settings}
    settings |= {"acm": record.acm, "acm_blocks": record.acm_blocks}
    with showing():
        looked_at = tracked([*images.items(), ("noise", noise)], "report")
        densities = {key: similarity_density(model, value) for key, value in looked_at}
    report = Report(
        title=f"{name}, {record.recipe.label}",
        label=record.recipe.label,
        bytes=file.stat().st_size,
        float_bytes=sum(parameter.numel() * 4 for parameter in model.parameters()),
        cost=cost,
        energy_note=energy.note,
        findings=[(finding.what, finding.advice) for finding in diagnose(qmodel)[0]],
        pictures={_caption(picture, record): out / picture for picture in pictures},
        densities=densities,
        ranges=activation_ranges(qmodel),
        divergences=divergence(model, qmodel, first),
        sizes=sizes(file),
        accuracy=accuracy,
        settings={key: value for key, value in settings.items() if value is not None},
        versions={
            "dfqvit": collected["dfqvit"],
            "Python": collected["python"],
            **collected["packages"],
            "platform": collected["platform"],
            "CPU": f"{cpu['model']}, {cpu['threads']} threads, {cpu['active_isa'] or 'no compiled path'}",
            "GPU": [gpu["name"] for gpu in collected["gpus"]],
        },
    )
    return write_report(report, out / REPORT)
