"""The integer runtime: a frozen quantized model whose blocks run in integers."""

from .convert import RUNTIMES, accelerate, check_runtime, integer_report, set_runtime

__all__ = ["RUNTIMES", "accelerate", "check_runtime", "integer_report", "set_runtime"]
