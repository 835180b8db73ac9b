"""`load(cuda_graph=True)`. Replay needs a GPU; what surrounds it does not."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dfqvit
from dfqvit.errors import UsageError
from dfqvit.runtime.cuda_graph import GraphedForward, Graphs, capture_graphs

from .test_triton import shallow


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")(test))


def saved(tmp_path, name="demo"):
    quantized, images = shallow(name)
    return dfqvit.save(quantized, tmp_path / "model.safetensors"), images


def test_a_cpu_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(UsageError, match=r"cuda_graph was True on device 'cpu'; graphs are for CUDA devices"):
        dfqvit.load(tmp_path / "absent.safetensors", device="cpu", cuda_graph=True)


@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_the_model_stays_itself(tmp_path, name):
    path, images = saved(tmp_path, name)
    plain, graphed = dfqvit.load(path), dfqvit.load(path)
    capture_graphs(graphed)
    assert isinstance(graphed, type(plain).__bases__)  # timm's class and what is mixed in
    assert type(graphed).__name__ == type(plain).__name__
    assert torch.equal(graphed(images), plain(images))  # on the CPU the plain way
    assert torch.equal(graphed.forward_features(images), plain.forward_features(images))
    assert graphed.state_dict().keys() == plain.state_dict().keys()
    graphed.load_state_dict(plain.state_dict())
    assert torch.equal(copy.deepcopy(graphed)(images), plain(images))


class Pretended:
    """Stands for a tensor on a GPU."""

    is_cuda, requires_grad, dtype, device = True, False, torch.float32, torch.device("cuda:0")

    def __init__(self, size):
        self.shape = torch.Size([size, 1, 28, 28])

    def __len__(self):
        return self.shape[0]


def test_one_graph_a_shape_forgotten_with_the_weights(tmp_path, monkeypatch):
    """Which calls go to a graph, and by which key; the graphs themselves are a double's."""
    path, _ = saved(tmp_path)
    model = dfqvit.load(path)
    capture_graphs(model)
    keys = []
    monkeypatch.setattr(Graphs, "__init__", lambda self, device: None)
    monkeypatch.setattr(Graphs, "run", lambda self, key, images, plain: keys.append((id(self), key)) or plain.__self__)
    for size in (1, 4, 1):
        assert model(Pretended(size)) is model
    assert [key[1][0][0] for key in keys] == [1, 4, 1]
    assert len(set(keys)) == 2
    with dfqvit.kernels.use_backend("reference"):
        model(Pretended(1))
    assert len(set(keys)) == 3  # another choice of backends, another graph
    held = model.__dict__["_graphs"]
    assert "_graphs" not in copy.deepcopy(model).__dict__
    model.load_state_dict(model.state_dict())
    model(Pretended(1))
    assert model.__dict__["_graphs"] is not held
    model.to(torch.float32)
    assert "_graphs" not in model.__dict__
    assert isinstance(model, GraphedForward)


@on_gpu
@pytest.mark.parametrize("name", ["demo", "demo-swin"])
def test_graphs_give_the_bits_of_plain_calls(tmp_path, name):
    path, _ = saved(tmp_path, name)
    plain, graphed = dfqvit.load(path, "cuda"), dfqvit.load(path, "cuda", cuda_graph=True)
    for size in (3, 1, 3, 0, 8, 1):
        images = torch.randn(size, 1, 28, 28, device="cuda")
        assert torch.equal(graphed(images), plain(images))
    assert len(graphed.__dict__["_graphs"].of) == 3


@on_gpu
def test_graphs_from_several_threads_and_streams(tmp_path):
    path, _ = saved(tmp_path)
    plain, graphed = dfqvit.load(path, "cuda"), dfqvit.load(path, "cuda", cuda_graph=True)
    batches = [torch.randn(1 + number % 3, 1, 28, 28, device="cuda") for number in range(40)]
    expected = [plain(images) for images in batches]
    torch.cuda.synchronize()

    def call(images):
        with torch.cuda.stream(torch.cuda.Stream()):
            logits = graphed(images)
            torch.cuda.current_stream().synchronize()
            return logits

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, batches))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
