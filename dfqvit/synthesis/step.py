"""One step of synthesis, as work that reads nothing from the host: eager on a CPU, replayed as one CUDA graph on a GPU."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from .. import distributed
from ..errors import UsageError
from ..models import Preprocessing
from ..models.adapters import Features, find_adapter, is_network
from ..models.spec import class_count
from .config import SynthesisConfig
from .curriculum import DRAWS, crop_ratio, crop_shift_flip
from .interruption import uninterrupted
from .losses import Objective, checked, entropy_loss, onehot_loss, similarity_ranges, tv_loss, union
from .spectrum import draw_tones, natural_spectrum

_BETAS = (0.5, 0.9)
_EAGER_STEPS = 3  # before a graph is captured: libraries set themselves up in the first ones


class Step:
    """The images, the optimizer, and tables of what each step needs to know; calling it takes the next step.

    Every random number of image i comes from a generator seeded by (seed, i), so an image does not depend on how many
    others are made beside it, except through the range of similarities that the batch shares.

    Attributes:
        images: float32 [samples, C, H, W], normalised, updated in place.
        terms: float32 [iters, 3]: entropy, one-hot (or the user's objective) and total variation loss of each step taken.
        crop_ratios: the crop's share of the area at each step.
        taken: the number of steps taken, of which `images` is the result: an interruption never comes between the two.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SynthesisConfig,
        preprocessing: Preprocessing,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.config, self.objective = model, config, objective
        self._graphed = not is_network(model)  # a network's work may depend on values, which no graph replays
        self.adapter = find_adapter(model, config.compat)
        if config.compat and not self.adapter.heeds_compat:
            warnings.warn(
                f"compat was '{config.compat}' and the model a {type(model).__name__}; it is for timm's Swin, and changes nothing",
                stacklevel=3,
            )
        self.device = next(model.parameters()).device
        self._half = config.precision == "bfloat16"
        if config.precision == "auto":  # a network or an objective may compute what bfloat16 is not made for
            self._half = self._graphed and objective is None and multiplies_bfloat16(self.device)
        self.low, self.high = preprocessing.channel_bounds(self.device)
        world = distributed.world()
        if config.samples < world:
            raise UsageError(f"samples was {config.samples}; for {world} processes it must be at least {world}")
        if len(self._parts()) < world:
            raise UsageError(
                f"batch_size was {config.batch_size}; {config.samples} samples are one part of work for each "
                f"{config.batch_size} images, fewer than the {world} processes: it may be at most "
                f"{(config.samples - 1) // (world - 1)}"
            )
        classes = class_count(model) or 0  # none: nothing says which class, and the term is left out
        order = torch.randperm(max(classes, 1), generator=torch.Generator().manual_seed(config.seed))
        images, draws, targets, tones = [], [], [], []
        for index in range(config.samples):
            generator = torch.Generator().manual_seed((config.seed << 20) + index)
            images.append(torch.randn(preprocessing.input_size, generator=generator))
            draws.append(torch.rand(config.iters, DRAWS, generator=generator))
            targets.append(torch.rand((), generator=generator))
            tones.append(draw_tones(generator))
        self.images = torch.stack(images).to(self.device)
        labels = order[torch.arange(config.samples) % len(order)].to(self.device)
        self.labels = labels if classes else None
        self.crop_ratios = [
            crop_ratio(config.schedule, step, config.iters, config.crop_lower, config.crop_upper)
            for step in range(config.iters)
        ]
        self.terms = torch.zeros(config.iters, 3, device=self.device)
        self._terms = torch.zeros(3, device=self.device)  # of the step that is being taken
        self._draws = torch.stack(draws, dim=1).to(self.device)  # [iters, samples, DRAWS]
        self._tv_target = torch.stack(targets).to(self.device)
        self._tones, self._preprocessing = torch.stack(tones).to(self.device), preprocessing
        self._ratio_table = torch.tensor(self.crop_ratios, device=self.device)
        self._rate_table = torch.tensor([learning_rate(config, step) for step in range(config.iters)])
        self._rate_table = self._rate_table.to(self.device)
        self._index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._rate = torch.tensor(config.learning_rate, device=self.device)
        self.images.grad = torch.zeros_like(self.images)
        on_gpu = self.device.type == "cuda"
        self._optimizer = torch.optim.Adam([self.images], betas=_BETAS, fused=True, capturable=on_gpu)
        self._optimizer.param_groups[0]["lr"] = self._rate  # given to the constructor, it would be read back
        self._graph: torch.cuda.CUDAGraph | None = None
        self._side: torch.cuda.Stream | None = None  # where the first steps run, and where the graph is captured
        self._eager_steps = self.taken = 0

    def __call__(self) -> None:
        """Takes one step. On a GPU it only queues work, without waiting for it."""
        if self.device.type != "cuda":
            self._differentiate()
            with uninterrupted():
                self._update()
                self.taken += 1
            return
        with uninterrupted(), torch.cuda.device(self.device):
            self._queue()
            self.taken += 1

    def _queue(self) -> None:
        """The current device is that of the images: streams, events, captures and launches of kernels go to the current one."""
        side = self._side = self._side or torch.cuda.Stream()
        if self._eager_steps < _EAGER_STEPS or not self._graphed:
            self._eager_steps += 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # not captured yet, on purpose
                self._compute()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                # Not on torch's own stream for captures: the process has one, on the device that captured first.
                with torch.cuda.graph(self._graph, stream=side):  # records the step without taking it
                    self._compute()
            self._graph.replay()

    def finished(self) -> torch.Tensor:
        """[samples, C, H, W]: the images as they leave the synthesis."""
        images = self.images.detach().clone()
        if self.config.spectrum == "natural":
            for part in self._parts():
                images[part] = natural_spectrum(images[part], self._tones[part], self._preprocessing)
        return images

    def state(self) -> dict[str, torch.Tensor]:
        """What the steps to come depend on, but for the step's number."""
        state = self._optimizer.state[self.images]
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}
        return {"images": self.images.detach().contiguous(), **moments}

    def load_state(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Continues from `state()` of a run that had taken `step` steps."""
        self.taken = step
        self._graph = None  # it holds the places of the moments there were
        self._index.fill_(step)
        self.images.copy_(tensors["images"])
        if "exp_avg" in tensors:
            self._optimizer.state[self.images] = {
                "step": torch.tensor(float(step), device=self.device),
                "exp_avg": tensors["exp_avg"].to(self.device),
                "exp_avg_sq": tensors["exp_avg_sq"].to(self.device),
            }

    def _parts(self) -> list[slice]:
        """The images that go through the model together."""
        size, samples = self.config.batch_size, self.config.samples
        return [slice(start, min(start + size, samples)) for start in range(0, samples, size)]

    def _compute(self) -> None:
        self._differentiate()
        self._update()

    def _differentiate(self) -> None:
        """Leaves the step's gradient and terms behind; the rest of the state is as it was."""
        config = self.config
        self._rate.copy_(self._rate_table.index_select(0, self._index)[0])
        ratio = self._ratio_table.index_select(0, self._index)
        draws = self._draws.index_select(0, self._index)[0]
        parts = self._parts()
        own = parts[distributed.rank() :: distributed.world()]
        ranges = None if len(parts) == 1 else self._batch_ranges(own, draws, ratio)
        terms = self._terms.zero_()
        if len(own) < len(parts):
            self.images.grad.zero_()  # type: ignore[union-attr]
        for part in own:
            images = self.images[part].detach().requires_grad_(True)
            features, outputs = self._forward(images, draws[part], ratio)
            tv = config.tv_weight * tv_loss(images, self._tv_target[part])
            losses = torch.stack(
                [
                    config.entropy_weight * entropy_loss(features, config.points, config.bandwidth, ranges),
                    config.onehot_weight * self._wanted(outputs, part),
                    tv,
                ]
            ) * (len(images) / config.samples)
            self.images.grad[part] = torch.autograd.grad(losses.sum(), images)[0]  # type: ignore[index]
            terms += losses.detach()
        if self.objective is not None and self.device.type == "cpu" and not bool(self.images.grad.isfinite().all()):  # type: ignore[union-attr]
            raise UsageError(
                "objective gave a gradient with NaN or Inf, such as that of a root at 0; it must be finite"
            )
        if len(own) < len(parts):  # every process holds all images; a gradient plus zeros is itself
            distributed.reduce_(self.images.grad)  # type: ignore[arg-type]
            distributed.reduce_(terms)

    def _wanted(self, outputs: Any, part: slice) -> torch.Tensor:
        """The term of what the model gives: the user's objective, else the target classes, else nothing."""
        if self.objective is not None:
            return checked(self.objective(outputs))
        if self.labels is None:
            return self._terms.new_zeros(())
        return onehot_loss(outputs, self.labels[part])

    def _update(self) -> None:
        self._optimizer.step()
        torch.clamp(self.images, self.low, self.high, out=self.images)
        self.terms.index_copy_(0, self._index, self._terms[None])
        self._index += 1

    def _forward(self, images: torch.Tensor, draws: torch.Tensor, ratio: torch.Tensor) -> tuple[Features, Any]:
        """(features, what the model gives) of this step's crops of some of the images."""
        views = crop_shift_flip(images, draws, ratio, self.config.jitter)
        with self.adapter.capture() as features, torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            outputs = self.model(views)
        return features, outputs

    def _batch_ranges(self, own: list[slice], draws: torch.Tensor, ratio: torch.Tensor) -> list[torch.Tensor]:
        """The range of similarities of the whole batch, from that of this process's parts."""
        ranges = union([self._ranges(part, draws, ratio) for part in own])
        for ends in ranges:
            least, greatest = (ends[..., i].contiguous() for i in (0, 1))
            ends[..., 0] = distributed.reduce_(least, "min")
            ends[..., 1] = distributed.reduce_(greatest, "max")
        return ranges

    @torch.no_grad()
    def _ranges(self, part: slice, draws: torch.Tensor, ratio: torch.Tensor) -> list[torch.Tensor]:
        return similarity_ranges(self._forward(self.images[part], draws[part], ratio)[0])


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it is a CPU with instructions for it, which make a step a quarter faster or more; without, it is slower."""
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def learning_rate(config: SynthesisConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup = max(1, round(config.warmup * config.iters))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.iters - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
