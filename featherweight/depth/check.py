"""Can this model be routed? Asked before anything is touched."""

from __future__ import annotations

from torch import nn

from featherweight.depth.anatomy import Stack, attention_module
from featherweight.depth.attention import check_attention
from featherweight.depth.causal import check_causal_model
from featherweight.depth.options import Settings, check_plan
from featherweight.depth.routers import ROUTERS

IMPLEMENTATIONS = ("sdpa", "eager")


def check(model: nn.Module, stack: Stack, settings: Settings) -> None:
    """Check everything that a conversion needs, and touch nothing.

    Raises:
        ValueError: the message names the layer and the reason.
    """
    check_plan(settings, stack)
    config = getattr(model, "config", None)
    used = getattr(config, "_attn_implementation", None) or "sdpa"
    if used not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {used!r} can't be routed: load the model with "
            f"attn_implementation={' or '.join(map(repr, IMPLEMENTATIONS))}"
        )
    if stack.causal:
        check_causal_model(model, stack, settings.layers)
    elif any("rope" in name or "rotary" in name for name, _ in model.named_modules()):
        raise ValueError(f"{type(model).__name__} rotates positions inside its attention: unknown")
    for layer in settings.layers if ROUTERS[settings.router].needs == ("weights",) else ():
        for name in ("router", "predictor"):
            if hasattr(stack.blocks[layer], name):
                raise ValueError(f"{stack.block_name(layer)} has a module named {name} already")
    for layer in sorted(listeners_of(settings)):
        if reason := check_attention(attention_module(stack.blocks[layer]), stack.width):
            raise ValueError(f"{stack.block_name(layer)} can't be listened to: {reason}")


def listeners_of(settings: Settings) -> set[int]:
    """Return the layers whose attention is read by another."""
    return {source for source in settings.sources().values() if source >= 0}
