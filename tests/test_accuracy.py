"""Accuracy on the real ImageNet DeiT-Tiny and real images: the baseline is PSAQ-ViT's, and calibration data matters.

200 of the 500 images, so that it runs in CI; docs/accuracy.md has the full figures. The bounds are wide enough for 200
images (a standard error of 3 points) and narrow enough to catch a misplaced quantizer: noise is 60 points below.
"""

from __future__ import annotations

import pytest
import torch

import dfqvit
from dfqvit.evaluation import evaluate
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deit():
    from .conftest import DATA

    path = DATA / "deit_tiny_patch16_224.in1k.safetensors"
    if not path.exists():
        pytest.skip(f"no real data at '{DATA}' (set DFQVIT_DATA)")
    model = load_model("deit_tiny_patch16_224", path)
    images = open_images(DATA / "imagenet500", Preprocessing.of(model), DATA / "imagenet_wnids.txt")
    chosen = [images[index * 5 // 2] for index in range(200)]
    batches = list(torch.utils.data.DataLoader(chosen, 50))
    return model, batches, spread_images(images, 32)


def test_float_model(deit):
    model, batches, _ = deit
    assert evaluate(model, batches).top1 >= 74


@pytest.mark.parametrize(("w_bits", "least"), [(8, 74), (4, 66)])
def test_real_images_keep_the_accuracy(deit, w_bits, least):
    model, batches, calib = deit
    qmodel = dfqvit.quantize(model, w_bits, calib=calib, placement="psaq", quantizer="minmax", acm="none")
    assert evaluate(qmodel, batches).top1 >= least


def test_noise_loses_it(deit):
    model, batches, _ = deit
    qmodel = dfqvit.quantize(model, 8, calib="noise", samples=32, placement="psaq", quantizer="minmax", acm="none")
    assert evaluate(qmodel, batches[::2]).top1 <= 20
