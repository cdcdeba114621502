"""Masks that are built as a whole, path by path or layer by layer, instead of scored by entry."""

from featherweight.sparse.constructions.npb import npb
from featherweight.sparse.constructions.phew import phew
from featherweight.sparse.constructions.registry import CONSTRUCTIONS

__all__ = ["CONSTRUCTIONS", "npb", "phew"]
