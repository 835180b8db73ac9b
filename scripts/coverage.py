"""How much of timm's transformers, ConvNeXt and their kin dfqvit covers, by timm's pretrained tags.

    python scripts/coverage.py [--only TEXT ...] [--part I/N] [--out FILE.json]      static: every tag, without weights
    python scripts/coverage.py --short                                           static: a few dozen architectures
    python scripts/coverage.py --run [--only TEXT ...]                           a few dozen architectures, small, computed
    python scripts/coverage.py --merge FILE.json ... [--markdown FILE.md]        the tables of several parts; as docs/models.md
                               [--speeds FILE.jsonl]                             with what benchmarks/models.py measured

Static: the model of every tag on the meta device, through the steps of `dfqvit.quantize` and `dfqvit.load` that need no values:
accepted (converted), integer (and every block known to the runtime), loads (what a file says builds the same structure).
Run: random weights that make every part matter; W8/A8 against float, integer against simulated, the file's bits, one step of
synthesis. The last line is `accepted A / integer I / loads L / total N`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import weight_init
from timm.models import _registry as registry
from torch import nn

import dfqvit
from dfqvit.calibration import convert
from dfqvit.errors import DfqvitError, UsageError, first_line
from dfqvit.models import ModelSpec, Preprocessing, find_adapter
from dfqvit.quantization.layers import allocate
from dfqvit.quantization.model import quantized
from dfqvit.quantization.recipe import Recipe
from dfqvit.runtime import accelerate
from dfqvit.runtime.record import QuantizationRecord
from dfqvit.storage.rebuild import as_it_is

_FILES = """
beit cait coat convit crossvit csatv2 davit deepseek_vit deit edgenext efficientformer efficientformer_v2
efficientvit_mit efficientvit_msra eva fastvit focalnet gcvit gemma4_vit hiera hieradet_sam2 iformer levit
lowformer maxxvit metaformer mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit shvit swiftformer
swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer
vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit convnext
convmixer mlp_mixer mambaout inception_next rdnet repvit starnet sequencer efficientvim cpubone mobilenetv5
"""
MODULES = frozenset(_FILES.split())
# What the run stage computes: the least of each kind, and how it is made small.
_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
RUNS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _VIT,
    "deit3_small_patch16_224": _VIT,
    "vit_small_patch14_dinov2": {"depth": 2, "img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 56},
    "vit_base_patch16_clip_224": _VIT,
    "vit_base_patch32_clip_quickgelu_224": _VIT,
    "vit_base_patch16_siglip_224": _VIT,
    "vit_pwee_patch16_reg1_gap_256": _VIT,
    "vit_small_patch16_18x2_224": _VIT,
    "vit_base_patch16_xp_224": _VIT,
    "vit_relpos_small_patch16_224": _VIT,
    "eva02_tiny_patch14_224": {"depth": 2},
    "eva_large_patch14_196": _VIT,
    "vit_small_patch16_dinov3": {"depth": 2, "img_size": 64},
    "beit_base_patch16_224": _VIT,
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1)},
    "poolformer_s12": {},
    "caformer_s18": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "hiera_tiny_224": {},
    "levit_128s": {},
    "pit_ti_224": {},
    "pvt_v2_b0": {},
    "tiny_vit_5m_224": {},
    "xcit_nano_12_p16_224": {},
    "cait_xxs24_224": {"depth": 2},
    "crossvit_tiny_240": {},
    "coat_lite_tiny": {},
    "convit_tiny": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "fastvit_t8": {},
    "mixer_s16_224": {},
    "repvit_m0_9": {},
    "tnt_s_legacy_patch16_224": {"depth": 2},
    "twins_svt_small": {},
    "mambaout_femto": {},
}


def say(error: Exception) -> str:
    """The first line of an error; of one that is not dfqvit's own, with its class."""
    line = first_line(error)
    return line if isinstance(error, (UsageError, DfqvitError)) else f"{type(error).__name__}: {line}"


def module_of(architecture: str) -> str:
    """timm's file of an architecture."""
    return registry.model_entrypoint(architecture).__module__.rpartition(".")[2]


def build(name: str, device: str, **kwargs: Any) -> nn.Module:
    """The model without pretrained weights, in eval mode, quietly."""
    silent = io.StringIO()
    with torch.device(device), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        return timm.create_model(name, pretrained=False, **kwargs).eval()


def without_initial_values() -> None:
    """Lets all initial values alone from now on: on the meta device there are none, and torch takes long to find that out."""
    for module, names in ((nn.init, vars(nn.init)), (weight_init, ("_trunc_normal_",))):
        for name in list(names):
            if name.endswith("_") and not name.startswith("__") and callable(getattr(module, name)):
                setattr(module, name, lambda tensor, *_, **__: tensor)


def static(tag: str) -> dict[str, Any]:
    """What the steps that need no values say of one tag."""
    state: dict[str, Any] = {"accepted": False, "integer": False, "loads": False, "why": "", "class": ""}
    try:
        model = build(tag, "meta")
    except Exception as error:
        return {**state, "why": f"timm cannot build it without values ({say(error)})"}
    state["class"] = type(model).__name__
    try:
        spec, preprocessing, recipe = ModelSpec.of(model), Preprocessing.of(model), Recipe(4, 8, rounding="nearest")
        adapter = find_adapter(model.requires_grad_(False))
        state["adapter"] = type(adapter).__name__
        adapter.convert(recipe)
        allocate(model)
        qmodel = quantized(model)
        state["accepted"] = True
        record = QuantizationRecord(spec, preprocessing, recipe, "noise", 2)
        blocks, skipped = len(adapter.blocks()), accelerate(qmodel)
        state |= {"blocks": blocks, "simulated": len(skipped), "integer": blocks > 0 and not skipped}
        state["why"] = "; ".join(sorted(set(skipped.values()))) or ("" if blocks else "no blocks are known in it")
        as_it_is(qmodel, record, qmodel.state_dict())
        state["loads"] = True
    except Exception as error:
        state["why"] = say(error)
    return state


def randomise(model: nn.Module) -> nn.Module:
    """Values that make every part matter: gains far from 0, norms far from 1, tables that count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            leaf = name.rpartition(".")[2]
            if "gamma" in leaf or ".ls" in name or "layer_scale" in name:
                parameter.copy_(0.3 + 0.7 * values.abs().clamp_max(1))
            elif any(word in leaf for word in ("token", "pos_embed", "table", "rel_pos", "latent")):
                parameter.copy_(0.5 * values)
            elif parameter.dim() >= 2:
                parameter.copy_(values * parameter[0].numel() ** -0.5)
            elif leaf == "weight":
                parameter.copy_(1 + 0.2 * values)
            else:
                parameter.copy_(0.1 * values)
    return model


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def run(architecture: str, kwargs: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """What one architecture computes; `wrong` holds what is not as it must be."""
    started, wrong = time.process_time(), []
    model = randomise(build(architecture, "cpu", **kwargs))
    size = Preprocessing.of(model).input_size
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    found: dict[str, Any] = {"architecture": architecture, "class": type(model).__name__}
    try:
        found["converted"] = apart(convert(model, Recipe(8))(x), expected)
        qmodel = dfqvit.quantize(model, 8, calib=x, rounding="nearest", runtime="simulated")
        simulated = qmodel(x)
        found["w8"] = apart(simulated, expected)
        noise = 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        found["noise"] = float((qmodel(x + noise) - simulated).abs().mean() / simulated.std())
        found["simulated"] = sorted(set(accelerate(qmodel).values()))
        integer = qmodel(x)
        found["integer"] = float((integer - simulated).abs().mean() / simulated.std())
        loaded = dfqvit.load(dfqvit.save(qmodel, scratch / "model.safetensors"), runtime="integer")
        found["same bits"] = torch.equal(loaded(x), integer)
        images = dfqvit.synthesize(model, samples=1, iters=1)
        found["images"] = bool(torch.isfinite(images).all()) and images.shape == (1, *size)
    except Exception as error:
        return {**found, "wrong": [say(error)], "seconds": round(time.process_time() - started, 1)}
    wrong += [f"converted it is {found['converted']:.2g} from float"] if not found["converted"] < 1e-3 else []
    wrong += [f"W8/A8 is {found['w8']:.2f} from float"] if not found["w8"] < 0.1 else []
    # some models blow up any difference, random weights above all: CAFormer's results to 0.033 to 0.042, whatever is changed
    far = not found["integer"] < max(0.02, 1.5 * found["noise"])
    wrong += [f"integer is {found['integer']:.3f} from simulated"] if far else []
    wrong += [] if found["same bits"] else ["the loaded model gives other bits"]
    wrong += [] if found["images"] else ["synthesis gives no images"]
    return {**found, "wrong": wrong, "seconds": round(time.process_time() - started, 1)}


def table(states: dict[str, dict[str, Any]]) -> str:
    """By timm's files, and the last line."""
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for state in states.values():
        for counted in (rows[state["module"]], rows[""]):
            counted.update({"tags": 1, **{key: int(state[key]) for key in ("accepted", "integer", "loads")}})
    columns = ("tags", "accepted", "integer", "loads")
    lines = [f"{'timm file':28}" + "".join(f"{column:>10}" for column in columns)]
    for module in sorted(set(rows) - {""}):
        lines.append(f"{module:28}" + "".join(f"{rows[module][column]:10}" for column in columns))
    whole = rows[""]
    last = f"accepted {whole['accepted']} / integer {whole['integer']} / loads {whole['loads']} / total {whole['tags']}"
    return "\n".join([*lines, last])


def measured(path: Path) -> dict[str, list[str]]:
    """By timm's files, "architecture: ratio / ratio" for each that benchmarks/models.py timed, its batches ascending."""
    ratios: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "times_float32" in row:
            ratios[row["architecture"]][row["batch"]] = row["times_float32"]
    found: dict[str, list[str]] = collections.defaultdict(list)
    for architecture, by_batch in ratios.items():
        times = " / ".join(f"{ratio:.1f}" for _, ratio in sorted(by_batch.items()))
        found[module_of(architecture)].append(f"{architecture}: {times}")
    return found


def markdown(states: dict[str, dict[str, Any]], speeds: dict[str, list[str]]) -> str:
    """docs/models.md: by timm's files, with an example of each, what it gains and what does not run in integers."""
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = collections.defaultdict(list)
    for tag, state in states.items():
        rows[state["module"]].append((tag, state))
    last = table(states).splitlines()[-1]
    lines = [
        "# Models",
        "",
        "What of timm's pretrained transformers, ConvNeXt and their kin dfqvit takes, by timm's files. Made by",
        f"`python scripts/coverage.py` with timm {timm.__version__}: {last}.",
        "",
        "*Accepted*: quantized, saved and loaded. *Integer*: every product of every block runs on integers, so what",
        "`dfqvit.integer_report` says is empty; elsewhere the linear layers do, and the rest is named. Whether the weights",
        "of a tag survive few bits is another question: see [accuracy](accuracy.md) for those that were measured.",
        "",
        "*Times float32*: the speed of W8/A8 over that of the float32 model at batch 1 / 8, on two cores of an AMD EPYC",
        "(AVX-512 VNNI), medians of turns beside each other (`benchmarks/models.py`). Empty: not measured. Below 1 the quantized",
        "model is smaller and slower: its attention or its convolutions stay float, and what is between costs more than it saves.",
        "",
        "| timm file | for example | tags | accepted | integer | times float32 | what else stays float |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for module in sorted(rows):
        found = [state for _, state in rows[module]]
        reasons = collections.Counter(each["why"].split("; ")[0] for each in found if not each["integer"])
        counts = [len(found), *(sum(each[key] for each in found) for key in ("accepted", "integer"))]
        why = reasons.most_common(1)[0][0] if reasons else ""
        example, gained = min(tag for tag, _ in rows[module]), "<br>".join(speeds.get(module, []))
        lines.append(f"| {module} | `{example}` | {' | '.join(map(str, counts))} | {gained} | {why} |")
    return "\n".join(lines) + "\n"


def survey(tags: list[str], out: Path | None) -> dict[str, dict[str, Any]]:
    """{tag: its state}; tags of one architecture and input size, with a classifier or without, once."""
    states: dict[str, dict[str, Any]] = {}
    seen: dict[Any, dict[str, Any]] = {}
    for tag in tags:
        config, architecture = registry.get_pretrained_cfg(tag), registry.get_arch_name(tag)
        key = (architecture, bool(config.num_classes), config.input_size)
        if key not in seen:
            seen[key] = {"module": module_of(architecture), **static(tag)}
            if not seen[key]["loads"]:
                print(f"{tag}: {seen[key]['why']}", flush=True)
            if out is not None and len(seen) % 20 == 0:
                out.write_text(json.dumps(states, indent=1))
        states[tag] = seen[key]
    if out is not None:
        out.write_text(json.dumps(states, indent=1))
    return states


def run_all(only: list[str]) -> bool:
    """Prints a line for every architecture of RUNS; whether all are right."""
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        for architecture, kwargs in RUNS.items():
            if any(text in architecture for text in only):
                found = run(architecture, kwargs, Path(scratch))
                right &= not found["wrong"]
                numbers = ", ".join(f"{key} {found[key]:.2g}" for key in ("w8", "integer") if key in found)
                print(
                    f"{architecture:34} {'; '.join(found['wrong']) or 'right'} ({numbers}, {found['seconds']} s)",
                    flush=True,
                )
    return right


def main() -> int:
    """Exit status 1 when an architecture computes something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="tags or architectures that hold one of these")
    parser.add_argument("--run", action="store_true", help="compute a few dozen architectures")
    parser.add_argument("--short", action="store_true", help="static, one tag of each architecture that --run computes")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the architectures")
    parser.add_argument("--out", type=Path, help="JSON of every tag's state")
    parser.add_argument("--markdown", type=Path, help="where to write the table of docs/models.md")
    parser.add_argument("--speeds", type=Path, help="rows of benchmarks/models.py, for --markdown")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of --out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.run:
        return 0 if run_all(args.only) else 1
    if args.merge:
        states = {tag: state for path in args.merge for tag, state in json.loads(path.read_text()).items()}
    else:
        part, parts = (int(each) for each in args.part.split("/"))
        tags = [
            tag
            for tag in timm.list_pretrained()
            if any(text in tag for text in args.only) and module_of(registry.get_arch_name(tag)) in MODULES
        ]
        if args.short:
            first = {registry.get_arch_name(tag): tag for tag in reversed(tags)}
            tags = [tag for architecture, tag in first.items() if architecture in RUNS]
        names = sorted({registry.get_arch_name(tag) for tag in tags})
        chosen = set(names[part - 1 :: parts])
        without_initial_values()
        states = survey([tag for tag in tags if registry.get_arch_name(tag) in chosen], args.out)
    print(table(states))
    if args.markdown:
        args.markdown.write_text(markdown(states, measured(args.speeds) if args.speeds else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
