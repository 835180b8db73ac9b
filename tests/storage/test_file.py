"""save and load: bit-for-bit, small, and never a wrong model from a damaged file."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import timm
import torch
from torch.optim import swa_utils

import dfqvit
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.models import ModelSpec, load_model
from dfqvit.storage.export import export_onnx
from dfqvit.storage.file import checksum, read, sizes

from ..conftest import MODELS, SMALL, made_once

quantize = made_once(dfqvit.quantize)


@pytest.fixture(params=list(MODELS))
def quantized(request, seed):
    x = torch.randn(3, 3, 32, 32)
    return quantize(MODELS[request.param](), 4, calib=x, model_kwargs=SMALL[request.param], acm_blocks=[0, -1])


@pytest.fixture
def saved(seed, tmp_path):
    qmodel = quantize(MODELS["vit"](), 4, calib=torch.randn(2, 3, 32, 32), model_kwargs=SMALL["vit"])
    return dfqvit.save(qmodel, tmp_path / "model.safetensors")


@pytest.mark.parametrize("placement", ["gemm", "psaq"])
@pytest.mark.parametrize("w_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", list(MODELS))
def test_round_trip_bit_for_bit(seed, tmp_path, family, w_bits, placement):
    x = torch.randn(5, 3, 32, 32)
    qmodel = dfqvit.quantize(
        MODELS[family](), w_bits, calib=x[:3], placement=placement, model_kwargs=SMALL[family], acm_blocks=[0, -1]
    )
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))
    assert torch.equal(loaded(x), qmodel(x))
    records = [json.dumps(m.dfqvit_record.to_dict(), sort_keys=True) for m in (loaded, qmodel)]
    assert records[0] == records[1]
    again = dfqvit.load(dfqvit.save(loaded, tmp_path / "again.safetensors"))
    assert torch.equal(again(x), qmodel(x))


@pytest.mark.parametrize(("w_bits", "most"), [(4, 0.15), (3, 0.12)])
def test_size_of_a_real_architecture(tmp_path, seed, w_bits, most):
    """DeiT-T's shapes, random weights: the size does not depend on the values."""
    model = timm.create_model("deit_tiny_patch16_224").eval()
    qmodel = dfqvit.quantize(model, w_bits, calib=torch.randn(1, 3, 224, 224), rounding="nearest")
    path = dfqvit.save(qmodel, tmp_path / "m.safetensors")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "float.safetensors")
    assert path.stat().st_size <= most * (tmp_path / "float.safetensors").stat().st_size


def test_acm_survives(quantized, tmp_path):
    assert len(quantized.dfqvit_record.acm_blocks) == 2
    loaded = dfqvit.load(dfqvit.save(quantized, tmp_path / "m.safetensors"))
    keys = [key for key in loaded.state_dict() if key.endswith(".acm")]
    assert len(keys) == 2
    assert all(torch.equal(loaded.state_dict()[key], quantized.state_dict()[key]) for key in keys)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DfqvitError, match="is no whole safetensors file"):
        dfqvit.load(saved)


def test_flipped_bits_never_give_another_model(saved, seed):
    wanted, _ = read(saved)
    whole = bytearray(saved.read_bytes())
    for _ in range(40):
        place = int(torch.randint(0, len(whole), ()))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(0, 8, ()))
        saved.write_bytes(damaged)
        try:
            record, _ = read(saved)
        except (DfqvitError, UsageError):
            continue
        assert record == wanted


def rewrite(path, **changes):
    with safetensors.safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["dfqvit"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header.update(changes)
    del header["sha256"]
    header["sha256"] = checksum(header, tensors)
    safetensors.torch.save_file(tensors, path, {"dfqvit": json.dumps(header)})


def test_newer_and_foreign_files(saved, tmp_path):
    rewrite(saved, format_version=99)
    with pytest.raises(DfqvitError, match=r"has format version 99; dfqvit .* reads versions 2 and 3: upgrade dfqvit"):
        dfqvit.load(saved)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(DfqvitError, match="not of a model that dfqvit quantized"):
        dfqvit.load(foreign)
    foreign.write_text("hello")
    with pytest.raises(DfqvitError, match="is no whole safetensors file"):
        dfqvit.load(foreign)
    with pytest.raises(UsageError, match="there is no such file"):
        dfqvit.load(tmp_path / "nothing.safetensors")


def test_files_from_before_uneven_levels(seed, tmp_path):
    """Of version 2, whose recipe does not name them."""
    x = torch.randn(2, 3, 32, 32)
    qmodel = quantize(MODELS["vit"](), 4, calib=x, model_kwargs=SMALL["vit"], levels="uniform")
    path = dfqvit.save(qmodel, tmp_path / "model.safetensors")
    record = qmodel.dfqvit_record.to_dict()
    del record["recipe"]["levels"]
    rewrite(path, format_version=2, record=record)
    loaded = dfqvit.load(path)
    assert loaded.dfqvit_record.recipe.levels == "uniform"
    assert torch.equal(loaded(x), qmodel(x))


@pytest.mark.parametrize("w_bits", [2, 3, 4])
def test_uneven_levels_take_their_own_bits_in_a_file(seed, tmp_path, w_bits):
    x = torch.randn(2, 3, 32, 32)
    files = {}
    for levels in ("uniform", "nonuniform"):
        qmodel = quantize(MODELS["vit"](), w_bits, calib=x, model_kwargs=SMALL["vit"], levels=levels)
        files[levels] = dfqvit.save(qmodel, tmp_path / f"{levels}.safetensors")
        kinds, (_, tensors) = sizes(files[levels]), read(files[levels])
        packed = sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("weight_packed"))
        assert kinds["packed weights"] == packed
    assert abs(files["uniform"].stat().st_size - files["nonuniform"].stat().st_size) < 64


def test_integers_that_no_file_could_hold_are_refused(seed, tmp_path):
    qmodel = dfqvit.quantize(MODELS["vit"](), 4, calib=torch.randn(2, 3, 32, 32), model_kwargs=SMALL["vit"])
    qmodel.blocks[1].mlp.fc1.weight_packed[3, 0] ^= 1
    with pytest.raises(
        UsageError, match=r"was changed .*'blocks.1.mlp.fc1.weight_packed': the weight held integers other"
    ):
        dfqvit.save(qmodel, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"w_bits": 77}}, "has a damaged dfqvit header: w_bits was 77"),
        ({"bits": 4}, "has a damaged dfqvit header: .* unexpected keyword argument 'bits'"),
        ({"spec": {"architecture": "hf-hub:a/b", "kwargs": {}}}, "names the model 'hf-hub:a/b', which this timm"),
        ({"spec": {"architecture": "vit_small_patch16_224", "kwargs": {}}}, "does not fit the model it names"),
        ({"recipe": {"w_bits": 3}}, "does not fit the model it names"),
        ({"acm_blocks": [0, 1, 2, 9]}, "does not fit the model it names"),
    ],
)
def test_header_that_does_not_fit(saved, change, message):
    record, _ = read(saved)
    rewrite(saved, record={**record.to_dict(), **change})
    with pytest.raises(DfqvitError, match=message):
        dfqvit.load(saved)


def test_altered_tensors(saved):
    with safetensors.safe_open(saved, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    tensors["head.bias"] += 1
    safetensors.torch.save_file(tensors, saved, metadata)
    with pytest.raises(DfqvitError, match="does not match its checksum"):
        dfqvit.load(saved)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    model = dfqvit.load(saved)
    before = saved.read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        dfqvit.save(model, saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_folder_is_no_file_to_write(quantized, tmp_path):
    with pytest.raises(UsageError, match="which is a folder; give the file, such as"):
        dfqvit.save(quantized, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_link_stays_one(saved, monkeypatch):
    model, link, dangling = dfqvit.load(saved), saved.parent / "current", saved.parent / "next"
    monkeypatch.chdir(saved.parent)
    link.symlink_to(saved.name)
    dangling.symlink_to("other.safetensors")
    before = saved.stat().st_ino
    for path in (link, dangling, "current"):
        dfqvit.save(model, path)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert saved.stat().st_ino != before
    assert (saved.parent / "other.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    "name", ["m" * 243 + ".safetensors", "\N{GREEK SMALL LETTER MU}" * 121 + ".safetensors", "m." + "x" * 253]
)
def test_names_as_long_as_a_file_system_takes(saved, name):
    """The temporary one was longer still."""
    path = dfqvit.save(dfqvit.load(saved), saved.parent / name)
    assert path.read_bytes() == saved.read_bytes()
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, name])


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(saved, mode):
    model = dfqvit.load(saved)
    saved.chmod(mode)
    dfqvit.save(model, saved)
    assert saved.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_what_is_no_regular_file_is_left_alone(saved):
    model, pipe, loop = dfqvit.load(saved), saved.parent / "pipe", saved.parent / "loop"
    os.mkfifo(pipe)
    loop.symlink_to("loop")
    (saved.parent / "null").symlink_to(os.devnull)
    for path in (pipe, loop, saved.parent / "null"):
        with pytest.raises(OSError, match=f"path was '{path}', which is no regular file; it may be one, or a name"):
            dfqvit.save(model, path)
    assert pipe.is_fifo()
    assert loop.is_symlink()
    assert sorted(os.listdir(saved.parent)) == sorted([saved.name, "pipe", "loop", "null"])


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (torch.compile, "{} was compiled by torch.compile; give {}._orig_mod"),
        (torch.nn.DataParallel, "{} was wrapped in DataParallel; give {}.module"),
        (swa_utils.AveragedModel, "{} was wrapped in AveragedModel, which averages weights; give {}.module"),
    ],
)
def test_a_wrapped_model_is_to_be_unwrapped(saved, tmp_path, wrap, message):
    wrapped = wrap(dfqvit.load(saved))
    for take in (dfqvit.save, export_onnx):
        with pytest.raises(UsageError, match=message.format("qmodel", "qmodel") + "$"):
            take(wrapped, tmp_path / "other")
    with pytest.raises(UsageError, match=message.format("model", "model") + "$"):
        dfqvit.integer_report(wrapped)


@pytest.mark.parametrize("path", [b"m.safetensors", None, 3])
def test_a_path_is_text_or_a_path(saved, path):
    for use in (lambda: dfqvit.load(path), lambda: dfqvit.save(dfqvit.load(saved), path)):
        with pytest.raises(UsageError, match=f"path was {path!r}; it may be a str or a Path"):
            use()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device was 'gpu'; it may be cpu, cuda or cuda:N"),
        (None, "device was None; it may be cpu, cuda or cuda:N"),
        ("cuda:77", "device was 'cuda:77'; torch sees [0-9]+ CUDA devices"),
        (torch.device("cuda", 77), "device was 'cuda:77'; torch sees [0-9]+ CUDA devices"),
    ],
)
def test_devices_that_are_not_there(saved, device, message):
    with pytest.raises(UsageError, match=message):
        dfqvit.load(saved, device=device)
    with pytest.raises(UsageError, match=message):
        dfqvit.load(saved, device=device, cuda_graph=True)
    with pytest.raises(UsageError, match=message):
        load_model("demo", device=device)


def test_save_takes_quantized_models_only():
    with pytest.raises(UsageError, match="qmodel has no quantization record"):
        dfqvit.save(MODELS["vit"](), "never.safetensors")


def test_a_structure_with_tables_is_built_once(tmp_path, monkeypatch):
    """Found here: once to see that it can be, and once more for the tables that it computes."""
    settings = {"samples": 1, "calib": "noise", "rounding": "nearest", "progress": False}
    qmodel = quantize(MODELS["swin"](), 8, model_kwargs=SMALL["swin"], **settings)
    assert any(module._non_persistent_buffers_set for module in qmodel.modules())
    build, built = ModelSpec.build, []
    monkeypatch.setattr(ModelSpec, "build", lambda *given: built.append(build(*given)) or built[-1])
    dfqvit.save(qmodel, tmp_path / "model.safetensors")
    assert len(built) == 1
