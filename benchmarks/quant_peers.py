"""llm-compressor on the same model, windows and threads, for the quantisation benchmark.

Run by the peer's own Python, since it needs another transformers: PYTHON -m benchmarks.quant_peers
MODEL WINDOWS OUT, from the project's folder. WINDOWS is the file that `benchmarks.quant` writes.
"""

import json
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from featherweight.quant.evaluate import divergence


def main() -> None:
    directory, windows, out = sys.argv[1:4]
    found = load_file(windows)
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, make in RECIPES.items():
        path = Path(out) / f"{name}.json"
        if path.is_file():
            continue
        try:
            result = measure(directory, make(), found["calibration"], found["evaluation"])
        except Exception as error:  # what a peer can't do is a result too
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        result |= {"version": version("llmcompressor"), "transformers": version("transformers")}
        print(name, result, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _gptq(bits: int = 4, group_size: int | None = None, observer: str = "minmax"):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    strategy = "channel" if group_size is None else "group"
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=False,
        strategy=strategy,
        group_size=group_size,
        observer=observer,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def _spinquant(**options):
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    return SpinQuantModifier(rotations=["R1", "R2"], **options)


def _quip():
    from llmcompressor.modifiers.transform.quip import QuIPModifier

    return QuIPModifier(transform_type="random-hadamard", rotations=["v", "u"])


RECIPES = {
    "gptq-W4": lambda: [_gptq()],
    "gptq-W4-mse": lambda: [_gptq(observer="mse")],
    "gptq-W3-g64": lambda: [_gptq(3, 64)],
    "spinquant-hadamard-gptq-W4": lambda: [_spinquant(transform_type="hadamard"), _gptq()],
    "spinquant-random-hadamard-gptq-W4": lambda: [
        _spinquant(transform_type="random-hadamard"),
        _gptq(),
    ],
    "spinquant-blocks-of-64-gptq-W4": lambda: [
        _spinquant(transform_type="hadamard", transform_block_size=64),
        _gptq(),
    ],
    "quip-gptq-W4": lambda: [_quip(), _gptq()],
}


def measure(directory, recipe, calibration, evaluation) -> dict[str, object]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    original, model = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2)
    )
    rows = {"input_ids": calibration.tolist()}
    rows["attention_mask"] = torch.ones_like(calibration).tolist()
    started, processor = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
        pipeline="sequential",
    )
    seconds = {"processor": time.process_time() - processor}
    seconds["wall"] = time.perf_counter() - started
    return {"seconds": seconds, "results": asdict(divergence(original, model, evaluation))}


if __name__ == "__main__":
    main()
