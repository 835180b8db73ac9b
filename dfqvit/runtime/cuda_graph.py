"""CUDA graphs of a whole model, one for each shape of images, captured at its first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..kernels.dispatch import choices
from ..quantization.model import quantized

# The first call compiles, chooses backends and makes the chains; the second shows that nothing is left to do.
WARM_UPS = 2
_CAPTURING = threading.Lock()  # torch's allocator serves one capture at a time


def check_device(device: torch.device | str) -> None:
    """UsageError unless CUDA graphs can be captured on `device`."""
    if torch.device(device).type != "cuda":
        raise UsageError(f"cuda_graph was True on device '{device}'; graphs are for CUDA devices: leave it False")


def capture_graphs(model: nn.Module) -> None:
    """Lets `model` replay a CUDA graph for each shape of images it is called with, in place.

    The model takes a class that is its own and `GraphedForward`'s, so isinstance, state_dict and timm's methods stay. Only
    the whole forward is captured: `forward_features` and `forward_intermediates` run as they did.
    """
    quantized(model, GraphedForward)


@dataclass
class Graph:
    """A captured forward, and where it reads images and writes logits."""

    graph: Any
    images: torch.Tensor
    logits: torch.Tensor


class Graphs:
    """All graphs of a model on a device. They share their memory, so one runs at a time, whatever threads and streams call.

    Streams, events, captures and launches of kernels are the current device's: that is `device` in all that is done here.
    """

    def __init__(self, device: torch.device) -> None:
        self.of: dict[Any, Graph] = {}
        self.lock = threading.Lock()
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            # Not torch's own stream for captures: the process has one, on the device that captured first.
            self.side = torch.cuda.Stream()
            self.finished = torch.cuda.Event()  # after which the memory is free again

    def run(self, key: Any, images: torch.Tensor, plain: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The logits of `images`, by the graph of `key`, which is captured from `plain` if there is none."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.finished)
            if key not in self.of:
                self.of[key] = self.capture(images, plain)
            held = self.of[key]
            held.images.copy_(images)
            held.graph.replay()
            logits = held.logits.clone()
            self.finished.record(stream)
            return logits

    def capture(self, images: torch.Tensor, plain: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
        """As torch's manual has it: warm-up on a stream of its own, then the same work once more, recorded."""
        images, stream = images.detach().clone(), torch.cuda.current_stream()
        self.side.wait_stream(stream)
        with torch.no_grad(), torch.cuda.stream(self.side):
            for _ in range(WARM_UPS):
                plain(images)
        stream.wait_stream(self.side)
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"
        with _CAPTURING, torch.no_grad(), torch.cuda.graph(graph, self.pool, self.side, capture_error_mode=mode):
            logits = plain(images)
        return Graph(graph, images, logits)


class GraphedForward(nn.Module):
    """Mixed in before a model's class: calls of the frozen model on a GPU replay graphs."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the model's own; a call that autograd records, of a training or empty batch, or with more arguments runs plainly."""
        if (
            not x.is_cuda
            or not len(x)
            or args
            or kwargs
            or self.training
            or _recorded(x)
            or torch.compiler.is_compiling()
        ):
            return super().forward(x, *args, **kwargs)
        graphs = self.__dict__.get("_graphs") or self.__dict__.setdefault("_graphs", Graphs(x.device))
        return graphs.run((x.shape, x.dtype, x.device, choices()), x, super().forward)

    def forget_graphs(self) -> None:
        """To be called after the model was changed by other ways than `to` and `load_state_dict`, which do it themselves."""
        self.__dict__.pop("_graphs", None)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's."""
        self.forget_graphs()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget_graphs()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs stay with the original: a copy captures its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}


def _recorded(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad
