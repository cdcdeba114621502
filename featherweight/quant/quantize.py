"""Quantise the linear layers of a decoder's blocks; embedding and head keep their precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Registry
from featherweight.quant.calibrate import (
    Stream,
    check_hessian,
    check_ids,
    evaluating,
    open_stream,
    stage_hessian,
)
from featherweight.quant.decoder import Block, Decoder, check_finite, read_decoder
from featherweight.quant.experts import (
    READ,
    WRITE,
    dense_experts,
    gptq_experts,
    round_experts,
)
from featherweight.quant.gptq import Gptq, gptq_matrix
from featherweight.quant.grid import Grid, Quantized
from featherweight.quant.group_sizes import layer_grids, warn_of_smaller_groups
from featherweight.quant.matrix import QuantizedMatrix, relative_error, split
from featherweight.quant.rtn import round_to_nearest
from featherweight.quant.trial import Trial

_EXPERTS = "quantized_experts"  # attribute of an experts' module: EXPERT.PART to QuantizedMatrix

QUANTIZERS: Registry[Callable[..., nn.Module]] = Registry("quantiser")
"""How a decoder's weights are rounded: functions of a model that work in place and return it."""


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight lies on a grid; it computes as a plain one.

    Attributes:
        quantized: codes, scales and zero points that ``weight`` was made from.
        error: ``tr(dW H dW^T) / tr(W H W^T)`` on the calibration inputs; without any, H = I.
        damping: that GPTQ needed; None for round to nearest.
    """

    quantized: Quantized
    error: float
    damping: float | None

    @classmethod
    def of(
        cls, linear: nn.Linear, quantized: Quantized, error: float, damping: float | None
    ) -> QuantizedLinear:
        """Make one in place of a plain layer, with its bias."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = quantized.dequantize(linear.weight.dtype).to(linear.weight.device)
        made.weight = nn.Parameter(weight, linear.weight.requires_grad)
        made.bias = linear.bias
        made.quantized, made.error, made.damping = quantized, error, damping
        return made.train(linear.training)


@dataclass(frozen=True)
class Layer:
    """Where quantising stands.

    Attributes:
        index: of the layer that is done, from 1.
        layers: how many there are.
        errors: relative error of each of its modules.
    """

    index: int
    layers: int
    errors: dict[str, float]


Watch = Callable[[Layer], None]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def quantized_matrices(model: nn.Module) -> dict[str, QuantizedMatrix]:
    """Return codes and error of every quantised matrix by name, experts one by one."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found[name] = QuantizedMatrix(module.quantized, module.error, module.damping)
        for part, one in module.__dict__.get(_EXPERTS, {}).items():
            found[f"{name}.{part}"] = one
    return found


@QUANTIZERS.register("rtn", "round every weight to the nearest grid point; no data")
@torch.no_grad()
def rtn(
    model: nn.Module,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Round the weights of all blocks to the nearest grid point, in place.

    Rotations do not help here, their folded gains hurt: prefer :func:`gptq` after one.

    Args:
        model: a supported decoder.
        bits: 2 to 8.
        group_size: weights that share a scale, halved where it does not divide a row; None for a
            whole row.
        symmetric: zero point in the middle.
        clip: search the range of each group.
        scale_dtype: of the scales; None for that of the weights.
        watch: called after each layer.

    Returns:
        The same model, with :class:`QuantizedLinear` layers.

    Raises:
        ValueError: the model is not supported, or no half of the group size divides a row;
            nothing was changed.
    """
    decoder, grids = _checked(model, _grid(model, bits, group_size, symmetric, clip, scale_dtype))
    found: dict[str, QuantizedMatrix] = {}
    for index, block in enumerate(decoder.blocks):
        names = [name for stage in block.stages() for name in stage]
        for name in names:
            weight = _linear(model, name).weight.detach()
            quantized = round_to_nearest(weight, grids[name])
            found[name] = QuantizedMatrix(quantized, relative_error(weight, quantized, None), None)
        if block.experts:
            experts = model.get_submodule(block.experts)
            done = dict(round_experts(experts, _expert_grids(grids, block.experts)))
            found |= {f"{block.experts}.{name}": one for name, one in done.items()}
        own = (name for name in found if name.startswith(f"{block.name}."))
        _tell(watch, index, decoder, {name: found[name].error for name in own})
    return _install(model, found)


@QUANTIZERS.register(
    "gptq",
    "round column by column; later columns make up for the error",
    "Frantar et al. 2023, arXiv:2210.17323",
    needs=("calibration",),
)
@torch.no_grad()
def gptq(
    model: nn.Module,
    calibration: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    symmetric: bool = True,
    clip: bool = True,
    scale_dtype: torch.dtype | None = None,
    options: Gptq | None = None,
    watch: Watch | None = None,
) -> nn.Module:
    """Quantise the weights of all blocks by GPTQ, layer by layer, in place.

    Each set of matrices with common inputs sees what the quantised ones before it make. Besides the
    model, memory holds the calibration tokens' hidden states, one layer's Hessian, and the
    codes. Weights are replaced only after the last layer, so that an error changes nothing.

    Args:
        model: a supported decoder, rotated before if at all.
        calibration: token ids, ``[sequences, tokens]``; 128 sequences of 2048 are customary.
        bits: 2 to 8.
        group_size: weights that share a scale, halved where it does not divide a row; None for a
            whole row.
        symmetric: zero point in the middle.
        clip: search the range of each group.
        scale_dtype: of the scales; None for that of the weights.
        options: of GPTQ, see :class:`Gptq`.
        watch: called after each layer.

    Returns:
        The same model, with :class:`QuantizedLinear` layers.

    Raises:
        ValueError: the model is not supported, ids are out of range, no half of the group size
            divides a row, or inputs are not finite; nothing was changed.
    """
    decoder, grids = _checked(model, _grid(model, bits, group_size, symmetric, clip, scale_dtype))
    stream = open_stream(decoder, check_ids(calibration, decoder.embedding.num_embeddings))
    found: dict[str, QuantizedMatrix] = {}
    with evaluating(model):
        for index, block in enumerate(decoder.blocks):
            with Trial() as trial:
                done = _quantize_block(decoder, stream, index, block, grids, options, trial)
                stream.advance(index, block.layer)
            found |= done
            _tell(watch, index, decoder, {name: one.error for name, one in done.items()})
    return _install(model, found)


def _quantize_block(
    decoder: Decoder,
    stream: Stream,
    index: int,
    block: Block,
    grids: Mapping[str, Grid],
    options: Gptq | None,
    trial: Trial,
) -> dict[str, QuantizedMatrix]:
    found: dict[str, QuantizedMatrix] = {}
    for names in block.stages():
        linears = [_linear(decoder.model, name) for name in names]
        hessian = stage_hessian(stream, index, block, linears[0])
        check_hessian(hessian, names[0])
        weights = [linear.weight.detach() for linear in linears]
        outcome = gptq_matrix(torch.cat(weights), hessian, grids[names[0]], options)
        for name, linear, part in zip(names, linears, split(outcome, weights), strict=True):
            found[name] = QuantizedMatrix(
                part, relative_error(linear.weight, part, hessian), outcome.damping
            )
            trial.put(linear.weight, part.dequantize(linear.weight.dtype))
    if block.experts:
        experts = decoder.model.get_submodule(block.experts)
        own = _expert_grids(grids, block.experts)
        done = dict(gptq_experts(stream, index, block, experts, own, options))
        for name, weight in dense_experts(done, linears[0].weight.dtype).items():
            trial.put(experts.get_parameter(name), weight)
        found |= {f"{block.experts}.{name}": one for name, one in done.items()}
    return found


def _expert_grids(grids: Mapping[str, Grid], path: str) -> dict[str, Grid]:
    return {name: grids[f"{path}.{name}"] for name in (READ, WRITE)}


def _grid(
    model: nn.Module,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    clip: bool,
    scale_dtype: torch.dtype | None,
) -> Grid:
    dtype = scale_dtype or next(model.parameters()).dtype
    return Grid(bits, group_size, symmetric, clip, dtype)


def _checked(model: nn.Module, grid: Grid) -> tuple[Decoder, dict[str, Grid]]:
    """Refuse what can't be quantised before anything is done; return the grid of each layer."""
    decoder = read_decoder(model)
    check_finite(decoder)
    grids = layer_grids(decoder, grid)
    warn_of_smaller_groups(grid, grids)
    return decoder, grids


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _tell(watch: Watch | None, index: int, decoder: Decoder, errors: dict[str, float]) -> None:
    if watch is not None:
        watch(Layer(index + 1, len(decoder.blocks), errors))


def _install(model: nn.Module, found: Mapping[str, QuantizedMatrix]) -> nn.Module:
    experts: dict[str, dict[str, QuantizedMatrix]] = {}
    for name, one in found.items():
        path, inside, part = name.partition(".experts.")
        if inside:
            experts.setdefault(f"{path}.experts", {})[part] = one
            continue
        made = QuantizedLinear.of(_linear(model, name), one.quantized, one.error, one.damping)
        model.set_submodule(name, made)
    for path, parts in experts.items():
        module = model.get_submodule(path)
        for name, weight in dense_experts(parts, module.get_parameter(READ).dtype).items():
            module.get_parameter(name).data = weight.to(module.get_parameter(name).device)
        setattr(module, _EXPERTS, parts)
    return model
