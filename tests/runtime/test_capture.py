"""The integer forward as a GPU captures it, on a GPU that is not there: see tests/capture_lint.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dfqvit.calibration import calibrate, convert
from dfqvit.calibration.correction import add_corrections
from dfqvit.kernels import tuning
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.cuda_graph import capture_graphs

from ..capture_lint import gpu
from ..conftest import small_swin, small_vit

MODELS = {"vit": lambda: small_vit(depth=1), "swin": lambda: small_swin(depths=(2, 1))}


@pytest.mark.parametrize("integer", [True, False], ids=["integer", "simulated"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_forward_can_be_captured(monkeypatch, seed, name, integer):
    """On a GPU that is not the current one: the first call chooses, makes and reads what it needs, the next one is recorded."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("no Triton")
    model, images = MODELS[name](), torch.randn(8, 3, 32, 32)
    qmodel = convert(model, Recipe(4))
    calibrate(qmodel, images, Recipe(4))
    add_corrections(model, qmodel, images, "sequential")
    if integer:
        assert accelerate(qmodel) == {}
    made = gpu(monkeypatch, "cuda:1", "triton")
    made.take(qmodel)
    capture_graphs(qmodel)
    batches = [torch.empty(size, 3, 32, 32, device="meta") for size in (4, 2, 4)]
    with made.watch(), torch.no_grad():
        found = [qmodel(images).shape for images in batches]
    assert found == [(4, 7), (2, 7), (4, 7)]
    assert [graph.replays for graph in made.graphs] == [2, 1]
    assert all(graph.stream.device == torch.device("cuda:1") for graph in made.graphs)
    assert all(graph.held > 10 for graph in made.graphs)
    assert made.shared is None  # torch's one stream for captures
    assert made.current == 0


def test_nothing_is_measured_while_the_device_of_the_tensors_captures(monkeypatch):
    """Whatever device is current: a measurement would end up in the graph."""
    made = gpu(monkeypatch, "cuda:1", "reference")
    x = torch.empty(3, device="meta")
    with made.pretend():
        assert tuning._measurable((x,))
        with made.on_device(1), made.graph(made.made_graph()):
            assert not tuning._measurable((x,))
            with made.on_device(0):
                assert not tuning._measurable((x,))
