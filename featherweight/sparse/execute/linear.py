"""A linear layer whose parameter is its kept weights, and the backends that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import Registry
from featherweight.sparse.execute import compiled, feature_major, masked, semi_structured, shrunk
from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.pattern import SparsePattern


def _runs_everywhere(pattern: SparsePattern, values: Tensor) -> str | None:
    """Refuse nothing."""
    return None


def _derives_nothing(pattern: SparsePattern) -> None:
    """Need nothing but the pattern."""


@dataclass(frozen=True)
class Backend:
    """A way to compute ``x @ W.T + b`` from the kept entries of W.

    Attributes:
        linear: of ``(x, values, pattern, bias)``.
        refusal: of ``(pattern, values)``: why it can't, or None.
        prepare: makes what the backend derives from a pattern, which is then kept with it.
    """

    linear: Callable[[Tensor, Tensor, SparsePattern, Tensor | None], Tensor]
    refusal: Callable[[SparsePattern, Tensor], str | None] = _runs_everywhere
    prepare: Callable[[SparsePattern], object] = _derives_nothing


def _only_on_cpu(pattern: SparsePattern, values: Tensor) -> str | None:
    return None if values.device.type == "cpu" else f"it runs on the CPU, not on {values.device}"


def _needs_numba(pattern: SparsePattern, values: Tensor) -> str | None:
    if not compiled.available():
        return "it needs numba: pip install 'featherweight[optim]'"
    return _only_on_cpu(pattern, values)


BACKENDS: Registry[Backend] = Registry("backend")
"""Ways to compute a sparse layer, by name."""

BACKENDS.register("masked", "a dense weight filled with the values; runs everywhere")(
    Backend(masked.linear, prepare=masked.prepare)
)
BACKENDS.register("csr", "torch's CSR product (MKL); for batches under 16")(
    Backend(partial(feature_major.linear, name="csr"), _only_on_cpu)
)
BACKENDS.register("bag", "embedding_bag, and csr for batches under 16")(
    Backend(partial(feature_major.linear, name="bag"), _only_on_cpu)
)
BACKENDS.register("bag-numba", "as bag, the values' gradient by a kernel compiled with numba")(
    Backend(partial(feature_major.linear, name="bag-numba"), _needs_numba)
)
BACKENDS.register("shrunk", "a small dense weight, without the rows and columns that hold nothing")(
    Backend(shrunk.linear, prepare=shrunk.prepare)
)
BACKENDS.register("2:4", "semi-structured tensor cores at inference; CUDA only")(
    Backend(semi_structured.linear, semi_structured.refusal, masked.prepare)
)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    pattern: SparsePattern,
    bias: Tensor | None = None,
    backend: str = "bag",
) -> Tensor:
    """Compute ``x @ W.T + b`` from the kept entries of W.

    All backends give the same result up to rounding, whatever the number of threads, and can be
    differentiated twice.

    Args:
        x: (..., columns), any strides.
        values: (nnz,), ordered by rows.
        pattern: of W, (rows, columns).
        bias: (rows,); None: none.
        backend: a name of ``BACKENDS``.

    Returns:
        (..., rows). The backends "csr", "bag" and "bag-numba" return a view whose last axis is
        outermost in memory.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown or can't run this.
    """
    if x.shape[-1:] != (pattern.cols,):
        raise ValueError(f"x must be (..., {pattern.cols}), got {tuple(x.shape)}")
    check_backend(backend, pattern, values)
    return BACKENDS[backend].method.linear(x, values, pattern, bias)


def check_backend(backend: str, pattern: SparsePattern, values: Tensor) -> None:
    """Refuse a backend that is unknown or can't run a layer.

    Raises:
        ValueError: says why.
    """
    if reason := BACKENDS[backend].method.refusal(pattern, values):
        raise ValueError(f"backend {backend!r} can't run this layer: {reason}")


class SparseLinear(SparseLayer):
    """A linear layer that stores, trains and multiplies by its kept weights alone.

    Args:
        pattern: of the weight (out, in).
        values: (nnz,), kept weights ordered by rows.
        bias: (out,) or None.
        backend: a name of ``BACKENDS``.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown or can't run this.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        values: Tensor,
        bias: Tensor | None = None,
        backend: str = "bag",
    ) -> None:
        if len(pattern.shape) != 2:
            raise ValueError(f"pattern must be of a matrix, got {pattern}")
        check_backend(backend, pattern, values)
        super().__init__(pattern, values, backend)
        self.bias: nn.Parameter | None
        BACKENDS[backend].method.prepare(pattern)
        own = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if own else nn.Parameter(bias))  # type: ignore[arg-type]

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Tensor | None = None, backend: str = "bag"
    ) -> SparseLinear:
        """Make a sparse layer of a dense one; the bias is shared, the weight is not touched.

        Args:
            linear: the layer.
            mask: bool, (out, in); None: the nonzeros of the weight.
            backend: a name of ``BACKENDS``.
        """
        weight = linear.weight.detach()
        kept = weight != 0 if mask is None else mask.to(weight.device)
        return cls.from_pattern(linear, SparsePattern.from_mask(kept), backend)

    @classmethod
    def from_pattern(cls, linear: nn.Linear, pattern: SparsePattern, backend: str) -> SparseLinear:
        """Do the same with a pattern."""
        values = pattern.gather(linear.weight.detach())
        parameter = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        return cls(pattern, parameter, linear.bias, backend).train(linear.training)

    @staticmethod
    def supports(linear: nn.Linear) -> str | None:
        """Say why a dense layer can't be made sparse, or return None."""
        return None

    def to_dense(self) -> nn.Linear:
        """Return the dense layer with exactly the same weights; the bias is shared."""
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": self.values.dtype}
        linear = nn.Linear(self.in_features, self.out_features, **options)
        weight = self.pattern.scatter(self.values.detach())
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.pattern.cols

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.pattern.rows

    def set_pattern(self, pattern: SparsePattern, values: Tensor) -> None:
        """Take another pattern and its values, as `SparseLayer.set_pattern` says."""
        super().set_pattern(pattern, values)
        BACKENDS[self.backend].method.prepare(pattern)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.on_weight is not None and torch.is_grad_enabled():
            weight = self.weight
            self.on_weight(weight)
            return nn.functional.linear(x, weight, self.bias)
        return BACKENDS[self.backend].method.linear(x, self.values, self.pattern, self.bias)

    def extra_repr(self) -> str:
        """Say what it is in one line."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.pattern.density:.4g}, "
            f"backend={self.backend!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        if BACKENDS[self.backend].method.refusal(self.pattern, self.values):
            self.backend = "masked"  # which runs on every device
        BACKENDS[self.backend].method.prepare(self.pattern)
        return self
