"""The named studies of `dfqvit ablate`: what each varies, as lists of settings on top of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UsageError, expect_one_of

Values = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One line of a study: what it changes, and where it stands on the axis of a plot (None in a study of names)."""

    name: str
    x: float | None = None
    source: str = "synthetic"  # of the calibration images: "synthetic", "noise" or "real"
    synthesis: Values = field(default_factory=dict)  # of SynthesisConfig
    quantization: Values = field(default_factory=dict)  # of `quantize`


# What a study's settings change. "paper" is PSAQ-ViT's quantizer on images as they were optimised, before any correction.
RECIPES: dict[str, tuple[Values, Values]] = {
    "paper": ({"spectrum": "free"}, {"placement": "psaq", "quantizer": "minmax", "acm": "none"}),
    "default": ({}, {}),
}
_EVERY_BLOCK = {"acm": "sequential", "acm_blocks": None}
_FIXED = {"schedule": "fixed"}


def _numbers(name: str, values: Sequence[float], **constant: Any) -> list[Setting]:
    """A setting for each value of a setting of the synthesis."""
    return [Setting(f"{value:g}", value, synthesis={name: value}, quantization=constant) for value in values]


def _crops() -> list[Setting]:
    bounds = [(0.02, 1.0), (0.08, 1.0), (0.2, 1.0), (0.4, 1.0), (0.7, 1.0), (0.08, 0.75), (0.08, 0.5)]
    return [
        Setting(f"{lower:g} to {upper:g}", synthesis={"crop_lower": lower, "crop_upper": upper})
        for lower, upper in bounds
    ]


STUDIES: dict[str, list[Setting]] = {
    "method": [
        Setting("neither", synthesis=_FIXED),
        Setting("E2H"),
        Setting("ACM", synthesis=_FIXED, quantization=_EVERY_BLOCK),
        Setting("E2H + ACM", quantization=_EVERY_BLOCK),
        Setting("E2H + ACM, shrunk", quantization={**_EVERY_BLOCK, "acm_shrink": True}),
        Setting("E2H + ACM, last block", quantization={"acm": "sequential"}),
        Setting("E2H + ACM, checked", quantization={"acm": "checked", "acm_blocks": None}),
        Setting("noise", source="noise"),
        Setting("real images", source="real"),
    ],
    "schedule": [Setting(name, synthesis={"schedule": name}) for name in ("e2h", "fixed", "hard-to-easy")],
    "crops": _crops(),
    "samples": _numbers("samples", (4, 8, 16, 32, 64, 128, 256)),
    "steps": _numbers("iters", (50, 100, 250, 500, 1000)),
    "gamma": [
        Setting(f"{gamma}", gamma, quantization={**_EVERY_BLOCK, "gamma": gamma}) for gamma in (1, 2, 3, 4, 6, 12)
    ],
    "acm": [
        Setting("none", quantization={"acm": "none"}),
        Setting("as printed", quantization={"acm": "independent", "acm_blocks": None}),
        Setting("in sequence", quantization=_EVERY_BLOCK),
        Setting("in sequence, per channel", quantization={**_EVERY_BLOCK, "acm_shape": "channel"}),
        Setting("in sequence, per token", quantization={**_EVERY_BLOCK, "acm_shape": "token"}),
        Setting("in sequence, shrunk", quantization={**_EVERY_BLOCK, "acm_shrink": True}),
        Setting("checked", quantization={"acm": "checked", "acm_blocks": None}),
        Setting("checked, per channel", quantization={"acm": "checked", "acm_blocks": None, "acm_shape": "channel"}),
        Setting("last block", quantization={"acm": "sequential"}),
        Setting("last block, shrunk", quantization={"acm": "sequential", "acm_shrink": True}),
        Setting("last block, checked", quantization={"acm": "checked"}),
        Setting("most divergent block", quantization={"acm": "sequential", "acm_top": 1}),
    ],
    # beside every width of weights asked for
    "bits": [Setting(f"A{bits}", quantization={"a_bits": bits, "acm": "none"}) for bits in (8, 6, 4)],
}


def settings_of(
    study: str, recipe: str, values: Sequence[float] | None = None, chosen: Sequence[str] = ()
) -> list[Setting]:
    """The settings of a study on top of a recipe, `values` in place of those of its axis; those `chosen` by name, or all.

    Raises:
        UsageError: an unknown name, or values for a study that has no axis.
    """
    expect_one_of("study", study, STUDIES)
    expect_one_of("recipe", recipe, RECIPES)
    synthesis, quantization = RECIPES[recipe]
    settings = STUDIES[study]
    if values is not None:
        settings = [_moved(study, settings[0], value) for value in values]
    found = [
        replace(
            setting,
            synthesis={**synthesis, **setting.synthesis},
            quantization={**quantization, **setting.quantization},
        )
        for setting in settings
    ]
    if study == "method":  # the default beside the paper's pieces
        synthesis, quantization = RECIPES["default"]
        found.append(Setting("the default", synthesis=synthesis, quantization=quantization))
    names = [setting.name for setting in found]
    for name in chosen:
        if name not in names:
            raise UsageError(f"setting was '{name}'; of the study '{study}' it may be {', '.join(map(repr, names))}")
    return [setting for setting in found if not chosen or setting.name in chosen]


def _moved(study: str, setting: Setting, value: float) -> Setting:
    if setting.x is None:
        raise UsageError(f"values were given for the study '{study}', which has none; they may be given for 'samples'")
    if value != int(value) or value < 1:
        raise UsageError(f"values held {value}; they must be whole numbers of at least 1")
    moved = replace(setting, name=f"{value:g}", x=value)
    if "gamma" in setting.quantization:
        return replace(moved, quantization={**setting.quantization, "gamma": int(value)})
    return replace(moved, synthesis={key: int(value) for key in setting.synthesis})
