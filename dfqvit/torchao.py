"""`DataFreeConfig`: this method through torchao's `quantize_`, if torchao is installed.

    from torchao.quantization import quantize_
    quantize_(model, dfqvit.DataFreeConfig(w_bits=4, a_bits=8), filter_fn=dfqvit.DataFreeConfig.whole_model)

`quantize_` hands a config one module after the other, those that its filter names. Ranges, rounding and corrections of this method
are those of a whole network, so the filter names the model itself, or the model within another: `lambda module, name: name ==
"backbone"`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from torch import nn

from .api import quantize
from .errors import UsageError
from .models.adapters import find_adapter

if TYPE_CHECKING or importlib.util.find_spec("torchao") is None:
    _Base: Any = object
else:
    _Base = importlib.import_module("torchao.core.config").AOBaseConfig


class DataFreeConfig(_Base):
    """A configuration for `torchao.quantization.quantize_`, which makes a timm model what `dfqvit.quantize` returns, in place.

    The model keeps its identity: who holds it, as a model around it does, holds the quantized one. `dfqvit.save` writes it.

    Attributes:
        settings: the keyword arguments of `dfqvit.quantize`.

    Raises:
        UsageError: torchao is not installed; `quantize_` was called without a filter that names the whole model; and, while it
            runs, what `dfqvit.quantize` raises. The model is as it was then.
    """

    def __init__(self, w_bits: int = 4, a_bits: int = 8, **settings: Any) -> None:
        if _Base is object:
            raise UsageError(
                "DataFreeConfig is for torchao, which is not installed; call dfqvit.quantize(model) instead"
            )
        self.settings = {"w_bits": w_bits, "a_bits": a_bits, **settings}

    def __repr__(self) -> str:
        return f"DataFreeConfig({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    @staticmethod
    def whole_model(module: nn.Module, name: str) -> bool:
        """A `filter_fn` for `quantize_`: the model that it was called with, and nothing within."""
        return name == ""


def _transform(module: nn.Module, config: DataFreeConfig) -> nn.Module:
    """What `quantize_` calls: the module itself, which is the quantized model now."""
    try:
        find_adapter(module)
    except UsageError as error:
        raise UsageError(
            f"quantize_ gave DataFreeConfig a {type(module).__name__}; it takes the whole model, so call quantize_ with "
            "filter_fn=dfqvit.DataFreeConfig.whole_model"
        ) from error
    qmodel = quantize(module, **config.settings)
    module.__class__ = type(qmodel)
    module.__dict__ = qmodel.__dict__
    return module


if _Base is not object:
    _registered = importlib.import_module("torchao.quantization.transform_module").register_quantize_module_handler
    _registered(DataFreeConfig)(_transform)
