"""Images from nothing but a float model: the first step of data-free quantization."""

from ..progress import Progress
from .config import SynthesisConfig
from .loop import Synthesis, synthesize

__all__ = ["Progress", "Synthesis", "SynthesisConfig", "synthesize"]
