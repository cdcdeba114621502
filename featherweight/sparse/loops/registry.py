"""The table of loops."""

from collections.abc import Callable, Iterator

from featherweight.common import Registry
from featherweight.sparse.loops.level import Level

LOOPS: Registry[Callable[..., Iterator[Level]]] = Registry("loop")
"""Methods that prune between trainings: generators of levels, by name."""
