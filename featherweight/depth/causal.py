"""Routed blocks of causal language models, and generation with a cache.

In training the tokens of a layer are the top k, which looks at the whole sequence. In evaluation
each token is processed where its own logit is positive, so that token by token with a cache and all
at once give the same (Raposo et al. 2024, arXiv:2404.02258). A layer's cache then
holds the tokens it processed alone: of different number in each sequence, each rotated by its true
position.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.depth.anatomy import Stack, attention_module
from featherweight.depth.attention import first
from featherweight.depth.blocks import (
    CACHES,
    RoutedBlock,
    find_mask,
    gather_arguments,
    replaced,
)
from featherweight.depth.rows import put_rows, take_rows


class CausalBlock(RoutedBlock):
    """Mixin over a decoder block: top k in training, each token for itself in evaluation."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map tokens [B, T, D] to [B, T, D] as the block does."""
        if args:
            raise ValueError("decoder blocks take their arguments by name")
        if not self.depth_rule.causal or self.training:
            return super().forward(hidden_states, **without_cache(kwargs, hidden_states.shape[1]))
        return self._each_for_itself(hidden_states, kwargs)

    def _each_for_itself(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
        dense = super(RoutedBlock, self).forward
        rule, ledger, tokens = self.depth_rule, self.depth_ledger, x.shape[1]
        scores = rule.scores(self, x, ledger)
        chosen = rule.logits(self, x, scores) > 0
        valid = _valid_queries(kwargs, tokens)
        chosen = chosen if valid is None else chosen & valid
        index, live = packed(chosen)
        ledger.visited[rule.layer] = chosen
        if index.shape[1] == 0:
            return x
        past = ragged_layer(_cache(kwargs), attention_module(self))
        _, named = gather_arguments((), _without_mask(kwargs), index, tokens)
        named["attention_mask"] = _mask(past, live, x.dtype)
        if past is not None:
            past.append_valid(live)
        rows = take_rows(x, index)
        out = dense(rows, **named)
        updated = rule.weigh(rows, first(out), scores.gather(1, index))
        return replaced(out, put_rows(x, index, torch.where(live[..., None], updated, rows)))


def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices [B, m] of the chosen tokens of each row, ascending, and which are real.

    m is the largest count of a row; shorter rows are filled up with tokens that weren't chosen.
    """
    order = (~chosen).byte().sort(dim=1, stable=True).indices
    index = order[:, : int(chosen.sum(1).max())]
    return index, chosen.gather(1, index)


def _mask(past: Any, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the logits, [B, 1, m, S + m]: real tokens before, and oneself."""
    count = live.shape[1]
    before = torch.ones(count, count, dtype=torch.bool, device=live.device).tril()
    own = torch.eye(count, dtype=torch.bool, device=live.device)
    allowed = (before & live[:, None, :]) | own
    if past is not None and past.valid is not None:
        cached = past.valid[:, None, :].expand(-1, count, -1)
        allowed = torch.cat([cached, allowed], 2)
    zero = torch.zeros((), dtype=dtype, device=live.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)[:, None]


def _valid_queries(kwargs: dict[str, Any], tokens: int) -> Tensor | None:
    """Return bool [B, T], False where a new token is padding: it can't see itself."""
    mask = find_mask((), kwargs)
    if mask is None:
        return None
    own = mask[:, :, :, -tokens:].diagonal(dim1=2, dim2=3)
    allowed = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
    return allowed.any(1)


def _without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "attention_mask": None}


def _cache(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)


def without_cache(kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a block's arguments without a cache, which top-k routing can't use.

    Raises:
        ValueError: the cache holds earlier tokens.
    """
    cache = _cache(kwargs)
    if cache is not None and cache.get_seq_length() > tokens:
        raise ValueError(
            "top-k routing looks at the whole sequence and can't continue from a cache; convert "
            "with auxiliary='router' or 'predictor', and generate in evaluation mode"
        )
    return {name: None if name in CACHES else value for name, value in kwargs.items()}


def ragged_layer(cache: Any, attention: nn.Module) -> Any:
    """Return the layer's part of a cache, which also knows which of its entries are real.

    Raises:
        ValueError: the cache isn't one that grows (transformers' ``DynamicCache``).
    """
    if cache is None:
        return None
    if not hasattr(cache, "layers"):
        raise ValueError("the cache has no layers: routed layers need a newer transformers")
    ragged = _ragged_class()
    number: int = attention.layer_idx  # type: ignore[assignment]
    while len(cache.layers) <= number:
        cache.layers.append(ragged())
    layer = cache.layers[number]
    if not isinstance(layer, ragged):
        if type(layer).__name__ != "DynamicLayer" or layer.get_seq_length():
            raise ValueError(
                f"routed layers begin with an empty DynamicCache, got {type(layer).__name__}"
            )
        layer = cache.layers[number] = ragged()
    return layer


@functools.cache
def _ragged_class() -> type[Any]:
    from transformers.cache_utils import DynamicLayer

    class RaggedLayer(DynamicLayer):  # type: ignore[misc,no-untyped-call,unused-ignore]
        """Keys and values of the tokens a layer processed, and which entries are real."""

        valid: Tensor | None = None  # bool [B, S]

        def append_valid(self, live: Tensor) -> None:
            """Add the entries of new tokens."""
            self.valid = live if self.valid is None else torch.cat([self.valid, live], 1)

        def reorder_cache(self, beam_idx: Any) -> None:
            """Reorder the rows, for beam search."""
            super().reorder_cache(beam_idx)
            self._each(lambda valid: valid.index_select(0, beam_idx.to(valid.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Repeat each row."""
            super().batch_repeat_interleave(repeats)
            self._each(lambda valid: valid.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: Tensor) -> None:
            """Keep some rows."""
            super().batch_select_indices(indices)
            self._each(lambda valid: valid[indices])

        def crop(self, *_: Any, **__: Any) -> None:
            """Refuse: the last tokens of a sequence aren't the last entries of its cache."""
            raise ValueError("the cache of a routed layer can't be cropped (assisted generation)")

        def reset(self) -> None:
            """Forget all entries."""
            super().reset()
            self.valid = None

        def _each(self, change: Any) -> None:
            if self.valid is not None:
                self.valid = change(self.valid)

    return RaggedLayer


def check_causal_model(model: nn.Module, stack: Stack, layers: tuple[int, ...]) -> None:
    """Refuse decoders whose layers can't be routed.

    Raises:
        ValueError: a routed layer's attention has a sliding window, or no number in the cache.
    """
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) is not None
    window = window and bool(getattr(config, "use_sliding_window", True))
    for layer in layers:
        name = stack.block_name(layer)
        if (kinds[layer] != "full_attention") if kinds else window:
            raise ValueError(f"{name} can't be routed: its attention has a sliding window")
        if not isinstance(getattr(attention_module(stack.blocks[layer]), "layer_idx", None), int):
            raise ValueError(f"{name} can't be routed: its attention has no layer_idx for a cache")
