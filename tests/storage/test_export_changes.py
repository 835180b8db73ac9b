"""What was changed in a quantized model before it is exported to ONNX: followed, or refused as `save` does."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dfqvit
from dfqvit.storage.export import export_onnx

from .. import networks
from ..conftest import MODELS, SMALL, made_once
from .runtimes import onnx_session

quantize = made_once(dfqvit.quantize)
REFUSED = {
    "activation": (lambda q: setattr(q.blocks[0].mlp, "act", nn.ReLU()), "'blocks.0.mlp.act' is a ReLU"),
    "eps": (lambda q: setattr(q.norm, "eps", 1.0), "'norm.eps' is 1.0; load would build 1e-06"),
    "scale": (lambda q: setattr(q.blocks[0].attn, "scale", 0.5), "'blocks.0.attn.scale' is 0.5"),
    "pooling": (lambda q: setattr(q, "global_pool", "avg"), "'global_pool' is 'avg'"),
    "forward": (
        lambda q: setattr(q.blocks[0].mlp, "forward", lambda x: 0 * x),
        "'blocks.0.mlp' has a forward of its own",
    ),
    "blocks": (lambda q: setattr(q, "blocks", q.blocks[:1]), "'blocks.1.* is not there"),
    "classifier": (lambda q: q.reset_classifier(5), r"'head.bias' is \(\(5,\)"),
}


@pytest.fixture(autouse=True, scope="module")
def needs_onnx():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def small(family, **settings):
    return quantize(
        MODELS[family](**settings),
        8,
        calib=torch.randn(4, 3, 32, 32),
        rounding="nearest",
        model_kwargs={**SMALL[family], **settings},
        progress=False,
    )


def onnx_logits(path, images):
    return torch.from_numpy(onnx_session(path).run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("change", list(REFUSED))
def test_a_change_that_no_file_holds_is_refused(seed, tmp_path, change):
    make, found = REFUSED[change]
    qmodel = small("vit", depth=2)
    make(qmodel)
    with pytest.raises(dfqvit.UsageError, match=f"qmodel was changed after it was quantized .*{found}"):
        export_onnx(qmodel, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_hooks_that_a_file_does_not_hold_are_named(seed, tmp_path):
    qmodel = small("vit", depth=1)
    hook = qmodel.blocks[0].register_forward_hook(lambda module, args, result: 0.5 * result)
    with pytest.warns(
        UserWarning, match=r"qmodel has forward hooks on 'blocks.0', which the file does not hold"
    ) as told:
        export_onnx(qmodel, tmp_path / "m.onnx")
    assert [warning.filename for warning in told if "forward hooks" in str(warning.message)] == [__file__]
    hook.remove()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = qmodel(images)
    assert float((onnx_logits(tmp_path / "m.onnx", images) - expected).abs().mean()) < 0.02 * float(expected.std())


def test_another_input_size_is_exported(seed, tmp_path):
    """Swin's windows and masks are of the size that it has now."""
    qmodel = small("swin", depths=(2,), num_heads=(2,))
    qmodel.set_input_size((48, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_onnx(qmodel, tmp_path / "m.onnx")
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected = qmodel(images)
    assert float((onnx_logits(tmp_path / "m.onnx", images) - expected).abs().mean()) < 0.02 * float(expected.std())


def test_what_cannot_be_rebuilt_is_refused(tmp_path):
    with pytest.raises(dfqvit.UsageError, match="qmodel has no quantization record; export_onnx takes what"):
        export_onnx(MODELS["vit"](), tmp_path / "m.onnx")
    network = dfqvit.quantize(networks.segmenter(), calib="procedural", samples=2, rounding="nearest", progress=False)
    with pytest.raises(dfqvit.UsageError, match="qmodel is a network that was quantized without build"):
        export_onnx(network, tmp_path / "m.onnx")
