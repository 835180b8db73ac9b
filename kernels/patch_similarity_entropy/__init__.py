"""The entropy of patch similarities: see `op.py`."""

from .op import patch_similarity_entropy, similarity_range

__all__ = ["patch_similarity_entropy", "similarity_range"]
