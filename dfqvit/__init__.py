"""dfqvit: data-free quantization of timm vision transformers (DFQ-ViT, arXiv 2507.14481), with fused kernels.

The method is here (`quantize`, `synthesize`, `patch`, `save`, `load`); the operators are in `dfqvit.kernels` and can be used alone.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

# In a source tree the operators stand beside this package, not in it. An editable install maps them; where the tree itself
# is on sys.path (running in a clone, which also shadows a regular install) they are found through the package's path.
_HERE = Path(__file__).parent
if not (_HERE / "kernels").exists() and (_HERE.parent / "kernels" / "dispatch.py").exists():
    __path__.append(str(_HERE.parent))

if TYPE_CHECKING:
    from . import kernels
    from .api import quantize
    from .errors import DfqvitError, Interrupted, UsageError
    from .kernels import set_backend
    from .models import demo, from_transformers
    from .patching import patch
    from .progress import Progress
    from .runtime import integer_report
    from .runtime.record import QuantizedModel
    from .storage import load, save
    from .synthesis import synthesize
    from .torchao import DataFreeConfig

_HOMES = {
    "DataFreeConfig": "torchao",
    "DfqvitError": "errors",
    "Interrupted": "errors",
    "Progress": "progress",
    "QuantizedModel": "runtime.record",
    "UsageError": "errors",
    "demo": "models",
    "evaluation": "",
    "from_transformers": "models",
    "integer_report": "runtime",
    "kernels": "",
    "load": "storage",
    "models": "",
    "patch": "patching",
    "quantize": "api",
    "save": "storage",
    "set_backend": "kernels",
    "storage": "",
    "synthesize": "synthesis",
}

__all__ = [
    "DataFreeConfig",
    "DfqvitError",
    "Interrupted",
    "Progress",
    "QuantizedModel",
    "UsageError",
    "__version__",
    "demo",
    "from_transformers",
    "integer_report",
    "kernels",
    "load",
    "patch",
    "quantize",
    "save",
    "set_backend",
    "synthesize",
]


def __getattr__(name: str) -> Any:  # PEP 562: `import dfqvit` stays light, timm is imported when the method is used
    if name not in _HOMES:
        raise AttributeError(f"module 'dfqvit' has no attribute '{name}'")
    home = _HOMES[name]
    module = importlib.import_module(f"{__name__}.{home or name}")
    value = getattr(module, name) if home else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES})  # the rooms that the documentation names are in no `import *`
