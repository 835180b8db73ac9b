"""Damaged files: one clear error or the very model, never another exception and never a wrong model. 2,000 files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfqvit
from dfqvit import cli
from dfqvit.errors import DfqvitError, UsageError
from dfqvit.storage.file import checksum
from dfqvit.storage.rebuild import held

from ..conftest import small_vit

IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(-2, 2),
    st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3),
)


@dataclass
class Good:
    path: Path
    whole: bytes = field(repr=False)
    logits: torch.Tensor = field(repr=False)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file to overwrite, its whole bytes, and the model's logits."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 7}
    options = {"calib": "noise", "samples": 2, "rounding": "nearest", "model_kwargs": kwargs}
    qmodel = dfqvit.quantize(small_vit(**kwargs), 4, **options)
    path = dfqvit.save(qmodel, tmp_path_factory.mktemp("damage") / "model.safetensors")
    return Good(path, path.read_bytes(), qmodel(IMAGES))


def examples(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=False)


def attempt(good, damaged):
    """What `load` makes of these bytes: a model, or None after an error of dfqvit's own that says something."""
    good.path.write_bytes(damaged)
    try:
        return dfqvit.load(good.path)
    except (DfqvitError, UsageError) as error:
        message = str(error)
    assert message.strip()
    assert "Traceback" not in message
    return None


def check(good, damaged):
    """Whether `load` takes these bytes; then it must be the same model."""
    model = attempt(good, damaged)
    assert model is None or torch.equal(model(IMAGES), good.logits)
    return model is not None


def test_the_file_itself_loads(good):
    assert check(good, good.whole)


@examples(1000)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4), st.booleans()
)
def test_flipped_bytes(good, flips, in_header):
    whole = bytearray(good.whole)
    limit = 8 + int.from_bytes(whole[:8], "little") if in_header else len(whole)
    for place, bits in flips:
        whole[int(place * limit)] ^= bits
    check(good, bytes(whole))


@examples(200)
@given(st.floats(0, 1, exclude_max=True), st.binary(max_size=20))
def test_cut_short_and_continued(good, share, more):
    damaged = good.whole[: int(share * len(good.whole))] + more
    assert check(good, damaged) == (damaged == good.whole)  # what is cut off may be drawn again


@examples(300)
@given(*(st.floats(0, 1, exclude_max=True),) * 2, st.integers(1, 200))
def test_pieces_in_the_wrong_place(good, source, target, length):
    whole = bytearray(good.whole)
    source, target = int(source * len(whole)), int(target * len(whole))
    piece = whole[source : source + length]
    whole[target : target + len(piece)] = piece
    check(good, bytes(whole[: len(good.whole)]))


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


def rewritten(good, change):
    """The file's bytes after change(header, tensors), with a checksum that fits if `change` returns True."""
    good.path.write_bytes(good.whole)
    with safetensors.safe_open(good.path, "pt") as file:
        header = json.loads(file.metadata()["dfqvit"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if change(header, tensors):
        header.pop("sha256", None)
        header["sha256"] = checksum(header, tensors)
    return safetensors.torch.save(tensors, {"dfqvit": json.dumps(header)})


@examples(300)
@given(st.data())
def test_another_record(good, data):
    """Altered and signed again: whatever it says is a DfqvitError or describes a model that can be built."""

    def change(header, _):
        *parents, last = data.draw(st.sampled_from([path for path in places(header) if path and path[0] == "record"]))
        inner = header
        for key in parents:
            inner = inner[key]
        inner[last] = data.draw(VALUES)
        return True

    attempt(good, rewritten(good, change))


def test_a_negative_number_of_heads_is_refused(good):
    """Of which timm makes a model that has all the tensors, and imaginary scales of attention."""

    def change(header, _):
        header["record"]["spec"]["kwargs"]["num_heads"] = -1
        return True

    good.path.write_bytes(rewritten(good, change))
    with pytest.raises(DfqvitError, match="has -1 heads; it must have 1 at least"):
        dfqvit.load(good.path)


@examples(200)
@given(st.data(), st.booleans())
def test_other_tensors(good, data, signed):
    def change(_, tensors):
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["gone", "extra", "type", "shape", "swap"]))
        if kind == "gone":
            del tensors[name]
        elif kind == "extra":
            tensors[name + "_2"] = tensors[name].clone()
        elif kind == "type":
            tensors[name] = tensors[name].to(torch.int16)
        elif kind == "shape":
            tensors[name] = torch.cat([tensors[name].reshape(-1), tensors[name].reshape(-1)[:1]])
        else:
            other = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        return signed

    model = attempt(good, rewritten(good, change))
    if model is not None:  # signed, and of shapes that fit; or nothing was changed: then every tensor is the file's
        (_, state), wanted = held(model, "save"), safetensors.torch.load_file(good.path)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key].to(state[key].dtype)) for key in wanted)


def test_an_edited_record_is_noticed(good):
    """Found here: the checksum covered the tensors alone, so another mean went through."""

    def change(header, _):
        header["record"]["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
        return False

    good.path.write_bytes(rewritten(good, change))
    with pytest.raises(DfqvitError, match="does not match its checksum"):
        dfqvit.load(good.path)


@examples(40)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.sampled_from(["info", "diagnose", "export"]))
def test_commands_on_damaged_files(good, tmp_path_factory, place, bits, name):
    whole = bytearray(good.whole)
    whole[int(place * len(whole))] ^= bits
    good.path.write_bytes(whole)
    out = tmp_path_factory.mktemp("out") / "model.onnx"
    out.write_text("kept")
    extra = ["--onnx", str(out)] if name == "export" else []
    assert cli.run([name, str(good.path), *extra]) in (0, 1, 2)  # and no exception
    assert out.read_text() == "kept"
