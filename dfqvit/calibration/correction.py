"""The activation correction matrix (ACM): the mean shift of a block's output that quantization causes, added back.

For block i, `M_i = mean over images of (p_i(float) - p_i(quantized))`, [tokens, channels]. Source: DFQ-ViT, arXiv 2507.14481.
The mean of a few synthetic images is a noisy estimate of the shift on real ones, so it can be averaged over tokens or channels,
shrunk by its own variance, or judged on images that did not make it (`mode="checked"`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DfqvitError, UsageError, expect_one_of, is_whole
from ..models.adapters import Adapter, find_adapter, is_network
from ..progress import tracked

MODES = ("sequential", "checked", "independent", "none")
SHAPES = ("element", "channel", "token")  # what has a value of its own: [tokens, channels], [1, channels], [tokens, 1]
STORED = torch.float16  # of the matrices, in memory and in files
_BATCH = 64
ENTRY_BYTES = 128  # of a tensor, its name and place in the header of a file
LEAST_CHECKED = 4  # images: each half needs a mean
LAST_BLOCK = (-1,)  # which blocks are corrected where nobody says


def choose_blocks(
    depth: int, gamma: int = 1, blocks: Sequence[int] | None = None, top: int | None = None
) -> list[int] | None:
    """Which blocks are corrected: `blocks` as given, else every gamma-th counted back from the last; None to let `top` choose.

    Raises:
        UsageError: gamma or top no whole number or below 1, an index out of range, or both blocks and top given.
    """
    for name, count in (("gamma", gamma), ("acm_top", top)):
        if count is not None and not is_whole(count):
            raise UsageError(f"{name} was {count!r}; it must be a whole number, 1 or more")
    if depth == 0:  # `check_family` refuses corrections then
        return []
    if gamma < 1:
        raise UsageError(f"gamma was {gamma}; it must be at least 1")
    if blocks is not None and top is not None:
        raise UsageError("acm_blocks and acm_top were both given; give one of them")
    if top is not None:
        if not 1 <= top <= depth:
            raise UsageError(f"acm_top was {top}; the model has {depth} blocks")
        return None
    if blocks is None:
        return list(range(depth - 1, -1, -gamma))[::-1]
    chosen = sorted({index + depth if index < 0 else index for index in blocks})
    if chosen and not 0 <= chosen[0] <= chosen[-1] < depth:
        raise UsageError(f"acm_blocks was {list(blocks)}; the model has blocks 0 to {depth - 1}")
    return chosen


def check_blocks(gamma: int, blocks: Any, top: Any) -> None:
    """UsageError unless `blocks` are indices, LAST_BLOCK or None, and none of the three is given where it would change nothing."""
    listed = isinstance(blocks, (Sequence, range)) and not isinstance(blocks, str)
    whole = listed and all(map(is_whole, blocks))
    if blocks is not None and not whole:
        raise UsageError(f"acm_blocks was {blocks!r}; it may be a list of indices of blocks, such as [-1], or None")
    if top is not None and blocks is not LAST_BLOCK and blocks is not None:
        raise UsageError(f"acm_top was {top} and acm_blocks {blocks!r}; give one of them")
    if gamma != 1 and (top is not None or blocks is not None):
        raise UsageError(f"gamma was {gamma!r}; it counts blocks where acm_blocks is None and acm_top is not given")


def refuse_correction(asked: str, blocks: Any, top: Any, shape: str, shrink: bool) -> None:
    """UsageError for a setting of the correction where there is none, as `asked`, or as "auto" has it here."""
    told = "acm 'none'" if asked == "none" else f"acm '{asked}', which corrects nothing here"
    for name, value, plain in (
        ("acm_shape", shape, "element"),
        ("acm_shrink", shrink, False),
        ("acm_top", top, None),
        ("acm_blocks", None if blocks is LAST_BLOCK else blocks, None),
    ):
        if value != plain:
            raise UsageError(f"{name} was {value!r} and {told}; it is for acm='sequential', 'checked' or 'independent'")


def check_correction(mode: str, shape: str, images: int) -> None:
    """UsageError unless mode and shape are known and the images are enough for the mode."""
    expect_one_of("acm", mode, MODES)
    expect_one_of("acm_shape", shape, SHAPES)
    if mode == "checked" and images < LEAST_CHECKED:
        raise UsageError(f"acm was 'checked' with {images} images; cross-validation needs {LEAST_CHECKED} at least")


def check_family(adapter: Adapter, mode: str, shape: str) -> None:
    """UsageError unless the model's blocks can be corrected so."""
    kind = type(adapter.model).__name__
    if mode != "none" and not adapter.blocks():
        raise UsageError(f"acm was '{mode}'; no blocks are known in this {kind}: it may be 'none'")
    if mode != "none" and shape != "element" and adapter.element_acm_only:
        raise UsageError(f"acm_shape was '{shape}'; in this {kind} it may be 'element'")


@torch.no_grad()
def add_corrections(
    model: nn.Module,
    qmodel: nn.Module,
    images: torch.Tensor,
    mode: str = "sequential",
    *,
    gamma: int = 1,
    blocks: Sequence[int] | None = None,
    top: int | None = None,
    shape: str = "element",
    shrink: bool = False,
) -> dict[int, float]:
    """Estimates the corrections on `images` and sets them in `qmodel`, replacing those it had.

    Args:
        model: the float model.
        qmodel: its calibrated copy.
        images: [n, C, H, W], normalised.
        mode: "sequential" measures each correction with the earlier ones active; "independent", the formula as printed,
            measures all of them without any, so that a shift which propagates is corrected again in later blocks; "checked"
            is "sequential" with cross-validation: a block is corrected only where the correction learnt on every other image
            brings the logits of the rest closer to float, by more than its standard error.
        gamma: correct every gamma-th block, counted back from the last.
        blocks: exactly these blocks instead (negative counts from the end).
        top: the blocks with the greatest divergence instead, this many.
        shape: "element" as printed; "channel" is the mean over tokens, one value for each channel; "token" the mean over
            channels.
        shrink: multiplies every value m by `m^2 / (m^2 + v)`, v the variance of m as a mean over the images.

    Returns:
        For every corrected block, the share of its divergence (mean squared distance from the float output) that is left.

    Raises:
        UsageError: a setting does not fit. DfqvitError: a correction overflows.
    """
    check_correction(mode, shape, len(images))
    ours, theirs = find_adapter(model), find_adapter(qmodel)
    check_family(ours, mode, shape)
    depth = len(theirs.blocks())
    chosen = choose_blocks(depth, gamma, blocks, top)
    for index in range(depth):
        theirs.set_acm(index, None)
    if mode == "none":
        return {}
    wanted, plain = block_outputs(ours, images), block_outputs(theirs, images)
    if chosen is None:
        distances = [divergence(w, p) for w, p in zip(wanted, plain, strict=True)]
        chosen = sorted(sorted(range(depth), key=lambda index: -distances[index])[:top])
    estimate = functools.partial(_matrix, shape=shape, shrink=shrink)
    matrices: dict[int, torch.Tensor] = {}
    if mode == "independent":
        for index in chosen:
            matrices[index] = estimate(wanted[index] - plain[index], index)
            theirs.set_acm(index, matrices[index])
    else:
        logits = log_probabilities(model, images) if mode == "checked" else None
        for index in tracked(chosen, "correct blocks"):  # each pass has the earlier corrections active
            shift = wanted[index] - block_outputs(theirs, images, stop_after=index)[index]
            if logits is None or _carries_over(theirs, index, shift, images, logits, estimate):
                matrices[index] = estimate(shift, index)
            theirs.set_acm(index, matrices.get(index))
    corrected = block_outputs(theirs, images)
    left = {}
    for index in matrices:
        before = float((wanted[index] - plain[index]).square().mean())
        left[index] = float((wanted[index] - corrected[index]).square().mean()) / before if before > 0 else 0.0
    return left


def correction_bytes(model: nn.Module, image: torch.Tensor, chosen: list[int] | None, top: int | None) -> int:
    """What the corrections of `chosen` blocks take in a file at most, or of the `top` largest; `image`: one, [1, C, H, W]."""
    sizes = [output.numel() * STORED.itemsize + ENTRY_BYTES for output in block_outputs(find_adapter(model), image)]
    return sum(sizes[index] for index in chosen) if chosen is not None else sum(sorted(sizes)[-(top or 0) :])


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean squared distance as a share of the mean square of what was wanted."""
    return float((wanted - found).square().mean() / wanted.square().mean().clamp_min(1e-20))


def log_probabilities(model: nn.Module, images: torch.Tensor, batch: int = _BATCH) -> torch.Tensor:
    """float32 [n, classes] of the images [n, C, H, W], `batch` of them in one pass."""
    return torch.cat([model(part).float().log_softmax(dim=1) for part in images.split(batch)])


def kl_divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """[n], nats: the Kullback-Leibler divergence of each image's `found` from `wanted`, both log probabilities [n, classes]."""
    return (wanted.exp() * (wanted - found)).sum(dim=1)


class _Stop(Exception):
    """Ends a forward pass once the last wanted block has run."""


@torch.no_grad()
def block_outputs(
    adapter: Adapter, images: torch.Tensor, stop_after: int | None = None, results: list[Any] | None = None
) -> list[torch.Tensor]:
    """The outputs of the blocks, each [n, tokens, channels] on the images' device, up to block `stop_after`.

    Of a network that gives its blocks images of several sizes, those of the first. `results` takes what the model itself gives,
    of one batch after the other.
    """
    blocks = adapter.blocks()
    blocks = blocks if stop_after is None else blocks[: stop_after + 1]
    outputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    network = is_network(adapter.model)  # which may call a block more than once
    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(blocks):

            def keep(_: nn.Module, __: Any, output: torch.Tensor, index: int = index) -> None:
                outputs[index].append(output.detach().flatten(1, -2).float())
                if index == stop_after and not network:
                    raise _Stop

            hooks.enter_context(block.register_forward_hook(keep))
        for batch in images.split(_BATCH):
            with contextlib.suppress(_Stop):
                result = adapter.model(batch)
                if results is not None:
                    results.append(result)
    return [torch.cat([part for part in parts if part.shape[1:] == parts[0].shape[1:]]) for parts in outputs]


def _matrix(shift: torch.Tensor, index: int, shape: str, shrink: bool) -> torch.Tensor:
    """[tokens, channels] in STORED from the shifts [n, tokens, channels] of block `index`; see `add_corrections`."""
    if shape != "element":
        shift = shift.mean(dim=1 if shape == "channel" else 2, keepdim=True).expand_as(shift)
    matrix = shift.mean(dim=0)
    if shrink:
        variance = shift.var(dim=0, correction=min(1, len(shift) - 1)) / len(shift)
        matrix = matrix * (matrix.square() / (matrix.square() + variance).clamp_min(torch.finfo(torch.float32).tiny))
    if not bool(torch.isfinite(matrix).all()):
        raise DfqvitError(f"ACM of block {index} holds NaN or Inf: the quantized model's activations overflow")
    if float(matrix.abs().max()) > torch.finfo(STORED).max:
        raise DfqvitError(f"ACM of block {index} reaches {float(matrix.abs().max()):.3g}, more than {STORED} can hold")
    return matrix.to(STORED)


def _carries_over(
    adapter: Adapter,
    index: int,
    shift: torch.Tensor,
    images: torch.Tensor,
    wanted: torch.Tensor,
    estimate: Callable[[torch.Tensor, int], torch.Tensor],
) -> bool:
    """Whether block `index`, corrected by one half of the images, lowers the divergence of the other half's logits, both ways."""
    changes = []
    for held, rest in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        lost = []
        for matrix in (None, estimate(shift[rest], index)):
            adapter.set_acm(index, matrix)
            lost.append(kl_divergence(wanted[held], log_probabilities(adapter.model, images[held])))
        changes.append(lost[1] - lost[0])
    change = torch.cat(changes)
    return bool(change.mean() + change.std() / len(change) ** 0.5 < 0)
