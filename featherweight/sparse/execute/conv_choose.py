"""Which backend a convolution gets when the user leaves it to the machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from featherweight.sparse.execute import compiled, cost
from featherweight.sparse.execute.chwn import to_chwn
from featherweight.sparse.execute.conv_function import chwn_conv2d, masked_conv2d
from featherweight.sparse.execute.conv_geometry import Convolution, form_of
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.execute.probe import fastest

MARGIN = 0.8  # of the masked time: the rest is for a change of layout before and after the layer
DENSE = 0.5  # density from which a try is not worth its time
EXAMPLE = (64, 16, 16)  # images, height and width where no example is given
LARGEST = 512  # channels, and
SIDE = 8  # down to which images are made smaller before they are made fewer
PRODUCTS = 3e8  # of weights and pixels; layers beyond cost in proportion


def choose_conv(conv: nn.Conv2d, mask: Tensor, example: Sequence[int] | None) -> str:
    """Return the backend that trains a convolution fastest on this machine.

    Backends are timed on random patterns of the same kind, the first time such a layer comes; the
    times are kept in a file, see `cost.path`. "masked" unless "chwn" is clearly faster.

    Args:
        conv: the layer.
        mask: bool, (O, I, kh, kw).
        example: shape of its input, (N, I, H, W); None: 64 images of 16x16.
    """
    density = float(mask.count_nonzero()) / max(1, mask.numel())
    on_cpu = conv.weight.device.type == "cpu" and conv.weight.dtype in compiled.DTYPES
    if not on_cpu or not compiled.available() or density > DENSE:
        return "masked"
    batch, *size = EXAMPLE if example is None else (example[0], *example[2:])
    times = _times(conv, density, [batch, *size])
    return "chwn" if times["chwn"] < MARGIN * times["masked"] else "masked"


def _times(conv: nn.Conv2d, density: float, example: list[int]) -> dict[str, float]:
    form = form_of(conv)
    channels = [int(min(cost.rounded(c, 1), LARGEST)) for c in conv.weight.shape[:2]]
    batch, *size = _smaller([int(cost.rounded(n, 1)) for n in example], prod(channels) * form.taps)
    size = [max(n, k) for n, k in zip(size, form.kernel, strict=True)]
    rough = min(1.0, cost.rounded(density, 3))
    return cost.seconds(
        f"conv {channels[0]}x{channels[1]} {form[:3]}, input {batch}x{size[0]}x{size[1]}, "
        f"density {rough:.3g}, {conv.weight.dtype}",
        lambda: conv_seconds(channels, form, (batch, *size), rough, conv.weight.dtype),
    )


def _smaller(example: list[int], weights: int) -> list[int]:
    """Halve the height and width, then the number of images, until a try is quick enough."""
    batch, height, width = example
    while weights * batch * height * width > PRODUCTS and batch > 1:
        if max(height, width) > SIDE:  # images last: kernels take many at a time
            height, width = -(-height // 2), -(-width // 2)
        else:
            batch //= 2
    return [batch, height, width]


def conv_seconds(
    channels: Sequence[int],
    form: Convolution,
    example: Sequence[int],
    density: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Time a training step of one convolution: forward and both gradients, no optimizer.

    Args:
        channels: outputs, inputs.
        form: kernel, stride and padding.
        example: images, height and width of the input.
        density: kept fraction of random entries, in [0, 1].
        dtype: of weights and activations.

    Returns:
        Seconds, by backend. Each gets its activations as it wants them; "masked" in the faster of
        torch's two layouts.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = channels
    mask = torch.rand(outputs, inputs, *form.kernel, generator=generator) < density
    pattern = SparsePattern.from_mask(mask)
    values = torch.randn(pattern.nnz, generator=generator).to(dtype).requires_grad_()
    batch, *size = example
    x = torch.randn(batch, inputs, *size, generator=generator).to(dtype)
    gradient = torch.randn(batch, outputs, *form.output(*size), generator=generator).to(dtype)
    last = torch.channels_last
    forms = {
        "chwn": (chwn_conv2d, to_chwn(x), to_chwn(gradient)),
        "masked": (masked_conv2d, x, gradient),
        "masked, channels last": (
            masked_conv2d,
            x.to(memory_format=last),
            gradient.to(memory_format=last),
        ),
    }

    def step(name: str) -> None:
        conv2d, images, of_output = forms[name]
        y = conv2d(images.requires_grad_(), values, pattern, None, form)
        torch.autograd.grad(y, (images, values), of_output)

    found = fastest({name: functools.partial(step, name) for name in forms})
    found["masked"] = min(found["masked"], found.pop("masked, channels last"))
    return found
