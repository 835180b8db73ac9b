"""The finish of synthesis: a photograph's spectrum and tones, the optimised images' structure, valid pixels."""

import math

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from dfqvit import synthesize
from dfqvit.errors import UsageError
from dfqvit.models import Preprocessing
from dfqvit.synthesis import SynthesisConfig
from dfqvit.synthesis.spectrum import BRIGHTNESS, CONTRAST, EXPONENTS, GREY, TONES, draw_tones, natural_spectrum

from ..conftest import small_vit


def preprocessing(channels, height, width):
    return Preprocessing((channels, height, width), mean=(0.5,) * channels, std=(0.25,) * channels)


def quiet_tones(count, slope=0.25):
    """Low contrast: next to nothing is clamped."""
    return torch.tensor([0.0, slope, 0.0]).expand(count, TONES)


def to_pixels(images, p):
    return images * torch.tensor(p.std).view(-1, 1, 1) + torch.tensor(p.mean).view(-1, 1, 1)


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 64, 64), (1, 96, 96), (4, 48, 80)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_amplitude_falls_with_the_frequency(seed, channels, height, width, share):
    exponent = EXPONENTS[0] + share * (EXPONENTS[1] - EXPONENTS[0])
    p = preprocessing(channels, height, width)
    noise = torch.randn(6, channels, height, width)  # a flat spectrum
    for images in (noise, gaussian_blur(noise, 5, 0.6)):  # and a steep one: the result is the same
        pixels = to_pixels(natural_spectrum(images, quiet_tones(6, share), p), p).double()
        rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
        radius = (rows[:, None] ** 2 + columns**2).sqrt()
        amplitude = torch.fft.fft2(pixels).abs().mean((0, 1))
        inside = (radius > 3 / min(height, width)) & (radius < 0.45)
        x, y = radius[inside].log().double(), amplitude[inside].log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
        assert slope.item() == pytest.approx(-exponent, abs=0.2)


def test_tones_set_contrast_and_brightness(seed):
    p = preprocessing(1, 40, 40)
    tones = torch.tensor([[0.0, 0.2, 0.0], [0.2, 0.2, 0.5], [0.4, 0.2, -0.5]])
    pixels = to_pixels(natural_spectrum(torch.randn(3, 1, 40, 40), tones, p), p)
    for image, (contrast, _, brightness) in zip(pixels, tones, strict=True):
        assert image.std().item() == pytest.approx(CONTRAST * (0.5 + contrast.item()), rel=0.1)
        assert image.mean().item() == pytest.approx(BRIGHTNESS[0] + BRIGHTNESS[1] * brightness.item(), abs=0.02)


def test_channels_share_grey(seed):
    p = preprocessing(3, 64, 64)
    pixels = to_pixels(natural_spectrum(torch.randn(8, 3, 64, 64), quiet_tones(8), p), p).flatten(2)
    together = torch.stack([torch.corrcoef(image) for image in pixels]).mean(0)[~torch.eye(3, dtype=torch.bool)]
    share = GREY + 2 * math.sqrt(GREY * (1 - GREY) / 3)  # the common part is made of the three themselves
    expected = share / (share + (1 - GREY) * 1.0)
    assert (together > 0.5).all()
    assert together.mean().item() == pytest.approx(expected, abs=0.15)


def test_structure_stays(seed):
    """Frequencies keep their phases, so an image correlates with its whitened self and not with the others'."""
    p = preprocessing(1, 64, 64)
    images = torch.randn(4, 1, 64, 64)
    finished = natural_spectrum(images, quiet_tones(4), p)
    phases = torch.fft.rfft2(images) * torch.fft.rfft2(finished).conj()
    inside = torch.zeros(64, 33, dtype=torch.bool)
    inside[4:20, 4:20] = True
    assert (phases[..., inside].angle().abs() < 0.5).float().mean() > 0.9
    strangers = torch.fft.rfft2(images.roll(1, 0)) * torch.fft.rfft2(finished).conj()
    assert (strangers[..., inside].angle().abs() < 0.5).float().mean() < 0.3


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 2.0)])
def test_a_constant_image_stays_finite(image):
    p = preprocessing(3, 16, 16)
    finished = natural_spectrum(image, draw_tones(torch.Generator())[None], p)
    assert torch.isfinite(finished).all()
    assert finished.std() < 1e-3


def test_images_do_not_depend_on_their_neighbours_and_stay_valid(seed):
    p = preprocessing(3, 20, 28)
    images, tones = torch.randn(5, 3, 20, 28), torch.stack([torch.rand(5), torch.rand(5), 3 * torch.randn(5)], 1)
    finished = natural_spectrum(images, tones, p)
    assert torch.allclose(finished[2:3], natural_spectrum(images[2:3], tones[2:3], p), atol=1e-5)
    low, high = p.channel_bounds()
    assert (finished >= low).all()
    assert (finished <= high).all()


def test_synthesis_finishes_unless_told_otherwise(seed):
    model = small_vit()
    free = synthesize(model, 2, 3, spectrum="free")
    natural = synthesize(model, 2, 3)
    assert not torch.allclose(free, natural)
    assert torch.equal(natural, synthesize(model, 2, 3, spectrum="natural"))
    with pytest.raises(UsageError, match="spectrum was 'pink'; it may be 'natural', 'free'"):
        SynthesisConfig(spectrum="pink")
