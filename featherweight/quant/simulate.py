"""Simulated activation and cache quantisation, for W4A8, W4A4 and KV experiments.

The weights stay as they are; inputs of the blocks' linear layers, and keys and values as they
enter the cache, are rounded while a context is open. Online Hadamard rotations (R3 on keys, R4 in
front of down) exist here alone: a checkpoint that stock loaders read can't carry them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from math import sqrt
from typing import Any

from torch import Tensor, nn

from featherweight.quant.calibrate import CACHES
from featherweight.quant.hadamard import hadamard_exists, hadamard_transform
from featherweight.quant.hadamard import hadamard_matrix as _matrix

Rounding = Callable[[Tensor], Tensor]


def round_tokens(
    x: Tensor, bits: int, *, symmetric: bool = True, clip_ratio: float = 1.0
) -> Tensor:
    """Round every token (last dimension) to its own grid.

    Args:
        x: ``[..., n]``, floating.
        bits: 2 to 16.
        symmetric: scale ``clip_ratio absmax / (2^(bits-1) - 1)``; else from minimum to maximum.
        clip_ratio: shrinks the range, in (0, 1]; 1 for none.

    Returns:
        Grid points, same shape and dtype.
    """
    values = x.float()
    if symmetric:
        top = (1 << (bits - 1)) - 1
        scale = clip_ratio * values.abs().amax(-1, keepdim=True).clamp_min(1e-30) / top
        rounded: Tensor = (values / scale).round().clamp(-top - 1, top) * scale
        return rounded.to(x.dtype)
    low = clip_ratio * values.amin(-1, keepdim=True).clamp_max(0)
    high = clip_ratio * values.amax(-1, keepdim=True).clamp_min(0)
    top = (1 << bits) - 1
    scale = (high - low).clamp_min(1e-30) / top
    zero = (-low / scale).round()
    codes = ((values / scale).round() + zero).clamp(0, top)
    rounded = (codes - zero) * scale
    return rounded.to(x.dtype)


@contextmanager
def quantized_activations(
    model: nn.Module,
    bits: int,
    *,
    clip_ratio: float = 1.0,
    down: bool = True,
    online: bool = False,
) -> Iterator[None]:
    """Round the inputs of all linear layers of the blocks, per token and symmetric.

    Args:
        model: a causal language model with ``model.layers``, quantised or not.
        bits: 2 to 16.
        clip_ratio: see :func:`round_tokens`.
        down: also the inputs of ``down_proj``, which have by far the largest outliers.
        online: round those in the basis of a Hadamard rotation (R4).

    Raises:
        ValueError: ``bits`` is out of range, the model has no ``model.layers``, or R4 is asked for
            a size without a Hadamard matrix.
    """
    _check_bits(bits)
    linears = {n: m for n, m in _layers(model).named_modules() if isinstance(m, nn.Linear)}

    def rounding(x: Tensor) -> Tensor:
        return round_tokens(x, bits, clip_ratio=clip_ratio)

    chosen: list[tuple[nn.Linear, Rounding]] = []
    for name, linear in linears.items():
        if not name.endswith("down_proj"):
            chosen.append((linear, rounding))
        elif down:
            chosen.append((linear, in_hadamard_basis(rounding, linear.in_features, online)))
    handles = [linear.register_forward_pre_hook(_on_input(one)) for linear, one in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (rounding(args[0]), *args[1:])


def in_hadamard_basis(rounding: Rounding, size: int, online: bool = True) -> Rounding:
    """Return a rounding that rotates by a Hadamard matrix before and back after it.

    With the matrix fused into the next weights this is what an online rotation computes, up to
    what weight quantisation does in that basis.
    """
    if not online:
        return rounding
    if not hadamard_exists(size):
        raise ValueError(f"no Hadamard matrix of order {size} for an online rotation")
    back = _matrix(size)
    return lambda x: (rounding(hadamard_transform(x)) @ back.to(x)) / sqrt(size)


@contextmanager
def quantized_cache(
    model: nn.Module, bits: int, *, clip_ratio: float = 1.0, online: bool = False
) -> Iterator[None]:
    """Round keys (after RoPE) and values of each head and token as they enter the cache.

    Args:
        model: a causal language model.
        bits: 2 to 16; asymmetric.
        clip_ratio: see :func:`round_tokens`.
        online: round keys in the basis of a Hadamard rotation (R3), which cancels in the scores.

    Raises:
        ValueError: ``bits`` is out of range, or R3 is asked for a size without a Hadamard matrix.
    """
    _check_bits(bits)

    def rounding(x: Tensor) -> Tensor:
        return round_tokens(x, bits, symmetric=False, clip_ratio=clip_ratio)

    handle = model.register_forward_pre_hook(_with_cache(rounding, online), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _with_cache(rounding: Rounding, online: bool) -> Callable[..., Any]:
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        """A cache that holds rounded keys and values."""

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            keys = in_hadamard_basis(rounding, key_states.shape[-1], online)(key_states)
            return super().update(keys, rounding(value_states), layer_idx, *args, **kwargs)

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new, old = CACHES
        name = new if new in signature(module.forward).parameters else old
        if kwargs.get(name) is None:
            kwargs = {**kwargs, name: RoundingCache(), "use_cache": True}
        return args, kwargs

    return give


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must lie in 2..16, got {bits}")


def _layers(model: nn.Module) -> nn.Module:
    try:
        return model.get_submodule("model.layers")
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no model.layers") from None
