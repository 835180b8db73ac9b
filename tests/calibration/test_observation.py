"""A converted model computes what the float one does before it is frozen: that is looked at, on an image that says so."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

from dfqvit.calibration.observation import convert
from dfqvit.errors import UsageError
from dfqvit.quantization.recipe import Recipe

RECIPE = Recipe(8, 8, rounding="nearest")


def trained_like(architecture):
    """With statistics of batch normalisation that images of bounded values gave."""
    model = timm.create_model(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kernel, bias = parameter.dim() > 1, name.endswith("bias")
            parameter.normal_(float(not kernel and not bias), parameter[0].numel() ** -0.5 if kernel else 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(torch.randn(8, 3, 64, 64).clamp(-1, 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


@pytest.mark.parametrize("size", [64, 96])
def test_models_that_blow_up_beyond_their_images_are_taken(seed, size):
    """StarNet multiplies features by each other in every block; on images of 96 x 96 this one blows all of them up."""
    model = trained_like("starnet_s1")
    model.pretrained_cfg["input_size"] = (3, size, size)
    qmodel, x = convert(model, RECIPE), torch.rand(1, 3, 64, 64) - 0.5
    assert (qmodel(x) - model(x)).norm() < 1e-3 * model(x).norm()


class Different(nn.Module):
    """One that asks what its layers are."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList([nn.Linear(32, 32)])
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).mean(2)
        x = self.blocks[0](x) * (1 if isinstance(self.blocks[0], nn.Linear) else 1.01)
        return self.head(x)


@register_model
def different_test_model(pretrained=False, **_):
    model = Different()
    model.pretrained_cfg = {"architecture": "different_test_model", "input_size": (3, 32, 32)}
    return model


def test_a_model_that_computes_something_else_is_refused(seed):
    with pytest.raises(UsageError, match="a Different, which computes something else once its layers are replaced"):
        convert(timm.create_model("different_test_model").eval(), RECIPE)
