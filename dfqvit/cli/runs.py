"""The runs of `dfqvit sweep`: many models and settings, one `dfqvit quantize` and one `dfqvit evaluate` for each combination.

A configuration names models and options of those two commands; an option with a list of values is an axis, and every combination
of the axes is a run, in a process of its own and a folder of its own. What a run's commands printed lies in that folder, so a run
that is there is not made again, and an interrupted one goes on where it stopped. Beside it stands what its files were (sizes and
times of change): a command whose weights, images or classes have changed since is run again.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from tabulate import tabulate

from ..errors import DfqvitError, UsageError
from ..evaluation.data import files_in
from ..models import demo as embedded
from ..models.loading import LOCAL
from ..storage.atomic import atomic
from . import evaluate as evaluate_command
from . import quantize as quantize_command
from .process import empty_argument
from .synthesize import SNAPSHOT

Settings = dict[str, Any]
COMMANDS = {"quantize": quantize_command.command, "evaluate": evaluate_command.command}
FILES = ("checkpoint", "calib", "data", "classes")  # options that may name a file or a folder
OURS = ("out", "force", "resume", "json", "device", "help")  # options that the sweep gives itself


@dataclass(frozen=True)
class Run:
    """One combination: a model, and the options of each command, by their names on the command line without dashes."""

    model: str
    quantize: Settings
    evaluate: Settings | None

    @property
    def name(self) -> str:
        """Of its folder: the same for the same run."""
        told = json.dumps([self.model, self.quantize, self.evaluate], sort_keys=True)
        return f"{Path(self.model).name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def read_config(path: Path) -> list[Run]:
    """The runs of a YAML file with `models`, `quantize` and `evaluate`; see docs/sweep.md.

    Raises:
        UsageError: the file is missing or no YAML, or a key or value of it does not fit; names it and what it may be.
    """
    try:
        text = path.read_bytes()
        _refuse_twice(yaml.compose(text, yaml.SafeLoader))
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"CONFIG was '{path}', which could not be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"CONFIG '{path}' is no YAML: {error}") from error
    _known("CONFIG", config, ("models", "quantize", "evaluate"))
    models = config.get("models")
    if not isinstance(models, list) or not models:
        raise UsageError(f"models was {models!r}; it must be a list of names, or of mappings with `model`")
    runs = {}
    for entry in models:
        own = {"model": entry} if isinstance(entry, str) else entry
        if not isinstance(own, dict) or not isinstance(own.get("model"), str):
            raise UsageError(f"models held {entry!r}; it must be a name, or a mapping with `model`")
        plain = {name: value for name, value in own.items() if name not in ("model", "evaluate")}
        given = {"quantize": _section("quantize", config.get("quantize"), plain)}
        given["evaluate"] = _section("evaluate", config.get("evaluate"), own.get("evaluate"))
        if own["model"] in embedded.ALIASES:
            given["evaluate"] = {"data": str(embedded.TEST_IMAGES)} | given["evaluate"]
        for quantize in _product(given["quantize"]):
            for evaluate in _product(given["evaluate"]):
                run = Run(own["model"], quantize, evaluate or None)
                for command in _commands(run, path.parent, "cpu"):
                    _check(*command)
                runs[run.name] = run
    return list(runs.values())


def _refuse_twice(node: Any) -> None:
    """UsageError where a mapping has a key twice, of which YAML takes the last without a word."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # an alias is the node that it names
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        names = set()
        for key, value in node.value:
            waiting.append(value)
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise UsageError(
                    f"CONFIG had '{key.value}' twice, again in line {key.start_mark.line + 1}; give it once"
                )
            names.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


def run_all(
    runs: Sequence[Run], out: Path, devices: Sequence[str], report: Callable[[Run, Settings], None]
) -> list[tuple[Run, Settings]]:
    """Makes the missing runs, one at a time on each device; (run, result) of all, in order.

    A result holds what the two commands printed, or under "error" the sentence with which one failed. DIR/sweep.csv and
    DIR/sweep.md are written anew after every run.
    """
    out.mkdir(parents=True, exist_ok=True)
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)
    results: dict[str, Settings] = {}
    running: set[subprocess.Popen[str]] = set()

    def work(run: Run) -> Settings:
        device = free.get()
        try:
            return _make(run, out / run.name, device, running)
        finally:
            free.put(device)

    pool = ThreadPoolExecutor(len(devices))
    waiting: dict[Future[Settings], Run] = {}
    try:
        for run in runs:
            waiting[pool.submit(work, run)] = run
        for future in as_completed(waiting):
            run = waiting[future]
            results[run.name] = future.result()
            write_tables([(each, results[each.name]) for each in runs if each.name in results], out)
            report(run, results[run.name])
    except KeyboardInterrupt:
        # A terminal's Ctrl-C comes to the processes too, but not to one that has just been started.
        pool.shutdown(wait=False, cancel_futures=True)
        told: set[subprocess.Popen[str]] = set()
        while not all(future.done() for future in waiting):
            for process in set(running) - told:
                process.terminate()
                told.add(process)
            time.sleep(0.05)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [(run, results[run.name]) for run in runs]


def write_tables(results: Sequence[tuple[Run, Settings]], out: Path) -> None:
    """DIR/sweep.csv, one line a run with all its settings, and DIR/sweep.md, with those in which runs differ."""
    rows, names = _rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic(out / "sweep.csv") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    with atomic(out / "sweep.md") as temporary:
        temporary.write_text(markdown(results) + "\n", encoding="utf-8")


def markdown(results: Sequence[tuple[Run, Settings]]) -> str:
    """A table of the runs: the settings in which they differ, and what was found."""
    rows, names = _rows(results)
    settings = [name for name in names if name not in FOUND and len({str(row.get(name)) for row in rows}) > 1]
    shown = ["model", *(name for name in settings if name != "model"), *(name for name in FOUND if name in names)]
    return tabulate([[row.get(name, "") for name in shown] for row in rows], headers=shown, tablefmt="github")


FOUND = ("top-1", "top-5", "float top-1", "agreement", "MB", "seconds", "warnings", "error")


def _rows(results: Sequence[tuple[Run, Settings]]) -> tuple[list[Settings], list[str]]:
    """A row for each run, and the columns that any of them has."""
    rows = [_row(run, result) for run, result in results]
    return rows, list(dict.fromkeys(name for row in rows for name in row))


def _row(run: Run, result: Settings) -> Settings:
    shared = _flags("quantize")  # such as checkpoint, which is another one in `evaluate`
    evaluate = {f"evaluate {name}" if name in shared else name: each for name, each in (run.evaluate or {}).items()}
    row = {"model": run.model, **run.quantize, **evaluate}
    if "error" in result:
        return row | {"error": result["error"]}
    made, found = result["quantize"], result.get("evaluate")
    row |= {"MB": round(made["bytes"] / 1e6, 3), "seconds": made["seconds"]}
    if found is not None:
        figures = {"top-1": "top1", "top-5": "top5", "float top-1": "against_top1", "agreement": "agreement"}
        row |= {name: round(found[key], 2) for name, key in figures.items() if found.get(key) is not None}
    told = warnings_of(result)
    return row | {"warnings": "; ".join(told)} if told else row


def warnings_of(result: Settings) -> list[str]:
    """What both commands of a run warned of."""
    parts = [result.get(command) for command in COMMANDS]
    return list(dict.fromkeys(each for part in parts if isinstance(part, dict) for each in part.get("warnings", [])))


def _make(run: Run, folder: Path, device: str, running: set[subprocess.Popen[str]]) -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    result: Settings = {}
    for command, arguments in _commands(run, folder, device):
        kept, beside = folder / f"{command}.json", folder / f"{command}.files.json"
        files = _files(run, command, folder)
        with contextlib.suppress(OSError, ValueError):
            there = command != "quantize" or (folder / quantize_command.FILE).is_file()
            if there and json.loads(beside.read_bytes()) == files:
                result[command] = json.loads(kept.read_bytes())
                continue
        kept.unlink(missing_ok=True)  # of other files
        line = [sys.executable, "-m", "dfqvit", command, *arguments, "--json"]
        done = _finished(line, running)
        if done.returncode != 0:
            lines = _said(done.stderr, "dfqvit: ")
            return {"error": lines[-1] if lines else f"`dfqvit {command}` ended with status {done.returncode}"}
        told = _said(done.stderr, "dfqvit: warning: ")
        result[command] = json.loads(done.stdout) | ({"warnings": told} if told else {})
        for path, found in ((beside, files), (kept, result[command])):
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
    return result


def _said(stderr: str, mark: str) -> list[str]:
    """The sentences after `mark`, which may stand behind a progress bar."""
    return [line.split(mark, 1)[1] for line in stderr.splitlines() if mark in line]


def _finished(line: Sequence[str], running: set[subprocess.Popen[str]]) -> subprocess.CompletedProcess[str]:
    """What a process ended with; it is among `running` as long as it runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", errors="replace") as process:
        running.add(process)
        out, err = process.communicate()
    running.discard(process)
    return subprocess.CompletedProcess(line, process.returncode, out, err)


def _files(run: Run, command: str, folder: Path) -> dict[str, list[int]]:
    """{path: [files in it, bytes, last change]} of all files that a command of a run reads, as they are now."""
    settings = run.quantize if command == "quantize" else run.evaluate or {}
    models = [run.model, str(settings.get("against", ""))]
    named = [str(settings[name]) for name in FILES if name in settings]
    named += [name.removeprefix(LOCAL) for name in models if name.startswith(LOCAL)]
    if command == "evaluate":
        named.append(str(folder / quantize_command.FILE))
    found = {}
    for name in named:
        path = Path(name)
        parts = files_in(path) if path.is_dir() else [path]
        with contextlib.suppress(OSError):  # it is no file, or is not there: the command says so
            states = [part.stat() for part in parts]
            newest = max((state.st_mtime_ns for state in states), default=0)
            found[name] = [len(states), sum(state.st_size for state in states), newest]
    return found


def _commands(run: Run, folder: Path, device: str) -> Iterator[tuple[str, list[str]]]:
    file = folder / quantize_command.FILE
    own = ["--device", device, "--out", str(folder), "--force"]
    own += ["--resume"] if (folder / SNAPSHOT).exists() else []
    yield "quantize", [run.model, *_arguments("quantize", run.quantize), *own]
    if run.evaluate is not None:
        yield "evaluate", [str(file), *_arguments("evaluate", run.evaluate), "--device", device]


def _arguments(command: str, settings: Settings) -> list[str]:
    result = []
    for name, value in settings.items():
        if _flags(command)[name]:
            result += [f"--{name}"] if value else []
        else:
            result += [f"--{name}", str(value)]
    return result


def _check(command: str, arguments: list[str]) -> None:
    """UsageError unless the command takes the arguments, in its own words."""
    if wrong := empty_argument(arguments):
        raise UsageError(f"{command} in CONFIG: {wrong}")
    try:
        COMMANDS[command].make_context(command, list(arguments))
    except click.ClickException as error:
        raise UsageError(f"{command} in CONFIG: {error.format_message()}") from error


def _flags(command: str) -> dict[str, bool]:
    """{option: whether it is a flag} of what a configuration may set."""
    options = [each for each in COMMANDS[command].params if isinstance(each, click.Option)]
    names = {each.opts[0].lstrip("-"): each.is_flag for each in options}
    return {name: flag for name, flag in names.items() if name not in OURS}


def _section(command: str, *given: Any) -> Settings:
    """The options of one command: those of the whole file, then a model's own."""
    result: Settings = {}
    for settings in given:
        if settings is not None:
            result |= _options(command, settings)
    return result


def _options(command: str, settings: Any) -> Settings:
    flags = _flags(command)
    _known(command, settings, flags)
    for name, value in settings.items():
        for each in value if isinstance(value, list) else [value]:
            if flags[name] != isinstance(each, bool) or not isinstance(each, (bool, int, float, str)):
                wanted = "true or false" if flags[name] else "a number, a text, or a list of those"
                raise UsageError(f"{command}.{name} was {value!r}; it may be {wanted}")
    return dict(settings)


def _known(where: str, settings: Any, names: Mapping[str, Any] | Sequence[str]) -> None:
    if not isinstance(settings, dict):
        raise UsageError(f"{where} was {settings!r}; it must be a mapping of {', '.join(names)}")
    for name in settings:
        if name not in names:
            raise UsageError(f"{where} had {name!r}; it may have {', '.join(names)}")


def _product(settings: Settings) -> Iterator[Settings]:
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    if not all(values):
        raise UsageError("CONFIG had an empty list; an option needs one value at least")
    for chosen in itertools.product(*values):
        yield dict(zip(settings, chosen, strict=True))


def refuse_failures(results: Sequence[tuple[Run, Settings]]) -> None:
    """DfqvitError when a run failed."""
    failed = sum("error" in result for _, result in results)
    if failed:
        raise DfqvitError(
            f"{failed} of {len(results)} runs failed; the table says why, the same command tries them again"
        )
