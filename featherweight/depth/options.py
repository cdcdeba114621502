"""The settings of a routed model, checked, and the plan for each of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.common import unknown
from featherweight.depth.anatomy import Stack
from featherweight.depth.gates import GATES
from featherweight.depth.received import SOURCES
from featherweight.depth.routers import ROUTERS
from featherweight.depth.rows import ROUNDINGS, check_capacity

POLICIES = ("alternate", "last_dense", "carry")
QUERIES = ("all", "patches", "cls")
AUXILIARY = ("none", "router", "predictor")
EVALUATE = ("causal", "top-k")


@dataclass(frozen=True)
class Settings:
    """Everything that `route` was asked for; JSON keeps it."""

    router: str
    capacity: float | tuple[float, ...]
    layers: tuple[int, ...]
    policy: str
    gate: str
    keep_prefix: bool
    prefix: int
    rounding: str
    score: str
    queries: str | int
    heads: str
    auxiliary: str
    evaluate: str
    std: float
    seed: int

    def __post_init__(self) -> None:
        choices = {
            "router": ROUTERS, "policy": POLICIES, "gate": ("none", *GATES), "score": SOURCES,
            "rounding": ROUNDINGS, "heads": ("mean", "max"), "auxiliary": AUXILIARY,
            "evaluate": EVALUATE,
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(unknown(name, getattr(self, name), allowed))
        for name in ("prefix", "std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        self._check_queries()
        for capacity in self.capacities:
            check_capacity(capacity)
        if self.gate != "none" and "weights" not in ROUTERS[self.router].needs:
            raise ValueError(f"gate must be 'none' for router {self.router!r}, got {self.gate!r}")
        if self.auxiliary != "none" and "weights" not in ROUTERS[self.router].needs:
            raise ValueError(f"auxiliary losses need router 'mod', got {self.router!r}")

    def _check_queries(self) -> None:
        number = isinstance(self.queries, int) and not isinstance(self.queries, bool)
        if self.queries not in QUERIES and not (number and int(self.queries) >= 1):
            allowed = ", ".join(map(repr, QUERIES))
            raise ValueError(f"queries must be {allowed} or a number >= 1, got {self.queries!r}")

    @property
    def capacities(self) -> tuple[float, ...]:
        """The capacity of each routed layer."""
        if isinstance(self.capacity, (list, tuple)):
            return tuple(self.capacity)
        return (self.capacity,) * len(self.layers)

    @property
    def listens(self) -> bool:
        """Whether the router reads attention maps."""
        return "attention" in ROUTERS[self.router].needs

    def sources(self) -> dict[int, int]:
        """Return for each routed layer the layer whose score it reads; -1 for none."""
        if not self.listens:
            return dict.fromkeys(self.layers, -1)
        return {layer: self._source(layer) for layer in self.layers}

    def _source(self, layer: int) -> int:
        if self.policy != "last_dense":
            return layer - 1
        return max((n for n in range(layer) if n not in self.layers), default=-1)

    def asdict(self) -> dict[str, Any]:
        """Return what `route` takes beside the model to do the same again."""
        return asdict(self)


def chosen_layers(
    layers: str | Sequence[int], count: int, keep_last_dense: bool
) -> tuple[int, ...]:
    """Return the routed layers, ascending: ``"alternate"`` means 1, 3, 5, ...

    Raises:
        ValueError: no layer is left, one is listed twice, or there is no such layer.
    """
    if isinstance(layers, str):
        if layers != "alternate":
            raise ValueError(f"layers must be 'alternate' or a list of numbers, got {layers!r}")
        layers = range(1, count, 2)
    chosen = sorted(layers)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in chosen):
        raise TypeError(f"layers must be whole numbers, got {list(layers)!r}")
    if keep_last_dense:
        chosen = [n for n in chosen if n != count - 1]
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise ValueError(f"layers must be different numbers in [0, {count - 1}], got {chosen}")
    return tuple(chosen)


def check_plan(settings: Settings, stack: Stack) -> None:
    """Check settings against a stack.

    Raises:
        ValueError: the message names the layer and the reason.
    """
    if len(settings.capacities) != len(settings.layers):
        raise ValueError(
            f"capacity must be one number or one for each of the {len(settings.layers)} routed "
            f"layers, got {len(settings.capacities)}"
        )
    if stack.causal:
        _check_causal(settings, stack)
    if settings.queries == "cls" and settings.prefix == 0:
        raise ValueError("queries 'cls' needs a class token: prefix 0 leaves no class token")
    if settings.listens:
        for layer in settings.layers:
            _check_source(layer, settings, stack)


def _check_source(layer: int, settings: Settings, stack: Stack) -> None:
    name = stack.block_name(layer)
    if layer == 0:
        raise ValueError(f"{name} can't be routed by attention: no layer comes before it")
    if settings.policy == "alternate" and layer - 1 in settings.layers:
        raise ValueError(
            f"{name} follows the routed {stack.block_name(layer - 1)}, whose attention doesn't "
            "cover all tokens; use policy='last_dense' or 'carry', or other layers"
        )
    if settings.policy == "last_dense" and settings.sources()[layer] < 0:
        raise ValueError(f"{name} can't be routed by attention: no dense layer comes before it")


def _check_causal(settings: Settings, stack: Stack) -> None:
    if settings.listens:
        raise ValueError(
            f"router {settings.router!r} is for encoders: in a causal model the attention a token "
            "receives depends on later tokens and favours early ones; use depth.mod"
        )
    if settings.router != "mod":
        raise ValueError(f"causal models need router 'mod', got {settings.router!r}")
    if settings.evaluate == "causal" and settings.auxiliary == "none":
        raise ValueError(
            "a causal model needs auxiliary='router' or 'predictor' to decide without later "
            "tokens, or evaluate='top-k', with which it can't generate"
        )
    if 0 in settings.layers:
        raise ValueError(
            f"{stack.block_name(0)} can't be routed in a causal model: the length of the cache is "
            "that of its first layer"
        )
