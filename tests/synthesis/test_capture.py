"""The step of synthesis as a GPU captures it, on a GPU that is not there: see tests/capture_lint.py."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from dfqvit.models import Preprocessing
from dfqvit.synthesis import SynthesisConfig, loop, step

from ..capture_lint import CaptureError, gpu
from ..conftest import small_swin, small_vit

KERNELS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")),
]


MODELS = {"vit": lambda: small_vit(depth=1), "swin": lambda: small_swin(depths=(2, 1))}


@pytest.fixture(autouse=True)
def _few_steps_first(monkeypatch):
    monkeypatch.setattr(step, "_EAGER_STEPS", 1)


def step_on(made, name, **settings):
    """A step whose model and images are on the double's device."""
    config = SynthesisConfig(samples=6, iters=9, **settings)
    model = MODELS[name]().eval().requires_grad_(False)
    preprocessing = Preprocessing.of(model)
    with made.pretend():
        return step.Step(made.take(model), config, preprocessing)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("batch_size", [32, 4])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_the_step_can_be_captured(monkeypatch, name, batch_size, kernels):
    """On a GPU that is not the current one. Whole, and in parts that share the range of similarities."""
    made = gpu(monkeypatch, "cuda:1", kernels)
    taken = step_on(made, name, batch_size=batch_size)
    assert taken.images.is_meta
    assert taken.device == torch.device("cuda:1")
    with made.watch():
        for _ in range(3):
            taken()
    (graph,) = made.graphs  # made in the second step, which replays it too
    assert graph.replays == 2
    assert graph.stream.device == torch.device("cuda:1")
    assert graph.held == made.captured > 50
    assert made.current == 0  # as it was found
    assert taken.taken == 3


def test_each_device_captures_on_a_stream_of_its_own(monkeypatch):
    """torch shares one among all captures of a process: of the device that came first."""
    streams = []
    for device in ("cuda:0", "cuda:1"):
        made = gpu(monkeypatch, device, "reference")
        taken = step_on(made, "vit")
        with made.watch():
            for _ in range(2):
                taken()
        assert made.shared is None
        streams.append(made.graphs[0].stream)
    assert streams[0].device != streams[1].device


def test_a_step_taken_up_again_is_captured_again(monkeypatch):
    """A graph holds the places of the moments; those of a snapshot are others."""
    made = gpu(monkeypatch, "cuda:1", "reference")
    taken = step_on(made, "vit")
    with made.watch():
        for _ in range(2):
            taken()
    state = {name: torch.zeros(tensor.shape) for name, tensor in taken.state().items()}
    with made.pretend():
        taken.load_state(4, state)
    with made.watch():
        taken()
    assert len(made.graphs) == 2
    assert taken.taken == 5


def test_reports_wait_for_the_device_of_the_images(monkeypatch):
    """An event of another device's stream is done at once, and the numbers are then not yet there."""
    made = gpu(monkeypatch, "cuda:1", "reference")
    taken = step_on(made, "vit")
    monkeypatch.setattr(loop, "_REPORT_EVERY", 2)
    monkeypatch.setattr(loop, "_pinned_row", lambda: torch.empty(3, device="meta"))
    with made.pretend():
        reporter = loop._Reporter(taken, lambda progress: None)
        reporter.after(2)
    (event,) = made.events
    assert event.stream is made.current_stream("cuda:1")


def test_the_optimizer_says_nothing_while_steps_are_not_captured(monkeypatch, recwarn):
    """torch warns of a capturable optimizer that runs outside a capture; the first steps do so on purpose."""
    made = gpu(monkeypatch, "cuda:0", "reference")
    taken = step_on(made, "vit")

    def warned(*_, **__):
        warnings.warn("This instance was constructed with capturable=True", stacklevel=1)

    monkeypatch.setattr(torch.optim.Adam, "step", warned)
    with made.pretend():
        taken()
    assert not recwarn.list


FORBIDDEN = {
    "copies between host and device": lambda x: torch.tensor([3, 4], device=x.device),
    "assigned to one element copies": lambda x: x.__setitem__((0, 1), 0.5),
    "copies": lambda x: x.cpu(),
    "reads a value back": lambda x: x.sum().item(),
    "reads a value": lambda x: bool((x > 0).all()),
    "size depends on values": lambda x: x.nonzero(),
    "size depends": lambda x: x[x > 0],
    "made on cuda:0, not on cuda:1": lambda x: torch.zeros(3, device="cuda:0"),
}


@pytest.mark.parametrize("said", FORBIDDEN)
def test_the_lint_finds(monkeypatch, said):
    made = gpu(monkeypatch, "cuda:1", "reference")
    x = torch.empty(4, 5, device="meta")
    with made.watch(), made.on_device("cuda:1"):
        (2 * x - 1).clamp(min=0.0).where(x < 0.5, -1.0)[:2] = 3.0  # all of it allowed
        with pytest.raises(CaptureError, match=said):
            FORBIDDEN[said](x)


def test_the_lint_finds_the_wrong_device(monkeypatch):
    made = gpu(monkeypatch, "cuda:1", "reference")
    x = torch.empty(4, device="meta")
    with made.watch(), pytest.raises(CaptureError, match="while the current device is cuda:0"):
        x + 1
    with (
        made.watch(),
        made.graph(made.made_graph(), stream=made.new_stream(0)),
        made.on_device(1),
        pytest.raises(CaptureError, match="is not on the stream that captures"),
    ):
        x + 1
