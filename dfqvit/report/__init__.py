"""`report.html`: one self-contained page about a quantized model. Pictures and charts are inline, nothing is loaded or run."""

from .measure import Divergence, activation_ranges, divergence, similarity_density
from .page import Dense, Report, write_report

__all__ = ["Dense", "Divergence", "Report", "activation_ranges", "divergence", "similarity_density", "write_report"]
