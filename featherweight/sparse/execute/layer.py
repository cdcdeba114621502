"""What all sparse layers share: values and pattern, checkpoints of the dense form, devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.sparse.execute.pattern import SparsePattern


class SparseLayer(nn.Module):
    """A layer that stores and trains the kept entries of its weight.

    Its state dict holds the dense ``weight``, so that it loads from and saves to the checkpoints
    of the dense layer. A loaded weight that is nonzero outside the pattern brings its own
    pattern, its nonzeros; otherwise the pattern stays.

    Attributes:
        values: (nnz,), the parameter; ordered by rows.
        pattern: which entries of the weight they are.
        backend: a name of ``BACKENDS``.
        on_weight: called with the dense weight of each forward pass that is differentiated; see
            `featherweight.sparse.dense_gradients`. None: no dense weight is made.
    """

    parameter_roles: Mapping[str, str] = {"values": "weight"}

    values: nn.Parameter
    pattern: SparsePattern
    backend: str

    def __init__(self, pattern: SparsePattern, values: Tensor, backend: str) -> None:
        super().__init__()
        if values.shape != (pattern.nnz,):
            raise ValueError(f"values must be ({pattern.nnz},), got {tuple(values.shape)}")
        self.pattern, self.backend = pattern, backend
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        self.on_weight: Callable[[Tensor], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each access; gradients reach the values."""
        return self.pattern.scatter(self.values)

    @torch.no_grad()
    def set_pattern(self, pattern: SparsePattern, values: Tensor) -> None:
        """Take another pattern and its values; the parameter object stays, its gradient goes.

        Args:
            pattern: of the same shape.
            values: (nnz,) of the new pattern.

        Raises:
            ValueError: the shape differs.
        """
        if pattern.shape != self.pattern.shape or values.shape != (pattern.nnz,):
            raise ValueError(f"{pattern} with {tuple(values.shape)} can't replace {self.pattern}")
        self.pattern = pattern
        self.values.grad = None
        self.values.data = values.detach().to(self.values)

    def to_dense(self) -> nn.Module:
        """Return the dense layer with exactly the same weights."""
        raise NotImplementedError(f"{type(self).__name__} has no dense form")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        values = self.values if keep_vars else self.values.detach()
        destination[f"{prefix}weight"] = self.pattern.scatter(values)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}values"]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: v for name, v in state_dict.items() if name.startswith(prefix)}
        weight = own.pop(f"{prefix}weight", None)
        if own.pop(f"{prefix}values", None) is not None and strict:
            unexpected_keys.append(f"{prefix}values")
        if weight is not None and tuple(weight.shape) != self.pattern.shape:
            error_msgs.append(
                f"size mismatch for {prefix}weight: {list(weight.shape)} in the checkpoint, "
                f"{list(self.pattern.shape)} in the model"
            )
        elif weight is not None:
            self._widen(weight)
            own[f"{prefix}values"] = self.pattern.gather(weight.to(self.pattern.device))
        missing: list[str] = []
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        names = {f"{prefix}values": f"{prefix}weight"}
        missing = [names.get(name, name) for name in missing]
        missing_keys += [m for m in missing if weight is None or m != f"{prefix}weight"]

    def _widen(self, weight: Tensor) -> None:
        """Take the pattern of a weight that is nonzero outside the present one."""
        nonzero = weight != 0
        inside = self.pattern.gather(nonzero.to(self.pattern.device))
        if int(nonzero.count_nonzero()) > int(inside.count_nonzero()):
            pattern = SparsePattern.from_mask(nonzero).to(self.pattern.device)
            self.set_pattern(pattern, self.values.new_zeros(pattern.nnz))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pattern = self.pattern.to(self.values.device)
        return self
