"""Small encoders of every family, all with the same sizes."""

import torch
from torch import nn
from torch.nn import functional as F

from featherweight.lab import models

SHAPE = (3, 16, 16)
PATCH, WIDTH, LAYERS, HEADS = 4, 32, 4, 4
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "image_size": 16,
    "patch_size": PATCH,
}


def images(count=3, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def spread_(model):
    """Large weights, so that attention is far from uniform and tokens differ."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.ndim < 4 else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def own(layers=LAYERS):
    return spread_(
        models.build(
            "vit", classes=10, shape=SHAPE, seed=0, patch=PATCH, width=WIDTH, depth=layers,
            heads=HEADS,
        )
    )  # fmt: skip


def hugging_vit(**options):
    from transformers import ViTConfig, ViTForImageClassification

    return spread_(ViTForImageClassification(ViTConfig(**SIZES, num_labels=10, **options)))


def hugging_deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return spread_(DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=10)))


def hugging_dino():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    return spread_(Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=10)))


def hugging_registers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    config = Dinov2WithRegistersConfig(**SIZES, num_labels=10, num_register_tokens=3)
    return spread_(Dinov2WithRegistersForImageClassification(config))


class TimmAttention(nn.Module):
    """Attention with the module names of timm's."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.attn_drop, self.norm, self.proj_drop = nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        x = F.scaled_dot_product_attention(query, key, qkv[2], attn_mask)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


class TimmBlock(nn.Module):
    """A block with the module names of timm's."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(WIDTH), TimmAttention(), nn.Identity()
        self.norm2, self.ls2, self.drop_path1 = nn.LayerNorm(WIDTH), nn.Identity(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.drop_path2 = nn.Identity()

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class TimmVit(nn.Module):
    """A vision transformer with the module names of timm's."""

    def __init__(self):
        super().__init__()
        self.num_prefix_tokens = 1
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(TimmBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


FAMILIES = {
    "own": own,
    "vit": hugging_vit,
    "deit": hugging_deit,
    "dinov2": hugging_dino,
    "registers": hugging_registers,
    "timm": lambda: spread_(TimmVit()),
}
PREFIX = {"own": 1, "vit": 1, "deit": 2, "dinov2": 1, "registers": 4, "timm": 1}


def llama(layers=4, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return _decoder(LlamaForCausalLM, LlamaConfig, layers, **options)


def qwen(layers=4, **options):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _decoder(Qwen3ForCausalLM, Qwen3Config, layers, head_dim=8, **options)


def _decoder(kind, config, layers, **options):
    sizes = {
        "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 50,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    return spread_(kind(config(**sizes, **options)))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits
