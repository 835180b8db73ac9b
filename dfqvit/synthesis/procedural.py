"""Images from no model at all: dead leaves, shapes that hide one another, drawn in a second or two.

Photographs are views of objects that occlude one another at every distance. Opaque shapes whose sizes follow a power law give
edges at all scales, flat regions and sharp borders, as these have; each shape has its own colour, shading and texture. Contrast
and brightness are drawn as in `spectrum`. No model is asked, so they say nothing about it: they bring variety, cheaply.

Sources: the dead leaves model of images, Lee, Mumford and Huang 2001; learning from it, Baradad et al. 2021 (arXiv 2106.05963).
"""

from __future__ import annotations

import math

import torch

from ..errors import UsageError
from ..models import Preprocessing
from .spectrum import BRIGHTNESS, CONTRAST, EXPONENTS, GREY, draw_tones

SHAPES = 220  # in an image, the last ones in front
SIZES = (0.015, 0.6)  # radii as shares of the longer side, density falling as radius^-2
_TEXTURES = 4  # fields of an image that its shapes cut pieces from
_STREAM = 1 << 60  # seeds of these images apart from those of the synthesis


def procedural_images(samples: int, seed: int, preprocessing: Preprocessing) -> torch.Tensor:
    """Dead-leaves images, another for each seed and index.

    Args:
        samples: how many, at least 1.
        seed: image i depends on (seed, i) only.
        preprocessing: size, and mean and std of the normalisation.

    Returns:
        float32 [samples, C, H, W] on the CPU, normalised, every pixel within the valid range.

    Raises:
        UsageError: samples is not at least 1.
    """
    if samples < 1:
        raise UsageError(f"samples was {samples}; it must be at least 1")
    low, high = preprocessing.channel_bounds(torch.device("cpu"))
    pixels = torch.stack([_draw(_STREAM + (seed << 20) + index, preprocessing.input_size) for index in range(samples)])
    return (low + (high - low) * pixels).clamp(low, high)


def _draw(seed: int, size: tuple[int, int, int]) -> torch.Tensor:
    """[C, H, W], pixels from 0 to 1 but for a few beyond."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = size
    side = max(height, width)
    tones = draw_tones(generator)
    textures = _textures(generator, height, width)
    u = torch.rand(SHAPES, 10, generator=generator)
    normal = torch.randn(SHAPES, 2 + channels, generator=generator)
    radii = side / (1 / SIZES[0] + u[:, 0] * (1 / SIZES[1] - 1 / SIZES[0]))  # the inverse of the law's integral
    saturation = 0.2 + 0.8 * torch.rand((), generator=generator)
    grid_y, grid_x = torch.arange(height).float(), torch.arange(width).float()
    image = torch.zeros(channels, height, width)
    for index in range(-1, SHAPES):
        i = max(index, 0)
        centre_x, centre_y = float(u[i, 1]) * width, float(u[i, 2]) * height
        radius = float(radii[i]) if index >= 0 else 4.0 * side  # the first fills the image
        reach = math.ceil(radius * 1.5) + 3
        top, bottom = max(int(centre_y) - reach, 0), min(int(centre_y) + reach, height)
        left, right = max(int(centre_x) - reach, 0), min(int(centre_x) + reach, width)
        if top >= bottom or left >= right:
            continue
        y, x = (grid_y[top:bottom, None] - centre_y) / radius, (grid_x[None, left:right] - centre_x) / radius
        angle = 2 * math.pi * float(u[i, 3])
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        aspect, power = 2.0 ** (float(u[i, 4]) - 0.5), 1.0 + 5.0 * float(u[i, 5]) ** 2
        distance = ((along / aspect).abs() ** power + (across * aspect).abs() ** power) ** (1 / power)
        softness = (0.5 + 2.5 * float(u[i, 6]) ** 4) / radius
        cover = ((1 - distance) / softness + 0.5).clamp(0, 1)
        common, chroma = normal[i, 0], normal[i, 2:] - normal[i, 2:].mean()
        colour = GREY**0.5 * common + (1 - GREY) ** 0.5 * chroma * (2 * u[i, 7] * saturation)
        shade = along * float(normal[i, 1]) * 0.4
        field = textures[int(u[i, 8] * _TEXTURES), top:bottom, left:right] * float(u[i, 9]) ** 2 * 0.8
        leaf = colour.view(-1, 1, 1) + (shade + field if index >= 0 else field)
        patch = image[:, top:bottom, left:right]
        patch += cover * (leaf - patch)
    image = (image - image.mean()) / image.std().clamp_min(1e-6)
    return BRIGHTNESS[0] + BRIGHTNESS[1] * tones[2] + CONTRAST * (0.5 + tones[0]) * image


def _textures(generator: torch.Generator, height: int, width: int) -> torch.Tensor:
    """[_TEXTURES, H, W]: noise whose amplitude falls as a power of the frequency, standardised."""
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    radius = (rows[:, None].square() + columns.square()).sqrt()
    radius[0, 0] = 1
    low, high = EXPONENTS
    exponents = low - 0.5 + (high - low + 0.5) * torch.rand(_TEXTURES, 1, 1, generator=generator)
    waves = torch.fft.rfft2(torch.randn(_TEXTURES, height, width, generator=generator)) * radius**-exponents
    waves[:, 0, 0] = 0
    fields = torch.fft.irfft2(waves, s=(height, width))
    return fields / fields.flatten(1).std(dim=1).clamp_min(1e-6).view(-1, 1, 1)
