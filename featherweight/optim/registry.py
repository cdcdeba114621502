"""The table of optimizers that recipes, the command line, docs and tests read."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from featherweight.common import Registry

OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry("optimizer")
"""How weights move: optimizer classes, and functions that put something around an optimizer."""
