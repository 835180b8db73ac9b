"""The operator `round_second_order`: public function, checks, registration."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import Backend, Operator, anything, compiled
from ..pack_weight import integers_of
from . import reference


def round_second_order(
    weight: torch.Tensor,
    scale: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None = None,
    *,
    bits: int | None = None,
    levels: torch.Tensor | None = None,
    sweeps: int = 8,
) -> torch.Tensor:
    """The integers Q that make the rounding error E = weight - scale * Q least as `inputs` and `outputs` count it.

        trace(outputs @ E @ inputs @ E.T)

    First the weights are rounded one after another, columns of large moments first and rows of a column likewise, and what each
    leaves over is made up for by those that are not rounded yet. Then by coordinate descent: in the same order each integer is
    moved to where it is best with all others held. Sweeps end when nothing moves. No single integer can then be moved for the
    better.

    Args:
        weight: [N, K], float32.
        scale: [N], float32, a step of each row.
        inputs: [K, K], float32, symmetric and positive definite: second moments of the layer's inputs.
        outputs: [N, N] likewise, of the gradients at the layer's outputs; None for the identity, where rows are independent.
        bits: 2 to 8; integers lie between -2^(bits-1) and 2^(bits-1) - 1.
        levels: in place of bits, int8 [n], ascending: the integers that may be taken.
        sweeps: of the descent over the weight, at most.

    Returns:
        int8 [N, K].

    Raises:
        TypeError: a tensor is not float32, or levels not int8.
        ValueError: shapes, devices, bits, levels or sweeps do not fit; a scale is 0; a moment is not symmetric or not positive
            definite.

    Source: the beginning is Babai's nearest plane, as is GPTQ's (arXiv 2210.17323), of both moments at once; coordinate descent as
    in QuantEase, arXiv 2309.01885; the two-sided objective is K-FAC's, arXiv 1503.05671.
    """
    tensors = {"weight": weight, "scale": scale, "inputs": inputs}
    if outputs is not None:
        tensors["outputs"] = outputs
    for name, tensor in tensors.items():
        checks.floating(name, tensor)
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} had dtype {tensor.dtype}; it must be float32")
    checks.same_device(**tensors)
    levels = _expect_levels(bits, levels)
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
            if not _symmetric(tensors[name]):
                raise ValueError(f"{name} was not symmetric; it must be symmetric and positive definite")
    by_column, by_row = _falling(inputs.diagonal()), None
    weight, inputs = weight[:, by_column], inputs[by_column][:, by_column]
    if outputs is not None:
        by_row = _falling(outputs.diagonal() * scale.square())
        weight, scale, outputs = weight[by_row], scale[by_row], outputs[by_row][:, by_row]
    carries = _carry("inputs", inputs), None if outputs is None else _carry("outputs", outputs)
    found = forward(weight, scale, inputs, outputs, *carries, levels.cpu(), sweeps)
    found = found[:, by_column.argsort()]
    return found if by_row is None else found[by_row.argsort()]


def _expect_levels(bits: int | None, levels: torch.Tensor | None) -> torch.Tensor:
    if (bits is None) is (levels is None):
        raise ValueError("bits and levels were both given or both left out; give one of them")
    if bits is not None:
        checks.bits("bits", bits)
        return torch.tensor(integers_of(bits), dtype=torch.int8, device="cpu")
    assert levels is not None
    checks.dense("levels", levels)
    if levels.dtype != torch.int8:
        raise TypeError(f"levels had dtype {levels.dtype}; it must be int8")
    if levels.dim() != 1 or not levels.numel():
        raise ValueError(f"levels had shape {tuple(levels.shape)}; it must be [n], with one level at least")
    if checks.readable(levels) and not bool((levels[1:] > levels[:-1]).all()):
        raise ValueError(f"levels was {levels.tolist()}; it must ascend")
    return levels


def _symmetric(moment: torch.Tensor) -> bool:
    """But for the rounding of sums; without it the two backends, and the two triangles, would give different integers."""
    if not checks.readable(moment) or not moment.numel():
        return True
    return bool((moment - moment.T).abs().max() <= 1e-3 * moment.diagonal().max())


def _falling(importance: torch.Tensor) -> torch.Tensor:
    """The order in which what matters most comes first: what it leaves over has the most to be made up by."""
    return importance.argsort(descending=True, stable=True)


def _carry(name: str, moment: torch.Tensor) -> torch.Tensor:
    """[n, n], how much of what is left over of weight k the weight j > k makes up for: the Cholesky factor U, upper, of the
    moment's inverse, each row by its diagonal."""
    lower, failed = torch.linalg.cholesky_ex(moment.double())
    if int(failed):
        raise ValueError(f"{name} was not positive definite; it must be symmetric and positive definite")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return (upper / upper.diagonal()[:, None]).to(moment.dtype)


forward = Operator(
    "round_second_order(Tensor weight, Tensor scale, Tensor inputs, Tensor? outputs, Tensor input_carry, Tensor? output_carry, "
    "Tensor levels, int sweeps) -> Tensor",
    fake=lambda weight, *_: torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format),
    backends=[
        compiled("round_second_order", "cpu", anything),
        Backend("reference", reference.round_second_order, anything),
    ],
)
