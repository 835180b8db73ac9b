"""From a MODEL name and a checkpoint to a float timm model."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..errors import DfqvitError, UsageError, first_line
from . import demo, dense
from .adapters import find_adapter
from .device import expect_device
from .spec import ModelSpec, class_count, plain
from .weights import build, load_weights

FAMILIES = (
    "vit",
    "deit",
    "swin",
    "dfqvit_demo",
)  # of which names are suggested; any timm model with an adapter is taken
_KINDS = "it may be a timm name of the ViT, DeiT or Swin families, or of another of linear layers"
_MOST_CONVOLUTIONS = 0.25  # of the weights, in a network without attention
_HUB = ("hf-hub:", "hf_hub:")
LOCAL = "local-dir:"
_ELSEWHERE = (*_HUB, LOCAL)
_NO_STRUCTURE = {  # keywords of timm.create_model that a file has no use for
    "checkpoint_path": "give it as checkpoint (--checkpoint)",
    "device": "give it as device (--device)",
    "dtype": "a float model is read in float32",
    "pretrained": "weights are timm's own where no checkpoint is given",
}


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The float model `name` in eval mode, its weights checked.

    Args:
        name: a timm name of the ViT, DeiT or Swin families, also as `timm/NAME`; `hf-hub:OWNER/NAME` or `local-dir:FOLDER`, as
            `timm.create_model` takes them; "demo", "demo-swin", "demo-deit3" or "demo-convnext"; or "demo-detector" /
            "demo-segmenter", which are networks.
        checkpoint: what timm loads: a state_dict in a .safetensors or .pth file, a training script's checkpoint (averaged
            weights before raw ones), the family's original layout; without it, timm's pretrained weights (or the demo's own).
            Position embeddings are resized to `img_size`, an RGB stem is adapted to `in_chans`, as timm does.
        num_classes: classes of the head, 0 for none; default the architecture's.
        in_chans: channels of the images; default the architecture's.
        img_size: side of the square input, or (height, width), pixels; default the architecture's.
        model_kwargs: further keywords of `timm.create_model`.
        pretrained: False leaves the weights random where there is no checkpoint (and the model is no demo).
        device: where the model goes.

    Raises:
        UsageError: unknown or unsupported name, a checkpoint that does not fit, or a device that torch does not have.
        DfqvitError: an unreadable checkpoint, NaN or Inf in weights, pretrained weights that cannot be had.
    """
    device = expect_device("device", device)
    if name in dense.BUILDERS:
        return _dense(
            name, checkpoint, {**(model_kwargs or {}), "num_classes": num_classes, "img_size": img_size}, device
        )
    architecture = _architecture(name)
    named, further = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}, model_kwargs or {}
    for key in sorted(further.keys() & _NO_STRUCTURE.keys()):
        raise UsageError(f"model_kwargs held {key!r}, which is no part of a model's structure; {_NO_STRUCTURE[key]}")
    for key, value in named.items():
        if value is not None and further.get(key, value) != value:
            raise UsageError(f"{key} was {value!r}, and {further[key]!r} in model_kwargs; give one of them")
    options = {**named, **further}
    kwargs = {key: value for key, value in options.items() if value is not None}
    spec = ModelSpec(architecture, plain(kwargs))
    if checkpoint is None:
        checkpoint = demo.WEIGHTS.get(architecture)
    config: Any = None
    if architecture.startswith(_ELSEWHERE):
        model = _from_elsewhere(name, architecture, kwargs, pretrained and checkpoint is None)
        found, config = ModelSpec.of(model), model.pretrained_cfg
        spec = found if checkpoint is None else ModelSpec(found.architecture, found.kwargs)
    if not architecture.startswith(_ELSEWHERE):
        _check_supported(name, spec)
    if checkpoint is not None:
        try:
            model, filter_fn = build(spec.architecture, spec.keywords())
        except Exception as error:  # as below
            raise DfqvitError(f"MODEL '{name}': timm could not build it ({first_line(error)})") from error
        load_weights(model, Path(checkpoint), name, filter_fn, kwargs)
        if config is not None:  # how that source prepares images
            model.pretrained_cfg = model.default_cfg = config
    elif not architecture.startswith(_ELSEWHERE):
        try:
            model = timm.create_model(architecture, pretrained=pretrained, **spec.keywords())
        except Exception as error:  # timm raises many kinds here: network, hub
            raise DfqvitError(
                f"MODEL '{name}': timm's pretrained weights could not be had ({first_line(error)}); give --checkpoint FILE"
            ) from error
    if checkpoint is None and pretrained:
        _tell_random_head(name, model)
    check_finite(model)
    model.dfqvit_spec = spec  # type: ignore[assignment]
    return model.eval().to(device)


def _tell_random_head(name: str, model: nn.Module) -> None:
    """Warns where timm's pretrained weights have no classifier of as many classes: it makes a new one then."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    trained, classes = config.get("num_classes"), class_count(model)
    if classes and trained is not None and trained != classes:
        warnings.warn(
            f"MODEL '{name}' has pretrained weights of {trained} classes, so the classifier of {classes} that was asked for is "
            "random; give --checkpoint FILE, weights that were trained on them",
            stacklevel=3,
        )


def _dense(
    name: str, checkpoint: str | Path | None, options: Mapping[str, Any], device: torch.device | str
) -> nn.Module:
    given = [key for key, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]} was given; MODEL '{name}' is one embedded network, which has no such option")
    model = dense.load_dense(name, None if checkpoint is None else Path(checkpoint))
    check_finite(model)
    return model.to(device)


def check_finite(model: nn.Module) -> None:
    """DfqvitError that names the first tensor of the model that holds NaN or Inf."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DfqvitError(f"weights: '{key}' holds NaN or Inf")


def _architecture(name: str) -> str:
    """timm's name for MODEL, or one of a source elsewhere; UsageError for anything else."""
    if not isinstance(name, str):
        raise UsageError(f"MODEL was a {type(name).__name__}; it must be a name")
    found = demo.ALIASES.get(name, name)
    for prefix in ("", *_HUB):
        short = found.removeprefix(prefix).removeprefix("timm/")
        if found.startswith(f"{prefix}timm/") and timm.is_model(short):
            return short  # timm's own repositories are named as its models are
    if found.startswith(_ELSEWHERE) or timm.is_model(found):
        return found
    if "/" in name and not Path(name).exists():
        raise UsageError(
            f"MODEL was '{name}'; a model of the Hugging Face Hub that timm can load is named 'hf-hub:{name}'"
        )
    if Path(name).is_file():
        raise UsageError(
            f"MODEL was '{name}', which is a file; it must be a timm name, and the file with its weights goes to --checkpoint"
        )
    raise UsageError(f"MODEL was '{name}'; {_suggestions(found)}")


def _check_supported(name: str, spec: ModelSpec) -> None:
    """Before anything is downloaded: that the keywords fit, and that the model is of a family with an adapter."""
    try:
        structure = spec.build("meta")
    except Exception as error:  # timm raises many kinds here: unknown arguments and tags, sizes that do not divide
        given = f" with {spec.kwargs}" if spec.kwargs else ""
        raise UsageError(f"MODEL '{name}'{given}: timm could not build it ({first_line(error)})") from error
    if _is_convolutional(structure):
        raise UsageError(
            f"MODEL was '{name}', a {type(structure).__name__}, which is not a transformer: its work is in convolutions that "
            f"dfqvit does not quantize; {_KINDS}, for instance deit_tiny_patch16_224 or demo"
        )
    try:
        find_adapter(structure)
    except UsageError as error:
        raise UsageError(
            f"MODEL was '{name}', a {type(structure).__name__}; {_suggestions(spec.architecture)}"
        ) from error


def _is_convolutional(model: nn.Module) -> bool:
    """Whether a quarter of the weights or more are of convolutions that mix neighbours and channels, and no attention is there."""
    if any("attention" in type(module).__name__.lower() or hasattr(module, "num_heads") for module in model.modules()):
        return False
    mixing = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size > module.stride and module.groups < module.in_channels
    ]
    whole = sum(parameter.numel() for parameter in model.parameters())
    return sum(module.weight.numel() for module in mixing) > _MOST_CONVOLUTIONS * whole


def _from_elsewhere(name: str, source: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    try:
        model = timm.create_model(source, pretrained=pretrained, **kwargs)
    except Exception as error:  # network, hub, files, unknown arguments
        raise DfqvitError(f"MODEL '{name}': timm could not load it ({first_line(error)})") from error
    find_adapter(model)
    return model


def _suggestions(name: str) -> str:
    known = [model for model in timm.list_models() if model.startswith(FAMILIES)]
    near = difflib.get_close_matches(name, [*known, *demo.ALIASES], n=4, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "for instance deit_tiny_patch16_224 or demo"
    return f"{_KINDS}; {hint}"
