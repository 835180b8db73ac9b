"""How much faster a quantized model of each of timm's families is than its own float32: one architecture for each file of timm.

python benchmarks/models.py [--only TEXT ...] [--batches 1 8] [--w-bits 8] [--out FILE.jsonl]

Random weights and noise for calibration: times do not depend on them. Both models take turns in one process; `times_float32` is
the ratio of their medians. `scripts/coverage.py --speeds FILE.jsonl --markdown docs/models.md` puts the ratios into the table.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from functools import partial
from typing import Any

import runner
import timm
import torch

import dfqvit
from dfqvit.models import Preprocessing

# A small one of each file that is not tiny: what people would deploy on a CPU. Files whose least model is too large have none.
_ARCHITECTURES = """
beit_base_patch16_224 cait_xxs24_224 coat_lite_small convit_tiny convmixer_768_32 convnext_tiny convnextv2_tiny
cpubone_b1_bfrobust crossvit_tiny_240 csatv2 davit_tiny deit3_small_patch16_224 edgenext_small efficientformer_l1
efficientformerv2_s1 efficientvim_m1 efficientvit_b1 efficientvit_m3 eva02_tiny_patch14_224 vit_small_patch16_dinov3
fastvit_t12 focalnet_tiny_srf gcvit_xtiny hiera_tiny_224 sam2_hiera_tiny iformer_m inception_next_tiny levit_256 lowformer_b1
coatnet_nano_rw_224 caformer_s18 poolformer_s12 mambaout_tiny mixer_s16_224 mobilevit_s mobilevitv2_100 mvitv2_tiny
naflexvit_base_patch16_gap nest_tiny_jx nextvit_small pit_s_224 pvt_v2_b1 rdnet_tiny repvit_m1_1 sequencer2d_s shvit_s2
starnet_s3 swiftformer_s swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 tiny_vit_11m_224
tnt_s_patch16_224 twins_svt_small visformer_small vit_small_patch16_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224
volo_d1_224 xcit_tiny_12_p16_224
"""
ARCHITECTURES = _ARCHITECTURES.split()


def compare(name: str, args: argparse.Namespace, writer: runner.Writer) -> None:
    """Rows of one architecture; one that fails is a row with the reason."""
    common: dict[str, Any] = {"architecture": name, "w_bits": args.w_bits}
    try:
        model = timm.create_model(name, pretrained=False).eval()
        options: dict[str, Any] = {"calib": "noise", "samples": 2, "quantizer": "minmax", "rounding": "nearest"}
        qmodel = dfqvit.quantize(model, args.w_bits, 8, scaling="none", progress=False, **options)
    except Exception as error:
        writer.add(**common, failed=f"{type(error).__name__}: {error}".splitlines()[0])
        return
    parts = dfqvit.integer_report(qmodel)
    common |= {"blocks": len(parts), "integer": sum(not reason for reason in parts.values())}
    for batch in args.batches:
        x = torch.randn(batch, *Preprocessing.of(model).input_size)
        variants = {"float32": partial(model, x), "dfqvit": partial(qmodel, x)}
        timings = runner.interleave(variants, "cpu", args.seconds, rounds=15)
        ratio = timings["float32"].median / timings["dfqvit"].median
        rows = {f"{kind}_{key}": value for kind, timing in timings.items() for key, value in timing.row().items()}
        writer.add(**common, batch=batch, times_float32=ratio, **rows)


def main() -> None:
    parser = runner.options(__doc__, 4.0, "comparison", device=False)
    parser.add_argument("--only", nargs="+", default=[""], help="architectures that hold one of these")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--w-bits", type=int, default=8)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    writer = runner.Writer("models", "cpu", args.out)
    with torch.no_grad():
        for name in ARCHITECTURES:
            if any(text in name for text in args.only):
                compare(name, args, writer)
    writer.show(
        ["architecture", "batch", "times_float32", "float32_p50_ms", "dfqvit_p50_ms", "blocks", "integer", "failed"]
    )


if __name__ == "__main__":
    main()
