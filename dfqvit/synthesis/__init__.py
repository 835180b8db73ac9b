"""Images from nothing but a float model: the first step of data-free quantization."""

from .config import SynthesisConfig
from .loop import Progress, Synthesis, synthesize

__all__ = ["Progress", "Synthesis", "SynthesisConfig", "synthesize"]
