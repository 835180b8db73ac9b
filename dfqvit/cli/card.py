"""`dfqvit card`."""

from __future__ import annotations

import filecmp
import json
import math
import warnings
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError, is_whole
from ..storage import load
from ..storage.atomic import refuse_existing
from ..storage.hub import CARD, WEIGHTS, push, write_card
from .options import build_option, emit, refuse_given


@click.command("card")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of model and card."
)
@click.option("--evaluation", type=click.Path(path_type=Path), help="What `dfqvit evaluate FILE --json` printed.")
@build_option
@click.option("--push", "repo", help="Upload the folder to this repository of the Hugging Face Hub, OWNER/NAME.")
@click.option("--private", is_flag=True, help="Of a repository that --push makes.")
@click.option("--force", is_flag=True, help="Replace an existing card, and another model beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
def command(
    file: Path,
    out: Path,
    evaluation: Path | None,
    build: str | None,
    repo: str | None,
    private: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make a folder for the Hugging Face Hub of a saved FILE: the model and its card. Only --push uploads anything."""
    refuse_existing(out / CARD, force)
    if file.is_file() and (out / WEIGHTS).is_file() and not filecmp.cmp(file, out / WEIGHTS, shallow=False):
        refuse_existing(out / WEIGHTS, force)  # the same model may lie there: that of `quantize --out`
    if repo is None:
        refuse_given(["private"], "without --push, which makes the repository")
    found = None if evaluation is None else _read(evaluation, file)
    card = write_card(load(file, runtime="simulated", build=build), file, out, found)
    address = None if repo is None else push(out, repo, private)
    text = f"card: {card}" + (f"\nuploaded: {address}" if address else "")
    emit(as_json, {"card": str(card), "uploaded": address}, text)


def _read(path: Path, file: Path) -> dict[str, Any]:
    """The figures of `dfqvit evaluate FILE --json` in `path`.

    UsageError where it holds something else, or the figures of another file than `file`.
    """
    try:
        found = json.loads(path.read_bytes())  # in any of Unicode's encodings
        if "figures" in found:
            raise UsageError(
                f"--evaluation '{path}' has figures of --task {found.get('task')}; a card holds those of classification"
            )
        figures = {key: found[key] for key in ("images", "top1", "top5")}
        figures |= {key: found.get(key) for key in ("against_top1", "against_top5")}
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--evaluation was '{path}'; it must be a file that holds what `dfqvit evaluate FILE --json` printed"
        ) from error
    for key, value in figures.items():
        if key == "images":
            if not is_whole(value) or value < 1:
                raise UsageError(f"--evaluation '{path}' has images {value!r}; it must be a whole number, 1 or more")
        elif value is None and key.startswith("against"):
            continue
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_share(value):
            raise UsageError(f"--evaluation '{path}' has {key} {value!r}; it must be a number from 0 to 100")
    if (figures["against_top1"] is None) != (figures["against_top5"] is None):
        raise UsageError(f"--evaluation '{path}' has one of against_top1 and against_top5; it must have both or none")
    _compare(path, found.get("file"), file)
    return figures


def _is_share(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 100


def _compare(path: Path, measured: Any, file: Path) -> None:
    """UsageError where the file that was measured is there and is another than `file`; a warning where nobody can know."""
    if not isinstance(measured, str):
        warnings.warn(f"--evaluation '{path}' does not say which file it is of; it is taken for '{file}'", stacklevel=2)
        return
    other = Path(measured)
    if not file.is_file():
        return  # `load` says so
    if not other.is_file():
        warnings.warn(
            f"--evaluation '{path}' is of '{measured}', which is not there to compare; it is taken for '{file}'",
            stacklevel=2,
        )
    elif not filecmp.cmp(other, file, shallow=False):
        raise UsageError(f"--evaluation '{path}' is of '{measured}', which is another model than FILE '{file}'")
    elif other.resolve() == file.resolve() and file.stat().st_mtime > path.stat().st_mtime:
        warnings.warn(
            f"'{file}' is newer than --evaluation '{path}'; evaluate it again if it was replaced", stacklevel=2
        )
