"""What both training scripts begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def adamw(model: torch.nn.Module, lr: float, **options: Any) -> torch.optim.AdamW:
    """Weights decay by 0.05; biases, norms and scales do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, **options)


def moving_average(model: torch.nn.Module) -> AveragedModel:
    """Of weights and buffers, over some 500 steps."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
