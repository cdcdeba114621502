"""A convolution whose parameter is its kept weights, and the backends that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import Registry
from featherweight.sparse.execute import compiled, masked
from featherweight.sparse.execute.conv_choose import choose_conv as choose_conv
from featherweight.sparse.execute.conv_function import chwn_conv2d, masked_conv2d, prepare
from featherweight.sparse.execute.conv_geometry import Convolution, Pair, form_of
from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.pattern import SparsePattern

MISSING = "it needs numba: pip install 'featherweight[optim]'"


@dataclass(frozen=True)
class ConvBackend:
    """A way to compute a sparse convolution.

    Attributes:
        conv2d: of ``(x, values, pattern, bias, form)``.
        refusal: says why it can't run here, or None.
        prepare: of ``(pattern, form)``, makes the indices it needs.
    """

    conv2d: Callable[[Tensor, Tensor, SparsePattern, Tensor | None, Convolution], Tensor]
    refusal: Callable[[], str | None]
    prepare: Callable[[SparsePattern, Convolution], object]


CONV_BACKENDS: Registry[ConvBackend] = Registry("convolution backend")
"""Ways to compute a sparse convolution, by name."""

CONV_BACKENDS.register("masked", "a dense weight filled with the values; runs everywhere")(
    ConvBackend(masked_conv2d, lambda: None, lambda pattern, form: masked.prepare(pattern))
)
CONV_BACKENDS.register("chwn", "kept weights alone, batch innermost; compiled with numba, CPU")(
    ConvBackend(chwn_conv2d, lambda: None if compiled.available() else MISSING, prepare)
)


def check_conv_backend(backend: str) -> None:
    """Refuse a backend that is unknown or can't run here.

    Raises:
        ValueError: says why.
    """
    if reason := CONV_BACKENDS[backend].method.refusal():
        raise ValueError(f"backend {backend!r} can't run: {reason}")


class SparseConv2d(SparseLayer):
    """A convolution that stores, trains and multiplies by its kept weights alone.

    The result is an ordinary tensor (N, O, H, W). With backend "chwn" it has the batch innermost
    in memory, which elementwise functions keep, so that the input of a stack of such layers is
    brought to that layout once, at the first. Inputs on other devices, of other dtypes than the
    values or than float32 and float64, or without a batch, are convolved with the dense weight.

    Args:
        pattern: of the weight (O, I, kh, kw).
        values: (nnz,), kept weights ordered by rows.
        bias: (O,) or None.
        stride, padding: vertical, horizontal; zeros are padded.
        backend: a name of ``CONV_BACKENDS``.

    Raises:
        ValueError: the shapes do not fit, or the backend is unknown or can't run here.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        values: Tensor,
        bias: Tensor | None = None,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        backend: str = "chwn",
    ) -> None:
        if len(pattern.shape) != 4:
            raise ValueError(f"pattern must be of a weight (O, I, kh, kw), got {pattern}")
        check_conv_backend(backend)
        super().__init__(pattern, values, backend)
        self.bias: nn.Parameter | None
        own = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if own else nn.Parameter(bias))  # type: ignore[arg-type]
        self.stride, self.padding = stride, padding
        CONV_BACKENDS[backend].method.prepare(pattern, self.form)

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, mask: Tensor | None = None, backend: str = "chwn"
    ) -> SparseConv2d:
        """Make a sparse layer of a dense one; the bias is shared, the weight is not touched.

        Args:
            conv: the layer.
            mask: bool, (O, I, kh, kw); None: the nonzeros of the weight.
            backend: a name of ``CONV_BACKENDS``.

        Raises:
            ValueError: the layer is none that `supports` lets through.
        """
        if reason := cls.supports(conv):
            raise ValueError(f"conv can't be made sparse: {reason}")
        weight = conv.weight.detach()
        pattern = SparsePattern.from_mask(weight != 0 if mask is None else mask.to(weight.device))
        values = nn.Parameter(pattern.gather(weight), requires_grad=conv.weight.requires_grad)
        form = form_of(conv)
        made = cls(pattern, values, conv.bias, form.stride, form.padding, backend)
        return made.train(conv.training)

    @staticmethod
    def supports(conv: nn.Conv2d) -> str | None:
        """Say why a dense layer can't be made sparse, or return None."""
        if conv.groups != 1:
            return f"groups must be 1, got {conv.groups}: grouped convolutions are small already"
        if conv.dilation != (1, 1):
            return f"dilation must be 1, got {conv.dilation}: no kernel has it"
        if conv.padding_mode != "zeros":
            return f"padding_mode must be 'zeros', got {conv.padding_mode!r}"
        if conv.padding == "same" and any(k % 2 == 0 for k in conv.kernel_size):
            return f"padding 'same' of an even kernel {conv.kernel_size} differs from side to side"
        return None

    def to_dense(self) -> nn.Conv2d:
        """Return the dense layer with exactly the same weights; the bias is shared."""
        outputs, inputs = self.pattern.shape[:2]
        options: dict[str, Any] = {"bias": False, "device": "meta", "dtype": self.values.dtype}
        sizes = (self.form.kernel, self.stride, self.padding)
        conv = nn.Conv2d(inputs, outputs, *sizes, **options)
        weight = self.pattern.scatter(self.values.detach())
        conv.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        conv.bias = self.bias
        return conv.train(self.training)

    @property
    def form(self) -> Convolution:
        """Kernel, stride and padding."""
        _, _, down, right = self.pattern.shape
        return Convolution((down, right), self.stride, self.padding)

    def set_pattern(self, pattern: SparsePattern, values: Tensor) -> None:
        """Take another pattern and its values, as `SparseLayer.set_pattern` says."""
        super().set_pattern(pattern, values)
        CONV_BACKENDS[self.backend].method.prepare(pattern, self.form)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, I, H, W) to (N, O, H', W')."""
        if self.on_weight is not None and torch.is_grad_enabled():
            weight = self.weight
            self.on_weight(weight)
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)
        method = CONV_BACKENDS[self.backend].method
        return method.conv2d(x, self.values, self.pattern, self.bias, self.form)

    def extra_repr(self) -> str:
        """Say what it is in one line."""
        outputs, inputs = self.pattern.shape[:2]
        return (
            f"{inputs}, {outputs}, kernel_size={self.form.kernel}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, "
            f"density={self.pattern.density:.4g}, backend={self.backend!r}"
        )
