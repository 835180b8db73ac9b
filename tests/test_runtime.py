"""The integer runtime against the simulated model of the same file, and as a backbone."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from dfqvit.adapters import find_adapter
from dfqvit.calibration import calibrate, convert
from dfqvit.correction import add_corrections
from dfqvit.recipe import Recipe
from dfqvit.runtime import accelerate

from .conftest import small_swin, small_vit


def quantized(model, w_bits=8, acm="none"):
    """(a quantized copy, images): calibrated on images of the same kind."""
    images = torch.randn(12, 3, *model.patch_embed.img_size)
    qmodel = convert(model, Recipe(w_bits))
    calibrate(qmodel, images[:8], Recipe(w_bits))
    add_corrections(model, qmodel, images[:8], acm)
    return qmodel, images[8:]


def close(found, expected):
    """Rounding may tip a value to the next integer here and there: small against the spread, and rare."""
    spread = expected.std()
    return float((found - expected).abs().mean()) < 0.02 * float(spread)


@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_same_logits_as_the_simulated_model(model, w_bits):
    qmodel, images = quantized(model, w_bits)
    expected = qmodel(images)
    assert accelerate(qmodel) == {}
    assert close(qmodel(images), expected)


def test_correction_rides_in_the_chain(model):
    qmodel, images = quantized(model, 4, acm="sequential")
    expected = qmodel(images)
    accelerate(qmodel)
    assert close(qmodel(images), expected)
    without = copy.deepcopy(qmodel)
    adapter = find_adapter(without)
    adapter.set_acm(0, None)
    assert not torch.equal(without(images), qmodel(images))


def test_features_agree_at_every_stage(model):
    qmodel, images = quantized(model)
    expected = qmodel.forward_intermediates(images)
    accelerate(qmodel)
    found = qmodel.forward_intermediates(images)
    assert close(found[0], expected[0])
    assert len(found[1]) == len(expected[1]) > 1
    assert all(close(ours, theirs) for ours, theirs in zip(found[1], expected[1], strict=True))


def test_state_dict_and_input_stay_as_they_were(model):
    qmodel, images = quantized(model)
    before, kept = {k: v.clone() for k, v in qmodel.state_dict().items()}, images.clone()
    accelerate(qmodel)
    qmodel(images)
    after = qmodel.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(images, kept)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: small_vit(init_values=0.1), "ls1"),
        (lambda: small_vit(qk_norm=True), "q_norm"),
        (lambda: small_vit(act_layer="relu"), "ReLU"),
        (lambda: small_swin(img_size=28), "padded"),
    ],
)
def test_what_it_does_not_know_stays_simulated(seed, make, reason):
    qmodel, images = quantized(make())
    expected = qmodel(images)
    skipped = accelerate(qmodel)
    assert skipped
    assert all(reason in why for why in skipped.values())
    assert close(qmodel(images), expected)


def test_any_batch_size_from_several_threads(model):
    qmodel, images = quantized(model)
    accelerate(qmodel)
    expected = [qmodel(images[:n]) for n in range(5)]
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            n = int(torch.randint(0, 5, (), generator=generator))
            if not torch.allclose(qmodel(images[:n]), expected[n], atol=1e-5):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_failed_call_leaves_the_model_usable(model):
    qmodel, images = quantized(model)
    accelerate(qmodel)
    expected = qmodel(images)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        qmodel(images[:, :, :-1])
    assert torch.equal(qmodel(images), expected)
