"""The table of federated algorithms."""

from __future__ import annotations

from collections.abc import Callable

from featherweight.common import Registry
from featherweight.federated.algorithms.base import Algorithm

ALGORITHMS: Registry[Callable[..., Algorithm]] = Registry("federated algorithm")
