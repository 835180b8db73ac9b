"""From a float model and images to a quantized one: observe, allocate bits, round, reconstruct, correct (ACM), measure."""

from .observation import BATCH, calibrate, convert, crops, freeze, in_fixed_order, observe

__all__ = ["BATCH", "calibrate", "convert", "crops", "freeze", "in_fixed_order", "observe"]
