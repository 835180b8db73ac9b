"""`quant_linear` with packed 4-bit weights in a network that is no transformer of timm: an MLP-Mixer block.

python examples/quant_linear_in_your_network.py
"""

from __future__ import annotations

import torch
from torch import nn

from dfqvit.kernels import pack_weight, quant_linear


class PackedLinear(nn.Module):
    """Stands in for an `nn.Linear`: weights of `w_bits` bits, inputs of 8 bits in the range of a calibration input."""

    def __init__(self, linear: nn.Linear, x: torch.Tensor, w_bits: int = 4, activation: str | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.w_bits, self.activation, self.bias = w_bits, activation, linear.bias
        self.w_scale = weight.abs().amax(dim=1) / ((2**w_bits - 1) / 2)
        self.packed = pack_weight(weight, self.w_scale, w_bits)
        low, high = x.min().clamp_max(0), x.max().clamp_min(0)
        self.x_scale = (high - low) / 255
        self.x_zero = (-low / self.x_scale).round()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return quant_linear(
            x, self.packed, self.bias, x_scale=self.x_scale, x_zero=self.x_zero, w_scale=self.w_scale, a_bits=8,
            w_bits=self.w_bits, activation=self.activation,
        )  # fmt: skip


class Mixer(nn.Module):
    """One MLP-Mixer block on [B, T, C]: an MLP over the tokens, then one over the channels."""

    def __init__(self, tokens: int = 49, channels: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(tokens, 128), nn.GELU(), nn.Linear(128, tokens))
        self.channels = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, C] to the same."""
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(x)


@torch.no_grad()
def main() -> float:
    """The relative error of the quantized block."""
    torch.manual_seed(0)
    mixer, x = Mixer().eval(), torch.randn(8, 49, 64)
    wanted = mixer(x)
    mixed = x + mixer.tokens(x.transpose(1, 2)).transpose(1, 2)
    for mlp, given in ((mixer.tokens, x.transpose(1, 2)), (mixer.channels, mixed)):
        hidden = mlp[1](mlp[0](given))
        mlp[0] = PackedLinear(mlp[0], given, activation="gelu")  # GELU rides in the epilogue
        mlp[1], mlp[2] = nn.Identity(), PackedLinear(mlp[2], hidden)
    error = ((mixer(x) - wanted).norm() / wanted.norm()).item()
    print(f"W4/A8 mixer block: relative error {error:.4f}")
    return error


if __name__ == "__main__":
    main()
