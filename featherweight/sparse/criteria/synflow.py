"""SynFlow: a weight is worth its share of what flows through the network, without any data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from featherweight.common import unwrap
from featherweight.sparse.criteria import probe
from featherweight.sparse.criteria.probe import Batch
from featherweight.sparse.criteria.registry import CRITERIA, Scores


@CRITERIA.register(
    "synflow",
    "share of the paths from inputs to outputs, data-free, in 100 rounds",
    "Tanaka et al. 2020, arXiv:2006.05467",
    needs=["model"],
    defaults={"iterations": 100},
)
def synflow(
    weights: Mapping[str, Tensor],
    *,
    model: nn.Module,
    batches: Sequence[Batch] | None = None,
    input_shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Scores:
    """Score every weight by ``|w| dR/d|w| / R``.

    ``R`` is the sum of the outputs for an input of ones, with all parameters and buffers replaced
    by their absolute values. The model is in evaluation mode, so that norms at initialisation do
    nothing. In a network of rectifiers without biases the scores of each layer add up to 1.

    One round empties layers at low densities: prune in many, as `featherweight.sparse.prune` does.

    Args:
        weights: parameter name to weight, of the model; used in the place of its own.
        model: is not touched.
        batches: give the shape and kind of the inputs; their values are not used.
        input_shape: shape of one input, without the batch dimension, such as (3, 32, 32);
            goes before ``batches``.
        dtype: of the computation; None: float64, where the device has it, because ``R`` grows
            exponentially with depth.

    Returns:
        Scores of the weights' shapes, of this dtype.

    Raises:
        ValueError: neither ``batches`` nor ``input_shape`` is given.
        TypeError: batches are no list of pairs of tensors, or the model returns no logits.

    Source: Tanaka et al. 2020, arXiv:2006.05467, algorithm 1; division by ``R`` does not change
        the order and keeps the scores in range.
    """
    device = next(iter(weights.values())).device
    dtype = dtype or (torch.float32 if device.type == "mps" else torch.float64)
    inputs = _ones(batches, input_shape, dtype).to(device)
    own = unwrap(model)
    tensors = {**dict(own.named_parameters()), **dict(own.named_buffers()), **weights}
    positive = {
        name: tensor.detach().to(dtype).abs()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    free = probe.leaves({name: positive[name] for name in weights})
    with probe.quiet(model, batch_statistics=False) as forward:
        flow = forward({**positive, **free}, inputs).sum()
        slopes = probe.gradient(flow, free)
    total = flow.detach().abs()
    unit = total if total > 0 else torch.ones_like(total)
    return {name: slopes[name] / unit.to(slopes[name].device) * positive[name] for name in weights}


def _ones(
    batches: Sequence[Batch] | None, input_shape: Sequence[int] | None, dtype: torch.dtype
) -> Tensor:
    if input_shape is not None:
        return torch.ones(1, *input_shape, dtype=dtype)
    if batches is None:
        raise ValueError("criterion 'synflow' needs input_shape= or batches=")
    probe.check_batches(batches)
    inputs = batches[0][0]
    return torch.ones_like(inputs[:1], dtype=dtype if inputs.is_floating_point() else None)
