"""Dead-leaves images: valid pixels, another for each index and seed, edges at all scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dfqvit
from dfqvit.errors import UsageError
from dfqvit.models import Preprocessing
from dfqvit.synthesis import procedural
from dfqvit.synthesis.procedural import procedural_images

from ..conftest import SMALL, small_vit

KWARGS = SMALL["vit"]
COMPANIONS = 5  # fewer than by default, where it is their number alone that is looked at


def preprocessing(channels: int, height: int, width: int) -> Preprocessing:
    return Preprocessing((channels, height, width), mean=(0.4,) * channels, std=(0.25,) * channels)


@pytest.fixture(autouse=True)
def drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the drawing is what is tested."""
    monkeypatch.setattr(procedural, "_draw", procedural._draw.__wrapped__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(3, 64, 64), (1, 33, 47), (4, 50, 20)])
def test_pixels_are_valid_and_varied(size: tuple[int, int, int], seed: int) -> None:
    images = procedural_images(3, seed % 1000, preprocessing(*size))
    assert images.shape == (3, *size)
    assert images.dtype == torch.float32
    pixels = images * 0.25 + 0.4
    assert float(pixels.min()) > -1e-5
    assert float(pixels.max()) < 1 + 1e-5
    assert (pixels.flatten(1).std(dim=1) > 0.03).all()


def test_an_image_depends_on_its_seed_and_index_alone(seed: int) -> None:
    p, first = preprocessing(3, 48, 48), seed % 1000
    many = procedural_images(4, first, p)
    assert torch.equal(many[:2], procedural_images(2, first, p))
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0], procedural_images(1, first + 1, p)[0])


def test_amplitudes_fall_with_frequency_as_in_photographs(seed: int) -> None:
    side = 128
    images = procedural_images(12, seed % 1000, preprocessing(3, side, side))
    power = torch.fft.rfft2(images.mean(dim=1) - images.mean(dim=(1, 2, 3)).view(-1, 1, 1)).abs().square().mean(dim=0)
    radius = (torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()).sqrt()
    rings = torch.tensor([0.02, 0.04, 0.08, 0.16, 0.32])
    level = torch.stack([power[(radius > r * 0.8) & (radius < r * 1.25)].mean().sqrt() for r in rings]).log()
    x = rings.log() - rings.log().mean()
    slope = float((x * level).sum() / x.square().sum())
    assert -2.2 < slope < -0.8  # white noise has 0


def test_quantize_takes_them(seed: int) -> None:
    model = small_vit()
    settings = {"samples": 4, "seed": 3, "rounding": "nearest", "model_kwargs": KWARGS}
    qmodel = dfqvit.quantize(model, 8, 8, calib="procedural", **settings)  # type: ignore[arg-type]
    assert qmodel.dfqvit_record.calibration == "procedural"  # type: ignore[union-attr]
    images = procedural_images(4, 3, Preprocessing.of(model))
    other = dfqvit.quantize(model, 8, 8, calib=images, **settings)  # type: ignore[arg-type]
    assert torch.equal(qmodel(images), other(images))


def test_companions_stand_beside_the_synthetic_images(seed: int) -> None:
    model = small_vit()
    settings = {"seed": 3, "rounding": "nearest", "model_kwargs": KWARGS}
    qmodel = dfqvit.quantize(model, 8, 8, samples=2, iters=2, companions=3, **settings)  # type: ignore[arg-type]
    record = qmodel.dfqvit_record
    assert (record.samples, record.calibration, record.settings["companions"]) == (5, "synthetic", 3)  # type: ignore[union-attr]
    made = dfqvit.synthesize(model, 2, 2, 3)
    images = torch.cat([made, procedural_images(3, 3, Preprocessing.of(model))])
    other = dfqvit.quantize(model, 8, 8, calib=images, **settings)  # type: ignore[arg-type]
    assert torch.equal(qmodel(images), other(images))
    assert "2 images, synthetic and 3 procedural" in repr(qmodel)
    with pytest.raises(UsageError, match="companions was 3; only synthetic images have companions"):
        dfqvit.quantize(model, 8, 8, calib=images, companions=3, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="companions was -1"):
        dfqvit.quantize(model, 8, 8, companions=-1, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, COMPANIONS),
        ({"rounding": "nearest"}, 0),
        ({"placement": "psaq"}, 0),
        ({"calib": "procedural"}, 0),
        ({"calib": torch.randn(2, 3, 32, 32)}, 0),
        ({"companions": 0}, 0),
    ],
    ids=["default", "nearest", "psaq", "procedural", "given", "none"],
)
def test_companions_by_default(
    seed: int, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: int
) -> None:
    monkeypatch.setattr("dfqvit.calibration.images.COMPANIONS", COMPANIONS)
    settings: dict[str, Any] = {"samples": 2, "iters": 1, "model_kwargs": KWARGS, **changes}
    record: Any = dfqvit.quantize(small_vit(), 4, 8, **settings).dfqvit_record
    assert record.settings.get("companions", 0) == expected
    assert record.samples == 2 + expected


def test_at_least_one(seed: int) -> None:
    with pytest.raises(UsageError, match="samples was 0; it must be at least 1"):
        procedural_images(0, 0, preprocessing(3, 32, 32))
