"""Which models can be treated, and why the others can't."""

from __future__ import annotations

from typing import Any

from torch import nn

MODEL_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "granite",
    "smollm3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
"""Values of ``config.model_type`` whose arithmetic is known to be what the view says."""

_OUTPUT_NORMS = ("post_feedforward_layernorm", "post_attention_norm", "post_self_attn_layernorm")


def refuse_architecture(config: Any) -> None:
    """Raise ValueError, with the reason, unless models of this configuration can be treated."""
    kind = getattr(config, "model_type", "")
    if kind in MODEL_TYPES:
        return
    reason = ""
    if kind.startswith(("gemma2", "gemma3", "olmo2", "olmo3")):
        reason = "; it norms what a block writes, so a gain stands between two rotations"
    elif any(hasattr(config, name) for name in ("layer_norm_eps", "layer_norm_epsilon")):
        reason = "; it uses LayerNorm, whose subtracted mean a rotation changes"
    raise ValueError(
        f"model type {kind!r} is not supported{reason}; supported: {', '.join(MODEL_TYPES)}"
    )


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model inside a model of transformers."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(
            f"model must be a causal language model of transformers, got {kind_of(model)}"
        )
    return config.get_text_config()


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class."""
    return type(module).__name__


def refuse_structure(model: nn.Module, body: nn.Module) -> None:
    """Raise ValueError if a part is missing, or is one that a rotation can't pass."""
    missing = [n for n in ("embed_tokens", "layers", "norm") if not hasattr(body, n)]
    if missing or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        raise ValueError(f"{kind_of(model)} has no {', '.join(missing) or 'lm_head'} to work on")
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            raise ValueError(f"{name} is a LayerNorm, whose subtracted mean a rotation changes")
        if name.rpartition(".")[2] in _OUTPUT_NORMS:
            raise ValueError(f"{name} norms what a block writes; its gain can't be folded")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            raise ValueError(f"{name} must be a floating tensor on a device, got {parameter.dtype}")
