"""The operator `round_second_order`: public function, checks, registration."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything, compiled
from . import reference


def round_second_order(
    weight: torch.Tensor,
    scale: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    *,
    bits: int,
    sweeps: int = 8,
) -> torch.Tensor:
    """The integers Q that make the rounding error E = weight - scale * Q least as `inputs` and `outputs` count it.

        trace(outputs @ E @ inputs @ E.T)

    By coordinate descent from the nearest integers: column by column, and in a column row by row, each integer is moved to
    where it is best with all others held. Sweeps end when nothing moves. No single integer can then be moved for the better.

    Args:
        weight: [N, K], float32.
        scale: [N], float32, a step of each row.
        inputs: [K, K], float32, symmetric and positive definite: second moments of the layer's inputs.
        outputs: [N, N] likewise, of the gradients at the layer's outputs; None for the identity, where rows are independent.
        bits: 2 to 8; integers lie between -2^(bits-1) and 2^(bits-1) - 1.
        sweeps: over the weight, at most.

    Returns:
        int8 [N, K].

    Raises:
        TypeError: a tensor is not float32.
        ValueError: shapes, devices, bits or sweeps do not fit; a scale is 0; a diagonal is not positive.

    Source: coordinate descent as in QuantEase, arXiv 2309.01885; the two-sided objective is K-FAC's, arXiv 1503.05671.
    """
    given = {"weight": weight, "scale": scale, "inputs": inputs, "outputs": outputs}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in tensors.items():
        checks.floating(name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} had dtype {tensor.dtype}; it must be float32")
    checks.same_device(**tensors)
    checks.bits("bits", bits)
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps was {sweeps!r}; it may be a whole number from 0")
    if weight.dim() != 2:
        raise ValueError(f"weight had shape {tuple(weight.shape)}; it must be [out_features, in_features]")
    rows, columns = weight.shape
    for name, shape in (("scale", (rows,)), ("inputs", (columns, columns)), ("outputs", (rows, rows))):
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} had shape {tuple(tensors[name].shape)}; for this weight it must be {list(shape)}")
    checks.finite("weight", weight)
    checks.nonzero("scale", scale)
    for name in ("inputs", "outputs"):
        if name in tensors:
            checks.finite(name, tensors[name])
            checks.positive(f"the diagonal of {name}", tensors[name].diagonal())
    return forward(weight, scale, inputs, outputs, bits, sweeps)


forward = Operator(
    "round_second_order(Tensor weight, Tensor scale, Tensor inputs, Tensor? outputs, int bits, int sweeps) -> Tensor",
    fake=lambda weight, *_: torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format),
    backends=[
        compiled("round_second_order", "cpu", anything),
        Backend("reference", reference.round_second_order, anything),
    ],
)
