"""Networks whose timm model was changed: what calibration scales must be read nowhere else, and a copy must run by itself."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm

from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.equalize import equalize
from dfqvit.calibration.rotate import rotate_heads
from dfqvit.errors import UsageError
from dfqvit.models.copying import copied
from dfqvit.quantization.layers import QuantLinear
from dfqvit.quantization.recipe import Recipe

from ..conftest import small_vit
from .test_equalize import widen


class Network(nn.Module):
    """Holds a timm model and calls it."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


class Keeping(Network):
    """Gives, beside the logits, what a hook kept of its first norm."""

    def __init__(self, body: Any) -> None:
        super().__init__(body)
        self.kept: dict[str, torch.Tensor] = {}
        body.blocks[0].norm1.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.kept["norm1"] = output

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x), self.kept["norm1"]


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _shared_norm(body: Any) -> nn.Module:
    body.blocks[1].norm1 = body.blocks[0].norm1
    return Network(body)


def _shared_gain(body: Any) -> nn.Module:
    body.blocks[0].norm2.weight = body.blocks[0].norm1.weight
    return Network(body)


def _parametrized(body: Any) -> nn.Module:
    for block in body.blocks:
        parametrize.register_parametrization(block.norm1, "weight", Double())
    return Network(body)


def _shared_mlp(body: Any) -> nn.Module:
    body.blocks[1].mlp = body.blocks[0].mlp
    return Network(body)


def _shared_attention(body: Any) -> nn.Module:
    body.blocks[1].attn = body.blocks[0].attn
    return Network(body)


def _own_forward(body: Any) -> nn.Module:
    for part in (body.blocks[0].attn, body.blocks[1].mlp, body.blocks[1].norm1):
        part.forward = types.MethodType(_squared, part)
    return Network(body)


def _squared(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return type(self).forward(self, x, *args, **kwargs).square()


CHANGES = (
    _shared_norm,
    _shared_gain,
    _parametrized,
    _shared_mlp,
    _shared_attention,
    _own_forward,
    Keeping,
)


def outputs(network: Any, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = network(images)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize(("change", "a_bits"), [*((change, 8) for change in CHANGES), (_shared_norm, 4)])
def test_the_function_stays_whatever_is_shared(seed: int, change: Any, a_bits: int) -> None:
    body = small_vit(depth=2)
    widen(body, 60.0)
    network, images = change(body).eval(), torch.randn(2, 3, 32, 32)
    wanted = outputs(network, images)
    qmodel = convert(network, Recipe(8, a_bits))
    equalize(qmodel, images)
    rotate_heads(qmodel)
    for found, expected in zip(outputs(qmodel, images), wanted, strict=True):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


class Reading(Network):
    """Calls one of the norms itself, which no structure shows."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens = self.body.forward_features(x)
        return self.body.forward_head(tokens), self.body.blocks[0].norm2(tokens)


def test_a_norm_that_a_network_reads_itself_is_not_scaled_without_a_word(seed: int) -> None:
    body, images = small_vit(depth=2), torch.randn(4, 3, 32, 32)
    widen(body, 60.0)
    qmodel = convert(Reading(body).eval(), Recipe(8))
    with pytest.raises(UsageError, match=r"scaling was 'channels' and the model a Reading, .* it may be 'none'"):
        calibrate(qmodel, images, Recipe(8))
    calibrate(convert(Reading(body).eval(), Recipe(8, scaling="none")), images, Recipe(8, scaling="none"))


@pytest.mark.parametrize("place", ["body", "body.blocks.0", "body.blocks.1.attn"])
def test_a_copy_that_calls_the_model_itself_is_refused(seed: int, place: str) -> None:
    network = Network(small_vit(depth=2)).eval()
    module: Any = network.get_submodule(place)
    own = module.forward
    module.forward = lambda x, **kwargs: 2 * own(x, **kwargs)
    with pytest.raises(
        UsageError, match=r"a copy calls 'body\..* of the model itself, by a function .* types.MethodType"
    ):
        convert(network, Recipe(8))
    assert not any(each._forward_pre_hooks for each in network.modules())


@pytest.mark.parametrize("gradients", [True, False])
def test_weights_that_hooks_compute_stay_what_they_are(seed: int, gradients: bool) -> None:
    body, images = small_vit(depth=2), torch.randn(4, 3, 32, 32)
    prune.l1_unstructured(body.blocks[0].mlp.fc1, "weight", 0.5)
    weight_norm(body.blocks[1].mlp.fc2)
    network = Network(body).eval()
    with torch.set_grad_enabled(gradients):
        wanted = network(images).detach()
    qmodel = convert(network, Recipe(8))
    assert torch.allclose(qmodel(images).detach(), wanted, atol=1e-4)
    layers = {name for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}
    assert "body.blocks.0.mlp.fc2" in layers
    assert not {"body.blocks.0.mlp.fc1", "body.blocks.1.mlp.fc2"} & layers


def test_a_copy_of_what_was_kept_of_a_call_with_gradients(seed: int) -> None:
    network, images = Keeping(small_vit(depth=1)).eval(), torch.randn(2, 3, 32, 32)
    network(images)
    twin = copied(network)
    assert torch.equal(twin.kept["norm1"], network.kept["norm1"])
    assert not twin.kept["norm1"].requires_grad
    assert network.kept["norm1"].requires_grad
    calibrate(convert(network, Recipe(8)), images, Recipe(8))


def test_a_layer_writes_into_no_bias_of_anothers(seed: int) -> None:
    first, second = nn.Linear(5, 4), nn.Linear(3, 4)
    first.bias = second.bias
    layer, before = QuantLinear.from_float(first, 8, 8, "mse"), second.bias.detach().clone()
    layer.bias.add_(1)
    assert torch.equal(second.bias, before)
