"""Blocks that process some of their tokens.

A routed block's class is laid over the one it has, as `attention.ListeningAttention` is: the
block's own forward runs, on fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.depth.attention import first, valid_tokens
from featherweight.depth.gates import GATES
from featherweight.depth.ledger import Ledger, Prediction
from featherweight.depth.routers import ROUTERS, Sight
from featherweight.depth.rows import as_mask, choose_tokens, kept_tokens, put_rows, take_rows

MASKS = ("attention_mask", "attn_mask", "mask")
CACHES = ("cache", "past_key_values", "past_key_value")  # as transformers has called it


@dataclass(frozen=True)
class Rule:
    """How one block chooses its tokens.

    Attributes:
        layer: number of the block.
        router: name in `ROUTERS`.
        capacity: fraction processed.
        rounding: of the number of tokens.
        prefix: tokens at the front that are always processed.
        source: layer whose score is read; -1 for none.
        carry: whether this layer hands scores on to a routed one behind it.
        gate: name in `GATES`, or ``"none"``.
        auxiliary: ``"none"``, ``"router"`` or ``"predictor"``.
        causal: whether evaluation decides for each token alone.
        seed: of random choices.
    """

    layer: int
    router: str
    capacity: float
    rounding: str
    prefix: int
    source: int
    carry: bool
    gate: str
    auxiliary: str
    causal: bool
    seed: int

    def scores(self, block: nn.Module, x: Tensor, ledger: Ledger) -> Tensor:
        """Return the router's scores [B, N] of the tokens x [B, N, D]."""
        router = getattr(block, "router", None)
        sight = Sight(x, self.layer, self.source, self.seed, ledger, router)
        return ROUTERS[self.router].method(sight)

    def logits(self, block: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
        """Return what says, for each token alone, whether it is chosen: positive means yes."""
        if self.auxiliary == "router":
            return scores
        predictor: nn.Module = block.predictor  # type: ignore[assignment]
        logits: Tensor = predictor(x.detach()).squeeze(-1)
        return logits

    def weigh(self, rows: Tensor, out: Tensor, scores: Tensor) -> Tensor:
        """Multiply the update of rows [B, k, D] by the gate of their scores [B, k]."""
        if self.gate == "none":
            return out
        weight = GATES[self.gate].method(scores).to(rows.dtype)
        return rows + weight.unsqueeze(-1) * (out - rows)


class RoutedBlock(nn.Module):
    """Mixin over a block: k tokens go through it, the others pass unchanged."""

    depth_rule: Rule
    depth_ledger: Ledger

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map tokens [B, N, D] to [B, N, D] as the block does, arguments gathered alike."""
        dense = super().forward
        rule, ledger, tokens = self.depth_rule, self.depth_ledger, hidden_states.shape[1]
        valid = valid_tokens(find_mask(args, kwargs))
        scores = rule.scores(self, hidden_states, ledger)
        count = kept_tokens(tokens, rule.capacity, rule.prefix, rule.rounding)
        index = choose_tokens(scores, count, rule.prefix, valid)
        chosen = as_mask(index, tokens)
        ledger.visited[rule.layer] = chosen
        if rule.auxiliary != "none" and self.training:
            logits = rule.logits(self, hidden_states, scores)
            ledger.predictions[rule.layer] = Prediction(logits, chosen, valid)
        args, kwargs = gather_arguments(args, kwargs, index, tokens)
        rows = take_rows(hidden_states, index)
        out = dense(rows, *args, **kwargs)
        updated = rule.weigh(rows, first(out), scores.gather(1, index))
        if rule.carry:
            hand_on(ledger, rule, index)
        return replaced(out, put_rows(hidden_states, index, updated))


def hand_on(ledger: Ledger, rule: Rule, index: Tensor) -> None:
    """Overwrite the carried scores of the processed tokens by what their own map says.

    Column means over k tokens average 1/k; times k/N they compare with those over all N.
    """
    before = ledger.score(rule.source)
    share = index.shape[1] / before.shape[1]
    own = ledger.score(rule.layer) * share
    ledger.scores[rule.layer] = before.to(own.dtype).scatter(1, index, own)


def find_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the attention mask among a block's arguments, or None."""
    named = [kwargs[name] for name in MASKS if isinstance(kwargs.get(name), Tensor)]
    placed = [value for value in args if isinstance(value, Tensor)]
    mask: Tensor | None = next(iter([*named, *placed]), None)
    if mask is not None and mask.ndim != 4:
        raise ValueError(f"attention mask must be [B, 1 or H, N, N], got {tuple(mask.shape)}")
    return mask


def gather_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gather all that a block is given for each token: masks, positions, rotary tables."""
    placed = tuple(_gather_mask(v, index) if isinstance(v, Tensor) else v for v in args)
    named = dict(kwargs)
    for name in (name for name in MASKS if isinstance(named.get(name), Tensor)):
        named[name] = _gather_mask(named[name], index)
    if isinstance(named.get("position_ids"), Tensor):
        named["position_ids"] = named["position_ids"].expand(len(index), -1).gather(1, index)
    if named.get("position_embeddings") is not None:
        tables = named["position_embeddings"]
        named["position_embeddings"] = tuple(_gather_table(table, index) for table in tables)
    return placed, named


def _gather_mask(mask: Tensor, index: Tensor) -> Tensor:
    mask = mask.expand(len(index), *mask.shape[1:])
    if mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, index[:, None, :, None], 2)
    return torch.take_along_dim(mask, index[:, None, None, :], 3)


def _gather_table(table: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(table.expand(len(index), -1, -1), index[:, :, None], 1)


def replaced(output: Any, tokens: Tensor) -> Any:
    """Return what a block returned, with its tokens replaced."""
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens
