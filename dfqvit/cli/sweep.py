"""`dfqvit sweep`."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from tqdm import tqdm

from ..errors import Interrupted
from .options import emit, pick_device
from .runs import Run, Settings, markdown, read_config, refuse_failures, run_all, warnings_of


@click.command("sweep")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the results.")
@click.option("--devices", default="auto", show_default=True, help="Comma-separated; auto: all GPUs, or else the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
def command(config: Path, out: Path, devices: str, as_json: bool) -> None:
    """Quantize and evaluate every combination of the models and settings that the YAML file CONFIG names.

    One process for each device. Runs that are there are not made again, so an interrupted sweep goes on where it stopped;
    a run that failed is tried again. DIR/sweep.csv and DIR/sweep.md hold the table, DIR/MODEL-DIGEST/ each run's files.
    """
    names = devices.split(",") if devices != "auto" else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in names:
        pick_device(name)
    runs = read_config(config)
    with tqdm(total=len(runs), desc="sweep", unit="run", dynamic_ncols=True) as bar:

        def report(run: Run, result: Settings) -> None:
            bar.update()
            if "error" in result:
                tqdm.write(f"{run.name}: {result['error']}", file=bar.fp)
            for warning in warnings_of(result):
                tqdm.write(f"{run.name}: warning: {warning}", file=bar.fp)

        try:
            results = run_all(runs, out, names or ["cpu"], report)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; the same command goes on where it stopped") from error
    rows = [{"name": run.name, "model": run.model, **result} for run, result in results]
    emit(as_json, {"out": str(out), "runs": rows}, f"{markdown(results)}\ntable: {out / 'sweep.csv'}")
    refuse_failures(results)
