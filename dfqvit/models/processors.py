"""What an image processor of transformers does to images, as timm's transform does it; or refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..errors import UsageError, first_line
from .preprocessing import Preprocessing

_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
_MUST = (
    ("do_resize", True, "so that images of any size become one size"),
    ("do_rescale", True, "with a rescale_factor: pixels are taken as image files have them, from 0 to 255"),
    ("do_pad", False, "since timm's transform pads no images"),
)
_FILTERS = 0.02  # between PIL's and torchvision's ways of resizing, as a share of the range of pixels
_WARPED_FROM = 384  # ConvNeXt's processor crops smaller images alone


def of_processor(processor: Any, own: Preprocessing) -> Preprocessing:
    """What transformers' processor does to images; `own` where it does not say.

    Raises:
        UsageError: it does what timm's transform cannot do.
    """
    kind = type(processor).__name__
    if not (hasattr(processor, "image_mean") and hasattr(processor, "image_std")):
        raise UsageError(f"processor was a {kind}; it must be an image processor with image_mean and image_std")
    for name, wanted, why in _MUST:
        found = getattr(processor, name, wanted)
        if bool(found) is not wanted:
            raise UsageError(f"processor has {name}={found}; it must be {wanted}, {why}")
    resample = getattr(processor, "resample", None)
    if resample is not None and int(resample) not in _INTERPOLATIONS:
        raise UsageError(f"processor has resample={int(resample)}; it may be 0 (nearest), 2 (bilinear) or 3 (bicubic)")
    height, width, share, mode = _geometry(processor, own)
    mean, std = _normalisation(processor, own.input_size[0])
    return dataclasses.replace(
        own,
        input_size=(own.input_size[0], height, width),
        mean=mean,
        std=std,
        interpolation=own.interpolation if resample is None else _INTERPOLATIONS[int(resample)],
        crop_pct=share,
        crop_mode=mode,
    )


def _normalisation(processor: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for pixels from 0 to 1, the processor's own scale of pixels in them."""
    factor = getattr(processor, "rescale_factor", None)
    scale = 1.0 if factor is None else 255 * float(factor)
    if not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"processor has rescale_factor={factor}; it must be greater than 0")
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    mean, std = (0.0,) * channels, (1.0,) * channels
    if getattr(processor, "do_normalize", True):
        mean = _per_channel("image_mean", processor.image_mean, channels)
        std = _per_channel("image_std", processor.image_std, channels)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _per_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    if value is None:
        raise UsageError(f"processor has {name}=None; it must be a number for each channel")
    found = (float(value),) * channels if isinstance(value, (int, float)) else tuple(map(float, value))
    if len(found) != channels:
        raise UsageError(f"processor has {len(found)} values in {name}; the model takes images of {channels} channels")
    return found


def _geometry(processor: Any, own: Preprocessing) -> tuple[int, int, float, str]:
    """(height, width, crop_pct, crop_mode) of timm's transform."""
    share = getattr(processor, "crop_pct", None)
    size = _size(processor, "size")
    crop = _size(processor, "crop_size") if getattr(processor, "do_center_crop", False) else {}
    if share is not None:
        share = float(share)
        if not size and not crop:
            return *own.input_size[1:], share, own.crop_mode
        if crop or size.keys() != {"shortest_edge"}:
            raise UsageError(
                f"processor has crop_pct={share}, size={size} and crop_size={crop}; it may have a shortest_edge alone"
            )
        side = size["shortest_edge"]
        return (side, side, share, "center") if side < _WARPED_FROM else (side, side, 1.0, "squash")
    if not size:
        return *own.input_size[1:], own.crop_pct, own.crop_mode
    if crop and crop.keys() != {"height", "width"}:
        raise UsageError(f"processor has crop_size={crop}; it may have height and width")
    if size.keys() == {"height", "width"}:
        crop = crop or size
        resized = (size["height"], size["width"])
        return crop["height"], crop["width"], _share((crop["height"], crop["width"]), resized, processor), "squash"
    if size.keys() != {"shortest_edge"}:
        raise UsageError(f"processor has size={size}; it may have height and width, or shortest_edge")
    if not crop or crop["height"] != crop["width"]:
        raise UsageError(
            f"processor has size={size} and {f'crop_size={crop}' if crop else 'no center crop'}; beside shortest_edge it must "
            "have do_center_crop and a square crop_size"
        )
    edge = size["shortest_edge"]
    return crop["height"], crop["width"], _share((crop["height"],), (edge,), processor), "center"


def _share(cut: tuple[int, ...], resized: tuple[int, ...], processor: Any) -> float:
    """The crop_pct by which timm resizes to just so many pixels: the whole part of `cut / crop_pct`."""
    for share in (cut[0] / resized[0], cut[0] / (resized[0] + 0.5)):
        if all(math.floor(one / share) == other for one, other in zip(cut, resized, strict=True)):
            return share
    raise UsageError(
        f"processor was a {type(processor).__name__} that resizes to {' x '.join(map(str, resized))} pixels and crops "
        f"{' x '.join(map(str, cut))}; both must have the same ratio of height to width"
    )


def _size(processor: Any, name: str) -> dict[str, int]:
    value = getattr(processor, name, None)
    if value is None:
        return {}
    if isinstance(value, int):
        return {"height": value, "width": value}
    if isinstance(value, (list, tuple)):
        value = dict(zip(("height", "width"), value, strict=True))
    found = {key: each for key, each in dict(value).items() if each is not None}
    if not all(isinstance(each, int) and each > 0 for each in found.values()):
        raise UsageError(f"processor has {name}={found}; every side must be a whole number greater than 0")
    return found


def check_pixels(processor: Any, ours: Preprocessing) -> None:
    """UsageError unless `processor` makes of a smooth image that is not square what timm's transform does.

    PIL and torchvision round otherwise, and a centre crop may lie one pixel beside the other's.
    """
    channels, height, width = ours.input_size
    if not callable(processor) or channels not in (1, 3):
        return
    image = _smooth_image(channels, 2 * height, 3 * width)
    kind = type(processor).__name__
    try:
        given: Mapping[str, Any] = processor(images=image, return_tensors="pt")
        theirs = given["pixel_values"][0].float()
    except Exception as error:  # another library's code
        raise UsageError(f"processor was a {kind} that fails on an image: {first_line(error)}") from error
    wanted = ours.normalise(ours.transform()(image))
    if theirs.shape != wanted.shape:
        raise UsageError(
            f"processor was a {kind} that makes {tuple(theirs.shape)} of an image where its settings say {tuple(wanted.shape)}"
        )
    off = float(((theirs - wanted).abs() * torch.tensor(ours.std).view(-1, 1, 1)).mean())
    if not off <= _FILTERS + 1 / min(height, width):
        raise UsageError(
            f"processor was a {kind} whose images differ from those of its settings by {off:.1e} of the range of pixels; it "
            "does something that timm's transform does not"
        )


def _smooth_image(channels: int, height: int, width: int) -> Image.Image:
    rows = torch.linspace(0, 255, height).view(-1, 1).expand(height, width)
    columns = torch.linspace(0, 255, width).view(1, -1).expand(height, width)
    planes = [(rows + columns) / 2, rows, columns][:channels]
    pixels = torch.stack(planes, dim=-1).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
