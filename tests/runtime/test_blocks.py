"""The integer runtime against the simulated model of the same file, and as a backbone."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from timm.layers import Attention, Mlp, QuickGELU
from torch.utils._python_dispatch import TorchDispatchMode

import dfqvit
from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.correction import add_corrections
from dfqvit.kernels import extension, use_backend
from dfqvit.models.adapters import find_adapter
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.attention import IntegerOperands
from dfqvit.runtime.block import IntegerBlock
from dfqvit.runtime.vit import IntegerVitBlock

from ..conftest import each_path, made_once, small_clip, small_swin, small_vit
from ..conftest import threads as set_threads


@made_once
def quantized(model, w_bits=8, acm="none"):
    """(a quantized copy, images): calibrated on images of the same kind."""
    # Sixteen to compare on: where a value tips, an image's logits move by all of the rounding error, and of four all may.
    images = torch.randn(24, 3, *model.patch_embed.img_size)
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
    "make",
    [
        lambda: small_vit(qk_norm=True),
        lambda: small_vit(act_layer="relu"),
        lambda: small_swin(img_size=28),  # its windows are padded
    ],
)
def test_a_block_that_is_not_known_as_a_whole_runs_part_by_part(seed, make):
    qmodel, images = quantized(make())
    expected = qmodel(images)
    assert accelerate(qmodel) == {}
    assert not any(isinstance(module, IntegerBlock) for module in qmodel.modules())
    assert any(isinstance(module, IntegerOperands) for module in qmodel.modules())
    with Operators() as operators:
        assert close(qmodel(images), expected)
    assert {"dfqvit::quantize_heads", "dfqvit::quant_attention", "dfqvit::quant_linear"} <= operators.called


class Operators(TorchDispatchMode):
    """Which operators are called during the `with` block."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.name())
        return func(*args, **(kwargs or {}))


def test_products_that_are_not_known_stay_float_and_are_reported(seed):
    class Attend(Attention):
        pass

    model = small_vit()
    model.blocks[1].attn.__class__ = Attend
    qmodel, images = quantized(model)
    expected = qmodel(images)
    assert accelerate(qmodel) == {"blocks.1": "its attn is a Attend, whose own products stay float"}
    assert close(qmodel(images), expected)


def test_a_norm_that_holds_another_dtype_is_named_with_that(seed):
    qmodel, _ = quantized(small_vit())
    norm = qmodel.blocks[1].norm2
    norm.bias.data = norm.bias.data.half()
    assert IntegerVitBlock.why_not(qmodel.blocks[1]) == "a norm holds torch.float16, not float32"


def soak_script():
    place = Path(__file__).parent.parent.parent / "scripts" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_any_batch_size_from_several_threads_through_failures_and_cancellations(model, seed):
    """A few hundred calls; `scripts/soak.py` does ten thousand."""
    qmodel, _ = quantized(model, 4)
    accelerate(qmodel)
    soak = soak_script().Soak(qmodel, (3, *model.patch_embed.img_size), seed)
    found = soak.run(300, threads=4)
    assert found["calls"] >= 300
    assert soak.wrong == []


def test_the_soak_notices_a_wrong_bit_and_a_growing_memory(seed):
    class Leaky(torch.nn.Module):
        calls, held = 0, ()

        def forward(self, x):
            if not torch.isfinite(x).all() or x.shape[-2:] != (32, 32):
                raise ValueError("refused")
            self.calls += 1
            self.held = (*self.held, torch.ones(1 << 16))  # 256 KB
            return x.sum((2, 3)) + (1e-2 if self.calls > 200 else 0)

    soak = soak_script().Soak(Leaky(), (3, 32, 32), seed)
    found = soak.run(400, threads=2)
    assert found["wrong"] > 0
    assert "differ by up to" in soak.wrong[-1]
    assert soak.growth() > 30e6


def test_a_failed_call_leaves_the_model_usable(model):
    qmodel, images = quantized(model)
    accelerate(qmodel)
    expected = qmodel(images)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        qmodel(images[:, :, :-1])
    assert torch.equal(qmodel(images), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_prepared_block_gives_the_bits_of_the_operator(model, threads):
    """Whether threads take images or share rows, prepared once or made for the call."""
    qmodel, _images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    blocks = find_adapter(qmodel).blocks()
    if extension.load()[0] is None:
        pytest.skip("dfqvit._C is not built")
    with set_threads(threads):
        for block in (blocks[0], blocks[-1]):
            side = getattr(block, "input_resolution", None)
            shape = side if side else (16 + model.num_prefix_tokens,)
            for batch in (0, 1, 3, 9):
                x = torch.randn(batch, *shape, block.norm1.weight.numel())
                with use_backend("reference", "quant_block"):
                    expected = block(x)
                assert torch.equal(block(x), expected)
                with torch.no_grad():
                    prepared = block.__dict__["_prepared"](x.flatten(1, -2))
                assert prepared is not None  # where nothing watches it answers
                assert torch.equal(prepared.view_as(x), expected)


def test_a_block_refuses_what_it_was_not_made_for(model):
    qmodel, images = quantized(model, acm="sequential")
    accelerate(qmodel)
    qmodel(images)
    block = find_adapter(qmodel).blocks()[-1]
    channels = block.norm1.weight.numel()
    with pytest.raises((ValueError, RuntimeError)):
        block(torch.randn(2, 4, channels + 1))
    if not hasattr(block, "input_resolution"):
        with pytest.raises(ValueError, match="acm was made for"):
            block(torch.randn(2, 4, channels))


def check_paths(qmodel, images):
    """All but `portable` give the same bits; its exponentials are the C library's, and its products and sums are not fused."""
    found = {path: qmodel(images) for path in each_path()}
    fast = [logits for path, logits in found.items() if path != "portable"]
    assert all(torch.equal(logits, fast[0]) for logits in fast)
    assert all(close(found["portable"], logits) for logits in fast)


def test_paths_of_the_processor_give_the_same_bits(model):
    qmodel, images = quantized(model, 4, acm="sequential")
    accelerate(qmodel)
    check_paths(qmodel, images)


@pytest.mark.parametrize("w_bits", [8, 4])
def test_layer_scale_rides_in_the_scales_of_the_layers(seed, w_bits):
    """Gains of both signs, of every size, and of nothing at all; a change of one is taken up."""
    model = small_vit(init_values=0.5)
    with torch.no_grad():
        for block in model.blocks:
            for scale in (block.ls1, block.ls2):
                scale.gamma.copy_(torch.randn_like(scale.gamma))
                scale.gamma[:3] = torch.tensor([0.0, 1e-30, -1e-5])
    qmodel, images = quantized(model, w_bits, acm="sequential")
    expected = qmodel(images)
    assert accelerate(qmodel) == {}
    assert close(qmodel(images), expected)
    before = qmodel(images)
    with torch.no_grad():
        qmodel.blocks[-1].ls2.gamma.mul_(-1)
    assert not torch.equal(qmodel(images), before)
    simulated = copy.deepcopy(qmodel)
    for block in simulated.blocks:
        block.__class__ = type(block).family
    assert close(qmodel(images), simulated(images))


class Slower(QuickGELU):
    """A user's own, which may compute anything."""

    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("w_bits", [8, 4, 3])
def test_clip_with_quick_gelu_runs_in_integers(seed, isa, w_bits):
    model = small_clip()
    assert type(model.blocks[0].mlp.act) is QuickGELU
    qmodel, images = quantized(model, w_bits, acm="sequential")
    expected = qmodel(images)
    assert accelerate(qmodel) == {}
    found = qmodel(images)
    assert close(found, expected)
    if w_bits == 8:
        wanted = model(images).detach()
        assert float((found - wanted).norm() / wanted.norm()) < 0.1
    x = torch.randn(3, 17, 48)
    with use_backend("reference", "quant_block"):
        one_by_one = qmodel.blocks[0](x)
    assert torch.equal(qmodel.blocks[0](x), one_by_one)
    for block in qmodel.blocks:
        block.mlp.act = torch.nn.GELU()
    assert not torch.equal(qmodel(images), found)  # the activation is not taken for another


def test_clip_with_quick_gelu_is_saved_exported_and_differentiated(seed, tmp_path):
    model = small_clip()
    images = torch.randn(8, 3, 32, 32)
    qmodel = dfqvit.quantize(model, 4, calib=images, rounding="nearest")
    assert set(dfqvit.integer_report(qmodel).values()) == {""}
    expected = qmodel(images)
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "clip.safetensors"))
    assert torch.equal(loaded(images), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(qmodel, (images,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(images[:3]), qmodel(images[:3]))
    wanted = images.clone().requires_grad_()
    qmodel(wanted).square().mean().backward()
    assert float(wanted.grad.abs().sum()) > 0


def test_an_activation_derived_from_quick_gelu_is_not_taken_for_it(seed):
    model = small_clip(act_layer=Slower)
    qmodel, images = quantized(model)
    expected = qmodel(images)
    assert accelerate(qmodel) == {}  # the activation is computed in float, between two layers in integers
    assert all(type(block.mlp) is Mlp for block in qmodel.blocks)
    assert close(qmodel(images), expected)


def test_a_gain_of_nothing_leaves_the_residual_as_it_is(seed):
    model = small_vit(init_values=0.5, depth=1)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.zero_()
        model.blocks[0].ls2.gamma.zero_()
    qmodel, _ = quantized(model)
    accelerate(qmodel)
    x = torch.randn(2, 17, 48)
    assert torch.equal(qmodel.blocks[0](x), x)
