"""`dfqvit info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from ..errors import UsageError
from ..kernels.tuning import table as measured_choices
from ..models.adapters import flattened
from ..models.arithmetic import OTHER, multiply_adds
from ..quantization.attention import AttentionOperands
from ..quantization.recipe import Recipe
from ..runtime.record import QuantizationRecord, counted, widths_of
from ..storage import environment, load, sizes
from .options import build_option, common, emit, pick_device

_VALUE_WIDTH = 90  # characters; longer values go on below


@click.command("info")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@build_option
@click.option("--tuning", is_flag=True, help="Only the choices of backends that were measured on this machine.")
@common
def command(file: Path | None, build: str | None, tuning: bool, device: str, seed: int, as_json: bool) -> None:
    """Without FILE: versions, devices, CPU and backends. With FILE: check a saved model completely and describe it."""
    if build is not None and file is None:
        raise UsageError("--build was given without a FILE; it makes the network of one")
    if tuning:
        if file is not None:
            raise UsageError("--tuning was given with a FILE; it may be given alone")
        table = measured_choices()
        emit(as_json, table, environment.describe_tuning(table))
    elif file is None:
        record = environment.collect()
        emit(as_json, record, environment.describe(record))
    else:
        described = describe_file(file, pick_device(device), seed, build)
        emit(as_json, described, _as_text(described))


def describe_file(path: Path, device: torch.device, seed: int, build: str | None = None) -> dict[str, Any]:
    """Loads the file (checksum, structure, shapes), runs one image through it, and says what is in it."""
    model = load(path, device, build=build)
    record: QuantizationRecord = model.dfqvit_record
    image = torch.randn(1, *record.preprocessing.input_size, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        finite = all(bool(torch.isfinite(each).all()) for each in flattened(model(image)))
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "bytes_by_kind": sizes(path),
        "finite_logits": finite,
        "float": _float_parts(model, record),
        "weight_bits": widths_of(model),
        **record.to_dict(),
    }


def _float_parts(model: torch.nn.Module, record: QuantizationRecord) -> dict[str, float]:
    """{what computes in float: its share of the multiply-adds}, greatest first; layers by name."""
    shares = multiply_adds(record.spec)
    quantized = {*widths_of(model)}
    if any(isinstance(module, AttentionOperands) for module in model.modules()):
        quantized.add(OTHER)
    found = {name: round(share, 5) for name, share in shares.items() if name not in quantized and share >= 5e-6}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _float_text(parts: dict[str, float]) -> str:
    if not parts:
        return "nothing of the multiply-adds"
    first = ", ".join(f"{name} {100 * share:.2g} %" for name, share in list(parts.items())[:3])
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return f"{100 * sum(parts.values()):.2g} % of the multiply-adds: {first}{more}"


def _as_text(described: dict[str, Any]) -> str:
    spec, preprocessing, recipe = described["spec"], described["preprocessing"], Recipe(**described["recipe"])
    kinds = ", ".join(f"{kind} {size / 1e6:.3f}" for kind, size in described["bytes_by_kind"].items() if size)
    corrected = f"{described['acm']}, blocks {_list(described['acm_blocks'])}" if described["acm_blocks"] else "none"
    rows = [
        ("model", f"{spec.get('architecture', spec.get('build_by'))} {_settings(spec.get('kwargs', {}))}".strip()),
        ("bits", _bits(recipe, described["weight_bits"])),
        ("size", f"{described['bytes'] / 1e6:.3f} MB: {kinds}"),
        ("calibrated on", f"{described['samples']} images: {_source(described['calibration'])}"),
        ("settings", _settings(described["settings"])),
        (
            "rounding",
            f"{recipe.rounding}; scales {recipe.quantizer}, levels {recipe.levels}, placement {recipe.placement}, "
            f"scaling {recipe.scaling}",
        ),
        ("correction", corrected),
        ("stays float", _float_text(described["float"])),
        ("input", f"{' x '.join(map(str, preprocessing['input_size']))} (channels, height, width)"),
        ("mean", _list(preprocessing["mean"])),
        ("std", _list(preprocessing["std"])),
        (
            "resize",
            f"{preprocessing['interpolation']}, crop {preprocessing['crop_pct']:g} ({preprocessing['crop_mode']})",
        ),
    ]
    finite = "finite" if described["finite_logits"] else "NOT finite"
    table = tabulate(
        [row for row in rows if row[1]], tablefmt="plain", disable_numparse=True, maxcolwidths=[None, _VALUE_WIDTH]
    )
    return f"{described['file']}: whole, checksum holds, logits {finite}\n\n{table}"


def _source(calibration: str) -> str:
    """Where the images came from, in words."""
    return {
        "synthetic": "synthetic, made from the model alone",
        "procedural": "procedural (dead leaves), which no model made",
        "noise": "noise",
        "images": "given ones",
    }.get(calibration, calibration)


def _list(values: Any) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {_list(value) if isinstance(value, (list, tuple)) else value}"
        for key, value in values.items()
        if value != ""
    )


def _bits(recipe: Recipe, widths: dict[str, int]) -> str:
    if recipe.layer_bits is None:
        return f"{recipe.label}: weights {recipe.w_bits}, first and last layer {recipe.edge_bits}, activations {recipe.a_bits}"
    return f"{recipe.label} ({counted(widths)})"
