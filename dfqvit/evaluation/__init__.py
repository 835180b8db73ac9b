"""Labelled images, accuracy, speed and energy of a model."""

from .accuracy import Evaluation, count_hits, evaluate

__all__ = ["Evaluation", "count_hits", "evaluate"]
