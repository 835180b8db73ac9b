"""Methods replaced on the classes of timm and torch.nn: refused, since the quantized model computes what they define."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

import pytest
import timm
import timm.layers
import torch
from timm.models import vision_transformer
from torch import nn

import dfqvit
from dfqvit import UsageError
from dfqvit.models import ModelSpec
from dfqvit.models.spec import _replaced_method, expect_own_methods

from .. import networks
from ..conftest import small_vit


@pytest.mark.filterwarnings("ignore:Importing from")
def test_no_class_of_timm_and_torch_has_a_method_of_another():
    kinds = set()
    for package in (timm.models, timm.layers, nn.modules):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            kinds |= {each for each in vars(module).values() if inspect.isclass(each) and issubclass(each, nn.Module)}
    assert len(kinds) > 800
    assert {kind: said for kind in kinds if (said := _replaced_method(kind))} == {}


def doubled(original):
    return lambda self, *args, **kwargs: 2 * original(self, *args, **kwargs)


def wrapped(original):
    return functools.wraps(original)(doubled(original))


def not_compiled(original):
    return torch.compiler.disable(doubled(original))


def another(original):
    return vision_transformer.LayerScale.forward


@pytest.mark.parametrize("way", [doubled, wrapped, not_compiled, another])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (vision_transformer.Attention, "forward"),
        (vision_transformer.Block, "forward"),
        (timm.layers.Mlp, "forward"),
        (vision_transformer.VisionTransformer, "forward"),
        (nn.Linear, "forward"),
    ],
)
def test_a_forward_replaced_on_a_class_is_refused(monkeypatch, seed, kind, method, way):
    model = small_vit()
    monkeypatch.setattr(kind, method, way(getattr(kind, method)))
    with pytest.raises(
        UsageError, match=rf"\.{kind.__name__}, on which class forward was replaced by .*; undo that"
    ) as error:
        dfqvit.quantize(model, calib="noise", samples=2, rounding="nearest")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("build", [None, "tests.networks:segmenter"])
def test_also_what_forward_calls_and_in_a_network(monkeypatch, seed, build):
    monkeypatch.setattr(
        vision_transformer.VisionTransformer, "pool", doubled(vision_transformer.VisionTransformer.pool)
    )
    with pytest.raises(
        UsageError, match=r"model holds 'VisionTransformer', .* pool was replaced by a function of tests"
    ):
        ModelSpec.of(small_vit())
    with pytest.raises(UsageError, match=r"model holds 'backbone', .* pool was replaced by a function of tests"):
        dfqvit.quantize(networks.segmenter(), build=build, calib="noise", samples=2)


def test_what_changes_no_output_is_taken(monkeypatch):
    """Fresh values are never needed: people skip them to build faster."""
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)
    expect_own_methods(small_vit())
