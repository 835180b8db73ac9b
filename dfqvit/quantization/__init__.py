"""The arithmetic of quantization, without timm: recipe, scales and ranges, rounding of weights, layers."""
