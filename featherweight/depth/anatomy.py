"""Recognise the stack of transformer blocks in a model, and the parts of a block.

By names and structure, not by class: Hugging Face's and timm's encoders, Llama-like decoders and
plain models of one's own look alike here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from featherweight.common import unwrap

NORMS = (
    ("layernorm_before", "layernorm_after"),
    ("norm1", "norm2"),
    ("input_layernorm", "post_attention_layernorm"),
)
ATTENTIONS = ("attention", "attn", "self_attn")
HEADS = ("num_attention_heads", "num_heads", "heads")
PREFIX = ("cls_token", "class_token", "distillation_token", "dist_token", "register_tokens",
          "reg_token", "token")  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, and what routing has to know of them.

    Attributes:
        name: path of the list of blocks in the model.
        blocks: the blocks, first to last.
        width: size of a token.
        prefix: tokens in front of the patches (class, distillation, registers).
        causal: whether a token sees only those before it.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    width: int
    prefix: int
    causal: bool

    def block_name(self, layer: int) -> str:
        """Return the path of a block in the model."""
        return f"{self.name}.{layer}" if self.name else str(layer)


def find_stack(model: nn.Module) -> Stack:
    """Return the one stack of pre-norm blocks of a model, compiled and wrapped ones included.

    Raises:
        ValueError: there is none, more than one, or a block can't be treated; the message names it.
    """
    model = unwrap(model)
    lists = {
        name: tuple(module.children())
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _blocks(module)
    }
    kind = type(model).__name__
    if not lists:
        raise ValueError(f"{kind} has no list of transformer blocks (modules with an attention)")
    if len(lists) > 1:
        raise ValueError(
            f"{kind} has {len(lists)} lists of blocks ({', '.join(lists)}); hierarchical and "
            "encoder-decoder models can't be routed"
        )
    ((name, blocks),) = lists.items()
    for layer, block in enumerate(blocks):
        if reason := _reason(block):
            raise ValueError(f"{name}.{layer} ({type(block).__name__}) can't be routed: {reason}")
    return Stack(name, blocks, _width(blocks[0]), prefix_tokens(model), _causal(blocks[0], model))


def _blocks(module: nn.Module) -> bool:
    children = list(module.children())
    return bool(children) and all(_attention_name(child) for child in children)


def _attention_name(block: nn.Module) -> str | None:
    return next((n for n in ATTENTIONS if isinstance(getattr(block, n, None), nn.Module)), None)


def _norm_names(block: nn.Module) -> tuple[str, str] | None:
    return next((pair for pair in NORMS if all(hasattr(block, name) for name in pair)), None)


def _reason(block: nn.Module) -> str | None:
    if _norm_names(block) is None:
        pairs = ", ".join("/".join(pair) for pair in NORMS)
        return f"no norms before attention and perceptron ({pairs}): post-norm or unknown"
    if any(hasattr(block, name) for name in ("crossattention", "cross_attn", "encoder_attn")):
        return "it attends to a second sequence"
    return None


def norms(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the norms before attention and before the perceptron of a recognised block."""
    names = _norm_names(block)
    assert names is not None
    return getattr(block, names[0]), getattr(block, names[1])


def attention_module(block: nn.Module) -> nn.Module:
    """Return the module that makes queries, keys and values and attends."""
    name = _attention_name(block)
    assert name is not None
    outer: nn.Module = getattr(block, name)
    inner = getattr(outer, "attention", None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, "query") else outer


def head_count(attention: nn.Module) -> int:
    """Return the number of heads.

    Raises:
        ValueError: the module doesn't say.
    """
    for owner in (attention, getattr(attention, "config", None)):
        for name in HEADS:
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise ValueError(f"{type(attention).__name__} doesn't say how many heads it has")


def _width(block: nn.Module) -> int:
    weight = getattr(norms(block)[0], "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"the first norm of {type(block).__name__} has no weight: width unknown")
    return int(weight.numel())


def _causal(block: nn.Module, model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    own = getattr(attention_module(block), "is_causal", False)
    return bool(own) or bool(getattr(config, "is_decoder", False))


def prefix_tokens(model: nn.Module) -> int:
    """Count the tokens in front of the patches, by the parameters that hold them.

    Class, distillation and register tokens under the names used by Hugging Face, timm and this
    library; timm's own ``num_prefix_tokens`` where a module has it.
    """
    for module in model.modules():
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            return int(module.num_prefix_tokens)  # type: ignore[arg-type]
    return sum(
        parameter.shape[1]
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in PREFIX and parameter.ndim == 3
    )
