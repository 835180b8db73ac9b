"""`extension.gathered`: a contiguous copy equals torch's, whatever the strides, dtypes and threads."""

from __future__ import annotations

import pytest
import torch

from dfqvit.kernels import extension

from ..conftest import threads


def views(x):
    """Views of a tensor [2, 3, 24, 32] with all kinds of strides."""
    patches = x.unflatten(3, (2, 16)).unflatten(2, (3, 8))
    yield patches.permute(0, 2, 4, 1, 3, 5)  # of an image, as ViT takes them
    yield patches.permute(0, 2, 4, 3, 5, 1)
    yield x.permute(0, 2, 3, 1)
    yield x[:, 1:, 3:20, 5:31]
    yield x[:, :, ::2, ::3]
    yield x[0, 0, 0, :7]
    yield x[:, :, :, :1].expand(2, 3, 24, 9)
    yield x[:1, :1].expand(5, 4, 24, 32)
    yield x.flatten()
    yield x[:0]
    yield x[0, 0, 0, 0]
    for _ in range(5):
        yield x.permute(*torch.randperm(4).tolist())[..., int(torch.randint(2, ())) :]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.uint8])
def test_a_copy_equals_torchs(seed, dtype, count):
    with threads(count):
        for view in views((100 * torch.randn(2, 3, 24, 32)).to(dtype)):
            found = extension.gathered(view)
            assert found.is_contiguous()
            assert found.dtype == dtype
            assert torch.equal(found, view)
            assert not view.numel() or found.data_ptr() != view.data_ptr()


@pytest.mark.parametrize("count", [1, 3])
def test_patches_of_many_images(seed, count):
    """Enough for several threads, with sizes that nothing divides."""
    with threads(count):
        x = torch.randn(7, 3, 70, 85)[:, :, :, 1:]
        patches = x.unflatten(3, (6, 14)).unflatten(2, (5, 14)).permute(0, 2, 4, 1, 3, 5)
        assert torch.equal(extension.gathered(patches), patches)
        assert torch.equal(extension.gathered(torch.conj(x.to(torch.complex64)).imag), -torch.zeros_like(x))
