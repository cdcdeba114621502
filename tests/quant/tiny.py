"""Small decoders with random weights, gains and biases, one of each supported kind."""

import types

import pytest
import torch

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 12}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 20, "tie_word_embeddings": True}),
    "granite": ("Granite", {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "head_dim": 16}),
}
DENSE = [kind for kind in KINDS if kind not in ("mixtral", "qwen2-moe", "qwen3-moe")]


def build(kind="llama", seed=0, dtype=torch.float32, **options):
    """Return a decoder whose norms have gains, whose biases are not zero, with a few outliers."""
    name, own = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **options})
    config.use_cache = False
    config._experts_implementation = "eager"  # the grouped product has no float64
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            base = 0.0 if kind == "gemma" else 1.0
            parameter.data = base + 0.3 * values
        elif name.endswith("bias"):
            parameter.data = 0.2 * values
        else:
            parameter.data = values * (
                1 + 2 * torch.rand(parameter.shape, generator=generator) ** 8
            )
            parameter.data /= parameter.shape[-1] ** 0.5
    model.tie_weights()
    for parameter in model.parameters():  # buffers stay in float32, as in a model that is loaded
        parameter.data = parameter.data.to(dtype)
    return model


def exact(model):
    """Turn a float64 model's norms, which compute in float32, into exact ones."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_exact_norm, module)
    return model


def _exact_norm(self, x):
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    gain = self.weight + (1.0 if type(self).__name__.startswith("Gemma") else 0.0)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * gain


def ids(batch=2, length=12, seed=0, vocabulary=128):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits
