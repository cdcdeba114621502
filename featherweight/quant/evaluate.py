"""What quantisation cost: perplexity, divergence from the original, layer errors, outliers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherweight.quant.calibrate import check_ids, evaluating
from featherweight.quant.decoder import Decoder, read_decoder
from featherweight.quant.gptq import ldl_diagonal
from featherweight.quant.objective import Source, sources
from featherweight.quant.quantize import quantized_matrices

_TOKENS = 1024  # tokens in a forward pass; their logits dominate memory


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from another's.

    Attributes:
        kl: mean over tokens of KL(original || model), in nats.
        agreement: share of tokens where both find the same token likeliest.
        perplexity: of the model, on the same tokens.
        reference: perplexity of the original.
        tokens: predictions that were compared.
    """

    kl: float
    agreement: float
    perplexity: float
    reference: float
    tokens: int


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return exp of the mean negative log likelihood of each window's tokens after the first.

    Args:
        model: a causal language model.
        ids: token ids, ``[windows, tokens]``; windows of 2048 are customary.

    Raises:
        ValueError: ids are not of two dimensions or outside the vocabulary.
    """
    total, tokens = 0.0, 0
    for part, logits in _logits(model, _checked(model, ids)):
        total += _loss(logits, part)
        tokens += part[:, 1:].numel()
    return float(torch.tensor(total / tokens, dtype=torch.float64).exp())


@torch.no_grad()
def divergence(original: nn.Module, model: nn.Module, ids: Tensor) -> Divergence:
    """Compare the next-token distributions of two models.

    KL is far less noisy than perplexity, which can rise while KL falls.

    Args:
        original: what is approximated.
        model: the approximation; the same vocabulary.
        ids: token ids, ``[windows, tokens]``.

    Raises:
        ValueError: ids are not of two dimensions or outside the vocabulary.
    """
    ids = _checked(original, ids)
    kl, same, losses, tokens = 0.0, 0, [0.0, 0.0], 0
    pairs = zip(_logits(original, ids), _logits(model, ids), strict=True)
    for (part, true), (_, approximate) in pairs:
        target, found = true[:, :-1].log_softmax(-1), approximate[:, :-1].log_softmax(-1)
        kl += torch.sum(target.exp() * (target - found)).item()
        same += int((target.argmax(-1) == found.argmax(-1)).sum())
        losses = [losses[0] + _loss(true, part), losses[1] + _loss(approximate, part)]
        tokens += part[:, 1:].numel()
    before, after = (torch.tensor(x / tokens, dtype=torch.float64).exp().item() for x in losses)
    return Divergence(kl / tokens, same / tokens, after, before, tokens)


def _checked(model: nn.Module, ids: Tensor) -> Tensor:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return check_ids(ids, embedding.num_embeddings, "ids").to(embedding.weight.device)


def _logits(model: nn.Module, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in ids.split(max(1, _TOKENS // ids.shape[1])):
        with evaluating(model):
            logits = model(part, use_cache=False).logits.float()
        yield part, logits


def _loss(logits: Tensor, ids: Tensor) -> float:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    return cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum").item()


def layer_errors(model: nn.Module) -> dict[str, float]:
    """Return each quantised layer's relative error ``tr(dW H dW^T) / tr(W H W^T)``.

    Experts count one by one. Layers that GPTQ had to round to nearest are found by ``damping`` of
    :func:`quantized_layers`. For round to nearest H = I: the error of the weights alone.

    Raises:
        ValueError: the model has no quantised layer.
    """
    layers = quantized_matrices(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer")
    return {name: layer.error for name, layer in layers.items()}


@dataclass(frozen=True)
class Outliers:
    """How heavy the tails of one matrix are, gain folded.

    Attributes:
        name: kind and layer, such as ``3.down``.
        incoherence: ``max |W| sqrt(N K) / ||W||_F``: 1 is flat.
        kurtosis: mean over quantised rows of ``K sum w^4 / (sum w^2)^2``; 3 for a Gaussian.
        peak: mean over quantised rows of ``max |w| / rms(w)``.
    """

    name: str
    incoherence: float
    kurtosis: float
    peak: float


@torch.no_grad()
def outliers(model: nn.Module) -> list[Outliers]:
    """Measure the tails of every matrix that would be quantised; call it before and after.

    Args:
        model: a supported decoder that is not quantised.
    """
    decoder = read_decoder(model)
    return [_outliers(name, source) for name, source in _named(decoder)]


def _named(decoder: Decoder) -> Iterator[tuple[str, Source]]:
    layer, previous = -1, ""
    for source in sources(decoder):
        layer += source.kind == "q" and previous != "q"
        previous = source.kind
        yield f"{layer}.{source.kind}", source


def _outliers(name: str, source: Source) -> Outliers:
    rows = source.take().mT if source.writes else source.take()
    squares = rows.pow(2).mean(1).clamp_min(1e-30)
    return Outliers(
        name,
        (rows.abs().max() / squares.mean().sqrt()).item(),
        (rows.pow(4).mean(1) / squares.pow(2)).mean().item(),
        (rows.abs().amax(1) / squares.sqrt()).mean().item(),
    )


def trace_ratio(hessian: Tensor, damping: float = 0.01) -> float:
    """Return ``tr D / tr H`` of the damped Hessian: what GPTQ's loss is of round to nearest's.

    Args:
        hessian: ``[n, n]``, positive semi-definite.
        damping: share of the mean diagonal that is added, as in GPTQ.
    """
    damped = hessian.double()
    damped = damped + damping * damped.diagonal().mean() * torch.eye(len(damped)).to(damped)
    return (ldl_diagonal(damped).sum() / damped.trace()).item()
