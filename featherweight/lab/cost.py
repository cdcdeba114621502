"""What a masked model costs: operations of one forward pass with zeros skipped, bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featherweight.common import PRUNABLE_MODULES, atomic_path, cpu_state, unwrap
from featherweight.sparse.masks import Masks, pack_bits


def flops(model: nn.Module, masks: Masks, image: Tensor) -> tuple[int, int]:
    """Count the floating-point operations of one forward pass of one image.

    A multiplication and an addition are two operations. Layers without masks (attention products
    among them) count in full.

    Args:
        model: left in the mode it was found in.
        masks: masks of the model.
        image: [1, C, H, W].

    Returns:
        Operations with masked weights skipped, and of the dense model.
    """
    net = unwrap(model)
    names = {id(p): n for n, p in net.named_parameters()}
    skipped: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        mask = masks.get(names[id(module.weight)])
        if mask is not None:
            zeros = mask.numel() - int(mask.sum())
            # Every entry of a weight is used once for each position that its layer outputs (of a
            # transposed convolution, whose first dimension is the input's: takes in).
            counted = inputs[0] if getattr(module, "transposed", False) else output
            positions = counted.numel() // mask.shape[0]
            skipped.append(2 * zeros * positions)

    hooks = [
        m.register_forward_hook(count) for m in net.modules() if isinstance(m, PRUNABLE_MODULES)
    ]
    modes = [(module, module.training) for module in net.modules()]
    try:
        # The counter does not know the CPU's fused attention; as plain products it counts anywhere.
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            net.eval()(image)
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()
    dense = counter.get_total_flops()
    return dense - sum(skipped), dense


def save_packed(path: Path, state: Mapping[str, Tensor], masks: Masks) -> int:
    """Write a state dict with masked parameters as values of the kept entries and one bit an entry.

    Args:
        path: safetensors file to write.
        state: state dict; its masked entries are zeros.
        masks: which parameters are packed, and what they keep.

    Returns:
        Size of the file in bytes.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in cpu_state(state).items():
        if name in masks:
            mask = masks[name].cpu()
            tensors[f"{name}.values"] = tensor[mask]
            tensors[f"{name}.mask"] = pack_bits(mask)
        else:
            tensors[name] = tensor
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return path.stat().st_size
