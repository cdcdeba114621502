"""Token merging, as a baseline: similar tokens become one, for all layers that follow.

Bolya, Fu, Dai, Zhang, Feichtenhofer and Hoffman 2023, "Token Merging: Your ViT But Faster",
arXiv:2210.09461. Unlike a routed model, which skips a token in one layer, it loses it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.common import as_generator, unwrap
from featherweight.depth.anatomy import ATTENTIONS, attention_module, find_stack, norms
from featherweight.depth.attention import (
    PROBE_TOKENS,
    attention_call,
    check_attention,
    first,
    joined,
)
from featherweight.depth.blocks import find_mask
from featherweight.depth.worn import put_on


@dataclass(frozen=True)
class Merging:
    """Settings of `tome`: tokens merged in each layer, and whether attention is proportional."""

    merged: int
    proportional: bool

    def asdict(self) -> dict[str, Any]:
        """Return what `tome` takes beside the model to do the same again."""
        return asdict(self)

    def counts(self, tokens: int, layers: int, prefix: int) -> list[int]:
        """Return the number of tokens before the first layer and after each."""
        counts = [tokens]
        for _ in range(layers):
            counts.append(counts[-1] - mergeable(counts[-1], self.merged, prefix))
        return counts


@dataclass
class Sizes:
    """How many patches each token stands for, [B, N], after each layer of the last forward."""

    layers: int

    def __post_init__(self) -> None:
        self.after: list[Tensor | None] = [None] * self.layers

    def __deepcopy__(self, memo: dict[int, Any]) -> Sizes:
        return Sizes(self.layers)


class MergingBlock(nn.Module):
    """Mixin over a pre-norm block: it merges tokens between attention and perceptron."""

    depth_layer: int
    depth_prefix: int
    depth_tupled: bool
    depth_settings: Merging
    depth_sizes: Sizes

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map tokens [B, N, D] to [B, N - r, D]."""
        if find_mask(args, kwargs) is not None:
            raise ValueError("token merging takes no attention mask")
        x, sizes, settings = hidden_states, self.depth_sizes, self.depth_settings
        size = sizes.after[self.depth_layer - 1] if self.depth_layer else None
        bias = size.log()[:, None, None].to(x.dtype) if settings.proportional and size is not None \
            else None  # fmt: skip
        update, keys = attention_update(self, x, bias)
        x = x + update
        if size is None:
            size = torch.ones(x.shape[:2], device=x.device)
        count = mergeable(x.shape[1], settings.merged, self.depth_prefix)
        x, size = merge(x, size, keys.mean(1), count, self.depth_prefix)
        sizes.after[self.depth_layer] = size
        x = x + perceptron_update(self, x)
        return (x,) if self.depth_tupled else x


def tome(model: nn.Module, merged: int, proportional: bool = True) -> nn.Module:
    """Merge ``merged`` tokens in every layer of an encoder; in place, without training.

    Args:
        model: as for `a_mod`; ``to_dense`` undoes it.
        merged: tokens fewer after each layer, 0 for none; at most half of the patches there are.
        proportional: add the logarithm of a token's size to its logit, so that it counts for as
            many patches as it stands for.

    Returns:
        The same model.

    Raises:
        ValueError: merged is negative, or the model can't be treated; it is untouched.
    """
    core = unwrap(model)
    if isinstance(merged, bool) or not isinstance(merged, int) or merged < 0:
        raise ValueError(f"merged must be a whole number of at least 0, got {merged!r}")
    if "depth_settings" in vars(core):
        raise ValueError("the model is routed already; call to_dense first")
    stack = find_stack(core)
    if stack.causal:
        raise ValueError("token merging is for encoders; the model is causal")
    tupled = False
    for layer, block in enumerate(stack.blocks):
        reason = check_attention(attention_module(block), stack.width)
        if not reason:
            reason, tupled = _probe(block, stack.width)
        if reason:
            raise ValueError(f"{stack.block_name(layer)} can't merge tokens: {reason}")
    settings, sizes = Merging(merged, proportional), Sizes(len(stack.blocks))
    for layer, block in enumerate(stack.blocks):
        state = {"layer": layer, "prefix": stack.prefix, "tupled": tupled}
        put_on(block, MergingBlock, settings=settings, sizes=sizes, **state)
    core.depth_settings, core.depth_hooks = settings, []  # type: ignore[assignment]
    return model


def mergeable(tokens: int, merged: int, prefix: int) -> int:
    """Return how many of ``tokens`` can merge when ``merged`` should: half of the patches."""
    return max(0, min(merged, (tokens - prefix) // 2))


def merge(
    x: Tensor, size: Tensor, keys: Tensor, count: int, prefix: int = 0
) -> tuple[Tensor, Tensor]:
    """Merge the ``count`` most similar pairs between every other token and the rest.

    Tokens at even places look for their nearest among those at odd places, by the cosine of their
    keys; the nearest ``count`` of them are averaged into what they found, weighted by size. The
    tokens that are left keep their order.

    Args:
        x: tokens [B, N, D].
        size: patches that each stands for, [B, N].
        keys: [B, N, C], means over the heads.
        count: tokens fewer, at most half of those behind the prefix.
        prefix: tokens at the front that are never merged.

    Returns:
        Tokens [B, N - count, D] and their sizes.
    """
    if count == 0:
        return x, size
    similar, nearest = _pairs(keys, prefix)
    leaving = similar.sort(dim=1, descending=True, stable=True).indices[:, :count]
    target = 2 * nearest.gather(1, leaving) + 1
    leaving = 2 * leaving
    weighted = x * size[..., None].to(x.dtype)
    moved = torch.take_along_dim(weighted, leaving[..., None], 1)
    total = weighted.scatter_add(1, target[..., None].expand_as(moved), moved)
    size = size.scatter_add(1, target, size.gather(1, leaving))
    stays = torch.ones_like(size).scatter(1, leaving, 0.0)
    order = stays.sort(dim=1, descending=True, stable=True).indices[:, : x.shape[1] - count]
    size = size.gather(1, order)
    x = torch.take_along_dim(total, order[..., None], 1) / size[..., None].to(x.dtype)
    return x, size


def _pairs(keys: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return for each even token the cosine to its nearest odd one, and that one's number."""
    with torch.no_grad():
        unit = F.normalize(keys.float(), dim=-1)
        cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        place = torch.arange(keys.shape[1], device=keys.device) < prefix
        barred = place[::2, None] | place[None, 1::2]
        similar, nearest = cosine.masked_fill(barred, -math.inf).max(2)
    return similar, nearest


def attention_update(block: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what attention adds to x, and its keys [B, H, N, D/H]."""
    attention = attention_module(block)
    call = replace(attention_call(attention, norms(block)[0](x)), mask=bias)
    update = first(joined(attention, call.fused(), None))
    outer = next(getattr(block, name) for name in ATTENTIONS if hasattr(block, name))
    if outer is not attention:  # transformers 4: the projection is beside the attention
        update = outer.output.dropout(outer.output.dense(update))
    return _scaled(block, update, ("layer_scale1", "ls1"), ("drop_path", "drop_path1")), call.key


def perceptron_update(block: nn.Module, x: Tensor) -> Tensor:
    """Return what the perceptron adds to x."""
    parts: Any = block
    x = norms(block)[1](x)
    if hasattr(block, "mlp"):
        update = parts.mlp(x)
    else:
        update = parts.output.dropout(parts.output.dense(parts.intermediate(x)))
    return _scaled(block, update, ("layer_scale2", "ls2"), ("drop_path", "drop_path2"))


def _scaled(block: nn.Module, update: Tensor, *names: tuple[str, ...]) -> Tensor:
    for group in (*names, ("dropout",)):
        part = next((getattr(block, name) for name in group if hasattr(block, name)), None)
        update = part(update) if isinstance(part, nn.Module) else update
    return update


@torch.no_grad()
def _probe(block: nn.Module, width: int) -> tuple[str | None, bool]:
    """Say why a block can't be taken apart, or None, and whether it returns a tuple."""
    block = copy.deepcopy(block).eval()
    like = next(block.parameters())
    x = torch.randn(2, PROBE_TOKENS, width, generator=as_generator(0)).to(like)
    try:
        output = block(x)
        found = x + attention_update(block, x, None)[0]
        found = found + perceptron_update(block, found)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"it doesn't run on tokens alone ({type(error).__name__}: {error})", False
    close = 1e-4 if like.dtype in (torch.float32, torch.float64) else 3e-2
    same = torch.allclose(first(output).float(), found.float(), close, close)
    reason = None if same else "it isn't norm, attention, norm and perceptron alone"
    return reason, isinstance(output, tuple)
