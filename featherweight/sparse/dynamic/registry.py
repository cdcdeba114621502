"""The table of methods that change masks between optimizer steps."""

from collections.abc import Callable

from featherweight.common import Registry
from featherweight.sparse.dynamic.evolving import Evolving

DYNAMIC: Registry[Callable[..., Evolving]] = Registry("dynamic method")
"""Masks that change while the user trains: functions that attach to an optimizer, by name.

Each is called as ``method(model, optimizer, density, steps=..., seed=...)``.
"""
