"""The integer runtime as GPUs run it: the chain of Triton operators against the CPU's chain, in the interpreter or on a GPU."""

from __future__ import annotations

import functools

import pytest
import torch

import dfqvit
from dfqvit.kernels import use_backend
from dfqvit.kernels.quant_linear.op import forward as linear_operator
from dfqvit.models import load_model
from dfqvit.models.adapters import find_adapter
from dfqvit.runtime import set_runtime

from ..conftest import SHALLOW, shallow_demo
from ..kernels.interpreter import INTERPRETED, live_triton

DEVICE = "cpu" if INTERPRETED else "cuda"


@functools.cache
def shallow(name):
    """(a file's worth of quantized model, simulated; an image)."""
    torch.manual_seed(0)
    images = torch.randn(9, 1, 28, 28)
    options = {"quantizer": "minmax", "acm": "sequential", "runtime": "simulated", "model_kwargs": SHALLOW[name]}
    return dfqvit.quantize(shallow_demo(name), 4, 8, calib=images[:8], **options), images[8:]


@live_triton
@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_triton_chain_gives_the_logits_of_the_cpu(name, tmp_path):
    """Within 1 % of the logits' spread on average: an integer tips here and there, and the next layers carry it on."""
    quantized, images = shallow(name)
    path = dfqvit.save(quantized, tmp_path / "model.safetensors")
    expected = dfqvit.load(path, runtime="integer")(images)
    model = dfqvit.load(path, DEVICE, runtime="integer")
    with use_backend("triton"):  # of every operator that runs: one that had no Triton would raise
        found = model(images.to(DEVICE)).cpu()
        assert linear_operator.asked == "triton"
    blocks = find_adapter(model).blocks()
    assert all(type(block).__name__.startswith("Integer") for block in blocks)
    assert all("_prepared" not in block.__dict__ for block in blocks)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().mean()) < 0.01 * float(expected.std())
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert torch.equal(model(images.to(DEVICE)[:0]).cpu(), expected[:0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_auto_takes_the_chain_on_a_gpu(name):
    images = torch.randn(4, 1, 28, 28, device="cuda")
    quantized = dfqvit.quantize(load_model(name).cuda(), 4, 8, calib=images, quantizer="minmax")
    quantized(images)
    assert set(dfqvit.integer_report(quantized).values()) == {""}


@pytest.mark.skipif(INTERPRETED, reason="it runs no Triton")
@pytest.mark.parametrize("serving", [True, False])
def test_auto_asks_all_operators_for_kernels_on_the_device(model, monkeypatch, serving):
    """On a machine without a GPU: buffers on another device stand for it."""
    from .test_blocks import quantized

    qmodel, _ = quantized(model)
    asked = set()

    def fused_on(operator, device):
        asked.add((operator.name, device))
        return serving or operator.name != "quant_attention"

    monkeypatch.setattr(type(linear_operator), "fused_on", fused_on)
    set_runtime(qmodel.to("meta"), "auto")
    kinds = {type(block).__name__.startswith("Integer") for block in find_adapter(qmodel).blocks()}
    assert kinds == {serving}
    assert ("quant_attention", "meta") in asked
