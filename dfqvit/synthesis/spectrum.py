"""The finish of synthesis: the images keep their structure and take the statistics that all photographs share.

Optimised images are far from photographs in what is cheap to know about photographs: the amplitude of their frequencies, which
falls as a power, a different one for each scene; grey that dominates colour; brightness and contrast that differ from one to
the next. Layers see that in their inputs, so second moments learnt from raw synthetic images carry over badly (docs/accuracy.md).

Sources: natural images' amplitudes, Field 1987; their slopes by scene, Torralba and Oliva 2003; optimising the phase under a
fixed amplitude, MACO (arXiv 2306.06805).
"""

from __future__ import annotations

import torch

from ..models import Preprocessing

SPECTRA = ("natural", "free")
TONES = 3  # random numbers of one image: contrast and exponent (uniform), brightness (normal)
EXPONENTS = (1.0, 2.2)  # amplitude falls as frequency to the minus something between these
GREY = 0.6  # share of the variance that the channels have in common
CONTRAST = 0.22  # mean standard deviation of an image, pixels from 0 to 1; half to one and a half of it
BRIGHTNESS = (0.45, 0.15)  # mean and standard deviation, over images, of an image's mean pixel


def draw_tones(generator: torch.Generator) -> torch.Tensor:
    """[TONES] for one image."""
    return torch.cat([torch.rand(2, generator=generator), torch.randn(1, generator=generator)])


def natural_spectrum(images: torch.Tensor, tones: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """The images' phases with amplitudes, colours, contrast and brightness as in photographs.

    Each frequency keeps its share among those of the same radius; only the mean over a ring of radii is set.

    Args:
        images: [n, C, H, W], normalised.
        tones: [n, TONES] of `draw_tones`.
        preprocessing: mean and std of the images' normalisation.

    Returns:
        [n, C, H, W], normalised, every pixel within the valid range.
    """
    channels, height, width = images.shape[1:]
    rings, radius = _rings(height, width, images.device)
    waves = torch.fft.rfft2(images.float())
    strength = waves.abs().square().mean(dim=1).sqrt().flatten(1)  # [n, frequencies]
    count = torch.bincount(rings).clamp_min(1)
    mean = torch.zeros(len(images), len(count), device=images.device).index_add_(1, rings, strength) / count
    level = mean[:, rings].view(-1, 1, height, waves.shape[-1]).clamp_min(torch.finfo(torch.float32).tiny)
    exponent = EXPONENTS[0] + (EXPONENTS[1] - EXPONENTS[0]) * tones[:, 1].view(-1, 1, 1, 1)
    fields = _standardised(torch.fft.irfft2(waves / level * radius**-exponent, s=(height, width)))
    if channels > 1:
        common = _standardised(fields.mean(dim=1, keepdim=True))
        fields = _standardised(GREY**0.5 * common + (1 - GREY) ** 0.5 * fields)
    contrast = CONTRAST * (0.5 + tones[:, 0]).view(-1, 1, 1, 1)
    brightness = (BRIGHTNESS[0] + BRIGHTNESS[1] * tones[:, 2]).view(-1, 1, 1, 1)
    low, high = preprocessing.channel_bounds(images.device)
    return (low + (high - low) * (brightness + contrast * fields)).clamp(low, high)


def _rings(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of each frequency's ring [H * (W // 2 + 1)], radius [H, W // 2 + 1] in cycles a pixel); rfft2's frequencies."""
    rows, columns = torch.fft.fftfreq(height, device=device), torch.fft.rfftfreq(width, device=device)
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    radius[0, 0] = 1 / max(height, width)  # the mean, which goes in any case
    return (radius * max(height, width)).round().long().flatten(), radius


def _standardised(fields: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 for each channel of each image; a constant one becomes 0."""
    fields = fields - fields.mean((-2, -1), keepdim=True)
    return fields / fields.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-6)
