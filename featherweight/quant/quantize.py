"""Quantise the linear layers of a decoder's blocks; embedding and head keep their precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    refuse_experts,
    stage_hessian,
)
from featherweight.quant.decoder import Block, Decoder, check_finite, read_decoder
from featherweight.quant.gptq import Gptq, Outcome, gptq_matrix
from featherweight.quant.grid import Grid, Quantized
from featherweight.quant.rtn import round_to_nearest

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


@dataclass(frozen=True)
class _Found:
    quantized: Quantized
    error: float
    damping: float | None


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised layers of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


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
        model: a supported decoder without experts.
        bits: 2 to 8.
        group_size: weights that share a scale; None for a whole row.
        symmetric: zero point in the middle.
        clip: search the range of each group.
        scale_dtype: of the scales; None for that of the weights.
        watch: called after each layer.

    Returns:
        The same model, with :class:`QuantizedLinear` layers.

    Raises:
        ValueError: the model is not supported, or groups do not divide a row; nothing was changed.
    """
    grid = _grid(model, bits, group_size, symmetric, clip, scale_dtype)
    decoder = _checked(model, grid)
    found: dict[str, _Found] = {}
    for index, block in enumerate(decoder.blocks):
        names = [name for stage in block.stages() for name in stage]
        for name in names:
            weight = _linear(model, name).weight.detach()
            quantized = round_to_nearest(weight, grid)
            found[name] = _Found(quantized, _error(weight, quantized, None), None)
        _tell(watch, index, decoder, {name: found[name].error for name in names})
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
        model: a supported decoder without experts, rotated before if at all.
        calibration: token ids, ``[sequences, tokens]``; 128 sequences of 2048 are customary.
        bits: 2 to 8.
        group_size: weights that share a scale; None for a whole row.
        symmetric: zero point in the middle.
        clip: search the range of each group.
        scale_dtype: of the scales; None for that of the weights.
        options: of GPTQ, see :class:`Gptq`.
        watch: called after each layer.

    Returns:
        The same model, with :class:`QuantizedLinear` layers.

    Raises:
        ValueError: the model is not supported, ids are out of range, groups do not divide a row, or
            inputs are not finite; nothing was changed.
    """
    grid = _grid(model, bits, group_size, symmetric, clip, scale_dtype)
    decoder = _checked(model, grid)
    stream = open_stream(decoder, check_ids(calibration, decoder.embedding.num_embeddings))
    found: dict[str, _Found] = {}
    with evaluating(model):
        for index, block in enumerate(decoder.blocks):
            with _Trial() as trial:
                done = _quantize_block(decoder, stream, index, block, grid, options, trial)
                stream.advance(index, block.layer)
            found |= done
            _tell(watch, index, decoder, {name: one.error for name, one in done.items()})
    return _install(model, found)


def _quantize_block(
    decoder: Decoder,
    stream: Stream,
    index: int,
    block: Block,
    grid: Grid,
    options: Gptq | None,
    trial: _Trial,
) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for names in block.stages():
        linears = [_linear(decoder.model, name) for name in names]
        hessian = stage_hessian(stream, index, block, linears[0])
        check_hessian(hessian, names[0])
        weights = [linear.weight.detach() for linear in linears]
        outcome = gptq_matrix(torch.cat(weights), hessian, grid, options)
        for name, linear, part in zip(names, linears, _split(outcome, weights), strict=True):
            found[name] = _Found(part, _error(linear.weight, part, hessian), outcome.damping)
            trial.put(linear, part.dequantize(linear.weight.dtype))
    return found


def _split(outcome: Outcome, weights: Sequence[Tensor]) -> Iterator[Quantized]:
    """Take the stacked result apart."""
    whole, sizes = outcome.quantized, [len(weight) for weight in weights]
    parts = (tensor.split(sizes) for tensor in (whole.codes, whole.scale, whole.zero))
    for codes, scale, zero in zip(*parts, strict=True):
        yield Quantized(codes.clone(), scale.clone(), zero.clone(), whole.grid)


class _Trial:
    """Holds other weights in some layers, and puts the old ones back at the end."""

    def __init__(self) -> None:
        self.old: list[tuple[nn.Linear, Tensor]] = []

    def put(self, linear: nn.Linear, weight: Tensor) -> None:
        self.old.append((linear, linear.weight.data))
        linear.weight.data = weight

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        for linear, weight in self.old:
            linear.weight.data = weight


def _error(weight: Tensor, quantized: Quantized, hessian: Tensor | None) -> float:
    """Return ``tr(dW H dW^T) / tr(W H W^T)``, with H = I where there is none."""
    weight = weight.detach().float()
    difference = quantized.dequantize() - weight

    def size(matrix: Tensor) -> Tensor:
        return torch.sum(matrix * (matrix if hessian is None else matrix @ hessian))

    return (size(difference) / size(weight).clamp_min(1e-30)).item()


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


def _checked(model: nn.Module, grid: Grid) -> Decoder:
    """Refuse what can't be quantised before anything is done."""
    decoder = read_decoder(model)
    refuse_experts(decoder)
    check_finite(decoder)
    for block in decoder.blocks:
        for name in (name for stage in block.stages() for name in stage):
            try:
                grid.size(_linear(model, name).in_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return decoder


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _tell(watch: Watch | None, index: int, decoder: Decoder, errors: dict[str, float]) -> None:
    if watch is not None:
        watch(Layer(index + 1, len(decoder.blocks), errors))


def _install(model: nn.Module, found: dict[str, _Found]) -> nn.Module:
    for name, one in found.items():
        made = QuantizedLinear.of(_linear(model, name), one.quantized, one.error, one.damping)
        model.set_submodule(name, made)
    return model
