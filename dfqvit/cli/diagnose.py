"""`dfqvit diagnose`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import click
import torch

from ..errors import UsageError
from ..evaluation.data import open_images, spread_images
from ..models import Preprocessing, load_model
from ..progress import showing
from ..runtime.record import QuantizationRecord
from ..storage import load
from ..storage.atomic import atomic, refuse_existing
from ..studies.charts import chart
from ..studies.diagnosis import Finding, diagnose
from ..studies.gradients import gradient_norms, late_share
from ..synthesis import Synthesis, SynthesisConfig
from .options import build_option, common, emit, open_float, pick_device, refuse_given

_IMAGES = 16
_FIFTHS = 5  # steps at least, of which the gradients of a fifth are some
_POINTS = 50  # of a curve in the picture of gradient norms


@click.command("diagnose")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@build_option
@click.option("--against", help="The float MODEL of FILE: measures every layer and correction too.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of --against or --gradients.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Images for --against; default noise with a photograph's spectrum."
)
@click.option(
    "--gradients", help="Instead of FILE: a float MODEL; norms of the images' gradients, easy to hard and fixed crops."
)
@click.option("--num-classes", type=click.IntRange(1), help="Classes of the head, with --gradients.")
@click.option("--samples", type=click.IntRange(1), default=8, show_default=True, help="Images, with --gradients.")
@click.option("--iters", type=click.IntRange(1), default=100, show_default=True, help="Steps, with --gradients.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the curves of --gradients.")
@click.option("--force", is_flag=True, help="Replace an existing result.")
@common
def command(**options: Any) -> None:
    """Look for the known failures in a saved FILE and say what to do: samples, schedule, ACM, layers.

    The file itself holds what `quantize` measured. Findings come gravest first; the exit status is 0 with or without them.
    """
    if (options["file"] is None) == (options["gradients"] is None):
        raise UsageError("FILE and --gradients: give one of them")
    if options["gradients"] is not None:
        refuse_given(["against", "data", "build"], "and --gradients; it is for a FILE")
        if options["out"] is None:
            refuse_given(["force"], "without --out, where a result could be")
        _show_gradients(**options)
        return
    refuse_given(["num_classes", "samples", "iters", "out", "force"], "without --gradients, which it is for")
    if options["against"] is None and (options["data"] or options["checkpoint"]):
        raise UsageError("--data and --checkpoint are for --against, which was not given")
    device = pick_device(options["device"])
    qmodel = load(options["file"], device, runtime="simulated", build=options["build"])
    record: QuantizationRecord = qmodel.dfqvit_record
    model, images = None, None
    if options["against"] is not None:
        model = open_float(record, options["against"], options["checkpoint"], device)
        images = _images(model, options["data"], record.preprocessing, options["seed"]).to(device)
    findings, measured = diagnose(qmodel, model, images)
    result = {
        "file": str(options["file"]),
        "findings": [finding.to_dict() for finding in findings],
        "measured": measured,
    }
    emit(options["as_json"], result, _as_text(findings, measured))


def _images(model: torch.nn.Module, data: Path | None, preprocessing: Preprocessing, seed: int) -> torch.Tensor:
    if data is not None:
        source = open_images(data, preprocessing, labelled=False)
        return spread_images(source, min(_IMAGES, len(source)))
    config = SynthesisConfig(samples=_IMAGES, iters=1, seed=seed)
    return Synthesis(model, config, preprocessing).advance.finished()  # before the first step: noise


def _as_text(findings: list[Finding], measured: dict[str, Any]) -> str:
    lines = []
    for finding in findings:
        lines += [
            f"{finding.signature}: {finding.what} (threshold {finding.threshold:g})",
            f"    to do: {finding.advice}",
        ]
    if not findings:
        lines.append("none of the known failures was found")
    if not measured:
        lines.append("the file holds no measurements; quantize again, or give --against the float model")
    for title, values in (
        ("blocks", {f"block {k}": v for k, v in enumerate(measured.get("divergence", []))}),
        ("layers", measured.get("layers", {})),
    ):
        worst = sorted(values.items(), key=lambda item: -item[1])[:5]
        if worst:
            shown = ", ".join(f"{name} {value:.2%}" for name, value in worst)
            lines.append(f"{title} furthest from float, share of their energy: {shown}")
    return "\n".join(lines)


def _show_gradients(**options: Any) -> None:
    out, iters = options["out"], options["iters"]
    if iters < _FIFTHS:
        raise UsageError(f"--iters was {iters}; its first and last fifth are compared, so it must be {_FIFTHS} or more")
    if out is not None:
        refuse_existing(out / "gradients.csv", options["force"])
    device = pick_device(options["device"])
    classes = options["num_classes"]
    model = load_model(options["gradients"], options["checkpoint"], num_classes=classes, device=device)
    config = SynthesisConfig(samples=options["samples"], iters=iters, seed=options["seed"])
    with showing() as told:
        norms = gradient_norms(model, Preprocessing.of(model), config, told)
    shares = {name: late_share(values) for name, values in norms.items()}
    holds = shares["e2h"] > shares["fixed"]
    text = "\n".join(
        [
            *(
                f"{name:6} gradients of the last fifth of {iters} steps: {share:.2f} of the first fifth's"
                for name, share in shares.items()
            ),
            f"easy to hard keeps them {'larger' if holds else 'no larger'} than fixed crops: its assumption "
            f"{'holds' if holds else 'does not hold'} here",
        ]
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["step", *norms])
        writer.writerows([step + 1, *values] for step, values in enumerate(zip(*norms.values(), strict=True)))
        places = sorted({round(step * (iters - 1) / (_POINTS - 1)) for step in range(_POINTS)})
        labels = [(str(p + 1) if k % 10 == 0 else "", float(p + 1)) for k, p in enumerate(places)]
        picture = chart(
            "norm of the images' gradient, by step",
            labels,
            {name: [(values[p],) * 3 for p in places] for name, values in norms.items()},
            linear=True,
        )
        for name, content in (("gradients.csv", table.getvalue()), ("gradients.svg", picture)):
            with atomic(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        text += f"\n{out / 'gradients.csv'}, {out / 'gradients.svg'}"
    emit(options["as_json"], {"late_share": shares, "holds": holds, "norms": norms}, text)
