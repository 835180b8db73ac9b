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

from ..errors import UsageError, first_line
from .preprocessing import Preprocessing, image_shape
from .processors import check_pixels, of_processor
from .spec import ModelSpec, plain
from .twin_families import JOINED, OLD, TWINS, Family, Renames, State

TOLERANCE = 1e-3  # between the logits of the two, as a share of the greatest; float32 rounds to about 1e-6
_UNUSED = ("mask_token", "relative_position_index")  # of pretraining alone; made by both from the window's size


def from_transformers(model: nn.Module, processor: Any = None) -> nn.Module:
    """The timm model that computes what an image classifier of transformers does; `dfqvit.quantize` takes it.

    Args:
        model: a ViT, DeiT (with or without teacher), Swin, DINOv2 (with or without registers) or ConvNeXt
            `...ForImageClassification` of transformers; left as it was.
        processor: its image processor, which says how images are resized, cropped and normalised, and so their size, which is
            the twin's; default as timm's twin prepares them, in the size of the model's configuration.

    Returns:
        A timm model in eval mode and float32, on the model's device, every tensor of it taken from `model`. Its logits are
        those of `model`, which was tried on a random image.

    Raises:
        UsageError: another model, a tensor that has no place or another shape, logits that differ, or a processor that does
            what timm's transform does not, or whose images the model does not take.
    """
    family = TWINS.get(type(model).__name__) if type(model).__module__.startswith("transformers.") else None
    if family is None:
        raise UsageError(
            f"model was a {type(model).__name__}; it may be of these classes of transformers: {', '.join(TWINS)}"
        )
    config: Any = model.config
    keywords = family.keywords(config)
    side = config.image_size
    size = (side, side) if isinstance(side, int) else tuple(side)
    spec = ModelSpec(family.name, plain({"num_classes": config.num_labels, **keywords}))
    twin = _built(spec, model)
    own = dataclasses.replace(Preprocessing.of(twin), input_size=(config.num_channels, *size))
    prepared = own if processor is None else of_processor(processor, own)
    state = _renamed(model.state_dict(), family)
    if prepared.input_size != own.input_size:
        _expect_taken(model, prepared.input_size, size)
        if "img_size" in keywords:
            spec = spec.resized(img_size=prepared.input_size[1:])
            twin = _built(spec, model)
        _resample_positions(state, twin, antialias="WithRegisters" in type(model).__name__)
    _check_names(twin.state_dict(), state)
    twin.load_state_dict(state, strict=False)
    twin = twin.eval().to(next(model.parameters()).device)
    twin.dfqvit_spec = spec
    prepared.write_to(twin)
    if processor is not None:
        check_pixels(processor, prepared)
    _check_logits(model, twin)
    return twin


def _built(spec: ModelSpec, model: nn.Module) -> Any:
    try:
        return timm.create_model(spec.architecture, pretrained=False, **spec.keywords())
    except Exception as error:  # timm refuses sizes that do not fit by many kinds
        raise UsageError(f"model was a {type(model).__name__} that timm cannot build: {first_line(error)}") from error


@torch.no_grad()
def _expect_taken(model: nn.Module, shape: tuple[int, int, int], own: tuple[int, ...]) -> None:
    """UsageError where the model refuses the images that the processor makes."""
    parameter = next(model.parameters())
    try:
        copy.deepcopy(model).eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # transformers' own check, or a shape that does not fit
        raise UsageError(
            f"processor makes images of {shape[1]} x {shape[2]} pixels; model was a {type(model).__name__} that takes "
            f"{' x '.join(map(str, own))} alone"
        ) from error


def _resample_positions(state: State, twin: nn.Module, *, antialias: bool) -> None:
    """Position embeddings [1, N, C] for the twin's grid of patches, as DINOv2 itself resamples them; in place."""
    grid = getattr(getattr(twin, "patch_embed", None), "grid_size", None)
    positions = state.get("pos_embed")
    if grid is None or positions is None:
        return
    side = round(positions.shape[1] ** 0.5)
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    found = nn.functional.interpolate(
        square, size=tuple(grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    state["pos_embed"] = found.flatten(2).transpose(1, 2).contiguous()


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
