"""What leaves the process: the file of a quantized model, ONNX, the Hugging Face Hub, facts about the machine."""

from . import export
from .file import load, save, sizes

__all__ = ["export", "load", "save", "sizes"]
