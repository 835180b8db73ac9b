"""The integer runtime: a frozen quantized model whose blocks run as chains of integer operators."""

from .convert import RUNTIMES, accelerate, check_runtime, set_runtime

__all__ = ["RUNTIMES", "accelerate", "check_runtime", "set_runtime"]
