"""A GPU that is not there, for tests: what a CUDA graph may hold, and which device work goes to.

Tensors on torch's device "meta", which have no values, say that they are on that GPU (`Gpu.pretend`). `torch.cuda` is a double
that keeps the current device, streams and captures as the real one does. Every operation within `Gpu.watch` passes a lint that
raises for what a capture forbids (copies between host and device, values read back, results whose size depends on values,
optimizers that are not capturable), for work on a tensor whose device is not the current one, and for a capture on another
device's stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dfqvit.kernels.dispatch import Backend, Operator

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
COPIES = {"copy_", "_to_copy", "copy"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"}  # torch's own eyes are shut to these copies


class CaptureError(AssertionError):
    """What a capture would have failed on, or done wrong."""


@dataclasses.dataclass(eq=False)
class Stream:
    """As torch.cuda.Stream: of the device that was current."""

    device: torch.device

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Gpu:
    """`torch.cuda` with several devices; the current one is 0 until code says otherwise."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)  # that all work is meant for
        self.current = 0
        self.streams: dict[int, Stream] = {}  # the current one of each device
        self.capturing: Stream | None = None
        self.shared: Stream | None = None  # torch's own for captures: of the device that was current at the first one
        self.graphs: list[Graph] = []
        self.events: list[Event] = []
        self.captured = 0  # operations in graphs
        self.linting = False

    # What torch.cuda has.

    def current_stream(self, device: Any = None) -> Stream:
        index = self.current if device is None else torch.device(device).index or 0
        return self.streams.setdefault(index, Stream(torch.device("cuda", index)))

    def is_current_stream_capturing(self) -> bool:
        return self.capturing is not None and self.current_stream() is self.capturing

    def new_stream(self, device: Any = None, **_: Any) -> Stream:
        index = self.current if device is None else torch.device(device).index
        return Stream(torch.device("cuda", self.current if index is None else index))

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        index = device if isinstance(device, int) else torch.device(device).index
        before, self.current = self.current, self.current if index is None else index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        index = stream.device.index
        with self.on_device(index):
            before, self.streams[index] = self.current_stream(), stream
            try:
                yield
            finally:
                self.streams[index] = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        if stream is None:
            self.shared = stream = self.shared or self.new_stream()
        with self.on_stream(stream):
            self.capturing, before = stream, self.captured
            try:
                yield
            finally:
                self.capturing = None
                graph.held, graph.stream = self.captured - before, stream

    def made_graph(self, *_: Any, **__: Any) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    def made_event(self, *_: Any, **__: Any) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    # The lint.

    def check(self, what: str, tensors: list[torch.Tensor]) -> None:
        """One operation, or one launch of a kernel; `tensors` are its arguments and results, with torch's own devices."""
        if not any(tensor.is_meta for tensor in tensors):
            return
        if self.current != self.device.index:
            raise CaptureError(f"{what} works on {self.device} while the current device is cuda:{self.current}")
        if self.capturing is not None and self.capturing is not self.current_stream():
            raise CaptureError(f"{what} is not on the stream that captures")
        self.captured += self.capturing is not None

    def pretend(self) -> contextlib.AbstractContextManager[Any]:
        """Within it tensors on "meta" say that they are on the device, and what is made on the device is made on "meta"."""
        return _Pretended(self)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """`pretend`, with everything linted."""
        with _Pretended(self), _Lint(self):
            yield

    def take(self, model: nn.Module) -> nn.Module:
        """The model with parameters and buffers on the device, in place."""
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(
                        value.detach().to("meta"), requires_grad=value.requires_grad
                    )
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = value.to("meta")
        return model


@dataclasses.dataclass(eq=False)
class Graph:
    """As torch.cuda.CUDAGraph."""

    held: int = 0  # operations that a replay would do
    replays: int = 0
    stream: Stream | None = None

    def replay(self) -> None:
        if not self.held:
            raise CaptureError("a graph was replayed that holds nothing")
        self.replays += 1


class Event:
    """As torch.cuda.Event."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.gpu.current_stream()

    def query(self) -> bool:
        return True


class _Pretended(TorchFunctionMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        if function == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            found = function(*args)
            return self.gpu.device if found.type == "meta" else found
        if function == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        if function == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        args, kwargs = tree_map(self._place, (args, kwargs or {}))
        if getattr(function, "__name__", "") in FROM_HOST and self.gpu.linting and self._on_gpu(args, kwargs):
            raise CaptureError(f"{function.__name__} copies between host and device")
        assigned = function is torch.Tensor.__setitem__ and self.gpu.linting and args[0].is_meta
        if assigned and not isinstance(args[2], torch.Tensor) and not args[0][args[1]].dim():  # of more, torch fills
            raise CaptureError("a number assigned to one element copies between host and device")
        return function(*args, **kwargs)

    def _place(self, value: Any) -> Any:
        """A device, as torch is to see it."""
        named = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
        if not named and not (isinstance(value, torch.device) and value.type == "cuda"):
            return value
        device = torch.device(value)
        index = self.gpu.current if device.index is None else device.index
        if index != self.gpu.device.index:
            raise CaptureError(f"something was made on cuda:{index}, not on {self.gpu.device}")
        return torch.device("meta")

    @staticmethod
    def _on_gpu(args: Any, kwargs: Any) -> bool:
        asked = kwargs.get("device")
        if asked is None:
            return isinstance(args[0], torch.Tensor) and args[0].is_meta
        source = args[0] if args else None
        return torch.device(asked).type == "meta" and not (isinstance(source, torch.Tensor) and source.is_meta)


class _Lint(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __enter__(self) -> Any:
        self.gpu.linting = True
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.gpu.linting = False
        super().__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, overload = function.__name__.split(".")[0], str(function)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_gpu = any(tensor.is_meta for tensor in tensors)
        if on_gpu and name in READS:
            raise CaptureError(f"{overload} reads a value back to the host")
        by_mask = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if on_gpu and (name in SIZES or (by_mask and name != "index_fill")):
            raise CaptureError(f"{overload} gives a result whose size depends on values")
        asked = kwargs.get("device")
        places = {t.device.type for t in tensors if t.dim() or t.is_meta or name in COPIES}
        places |= {torch.device(asked).type} if asked is not None and name in COPIES else set()
        if len(places) > 1:
            raise CaptureError(f"{overload} copies between host and device")
        result = None if name == "_fused_adam_" else function(*args, **kwargs)  # which "meta" does not have
        if function.namespace != "prim" and name not in ("lift_fresh", "detach"):
            made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
            self.gpu.check(overload, tensors + made)
        return result


def gpu(patch: pytest.MonkeyPatch, device: str, kernels: str) -> Gpu:
    """The double, in place of torch.cuda while `patch` lasts.

    Args:
        patch: undone by pytest.
        device: that all work is meant for, as "cuda:1".
        kernels: "triton": operators that have a Triton backend run its Python, launches are checked and left out; the
            others and "reference" run the reference, which is what they do on a GPU.
    """
    made = Gpu(device)
    doubles = {
        "Stream": made.new_stream,
        "current_stream": made.current_stream,
        "stream": made.on_stream,
        "device": made.on_device,
        "CUDAGraph": made.made_graph,
        "graph": made.graph,
        "Event": made.made_event,
        "graph_pool_handle": lambda: ("pool", made.current),
        "is_current_stream_capturing": made.is_current_stream_capturing,
    }
    for name, double in doubles.items():
        patch.setattr(torch.cuda, name, double)

    def resolve(operator: Operator, *_: Any) -> Backend:
        return operator.backends[kernels if kernels in operator.backends else "reference"]

    patch.setattr(Operator, "resolve", resolve)
    patch.setattr(Operator, "__call__", lambda operator, *args: operator.resolve(*args).run(*args))
    if importlib.util.find_spec("triton"):
        jit = importlib.import_module("triton.runtime.jit")

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            with torch._C.DisableTorchFunction():
                made.check(f"the launch of {kernel.__name__}", tensors)

        patch.setattr(jit.JITFunction, "run", launch)
    step = torch.optim.Adam.step

    def checked(optimizer: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        if made.capturing is not None and not all(group["capturable"] for group in optimizer.param_groups):
            raise CaptureError("the optimizer is not capturable")
        return step(optimizer, *args, **kwargs)

    patch.setattr(torch.optim.Adam, "step", checked)
    return made
