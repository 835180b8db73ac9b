"""quant_linear on the layers of real models, against float32 and bfloat16, eager fake quantization and other int8 linears.

python benchmarks/quant_linear.py [--device cpu|cuda] [--models deit_tiny,deit_base] [--batch 32] [--out FILE.jsonl]

Float variants take and give float32; int8 variants take and give 8-bit integers. `floor_ms` is the greater of the time of the
products at the measured int8 peak of the cores used and the time of the bytes at the measured bandwidth; on a GPU, of an
H200. torchao and gemlite are timed where they import.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import runner
import torch
import torch.nn.functional as F
from contenders.pytorch import compile_once

from dfqvit import kernels
from dfqvit.kernels import extension


def vit(width: int) -> dict[str, tuple[int, int, int]]:
    """Layer: (tokens an image, outputs, inputs)."""
    return {
        "qkv": (197, 3 * width, width),
        "proj": (197, width, width),
        "fc1": (197, 4 * width, width),
        "fc2": (197, width, 4 * width),
    }


def swin(width: int) -> dict[str, tuple[int, int, int]]:
    """The first and the third stage; the tokens of an image are those of all its windows."""
    first = {f"1.{k}": (3136, n, m) for k, (_, n, m) in vit(width).items()}
    return first | {f"3.{k}": (196, n, m) for k, (_, n, m) in vit(4 * width).items()}


MODELS = {
    "deit_tiny": vit(192),
    "deit_small": vit(384),
    "deit_base": vit(768),
    "vit_large": vit(1024),
    "swin_tiny": swin(96),  # swin_small has the same layers, more of them
}
GPU_PEAK, GPU_BANDWIDTH = 1979e12 / 2, 4.8e12  # H200: int8 multiply-adds a second, dense; bytes a second


def by(product: str, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`call` with another of the CUDA kernel's products than it chooses: docs/kernels/quant_linear.md has the names."""

    def run() -> torch.Tensor:
        os.environ["DFQVIT_WGMMA"] = product
        try:
            return call()
        finally:
            del os.environ["DFQVIT_WGMMA"]

    return run


class Case:
    """The tensors of one layer at one batch size, and the variants that compute it."""

    def __init__(self, rows: int, tokens: int, outputs: int, inputs: int, device: str) -> None:
        self.rows, self.outputs, self.inputs, self.device = rows, outputs, inputs, device
        self.x = torch.randn(rows, inputs, device=device)
        self.weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
        self.bias, self.acm = torch.randn(outputs, device=device), torch.randn(tokens, outputs, device=device)
        self.x_scale, self.x_zero = torch.tensor(8 / 255, device=device), torch.tensor(128.0, device=device)
        self.out_scale = torch.full((outputs,), 8 / 255, device=device)
        self.out_zero = torch.full((outputs,), 128.0, device=device)
        self.qx = ((self.x / self.x_scale).round() + 128).clamp(0, 255).to(torch.uint8)
        self.scales = {bits: self.weight.abs().amax(1) / (((1 << bits) - 1) / 2) for bits in (8, 4, 3)}
        self.packed = {bits: kernels.pack_weight(self.weight, s, bits) for bits, s in self.scales.items()}
        if device == "cpu":
            self.packed = {bits: kernels.block_weight(w, inputs, bits) for bits, w in self.packed.items()}

    def ours(self, integers: bool, bits: int = 8, acm: bool = False, activation: str | None = None) -> torch.Tensor:
        requantize = {"out_scale": self.out_scale, "out_zero": self.out_zero} if integers else {}
        return kernels.quant_linear(
            self.qx if integers else self.x,
            self.packed[bits],
            self.bias,
            self.acm if acm else None,
            x_scale=self.x_scale,
            x_zero=self.x_zero,
            w_scale=self.scales[bits],
            a_bits=8,
            w_bits=bits,
            activation=activation,
            **requantize,
        )

    def fake_quant(self) -> torch.Tensor:
        """What data-free ViT code runs: x and weight rounded to their grids in float, then a float product."""
        scale = self.scales[8].view(-1, 1)
        x = (((self.x / self.x_scale).round() + self.x_zero).clamp(0, 255) - self.x_zero) * self.x_scale
        w = (self.weight / scale).round().clamp(-128, 127) * scale
        return F.linear(x, w, self.bias)

    def floor(self, integers: bool, bits: int, peak: float, bandwidth: float) -> float:
        """Seconds."""
        size = 1 if integers else 4
        traffic = size * self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs * bits / 8
        return max(self.rows * self.inputs * self.outputs / peak if peak else 0.0, traffic / bandwidth)

    def float_variants(self) -> dict[str, Callable[[], torch.Tensor]]:
        x16, w16, b16 = (t.bfloat16() for t in (self.x, self.weight, self.bias))
        variants = {
            "quant_linear": lambda: self.ours(False),
            "quant_linear w4": lambda: self.ours(False, bits=4),
            "quant_linear acm": lambda: self.ours(False, acm=True),
            "float32": lambda: F.linear(self.x, self.weight, self.bias),
            "bfloat16": lambda: F.linear(x16, w16, b16),
            "fake quant": self.fake_quant,
        }
        q = (self.weight / self.scales[8].view(-1, 1)).round().clamp(-128, 127).to(torch.int8).t().contiguous()
        scale = self.x_scale * self.scales[8]

        def int_mm() -> torch.Tensor:
            qx = ((self.x / self.x_scale).round()).clamp(-128, 127).to(torch.int8)  # zero point 128, moved to 0
            return torch._int_mm(qx, q) * scale + self.bias

        if self.device == "cpu" or self.rows > 16:
            variants["_int_mm"] = int_mm
        return variants | self.torchao() | (self.torch_int8() if self.device == "cpu" else self.gemlite())

    def torchao(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Compiled on the CPU, as it is meant to run; on GPUs eager, since compiling would take longer than all the rest (compiled
        torchao is a contender of inference.py)."""
        try:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
        except ImportError:
            return {}
        model = torch.nn.Sequential(torch.nn.Linear(self.inputs, self.outputs, device=self.device))
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        if self.device != "cpu":
            return {"torchao int8, eager": lambda: model(self.x)}
        compiled = compile_once(model, self.device)
        return {"torchao int8": lambda: compiled(self.x)}

    def gemlite(self) -> dict[str, Callable[[], torch.Tensor]]:
        try:
            from gemlite.helper import A8W8_int8_dynamic
        except ImportError:
            return {}
        linear = torch.nn.Linear(self.inputs, self.outputs, dtype=torch.bfloat16)
        layer = A8W8_int8_dynamic(device=self.device).from_linear(linear)
        x = self.x.bfloat16()
        return {"gemlite int8": lambda: layer(x)}

    def torch_int8(self) -> dict[str, Callable[[], torch.Tensor]]:
        """torch's quantized linear (engine x86: fbgemm and oneDNN), with its dequantization."""
        packed = self._prepacked()

        def run() -> torch.Tensor:
            x = torch.quantize_per_tensor(self.x, 8 / 255, 128, torch.quint8)
            return torch.ops.quantized.linear(x, packed, 8 / 255, 128).dequantize()

        return {"torch int8": run}

    def _prepacked(self) -> object:
        zeros = torch.zeros(self.outputs, dtype=torch.int64)
        weight = torch.quantize_per_channel(self.weight, self.scales[8].double(), zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(weight, self.bias)

    def integer_variants(self) -> dict[str, Callable[[], torch.Tensor]]:
        variants = {
            "quant_linear": lambda: self.ours(True),
            "quant_linear w4": lambda: self.ours(True, bits=4),
            "quant_linear w3": lambda: self.ours(True, bits=3),
            "quant_linear gelu": lambda: self.ours(True, activation="gelu"),
            "quant_linear acm": lambda: self.ours(True, acm=True),
        }
        if self.device == "cpu":
            packed, x = self._prepacked(), torch.quantize_per_tensor(self.x, 8 / 255, 128, torch.quint8)
            variants["torch int8"] = lambda: torch.ops.quantized.linear(x, packed, 8 / 255, 128)
        else:
            products = {"mma.sync": "0"}
            if torch.cuda.get_device_capability() == (9, 0):
                products["of tiles"] = "tiles"
            for name, product in products.items():
                variants[f"quant_linear {name}"] = by(product, lambda: self.ours(True))
                variants[f"quant_linear w4 {name}"] = by(product, lambda: self.ours(True, bits=4))
                variants[f"quant_linear gelu {name}"] = by(product, lambda: self.ours(True, activation="gelu"))
        return variants

    def check(self) -> None:
        """Ends the run unless the results are right."""
        with kernels.use_backend("reference"):
            expected = self.ours(True)
            close = self.ours(False)
        if not torch.equal(self.ours(True), expected) or not torch.allclose(
            self.ours(False), close, rtol=1e-5, atol=1e-5
        ):
            raise SystemExit("quant_linear differs from the reference: nothing was timed")


def machine_limits(device: str) -> tuple[float, float]:
    """Multiply-adds of bytes and bytes of memory a second."""
    if device == "cuda":
        return GPU_PEAK, GPU_BANDWIDTH
    module, _ = extension.load()
    peak = module.int8_peak() * torch.get_num_threads() if module else 0.0
    block = torch.randn(1 << 26)
    timing = runner.interleave({"sum": block.sum}, device, seconds=2.0)["sum"]
    return peak, 4 * block.numel() / timing.quantile(0.2)


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> None:
    parser = runner.options(__doc__, 10.0, "layer and kind")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated, of " + ", ".join(MODELS))
    parser.add_argument("--batch", default="1,8,32,64,256", help="comma-separated")
    args = parser.parse_args()
    writer = runner.Writer("quant_linear", args.device, args.out)
    peak, bandwidth = machine_limits(args.device)
    faster: dict[tuple[str, str], list[float]] = {}
    for model in args.models.split(","):
        for layer, (tokens, outputs, inputs) in MODELS[model].items():
            for batch in map(int, args.batch.split(",")):
                case = Case(batch * tokens, tokens, outputs, inputs, args.device)
                case.check()
                float32 = 0.0
                for kind, variants in (("float", case.float_variants()), ("int8", case.integer_variants())):
                    with torch.no_grad():
                        timings = runner.interleave(variants, args.device, args.seconds)
                    float32 = timings["float32"].median if kind == "float" else float32
                    for name, timing in timings.items():
                        bits = 4 if "w4" in name else 3 if "w3" in name else 8
                        floor = case.floor(kind == "int8", bits, peak, bandwidth)
                        faster.setdefault((kind, name), []).append(float32 / timing.median)
                        writer.add(
                            model=model, layer=layer, batch=batch, shape=(batch * tokens, outputs, inputs), io=kind,
                            variant=name, **timing.row(), floor_ms=1e3 * floor, of_floor=floor / timing.median,
                            over_float32=float32 / timing.median,
                        )  # fmt: skip
    columns = [
        "model",
        "layer",
        "batch",
        "io",
        "variant",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "floor_ms",
        "of_floor",
        "over_float32",
    ]
    writer.show(columns, int8_peak=peak, bandwidth=bandwidth)
    for (kind, name), ratios in faster.items():
        print(f"{kind:5} {name:18} geometric mean {geometric_mean(ratios):.2f}x float32 over {len(ratios)} shapes")


if __name__ == "__main__":
    main()
