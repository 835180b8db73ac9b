"""The activation correction matrix (ACM): the mean shift of a block's output that quantization causes, added back.

For block i, `M_i = mean over images of (p_i(float) - p_i(quantized))`, [tokens, channels]. Source: DFQ-ViT, arXiv 2507.14481.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapters import Adapter, find_adapter
from .errors import DfqvitError, UsageError

MODES = ("sequential", "independent", "none")
STORED = torch.float16  # of the matrices, in memory and in files
_BATCH = 64


def choose_blocks(
    depth: int, gamma: int = 1, blocks: Sequence[int] | None = None, top: int | None = None
) -> list[int] | None:
    """Which blocks are corrected: `blocks` as given, else every gamma-th counted back from the last; None to let `top` choose.

    Raises:
        UsageError: gamma or top below 1, an index out of range, or both blocks and top given.
    """
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
) -> dict[int, float]:
    """Estimates the corrections on `images` and sets them in `qmodel`, replacing those it had.

    Args:
        model: the float model.
        qmodel: its calibrated copy.
        images: [n, C, H, W], normalised.
        mode: "sequential" measures each correction with the earlier ones active; "independent", the formula as printed,
            measures all of them without any, so that a shift which propagates is corrected again in later blocks.
        gamma: correct every gamma-th block, counted back from the last.
        blocks: exactly these blocks instead (negative counts from the end).
        top: the blocks with the greatest divergence instead, this many.

    Returns:
        For every corrected block, the share of its divergence (mean squared distance from the float output) that is left.

    Raises:
        UsageError: a setting does not fit. DfqvitError: a correction overflows.
    """
    if mode not in MODES:
        raise UsageError(f"acm was '{mode}'; it may be {', '.join(map(repr, MODES))}")
    ours, theirs = find_adapter(model), find_adapter(qmodel)
    depth = len(theirs.blocks())
    chosen = choose_blocks(depth, gamma, blocks, top)
    for index in range(depth):
        theirs.set_acm(index, None)
    if mode == "none":
        return {}
    wanted = block_outputs(ours, images)
    if chosen is None:
        found = block_outputs(theirs, images)
        divergence = [float((w - f).square().mean() / w.square().mean()) for w, f in zip(wanted, found, strict=True)]
        chosen = sorted(sorted(range(depth), key=lambda index: -divergence[index])[:top])
    if mode == "sequential":
        matrices = {}
        for index in chosen:  # each pass has the earlier corrections active
            matrices[index] = _matrix(wanted[index], block_outputs(theirs, images, stop_after=index)[index], index)
            theirs.set_acm(index, matrices[index])
    else:
        found = block_outputs(theirs, images)
        matrices = {index: _matrix(wanted[index], found[index], index) for index in chosen}
        for index, matrix in matrices.items():
            theirs.set_acm(index, matrix)
    corrected = block_outputs(theirs, images)
    for index in range(depth):
        theirs.set_acm(index, None)
    plain = block_outputs(theirs, images)
    for index, matrix in matrices.items():
        theirs.set_acm(index, matrix)
    left = {}
    for index in chosen:
        before = float((wanted[index] - plain[index]).square().mean())
        left[index] = float((wanted[index] - corrected[index]).square().mean()) / before if before > 0 else 0.0
    return left


class _Stop(Exception):
    """Ends a forward pass once the last wanted block has run."""


@torch.no_grad()
def block_outputs(adapter: Adapter, images: torch.Tensor, stop_after: int | None = None) -> list[torch.Tensor]:
    """The outputs of the blocks, each [n, tokens, channels] on the images' device, up to block `stop_after`."""
    blocks = adapter.blocks()
    blocks = blocks if stop_after is None else blocks[: stop_after + 1]
    outputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    handles = []
    for index, block in enumerate(blocks):

        def keep(_: nn.Module, __: Any, output: torch.Tensor, index: int = index) -> None:
            outputs[index].append(output.detach().flatten(1, -2).float())
            if index == stop_after:
                raise _Stop

        handles.append(block.register_forward_hook(keep))
    try:
        for batch in images.split(_BATCH):
            with contextlib.suppress(_Stop):
                adapter.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in outputs]


def _matrix(wanted: torch.Tensor, found: torch.Tensor, index: int) -> torch.Tensor:
    matrix = (wanted - found).mean(dim=0)
    if not bool(torch.isfinite(matrix).all()):
        raise DfqvitError(f"ACM of block {index} holds NaN or Inf: the quantized model's activations overflow")
    if float(matrix.abs().max()) > torch.finfo(STORED).max:
        raise DfqvitError(f"ACM of block {index} reaches {float(matrix.abs().max()):.3g}, more than {STORED} can hold")
    return matrix.to(STORED)
