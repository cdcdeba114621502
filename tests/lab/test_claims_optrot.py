"""Claims of OptRot: what they compare, and that figures of a real model are read as they are."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")

from featherweight import quant
from featherweight.lab.claims import optrot
from featherweight.lab.claims.claim import CLAIMS, Settings
from featherweight.lab.claims.optrot import Compared, decoder, rotation, small, tokens
from featherweight.lab.errors import RunFailed

OWN = [claim for claim in CLAIMS.values() if claim.paper == optrot.PAPER]


def settings(data=None):
    return Settings(Path("nowhere"), 1, "mini" if data is None else "paper", data, Console())


def write(folder, rotation, setting, seed, kl, perplexity, inputs="weights"):
    (folder / "cells").mkdir(exist_ok=True)
    results = {inputs: {"kl": kl, "perplexity": perplexity}}
    path = folder / "cells" / f"{rotation}_{setting}_{seed}.json"
    path.write_text(json.dumps({"results": results}))


def test_every_claim_compares_two_rotations_at_one_setting():
    assert len(OWN) == 2 * 4 * 2 + 3
    for claim in OWN:
        experiment = claim.experiment
        assert {experiment.better, experiment.worse} <= {*quant.ROTATIONS, "optrot-more"}
        assert experiment.setting in {*optrot.GRIDS, "RTN-W4"}
        assert experiment.better != experiment.worse
        assert claim.region[0] == 0
    order = [c.experiment for c in OWN if c.experiment.setting == "W4"][::2]
    assert [(o.worse, o.better) for o in order][:3] == [
        ("none", "hadamard"),
        ("hadamard", "optrot"),
        ("optrot", "optrot-plus"),
    ]


def test_effects_are_shares_that_the_better_one_saves(tmp_path):
    for seed, (better, worse) in enumerate([(0.2, 0.4), (0.3, 0.4), (0.5, 0.4)]):
        write(tmp_path, "optrot", "W4", seed, better, 10 * better)
        write(tmp_path, "hadamard", "W4", seed, worse, 20 * worse)
    found = Compared("W4", "optrot", "hadamard").effects(settings(tmp_path))
    assert found == pytest.approx([0.5, 0.25, -0.25])
    found = Compared("W4", "optrot", "hadamard", "perplexity").effects(settings(tmp_path))
    assert found == pytest.approx([0.75, 0.625, 0.375])


def test_inputs_are_looked_up_beside_weights(tmp_path):
    write(tmp_path, "optrot", "W4-clip", 0, 0.6, 1.0, "A4")
    write(tmp_path, "hadamard", "W4-clip", 0, 0.3, 1.0, "A4")
    experiment = Compared("W4-clip", "hadamard", "optrot", inputs="A4", seeds=(0,))
    assert experiment.effects(settings(tmp_path)) == pytest.approx([0.5])


def test_rounding_without_a_rotation_has_one_result(tmp_path):
    write(tmp_path, "none", "RTN-W4", 0, 0.5, 1.0)
    for seed in range(3):
        write(tmp_path, "hadamard", "RTN-W4", seed, 1.0, 1.0)
    experiment = CLAIMS["rotations-hurt-rounding"].experiment
    assert experiment.effects(settings(tmp_path)) == pytest.approx([0.5] * 3)


def test_what_was_not_measured_is_said_in_one_line(tmp_path):
    with pytest.raises(RunFailed, match=r"optrot-plus_W4_0.json is missing; `python -m bench") as e:
        Compared("W4", "optrot-plus", "optrot").effects(settings(tmp_path))
    assert "\n" not in str(e.value)


# The small decoder


def test_the_decoder_has_a_channel_that_stands_out():
    state = torch.random.get_rng_state()
    model = decoder(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        weight = model.model.layers[1].get_submodule(name).weight
        sizes = weight.pow(2).mean(0).sqrt()
        assert sizes.argmax() == 3
        assert sizes[3] > 8 * sizes.median()
    assert not torch.equal(decoder(4).lm_head.weight, model.lm_head.weight)


def test_calibration_and_evaluation_are_different_tokens():
    drawn = [tokens(4, seed) for seed in (100, 101, 200, 201)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_rotation_helps_gptq_on_it():
    experiment = Compared("W4", "hadamard", "none", seeds=(0,))
    (effect,) = experiment.effects(settings())
    expected = 1 - small("hadamard", "W4", "weights", 0).kl / small("none", "W4", "weights", 0).kl
    assert effect == pytest.approx(expected)
    assert 0 < effect < 1


def test_rounded_inputs_cost_more():
    plain = small("none", "W4-clip", "weights", 0).kl
    assert plain < small("none", "W4-clip", "A8", 0).kl < small("none", "W4-clip", "A4", 0).kl


def test_the_control_starts_where_optrot_ends(monkeypatch):
    seen = []

    def learn(model, **options):
        seen.append(options)
        return quant.Learned(rotation("hadamard", 0), 1.0, 1.0, (), {})

    monkeypatch.setattr(optrot.quant, "learn_rotation", learn)
    monkeypatch.setattr(optrot, "rotation", lambda name, seed: f"{name} {seed}")
    rotation.__wrapped__("optrot-more", 7)
    assert seen[0]["start"] == "optrot 7"
    assert (seen[0]["steps"], seen[0]["rounds"], seen[0]["value_steps"]) == (150, 1, 0)
