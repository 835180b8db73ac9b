"""What a quantized model says of itself, in a terminal and a notebook; names that `import dfqvit` gives; files that are there."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import dfqvit
from dfqvit.models import load_model

from .conftest import small_swin


@pytest.fixture(scope="module")
def qmodel():
    return dfqvit.quantize(load_model("demo"), 4, calib="procedural", samples=4, acm="sequential", progress=False)


def test_repr_is_a_few_lines_that_are_true(qmodel, tmp_path):
    path = dfqvit.save(qmodel, tmp_path / "m.safetensors")
    first, *rows = repr(qmodel).split("\n")
    assert first == "VisionTransformer 'dfqvit_demo_vit', quantized by dfqvit"
    said = dict(row.split(maxsplit=1) for row in rows)
    assert said["bits"] == "W4/A8, first and last layer W8"
    assert said["calibration"] == "4 images, procedural"
    assert said["correction"] == "sequential, blocks 3"
    assert said["input"] == "1 x 28 x 28"
    megabytes = float(said["size"].removesuffix(" MB"))
    assert megabytes == pytest.approx(path.stat().st_size / 1e6, rel=0.1)
    assert repr(dfqvit.load(path)) == repr(qmodel) == str(qmodel)
    simulated = dfqvit.load(path, runtime="simulated")
    assert "0 of 4 run in integers" in repr(simulated)
    assert "(blocks): Sequential" in nn.Module.__repr__(simulated)


def test_a_notebook_has_a_table(qmodel):
    found = qmodel._repr_html_()
    assert found.startswith(
        "<table><caption>VisionTransformer &#x27;dfqvit_demo_vit&#x27;, quantized by dfqvit</caption>"
    )
    assert re.findall(r'<th scope="row">(\w+)</th>', found) == [
        line.split()[0] for line in repr(qmodel).split("\n")[1:]
    ]


def test_it_stays_the_model_that_it_is(qmodel):
    x = torch.randn(2, 1, 28, 28)
    for other in (pickle.loads(pickle.dumps(qmodel)), copy.deepcopy(qmodel)):
        assert repr(other) == repr(qmodel)
        assert torch.equal(other(x), qmodel(x))
    swin = dfqvit.quantize(small_swin(), calib="noise", samples=2, size_budget=0.1, rounding="nearest", progress=False)
    assert re.search(r"bits +W\d(-\d)?/A8$", repr(swin), re.MULTILINE)


def test_it_is_of_an_exported_type(qmodel, tmp_path):
    loaded = dfqvit.load(dfqvit.save(qmodel, tmp_path / "m.safetensors"))
    for model in (qmodel, loaded):
        assert isinstance(model, dfqvit.QuantizedModel)
        assert isinstance(model, type(load_model("demo")))
        assert model.dfqvit_record.recipe.w_bits == 4
        assert model.dfqvit_spec.architecture == "dfqvit_demo_vit"
        assert model.pretrained_cfg["mean"] == (0.286,)
    assert not isinstance(load_model("demo"), dfqvit.QuantizedModel)


def test_save_refuses_a_file_that_is_there_if_told_to(qmodel, tmp_path):
    path = tmp_path / "m.safetensors"
    assert dfqvit.save(qmodel, path, overwrite=False) == path
    before = path.read_bytes()
    with pytest.raises(dfqvit.UsageError, match=r"m.safetensors', which exists already; give overwrite=True"):
        dfqvit.save(qmodel, path, overwrite=False)
    assert path.read_bytes() == before
    assert dfqvit.save(qmodel, path) == path


def test_errors_are_exported():
    assert issubclass(dfqvit.UsageError, ValueError)
    assert issubclass(dfqvit.Interrupted, dfqvit.DfqvitError)
    with pytest.raises(dfqvit.UsageError, match="w_bits was 9"):
        dfqvit.quantize(load_model("demo"), 9)
    assert dfqvit.Progress(1).stage == "synthesis"
