"""timm's twins of transformers' image classifiers: the same network built by timm, with the same weights.

transformers itself is not imported: a model is recognised by its class's name, and its weights by theirs (`twin_families`).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from ..errors import UsageError
from .checkpoint import first_line
from .preprocessing import Preprocessing, image_shape
from .spec import ModelSpec, plain
from .twin_families import JOINED, OLD, TWINS, Family, Renames, State

TOLERANCE = 1e-3  # between the logits of the two, as a share of the greatest; float32 rounds to about 1e-6
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_UNUSED = ("mask_token", "relative_position_index")  # of pretraining alone; made by both from the window's size


def from_transformers(model: nn.Module, processor: Any = None) -> nn.Module:
    """The timm model that computes what an image classifier of transformers does; `dfqvit.quantize` takes it.

    Args:
        model: a ViT, DeiT (with or without teacher), Swin, DINOv2 (with or without registers) or ConvNeXt
            `...ForImageClassification` of transformers; left as it was.
        processor: its image processor, which says mean, std, interpolation and crop; default those of timm's twin.

    Returns:
        A timm model in eval mode and float32, on the model's device, every tensor of it taken from `model`. Its logits are
        those of `model`, which was tried on a random image.

    Raises:
        UsageError: another model, a tensor that has no place or another shape, or logits that differ.
    """
    family = TWINS.get(type(model).__name__) if type(model).__module__.startswith("transformers.") else None
    if family is None:
        raise UsageError(
            f"model was a {type(model).__name__}; it may be of these classes of transformers: {', '.join(TWINS)}"
        )
    config: Any = model.config
    spec = ModelSpec(family.name, plain({"num_classes": config.num_labels, **family.keywords(config)}))
    try:
        twin = timm.create_model(spec.architecture, pretrained=False, **spec.keywords())
    except Exception as error:  # timm refuses sizes that do not fit by many kinds
        raise UsageError(f"model was a {type(model).__name__} that timm cannot build: {first_line(error)}") from error
    state = _renamed(model.state_dict(), family)
    _check_names(twin.state_dict(), state)
    twin.load_state_dict(state, strict=False)
    twin = twin.eval().to(next(model.parameters()).device)
    twin.dfqvit_spec = spec
    side = config.image_size
    size = (config.num_channels, side, side) if isinstance(side, int) else (config.num_channels, *side)
    own = dataclasses.replace(Preprocessing.of(twin), input_size=size)
    (own if processor is None else _of_processor(processor, own)).write_to(twin)
    _check_logits(model, twin)
    return twin


def _renamed(state: Mapping[str, torch.Tensor], family: Family) -> State:
    """The tensors in float32 by timm's names."""
    found: State = {}
    for key, tensor in state.items():
        if key.rsplit(".", 1)[-1] in _UNUSED:
            continue
        found[_rename(key, OLD)] = tensor.detach().float()
    for parts, whole in JOINED:
        for key in [key for key in found if f".{parts[0]}." in key]:
            names = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            found[key.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([found.pop(name) for name in names])
    found = {_rename(key, family.renames): tensor for key, tensor in found.items()}
    family.also(found)
    return found


def _rename(key: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _check_names(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """UsageError unless both hold the same tensors; those that timm computes itself are no part of the weights."""
    names = {key for key in wanted if key.rsplit(".", 1)[-1] not in (*_UNUSED, "attn_mask")}
    for key in sorted(names | found.keys()):
        ours = tuple(wanted[key].shape) if key in names else "absent"
        theirs = tuple(found[key].shape) if key in found else "absent"
        if ours != theirs:
            raise UsageError(
                f"model does not fit timm's twin of it: '{key}' is {theirs} in the one and {ours} in the other"
            )


@torch.no_grad()
def _check_logits(model: nn.Module, twin: nn.Module) -> None:
    parameter = next(twin.parameters())
    image = torch.randn(1, *image_shape(twin), generator=torch.Generator().manual_seed(0)).to(parameter)
    wanted = copy.deepcopy(model).float().eval()(image).logits
    found = twin(image)
    off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny))
    if not off <= TOLERANCE:
        raise UsageError(
            f"model was a {type(model).__name__} whose logits differ from its timm twin's by {off:.1e} of the greatest; "
            "it computes something that the twin does not"
        )


def _of_processor(processor: Any, own: Preprocessing) -> Preprocessing:
    """What transformers' processor does to images; `own` where it does not say."""
    given: dict[str, Any] = {
        name: getattr(processor, name, None) for name in ("image_mean", "image_std", "resample", "size", "crop_size")
    }
    if given["image_mean"] is None or given["image_std"] is None:
        raise UsageError(
            f"processor was a {type(processor).__name__}; it must be an image processor with image_mean and image_std"
        )
    crop, share = own.crop_pct, getattr(processor, "crop_pct", None)
    if share is not None:
        crop = float(share)
    elif given["size"]:
        cut = (
            given["crop_size"] if getattr(processor, "do_center_crop", False) and given["crop_size"] else given["size"]
        )
        crop = _side(cut) / _side(given["size"])
    resample = given["resample"]
    name = _INTERPOLATIONS.get(resample, str(resample)) if isinstance(resample, int) else own.interpolation
    mean, std = (tuple(map(float, given[key])) for key in ("image_mean", "image_std"))
    return dataclasses.replace(own, mean=mean, std=std, interpolation=name, crop_pct=crop)


def _side(size: Any) -> int:
    return min(int(value) for value in dict(size).values() if value is not None)
