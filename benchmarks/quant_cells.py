"""Cells of the quantisation tables: each is computed once and kept as a file.

Several processes can share one folder: a cell that another one is computing is left to it.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from benchmarks.quant_text import calibration_and_evaluation
from featherweight import quant
from featherweight.common import write_text
from featherweight.quant.text import load_tokenizer

SEEDS = (0, 1, 2)
ROTATIONS = ("none", "hadamard", "optrot", "optrot-plus", "optrot-more")
CALIBRATION, EVALUATION = (24, 256), (16, 513)  # windows, tokens
STEPS, EXTRA = 300, 150  # of OptRot; of OptRot+ and of the control beyond them

Quantise = Callable[[nn.Module, Tensor], nn.Module]


def _gptq(**options: object) -> Quantise:
    return lambda model, ids: quant.gptq(model, ids, symmetric=False, **options)


SETTINGS: dict[str, Quantise] = {
    "W4": _gptq(bits=4, clip=False),
    "W4-clip": _gptq(bits=4, clip=True),
    "W3-g64": _gptq(bits=3, group_size=64, clip=False),
    "RTN-W4": lambda model, _: quant.rtn(model, bits=4, symmetric=False, clip=False),
}
ACTIVATIONS = {"W4-clip": (8, 4)}  # bits of inputs simulated on top, on half of the windows


@dataclass(frozen=True)
class Job:
    """One rotation, one setting, one seed (of calibration windows and of the rotation)."""

    rotation: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's file."""
        return f"{self.rotation}_{self.setting}_{self.seed}"


def jobs() -> Iterator[Job]:
    """List all jobs, so that what was done at any time compares rotations at equal settings."""
    for seed in SEEDS:
        for rotation in ROTATIONS:
            for setting in SETTINGS:
                control = rotation == "optrot-more" and setting not in ("W4", "W3-g64")
                constant = (rotation, setting) == ("none", "RTN-W4") and seed != SEEDS[0]
                if not control and not constant:
                    yield Job(rotation, setting, seed)


class Replay(nn.Module):
    """A model whose logits on the evaluation windows were computed before."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.embedding = model.get_input_embeddings()
        with torch.no_grad():
            self.logits = {
                bytes(one.numpy().tobytes()): model(one[None], use_cache=False).logits
                for one in ids
            }

    def get_input_embeddings(self) -> nn.Module:
        """Return what knows the vocabulary."""
        return self.embedding

    def forward(self, ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """Return the logits that were computed."""
        return SimpleNamespace(logits=torch.cat([self.logits[r.numpy().tobytes()] for r in ids]))


@dataclass
class Bench:
    """A model, its text, and the folder of results."""

    folder: Path
    model_directory: Path
    dump: Path
    rotated: dict[tuple[str, int], nn.Module] = field(default_factory=dict)

    @cached_property
    def model(self) -> nn.Module:
        """The model in float32."""
        return quant.load(self.model_directory).float()

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids of the calibration and of the evaluation text."""
        tokenizer = load_tokenizer(self.model_directory)
        texts = calibration_and_evaluation(self.dump)
        return tuple(torch.tensor(tokenizer(t, verbose=False)["input_ids"]) for t in texts)

    @cached_property
    def reference(self) -> Replay:
        """The model's logits on the evaluation windows."""
        return Replay(self.model, self.evaluation)

    @property
    def evaluation(self) -> Tensor:
        """The evaluation windows."""
        return windows(self.tokens[1], *EVALUATION, seed=0)

    def calibration(self, seed: int) -> Tensor:
        """Draw the calibration windows of a seed."""
        return windows(self.tokens[0], *CALIBRATION, seed=seed)

    def rotation(self, name: str, seed: int) -> quant.Rotation | None:
        """Return a rotation, learned now or read from a file."""
        if name == "none":
            return None
        path = self.folder / "rotations" / f"{name}_{seed}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                self._learn(name, seed).save(path)
        return quant.Rotation.load(path)

    def _learn(self, name: str, seed: int) -> quant.Rotation:
        if name == "hadamard":
            return quant.draw_rotation(self.model, "hadamard", seed=seed)
        stage = {}
        if name == "optrot":
            with timed(stage, "learn R1 and R2"):
                found = quant.learn_rotation(self.model, steps=STEPS, seed=seed)
        elif name == "optrot-more":
            start = self.rotation("optrot", seed)
            rule = quant.Angle(theta=0.1, momentum=0.5)
            more = {"rounds": 1, "value_steps": 0, "rule": rule, "start": start}
            found = quant.learn_rotation(self.model, steps=EXTRA, seed=seed + 1000, **more)
        else:
            start = self.rotation("optrot", seed)
            with timed(stage, "collect Hessians"):
                hessians = quant.collect(self.model, self.calibration(seed))
            with timed(stage, "learn OptRot+"):
                found = quant.learn_rotation_plus(
                    self.model, hessians, steps=EXTRA, seed=seed, start=start
                )
        record = {"seconds": stage, "start": found.start, "end": found.end, "shares": found.shares}
        write_json(self.folder / "rotations" / f"{name}_{seed}.json", record)
        return found.rotation

    def base(self, name: str, seed: int, stage: dict[str, float]) -> nn.Module:
        """Return the rotated model; the last one is kept."""
        if (name, seed) not in self.rotated:
            self.rotated.clear()
            rotation, model = self.rotation(name, seed), copy.deepcopy(self.model)
            if rotation is not None:
                with timed(stage, "rotate"):
                    quant.rotate(model, rotation)
            self.rotated[name, seed] = model
        return self.rotated[name, seed]

    def run(self, job: Job) -> bool:
        """Compute a cell unless it is there or somebody else computes it; tell whether it is."""
        path = self.folder / "cells" / f"{job.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.is_file():
                    write_json(path, self.measure(job))
                return True
        except Timeout:
            return False

    def measure(self, job: Job) -> dict[str, object]:
        """Quantise and compare with the original."""
        stage: dict[str, float] = {}
        model = copy.deepcopy(self.base(job.rotation, job.seed, stage))
        with timed(stage, "quantise"):
            SETTINGS[job.setting](model, self.calibration(job.seed))
        errors = quant.layer_errors(model)
        reference = self.reference
        results = {}
        for bits in (None, *ACTIVATIONS.get(job.setting, ())):
            context = nullcontext() if bits is None else _inputs(model, bits)
            ids = self.evaluation if bits is None else self.evaluation[: EVALUATION[0] // 2]
            with context, timed(stage, "evaluate" if bits is None else "evaluate activations"):
                found = quant.divergence(reference, model, ids)
            results["weights" if bits is None else f"A{bits}"] = asdict(found)
            print(job.name, bits, found, stage, flush=True)
        error = sum(errors.values()) / len(errors)
        return asdict(job) | {"results": results, "error": error, "seconds": stage}


def _inputs(model: nn.Module, bits: int) -> AbstractContextManager[None]:
    return quant.quantized_activations(model, bits, online=True)


def windows(ids: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Draw windows that don't overlap: ``[count, length]``."""
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


@contextmanager
def timed(stage: dict[str, float], name: str) -> Iterator[None]:
    """Add what a stage takes, in seconds of processor time: load by others does not count."""
    started = time.process_time()
    yield
    stage[name] = stage.get(name, 0.0) + time.process_time() - started


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
