"""Second-order rounding in plain torch: the oracle of the other backends, and the fallback."""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 64  # columns whose effect on one another is followed at once; the others hear of them together
_FEW = 4096  # values from which on `nearest` makes a table


def round_second_order(
    weight: torch.Tensor,
    scale: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None,
    input_carry: torch.Tensor,
    output_carry: torch.Tensor | None,
    levels: torch.Tensor,
    sweeps: int,
) -> torch.Tensor:
    """int8 [N, K]: see `op.py`."""
    rounded = _begun(weight, scale, input_carry, output_carry, levels)
    for _ in range(sweeps):
        moved = False
        slope = (weight - rounded * scale[:, None]) @ inputs
        for start in range(0, weight.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            local, changes = inputs[block, block], torch.zeros_like(rounded[:, block])
            inner = slope[:, block].clone() if outputs is None else outputs @ slope[:, block]
            for k in range(local.shape[0]):
                column, slopes, steps = rounded[:, start + k], inner[:, k], local[k, k] * scale
                if outputs is None:
                    effect = changes[:, k] = _move_apart(column, slopes, steps, scale, levels)
                else:
                    changes[:, k], effect = _move_in_turn(column, slopes, steps, scale, local[k, k], outputs, levels)
                inner -= effect[:, None] * local[k]
            if bool(changes.any()):
                moved = True
                slope -= changes @ inputs[block]
        if not moved:
            break
    return rounded.to(torch.int8)


def _begun(
    weight: torch.Tensor,
    scale: torch.Tensor,
    input_carry: torch.Tensor,
    output_carry: torch.Tensor | None,
    levels: torch.Tensor,
) -> torch.Tensor:
    """The weights rounded one after another, float [N, K].

    An integer waits for those before it in its column and in its row alone, so those of a diagonal are found together.
    """
    (rows, columns), rounded = weight.shape, torch.zeros_like(weight)
    wanted = weight.clone()  # the weight, with what the columns before left over
    carried = torch.zeros_like(weight)  # what the rows before, in the same column, left over beside that
    to_columns, to_rows = input_carry.triu(1), None if output_carry is None else output_carry.triu(1)
    for diagonal in range(rows + columns - 1):
        i = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=weight.device)
        k = diagonal - i
        aim = wanted[i, k] - carried[i, k]
        rounded[i, k] = nearest(aim / scale[i], levels)
        made = rounded[i, k] * scale[i]
        wanted[i] -= (wanted[i, k] - made)[:, None] * to_columns[k]
        if to_rows is not None:
            carried[:, k] += (aim - made) * to_rows[i].T
    return rounded


def _move_apart(
    column: torch.Tensor, slope: torch.Tensor, steps: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """Moves all integers of a column, in place, rows being independent; the change of the weight [N]."""
    new = nearest(column + slope / steps, levels)
    change = (new - column) * scale
    column.copy_(new)
    return change


def _move_in_turn(
    column: torch.Tensor,
    slope: torch.Tensor,
    steps: torch.Tensor,
    scale: torch.Tensor,
    curvature: torch.Tensor,
    outputs: torch.Tensor,
    levels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the integers of a column, in place, row after row; the change of the weight [N], and `outputs` times it.

    Rows that do not move are passed over together.
    """
    change, effect = torch.zeros_like(slope), torch.zeros_like(slope)
    steps = outputs.diagonal() * steps
    row = 0
    while row < len(column):
        new = nearest(column + (slope - curvature * effect) / steps, levels)
        moving = (new[row:] != column[row:]).nonzero()
        if not len(moving):
            break
        row += int(moving[0])
        change[row] = (new[row] - column[row]) * scale[row]
        column[row] = new[row]
        effect += change[row] * outputs[row]
        row += 1
    return change, effect


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest of the levels to each of x, in float: half to even where they follow one another, else the greater of two."""
    least, greatest = int(levels[0]), int(levels[-1])
    if greatest - least < len(levels) or x.numel() >= _FEW:
        return rounder(levels, x)(x.clone())
    values = levels.to(x)
    return values[torch.bucketize(x, _between(values), right=True)]


def rounder(levels: torch.Tensor, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`nearest` to these levels, prepared for tensors of the dtype and device of `like`. It writes into what it is given."""
    least, greatest = int(levels[0]), int(levels[-1])
    if greatest - least < len(levels):
        return lambda x: x.round_().clamp_(least, greatest)
    # All that decides are halves: a look into a table of these takes a tenth of a search for each of x.
    halves, values = torch.arange(2 * least, 2 * greatest + 1, device=like.device).to(like) / 2, levels.to(like)
    table = values[torch.bucketize(halves, _between(values), right=True)]

    def look(x: torch.Tensor) -> torch.Tensor:
        places = x.mul_(2).floor_().clamp_(2 * least, 2 * greatest).sub_(2 * least)
        return table.index_select(0, places.int().flatten()).view(x.shape)

    return look


def _between(values: torch.Tensor) -> torch.Tensor:
    return (values[1:] + values[:-1]) / 2
