"""One step of synthesis against the model alone, and against the same step with the eager entropy.

model      the float model's forward and backward to the pixels, one-hot loss only
fused      a whole step of `dfqvit.synthesize`: crop, model, entropy, total variation, Adam
fused bfloat16  the same with the model in bfloat16 (autocast)
reference  the same as "fused" with the entropy in plain torch (the Gram-matrix formula, one point at a time)

python benchmarks/synthesis.py [--device cpu|cuda] [--models NAME ...] [--samples N] [--out FILE.jsonl]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import runner
import timm
import torch
import torch.nn.functional as F

from dfqvit import kernels
from dfqvit.models import Preprocessing
from dfqvit.synthesis import SynthesisConfig
from dfqvit.synthesis.step import Step

MODELS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "swin_tiny_patch4_window7_224"]


def model_alone(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    leaf = images.clone().requires_grad_()

    def step() -> None:
        torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)

    return step


def whole_step(run: Step, backend: str | None) -> Callable[[], None]:
    def step() -> None:
        run._index.fill_(run.config.iters // 2)
        with kernels.use_backend(backend, "patch_similarity_entropy"), kernels.use_backend(backend, "similarity_range"):
            run()

    return step


def main() -> None:
    parser = runner.options(__doc__, 40.0, "model")
    parser.add_argument("--models", nargs="+", default=MODELS[:1])
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    writer = runner.Writer("synthesis", args.device, args.out)
    for name in args.models:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().requires_grad_(False).to(args.device)
        config = SynthesisConfig(samples=args.samples, iters=10)
        run = Step(model, config, Preprocessing.of(model))
        low = Step(model, replace(config, precision="bfloat16"), Preprocessing.of(model))
        slow = Step(model, config, Preprocessing.of(model))
        variants = {
            "model": model_alone(model, run.images, run.labels),
            "fused": whole_step(run, None),
            "fused bfloat16": whole_step(low, None),
            "reference": whole_step(slow, "reference"),
        }
        timings = runner.interleave(variants, args.device, args.seconds)
        for variant, timing in timings.items():
            writer.add(
                model=name,
                samples=args.samples,
                variant=variant,
                **timing.row(),
                times_model=timing.median / timings["model"].median,
            )
    writer.show(["model", "samples", "variant", "p20_ms", "p50_ms", "p80_ms", "calls", "times_model"])


if __name__ == "__main__":
    main()
