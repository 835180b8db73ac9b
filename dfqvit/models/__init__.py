"""All that knows timm: names (`loading`), weights (`checkpoint`, `weights`), structures (`spec`), `preprocessing`.

Beside them the families (`adapters`), what is no model of theirs (`foreign`),
transformers' models by their twin in timm (`twins`), the frame in which the float model runs
(`frame`), and the embedded models (`demo`).
"""

from .adapters import Adapter, Features, find_adapter
from .checkpoint import read_checkpoint
from .loading import FAMILIES, check_finite, load_model
from .preprocessing import Preprocessing
from .spec import ModelSpec
from .twins import from_transformers

__all__ = [
    "FAMILIES",
    "Adapter",
    "Features",
    "ModelSpec",
    "Preprocessing",
    "check_finite",
    "find_adapter",
    "from_transformers",
    "load_model",
    "read_checkpoint",
]
