"""Calibration images that a caller gives: what may stand for them, and whether they can be normalised ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import UsageError
from ..models import Preprocessing
from ..quantization.model import kind_of

MOST_OUTSIDE = 0.05  # share of values that no pixel from 0 to 1 gives; 0 for images, a third for noise
_MARGIN = 0.05  # of the range from pixel 0 to pixel 1: resampling overshoots
_TWELVE_BITS = 4095
_LEAST_CONTRAST = 0.01  # the deviation within an image, of the range from pixel 0 to pixel 1
_BELOW = -0.3  # where pixel 0 is less than this, images from 0 to 1 are not normalised


def given_images(calib: Any, preprocessing: Preprocessing) -> torch.Tensor:
    """Images [n, C, H, W] in float32 from a tensor, an array, or a list of tensors, arrays or PIL images.

    PIL images are prepared as the model expects (`preprocessing`); the others must be so already.

    Raises:
        UsageError: it is something else, of another shape or dtype, not finite, or cannot be normalised images.
    """
    wanted = f"[n, {', '.join(map(str, preprocessing.input_size))}]"
    if isinstance(calib, (list, tuple)):
        calib = _stacked(calib, preprocessing, wanted)
    if isinstance(calib, np.ndarray) and calib.dtype.kind in "fiub":
        calib = _tensor(calib)
    if isinstance(calib, torch.Tensor):
        calib = _plain(calib, wanted)
    else:
        raise UsageError(
            f"calib was a {type(calib).__name__}; it may be 'synthetic', 'procedural', 'noise', or images {wanted} as a "
            "tensor, an array or a list (of a data loader, its first batch without the labels)"
        )
    if calib.dim() != 4 or tuple(calib.shape[1:]) != preprocessing.input_size or not len(calib):
        last = calib.dim() == 4 and calib.shape[-1] == preprocessing.input_size[0]
        hint = "; channels come before height and width: permute(0, 3, 1, 2)" if last else ""
        raise UsageError(f"calib had shape {tuple(calib.shape)}; it must be {wanted}{hint}")
    how = "Preprocessing.of(model).normalise(images) of dfqvit.models takes uint8, or floats from 0 to 1"
    if not calib.is_floating_point():
        raise UsageError(
            f"calib had dtype {str(calib.dtype).removeprefix('torch.')}; it must be a float tensor of finite values, normalised as "
            f"the model expects: {how}"
        )
    calib = calib.detach().float()
    if not bool(torch.isfinite(calib).all()):
        raise UsageError(
            "calib held NaN or Inf; it must be a float tensor of finite values, normalised as the model expects"
        )
    refusal, doubt = judge(calib, preprocessing)
    if refusal:
        raise UsageError(f"calib {refusal}: {how}")
    doubt = doubt or _monotony(calib, preprocessing)
    if doubt:
        warnings.warn(f"calib {doubt}", stacklevel=2)
    return calib.clone() if calib.is_inference() else calib


def _plain(images: torch.Tensor, wanted: str) -> torch.Tensor:
    """The images without their graph; UsageError where the tensor has no values, or not in rows."""
    kind = "meta" if images.is_meta else kind_of(images)
    if kind != "strided":
        raise UsageError(f"calib was a tensor of kind '{kind}'; it must be a dense tensor {wanted} with values")
    return images.detach()


def judge(images: torch.Tensor, preprocessing: Preprocessing) -> tuple[str, str]:
    """(why the images [n, C, H, W] cannot be normalised as the model expects, or ""; why they hardly are, or "")."""
    low, high = preprocessing.channel_bounds(images.device)
    least, greatest = float(images.min()), float(images.max())
    bottom, top = float(low.min()), float(high.max())
    span = f"normalised images of this model lie between {bottom:.2f} and {top:.2f}"
    if max(abs(least), abs(greatest)) > 3 * max(abs(bottom), abs(top)) + 6:
        kind = "pixels from 0 to 255" if least >= 0 else "pixels that were not divided by 255"
        return f"held values from {least:.4g} to {greatest:.4g}, like {kind}; {span}", ""
    if least >= 0 and greatest <= 1 and float(low.max()) < _BELOW:
        said = f"held values from {least:.2f} to {greatest:.2f}, like pixels from 0 to 1 before normalisation; {span}"
        return (said, "") if greatest - least >= 0.5 else ("", said)
    if -1.001 <= least < -0.9 and 0.9 < greatest <= 1.001 and not -1.4 <= bottom <= -0.9:
        return "", f"held values from -1 to 1, like images of a mean and std of 0.5; {span}"
    outside = outside_share(images, preprocessing)
    if outside > MOST_OUTSIDE:
        return "", (
            f"held values that no pixel gives ({outside:.0%} of them): noise, or images of another mean and std; {span}"
        )
    return "", ""


def _monotony(images: torch.Tensor, preprocessing: Preprocessing) -> str:
    """Why the images [n, C, H, W] can hardly tell of others, or ""."""
    low, high = preprocessing.channel_bounds(images.device)
    deviation = ((images - images.mean((2, 3), keepdim=True)) / (high - low)).square().mean((1, 2, 3)).sqrt()
    if flat := int((deviation < _LEAST_CONTRAST).sum()):
        return f"held {flat} images of one colour among {len(images)}, which tell nothing of others"
    if len(images) > 1 and bool((images == images[:1]).all()):
        return f"held the same image {len(images)} times, which tells little of others"
    return ""


def outside_share(images: torch.Tensor, preprocessing: Preprocessing) -> float:
    """Share of the values that lie outside what pixels from 0 to 1 become, with a margin."""
    low, high = preprocessing.channel_bounds(images.device)
    margin = _MARGIN * (high - low)
    return float(((images < low - margin) | (images > high + margin)).float().mean())


def _stacked(images: Sequence[Any], preprocessing: Preprocessing, wanted: str) -> torch.Tensor:
    if not images:
        raise UsageError(f"calib was an empty list; it must be images {wanted}")
    if all(isinstance(image, Image.Image) for image in images):
        mode = {1: "L", 3: "RGB"}.get(preprocessing.input_size[0])
        if mode is None:
            raise UsageError(f"calib was a list of PIL images; the model takes {preprocessing.input_size[0]} channels")
        transform = preprocessing.transform()
        made = []
        for index, image in enumerate(images):
            try:
                made.append(preprocessing.normalise(transform(eight_bits(image).convert(mode))))
            except ValueError as error:
                raise UsageError(f"calib[{index}] was a PIL image of mode {image.mode}: {error}") from error
        return torch.stack(made)
    parts = [_tensor(image) if isinstance(image, np.ndarray) else image for image in images]
    for index, part in enumerate(parts):
        if not isinstance(part, torch.Tensor):
            raise UsageError(f"calib[{index}] was a {type(part).__name__}; it may be a tensor, an array or a PIL image")
        if part.dim() == 4 and len(part) == 1:
            parts[index] = part[0]
    if len({(tuple(part.shape), part.dtype, part.device) for part in parts}) > 1:
        shapes = sorted({str(tuple(part.shape)) for part in parts})
        raise UsageError(
            f"calib was a list of images of several shapes or dtypes ({', '.join(shapes)}); it must be {wanted}"
        )
    return torch.stack(parts)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """An array of numbers as a tensor, also of another byte order, or longer than torch has floats.

    UsageError where some are masked, of which a tensor would hold what lies behind the mask.
    """
    if masked := int(np.ma.count_masked(array)):
        raise UsageError(
            f"calib was a masked array with {masked} masked values; a model sees every pixel, so fill them: array.filled(...)"
        )
    plain = np.float64 if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array, plain))


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits scaled to 8, which Pillow's own conversion cuts off at 255; others as they are."""
    if not image.mode.startswith("I"):
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of no known range")
        return image
    values = np.asarray(image).astype(np.int64)
    greatest = int(values.max(initial=0))
    if values.min(initial=0) < 0 or greatest > 65535:
        raise ValueError("its pixels are of more than 16 bits")
    if 0 < greatest <= 255:
        raise ValueError(f"its pixels have 16 bits or more, of which they use 8 at most ({greatest}): all but black")
    if 255 < greatest <= _TWELVE_BITS:
        warnings.warn(
            f"an image of 16 bits or more has pixels up to {greatest} only, as cameras of 12 bits give them: it is taken for dark",
            stacklevel=2,
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
