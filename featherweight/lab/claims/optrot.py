"""Claims of Gadhikar, Grazzi & Hensman 2025, "OptRot".

At mini scale they are tested on a small decoder with random weights and channels that stand out,
which says little of language models. ``--scale paper --data FOLDER`` reads what ``python -m
benchmarks.quant`` measured on SmolLM2-135M and kept in FOLDER, ``runs/quant``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight import quant
from featherweight.lab.claims.claim import CLAIMS, Claim, Settings
from featherweight.lab.errors import RunFailed

PAPER = "Gadhikar, Grazzi & Hensman 2025, arXiv:2512.24124"
GRIDS: dict[str, dict[str, Any]] = {
    "W4": {"bits": 4, "clip": False},
    "W4-clip": {"bits": 4, "clip": True},
    "W3-g64": {"bits": 3, "group_size": 64, "clip": False},
}


@dataclass(frozen=True)
class Compared:
    """How much lower one rotation's figure is than another's, at the same setting and seed.

    Attributes:
        setting: ``W4``, ``W4-clip``, ``W3-g64`` (all by GPTQ) or ``RTN-W4``.
        better, worse: names of rotations, or ``optrot-more``: OptRot with as many more steps as
            OptRot+ takes beyond it.
        figure: ``kl`` to the original model, or ``perplexity``.
        inputs: ``weights`` for weights alone, ``A8`` or ``A4`` with inputs of so many bits too.
        seeds: of calibration tokens, rotations and, at mini scale, weights.
    """

    setting: str
    better: str
    worse: str
    figure: Literal["kl", "perplexity"] = "kl"
    inputs: str = "weights"
    seeds: tuple[int, ...] = (0, 1, 2)

    def effects(self, settings: Settings) -> list[float]:
        """Return ``1 - better / worse`` for each seed.

        Raises:
            RunFailed: at the paper's scale, a figure was not measured.
        """
        return [
            1 - self._figure(self.better, seed, settings) / self._figure(self.worse, seed, settings)
            for seed in self.seeds
        ]

    def _figure(self, rotation: str, seed: int, settings: Settings) -> float:
        if settings.scale == "mini":
            return float(getattr(small(rotation, self.setting, self.inputs, seed), self.figure))
        # Rounding without a rotation looks at no text: there is one result for all seeds.
        constant = (rotation, self.setting) == ("none", "RTN-W4")
        name = f"{rotation}_{self.setting}_{0 if constant else seed}.json"
        assert settings.data is not None
        path = settings.data / "cells" / name
        if not path.is_file():
            raise RunFailed(f"{path} is missing; `python -m benchmarks.quant` measures it")
        cell = json.loads(path.read_text(encoding="utf-8"))
        return float(cell["results"][self.inputs][self.figure])


# The small decoder


def decoder(seed: int) -> nn.Module:
    """Return a Llama of two layers with random weights; one channel stands out 15 times."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise RunFailed("these claims need transformers: pip install 'featherweight[hf]'") from None
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model.train(False)
    for layer in model.get_submodule("model.layers").children():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2:
                parameter.data *= 5
            if name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
                parameter.data[:, 3] *= 15
    return model


def tokens(count: int, seed: int) -> Tensor:
    """Draw sequences of 32 tokens."""
    return torch.randint(256, (count, 32), generator=torch.Generator().manual_seed(seed))


@cache
def rotation(name: str, seed: int) -> quant.Rotation | None:
    """Find a rotation of the small decoder."""
    model = decoder(seed)
    if name == "optrot-more":
        start, rule = rotation("optrot", seed), quant.Angle(theta=0.1, momentum=0.5)
        more = quant.learn_rotation(
            model, steps=150, seed=seed + 1000, rounds=1, value_steps=0, rule=rule, start=start
        )
        return more.rotation
    find: Callable[..., quant.Rotation | None] = quant.ROTATIONS[name].method
    return find(model, seed, None, tokens(64, seed + 100), None)


@cache
def small(name: str, setting: str, inputs: str, seed: int) -> quant.Divergence:
    """Quantise the small decoder and compare it with itself before."""
    original, turn = decoder(seed), rotation(name, seed)
    model = copy.deepcopy(original)
    if turn is not None:
        quant.rotate(model, turn)
    if setting == "RTN-W4":
        quant.rtn(model, bits=4, symmetric=False, clip=False)
    else:
        quant.gptq(model, tokens(64, seed + 100), symmetric=False, **GRIDS[setting])
    bits = None if inputs == "weights" else int(inputs[1:])
    rounded = nullcontext() if bits is None else quant.quantized_activations(model, bits)
    with rounded:
        return quant.divergence(original, model, tokens(32, seed + 200))


# The claims

_NAMES = {"none": "no rotation", "hadamard": "Hadamard", "optrot": "OptRot"} | {
    "optrot-plus": "OptRot+ (our objective)",
    "optrot-more": "OptRot with as many more steps",
}
_WHAT = {"kl": "KL to the original model", "perplexity": "perplexity"}


def _add(name: str, sentence: str, experiment: Compared) -> None:
    better, worse = _NAMES[experiment.better], _NAMES[experiment.worse]
    inputs = "" if experiment.inputs == "weights" else f", inputs in {experiment.inputs[1:]} bits"
    CLAIMS.add(
        Claim(
            name=name,
            paper=PAPER,
            sentence=sentence,
            measured=f"how much lower the {_WHAT[experiment.figure]} is with {better} than with "
            f"{worse}, {experiment.setting}{inputs}, percent",
            experiment=experiment,
        )
    )


_ORDER = (
    ("hadamard", "none", "a random Hadamard rotation loses less than no rotation"),
    (
        "optrot",
        "hadamard",
        "a rotation learned from the weights (OptRot) loses less than a random one",
    ),
    ("optrot-plus", "optrot", "a rotation learned from inputs too loses less still"),
    ("optrot-plus", "optrot-more", "the gain of OptRot+ is not due to its further steps"),
)
for _setting in ("W4", "W3-g64"):
    for _better, _worse, _what in _ORDER:
        for _figure in ("kl", "perplexity"):
            _add(
                f"{_better}-beats-{_worse}-{_setting[:2].lower()}-{_figure}",
                f"Under GPTQ with {_setting[1]} bits, {_what}.",
                Compared(_setting, _better, _worse, _figure),
            )
_add(
    "rotations-hurt-rounding",
    "Under rounding to nearest the order reverses: no rotation is best.",
    Compared("RTN-W4", "none", "hadamard"),
)
_add(
    "optrot-helps-w4a8",
    "With inputs in 8 bits as well OptRot is still better than Hadamard.",
    Compared("W4-clip", "optrot", "hadamard", inputs="A8"),
)
_add(
    "optrot-hurts-w4a4",
    "With inputs in 4 bits OptRot is worse than Hadamard: a trade-off between weights and inputs.",
    Compared("W4-clip", "hadamard", "optrot", inputs="A4"),
)
