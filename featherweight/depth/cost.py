"""What a model computes, in closed form, and the dense models that compute as much.

Counted are multiply-accumulates of linear layers, convolutions and attention; norms, activations
and softmax are not. A layer of width d with perceptrons of 4 d takes 12 n d^2 + 2 n^2 d at n tokens
(Gadhikar et al. 2024, arXiv:2412.20875). Operator counters undercount: torch's has no entry for its
fused attention on CPUs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from featherweight.common import unwrap
from featherweight.depth.anatomy import ATTENTIONS, Stack, attention_module, find_stack, head_count
from featherweight.depth.convert import is_routed, settings_of, to_dense
from featherweight.depth.merge import Merging
from featherweight.depth.options import Settings
from featherweight.depth.rows import kept_tokens

SECOND_PASS = ("second-pass", "logsumexp")


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one sample; a FLOP count is twice as large.

    Attributes:
        layers: of each layer as it is.
        dense_layers: of each layer if it processed all tokens.
        routing: of routers, predictors, second passes over attention, and the search for pairs.
        rest: of what is outside the layers: patches, head.
    """

    layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    routing: int
    rest: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.layers) + self.routing + self.rest

    @property
    def dense(self) -> int:
        """All together, were the model dense."""
        return sum(self.dense_layers) + self.rest

    @property
    def ratio(self) -> float:
        """Total over dense: the ideal ratio of times."""
        return self.total / self.dense


@dataclass(frozen=True)
class IsoFlop:
    """Dense models that compute about as much as a routed one.

    Attributes:
        layers: number of layers of the one that has fewer.
        layers_ratio: its multiply-accumulates over the routed model's.
        width: of a token of the one that is narrower.
        width_ratio: its multiply-accumulates over the routed model's.
    """

    layers: int
    layers_ratio: float
    width: int
    width_ratio: float


def flops(model: nn.Module, tokens: int) -> Cost:
    """Count the multiply-accumulates of one sample, layer by layer.

    Args:
        model: dense, routed or merging; see `find_stack` for what is recognised.
        tokens: of a sample, class token included; 197 for 224 x 224 in patches of 16.

    Raises:
        ValueError: the model isn't recognised, or tokens is out of range.
    """
    core = unwrap(model)
    stack = find_stack(core)
    if tokens <= stack.prefix:
        raise ValueError(f"tokens must be more than the {stack.prefix} of the prefix, got {tokens}")
    dense = tuple(_block(block, tokens, tokens) for block in stack.blocks)
    layers, routing = dense, 0
    if is_routed(core):
        settings = settings_of(core)
        if isinstance(settings, Merging):
            counts = settings.counts(tokens, len(dense), stack.prefix)
            pairs = zip(stack.blocks, counts[:-1], counts[1:], strict=True)
            layers = tuple(_block(block, n, m) for block, n, m in pairs)
            size = _inner(attention_module(stack.blocks[0])) // _heads(stack)
            routing = sum((n + 1) // 2 * (n // 2) * size for n, m in pairwise(counts) if m < n)
        else:
            layers = _routed_layers(stack, settings, tokens, dense)
            routing = _routing(stack, settings, tokens)
    return Cost(layers, dense, routing, _rest(core, stack, tokens))


def isoflop(model: nn.Module, tokens: int, multiple: int | None = None) -> IsoFlop:
    """Find the dense models nearest in multiply-accumulates to a routed one.

    Fewer layers of the same width is the paper's baseline; the narrower one is ours.

    Args:
        model: routed.
        tokens: of a sample.
        multiple: what the width must divide by; None for twice the number of heads.
    """
    core = unwrap(model)
    cost, stack = flops(core, tokens), find_stack(core)
    layer = cost.dense_layers[0]
    layers = min(
        range(1, len(cost.layers) + 1), key=lambda n: abs(n * layer + cost.rest - cost.total)
    )
    step = multiple or 2 * _heads(stack)
    inner = _inner(attention_module(stack.blocks[0]))
    attention = 2 * tokens**2 * inner * len(cost.layers)

    def narrow(width: int) -> float:
        share = width / stack.width
        linear = sum(cost.dense_layers) - attention
        return linear * share**2 + (attention + cost.rest) * share

    widths = range(step, stack.width + 1, step)
    width = min(widths, key=lambda w: abs(narrow(w) - cost.total))
    fewer = layers * layer + cost.rest
    return IsoFlop(layers, fewer / cost.total, width, narrow(width) / cost.total)


def fewer_layers(model: nn.Module, layers: int, spread: bool = False) -> nn.Module:
    """Return a dense copy with some of the layers, with their weights.

    Args:
        model: dense or routed; not changed.
        layers: how many to keep.
        spread: keep layers evenly spread over the depth, the first and last among them, instead of
            the first ones. In a trained model the first ones usually do better.

    Raises:
        ValueError: layers is out of range.
    """
    small = copy.deepcopy(unwrap(model))
    if is_routed(small):
        to_dense(small)
    stack = find_stack(small)
    count = len(stack.blocks)
    if not 1 <= layers <= count:
        raise ValueError(f"layers must lie in [1, {count}], got {layers}")
    kept = range(layers)
    places = [round(i * (count - 1) / max(1, layers - 1)) for i in kept] if spread else kept
    owner: Any = small.get_submodule(stack.name)
    for place in reversed(range(count)):
        if place not in places:
            del owner[place]
    config: Any = getattr(small, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = layers
    for number, block in enumerate(find_stack(small).blocks):
        attention: Any = attention_module(block)
        if hasattr(attention, "layer_idx"):
            attention.layer_idx = number
    return small


def _routed_layers(
    stack: Stack, settings: Settings, tokens: int, dense: tuple[int, ...]
) -> tuple[int, ...]:
    layers = list(dense)
    for layer, count in _counts(settings, tokens).items():
        layers[layer] = _block(stack.blocks[layer], count, count)
    return tuple(layers)


def _counts(settings: Settings, tokens: int) -> dict[int, int]:
    prefix = settings.prefix if settings.keep_prefix else 0
    pairs = zip(settings.layers, settings.capacities, strict=True)
    return {layer: kept_tokens(tokens, c, prefix, settings.rounding) for layer, c in pairs}


def _routing(stack: Stack, settings: Settings, tokens: int) -> int:
    """Count routers, and the queries that are multiplied with all keys once more."""
    total = sum(
        tokens * _linear(part)
        for block in stack.blocks
        for name in vars(block).get("depth_added", ())
        for part in [block.get_submodule(name)]
    )
    counts = _counts(settings, tokens)
    for layer in {source for source in settings.sources().values() if source >= 0}:
        keys = counts.get(layer, tokens)
        queries = _second_queries(settings, keys)
        total += queries * keys * _inner(attention_module(stack.blocks[layer]))
    return total


def _second_queries(settings: Settings, tokens: int) -> int:
    if settings.queries == "all":
        return tokens if settings.score in SECOND_PASS else 0
    if settings.queries == "patches":
        return tokens - settings.prefix
    return 1 if settings.queries == "cls" else min(int(settings.queries), tokens)


def _block(block: nn.Module, tokens: int, after: int) -> int:
    """Count a block whose attention has ``tokens`` tokens and whose perceptron has ``after``."""
    own = next(getattr(block, name) for name in ATTENTIONS if hasattr(block, name))
    added = sum(_linear(block.get_submodule(n)) for n in vars(block).get("depth_added", ()))
    attention = _linear(own)
    perceptron = _linear(block) - attention - added
    inner = _inner(attention_module(block))
    return attention * tokens + 2 * tokens**2 * inner + perceptron * after


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _inner(attention: nn.Module) -> int:
    """Return heads times the size of a head."""
    parts: Any = attention
    if hasattr(attention, "qkv"):
        return int(parts.qkv.out_features) // 3
    return int((parts.q_proj if hasattr(attention, "q_proj") else parts.query).out_features)


def _heads(stack: Stack) -> int:
    return head_count(attention_module(stack.blocks[0]))


def _rest(model: nn.Module, stack: Stack, tokens: int) -> int:
    inside = {id(module) for block in stack.blocks for module in block.modules()}
    total = 0
    for module in model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Linear):
            total += module.weight.numel() * (tokens if stack.causal else 1)
        elif isinstance(module, nn.Conv2d):
            total += module.weight.numel() * (tokens - stack.prefix)
    return total
