"""The table of constructions."""

from collections.abc import Callable

from featherweight.common import Registry
from featherweight.sparse.masks import Masks

CONSTRUCTIONS: Registry[Callable[..., Masks]] = Registry("construction")
"""Masks that are built as a whole instead of by scores: functions of a model, by name."""
