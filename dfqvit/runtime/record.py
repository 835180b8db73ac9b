"""What `quantize` and `load` return: a model of timm's class with a record of how it was quantized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..models import ModelSpec, Preprocessing
from ..models.network import NetworkSpec, network_spec
from ..models.tables import tables_of
from ..quantization.layers import quantized_layers
from ..quantization.model import file_bytes
from ..quantization.prepared import HOOKS, METHODS
from ..quantization.recipe import Recipe
from .convert import integer_report
from .own import ENTERED, expect_itself, tell_foreign_on_scaled, tell_train_mode


@dataclass(frozen=True)
class QuantizationRecord:
    """How a model was quantized; kept on it as `model.dfqvit_record` and in its file."""

    spec: ModelSpec | NetworkSpec
    preprocessing: Preprocessing
    recipe: Recipe
    calibration: str  # "synthetic", "procedural", "noise" or "images"
    samples: int
    acm: str = "none"
    acm_blocks: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # of the synthesis, as far as there was one
    measured: dict[str, Any] = field(default_factory=dict)  # of the images and blocks, see `health`

    @property
    def companions(self) -> int:
        """Procedural images among the `samples`, which stand beside those that `calibration` names."""
        return self.settings.get("companions", 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's metadata."""
        values = asdict(self)
        values["spec"].pop("function", None)  # of a network: what may be called is said anew by who loads
        return values

    def expect_grid(self, height: int, width: int) -> None:
        """UsageError for images that are longer one way and shorter the other than those that the corrections were made for.

        They may be of as many tokens; of another number, the corrections themselves tell.
        """
        _, rows, columns = self.preprocessing.input_size
        if self.acm_blocks and (height - rows) * (width - columns) < 0:
            raise UsageError(
                f"images were {height} x {width}; the corrections (acm) are for the places of {rows} x {columns}: quantize for "
                "this input size"
            )

    def made_from(self, calibration: str, settings: dict[str, Any]) -> QuantizationRecord:
        """The same, naming where the calibration images came from: for images that were synthesised beforehand."""
        return replace(self, calibration=calibration, settings=settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationRecord:
        """The inverse of `to_dict`, also after a trip through JSON."""
        values = dict(values)
        # files from before these settings
        of_old = {"edge_a_bits": values["recipe"].get("a_bits", 8), "scaling": "none", "levels": "uniform"}
        made_by = values.pop("spec")
        spec = network_spec(made_by) if "build_by" in made_by else ModelSpec(**made_by)
        recipe = Recipe(**{**of_old, **values.pop("recipe")})
        return cls(
            spec=spec, preprocessing=Preprocessing.from_dict(values.pop("preprocessing")), recipe=recipe, **values
        )


class QuantizedModel(nn.Module):
    """What `quantize` and `load` return: a model of timm's class that is also of this one.

    Its repr is a few lines, and a table in a notebook; `nn.Module.__repr__(model)` shows all its modules.

    Attributes:
        dfqvit_record: how it was quantized.
        dfqvit_spec: what timm builds its structure from.
        pretrained_cfg: how its images are prepared, as `timm.data.resolve_model_data_config` reads it.
    """

    dfqvit_record: QuantizationRecord
    dfqvit_spec: ModelSpec
    pretrained_cfg: dict[str, Any]

    def _entered(self, method: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As every quantized model's.

        Raises:
            UsageError: a method was replaced on a class that something within the model is of: what stands for a block or an
                attention computes what timm's class defined, and would not see it. Or tensors were left on meta, or corrections
                are for other places.
        """
        expect_itself(self)
        tell_foreign_on_scaled(self)
        tell_train_mode(self)
        record = self.dfqvit_record
        if record.acm_blocks and isinstance(x, torch.Tensor) and x.dim() == 4 and not torch.jit.is_tracing():
            record.expect_grid(*x.shape[-2:])
        return self._within(super()._entered, method, x, *args, **kwargs)  # type: ignore[misc]

    def forward_head(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As every quantized model's; see `_entered`."""
        expect_itself(self)
        return self._within(super().forward_head, x, *args, **kwargs)  # type: ignore[misc]

    def _within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function gives, where blocks need not ask what was asked here."""
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        before, ENTERED.now = ENTERED.now, True
        try:
            return function(*args, **kwargs)
        finally:
            ENTERED.now = before

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        emptied = getattr(fn, "__qualname__", "").startswith("Module.to_empty.")  # also of a module around this one
        for name, table in tables_of(self).items():
            if emptied or (table.is_meta and not fn(table).is_meta):
                raise UsageError(
                    f"to_empty would leave the quantized model's '{name}' without values, and no state_dict holds it: load the "
                    "whole model, by dfqvit.load"
                )
        self.__dict__.pop(METHODS, None)
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Without what a first call keeps."""
        return {name: value for name, value in self.__dict__.items() if name not in (METHODS, HOOKS)}

    def __repr__(self) -> str:
        title, *rows = _described(self)
        return "\n".join([f"{title[0]}, {title[1]}", *(f"  {name:<12} {value}" for name, value in rows)])

    def _repr_html_(self) -> str:
        (name, how), *rows = _described(self)
        lines = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
        return f"<table><caption>{escape(name)}, {escape(how)}</caption>{lines}</table>"


def _described(model: Any) -> list[tuple[str, str]]:
    """A title in two parts, and what one wants to know first about a quantized model."""
    record: QuantizationRecord = model.dfqvit_record
    recipe, why_not = record.recipe, integer_report(model)
    size = sum(file_bytes(model).values())
    integer = sum(not reason for reason in why_not.values())
    edges = "" if recipe.layer_bits is not None else f", first and last layer W{recipe.edge_bits}"
    return [
        (f"{type(model).__name__} '{record.spec.architecture}'", "quantized by dfqvit"),
        ("bits", f"{recipe.label}{edges}"),
        ("size", f"{size / 1e6:.2f} MB"),
        ("calibration", _calibrated_on(record)),
        (
            "correction",
            f"{record.acm}, blocks {', '.join(map(str, record.acm_blocks))}" if record.acm_blocks else "none",
        ),
        ("blocks", f"{integer} of {len(why_not)} run in integers"),
        ("input", " x ".join(map(str, record.preprocessing.input_size))),
    ]


def _calibrated_on(record: QuantizationRecord) -> str:
    beside = f" and {record.companions} procedural" if record.companions else ""
    return f"{record.samples - record.companions} images, {record.calibration}{beside}"


def widths_of(model: nn.Module) -> dict[str, int]:
    """{name of a quantized layer: bits of its weights}."""
    return {name: layer.w_bits for name, layer in quantized_layers(model).items()}


def counted(widths: Mapping[str, int]) -> str:
    """How many layers have how many bits, as "1 layer W2, 4 layers W3"."""
    counts = sorted(Counter(widths.values()).items())
    return ", ".join(f"{count} {'layer' if count == 1 else 'layers'} W{bits}" for bits, count in counts)
