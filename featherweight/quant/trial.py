"""Other weights for a while."""

from __future__ import annotations

from torch import Tensor


class Trial:
    """Holds other weights in some parameters, and puts the old ones back at the end."""

    def __init__(self) -> None:
        self.old: list[tuple[Tensor, Tensor]] = []

    def put(self, parameter: Tensor, weight: Tensor) -> None:
        """Give a parameter another weight for now."""
        self.old.append((parameter, parameter.data))
        parameter.data = weight

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, weight in self.old:
            parameter.data = weight
