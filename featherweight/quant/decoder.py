"""A decoder seen as its matrices: which read the residual stream, which write to it.

Rotations and quantisers work on this view. A model it can't describe is refused with the reason,
before anything is touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.quant.architecture import (
    kind_of,
    refuse_architecture,
    refuse_structure,
    text_config,
)

_ONE_PLUS_GAIN = ("gemma",)  # norms that multiply by 1 + weight


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a block, maybe some rows of a fused one.

    Attributes:
        kind: q, k, v, o, gate, up, down, or router.
        module: dotted name of the module that holds it, inside the model.
        weight: the parameter, ``[..., rows, columns]`` (experts: ``[E, rows, columns]``).
        rows: first and last + 1 row of a fused weight; None for all.
        bias: of the whole weight, or None.
    """

    kind: str
    module: str
    weight: nn.Parameter
    rows: tuple[int, int] | None = None
    bias: nn.Parameter | None = None

    def view(self) -> Tensor:
        """Return the matrix as a view of the parameter, without gradients."""
        start, stop = self.rows or (0, self.weight.shape[-2])
        return self.weight.data[..., start:stop, :]

    def bias_view(self) -> Tensor | None:
        """Return the bias of these rows as a view, or None."""
        start, stop = self.rows or (0, self.weight.shape[-2])
        return None if self.bias is None else self.bias.data[start:stop]


@dataclass(frozen=True)
class Block:
    """One decoder layer: two norms, each in front of matrices that read, then one that writes.

    Attributes:
        name: dotted name of the layer inside the model.
        layer: the module.
        attention_norm, mlp_norm: norms in front of the two halves.
        attention: q, k, v; they read the residual stream through ``attention_norm``.
        output: o; writes to the residual stream.
        mlp: gate, up, router; they read through ``mlp_norm``.
        down: they write to the residual stream (one, or one each for dense and sparse experts).
    """

    name: str
    layer: nn.Module
    attention_norm: nn.Module
    mlp_norm: nn.Module
    attention: tuple[Matrix, ...]
    output: Matrix
    mlp: tuple[Matrix, ...]
    down: tuple[Matrix, ...]

    @property
    def value(self) -> Matrix:
        """The value projection."""
        return next(matrix for matrix in self.attention if matrix.kind == "v")

    def matrices(self) -> Iterator[Matrix]:
        """Yield all matrices, in the order of the forward pass."""
        yield from (*self.attention, self.output, *self.mlp, *self.down)

    def has_experts(self) -> bool:
        """Tell whether the block routes tokens to experts."""
        return any(matrix.kind == "router" for matrix in self.mlp)

    @property
    def experts(self) -> str | None:
        """Dotted name of the module that holds all experts, or None."""
        return f"{self.name}.mlp.experts" if self.has_experts() else None

    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Return names of the quantised modules by shared input, in the order of the pass.

        Routers keep their precision; experts are no modules of their own, see :attr:`experts`.
        """
        groups = (self.attention, (self.output,), self.mlp, self.down)
        names = (dict.fromkeys(m.module for m in g if self._is_linear(m)) for g in groups)
        return tuple(tuple(group) for group in names if group)

    def _is_linear(self, matrix: Matrix) -> bool:
        return matrix.kind != "router" and matrix.weight.dim() == 2


@dataclass(frozen=True)
class Decoder:
    """A causal language model as embedding, blocks, final norm and head.

    Attributes:
        model: the model itself.
        embedding, head: the modules at both ends; their weights may be tied.
        final_norm: norm in front of the head.
        blocks: the layers.
        hidden, heads, kv_heads, head_dim: sizes d, n_h, n_kv, d_h.
        offset: what a norm adds to its weight to get its gain (Gemma: 1).
    """

    model: nn.Module
    embedding: nn.Embedding
    head: nn.Linear
    final_norm: nn.Module
    blocks: tuple[Block, ...]
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    offset: float

    def gain(self, norm: nn.Module) -> Tensor:
        """Return the gain of a norm in float64, ``[hidden]``."""
        return _parameter(norm).detach().double() + self.offset

    def norms(self) -> Iterator[nn.Module]:
        """Yield every norm of the residual stream."""
        for block in self.blocks:
            yield from (block.attention_norm, block.mlp_norm)
        yield self.final_norm

    def tied(self) -> bool:
        """Tell whether embedding and head share one weight."""
        return self.embedding.weight is self.head.weight


def read_decoder(model: nn.Module) -> Decoder:
    """Describe a causal language model of transformers.

    Args:
        model: of a type in ``quant.MODEL_TYPES``, not quantised, on a real device.

    Raises:
        ValueError: the model can't be described, with the reason; nothing was changed.
    """
    config = text_config(model)
    refuse_architecture(config)
    body: Any = model.get_submodule("model")
    refuse_structure(model, body)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = (heads, kv_heads, head_dim)
    layers = enumerate(body.layers)
    decoder = Decoder(
        model=model,
        embedding=body.embed_tokens,
        head=model.get_submodule("lm_head"),  # type: ignore[arg-type]
        final_norm=body.norm,
        blocks=tuple(_block(f"model.layers.{i}", layer, sizes) for i, layer in layers),
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        offset=1.0 if config.model_type in _ONE_PLUS_GAIN else 0.0,
    )
    _refuse_shapes(decoder)
    return decoder


def _parameter(module: nn.Module, name: str = "weight") -> nn.Parameter:
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{kind_of(module)} has no plain parameter {name!r}; fold adapters first")
    return parameter


def _matrix(kind: str, path: str, parent: nn.Module, rows: tuple[int, int] | None = None) -> Matrix:
    """Take ``parent.NAME``, where path ends in NAME; a module with a weight, or a parameter."""
    child: Any = getattr(parent, path.rpartition(".")[2])
    if isinstance(child, nn.Parameter):
        return Matrix(kind, path, child, rows)
    if isinstance(child, nn.Linear) and type(child) is not nn.Linear:
        raise ValueError(f"{path} is a {kind_of(child)}, not a plain Linear")
    return Matrix(kind, path, _parameter(child), rows, child._parameters.get("bias"))


def _block(name: str, layer: nn.Module, sizes: tuple[int, int, int]) -> Block:
    attention: Any = layer.self_attn
    path = f"{name}.self_attn"
    fused = hasattr(attention, "qkv_proj")
    readers = _fused_qkv(path, attention, sizes) if fused else _plain_qkv(path, attention)
    mlp, down = _mlp(f"{name}.mlp", layer.mlp)  # type: ignore[arg-type]
    return Block(
        name=name,
        layer=layer,
        attention_norm=layer.input_layernorm,  # type: ignore[arg-type]
        mlp_norm=layer.post_attention_layernorm,  # type: ignore[arg-type]
        attention=readers,
        output=_matrix("o", f"{path}.o_proj", attention),
        mlp=mlp,
        down=down,
    )


def _plain_qkv(path: str, attention: nn.Module) -> tuple[Matrix, ...]:
    return tuple(_matrix(kind, f"{path}.{kind}_proj", attention) for kind in "qkv")


def _fused_qkv(path: str, attention: nn.Module, sizes: tuple[int, int, int]) -> tuple[Matrix, ...]:
    heads, kv_heads, head_dim = sizes
    ends = [0, heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim]
    rows = zip("qkv", itertools.pairwise(ends), strict=True)
    return tuple(_matrix(kind, f"{path}.qkv_proj", attention, span) for kind, span in rows)


def _mlp(path: str, mlp: nn.Module) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    if hasattr(mlp, "experts"):
        return _experts(path, mlp)
    if hasattr(mlp, "gate_up_proj"):
        parameter = mlp.gate_up_proj
        weight = parameter if isinstance(parameter, nn.Parameter) else _parameter(parameter)  # type: ignore[arg-type]
        half = weight.shape[-2] // 2
        spans = {"gate": (0, half), "up": (half, 2 * half)}
        readers = tuple(_matrix(k, f"{path}.gate_up_proj", mlp, s) for k, s in spans.items())
    else:
        readers = tuple(_matrix(kind, f"{path}.{kind}_proj", mlp) for kind in ("gate", "up"))
    return readers, (_matrix("down", f"{path}.down_proj", mlp),)


def _experts(path: str, mlp: nn.Module) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    if isinstance(mlp.experts, nn.ModuleList):
        raise ValueError(f"{path}.experts is a list of modules; transformers>=5 fuses them")
    readers, writers = _mlp(f"{path}.experts", mlp.experts)  # type: ignore[arg-type]
    readers += (_matrix("router", f"{path}.gate", mlp),)
    if hasattr(mlp, "shared_expert"):
        shared = _mlp(f"{path}.shared_expert", mlp.shared_expert)  # type: ignore[arg-type]
        readers += (*shared[0], _matrix("router", f"{path}.shared_expert_gate", mlp))
        writers += shared[1]
    return readers, writers


def _refuse_shapes(decoder: Decoder) -> None:
    for block in decoder.blocks:
        for matrix in (*block.attention, *block.mlp):
            _expect(matrix, -1, decoder.hidden)
        for matrix in (block.output, *block.down):
            _expect(matrix, -2, decoder.hidden)
        _expect(block.output, -1, decoder.heads * decoder.head_dim)
        _expect(block.value, -2, decoder.kv_heads * decoder.head_dim)


def _expect(matrix: Matrix, axis: int, size: int) -> None:
    got = matrix.view().shape[axis]
    if got != size:
        raise ValueError(f"{matrix.module} has {got} along axis {axis}, expected {size}")


def check_finite(decoder: Decoder) -> None:
    """Raise ValueError if any parameter holds NaN or infinity."""
    for name, parameter in decoder.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds values that are not finite")
