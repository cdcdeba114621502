"""How formats name and lay out the tensors of a quantised layer, and describe them in config.json.

``compressed-tensors`` is the ``pack-quantized`` layout of the library of that name and of vLLM;
``gptq`` is that of AutoGPTQ and its successors. Both store codes, scales and zero points that the
weights in memory were made from; nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import Registry
from featherweight.quant.export.packing import pack
from featherweight.quant.grid import Grid, Quantized
from featherweight.quant.matrix import QuantizedMatrix


@dataclass(frozen=True)
class Layout:
    """A format of quantised layers.

    Attributes:
        tensors: suffix to tensor, in place of the layer's ``weight``.
        config: the ``quantization_config`` for layers by grid and the names of linear layers left
            alone.
        check: raises ValueError if the format can't hold a layer.
        mixed: whether layers of one model may lie on different symmetric grids.
        experts: whether it can hold experts.
    """

    tensors: Callable[[Quantized], dict[str, Tensor]]
    config: Callable[[Mapping[Grid, Sequence[str]], list[str]], dict[str, Any]]
    check: Callable[[str, Quantized], None]
    mixed: bool = False
    experts: bool = False


FORMATS: Registry[Layout | None] = Registry("format")
"""How a model is written: layouts of quantised layers; None for weights as they are."""


def _compressed(quantized: Quantized) -> dict[str, Tensor]:
    bits, codes = quantized.grid.bits, quantized.codes
    tensors = {
        "weight_packed": pack(codes, bits),
        "weight_scale": quantized.scale.to(quantized.grid.scale_dtype),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if not quantized.grid.symmetric:
        tensors["weight_zero_point"] = pack(quantized.zero.mT, bits).mT
    return tensors


def _compressed_config(grids: Mapping[Grid, Sequence[str]], ignore: list[str]) -> dict[str, Any]:
    """Describe one group of layers for each grid; a single one takes all linear layers."""
    groups = {}
    for index, (grid, names) in enumerate(grids.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(grids) == 1 else list(names),
            "weights": _compressed_weights(grid),
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def _compressed_weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _compressed_check(name: str, quantized: Quantized) -> None:
    if quantized.grid.bits > 8:
        raise ValueError(f"{name} has {quantized.grid.bits} bits; the format holds up to 8")


def _gptq(quantized: Quantized) -> dict[str, Tensor]:
    bits, (_, columns) = quantized.grid.bits, quantized.codes.shape
    size = columns // quantized.scale.shape[1]
    return {
        "qweight": pack(quantized.codes, bits).mT,
        "qzeros": pack(quantized.zero.mT, bits),
        "scales": quantized.scale.mT.to(torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def _gptq_config(grids: Mapping[Grid, Sequence[str]], ignore: list[str]) -> dict[str, Any]:
    (grid,) = grids
    # v1 stores zero points less one and so can't hold zero: v2 for all.
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": -1 if grid.group_size is None else grid.group_size,
        "sym": grid.symmetric,
        "desc_act": False,
        "static_groups": False,
        "damp_percent": 0.01,
        "true_sequential": True,
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["featherweight"]},
    }


def _gptq_check(name: str, quantized: Quantized) -> None:
    rows, columns = quantized.codes.shape
    if quantized.grid.bits not in (2, 3, 4, 8):
        raise ValueError(f"{name} has {quantized.grid.bits} bits; the format holds 2, 3, 4 or 8")
    if rows % 32 or columns % 32:
        raise ValueError(f"{name} is {rows} x {columns}; the format needs multiples of 32")


FORMATS.register("compressed-tensors", "pack-quantized, read by transformers and vLLM")(
    Layout(_compressed, _compressed_config, _compressed_check, mixed=True, experts=True)
)
FORMATS.register("gptq", "GPTQ v2 layout, read by GPTQModel, vLLM and SGLang")(
    Layout(_gptq, _gptq_config, _gptq_check)
)
FORMATS.register("plain", "weights as they are: rotated, or rounded but not packed")(None)


_CHECKPOINT_NAMES = {
    "mixtral": (
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj.", ".w1."),
        (".up_proj.", ".w3."),
        (".down_proj.", ".w2."),
    )
}
"""How checkpoints of a model type call what transformers renames when it reads them."""


def packed_state(
    model: nn.Module, layers: Mapping[str, QuantizedMatrix], layout: Layout
) -> dict[str, Tensor]:
    """Return the state dict of a model with its quantised weights in a layout."""
    packed = {f"{name}.weight" for name in layers}
    state = {n: t for n, t in model.state_dict().items() if n not in packed and not _joint(n)}
    if model.config.tie_word_embeddings:  # type: ignore[union-attr]
        state.pop("lm_head.weight")
    for name, layer in layers.items():
        tensors = layout.tensors(layer.quantized)
        state |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return {_named(model, n): tensor.detach().cpu().contiguous() for n, tensor in state.items()}


def _joint(name: str) -> bool:
    """Tell whether a parameter holds all experts; files have them one by one."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _named(model: nn.Module, name: str) -> str:
    kind: Any = model.config.model_type  # type: ignore[union-attr]
    for here, there in _CHECKPOINT_NAMES.get(kind, ()):
        name = f"{name}.".replace(here, there)[:-1]
    return name


def check_grids(layout: Layout, grids: Mapping[str, Grid]) -> None:
    """Raise ValueError if a layout, or what reads it, can't hold layers on these grids.

    transformers reads asymmetric ``pack-quantized`` files, and experts, only where one grid holds
    for all.

    Args:
        layout: of the format.
        grids: of each layer.
    """
    symmetric = all(grid.symmetric for grid in grids.values())
    experts = any(".experts." in name for name in grids)
    if experts and not (layout.experts and symmetric):
        raise ValueError(
            "experts can be written as 'compressed-tensors' on a symmetric grid, or as 'plain'"
        )
    sizes = sorted({grid.group_size for grid in grids.values() if grid.group_size})
    if len(sizes) > 1 and (experts or not symmetric or not layout.mixed):
        what = "experts" if experts else "the format" if symmetric else "an asymmetric grid"
        raise ValueError(
            f"{what} can be written with one group size, layers need "
            f"{' and '.join(map(str, sizes))}; group_size {sizes[0]} fits all"
        )


def layout_config(
    model: nn.Module, layers: Mapping[str, QuantizedMatrix], layout: Layout
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model."""
    grids: dict[Grid, list[str]] = {}
    for name, layer in layers.items():
        grids.setdefault(layer.quantized.grid, []).append(_named(model, name))
    kept = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("Router")
    )
    return layout.config(grids, [_named(model, name) for name in kept if name not in layers])
