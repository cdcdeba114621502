"""Truly sparse training and inference against the best dense ones, and against peers.

Every figure is how many times as fast as a whole dense step with the same fused optimizer: the
median over rounds, in which all candidates take turns. "dense" is torch as it comes, "oneDNN" the
same with ``torch.set_float32_matmul_precision("medium")``, which on this processor stays float32
and is the best dense baseline. "masked" multiplies by a mask in every forward pass, as
`torch.nn.utils.prune` does, with the optimizer as torch defaults it. Sparse backends are those that
``backend="auto"`` takes. Peers are measured where they are installed: SparseLab (PyPI
`sparselab`), which has linear layers alone, and ONNX Runtime. One thread is pinned to one core.
`GOMP_SPINCOUNT=1000` for all, as the command line sets it.
"""

import contextlib
import copy
import functools
import importlib.util
import os
import tempfile
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from benchmarks.timing import alternate, ratios
from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse import execute
from featherweight.sparse.execute.probe import matmul_precision

ROUNDS = 15
DENSITIES = (0.1, 0.05, 0.01)
PLOT = Path(__file__).resolve().parent.parent / "docs" / "results" / "bench-sparse_execution.png"
FUSED = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)
DEFAULT = functools.partial(torch.optim.Adam, lr=1e-3)


def measure() -> str:
    torch.manual_seed(0)
    sections, bars = [], {}
    for count in sorted({1, min(2, os.cpu_count() or 1)}):
        with threads(count):
            title = f"{count} thread" + ("s" if count > 1 else "")
            rows = {name: _training(make, *rest) for name, (make, *rest) in TRAINED.items()}
            bars[title] = rows["MLP"]
            sections.append(f"## Training step, {title}\n\n{_table(rows)}")
            sections.append(f"## Inference, {title}\n\n{_inference_table()}")
    sections.append(f"## Memory\n\n{_memory()}")
    plot(bars, PLOT)
    picture = f"![Training steps of the MLP]({PLOT.name})"
    return "\n\n".join([picture, *sections])


@contextlib.contextmanager
def threads(count):
    """Use so many threads, one of them pinned."""
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(count)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, cores)


def mlp():
    sizes = [(1024, 2048), (2048, 2048), (2048, 2048)]
    layers = [m for pair in sizes for m in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


class Block(nn.Module):
    """A transformer block whose four linear layers are sparse and whose attention is not."""

    def __init__(self, width=512, heads=8):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Map (N, tokens, width) to itself."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def transformer():
    return nn.Sequential(Block(), nn.Flatten(0, 1), nn.Linear(512, 10))


def conv_stack(channels=128):
    parts = [
        part
        for _ in range(3)
        for part in (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
    ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet():
    return models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0)


TRAINED = {
    "MLP": (mlp, (128, 1024), 128, DENSITIES, "6.weight"),
    "transformer block": (transformer, (8, 128, 512), 1024, (0.1,), "2.weight"),
    "conv, BN, ReLU": (conv_stack, (32, 128, 16, 16), 32, DENSITIES, "11.weight"),
    "ResNet-20": (resnet, (64, 3, 32, 32), 64, (0.05,), "linear.weight"),
}
"""Name to model, shape of its input, number of labels, densities, and what stays dense."""


def _masks(model, density, whole):
    return sparse.random(model, density, "uniform", seed=0, exclude=[whole])


def _training(make, shape, labels, densities, whole):
    inputs, targets = torch.randn(shape), torch.randint(10, (labels,))
    dense = make()
    found = {}
    for density in densities:
        masks = _masks(dense, density, whole)
        candidates = {
            "dense": _step(copy.deepcopy(dense), FUSED, inputs, targets, "highest"),
            "oneDNN": _step(copy.deepcopy(dense), FUSED, inputs, targets, "medium"),
            "masked": _step(_pruned(dense, masks), DEFAULT, inputs, targets, "highest"),
            "masked, oneDNN, fused": _step(_pruned(dense, masks), FUSED, inputs, targets, "medium"),
            "sparse": _step(_sparse(dense, masks, inputs), FUSED, inputs, targets, "medium"),
        }
        if importlib.util.find_spec("sparselab") and not any(_convolutions(dense)):
            model = _sparselab(dense, density, whole)
            candidates["SparseLab"] = _step(model, FUSED, inputs, targets, "medium")
        found[density] = alternate(candidates, ROUNDS)
    return found


def _step(model, optimizer, inputs, targets, precision):
    steps = optimizer(model.parameters())

    def step():
        with matmul_precision(precision):
            cross_entropy(model(inputs), targets).backward()
            steps.step()
            steps.zero_grad()

    return step


def _sparse(dense, masks, inputs):
    with matmul_precision("medium"):  # so that "auto" compares with the best dense layer
        return execute.to_sparse(copy.deepcopy(dense), masks, example=inputs)


def _pruned(dense, masks):
    model = copy.deepcopy(dense)
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return model


def _convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def _sparselab(dense, density, whole):
    import sparselab

    model = copy.deepcopy(dense)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f"{name}.weight" != whole:
            options = {"bias": layer.bias is not None, "sparsity": 1 - density}
            peer = sparselab.SparseLinear(layer.in_features, layer.out_features, **options)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, peer)
    return model


NAMES = ("dense", "masked", "masked, oneDNN, fused", "SparseLab", "sparse")


def _table(rows):
    lines = [
        "| model | density | oneDNN step | " + " | ".join(NAMES) + " |",
        "|---|---|---|" + "---|" * len(NAMES),
    ]
    for name, densities in rows.items():
        for density, times in densities.items():
            cells = [f"{1e3 * median(times['oneDNN']):.1f} ms", *_gains(times, NAMES)]
            lines.append(f"| {name} | {density:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gains(times, names, base="oneDNN"):
    found = ratios(times, base)
    return [f"{1 / found[n]:.2f}x" if n in found else "-" for n in names]


def _inference_table():
    lines = [
        "| model, density 0.1 | batch | oneDNN pass | dense | ONNX Runtime | sparse |",
        "|---|---|---|---|---|---|",
    ]
    for name, make, shape in (("MLP", mlp, (1024,)), ("ResNet-20", resnet, (3, 32, 32))):
        for batch in (1, 8, 64):
            inputs = torch.randn(batch, *shape)
            times = alternate(_passes(make().eval(), TRAINED[name][4], inputs), 2 * ROUNDS)
            cells = _gains(times, ("dense", "ONNX Runtime", "sparse"))
            cells = [f"{1e3 * median(times['oneDNN']):.2f} ms", *cells]
            lines.append(f"| {name} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _passes(dense, whole, inputs):
    masks = _masks(dense, 0.1, whole)
    masks.apply_(dense)
    candidates = {
        "dense": _pass(dense, inputs, "highest"),
        "oneDNN": _pass(dense, inputs, "medium"),
        "sparse": _pass(_sparse(dense, masks, inputs), inputs, "medium"),
    }
    if all(map(importlib.util.find_spec, ("onnxruntime", "onnxscript"))):
        candidates["ONNX Runtime"] = _onnx(dense, inputs)
    return candidates


def _pass(model, inputs, precision):
    def run():
        with matmul_precision(precision), torch.inference_mode():
            return model(inputs)

    return run


def _onnx(model, inputs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with contextlib.redirect_stdout(None):
            torch.onnx.export(model, (inputs,), path, dynamo=True)
        session = onnxruntime.InferenceSession(path, options)
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, feed)


def _memory():
    """Bytes of weights, gradients and Adam's state, and of indices."""
    lines = [
        "| MLP, Adam | bytes | dense is so many times as large | with float masks |",
        "|---|---|---|---|",
    ]
    dense = mlp()
    whole = None
    for density in (1.0, *DENSITIES):
        model = copy.deepcopy(dense)
        if density < 1:
            execute.to_sparse(model, _masks(model, density, "6.weight"), "bag-numba")
        optimizer = FUSED(model.parameters())
        cross_entropy(model(torch.randn(2, 1024)), torch.randint(10, (2,))).backward()
        optimizer.step()
        found = execute.footprint(model, optimizer)
        whole = whole or found
        sizes = [whole.total, whole.total + whole.weights]
        cells = [f"{size / found.total:.1f}" for size in sizes]
        lines.append(f"| density {density:g} | {found} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def plot(bars, path):
    """Draw how many times as fast as oneDNN the MLP's steps are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(bars), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, bars.items(), strict=True):
        names = [n for n in NAMES if n in next(iter(rows.values()))]
        for place, name in enumerate(names):
            heights = [1 / ratios(times, "oneDNN")[name] for times in rows.values()]
            left = [x + 0.8 * (place / len(names) - 0.5) for x in range(len(heights))]
            drawn = axes.bar(left, heights, 0.8 / len(names), align="edge", label=name)
            if name == "sparse":
                axes.bar_label(drawn, fmt="%.1f")
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [f"density {density:g}" for density in rows])
        axes.set_title(title)
    axes.legend(fontsize="small")
    figure.supylabel("times as fast as dense, oneDNN")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
