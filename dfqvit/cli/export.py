"""`dfqvit export`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from ..storage import load
from ..storage.atomic import refuse_existing
from ..storage.export import EXACT, OPSET, export_onnx
from .options import build_option, common, emit


@click.command("export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--onnx", "out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .onnx to write."
)
@build_option
@click.option("--int8", is_flag=True, help="Weights of 4 bits or fewer as int8 too, for runtimes that know no INT4.")
@click.option(
    "--opset", type=int, default=OPSET, show_default=True, help="Version of ONNX's operators, 18 to 23; INT4 needs 21."
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def command(
    file: Path,
    out: Path,
    build: str | None,
    int8: bool,
    opset: int,
    force: bool,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Write a saved FILE as ONNX with quantize/dequantize nodes, for any batch size.

    The input `images` is [batch, C, H, W] float32, normalised as `dfqvit info FILE` says; the output is `logits`.
    """
    if out.suffix != ".onnx":
        raise UsageError(f"--onnx was '{out}'; it must end in .onnx")
    refuse_existing(out, force)
    written = export_onnx(load(file, runtime="simulated", build=build), out, int4=not int8, opset=opset)
    weights = ", ".join(f"{count} {kind}" for kind, count in written["weights"].items())
    pairs = written["nodes"].get("QuantizeLinear", 0)
    text = f"{out}: {written['bytes'] / 1e6:.2f} MB, opset {written['opset']}, weights {weights}, {pairs} activations\n"
    text += f"On x86 processors without VNNI ONNX Runtime needs {EXACT}=1, or its sums of int8 products overflow"
    emit(as_json, {"file": str(file), "out": str(out), **written}, text)
