"""What the report shows of a model: similarities of patches, activation ranges, how far blocks diverge, what takes the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..calibration.correction import block_outputs
from ..calibration.correction import divergence as relative_distance
from ..models.adapters import find_adapter
from ..quantization.quantizers import ActivationQuantizer

_BINS = 100  # of the similarities, from -1 to 1
_KL_BINS = 256
_IMAGES = 32  # more tell nothing new


@dataclass(frozen=True)
class Divergence:
    """How far the quantized blocks' outputs are from the float ones', first block to last.

    Attributes:
        relative: mean squared distance over the float output's mean square.
        kl: Kullback-Leibler divergence in nats of the quantized values' distribution from the float values', in 256 bins.
    """

    relative: list[float]
    kl: list[float]


@torch.no_grad()
def similarity_density(model: nn.Module, images: torch.Tensor) -> list[tuple[float, float]]:
    """The density of the cosine similarities between the patches of an image, over all attention layers, as (place, density).

    The features are those of the synthesis' entropy loss; a pair of a patch with itself is left out.

    Args:
        model: the float model.
        images: [n, C, H, W], normalised.
    """
    counts = torch.zeros(_BINS, dtype=torch.float64)
    adapter = find_adapter(model)
    with adapter.capture() as features:
        model(images[:_IMAGES])
    for tensor in features.tensors:
        unit = torch.nn.functional.normalize(tensor.float(), dim=-1)
        similarity = unit @ unit.mT
        count = similarity.shape[-1]
        rows, columns = torch.triu_indices(count, count, offset=1, device=tensor.device)
        counts += torch.histc(similarity[:, rows, columns].clamp(-1, 1), _BINS, -1, 1).double().cpu()
    density = counts / counts.sum().clamp_min(1) * (_BINS / 2)
    return [(-1 + (2 * index + 1) / _BINS, float(value)) for index, value in enumerate(density)]


def activation_ranges(qmodel: nn.Module) -> list[tuple[str, float, float]]:
    """(site, least, greatest value of its grid) for every activation quantizer, by the name of what it quantizes."""
    return [
        (name.removesuffix(".input"), *module.ends())
        for name, module in qmodel.named_modules()
        if isinstance(module, ActivationQuantizer)
    ]


@torch.no_grad()
def divergence(model: nn.Module, qmodel: nn.Module, images: torch.Tensor) -> dict[str, Divergence]:
    """Of every block's output on `images` [n, C, H, W]: "without correction", and "with ACM" where there is one."""
    images = images[:_IMAGES]
    wanted = block_outputs(find_adapter(model), images)
    adapter = find_adapter(qmodel)
    held = {index: adapter.get_acm(index) for index in range(len(wanted))}
    corrected = [index for index, acm in held.items() if acm is not None]
    result = {}
    if corrected:
        result["with ACM"] = _compare(wanted, block_outputs(adapter, images))
        for index in corrected:
            adapter.set_acm(index, None)
    try:
        result["without correction"] = _compare(wanted, block_outputs(adapter, images))
    finally:
        for index in corrected:
            adapter.set_acm(index, held[index])
    return dict(reversed(result.items()))


def _compare(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> Divergence:
    relative = [relative_distance(w, f) for w, f in zip(wanted, found, strict=True)]
    return Divergence(relative, [_kl(w, f) for w, f in zip(wanted, found, strict=True)])


def _kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    low, high = float(min(wanted.min(), found.min())), float(max(wanted.max(), found.max()))
    if low == high:
        return 0.0
    p, q = (torch.histc(values.float(), _KL_BINS, low, high).double() + 1e-3 for values in (wanted, found))
    p, q = p / p.sum(), q / q.sum()
    return max(0.0, float((p * (p / q).log()).sum()))
