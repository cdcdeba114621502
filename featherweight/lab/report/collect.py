"""Read run directories from disk into plain frozen records; nothing here computes or draws."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from featherweight.lab.report.records import (
    Epoch,
    Execution,
    Flips,
    Layer,
    Level,
    Run,
    Seed,
    Timing,
)

Line = dict[str, Any]
Record = TypeVar("Record")


def collect(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read the runs that ``paths`` name, in the order given and by name within a folder.

    Args:
        paths: identity directories, seed directories, or folders that hold identity directories
            at any depth. What is named twice is read once.

    Raises:
        ValueError: nothing was found, or a file is damaged; the line says which and where.
    """
    found: dict[Path, set[Path]] = {}
    for path in paths:
        for identity, seed in _seed_directories(Path(path).resolve()):
            found.setdefault(identity, set()).update(seed)
    if not found:
        names = ", ".join(str(path) for path in paths) or "no path given"
        raise ValueError(f"no run found (a folder with recipe.yaml) in: {names}")
    return _with_unique_names([_read_run(path, seeds) for path, seeds in found.items()])


def _seed_directories(path: Path) -> list[tuple[Path, list[Path]]]:
    if _seed_number(path) is not None and (path.parent / "recipe.yaml").is_file():
        return [(path.parent, [path])]
    identities = sorted(recipe.parent for recipe in path.rglob("recipe.yaml"))
    return [
        (identity, [child for child in identity.iterdir() if _seed_number(child) is not None])
        for identity in identities
    ]


def _seed_number(path: Path) -> int | None:
    match = re.fullmatch(r"seed-(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else None


def _read_run(path: Path, seeds: Iterable[Path]) -> Run:
    text = _read_text(path / "recipe.yaml")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path / 'recipe.yaml'}: not valid YAML: {reason}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path / 'recipe.yaml'}: must hold a mapping of keys to values")
    read = sorted((_read_seed(seed) for seed in seeds), key=lambda seed: seed.number)
    return Run(path, str(recipe.get("name") or path.name), recipe, text, tuple(read))


def _read_seed(path: Path) -> Seed:
    result = _read_object(path / "result.json")
    complete = bool(result.get("complete", False))
    epochs = _read_lines(path / "metrics.jsonl", _epoch, complete)
    levels = _read_lines(path / "levels.jsonl", _level, complete)
    timings = _read_lines(path / "timing.jsonl", _timing, complete)
    return Seed(
        path=path,
        number=int(path.name.removeprefix("seed-")),
        complete=complete,
        seconds=_number(result, "seconds"),
        environment=_read_object(path / "environment.json"),
        epochs=_last_of_each(epochs, lambda line: (line.level, line.stage, line.epoch)),
        levels=_last_of_each(levels, lambda line: (line.level, line.stage)),
        timings=_last_of_each(timings, lambda line: (line.stage, line.epoch)),
        execution=_execution(result.get("execution"), path / "result.json"),
    )


def _last_of_each(records: list[Record], key: Callable[[Record], Any]) -> tuple[Record, ...]:
    """Sort by key; of records with one key, which a resumed run may leave, the later one counts."""
    latest = {key(record): record for record in records}
    return tuple(latest[name] for name in sorted(latest))


def _epoch(line: Line) -> Epoch:
    names = ["train_loss", "train_accuracy", "validation_loss", "validation_accuracy"]
    numbers = {name: _number(line, name) for name in [*names, "learning_rate"]}
    return Epoch(str(line["stage"]), int(line["level"]), int(line["epoch"]), **numbers)


def _timing(line: Line) -> Timing:
    return Timing(str(line["stage"]), int(line["epoch"]), float(line["step_seconds"]))


def _execution(line: Line | None, path: Path) -> Execution | None:
    return None if line is None else _parse_line(json.dumps(line), _measured, str(path))


def _measured(line: Line) -> Execution:
    return Execution(
        form=str(line["form"]),
        seconds=float(line["seconds"]),
        dense_seconds=float(line["dense_seconds"]),
        bytes=int(line["bytes"]),
        dense_bytes=int(line["dense_bytes"]),
    )


def _level(line: Line) -> Level:
    return Level(
        stage=str(line["stage"]),
        level=int(line["level"]),
        density=float(line["density"]),
        nonzeros=int(line["nonzeros"]),
        prunable=int(line["prunable"]),
        parameters=int(line["parameters"]),
        test_accuracy=_number(line, "test_accuracy"),
        test_loss=_number(line, "test_loss"),
        layers=tuple(_layer(layer) for layer in line.get("layers") or ()),
        flips_from_start=_flips(line.get("flips_from_start")),
        flips_from_previous=_flips(line.get("flips_from_previous")),
        flops=_number(line, "flops"),
        dense_flops=_number(line, "dense_flops"),
        bytes=None if line.get("bytes") is None else int(line["bytes"]),
        dense_bytes=None if line.get("dense_bytes") is None else int(line["dense_bytes"]),
    )


def _layer(line: Line) -> Layer:
    numel, nonzeros = int(line["numel"]), int(line["nonzeros"])
    return Layer(str(line["name"]), numel, nonzeros, float(line["density"]))


def _flips(line: Line | None) -> Flips | None:
    return None if line is None else Flips(int(line["kept"]), int(line["flipped"]))


def _number(line: Mapping[str, Any], key: str) -> float | None:
    return None if line.get(key) is None else float(line[key])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _read_object(path: Path) -> Line:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return value


def _read_lines(path: Path, parse: Callable[[Line], Record], complete: bool) -> list[Record]:
    """Parse a file of JSON lines; a last line that a kill cut short is left out, and only that."""
    if not path.is_file():
        return []
    lines = _read_text(path).split("\n")
    cut_short = lines.pop()
    if cut_short and (complete or _is_json(cut_short)):
        lines.append(cut_short)
    return [
        _parse_line(line, parse, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parse_line(line: str, parse: Callable[[Line], Record], where: str) -> Record:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        return parse(value)
    except KeyError as error:
        raise ValueError(f"{where}: damaged line: key {error} is missing") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: damaged line: {error}") from None


def _with_unique_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    return tuple(replace(run, name=_unique_name(run, runs)) for run in runs)


def _unique_name(run: Run, runs: Sequence[Run]) -> str:
    """Add to a shared name the keys in which the recipes differ, or else the folder."""
    same = [flatten(other.recipe) for other in runs if other.name == run.name]
    if len(same) == 1:
        return run.name
    own = flatten(run.recipe)
    keys = sorted({key for recipe in same for key in recipe})
    differing = [key for key in keys if any(other.get(key) != own.get(key) for other in same)]
    told = ", ".join(f"{key}={_value(own.get(key))}" for key in differing)
    twins = sum(other == own for other in same)
    return f"{run.name} ({told if twins == 1 else run.path})"


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys: ``{"fit.epochs": 20}``."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
