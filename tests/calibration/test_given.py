"""Tensors of calibration images that hold no values, or none in rows."""

from __future__ import annotations

import warnings

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
    for calib in (images, list(images)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="samples was")
            qmodel = dfqvit.quantize(model, 8, calib=calib, samples=5, rounding="nearest", progress=False)
        assert qmodel.dfqvit_record.samples == 5


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
