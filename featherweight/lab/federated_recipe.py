"""Recipes of federated training, as typed frozen dataclasses that are checked before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from featherweight.common import Registry, unknown
from featherweight.federated.algorithms import ALGORITHMS
from featherweight.federated.codecs import CODECS
from featherweight.federated.partition import PARTITIONS
from featherweight.federated.robust import AGGREGATORS
from featherweight.federated.sampling import SAMPLERS
from featherweight.lab.data import DATA
from featherweight.lab.recipe import STRICT, ModelRecipe, NotNegative, Positive

Options = dict[str, Any]
Rate = Annotated[float, Field(gt=0)]

GIVEN = {
    "partition": ("targets", "clients", "seed", "groups"),
    "algorithm": ("server_rate",),
    "sampler": ("clients", "size", "sizes", "seconds", "seed"),
    "codec": ("seed",),
    "aggregator": ("vectors", "weights"),
}
"""What a method is given by other keys or by the run itself, so that it is no option of its own."""


def one_of(kind: str, allowed: Mapping[str, Any]) -> AfterValidator:
    """Return a check that a name is one of a registry's."""

    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(unknown(kind, name, allowed))
        return name

    return AfterValidator(check)


def own_options(kind: str, method: Callable[..., Any]) -> list[str]:
    """Return the names that the ``options`` of a section may hold for a method."""
    parameters = signature(method).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [name for name in named if name not in GIVEN[kind]]


def check_options(
    kind: str, registry: Registry[Any], name: str, options: Mapping[str, Any]
) -> None:
    """Refuse options that a method does not have.

    Raises:
        ValueError: names the option and what there is.
    """
    allowed = own_options(kind, registry[name].method)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"options: {unknown(f'option of {name}', option, allowed)}"
                if allowed
                else f"options: {name} has none, got {option!r}"
            )


@dataclass(frozen=True, kw_only=True)
class FederatedDataRecipe:
    """What is learned from."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str, one_of("data set", DATA), Field(description="data set, see `featherweight ls`")
    ] = "digits"
    path: Annotated[str | None, Field(description="file or folder of the data set")] = None
    limit: Annotated[
        int | None, Field(ge=1, description="use this many training images; null: all")
    ] = None
    split_seed: Annotated[
        int, Field(ge=0, description="seed of limit and of pooled validation, one for all runs")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class PartitionRecipe:
    """Who holds what."""

    __pydantic_config__ = STRICT

    method: Annotated[
        str,
        one_of("partition", PARTITIONS),
        Field(description="how images are divided among clients; natural: by writer (mnist)"),
    ] = "iid"
    clients: Annotated[
        int | None, Field(ge=1, description="number of clients; null: all there are, for natural")
    ] = 100
    options: Annotated[
        Options, Field(description="the method's own options, such as alpha or per_client")
    ] = field(default_factory=dict)
    twin: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="part of everybody's images that is dealt anew, numbers kept; 1: the "
            "shuffled twin, which is IID",
        ),
    ] = 0.0
    seed: Annotated[int | None, Field(ge=0, description="of the division; null: the run's")] = None
    file: Annotated[
        str | None,
        Field(description="partition.safetensors of a run, in place of all else; null: none"),
    ] = None

    def __post_init__(self) -> None:
        """Refuse options that the method doesn't have, and a missing number of clients."""
        check_options("partition", PARTITIONS, self.method, self.options)
        if self.clients is None and self.method != "natural" and self.file is None:
            raise ValueError(f"clients: {self.method} needs a number of clients")


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe:
    """How a learning rate changes over the rounds."""

    __pydantic_config__ = STRICT

    name: Annotated[
        Literal["constant", "exponential", "inverse-linear", "inverse-sqrt"],
        Field(description="how the rate falls"),
    ] = "constant"
    decay: Annotated[
        float, Field(gt=0, le=1, description="exponential: factor every `scale` rounds")
    ] = 0.5
    scale: Annotated[Positive, Field(description="rounds over which it falls")] = 100
    warmup: Annotated[int, Field(ge=0, description="rounds of linear growth; 0: none")] = 0


@dataclass(frozen=True, kw_only=True)
class AlgorithmRecipe:
    """What the server does."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str,
        one_of("federated algorithm", ALGORITHMS),
        Field(description="algorithm, see `featherweight ls methods`"),
    ] = "fedavg"
    server_rate: Annotated[
        Rate | None, Field(description="the server's learning rate; null: the algorithm's own")
    ] = None
    schedule: Annotated[ScheduleRecipe, Field(description="of the server's rate")] = field(
        default_factory=ScheduleRecipe
    )
    options: Annotated[Options, Field(description="the algorithm's own, such as mu or betas")] = (
        field(default_factory=dict)
    )

    def __post_init__(self) -> None:
        """Refuse options that the algorithm doesn't have, and a rate where it has none."""
        check_options("algorithm", ALGORITHMS, self.name, self.options)
        rated = "server_rate" in signature(ALGORITHMS[self.name].method).parameters
        if not rated and (self.server_rate is not None or self.schedule != ScheduleRecipe()):
            raise ValueError(f"server_rate: {self.name} has none, nor a schedule of it")


@dataclass(frozen=True, kw_only=True)
class LocalRecipe:
    """What a client does in a round."""

    __pydantic_config__ = STRICT

    learning_rate: Annotated[Rate, Field(description="of the clients")] = 0.1
    epochs: Annotated[
        int | None, Field(ge=1, description="passes over the client's images; null: steps")
    ] = 1
    steps: Annotated[
        int | None, Field(ge=1, description="local steps, the same for all; null: epochs")
    ] = None
    batch_size: Annotated[
        int | None, Field(ge=1, description="images a step; null: all of the client")
    ] = 16
    optimizer: Annotated[
        Literal["sgd", "adam"], Field(description="of the clients, begun anew each round")
    ] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1, description="sgd: momentum; 0: none")] = 0.0
    weight_decay: Annotated[NotNegative, Field(description="sgd: weight decay; 0: none")] = 0.0
    schedule: Annotated[ScheduleRecipe, Field(description="of the clients' rate")] = field(
        default_factory=ScheduleRecipe
    )

    def __post_init__(self) -> None:
        """Refuse both epochs and steps, and neither."""
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs: give either epochs or steps, and set the other to null")


@dataclass(frozen=True, kw_only=True)
class SamplerRecipe:
    """Who takes part."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str, one_of("sampler", SAMPLERS), Field(description="sampler or model of availability")
    ] = "uniform"
    size: Annotated[Positive, Field(description="clients of a round; not used by `all`")] = 10
    options: Annotated[Options, Field(description="the sampler's own, such as period or over")] = (
        field(default_factory=dict)
    )

    def __post_init__(self) -> None:
        """Refuse options that the sampler doesn't have."""
        check_options("sampler", SAMPLERS, self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class CodecRecipe:
    """How an update travels."""

    __pydantic_config__ = STRICT

    name: Annotated[str, one_of("codec", CODECS), Field(description="codec of the updates")] = (
        "identity"
    )
    options: Annotated[Options, Field(description="the codec's own, such as k or levels")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Refuse options that the codec doesn't have, and missing ones."""
        check_options("codec", CODECS, self.name, self.options)
        for name, parameter in signature(CODECS[self.name].method).parameters.items():
            if parameter.default is parameter.empty and name not in self.options:
                raise ValueError(f"options: {self.name} needs {name}")


@dataclass(frozen=True, kw_only=True)
class AggregatorRecipe:
    """How the server makes one update of many."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str, one_of("aggregator", AGGREGATORS), Field(description="mean, or a robust one")
    ] = "mean"
    options: Annotated[Options, Field(description="the aggregator's own, such as trim")] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Refuse options that the aggregator doesn't have."""
        check_options("aggregator", AGGREGATORS, self.name, self.options)


@dataclass(frozen=True, kw_only=True)
class PrivacyRecipe:
    """DP-FedAvg: clipping and noise."""

    __pydantic_config__ = STRICT

    clip: Annotated[
        Rate | None, Field(description="largest norm of an update; null: no privacy")
    ] = None
    noise_multiplier: Annotated[
        NotNegative, Field(description="noise on the sum over the clip; 0: clipping alone")
    ] = 1.0
    quantile: Annotated[
        float | None,
        Field(gt=0, lt=1, description="the clip follows this quantile of norms; null: it stays"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SettingRecipe:
    """The world that the training is meant for; the run is checked against it."""

    __pydantic_config__ = STRICT

    kind: Annotated[
        Literal["cross-device", "cross-silo"] | None,
        Field(description="must be said: many clients met once, or few known ones"),
    ] = None
    tuned_on: Annotated[
        Literal["train", "validation", "test"],
        Field(description="what the recipe's choices were made on"),
    ] = "validation"


@dataclass(frozen=True, kw_only=True)
class TimeRecipe:
    """Devices and their connection, for the estimated time."""

    __pydantic_config__ = STRICT

    down: Annotated[Rate, Field(description="bytes a second to a client")] = 0.75e6
    up: Annotated[Rate, Field(description="bytes a second from a client")] = 0.25e6
    slowdown: Annotated[NotNegative, Field(description="a device's time over the simulation's")] = (
        7.0
    )
    overhead: Annotated[NotNegative, Field(description="seconds of a device beside training")] = (
        10.0
    )
    server: Annotated[NotNegative, Field(description="seconds of the server a round")] = 0.0
    per_example: Annotated[
        NotNegative, Field(description="seconds of the simulation for one image's gradient")
    ] = 0.001
    spread: Annotated[
        NotNegative,
        Field(description="over-selection: log-normal spread of the devices' speeds; 0: equal"),
    ] = 0.5


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """What the model is judged on while it trains; test images are looked at once, at the end."""

    __pydantic_config__ = STRICT

    split: Annotated[
        Literal["pooled", "clients", "examples"],
        Field(
            description="validation on a pool taken off before the division, on clients that never "
            "train, or on images kept back from each client"
        ),
    ] = "pooled"
    fraction: Annotated[float, Field(gt=0, lt=1, description="part held out")] = 0.1
    every: Annotated[Positive, Field(description="rounds between evaluations")] = 10


@dataclass(frozen=True, kw_only=True)
class SimulationRecipe:
    """On what, and how, the simulation runs."""

    __pydantic_config__ = STRICT

    backend: Annotated[
        Literal["auto", "vectorized", "sequential"],
        Field(description="clients side by side, or one after the other"),
    ] = "auto"
    device: Annotated[Literal["cpu", "cuda", "mps"], Field(description="of the model")] = "cpu"
    threads: Annotated[Positive, Field(description="CPU threads inside an operation")] = 1
    checkpoint_seconds: Annotated[
        NotNegative, Field(description="least time between checkpoints")
    ] = 10.0


def _small() -> ModelRecipe:
    return ModelRecipe(name="mlp", options={"width": 64, "depth": 1, "norm": "none"})


@dataclass(frozen=True, kw_only=True)
class FederatedRecipe:
    """What a federated run does."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in tables and folders"),
    ] = "federated"
    setting: SettingRecipe = field(default_factory=SettingRecipe)
    data: FederatedDataRecipe = field(default_factory=FederatedDataRecipe)
    partition: PartitionRecipe = field(default_factory=PartitionRecipe)
    model: ModelRecipe = field(default_factory=_small)
    algorithm: AlgorithmRecipe = field(default_factory=AlgorithmRecipe)
    local: LocalRecipe = field(default_factory=LocalRecipe)
    sampler: SamplerRecipe = field(default_factory=SamplerRecipe)
    weighting: Annotated[
        Literal["examples", "uniform", "unbiased"],
        Field(description="of clients in the mean; unbiased: examples, without normalising"),
    ] = "examples"
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    aggregator: AggregatorRecipe = field(default_factory=AggregatorRecipe)
    privacy: PrivacyRecipe = field(default_factory=PrivacyRecipe)
    rounds: Annotated[Positive, Field(description="rounds of training")] = 100
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    time: TimeRecipe = field(default_factory=TimeRecipe)
    execute: SimulationRecipe = field(default_factory=SimulationRecipe)
    seeds: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1, description="one run each")
    ] = field(default_factory=lambda: [0])
