"""From a model directory to a quantised one, in one call."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.quant.architecture import refuse_architecture
from featherweight.quant.calibrate import check_ids
from featherweight.quant.decoder import read_decoder
from featherweight.quant.evaluate import Divergence, divergence, layer_errors
from featherweight.quant.export.directory import (
    check_directory,
    check_format,
    import_transformers,
    load,
    new_directory,
    refuse_existing,
    write_model,
)
from featherweight.quant.export.layouts import FORMATS, check_grids
from featherweight.quant.gptq import Gptq
from featherweight.quant.grid import Grid
from featherweight.quant.group_sizes import layer_grids
from featherweight.quant.optrot import Report
from featherweight.quant.quantize import QUANTIZERS, Watch, quantized_matrices
from featherweight.quant.rotate import Rotation, rotate
from featherweight.quant.rotations import ROTATIONS
from featherweight.quant.text import load_tokenizer, read_tokens

AUTO = ("none", "hadamard", "optrot")
"""Rotations that ``auto`` tries."""

_HELD_OUT = 8  # every eighth sequence judges the candidates of ``auto``
_ASIDE = "featherweight"  # sub-directory of what no loader should mistake for weights


@dataclass(frozen=True)
class Plan:
    """What to do with a model.

    Attributes:
        rotation: a name of :data:`ROTATIONS`, ``auto`` (try some, keep the least KL), or the path
            of a ``rotation.safetensors``.
        method: a name of :data:`QUANTIZERS`.
        bits, group_size, symmetric, clip: of the grid, see :class:`Grid`; where the group size
            does not divide a row, half of it, or a quarter, down to 32.
        options: of GPTQ.
        steps: of learning a rotation; None for its default.
        seed: of rotations.
        sequences, tokens: how many calibration sequences of which length are taken from the text.
    """

    rotation: str = "optrot"
    method: str = "gptq"
    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    clip: bool = True
    options: Gptq = field(default_factory=Gptq)
    steps: int | None = None
    seed: int = 0
    sequences: int = 128
    tokens: int = 512

    def __post_init__(self) -> None:
        Grid(self.bits, self.group_size, self.symmetric, self.clip)
        QUANTIZERS[self.method]  # raises ValueError if unknown
        if self.rotation != "auto" and not self.rotation_file():
            ROTATIONS[self.rotation]
        for name in ("sequences", "tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")

    def rotation_file(self) -> Path | None:
        """Return the path of a saved rotation, or None where ``rotation`` is a name."""
        return Path(self.rotation) if self.rotation.endswith(".safetensors") else None

    def needs_calibration(self) -> bool:
        """Tell whether any step looks at text."""
        needs = set(QUANTIZERS[self.method].needs)
        if self.rotation in ROTATIONS:
            needs |= set(ROTATIONS[self.rotation].needs)
        return self.rotation == "auto" or "calibration" in needs


@dataclass(frozen=True)
class Result:
    """What :func:`quantize_directory` did.

    Attributes:
        directory: that it wrote.
        rotation: name of the rotation that was used.
        errors: relative error of each quantised layer.
        bits_per_weight: of the quantised layers, scales and zero points counted in.
        candidates: of ``auto``: name to divergence on text held out from calibration.
    """

    directory: Path
    rotation: str
    errors: dict[str, float]
    bits_per_weight: float
    candidates: dict[str, Divergence]


def quantize_directory(
    directory: str | Path,
    out: str | Path,
    plan: Plan | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    format: str = "compressed-tensors",
    allow_pickle: bool = False,
    progress: Report | None = None,
    watch: Watch | None = None,
) -> Result:
    """Rotate, quantise and write a model that stock loaders read.

    Everything that can be refused is refused before the weights are read; ``out`` is written whole
    or not at all. R1, R2 and a report go to ``featherweight/`` inside it; no loader needs them.

    Args:
        directory: a model directory of transformers.
        out: directory to make; must not exist, or be empty.
        plan: what to do; None for OptRot, GPTQ, 4 bits, symmetric, groups of 128.
        calibration: a UTF-8 text file, or token ids ``[sequences, tokens]``; only for methods and
            rotations that look at text.
        format: a name of :data:`FORMATS`.
        allow_pickle: read pickled weights, with ``weights_only=True``.
        progress: called before each step of learning.
        watch: called after each layer.

    Raises:
        ValueError: an argument is out of range, the model is not supported, or there is too
            little text.
        FileExistsError: ``out`` holds something.
        OSError: a file can't be read, or the disk is full.
    """
    plan, source, target = plan or Plan(), Path(directory), Path(out)
    FORMATS[format]  # raises ValueError if unknown
    refuse_existing(target)
    gguf = check_directory(source, allow_pickle)
    _refuse_architecture(source, gguf)
    ids = _token_ids(source, plan, calibration)
    model = load(source, allow_pickle=allow_pickle)
    _refuse_groups(model, plan, format)
    if ids is not None:
        check_ids(ids, read_decoder(model).embedding.num_embeddings)
    name, rotation, candidates = _choose(model, plan, ids, progress)
    _treat(model, plan, rotation, ids, format, watch)
    check_format(model, format)
    bits = _bits_per_weight(model)
    result = Result(target, name, layer_errors(model), bits, candidates)
    with new_directory(target) as temporary:
        write_model(model, temporary, format=format, source=source)
        if gguf is not None:  # its tokenizer is inside the file
            load_tokenizer(source).save_pretrained(temporary)
        _write_aside(temporary / _ASIDE, plan, rotation, result)
    return result


def _refuse_architecture(source: Path, gguf: Path | None) -> None:
    if gguf is None:
        config = import_transformers().AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        refuse_architecture(config.get_text_config())


def _refuse_groups(model: nn.Module, plan: Plan, format: str) -> None:
    layout, grid = FORMATS[format].method, Grid(plan.bits, plan.group_size, plan.symmetric)
    grids = layer_grids(read_decoder(model), grid)
    if layout is not None:
        check_grids(layout, grids)


def _token_ids(source: Path, plan: Plan, calibration: str | Path | Tensor | None) -> Tensor | None:
    """Return calibration ids, or None where nothing looks at text."""
    if not plan.needs_calibration():
        return None
    if calibration is None:
        raise ValueError(
            f"rotation {plan.rotation!r} with method {plan.method!r} needs calibration text"
        )
    if isinstance(calibration, Tensor):
        return calibration
    return read_tokens(source, Path(calibration), plan.sequences, plan.tokens)


def _choose(
    model: nn.Module, plan: Plan, ids: Tensor | None, progress: Report | None
) -> tuple[str, Rotation | None, dict[str, Divergence]]:
    if plan.rotation == "auto":
        assert ids is not None
        return best_rotation(model, plan, ids, progress=progress)
    if file := plan.rotation_file():
        return plan.rotation, Rotation.load(file), {}
    find = ROTATIONS[plan.rotation].method
    return plan.rotation, find(model, plan.seed, plan.steps, ids, progress), {}


def best_rotation(
    model: nn.Module, plan: Plan, ids: Tensor, *, progress: Report | None = None
) -> tuple[str, Rotation | None, dict[str, Divergence]]:
    """Quantise copies of a model with each rotation of :data:`AUTO` and keep the least KL.

    Every eighth sequence is held out from calibration to judge; the model is not changed.

    Args:
        model: a supported decoder.
        plan: its method, grid, options, steps and seed are used.
        ids: token ids, ``[sequences, tokens]``, at least two sequences.
        progress: called before each step of learning.

    Returns:
        Name and rotation of the best, and every candidate's divergence.
    """
    if len(ids) < 2:
        raise ValueError(f"ids must hold at least 2 sequences, got {len(ids)}")
    held = torch.arange(len(ids)) % _HELD_OUT == 0
    found: dict[str, tuple[Rotation | None, Divergence]] = {}
    for name in AUTO:
        rotation = ROTATIONS[name].method(model, plan.seed, plan.steps, ids[~held], progress)
        candidate = copy.deepcopy(model)
        _treat(candidate, plan, rotation, ids[~held], "plain", None)
        found[name] = rotation, divergence(model, candidate, ids[held])
    best = min(found, key=lambda name: found[name][1].kl)
    return best, found[best][0], {name: one[1] for name, one in found.items()}


def _treat(
    model: nn.Module,
    plan: Plan,
    rotation: Rotation | None,
    ids: Tensor | None,
    format: str,
    watch: Watch | None,
) -> None:
    """Rotate and quantise in place."""
    entry = QUANTIZERS[plan.method]
    options: dict[str, Any] = {
        "bits": plan.bits,
        "group_size": plan.group_size,
        "symmetric": plan.symmetric,
        "clip": plan.clip,
        "scale_dtype": torch.float16 if format == "gptq" else None,
        "watch": watch,
    }
    if rotation is not None:
        rotate(model, rotation)
    if "calibration" in entry.needs:
        options |= {"calibration": ids, "options": plan.options}
    entry.method(model, **options)


def _bits_per_weight(model: nn.Module) -> float:
    layers = [layer.quantized for layer in quantized_matrices(model).values()]
    weights = sum(one.codes.numel() for one in layers)
    bits = sum(one.codes.numel() * one.grid.bits_per_weight(one.codes.shape[1]) for one in layers)
    return bits / weights


def _write_aside(directory: Path, plan: Plan, rotation: Rotation | None, result: Result) -> None:
    """Write what was done, in a sub-directory: loaders may take every safetensors for weights."""
    directory.mkdir()
    if rotation is not None:
        rotation.save(directory / "rotation.safetensors")
    candidates: Mapping[str, Any] = {n: asdict(one) for n, one in result.candidates.items()}
    report = {
        "plan": asdict(plan),
        "rotation": result.rotation,
        "bits_per_weight": result.bits_per_weight,
        "errors": result.errors,
        "candidates": candidates,
    }
    text = json.dumps(report, indent=2, sort_keys=True)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
