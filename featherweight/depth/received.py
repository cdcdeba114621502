"""How much attention each token receives, with and without an attention map.

The score of A-MoD (Gadhikar et al. 2024, arXiv:2412.20875, eq. 4): the mean over heads and queries
of the column of the attention map that belongs to the token. Fused attention never forms that map,
so it is reduced on the way: every function here computes the attention's output and, from the same
queries and keys, each head's column means.

Shapes: queries, keys and values [B, H, N, D], column means [B, H, N] in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.common import Registry

Attended = tuple[Tensor, Tensor, "Tensor | None"]  # output, column means, map where it exists
STRIPE = 192  # queries at a time
SHORT = 256  # tokens up to which the whole map is cheapest on a GPU
CACHED = 2**19  # entries of a map that stay in a CPU core's cache


@dataclass(frozen=True)
class Attention:
    """One call of attention.

    Attributes:
        query, key, value: [B, H, N, D].
        mask: added to the logits, or bool with True where attention is allowed; broadcasts to
            [B, H, N, N].
        scale: factor of the logits.
        dropout: probability, 0 outside training.
        rows: which queries are averaged, int64; None for all.
        valid: bool [B, N], the queries that are no padding; None for all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    rows: Tensor | None = None
    valid: Tensor | None = None

    def fused(self) -> Tensor:
        """Return torch's scaled dot-product attention, [B, H, N, D]."""
        return F.scaled_dot_product_attention(
            self.query, self.key, self.value, self.mask, self.dropout, scale=self.scale
        )

    def map(self, rows: Tensor | slice | None = None) -> Tensor:
        """Return the attention map [B, H, n, N] of some queries, before dropout."""
        query = self.query if rows is None else self.query[:, :, rows]
        logits = (query * self.scale) @ self.key.transpose(-2, -1)
        logits = logits if self.mask is None else logits + self._bias(rows)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return logits.softmax(-1)
        return torch.softmax(logits, -1, out=logits)  # half of the memory, which stays in cache

    def _bias(self, rows: Tensor | slice | None) -> Tensor:
        mask = self.mask
        assert mask is not None
        if rows is not None and mask.shape[-2] > 1:
            mask = mask[..., rows, :]
        if mask.dtype != torch.bool:
            return mask
        zeros = torch.zeros((), dtype=self.query.dtype, device=mask.device)
        return torch.where(mask, zeros, torch.finfo(self.query.dtype).min)

    def samples(self) -> list[Attention]:
        """Return the call as it is, or sample by sample where its map would leave a CPU's cache."""
        batch, heads, tokens, _ = self.query.shape
        small = batch * heads * tokens**2 <= CACHED or self.query.device.type != "cpu"
        if small or torch.compiler.is_compiling():  # a graph would hold every sample
            return [self]
        return [self._sample(slice(b, b + 1)) for b in range(batch)]

    def _sample(self, one: slice) -> Attention:
        mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[one]
        valid = self.valid if self.valid is None or len(self.valid) == 1 else self.valid[one]
        parts = self.query[one], self.key[one], self.value[one]
        return Attention(*parts, mask, self.scale, self.dropout, self.rows, valid)

    def share(self) -> Tensor | None:
        """Return the weight [B, N] of each query in the mean, or None if all count alike."""
        if self.valid is None:
            return None
        valid = self.valid.float()
        return valid / valid.sum(1, keepdim=True).clamp(min=1)

    def column_means(self, attention: Tensor, rows: Tensor | slice | None = None) -> Tensor:
        """Reduce a map [B, H, n, N] to what its queries add to the column means [B, H, N]."""
        share = self.share()
        wide = torch.promote_types(attention.dtype, torch.float32)
        if share is None:
            return attention.sum(2, dtype=wide) / self.query.shape[2]
        share = share if rows is None else share[:, rows]
        return (attention * share[:, None, :, None]).sum(2, dtype=wide)


Source = Callable[[Attention], Attended]
SOURCES: Registry[Source] = Registry("score source")


@SOURCES.register("eager", "forms the map; exact, memory H N^2")
def eager(call: Attention) -> Attended:
    """Form the whole map, use it, and average its columns."""
    attention = call.map()
    means = call.column_means(attention.detach())
    dropped = F.dropout(attention, call.dropout) if call.dropout else attention
    return dropped @ call.value, means, attention


@SOURCES.register("striped", "output and column means stripe by stripe; exact")
def striped(call: Attention) -> Attended:
    """Form the map a stripe of queries at a time, and use each stripe for both.

    On a CPU also one sample at a time, so that a stripe stays in cache from one product to the
    other.
    """
    tokens_first = call.value.transpose(1, 2)  # as fused attention lays its output out
    output = torch.empty_like(tokens_first, memory_format=torch.contiguous_format).transpose(1, 2)
    means = []
    for one, part in zip(_places(call), call.samples(), strict=True):
        total = torch.zeros((), device=call.query.device)
        for rows in _stripes(call.query.shape[2]):
            attention = part.map(rows)
            total = total + part.column_means(attention.detach(), rows)
            dropped = F.dropout(attention, call.dropout) if call.dropout else attention
            output[one, :, rows] = dropped @ part.value
        means.append(total)
    return output, torch.cat(means), None


@SOURCES.register("second-pass", "fused attention, then the map again in stripes; exact")
def second_pass(call: Attention) -> Attended:
    """Run fused attention, and form the map again in stripes without gradient.

    In training this keeps the memory of fused attention: nothing of the map is saved.
    """
    with torch.no_grad():
        means = [_means_in_stripes(part) for part in call.samples()]
    return call.fused(), torch.cat(means), None


def _means_in_stripes(call: Attention) -> Tensor:
    means = torch.zeros((), device=call.query.device)
    for rows in _stripes(call.query.shape[2]):
        means = means + call.column_means(call.map(rows), rows)
    return means


def _places(call: Attention) -> list[slice]:
    """Return where in the batch the parts of `Attention.samples` are."""
    count = len(call.samples())
    return [slice(None)] if count == 1 else [slice(b, b + 1) for b in range(count)]


@SOURCES.register("logsumexp", "as second-pass, with the row sums of torch's CPU kernel; exact")
def logsumexp(call: Attention) -> Attended:
    """Use the logarithms of the row sums that torch's own CPU kernel returns beside the output.

    The operator is private to torch: where it is missing, with a mask, with dropout, or on another
    device, this is `second_pass`.
    """
    if not _has_logsumexp(call):
        return second_pass(call)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, rows_sum = operator(call.query, call.key, call.value, scale=call.scale)
    with torch.no_grad():
        parts = zip(_places(call), call.samples(), strict=True)
        means = [_means_given_sums(part, rows_sum[one, :, :, None]) for one, part in parts]
    return output, torch.cat(means), None


def _means_given_sums(call: Attention, rows_sum: Tensor) -> Tensor:
    means = torch.zeros((), device=call.query.device)
    for rows in _stripes(call.query.shape[2]):
        logits = call.query[:, :, rows] @ call.key.transpose(-2, -1) * call.scale
        means = means + call.column_means((logits - rows_sum[:, :, rows]).exp(), rows)
    return means


def _has_logsumexp(call: Attention) -> bool:
    exists = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    plain = call.mask is None and not call.dropout and call.query.device.type == "cpu"
    return exists and plain


@SOURCES.register("auto", "the cheapest exact source for the length, the device and the mode")
def auto(call: Attention) -> Attended:
    """Choose by what was measured: ``python -m benchmarks depth`` measures the whole model.

    With gradients `second_pass`. Else `striped` where the map is too large for a CPU's cache or, on
    another device, has more than 256 tokens; and `eager`.
    """
    if torch.is_grad_enabled() and call.query.requires_grad:
        return second_pass(call)
    if len(call.samples()) > 1:
        return striped(call)
    return eager(call) if call.query.shape[2] <= SHORT else striped(call)


def some_queries(call: Attention) -> Attended:
    """Run fused attention and average the attention of the queries ``call.rows`` alone."""
    assert call.rows is not None
    with torch.no_grad():
        attention = call.map(call.rows)
        wide = torch.promote_types(attention.dtype, torch.float32)
        if call.valid is None:
            means = attention.mean(2, dtype=wide)
        else:
            share = call.valid[:, call.rows].float()
            share = share / share.sum(1, keepdim=True).clamp(min=1)
            means = (attention * share[:, None, :, None]).sum(2, dtype=wide)
    return call.fused(), means, None


def _stripes(tokens: int) -> list[slice]:
    count = max(1, math.ceil(tokens / STRIPE))
    height = math.ceil(tokens / count)
    return [slice(start, min(start + height, tokens)) for start in range(0, tokens, height)]
