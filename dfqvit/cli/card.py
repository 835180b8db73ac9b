"""`dfqvit card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from ..storage import load
from ..storage.atomic import refuse_existing
from ..storage.hub import CARD, push, write_card
from .options import emit


@click.command("card")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of model and card."
)
@click.option("--evaluation", type=click.Path(path_type=Path), help="What `dfqvit evaluate FILE --json` printed.")
@click.option("--push", "repo", help="Upload the folder to this repository of the Hugging Face Hub, OWNER/NAME.")
@click.option("--private", is_flag=True, help="Of a repository that --push makes.")
@click.option("--force", is_flag=True, help="Replace an existing card.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
def command(
    file: Path, out: Path, evaluation: Path | None, repo: str | None, private: bool, force: bool, as_json: bool
) -> None:
    """Make a folder for the Hugging Face Hub of a saved FILE: the model and its card. Only --push uploads anything."""
    refuse_existing(out / CARD, force)
    found = None if evaluation is None else _read(evaluation)
    card = write_card(load(file, runtime="simulated"), file, out, found)
    address = None if repo is None else push(out, repo, private)
    text = f"card: {card}" + (f"\nuploaded: {address}" if address else "")
    emit(as_json, {"card": str(card), "uploaded": address}, text)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return {key: found[key] for key in ("images", "top1", "top5")} | {
            key: found.get(key) for key in ("against_top1", "against_top5")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--evaluation was '{path}'; it must be a file that holds what `dfqvit evaluate FILE --json` printed"
        ) from error
