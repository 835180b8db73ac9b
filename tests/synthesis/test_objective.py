"""Synthesis against a network: entropy at its backbones, and a user's objective."""

from __future__ import annotations

import math

import pytest
import torch

import dfqvit
from dfqvit import UsageError
from dfqvit.kernels.patch_similarity_entropy.reference import patch_similarity_entropy as reference
from dfqvit.kernels.patch_similarity_entropy.reference import similarity_range
from dfqvit.models import Preprocessing
from dfqvit.synthesis import SynthesisConfig
from dfqvit.synthesis.step import Step

from .. import networks


def brightness(outputs):
    return outputs["out"][:, 1].mean()


def test_an_objective_is_lowered(seed):
    network = networks.segmenter()
    options = {"samples": 4, "iters": 30, "seed": 1, "spectrum": "free", "crop_lower": 1.0, "jitter": 0.0}
    without = dfqvit.synthesize(network, **options)
    found = dfqvit.synthesize(network, objective=lambda outputs: 1000 * brightness(outputs), **options)
    with torch.no_grad():
        assert brightness(network(found)) < brightness(network(without)) - 0.02


def test_the_terms_of_a_step(seed):
    """The entropy is that of the backbone's own features; the second term is the objective, or nothing."""
    network, given, kept = networks.segmenter(), [], []

    def noted(outputs):
        given.append(brightness(outputs))
        return given[-1]

    config = SynthesisConfig(samples=2, iters=1, crop_lower=1.0, jitter=0.0)
    plain, wanted = (Step(network, config, Preprocessing.of(network), each) for each in (None, noted))
    handles = [
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
        for block in network.backbone.blocks
    ]
    for step in (plain, wanted):
        step()
    for handle in handles:
        handle.remove()
    assert float(plain.terms[0, 1]) == 0
    assert float(wanted.terms[0, 1]) == float(given[0])
    assert float(plain.terms[0, 0]) == pytest.approx(float(wanted.terms[0, 0]), rel=1e-5)
    features = [each[:, 1:].unflatten(2, (3, 16)).mean(2) for each in kept[:3]]
    entropy = sum(float(reference(e, similarity_range(e), 10, 0.01, 1)[0].mean()) for e in (f[None] for f in features))
    assert float(plain.terms[0, 0]) == pytest.approx(-entropy, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            lambda outputs: outputs["out"],
            r"objective gave a tensor \[2, 5, 4, 4\] of torch.float32; it must give a scalar",
        ),
        (lambda outputs: 3.0, "objective gave a float"),
        (lambda outputs: torch.zeros(()), "without a gradient"),
        (7, "objective was 7; it may be a function"),
        (lambda outputs: outputs["out"].mean() * math.nan, "objective gave nan; it must give a finite number"),
        (lambda outputs: outputs["out"].mean().exp() * math.inf, "objective gave inf; it must give a finite number"),
        (lambda outputs: (0 * outputs["out"]).sqrt().mean(), "objective gave a gradient with NaN or Inf"),
    ],
)
def test_an_objective_that_is_none(seed, objective, said):
    with pytest.raises(UsageError, match=said):
        dfqvit.quantize(networks.segmenter(), samples=2, iters=2, objective=objective, progress=False)


def test_an_objective_without_synthesis_is_refused(seed):
    with pytest.raises(UsageError, match="objective was given; only synthetic images lower one"):
        dfqvit.quantize(networks.segmenter(), calib="noise", objective=brightness, progress=False)


def test_two_calls_of_one_backbone_are_two_layers_each(seed):
    network = networks.siamese()
    step = Step(network, SynthesisConfig(samples=2, iters=1), Preprocessing.of(network))
    features, _ = step._forward(step.images, torch.rand(2, step._draws.shape[2]), torch.ones(1))
    assert len(features.tensors) == 2 * len(network.left.blocks)
