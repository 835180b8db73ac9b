"""Options and helpers that the commands share, so that they mean the same everywhere."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from ..distributed import local_rank, world
from ..errors import UsageError
from ..models import Preprocessing, demo, load_model
from ..models.checkpoint import load_state
from ..models.device import expect_device
from ..models.loading import check_finite
from ..models.network import NetworkSpec, built
from ..runtime.record import QuantizationRecord
from ..synthesis import SynthesisConfig
from ..synthesis.config import PRECISIONS
from ..synthesis.curriculum import SCHEDULES
from ..synthesis.spectrum import SPECTRA

SYNTHESIS = ("samples", "iters", "seed", "schedule", "spectrum", "crop_lower", "crop_upper", "batch_size", "precision")

Command = TypeVar("Command", bound=Callable[..., Any])


def common(command: Command) -> Command:
    """--device, --seed, --json."""
    command = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")(command)
    command = click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="Of all random numbers; the same seed gives the same result.",
    )(command)
    return click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda or cuda:N.")(
        command
    )


def model_options(command: Command) -> Command:
    """MODEL and what describes it."""
    for option in (
        click.option("--std", help="Comma-separated, a value a channel; default the model's own."),
        click.option("--mean", help="Comma-separated, a value a channel; default the model's own."),
        click.option("--img-size", type=click.IntRange(1), help="Side of the square input, pixels."),
        click.option("--in-chans", type=click.IntRange(1), help="Channels of the images."),
        click.option("--num-classes", type=click.IntRange(0), help="Classes of the head; 0 is a model without one."),
        click.option(
            "--model-kwargs",
            multiple=True,
            metavar="KEY=VALUE",
            help="Further keyword of timm.create_model, such as qk_norm=True; repeatable.",
        ),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights, as timm takes them."),
        click.argument("model"),
    ):
        command = option(command)
    return command


def synthesis_options(command: Command) -> Command:
    """The settings of the synthesis."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on from the snapshot that an interrupted run left in --out."),
        setting("crop_upper", float, "Greatest area of a crop, 1 is the whole."),
        setting("crop_lower", float, "Least area of a crop, 1 is the whole."),
        setting(
            "precision",
            click.Choice(PRECISIONS),
            "Of the model while it makes images; auto: bfloat16 on a CPU with instructions for it.",
        ),
        setting(
            "spectrum",
            click.Choice(SPECTRA),
            "Of the finished images: that of photographs, or as they were optimised.",
        ),
        setting(
            "schedule",
            click.Choice(SCHEDULES),
            "How the crops change: e2h (easy to hard) shrinks them, fixed is PSAQ-ViT's.",
        ),
        setting("batch_size", click.IntRange(1), "Images in one forward pass."),
        setting("iters", click.IntRange(1), "Steps of the synthesis."),
        setting("samples", click.IntRange(1), "Images to make."),
    ):
        command = option(command)
    return command


def setting(name: str, kind: Any, told: str) -> Callable[[Command], Command]:
    """The option for a field of `SynthesisConfig`, with its default."""
    option, default = f"--{name.replace('_', '-')}", getattr(SynthesisConfig, name)
    return click.option(option, type=kind, default=default, show_default=True, help=told)


def synthesis_config(options: dict[str, Any]) -> SynthesisConfig:
    """Takes what belongs to the synthesis out of `options`."""
    if options["schedule"] == "fixed":
        refuse_given(["crop_lower"], "and --schedule fixed, whose crops all are of the area --crop-upper; give that")
    return SynthesisConfig(**{key: options.pop(key) for key in SYNTHESIS})


def given(name: str) -> bool:
    """Whether an option of the running command was named on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)


def refuse_given(names: Sequence[str], reason: str) -> None:
    """UsageError for the first of the options that was named on the command line, where it would change nothing.

    `reason` goes on after "--name was given".
    """
    for name in names:
        if given(name):
            raise UsageError(f"--{name.replace('_', '-')} was given {reason}")


def build_option(command: Command) -> Command:
    """--build, of the commands that load a saved file."""
    return click.option(
        "--build", help="A module:function that makes FILE's network, where it is not timm's; its code runs."
    )(command)


def pick_device(name: str) -> torch.device:
    """The device, this process's own of several; UsageError when torch does not have it."""
    device = expect_device("--device", f"cuda:{local_rank()}" if name == "cuda" and world() > 1 else name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device was '{name}'; it may be cpu, cuda or cuda:N")
    return device


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """A comma-separated list of numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{name} was '{text}'; it must be numbers, separated by commas") from error


def whole_numbers(name: str, text: str, least: int | None = None, most: int | None = None) -> list[int]:
    """A comma-separated list of whole numbers, from `least` and to `most` where these are given."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or (least is not None and min(found) < least) or (most is not None and max(found) > most):
        bounds = ("" if least is None else f" from {least}") + ("" if most is None else f" to {most}")
        raise UsageError(f"{name} was '{text}'; it must be whole numbers{bounds}, separated by commas")
    return found


def adjusted(
    preprocessing: Preprocessing, mean: str | None, std: str | None, interpolation: str | None = None
) -> Preprocessing:
    """`preprocessing` with what the command line replaces."""
    return Preprocessing(
        input_size=preprocessing.input_size,
        mean=numbers("--mean", mean) or preprocessing.mean,
        std=numbers("--std", std) or preprocessing.std,
        interpolation=interpolation or preprocessing.interpolation,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )


def open_model(device: str, **options: Any) -> tuple[torch.nn.Module, Preprocessing]:
    """The float model and its preprocessing, from the values of `model_options`."""
    place = pick_device(device)
    mean, std = options.pop("mean"), options.pop("std")
    options["model_kwargs"] = _keywords(options.pop("model_kwargs"))
    model = load_model(options.pop("model"), options.pop("checkpoint"), device=place, **options)
    return model, adjusted(Preprocessing.of(model), mean, std)


def open_float(
    record: QuantizationRecord, name: str | None, checkpoint: Path | None, device: torch.device, pretrained: bool = True
) -> torch.nn.Module:
    """The float model that a quantized one can be compared with: the same structure where it is the same architecture.

    Another one is of its channels and input size, and of its classes where the record says them. A network of the user's own is
    what "module:function" makes, or the file's own structure where `name` is None.
    """
    if isinstance(record.spec, NetworkSpec):
        if name is None:
            return _weighted(record.spec.build(), record.spec.architecture, checkpoint).to(device)
        return open_network(name, checkpoint, device)
    kwargs = record.spec.keywords()
    if name is not None and plain_name(name) != plain_name(record.spec.architecture):
        kwargs = {key: kwargs[key] for key in ("num_classes", "in_chans", "img_size") if key in kwargs}
    return load_model(
        name or record.spec.architecture, checkpoint, model_kwargs=kwargs, pretrained=pretrained, device=device
    )


def open_network(name: str, checkpoint: Path | None, device: torch.device) -> torch.nn.Module:
    """The float network: an embedded one, or what "module:function" makes, with the weights of --checkpoint."""
    if ":" not in name:
        return load_model(name, checkpoint, device=device)
    network = built(name).eval()
    if checkpoint is None:
        raise UsageError(f"--against was '{name}'; --checkpoint must hold its weights, a state_dict as .safetensors")
    return _weighted(network, name, checkpoint).to(device)


def _weighted(network: torch.nn.Module, name: str, checkpoint: Path | None) -> torch.nn.Module:
    """The network with the weights of a state_dict, where there is one."""
    if checkpoint is None:
        return network
    load_state(network, checkpoint, name)
    check_finite(network)
    return network


def plain_name(name: str) -> str:
    """A model's name without its home, and without the tag of its weights."""
    name = name.removeprefix("hf-hub:").removeprefix("timm/")
    return demo.ALIASES.get(name, name).split(".")[0]


def _keywords(parts: Sequence[str]) -> dict[str, Any]:
    """--model-kwargs: numbers, lists, True, False and None as Python writes them, everything else as text."""
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-kwargs was '{part}'; it must be KEY=VALUE")
        if key in found:
            raise UsageError(f"--model-kwargs was given twice for '{key}'; give one of them")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    """Prints the result, as JSON or for people. JSON has no NaN or Inf: a figure that is undefined is null there."""
    click.echo(json.dumps(_defined(record), sort_keys=True, allow_nan=False) if as_json else text)


def _defined(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _defined(each) for key, each in value.items()}
    return [_defined(each) for each in value] if isinstance(value, (list, tuple)) else value
