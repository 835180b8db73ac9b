"""Tensors of calibration images that hold no values, or none in rows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import dfqvit
from dfqvit.calibration.given import given_images
from dfqvit.errors import UsageError
from dfqvit.models.preprocessing import Preprocessing

from ..conftest import small_vit

PREPARED = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def test_all_images_that_are_given_are_taken(seed):
    """`samples` beside them was not looked at: who asked for 2 of 5 got all."""
    model, images = small_vit(depth=1), torch.rand(5, 3, 32, 32) * 2 - 1
    with pytest.warns(UserWarning, match="samples was 2 and calib 5 images; all that are given are taken"):
        qmodel = dfqvit.quantize(model, 8, calib=images, samples=2, rounding="nearest", progress=False)
    assert qmodel.dfqvit_record.samples == 5
    with pytest.warns(
        UserWarning, match="iters was 3 and calib given images, which no synthesis makes; it changes nothing"
    ):
        dfqvit.quantize(model, 8, calib=images, iters=3, rounding="nearest", progress=False)
    with pytest.warns(UserWarning, match="iters was 3 and calib 'noise', which no synthesis makes"):
        dfqvit.quantize(model, 8, calib="noise", samples=2, iters=3, rounding="nearest", progress=False)
    for calib in (images, list(images)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="samples was")
            qmodel = dfqvit.quantize(model, 8, calib=calib, samples=5, rounding="nearest", progress=False)
        assert qmodel.dfqvit_record.samples == 5


def test_masked_pixels_are_refused(seed):
    """Found here: what lay behind the mask was taken, as where a sensor's dead pixels hold its greatest value."""
    images = (torch.rand(4, 3, 8, 8) * 2 - 1).numpy()
    plain = given_images(images, PREPARED)
    masked = np.ma.masked_array(images, mask=np.zeros(images.shape, bool))
    assert torch.equal(given_images(masked, PREPARED), plain)
    masked[1, 0, :, 2] = np.ma.masked
    for calib in (masked, list(masked)):
        with pytest.raises(
            UsageError, match=r"calib was a masked array with 8 masked values; a model sees every pixel"
        ):
            given_images(calib, PREPARED)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("meta", lambda images: images.to("meta")),
        ("sparse_coo", lambda images: images.to_sparse()),
        ("nested", lambda images: torch.nested.nested_tensor(list(images))),
        ("_mkldnn", lambda images: images.to_mkldnn()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_dense_values_are_refused(seed, kind, make):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with pytest.raises(
        UsageError, match=rf"calib was a tensor of kind '{kind}'; it must be a dense tensor \[n, 3, 8, 8\]"
    ):
        given_images(make(images), PREPARED)
    with pytest.raises(UsageError, match="calib was a tensor of kind 'meta'"):
        given_images(list(images.to("meta")), PREPARED)
