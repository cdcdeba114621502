"""Calibration: what each matrix of a decoder sees, one layer at a time.

The hidden states of all calibration tokens are kept and pushed through layer after layer; beyond
the model and these, memory holds one layer's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.quant.decoder import Block, Decoder, read_decoder

_TOKENS = 2048  # tokens in a forward pass
CACHES = ("cache", "past_key_values")  # what transformers calls it, since 5.24 and before


class _Reached(Exception):
    """The forward pass got as far as was asked."""


def check_ids(ids: Tensor, vocabulary: int, name: str = "calibration") -> Tensor:
    """Return token ids ``[sequences, tokens]``, checked.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not of two dimensions, too few, or outside the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name} must be a tensor of token ids (int64), got {got}")
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"{name} must be [sequences, tokens >= 2], got {tuple(ids.shape)}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        low, high = ids.min().item(), ids.max().item()
        raise ValueError(f"{name} holds ids {low}..{high}, the vocabulary is 0..{vocabulary - 1}")
    return ids.long()


def batches(ids: Tensor) -> tuple[Tensor, ...]:
    """Split sequences so that a forward pass sees about two thousand tokens."""
    parts: tuple[Tensor, ...] = ids.split(max(1, _TOKENS // ids.shape[1]))
    return parts


@dataclass
class Stream:
    """Hidden states in front of a layer, for every batch, and how the model calls its layers.

    Attributes:
        hidden: ``[batch, tokens, d]`` each.
        calls: for a batch size, the keyword arguments of each layer.
    """

    hidden: list[Tensor]
    calls: dict[int, list[dict[str, Any]]]

    def run(self, index: int, layer: nn.Module) -> Iterator[Tensor]:
        """Yield the output of a layer for every batch."""
        for hidden in self.hidden:
            out = layer(hidden, **self.calls[len(hidden)][index])
            yield out[0] if isinstance(out, tuple) else out

    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the layer's outputs."""
        for place, out in enumerate(self.run(index, layer)):
            self.hidden[place] = out


@torch.no_grad()
def open_stream(decoder: Decoder, ids: Tensor) -> Stream:
    """Embed the calibration tokens and learn how the model calls each layer.

    Args:
        decoder: the model.
        ids: ``[sequences, tokens]``.
    """
    layers = [block.layer for block in decoder.blocks]
    parts = batches(ids.to(decoder.embedding.weight.device))
    calls: dict[int, list[dict[str, Any]]] = {}
    hidden = []
    for part in parts:
        stop = layers[0] if len(part) in calls else None
        inputs, found = _record(decoder.model, part, layers, stop)
        hidden.append(inputs)
        calls.setdefault(len(part), found)
    return Stream(hidden, calls)


def _record(
    model: nn.Module, ids: Tensor, layers: Sequence[nn.Module], stop: nn.Module | None
) -> tuple[Tensor, list[dict[str, Any]]]:
    inputs: list[Tensor] = []
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        inputs.append(hidden)
        without = {name: None for name in CACHES if name in named}
        calls.append({**named, **without, "use_cache": False})
        if module is stop:
            raise _Reached

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            model(ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return inputs[0], calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation, and back to what it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


class Gram:
    """Running mean of ``x^T x`` over tokens, in float32.

    Args:
        columns: n.
        device: where to sum.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs ``[..., n]``."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(rows.mT, rows)
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        """Return the Hessian ``[n, n]``."""
        return self.total / max(1, self.tokens)


@torch.no_grad()
def stage_hessian(stream: Stream, index: int, block: Block, module: nn.Linear) -> Tensor:
    """Return the Hessian of one module's inputs; the pass ends as soon as it is reached."""
    gram = Gram(module.in_features, module.weight.device)
    for args in reach(stream, index, block, module):
        gram.add(args[0])
    return gram.mean()


def reach(
    stream: Stream, index: int, block: Block, module: nn.Module
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what a module of a layer is called with, for every batch; the pass ends there."""
    seen: list[tuple[Tensor, ...]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args)
        raise _Reached

    for place in range(len(stream.hidden)):
        one = Stream([stream.hidden[place]], stream.calls)
        handle = module.register_forward_pre_hook(note)
        try:
            next(one.run(index, block.layer))
        except _Reached:
            yield seen.pop()
        finally:
            handle.remove()


def refuse_experts(decoder: Decoder) -> None:
    """Raise ValueError if a block routes tokens to experts, so that inputs are not shared."""
    for block in decoder.blocks:
        if block.has_experts():
            raise ValueError(
                f"{block.name} has experts, each with inputs of its own; there are no Hessians for"
                " all, so use another rotation than optrot-plus"
            )


@torch.no_grad()
def collect(model: nn.Module, calibration: Tensor) -> list[dict[str, Tensor]]:
    """Return the Hessians ``X^T X / T`` of all matrices' inputs, of the model as it is.

    They hold for the rotated model too, by :func:`transport`; so one pass serves all rotations.

    Args:
        model: a supported decoder without experts.
        calibration: token ids, ``[sequences, tokens]``.

    Returns:
        For each layer: ``attention`` (the inputs of q, k, v), ``output``, ``mlp`` (gate, up) and
        ``down``, float32 ``[n, n]``. Those behind a norm are of its outputs *without* the gain.

    Raises:
        ValueError: the model is not supported, ids are out of range, or a Hessian is not finite.
    """
    decoder = read_decoder(model)
    refuse_experts(decoder)
    stream = open_stream(decoder, check_ids(calibration, decoder.embedding.num_embeddings))
    found = []
    with evaluating(model):
        for index, block in enumerate(decoder.blocks):
            found.append(_layer_hessians(decoder, stream, index, block))
    return found


SITES = ("attention", "output", "mlp", "down")
"""Where inputs are observed, in the order of :meth:`Block.stages`."""


def _layer_hessians(
    decoder: Decoder, stream: Stream, index: int, block: Block
) -> dict[str, Tensor]:
    firsts = (decoder.model.get_submodule(names[0]) for names in block.stages())
    modules = dict(zip(SITES, firsts, strict=True))
    grams = {s: Gram(m.in_features, m.weight.device) for s, m in modules.items()}  # type: ignore[arg-type]
    handles = [modules[site].register_forward_pre_hook(_adder(grams[site])) for site in SITES]
    try:
        stream.advance(index, block.layer)
    finally:
        for handle in handles:
            handle.remove()
    hessians = {site: gram.mean() for site, gram in grams.items()}
    for site, norm in (("attention", block.attention_norm), ("mlp", block.mlp_norm)):
        hessians[site] = _without_gain(hessians[site], decoder.gain(norm))
    for site, hessian in hessians.items():
        check_hessian(hessian, f"{block.name}.{site}")
    return hessians


def _adder(gram: Gram) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, args: gram.add(args[0])


def _without_gain(hessian: Tensor, gain: Tensor) -> Tensor:
    inverse = torch.where(gain == 0, 0, 1 / gain).to(hessian)
    return hessian * inverse * inverse[:, None]


def check_hessian(hessian: Tensor, name: str) -> None:
    """Raise ValueError unless all entries are finite."""
    if not torch.isfinite(hessian).all():
        raise ValueError(f"the inputs of {name} are not finite on the calibration tokens")


def transport(
    hessians: Iterable[dict[str, Tensor]], residual: Tensor, values: Tensor
) -> list[dict[str, Tensor]]:
    """Turn Hessians of a model with gains folded into those of the rotated one.

    ``R1^T H R1`` behind the norms, ``B^T H B`` in front of o with R2 on B's diagonal; the inputs
    of down are not rotated.

    Args:
        hessians: of :func:`collect`.
        residual: R1, ``[d, d]``.
        values: R2, ``[layers, d_h, d_h]``.
    """
    turned = []
    for layer, value in zip(hessians, values, strict=True):
        site = {name: _turn(layer[name], residual) for name in ("attention", "mlp")}
        site["output"] = turn_heads(layer["output"], value)
        turned.append({**site, "down": layer["down"]})
    return turned


def _turn(hessian: Tensor, rotation: Tensor) -> Tensor:
    turn = rotation.to(hessian)
    return turn.mT @ hessian @ turn


def turn_heads(hessian: Tensor, value: Tensor) -> Tensor:
    """Return ``B^T H B`` for B with R2 on its diagonal, ``[n_h d_h, n_h d_h]``."""
    size, turn = len(value), value.to(hessian)
    right = (hessian.view(len(hessian), -1, size) @ turn).view_as(hessian)
    return (right.mT.reshape(len(hessian), -1, size) @ turn).view_as(hessian).mT.contiguous()
