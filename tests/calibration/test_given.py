"""Tensors of calibration images that hold no values, or none in rows."""

from __future__ import annotations

import pytest
import torch

from dfqvit.calibration.given import given_images
from dfqvit.errors import UsageError
from dfqvit.models.preprocessing import Preprocessing

PREPARED = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


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
