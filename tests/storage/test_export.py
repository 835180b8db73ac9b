"""ONNX files in another runtime, and torch.export of both forms of a quantized model."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import timm
import torch
from timm.models.hiera import MaskUnitAttention

import dfqvit
from dfqvit import cli, demo
from dfqvit.evaluation.data import open_images, spread_images
from dfqvit.models import Preprocessing, load_model
from dfqvit.models.adapters import flattened
from dfqvit.storage.export import export_onnx

from .. import networks
from ..conftest import shallow_demo
from .runtimes import onnx_session


def quantized(name, w_bits=4, shallow=False, levels="uniform", **settings):
    """By default of levels that ONNX's INT4 holds."""
    model = shallow_demo(name) if shallow else load_model(name)
    real = spread_images(open_images(demo.TRAIN_SAMPLE, Preprocessing.of(model)), 16)
    return dfqvit.quantize(model, w_bits, calib=real, levels=levels, **settings)


@functools.cache
def of_noise():
    """A quantized model that is not looked into."""
    return dfqvit.quantize(shallow_demo("demo"), calib="noise", samples=2, rounding="nearest", levels="uniform")


def images(model, count):
    pixels = open_images(demo.TEST_IMAGES, model.dfqvit_record.preprocessing)
    found = [pixels[index] for index in range(count)]
    return torch.stack([x for x, _ in found]).float(), torch.tensor([y for _, y in found])


def runtime(path):
    session = onnx_session(path)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def openvino_runtime(path):
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(next(iter(compiled(x.numpy()).values())))


@pytest.fixture(autouse=True, scope="module")
def needs_onnx():
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.parametrize("int4", [True, False])
def test_int8_weights_have_zero_points_of_their_own(tmp_path, int4):
    """ONNX Runtime's exact products (`EXACT`) ended in an error without them."""
    import onnx

    export_onnx(quantized("demo", 4, shallow=True, rounding="nearest"), tmp_path / "m.onnx", int4=int4)
    graph = onnx.load(tmp_path / "m.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    int8 = [node for node in weights if tensors[node.input[0]].data_type == onnx.TensorProto.INT8]
    zeros = [onnx.numpy_helper.to_array(tensors[node.input[2]]) for node in int8]
    assert len({node.input[2] for node in int8}) == len(int8) == (2 if int4 else len(weights)) > 0
    for node, zero in zip(int8, zeros, strict=True):
        assert zero.dtype == np.int8
        assert zero.shape == tuple(tensors[node.input[1]].dims)
        assert not zero.any()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("demo-swin", {"w_bits": 3, "acm": "sequential", "levels": "nonuniform"}),
        ("demo", {"placement": "psaq", "a_bits": 6}),
        ("demo", {"w_bits": 3, "a_bits": 5, "levels": "nonuniform"}),
    ],
)
def test_onnx_runtime_agrees(tmp_path, name, settings):
    qmodel = quantized(name, rounding="nearest", **settings)
    written = export_onnx(qmodel, tmp_path / "m.onnx")
    x, labels = images(qmodel, 1000)
    with torch.no_grad():
        ours = qmodel(x)
    theirs = runtime(tmp_path / "m.onnx")(x)
    integers = "INT8" if "levels" in settings else "INT4"
    assert written["weights"][integers] >= 16
    assert written["bytes"] < 600_000
    assert abs(float((ours.argmax(1) == labels).float().mean() - (theirs.argmax(1) == labels).float().mean())) <= 0.004
    assert float((ours - theirs).abs().mean() / ours.abs().mean()) < (0.01 if settings.get("a_bits") != 5 else 0.03)


@pytest.mark.parametrize(("name", "opset"), [("demo", 18), ("demo-swin", 23)])
def test_opsets(tmp_path, name, opset):
    import onnx

    qmodel = quantized(name, shallow=True, rounding="nearest")
    written = export_onnx(qmodel, tmp_path / "m.onnx", int4=opset >= 21, opset=opset)
    assert written["opset"] == opset
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import}[""] == opset
    x, _ = images(qmodel, 50)
    with torch.no_grad():
        ours = qmodel(x)
    assert float((ours - runtime(tmp_path / "m.onnx")(x)).abs().mean() / ours.abs().mean()) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset was 17; it may be 18 to 23"),
        ({"opset": 24}, "opset was 24; it may be 18 to 23"),
        ({"opset": "21"}, "opset was '21'; it may be 18 to 23"),
        ({"opset": 18}, "opset was 18; weights of 4 bits or fewer need 21 as INT4"),
    ],
)
def test_an_opset_that_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(dfqvit.UsageError, match=message):
        export_onnx(of_noise(), tmp_path / "m.onnx", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "layer"), [("demo", "blocks.0.mlp.fc2"), ("demo-convnext", "stages.1.downsample.1"), ("demo-deit3", "")]
)
def test_factors_of_channels_are_exported(tmp_path, name, layer):
    """Such as the equalization of outliers gives; also in patches, whose inputs the CPU's kernels take in another order."""
    qmodel = quantized(name, 8, shallow=True, rounding="nearest")
    if layer:
        chosen = qmodel.get_submodule(layer)
        chosen.exponents = torch.randint(-1, 2, (chosen.in_features,), dtype=torch.int8)
    export_onnx(qmodel, tmp_path / "m.onnx")
    x, _ = images(qmodel, 50)
    with torch.no_grad():
        ours = qmodel(x)
    assert float((ours - runtime(tmp_path / "m.onnx")(x)).abs().mean() / ours.abs().mean()) < 0.01


@pytest.mark.parametrize(("name", "w_bits"), [("demo", 3), ("demo", 8), ("demo-swin", 4)])
def test_openvino_agrees(tmp_path, name, w_bits):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    qmodel = quantized(name, w_bits)
    export_onnx(qmodel, tmp_path / "m.onnx")
    theirs = openvino_runtime(tmp_path / "m.onnx")
    x, _ = images(qmodel, 400)
    with torch.no_grad():
        ours = qmodel(x)
    assert float((ours.argmax(1) == theirs(x).argmax(1)).float().mean()) >= 0.98


def test_command_weights_are_integers_and_the_batch_is_free(tmp_path, capsys):
    import onnx

    qmodel = quantized("demo", shallow=True, rounding="nearest")
    dfqvit.save(qmodel, tmp_path / "m.safetensors")
    arguments = ["export", str(tmp_path / "m.safetensors"), "--onnx", str(tmp_path / "m.onnx")]
    (tmp_path / "m.onnx").write_bytes(b"mine")
    assert cli.run(arguments) == 2
    assert "exists already; give --force" in capsys.readouterr().err
    assert (tmp_path / "m.onnx").read_bytes() == b"mine"
    assert cli.run([*arguments, "--force"]) == 0
    said = capsys.readouterr().out
    assert "weights 4 INT4, 2 INT8, 10 activations" in said
    assert "without VNNI ONNX Runtime needs session.x64quantprecision=1" in said

    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.safetensors"]
    assert cli.run([*arguments[:-1], str(tmp_path / "m.txt")]) == 2
    assert "must end in .onnx" in capsys.readouterr().err
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    integers = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith("integers")}
    produced = {name: node for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type == "MatMul":
            assert [produced[name].op_type for name in node.input] == ["DequantizeLinear"] * 2
    fc1 = qmodel.get_submodule("blocks.0.mlp.fc1")
    assert np.array_equal(
        integers["blocks.0.mlp.fc1.weight_integers"].T,
        dfqvit.kernels.unpack_weight(fc1.weight_packed, 4, fc1.in_features).numpy(),
    )
    floats = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(t.dims) for t in floats) <= qmodel.pos_embed.numel()
    assert json.loads({p.key: p.value for p in proto.metadata_props}["dfqvit_record"])["recipe"]["w_bits"] == 4
    assert str(dfqvit.__path__[0]).encode() not in proto.SerializeToString()
    run = runtime(tmp_path / "m.onnx")
    x, _ = images(qmodel, 5)
    assert torch.equal(run(x)[:1].argmax(1), run(x[:1]).argmax(1))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dfqvit.storage.export.NEEDED", ("no_such_onnx",))
    with pytest.raises(ValueError, match=r"needs no_such_onnx; install dfqvit\[export\]"):
        export_onnx(of_noise(), tmp_path / "x.onnx")


@pytest.mark.parametrize("form", ["simulated", "integer"])
@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_torch_export(name, form):
    qmodel = dfqvit.quantize(load_model(name), calib="noise", samples=2, rounding="nearest", runtime=form)
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        program = torch.export.export(qmodel, (x,), strict=False)
        assert torch.equal(program.module()(x), qmodel(x))


@pytest.mark.parametrize("name", ["shallow_segmenter", "shallow_pair"])
def test_a_network_in_onnx_runtime(seed, tmp_path, name):
    network = getattr(networks, name)()
    settings = {"calib": "procedural", "samples": 4, "rounding": "nearest", "runtime": "simulated"}
    qmodel = dfqvit.quantize(network, build=f"tests.networks:{name}", **settings)
    export_onnx(qmodel, tmp_path / "network.onnx")
    session = onnx_session(tmp_path / "network.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == {"shallow_segmenter": ["out"], "shallow_pair": ["output_0", "output_1"]}[name]
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        wanted = flattened(qmodel(x))
    for theirs, ours in zip(session.run(None, {"images": x.numpy()}), wanted, strict=True):
        assert float((torch.from_numpy(theirs) - ours).norm() / ours.norm()) < 0.02


class Selecting(networks.Segmenter):
    """Other shapes where many scores are above 0."""

    def forward(self, x):
        scores = super().forward(x)["out"].flatten()
        return scores[:4] if int((scores > 0).sum()) > 3 else scores


class OwnAttention(MaskUnitAttention):
    """Not timm's class, so its products stay its own."""


def hiera(own=True):
    sizes = {"img_size": 32, "embed_dim": 16, "stages": (1, 1), "q_pool": 1, "mask_unit_size": (4, 4), "num_classes": 7}
    model = timm.create_model("hiera_tiny_224", **sizes).eval()
    torch.nn.init.normal_(model.get_classifier().weight)  # timm's is of zeros
    for block in model.blocks if own else ():
        block.attn.__class__ = OwnAttention
    return torch.nn.Sequential(model) if own else model


@pytest.mark.parametrize("own", [False, True])
def test_an_attention_of_five_dimensions(seed, tmp_path, own):
    """Hiera's: torch has no ONNX for the function that it calls, and ended with its third step of three."""
    model, calib = hiera(own), torch.rand(4, 3, 32, 32) * 2 - 1
    qmodel = dfqvit.quantize(
        model, 8, calib=calib, rounding="nearest", scaling="none", progress=False, build=hiera if own else None
    )
    assert any("own products" in reason for reason in dfqvit.integer_report(qmodel).values()) == own
    export_onnx(qmodel, tmp_path / "m.onnx")
    with torch.no_grad():
        expected = qmodel(calib)
    assert float((runtime(tmp_path / "m.onnx")(calib) - expected).abs().mean() / expected.abs().mean()) < 0.02


def selecting():
    return Selecting(depth=1).eval()


def test_shapes_that_depend_on_values_are_said_in_a_sentence(seed, tmp_path):
    qmodel = dfqvit.quantize(selecting(), calib="procedural", samples=2, rounding="nearest", build=selecting)
    with pytest.raises(dfqvit.DfqvitError, match="whose shapes do not depend on values") as error:
        export_onnx(qmodel, tmp_path / "network.onnx")
    assert "\n" not in str(error.value)


class Counting(networks.Segmenter):
    """`len` gives a number, so torch's trace is of that many images."""

    def forward(self, x):
        return super().forward(x)["out"].reshape(len(x), -1)


def counting():
    return Counting(depth=1).eval()


def test_a_number_of_images_that_is_fixed_is_told(seed, tmp_path):
    qmodel = dfqvit.quantize(counting(), calib="procedural", samples=2, rounding="nearest", build=counting)
    with pytest.warns(UserWarning, match="export this Counting for 2 images at a time alone"):
        export_onnx(qmodel, tmp_path / "m.onnx")
    assert onnx_session(tmp_path / "m.onnx").get_inputs()[0].shape[0] == 2


def test_hybrids_take_any_number_of_images(seed, tmp_path):
    """CoAtNet's file took two alone, and ONNX Runtime refused others."""
    sizes = {"img_size": 64, "num_classes": 7, "depths": (1, 1, 1, 1), "embed_dim": (16, 32, 32, 32)}
    model = timm.create_model("coatnet_nano_rw_224", **sizes)
    qmodel = dfqvit.quantize(model, 8, calib="noise", samples=2, rounding="nearest", progress=False)
    export_onnx(qmodel, tmp_path / "m.onnx")
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            expected = qmodel(images)
        got = torch.from_numpy(onnx_session(tmp_path / "m.onnx").run(None, {"images": images.numpy()})[0])
        assert float((got - expected).abs().mean() / expected.abs().mean()) < 0.03
