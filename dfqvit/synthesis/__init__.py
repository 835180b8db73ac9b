"""Images from nothing but a float model: the first step of data-free quantization."""

from ..progress import Progress
from .config import SynthesisConfig
from .loop import Synthesis, frame_steps, synthesize

__all__ = ["Progress", "Synthesis", "SynthesisConfig", "frame_steps", "synthesize"]
