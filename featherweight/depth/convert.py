"""Turn a dense model into one whose layers process some of the tokens, and back.

In place and all or nothing: everything is checked before anything is touched. No parameter is
renamed; a learned router adds its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import as_generator, unwrap
from featherweight.depth.anatomy import Stack, attention_module, find_stack
from featherweight.depth.attention import Listening, ListeningAttention
from featherweight.depth.blocks import RoutedBlock, Rule
from featherweight.depth.causal import CausalBlock
from featherweight.depth.check import check, listeners_of
from featherweight.depth.ledger import Ledger
from featherweight.depth.merge import Merging
from featherweight.depth.options import Settings, chosen_layers
from featherweight.depth.routers import ROUTERS, START_STD, linear_router, predictor
from featherweight.depth.worn import put_on, take_off

CONFIG = "featherweight_depth"  # where a Hugging Face configuration keeps the settings


def route(
    model: nn.Module,
    router: str = "a-mod",
    capacity: float | Sequence[float] = 0.5,
    layers: str | Sequence[int] = "alternate",
    *,
    policy: str = "alternate",
    gate: str | None = None,
    keep_prefix: bool = True,
    prefix: int | None = None,
    keep_last_dense: bool = False,
    rounding: str = "ceil",
    score: str = "auto",
    queries: str | int | None = None,
    heads: str = "mean",
    auxiliary: str = "none",
    evaluate: str = "causal",
    std: float = START_STD,
    seed: int = 0,
) -> nn.Module:
    """Let some layers of a transformer process only the tokens a router chooses; in place.

    The general form of `a_mod` and `mod`. A chosen token goes through the layer with weight 1, or
    with the gate of its score; the others pass unchanged, and come back at the next dense layer.

    Args:
        model: an encoder with pre-norm blocks (Hugging Face's ViT, DeiT, DINOv2, timm's ViT, or of
            that structure), or for router ``"mod"`` a Llama-like causal model.
        router: name in `ROUTERS`.
        capacity: fraction of the tokens processed, in (0, 1], 1 is dense; or one for each layer.
        layers: ``"alternate"`` for layers 1, 3, 5, ... counted from 0, or their numbers.
        policy: whose score a layer reads that follows a routed one: ``"alternate"`` refuses such
            layers, ``"last_dense"`` reads the nearest dense layer's, ``"carry"`` updates the scores
            of the tokens that were processed.
        gate: name in `GATES`, or ``"none"``; by default the router's own.
        keep_prefix: always process class, distillation and register tokens, counted against the
            capacity.
        prefix: number of those tokens; None finds them by their parameters' names.
        keep_last_dense: leave the last layer dense.
        rounding: of the number of tokens: ``"ceil"``, ``"floor"``, ``"round"``.
        score: how attention is reduced, name in `SOURCES`; all are exact.
        queries: whose attention counts: ``"all"``, ``"patches"``, ``"cls"``, or a number of queries
            drawn at random; by default the router's own.
        heads: ``"mean"`` or ``"max"``.
        auxiliary: ``"router"`` or ``"predictor"`` to learn a causal rule beside top-k.
        evaluate: of a causal model: ``"causal"`` or ``"top-k"``, which looks ahead.
        std: of a learned router's first weights; 0 starts with equal scores.
        seed: of a learned router's first weights and of random choices.

    Returns:
        The same model.

    Raises:
        ValueError: an option is out of range, or the model can't be routed; it is untouched, and
            the message names the layer and the reason.
    """
    core = unwrap(model)
    if is_routed(core):
        raise ValueError("the model is routed already; call to_dense first")
    stack = find_stack(core)
    defaults = ROUTERS[router].defaults
    settings = Settings(
        router=router,
        capacity=capacity if isinstance(capacity, (int, float)) else tuple(capacity),
        layers=chosen_layers(layers, len(stack.blocks), keep_last_dense),
        policy=policy,
        gate=gate if gate is not None else defaults.get("gate", "none"),
        keep_prefix=keep_prefix,
        prefix=stack.prefix if prefix is None else prefix,
        rounding=rounding,
        score=score,
        queries=queries if queries is not None else defaults.get("queries", "all"),
        heads=heads,
        auxiliary=auxiliary,
        evaluate=evaluate,
        std=std,
        seed=seed,
    )
    check(core, stack, settings)
    _convert(core, stack, settings)
    return model


def a_mod(
    model: nn.Module,
    capacity: float | Sequence[float] = 0.5,
    layers: str | Sequence[int] = "alternate",
    **options: Any,
) -> nn.Module:
    """Route by the attention each token received in the layer before; in place, no parameters.

    Gadhikar, Majumdar, Popp, Saranrittichai, Rapp and Schott 2024, "Attention Is All You Need For
    Mixture-of-Depths Routing", arXiv:2412.20875, eq. 4. The score ranks tokens and weighs nothing;
    no gradient passes through it.

    Args:
        model: a vision encoder, see `route`.
        capacity: fraction of the tokens processed, in (0, 1]; 1 is the dense model.
        layers: ``"alternate"`` or layer numbers from 1.
        **options: those of `route` but ``router``, ``gate`` and ``auxiliary``.

    Returns:
        The same model.

    Raises:
        ValueError: as `route`; causal models are refused.
    """
    return route(model, "a-mod", capacity, layers, **options)


def mod(
    model: nn.Module,
    capacity: float | Sequence[float] = 0.125,
    layers: str | Sequence[int] = "alternate",
    *,
    gate: str = "unit",
    **options: Any,
) -> nn.Module:
    """Route by a learned linear score; in place, one weight a channel and routed layer more.

    Raposo, Ritter, Richards, Lillicrap, Humphreys and Santoro 2024, "Mixture-of-Depths",
    arXiv:2404.02258. The paper's gate is ``"raw"``.

    Args:
        model: an encoder, or a Llama-like causal model, see `route`.
        capacity: fraction of the tokens processed, in (0, 1].
        layers: ``"alternate"`` or layer numbers.
        gate: name in `GATES`, by which the update of a chosen token is multiplied.
        **options: those of `route` but ``router``.

    Returns:
        The same model.

    Raises:
        ValueError: as `route`.
    """
    return route(model, "mod", capacity, layers, gate=gate, **options)


def to_dense(model: nn.Module) -> nn.Module:
    """Undo `route`: all layers process all tokens again, and learned routers are gone; in place.

    Raises:
        ValueError: the model isn't routed.
    """
    core = unwrap(model)
    settings_of(core)
    for handle in core.depth_hooks:  # type: ignore[union-attr]
        handle.remove()
    for module in list(core.modules()):
        for name in vars(module).get("depth_added", ()):
            delattr(module, name)
        take_off(module)
    if hasattr(getattr(core, "config", None), CONFIG):
        delattr(core.config, CONFIG)
    return model


def is_routed(model: nn.Module) -> bool:
    """Tell whether `route`, `a_mod` or `mod` converted the model."""
    return "depth_settings" in vars(unwrap(model))


def settings_of(model: nn.Module) -> Settings | Merging:
    """Return the settings of a routed model; ``route(model, **settings.asdict())`` repeats it.

    Of one that merges tokens, ``tome(model, **settings.asdict())`` does.

    Raises:
        ValueError: the model isn't routed.
    """
    core = unwrap(model)
    if not is_routed(core):
        raise ValueError(f"{type(core).__name__} isn't routed; convert it first")
    settings: Settings | Merging = core.depth_settings  # type: ignore[assignment]
    return settings


@contextlib.contextmanager
def given_scores(model: nn.Module, scores: Tensor) -> Iterator[None]:
    """Route by ``scores`` [B, N], prefix tokens included, inside the block (router ``"external"``).

    Raises:
        ValueError: the model isn't routed by external scores.
    """
    ledger, settings = ledger_of(model), settings_of(model)
    if not isinstance(settings, Settings) or settings.router != "external":
        raise ValueError("the model isn't routed by external scores: router='external'")
    ledger.external = scores.detach()
    try:
        yield
    finally:
        ledger.external = None


def ledger_of(model: nn.Module) -> Ledger:
    """Return what the layers of a routed model wrote in the last forward."""
    if not isinstance(settings_of(model), Settings):
        raise ValueError("the model merges tokens; only a routed one skips them")
    ledger: Ledger = unwrap(model).depth_ledger  # type: ignore[assignment]
    return ledger


def _convert(model: nn.Module, stack: Stack, settings: Settings) -> None:
    ledger, listeners = Ledger(len(stack.blocks)), listeners_of(settings)
    generator = as_generator(settings.seed)
    sources = settings.sources()
    mixin = CausalBlock if stack.causal else RoutedBlock
    for layer, capacity in zip(settings.layers, settings.capacities, strict=True):
        block = stack.blocks[layer]
        rule = Rule(
            layer=layer,
            router=settings.router,
            capacity=float(capacity),
            rounding=settings.rounding,
            prefix=settings.prefix if settings.keep_prefix else 0,
            source=sources[layer],
            carry=settings.policy == "carry" and layer in listeners,
            gate=settings.gate,
            auxiliary=settings.auxiliary,
            causal=stack.causal and settings.evaluate == "causal",
            seed=settings.seed,
        )
        _add_router(block, stack.width, settings, generator)
        put_on(block, mixin, rule=rule, ledger=ledger)
    for layer in listeners:
        _listen(attention_module(stack.blocks[layer]), layer, settings, ledger, model)
    model.depth_settings, model.depth_ledger = settings, ledger  # type: ignore[assignment]
    draws = "seed" in ROUTERS[settings.router].needs or isinstance(settings.queries, int)
    hooks = [model.register_forward_pre_hook(_advance)] if draws else []
    model.depth_hooks = hooks  # type: ignore[assignment]
    if hasattr(model, "config"):
        setattr(model.config, CONFIG, settings.asdict())


def _add_router(
    block: nn.Module, width: int, settings: Settings, generator: torch.Generator
) -> None:
    if "weights" not in ROUTERS[settings.router].needs:
        return
    like = next(block.parameters())
    block.router = linear_router(width, like, settings.std, generator)
    added = ["router"]
    if settings.auxiliary == "predictor":
        block.predictor = predictor(width, like, generator)
        added.append("predictor")
    block.depth_added = tuple(added)  # type: ignore[assignment]


def _listen(
    attention: nn.Module, layer: int, settings: Settings, ledger: Ledger, model: nn.Module
) -> None:
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    source = "eager" if used == "eager" and settings.score == "auto" else settings.score
    listening = Listening(
        layer, source, settings.queries, settings.heads, settings.prefix, settings.seed, ledger
    )
    put_on(attention, ListeningAttention, listening=listening)


def _advance(model: nn.Module, _inputs: Any) -> None:
    if model.training:
        ledger: Ledger = model.depth_ledger  # type: ignore[assignment]
        ledger.step += 1
