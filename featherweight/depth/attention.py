"""Attention modules that also say how much attention each token received.

A source layer's attention module gets a class of its own on top of the one it has: parameters,
their names and the module's place stay, a deep copy works, and taking the class off undoes it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import as_generator
from featherweight.depth.anatomy import head_count
from featherweight.depth.ledger import Ledger
from featherweight.depth.received import SOURCES, Attention, some_queries

THREE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
OUT = ("o_proj", "out_proj", "proj", "projection")
EXTRA = {"q_norm", "k_norm", "norm", "attn_drop", "proj_drop", "dropout"}
KNOWN = {*THREE[0], *THREE[1], *OUT, *EXTRA, "qkv"}
PROBE_TOKENS = 5


@dataclass(frozen=True)
class Listening:
    """How one attention module reduces its map.

    Attributes:
        layer: number of the block it belongs to.
        source: name in `SOURCES`.
        queries: ``"all"``, ``"patches"``, ``"cls"``, or a number of queries drawn at random.
        heads: ``"mean"`` or ``"max"`` over the heads.
        prefix: tokens in front of the patches.
        seed: of the drawn queries.
        ledger: where the score goes.
    """

    layer: int
    source: str
    queries: str | int
    heads: str
    prefix: int
    seed: int
    ledger: Ledger

    def rows(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return which queries are averaged, or None for all."""
        if self.queries == "all":
            return None
        if self.queries == "cls":
            return torch.zeros(1, dtype=torch.long, device=device)
        if self.queries == "patches":
            return torch.arange(self.prefix, tokens, device=device)
        drawn = as_generator(self.ledger.seed(self.seed, self.layer))
        picked = torch.randperm(tokens, generator=drawn)[: int(self.queries)]
        return picked.sort().values.to(device)

    def attend(self, call: Attention) -> tuple[Tensor, Tensor | None]:
        """Attend, and write the score [B, N] of every token to the ledger."""
        attend = SOURCES[self.source].method if call.rows is None else some_queries
        output, means, attention = attend(call)
        means = means.detach()
        self.ledger.scores[self.layer] = means.amax(1) if self.heads == "max" else means.mean(1)
        return output, attention


class ListeningAttention(nn.Module):
    """Mixin over an attention module: the same output, and a score in the ledger."""

    depth_listening: Listening

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Attend as the module does; layers route by what it heard."""
        mask = attention_mask if attention_mask is not None else attn_mask
        listening = self.depth_listening
        rows = listening.rows(hidden_states.shape[1], hidden_states.device)
        call = attention_call(self, hidden_states, mask, rows)
        return joined(self, *listening.attend(call))


def attention_call(
    module: nn.Module, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None
) -> Attention:
    """Return queries, keys, values and scale of an attention module on x [B, N, D].

    Raises:
        ValueError: the mask isn't [B, 1 or H, N or 1, N].
    """
    if mask is not None and mask.ndim != 4:
        raise ValueError(f"attention mask must be [B, 1 or H, N, N], got {tuple(mask.shape)}")
    query, key, value = _heads(module, x)
    scale = getattr(module, "scaling", getattr(module, "scale", None))
    scale = float(scale) if scale is not None else query.shape[-1] ** -0.5
    dropout = _dropout(module) if module.training else 0.0
    return Attention(query, key, value, mask, scale, dropout, rows, valid_tokens(mask))


def _heads(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = head_count(module)
    if hasattr(module, "qkv"):
        parts = _part(module, "qkv", x).unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        names = next(names for names in THREE if hasattr(module, names[0]))
        parts = tuple(_part(module, name, x).unflatten(-1, (heads, -1)) for name in names)
    query, key, value = (part.transpose(1, 2) for part in parts)
    return _part(module, "q_norm", query), _part(module, "k_norm", key), value


def _part(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Apply a module's part to x, or nothing if there is no such part."""
    part = getattr(module, name, None)
    return part(x) if isinstance(part, nn.Module) else x


def _dropout(module: nn.Module) -> float:
    for name in ("attn_drop", "attention_dropout", "dropout_prob", "dropout"):
        value = getattr(module, name, None)
        value = getattr(value, "p", value)
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def joined(module: nn.Module, output: Tensor, attention: Tensor | None) -> Any:
    """Return what the module returns: heads joined, projected, with the map in a pair or alone."""
    x = _part(module, "norm", output.transpose(1, 2).flatten(2))
    for name in (*OUT, "proj_drop"):
        x = _part(module, name, x)
    return x if hasattr(module, "qkv") else (x, attention)


def valid_tokens(mask: Tensor | None) -> Tensor | None:
    """Return bool [B, N], False where a mask [B, H, n, N] hides a key from all queries."""
    if mask is None:
        return None
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.flatten(1, 2).any(1)


def check_attention(module: nn.Module, width: int) -> str | None:
    """Say why a module can't be listened to, or None: it is unknown, or computes something else."""
    names = {
        name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))
    }
    if unknown_parts := sorted(names - KNOWN):
        return f"its attention has parts that aren't known: {', '.join(unknown_parts)}"
    if not any(all(hasattr(module, n) for n in group) for group in (*THREE, ("qkv",))):
        return "its attention has no projections to queries, keys and values that are known"
    return _probe(copy.deepcopy(module).eval(), width)


@torch.no_grad()
def _probe(module: nn.Module, width: int) -> str | None:
    like = next(module.parameters())
    if like.device.type == "meta":
        return "its weights are on the meta device"
    x = torch.randn(2, PROBE_TOKENS, width, generator=as_generator(0)).to(like)
    try:
        expected = module(x)
        call = attention_call(module, x)
        found = joined(module, call.fused(), None)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its attention doesn't run on tokens alone ({type(error).__name__}: {error})"
    if isinstance(expected, tuple) != isinstance(found, tuple):
        return "its attention returns something unknown"
    expected, found = first(expected).float(), first(found).float()
    close = 1e-4 if like.dtype in (torch.float32, torch.float64) else 3e-2
    if expected.shape != found.shape or not torch.allclose(expected, found, close, close):
        return "its attention isn't plain softmax attention"
    return None


def first(output: Any) -> Any:
    """Return the tensor of a module that returns a tensor or a tuple beginning with it."""
    return output[0] if isinstance(output, tuple) else output
