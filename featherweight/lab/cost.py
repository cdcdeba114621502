"""What a masked model costs: operations of one forward pass with zeros skipped, bytes on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from featherweight.common import PRUNABLE_MODULES, atomic_path, cpu_state, unwrap
from featherweight.depth import is_routed, to_dense
from featherweight.sparse.masks import Masks
from featherweight.sparse.packed import save_packed


def flops(model: nn.Module, masks: Masks, image: Tensor) -> tuple[int, int]:
    """Count the floating-point operations of one forward pass of one image.

    A multiplication and an addition are two operations. Layers without masks (attention products
    among them) count in full.

    Args:
        model: left in the mode it was found in.
        masks: masks of the model.
        image: [1, C, H, W].

    Returns:
        Operations with masked weights and what routing leaves out skipped, and of the dense model.
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
    try:
        total = _operations(net, image)
    finally:
        for hook in hooks:
            hook.remove()
    dense = _operations(to_dense(copy.deepcopy(net)), image) if is_routed(net) else total
    return total - sum(skipped), dense


@torch.no_grad()
def _operations(net: nn.Module, image: Tensor) -> int:
    modes = [(module, module.training) for module in net.modules()]
    # The counter does not know the CPU's fused attention; as plain products it counts anywhere.
    counter = FlopCounterMode(display=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            net.eval()(image)
    finally:
        for module, training in modes:
            module.training = training
    return int(counter.get_total_flops())


def measure(
    folder: Path,
    model: nn.Module,
    masks: Masks,
    start: Mapping[str, Tensor],
    before: Path,
    image: Tensor,
) -> dict[str, Any]:
    """Write the model that a level ends with, dense and packed, and measure it.

    Args:
        folder: of the level; gets ``model``, ``packed`` and ``masks`` as safetensors.
        model: trained, its masked weights zero.
        masks: masks of the level.
        start: the model's state at the start of the run, on the CPU.
        before: the model file of the level before; need not exist.
        image: [1, C, H, W], on the model's device.

    Returns:
        A row of the levels' log, all but the accuracies.
    """
    kept, state = masks.to("cpu"), cpu_state(unwrap(model).state_dict())
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.clone() for name, tensor in state.items()}, temporary)
    kept.save(folder / "masks.safetensors")
    packed = save_packed(folder / "packed.safetensors", state, kept)
    operations, dense_operations = flops(model, masks, image)
    previous = load_file(before) if before.is_file() else None
    return {
        "density": kept.density,
        "nonzeros": kept.nonzeros,
        "prunable": kept.numel,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": [_layer(name, mask) for name, mask in kept.items()],
        "flips_from_start": _flips(kept, start, state),
        "flips_from_previous": None if previous is None else _flips(kept, previous, state),
        "flops": operations,
        "dense_flops": dense_operations,
        "bytes": packed,
        "dense_bytes": (folder / "model.safetensors").stat().st_size,
    }


def _layer(name: str, mask: Tensor) -> dict[str, Any]:
    size, count = mask.numel(), int(mask.sum())
    return {"name": name, "numel": size, "nonzeros": count, "density": count / size}


def _flips(
    masks: Masks, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, int]:
    flips = masks.sign_flips(before, after)
    return {"kept": sum(flips.kept.values()), "flipped": sum(flips.flipped.values())}
