"""What `featherweight quantize` does: the room's one call, with progress and one-line errors."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from featherweight.lab.errors import BadInput
from featherweight.quant import Layer, Plan, Progress, Result, quantize_directory


def quantize(
    model: Path,
    out: Path,
    plan: Mapping[str, Any],
    *,
    calibration: Path | None,
    format: str,
    allow_pickle: bool,
    console: Console,
) -> None:
    """Quantise a model directory, show how far it is, and print what came out.

    Args:
        model: a model directory of transformers.
        out: directory to make.
        plan: fields of `featherweight.quant.Plan`.
        calibration: text file, or None.
        format: of the weights.
        allow_pickle: read pickled weights, tensors alone.
        console: to print to.

    Raises:
        BadInput: anything that was asked for can't be done; nothing is left at ``out``.
    """
    try:
        _quiet_transformers()
        with _notes(console), _bars(console) as (learning, layers):
            result = quantize_directory(
                model,
                out,
                Plan(**plan),
                calibration=calibration,
                format=format,
                allow_pickle=allow_pickle,
                progress=learning,
                watch=layers,
            )
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        text = getattr(error, "strerror", None) or str(error)
        name = getattr(error, "filename", None)
        raise BadInput(" ".join(f"{f'{name}: ' if name else ''}{text}".split())) from error
    console.print(_summary(result), highlight=False, soft_wrap=True)


def _quiet_transformers() -> None:
    """Keep other progress bars out of ours; without transformers the room says what to install."""
    if importlib.util.find_spec("transformers"):
        logging = importlib.import_module("transformers.utils.logging")
        logging.disable_progress_bar()


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Print what the room warns of as notes, once the bars are done."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    for text in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
        console.print(f"note: {text}", highlight=False, soft_wrap=True)


@contextmanager
def _bars(console: Console) -> Iterator[tuple[Callable[[Progress], None], Callable[[Layer], None]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int, text: str) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(text, total=total)
            bars.update(tasks[name], completed=done, total=total, description=text)

        yield (
            lambda at: show(at.stage, at.step + 1, at.steps, f"{at.stage} {at.objective:.4g}"),
            lambda at: show("layers", at.index, at.layers, "layers"),
        )


def _summary(result: Result) -> str:
    errors = sorted(result.errors.items(), key=lambda item: -item[1])
    worst = ", ".join(f"{name} {error:.3g}" for name, error in errors[:3])
    mean = sum(result.errors.values()) / len(result.errors)
    lines = [
        f"rotation {result.rotation}, {result.bits_per_weight:.2f} bits a weight",
        f"relative error of the layers: mean {mean:.3g}, worst {worst}",
        *(f"candidate {name}: KL {one.kl:.4g}" for name, one in result.candidates.items()),
        f"written: {result.directory}",
    ]
    return "\n".join(lines)
