"""Which tokens matter: leave one out and see what the loss does, and do scores agree.

After Gadhikar et al. 2024, arXiv:2412.20875.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featherweight.common import unwrap
from featherweight.depth.anatomy import attention_module, find_stack
from featherweight.depth.attention import Listening, ListeningAttention, check_attention
from featherweight.depth.convert import is_routed
from featherweight.depth.ledger import Ledger
from featherweight.depth.worn import put_on, take_off


class Correlation(NamedTuple):
    """How two measures of tokens go together.

    Attributes:
        mean: of the coefficients of the samples.
        each: coefficient of each sample, [B].
        pooled: coefficient over the tokens of all samples.
        p_value: of the pooled coefficient, two-sided, by Fisher's z.
    """

    mean: float
    each: Tensor
    pooled: float
    p_value: float


@torch.no_grad()
def token_importance(model: nn.Module, images: Tensor, loss: Callable[[Any], Tensor]) -> Tensor:
    """Return by how much the loss grows when a patch is left out of all layers.

    One forward for each patch. The patch is dropped behind the embedding, so that the others keep
    their positions.

    Args:
        model: a dense encoder, best in evaluation mode.
        images: what the model takes.
        loss: maps what the model returns to a loss for each sample, [B].

    Returns:
        [B, patches], positive where the patch helped; prefix tokens aren't left out.

    Raises:
        ValueError: the model is routed or not recognised.
    """
    core, stack = _dense_stack(model)
    before = loss(core(images))
    dropped: list[int] = []
    tokens: list[int] = []

    def drop(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        tokens[:] = [x.shape[1]]
        keep = [i for i in range(x.shape[1]) if i not in dropped]
        return (x[:, keep], *inputs[1:])

    handle = stack.blocks[0].register_forward_pre_hook(drop)
    try:
        core(images)
        columns = []
        for patch in range(stack.prefix, tokens[0]):
            dropped[:] = [patch]
            columns.append(loss(core(images)) - before)
    finally:
        handle.remove()
    return torch.stack(columns, 1)


@torch.no_grad()
def attention_scores(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Return the score that A-MoD would read in each layer of a dense encoder, [layers, B, N].

    Args:
        model: a dense encoder; left as it was.
        *inputs, **named: what the model takes.

    Raises:
        ValueError: the model is routed, or a layer can't be listened to.
    """
    core, stack = _dense_stack(model)
    attentions = [attention_module(block) for block in stack.blocks]
    for layer, attention in enumerate(attentions):
        if reason := check_attention(attention, stack.width):
            raise ValueError(f"{stack.block_name(layer)} can't be listened to: {reason}")
    ledger = Ledger(len(attentions))
    try:
        for layer, attention in enumerate(attentions):
            listening = Listening(layer, "auto", "all", "mean", stack.prefix, 0, ledger)
            put_on(attention, ListeningAttention, listening=listening)
        core(*inputs, **named)
    finally:
        for attention in attentions:
            take_off(attention)
    return torch.stack([ledger.score(layer) for layer in range(len(attentions))])


def _dense_stack(model: nn.Module) -> tuple[nn.Module, Any]:
    core = unwrap(model)
    if is_routed(core):
        raise ValueError("the model is routed; importance is measured on the dense one (to_dense)")
    stack = find_stack(core)
    if stack.causal:
        raise ValueError("token importance is measured on encoders; the model is causal")
    return core, stack


def correlation(first: Tensor, second: Tensor, rank: bool = True) -> Correlation:
    """Correlate two measures of the same tokens.

    Args:
        first: [B, N].
        second: [B, N].
        rank: Spearman's coefficient; otherwise Pearson's.

    Raises:
        ValueError: the shapes differ, or there are fewer than four tokens.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] < 4:
        raise ValueError(
            f"both must be [B, N] with N >= 4, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    a, b = first.detach().double().cpu(), second.detach().double().cpu()
    each = torch.stack([_coefficient(x, y, rank) for x, y in zip(a, b, strict=True)])
    pooled = float(_coefficient(a.flatten(), b.flatten(), rank))
    return Correlation(float(each.nanmean()), each, pooled, _p_value(pooled, a.numel()))


def _coefficient(a: Tensor, b: Tensor, rank: bool) -> Tensor:
    pair = torch.stack([_ranks(a), _ranks(b)] if rank else [a, b])
    return torch.corrcoef(pair)[0, 1]


def _ranks(x: Tensor) -> Tensor:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[place]
    return ranks


def _p_value(coefficient: float, count: int) -> float:
    if math.isnan(coefficient):
        return math.nan
    if abs(coefficient) >= 1:
        return 0.0
    return math.erfc(abs(math.atanh(coefficient)) * math.sqrt((count - 3) / 2))
