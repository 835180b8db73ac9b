"""The operator `roll_resize`: public function, checks, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything, compiled, not_float64
from . import reference


def roll_resize(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Bilinear samples of circularly rolled images on a separable grid: crop, resize, flip and roll in one operation.

        out[b, c, i, j] = rolled[b, c](rows[b, i], columns[b, j])
        rolled[b, c, y, x] = images[b, c, (y + shift[b, 0]) mod H, (x + shift[b, 1]) mod W]

    Positions are in pixels, 0 the centre of the first; outside [0, size - 1] they are clamped. Falling positions flip.
    Differentiable in the images, deterministic on every device. No host synchronisation.

    Args:
        images: [B, C, H, W], float32, bfloat16, float16 or float64; computed in float32 (float64 for float64).
        rows: [B, H'], vertical positions, float32 (float64 for float64 images).
        columns: [B, W'], horizontal positions, likewise.
        shift: int64 [B, 2], by how many pixels the image is rolled, down and across.

    Returns:
        [B, C, H', W'] in the dtype of images.

    Raises:
        TypeError: a tensor has a dtype that it may not have.
        ValueError: shapes or devices do not fit; or a gradient is wanted of rows or columns.
    """
    checks.floating("images", images)
    for name, tensor in (("rows", rows), ("columns", columns), ("shift", shift)):
        checks.dense(name, tensor)
    checks.same_device(images=images, rows=rows, columns=columns, shift=shift)
    checks.no_gradient("roll_resize", rows=rows, columns=columns)
    if images.dim() != 4 or 0 in images.shape[2:]:
        raise ValueError(f"images had shape {tuple(images.shape)}; it must be [B, C, H, W] with pixels")
    batch = images.shape[0]
    wide = checks.wide(images)
    for name, positions in (("rows", rows), ("columns", columns)):
        if positions.dtype != wide:
            raise TypeError(f"{name} had dtype {positions.dtype}; for these images it must be {wide}")
        if positions.dim() != 2 or positions.shape[0] != batch:
            raise ValueError(f"{name} had shape {tuple(positions.shape)}; it must be [{batch}, positions]")
    if shift.dtype != torch.int64:
        raise TypeError(f"shift had dtype {shift.dtype}; it must be int64")
    if shift.shape != (batch, 2):
        raise ValueError(f"shift had shape {tuple(shift.shape)}; it must be [{batch}, 2]")
    return _RollResize.apply(images, rows, columns, shift)


forward = Operator(
    "roll_resize(Tensor images, Tensor rows, Tensor columns, Tensor shift) -> Tensor",
    fake=lambda images, rows, columns, _: images.new_empty(*images.shape[:2], rows.shape[1], columns.shape[1]),
    backends=[
        compiled("roll_resize", "cpu", not_float64),
        Backend("reference", reference.roll_resize, anything),
    ],
)

backward = Operator(
    "roll_resize_backward(Tensor grad, Tensor rows, Tensor columns, Tensor shift, int height, int width) -> Tensor",
    fake=lambda grad, rows, columns, shift, height, width: grad.new_empty(*grad.shape[:2], height, width),
    backends=[
        compiled("roll_resize_backward", "cpu", not_float64),
        Backend("reference", reference.roll_resize_backward, anything),
    ],
)


class _RollResize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        return forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.size = inputs[0].shape[2:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (backward(grad, *ctx.saved_tensors, *ctx.size), None, None, None)
