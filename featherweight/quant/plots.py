"""Plots of outliers and of errors by layer; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.common import atomic_path
from featherweight.quant.evaluate import Outliers

_KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def plot_outliers(
    measured: Mapping[str, Sequence[Outliers]], path: str | Path, *, of: str = "kurtosis"
) -> None:
    """Draw the tails of every matrix over the layers, one panel a kind of matrix, as PNG.

    Args:
        measured: a label such as ``before`` to what :func:`outliers` found.
        path: of the picture.
        of: ``incoherence``, ``kurtosis`` or ``peak``.

    Raises:
        ValueError: ``of`` is something else, or nothing was measured.
        ImportError: matplotlib is missing.
    """
    if of not in ("incoherence", "kurtosis", "peak"):
        raise ValueError(f"of must be one of incoherence, kurtosis, peak; got {of!r}")
    series = {
        label: {one.name: getattr(one, of) for one in found} for label, found in measured.items()
    }
    _draw(series, path, of)


def plot_errors(measured: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draw relative errors of quantised layers over the layers, one panel a kind, as PNG.

    Args:
        measured: a label such as ``optrot`` to what :func:`layer_errors` found.
        path: of the picture.

    Raises:
        ValueError: nothing was measured.
        ImportError: matplotlib is missing.
    """
    series = {
        label: {_short(name): error for name, error in errors.items()}
        for label, errors in measured.items()
    }
    _draw(series, path, "relative error")


def _short(name: str) -> str:
    """Turn ``model.layers.3.mlp.down_proj`` into ``3.down``."""
    parts = name.split(".")
    return f"{next(part for part in parts if part.isdigit())}.{parts[-1].removesuffix('_proj')}"


def _draw(series: Mapping[str, Mapping[str, float]], path: str | Path, label: str) -> None:
    kinds = list(dict.fromkeys(n.split(".")[1] for found in series.values() for n in found))
    if not kinds:
        raise ValueError("measured must hold at least one matrix")
    kinds.sort(key=lambda kind: _KINDS.index(kind) if kind in _KINDS else len(_KINDS))
    figure, axes = _figure(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for name, found in series.items():
            points = [(int(n.split(".")[0]), v) for n, v in found.items() if n.endswith(f".{kind}")]
            axis.plot(*zip(*sorted(points), strict=True), marker=".", label=name)
        axis.set(title=kind, xlabel="layer", yscale="log")
    axes[0].set_ylabel(label)
    axes[-1].legend()
    figure.tight_layout()
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _figure(panels: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is missing: pip install 'featherweight[lab]'") from None
    figure = Figure(figsize=(2.4 * panels, 2.8))
    return figure, figure.subplots(1, panels, squeeze=False)[0]
