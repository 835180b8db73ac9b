"""All that knows timm: names, checkpoints, preprocessing (`loading`), the families (`adapters`), the embedded models (`demo`)."""

from .adapters import Adapter, Features, find_adapter
from .loading import FAMILIES, ModelSpec, Preprocessing, check_finite, load_model, read_checkpoint

__all__ = [
    "FAMILIES",
    "Adapter",
    "Features",
    "ModelSpec",
    "Preprocessing",
    "check_finite",
    "find_adapter",
    "load_model",
    "read_checkpoint",
]
