"""Rotations fused into a decoder's weights: the function stays, the weights lose their outliers.

Two families (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al. 2024,
arXiv:2405.16406): R1 turns the residual stream, R2 each layer's values, head by head. Both are
exact, because an RMSNorm without gain commutes with a rotation; so gains are folded into the
matrices behind them first, and tied embeddings are untied. The model stays a plain one of its
kind. The embedding is not centred: RMSNorm, unlike LayerNorm, would see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, atomic_path
from featherweight.quant.decoder import Block, Decoder, Matrix, check_finite, read_decoder
from featherweight.quant.hadamard import random_orthogonal, random_rotation

_CHUNK = 8192  # rows that are in float64 at a time
_TOLERANCE = 1e-4  # largest entry of R R^T - I that is still a rotation


@dataclass(frozen=True)
class Rotation:
    """R1 and R2 of one model.

    Attributes:
        residual: R1, ``[d, d]``, orthogonal; the residual stream x becomes x R1.
        values: R2 of each layer, ``[layers, d_h, d_h]``, orthogonal; shared by the layer's heads.
    """

    residual: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        for name, shape in (("residual", self.residual.shape), ("values", self.values.shape)):
            if len(shape) != (2 if name == "residual" else 3) or shape[-1] != shape[-2]:
                raise ValueError(f"{name} must hold square matrices, got shape {tuple(shape)}")
        for name in ("residual", "values"):
            worst = orthogonality_error(getattr(self, name))
            if not worst < _TOLERANCE:
                raise ValueError(f"{name} must be orthogonal, |R R^T - I| reaches {worst:.1e}")

    @property
    def inverse(self) -> Rotation:
        """The rotation that undoes this one."""
        return Rotation(self.residual.mT, self.values.mT)

    def save(self, path: str | Path) -> None:
        """Write both as float64 to a safetensors file, in one atomic step."""
        tensors = {"residual": self.residual, "values": self.values}
        with atomic_path(Path(path)) as temporary:
            save_file({k: v.double().cpu().contiguous() for k, v in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Rotation:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != {"residual", "values"}:
                raise ValueError(f"{path} holds {sorted(file.keys())}, not residual and values")
            return cls(file.get_tensor("residual"), file.get_tensor("values"))


def orthogonality_error(rotation: Tensor) -> float:
    """Return the largest entry of ``|R R^T - I|`` over a batch of matrices ``[..., n, n]``."""
    product = rotation.double() @ rotation.double().mT
    identity = torch.eye(rotation.shape[-1], dtype=torch.float64, device=rotation.device)
    return (product - identity).abs().max().item()


def draw_rotation(
    model: nn.Module,
    kind: str = "hadamard",
    *,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Rotation:
    """Draw R1 and R2 at random, in float64.

    Args:
        model: a supported decoder; only its sizes are read.
        kind: ``hadamard`` (random signs times a Hadamard matrix; Haar where the size has none),
            ``haar`` (uniform), or ``identity``.
        seed: of the draw; or
        generator: a CPU generator.

    Raises:
        ValueError: the kind is unknown, or the model is not supported.
    """
    decoder, generator = read_decoder(model), as_generator(seed, generator)
    if kind == "identity":
        values = torch.eye(decoder.head_dim, dtype=torch.float64)
        stacked = values.repeat(len(decoder.blocks), 1, 1)
        return Rotation(torch.eye(decoder.hidden, dtype=torch.float64), stacked)
    draws = {"hadamard": random_rotation, "haar": random_orthogonal}
    if kind not in draws:
        raise ValueError(f"kind must be one of hadamard, haar, identity; got {kind!r}")
    draw = draws[kind]
    residual = draw(decoder.hidden, generator=generator)
    turns = [draw(decoder.head_dim, generator=generator) for _ in decoder.blocks]
    return Rotation(residual, torch.stack(turns))


def rotate(model: nn.Module, rotation: Rotation) -> nn.Module:
    """Fold gains, untie embeddings and fuse a rotation, in place.

    All algebra runs in float64, layer by layer, and is rounded to the weights' dtype once.

    Args:
        model: a supported decoder.
        rotation: of its sizes.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: the model is not supported or holds values that are not finite, or the
            rotation does not fit; nothing was changed.
    """
    decoder = read_decoder(model)
    check_finite(decoder)
    check_fit(decoder, rotation)
    _fuse(decoder, rotation)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Untie the head and fold the gains of all norms into the matrices behind them, in place.

    What is left in the norms is a gain of one. By itself this makes round-to-nearest *worse*: the
    gains were an anisotropy that rows of gate and up profit from.

    Args:
        model: a supported decoder.

    Returns:
        The same model: the same function, to rounding.

    Raises:
        ValueError: the model is not supported or holds values that are not finite.
    """
    decoder = read_decoder(model)
    check_finite(decoder)
    _fuse(decoder, None)
    return model


def check_fit(decoder: Decoder, rotation: Rotation) -> None:
    """Raise ValueError unless a rotation has the sizes of a decoder."""
    sizes = (decoder.hidden, len(decoder.blocks), decoder.head_dim)
    got = (rotation.residual.shape[0], *rotation.values.shape[:2])
    if got != sizes:
        raise ValueError(f"rotation is for (hidden, layers, head_dim) = {got}, model has {sizes}")


@torch.no_grad()
def _fuse(decoder: Decoder, rotation: Rotation | None) -> None:
    untie(decoder)
    residual = None if rotation is None else rotation.residual.double()
    if residual is not None:
        _right_(decoder.embedding.weight.data, None, residual)
    _right_(decoder.head.weight.data, decoder.gain(decoder.final_norm), residual)
    for index, block in enumerate(decoder.blocks):
        _fold_and_turn_block(decoder, block, residual)
        if rotation is not None:
            _turn_values(block, rotation.values[index].double())
    for norm in decoder.norms():
        norm.weight.fill_(1.0 - decoder.offset)  # type: ignore[operator]


def untie(decoder: Decoder) -> None:
    """Give the head its own copy of a tied embedding, and say so in the configuration."""
    if decoder.tied():
        copied = decoder.embedding.weight.detach().clone()
        decoder.head.weight = nn.Parameter(copied, decoder.embedding.weight.requires_grad)
    config: Any = decoder.model.config
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    if getattr(decoder.model, "all_tied_weights_keys", None):
        decoder.model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _fold_and_turn_block(decoder: Decoder, block: Block, residual: Tensor | None) -> None:
    readers = ((block.attention_norm, block.attention), (block.mlp_norm, block.mlp))
    for norm, matrices in readers:
        for matrix in matrices:
            _right_(matrix.view(), decoder.gain(norm), residual)
    for matrix in (block.output, *block.down) if residual is not None else ():
        _left_(matrix, residual)  # type: ignore[arg-type]


def _right_(weight: Tensor, gain: Tensor | None, rotation: Tensor | None) -> None:
    """W <- W diag(gain) R, in place, a few rows at a time."""
    matrices = weight if weight.dim() == 3 else (weight,)
    for rows in (rows for matrix in matrices for rows in matrix.split(_CHUNK)):
        turned = rows.double() if gain is None else rows.double() * gain.to(rows.device)
        rows.copy_(turned if rotation is None else turned @ rotation.to(rows.device))


def _left_(matrix: Matrix, rotation: Tensor) -> None:
    """W <- R^T W and bias <- R^T bias, in place."""
    weight, bias = matrix.view(), matrix.bias_view()
    turn = rotation.mT.to(weight.device)
    for part in weight if weight.dim() == 3 else (weight,):
        part.copy_(turn @ part.double())
    if bias is not None:
        bias.copy_(turn @ bias.double())


def _turn_values(block: Block, rotation: Tensor) -> None:
    """Turn what v writes and o reads by R2, head by head."""
    value, bias, output = block.value.view(), block.value.bias_view(), block.output.view()
    turn, size = rotation.to(value.device), len(rotation)
    value.copy_((turn.mT @ value.double().view(-1, size, value.shape[-1])).view_as(value))
    output.copy_((output.double().view(len(output), -1, size) @ turn).view_as(output))
    if bias is not None:
        bias.copy_((bias.double().view(-1, size) @ turn).view_as(bias))
