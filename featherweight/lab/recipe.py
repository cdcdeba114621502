"""Recipes: what a run does, as typed frozen dataclasses that are checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from featherweight.common import Registry, unknown
from featherweight.depth import ROUTERS, fewer_layers, route, tome
from featherweight.init import INITS
from featherweight.lab.data import DATA
from featherweight.lab.duration import Duration, DurationField
from featherweight.lab.models import MODELS
from featherweight.optim import OPTIMIZERS
from featherweight.sparse import (
    CONSTRUCTIONS,
    CRITERIA,
    DENSITIES,
    DYNAMIC,
    FORMS,
    LOOPS,
    RESETS,
    Structure,
    iterate,
)

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


DEFAULT_LENGTH = Duration(15, "ep")


def _one_of(kind: str, allowed: Sequence[str]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(unknown(kind, name, allowed))
        return name

    return AfterValidator(check)


def _model_name(name: str) -> str:
    if name not in MODELS and ":" not in name:
        raise ValueError(unknown("model", name, [*MODELS, "package.module:function"]))
    return name


def _structure(text: str | None) -> str | None:
    if text is not None:
        Structure.parse(text)
    return text


Allocation = Annotated[str, _one_of("allocation", ["global", "layer", *DENSITIES])]
START_METHODS = [*CRITERIA, *CONSTRUCTIONS]
"""What makes masks once, before training."""
Method = Annotated[str, _one_of("method", ["dense", *START_METHODS, *LOOPS, *DYNAMIC, *FORMS])]


# What a method is given by other keys or by the run itself, so that it is no option of its own.
_GIVEN = re.findall(
    r"\w+",
    """
    model optimizer weights include exclude seed generator resume batches objective inputs
    input_shape iterations steps structure density sparsity densities levels per_level allocation
    scope start support masks masks_from sampling legacy criterion optimizer_state reset warmup
    budget lengths
    """,
)


def own_options(method: str) -> list[str]:
    """Return the names that ``sparse.options`` may hold for a method."""
    registries: list[Registry[Any]] = [CRITERIA, CONSTRUCTIONS, LOOPS, DYNAMIC, FORMS]
    functions = [registry[method].method for registry in registries if method in registry]
    functions += [iterate] if method in LOOPS else []
    names = [
        parameter.name
        for function in functions
        for parameter in signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    own = ["steps"] if method in CRITERIA else []  # of ProsPr; elsewhere the run gives it
    return [name for name in dict.fromkeys(names) if name in own or name not in _GIVEN]


def optimizer_options(name: str) -> list[str]:
    """Return the names that ``fit.options`` may hold for an optimizer."""
    if name not in OPTIMIZERS:
        return []
    given = "params lr momentum weight_decay nesterov weights maximize foreach fused capturable"
    names = signature(OPTIMIZERS[name].method).parameters
    return [option for option in names if option not in (*given.split(), "state_dtype")]


FEWER = "fewer-layers"
ROUTED = [name for name, entry in ROUTERS.items() if "scores" not in entry.needs]
"""What lets a layer process some of the tokens, and needs no scores from outside."""
DEPTH_METHODS = ["dense", *ROUTED, "tome", FEWER]


def depth_options(method: str) -> list[str]:
    """Return the names that ``depth.options`` may hold for a method."""
    if method == "dense":
        return []
    function = {"tome": tome, FEWER: fewer_layers}.get(method, route)
    given = ["model", "seed"] + (["router", "capacity", "layers"] if method in ROUTED else [])
    return [name for name in signature(function).parameters if name not in given]


def _check_options(
    key: str, owner: str, options: Mapping[str, Any], allowed: Sequence[str]
) -> None:
    for name in options:
        if name not in allowed:
            raise ValueError(
                f"{key}: {unknown(f'option of {owner}', name, allowed)}"
                if allowed
                else f"{key}: {owner} has none, got {name!r}"
            )


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What is learned from."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str, _one_of("data set", list(DATA)), Field(description="data set, see `featherweight ls`")
    ] = "digits"
    path: Annotated[
        str | None, Field(description="file or folder of the data set, or a Hub name for hf")
    ] = None
    validation: Annotated[
        float, Field(ge=0, lt=1, description="part of the training set held out; 0: none")
    ] = 0.1
    limit: Annotated[
        int | None, Field(ge=1, description="use this many training images; null: all")
    ] = None
    augment: Annotated[
        Literal["none", "flip", "crop-flip"], Field(description="random changes of training images")
    ] = "none"
    split_seed: Annotated[
        int, Field(ge=0, description="seed of the validation split and of limit, one for all runs")
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """What is trained."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str,
        AfterValidator(_model_name),
        Field(description="model, see `featherweight ls`, or package.module:function"),
    ] = "mlp"
    options: Annotated[
        dict[str, Any], Field(description="the model's own options, such as width")
    ] = field(default_factory=dict)
    init: Annotated[
        Annotated[str, _one_of("initialisation", list(INITS))] | None,
        Field(description="where the weights start; null: as the model's builder draws them"),
    ] = None
    init_options: Annotated[
        dict[str, Any], Field(description="the initialisation's own options, such as alpha")
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse options that the initialisation doesn't have."""
        given = ("model", "example", "seed", "generator")
        names = signature(INITS[self.init].method).parameters if self.init else {}
        allowed = [name for name in names if name not in given]
        _check_options("init_options", self.init or "no initialisation", self.init_options, allowed)


@dataclass(frozen=True, kw_only=True)
class SupportRecipe:
    """A mask made before training that a sparse-to-sparse method never leaves."""

    __pydantic_config__ = STRICT

    method: Annotated[
        Annotated[str, _one_of("method", START_METHODS)],
        Field(description="how the support is made: a criterion or a construction"),
    ] = "random"
    density: Annotated[Fraction, Field(description="kept fraction of the support")] = 1.0
    allocation: Annotated[Allocation, Field(description="density rule of the support")] = "balanced"


@dataclass(frozen=True, kw_only=True)
class CoupleRecipe:
    """What the weights inside a mask take from another run before training."""

    __pydantic_config__ = STRICT

    run: Annotated[
        str | None,
        Field(description="folder NAME-HASH of a finished run with the same seeds; null: nothing"),
    ] = None
    signs: Annotated[
        Literal["own", "learned", "random"],
        Field(description="signs: as initialised, of the other run, or drawn"),
    ] = "own"
    magnitudes: Annotated[
        Literal["own", "learned", "shuffled", "random"],
        Field(
            description="magnitudes: as initialised, of the other run, those shuffled in the "
            "layer, or freshly drawn"
        ),
    ] = "own"


@dataclass(frozen=True, kw_only=True)
class SparseRecipe:
    """Which weights exist."""

    __pydantic_config__ = STRICT

    method: Annotated[
        Method,
        Field(
            description="dense; a criterion or a construction (masks made once, before training); "
            "a loop (between trainings); a dynamic method (between steps); or a form of the weights"
        ),
    ] = "dense"
    density: Annotated[Fraction, Field(description="final kept fraction; 1: dense")] = 1.0
    levels: Annotated[
        int | None, Field(ge=0, description="loops: number of prunings in place of density")
    ] = None
    densities: Annotated[
        list[Fraction] | None,
        Field(
            min_length=1, description="imp, wr, lrr: kept fraction of each level, from the first"
        ),
    ] = None
    per_level: Annotated[
        float, Field(ge=0, lt=1, description="loops: part of the kept weights each pruning removes")
    ] = 0.2
    allocation: Annotated[
        Allocation | None,
        Field(
            description="where weights compete, or how many each layer keeps; null: the method's "
            "own, which is global for loops, random and scores"
        ),
    ] = None
    criterion: Annotated[
        str,
        _one_of("criterion", list(CRITERIA)),
        Field(description="loops: what a weight is worth"),
    ] = "magnitude"
    reset: Annotated[
        list[Annotated[str, _one_of("reset", list(RESETS))]] | None,
        Field(description="loops: what is rewound after pruning; null: the method's own"),
    ] = None
    rewind: Annotated[
        DurationField | None,
        Field(description="loops: length of the warm-up training before the rewinding point"),
    ] = None
    iterations: Annotated[
        int | None,
        Field(ge=1, description="criteria: pruned in so many steps; null: the criterion's own"),
    ] = None
    structure: Annotated[
        str | None,
        AfterValidator(_structure),
        Field(
            description="what is kept or removed as one: 2:4, 4x4, channel; null: single weights"
        ),
    ] = None
    options: Annotated[
        dict[str, Any], Field(description="the method's own options, such as interval or cycles")
    ] = field(default_factory=dict)
    masks_from: Annotated[
        str | None,
        Field(
            description="folder NAME-HASH of a finished run: loops use its masks level by level, "
            "dense its last ones"
        ),
    ] = None
    couple: Annotated[CoupleRecipe, Field(description="weights from another run")] = field(
        default_factory=CoupleRecipe
    )
    optimizer_state: Annotated[
        Literal["reset", "carry", "rewind"], Field(description="loops: optimizer state at pruning")
    ] = "reset"
    support: Annotated[
        SupportRecipe, Field(description="mask that is never left; density 1: none")
    ] = field(default_factory=SupportRecipe)
    sampling: Annotated[
        Literal["exact", "bernoulli"],
        Field(description="random: exact counts or independent draws"),
    ] = "exact"
    legacy: Annotated[
        bool, Field(description="random: density formulas of published code, which can miss")
    ] = False
    repair: Annotated[
        bool, Field(description="give every unit an edge in and out, keeping the density")
    ] = False
    include: Annotated[
        list[str] | None, Field(description="patterns of parameter names to prune; null: default")
    ] = None
    exclude: Annotated[
        list[str], Field(description="patterns of parameter names to leave dense")
    ] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse options that the method doesn't have."""
        _check_options("options", self.method, self.options, own_options(self.method))


@dataclass(frozen=True, kw_only=True)
class DepthRecipe:
    """Which layers of a transformer a token visits."""

    __pydantic_config__ = STRICT

    method: Annotated[
        str,
        _one_of("method", DEPTH_METHODS),
        Field(
            description="dense; a router, by which some layers process some of the tokens; tome, "
            "which merges tokens; or fewer-layers, the dense model of as much computation"
        ),
    ] = "dense"
    capacity: Annotated[
        Fraction | list[Fraction],
        Field(description="routers: fraction of the tokens processed; one, or one a routed layer"),
    ] = 0.5
    layers: Annotated[
        Literal["alternate"] | list[Annotated[int, Field(ge=0)]],
        Field(description="routers: routed layers, counted from 0; alternate: 1, 3, 5, ..."),
    ] = "alternate"
    options: Annotated[
        dict[str, Any], Field(description="the method's own options, such as gate or merged")
    ] = field(default_factory=dict)
    from_run: Annotated[
        str | None,
        Field(
            description="folder NAME-HASH of a finished dense run with the same seeds, whose "
            "weights are converted; null: fresh weights"
        ),
    ] = None
    auxiliary: Annotated[
        NotNegative, Field(description="weight of MoD's auxiliary loss, where options ask for one")
    ] = 0.01

    def __post_init__(self) -> None:
        """Refuse options that the method doesn't have, and fewer-layers without their number."""
        _check_options("options", self.method, self.options, depth_options(self.method))
        if self.method == FEWER and "layers" not in self.options:
            raise ValueError("options: fewer-layers needs layers, their number")


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """How weights are trained; the schedule restarts at every level."""

    __pydantic_config__ = STRICT

    length: Annotated[DurationField, Field(description="training of one level, 15ep or 300it")] = (
        DEFAULT_LENGTH
    )
    batch_size: Annotated[Positive, Field(description="images a step, over all devices")] = 64
    optimizer: Annotated[
        Literal["sgd", "adamw", "sign-in", "ham-sgd", "ham-adamw", "nanoadam"],
        Field(
            description="what steps; sign-in is sgd in the geometry of Sign-In, ham-sgd and "
            "ham-adamw act on weights, nanoadam selects from them"
        ),
    ] = "sgd"
    options: Annotated[
        dict[str, Any],
        Field(description="ham-sgd, ham-adamw, nanoadam: the optimizer's own options"),
    ] = field(default_factory=dict)
    learning_rate: Annotated[float, Field(gt=0, description="peak learning rate")] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, description="sgd: momentum; 0: none")] = 0.9
    nesterov: Annotated[bool, Field(description="sgd: Nesterov momentum")] = False
    scalar_rate: Annotated[
        float,
        Field(
            gt=0,
            description="sgd, adamw: learning rate of parameters that are one number, over that of "
            "the others (Fixup: 0.1)",
        ),
    ] = 1.0
    weight_decay: Annotated[NotNegative, Field(description="weight decay; 0: none")] = 5e-4
    schedule: Annotated[
        Literal["constant", "cosine", "step", "triangular"],
        Field(description="of the learning rate"),
    ] = "triangular"
    warmup: Annotated[
        DurationField | None,
        Field(description="linear warm-up; null: none, and a fifth of the length for triangular"),
    ] = None
    warmup_start: Annotated[
        float, Field(ge=0, le=1, description="first learning rate of the warm-up over the peak")
    ] = 0.2
    milestones: Annotated[
        list[DurationField], Field(description="step: when the learning rate drops")
    ] = field(default_factory=list)
    gamma: Annotated[float, Field(gt=0, le=1, description="step: factor of each drop")] = 0.1
    final: Annotated[
        float, Field(ge=0, le=1, description="cosine, triangular: last rate over the peak")
    ] = 0.0
    beta: Annotated[float, Field(gt=0, description="sign-in: m^2 - w^2 after a rescaling")] = 1.0
    rescale: Annotated[
        DurationField | None,
        Field(description="sign-in: time between rescalings; null: a tenth of the level"),
    ] = None
    rescale_until: Annotated[
        float, Field(ge=0, le=1, description="sign-in: part of a level with rescalings; 0: none")
    ] = 0.75
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="0: none")] = 0.0
    distillation: Annotated[
        float,
        Field(ge=0, le=1, description="weight of level 0's soft targets in later levels; 0: none"),
    ] = 0.0
    temperature: Annotated[float, Field(gt=0, description="of the soft targets")] = 6.0
    clip: Annotated[float | None, Field(gt=0, description="gradient norm limit; null: none")] = None

    def __post_init__(self) -> None:
        """Refuse options that the optimizer doesn't have, and HAM without a strength."""
        allowed = optimizer_options(self.optimizer)
        _check_options("options", self.optimizer, self.options, allowed)
        if self.optimizer.startswith("ham-") and "alpha" not in self.options:
            raise ValueError(f"options: {self.optimizer} needs alpha, the strength of its geometry")


@dataclass(frozen=True, kw_only=True)
class ExecuteRecipe:
    """On what, and how exactly, it runs."""

    __pydantic_config__ = STRICT

    form: Annotated[
        Literal["masked", "sparse", "auto"],
        Field(
            description="of pruned layers while they train: dense weights times masks; truly "
            "sparse, on the CPU; or the faster of both. execute=sparse says the same"
        ),
    ] = "masked"
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"], Field(description="auto: the fastest there is")
    ] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], Field(description="of the layers' arithmetic")
    ] = "fp32"
    matmul_precision: Annotated[
        Literal["highest", "high", "medium"],
        Field(description="torch.set_float32_matmul_precision; see `featherweight doctor`"),
    ] = "highest"
    channels_last: Annotated[bool, Field(description="memory format of image models")] = False
    compile: Annotated[bool, Field(description="torch.compile the model")] = False
    threads: Annotated[
        int | None, Field(ge=1, description="CPU threads of one run; null: cores shared by jobs")
    ] = None
    checkpoint_seconds: Annotated[
        NotNegative, Field(description="least time between checkpoints inside a level")
    ] = 30.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does."""

    __pydantic_config__ = STRICT

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in tables and folders"),
    ] = "run"
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    sparse: SparseRecipe = field(default_factory=SparseRecipe)
    depth: DepthRecipe = field(default_factory=DepthRecipe)
    fit: FitRecipe = field(default_factory=FitRecipe)
    execute: ExecuteRecipe = field(default_factory=ExecuteRecipe)
    seeds: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1, description="one run each")
    ] = field(default_factory=lambda: [0])
