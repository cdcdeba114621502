"""The setting: what is refused, what is warned of, what is fine."""

from dataclasses import replace

import pytest

from featherweight.federated.setting import Setting, check, require

FLEET = Setting("cross-device", clients=10000, cohort=50)
SILOS = Setting("cross-silo", clients=20, cohort=20, split="examples")


def found(setting):
    return {(finding.level, finding.rule) for finding in check(setting)}


def test_what_the_guide_recommends_raises_nothing():
    assert found(FLEET) == set()
    assert found(SILOS) == set()


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (FLEET, {"client_state": True, "algorithm": "scaffold"}, ("refused", "client-state")),
        (FLEET, {"codec_memory": True}, ("refused", "codec-memory")),
        (FLEET, {"asks_loss": True}, ("warning", "global-loss")),
        (FLEET, {"privacy": True, "sampler": "poisson"}, ("refused", "private-weights")),
        (
            FLEET,
            {"privacy": True, "weighting": "uniform"},
            ("refused", "private-sampling"),
        ),
        (
            FLEET,
            {"privacy": True, "sampler": "poisson", "weighting": "unbiased"},
            ("refused", "private-weights"),
        ),
        (FLEET, {"sampler": "by-size"}, ("warning", "double-weights")),
        (FLEET, {"unequal_sizes": True}, ("note", "ratio-estimator")),
        (FLEET, {"unequal_steps": True}, ("warning", "unequal-steps")),
        (FLEET, {"unbiased": False}, ("warning", "biased-codec")),
        (SILOS, {"separable": False, "robust": True}, ("refused", "joint-decoder")),
        (FLEET, {"cohort": 2000}, ("note", "participation")),
        (SILOS, {"cohort": 4}, ("note", "participation")),
        (FLEET, {"sampler": "over-selection"}, ("warning", "stragglers")),
        (FLEET, {"batch_norm": True}, ("refused", "batch-norm")),
        (FLEET, {"tuned_on": "test"}, ("warning", "tuned-on-test")),
        (FLEET, {"split": "examples"}, ("note", "held-out")),
        (SILOS, {"split": "clients"}, ("note", "held-out")),
    ],
)
def test_each_rule_alone(base, changes, expected):
    assert found(replace(base, **changes)) == {expected}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (SILOS, {"client_state": True, "codec_memory": True}),
        (SILOS, {"unbiased": False, "codec_memory": True}),
        (SILOS, {"unequal_sizes": True}),  # everybody takes part: no sampling, no estimator
        (FLEET, {"sampler": "by-size", "weighting": "uniform", "unequal_sizes": True}),
        (FLEET, {"unequal_steps": True, "corrects_steps": True}),
        (FLEET, {"privacy": True, "sampler": "poisson", "weighting": "uniform"}),
        (FLEET, {"weighting": "unbiased", "unequal_sizes": True}),
        (FLEET, {"robust": True}),
        (FLEET, {"separable": False}),
        (FLEET, {"split": "clients"}),
    ],
)
def test_what_is_fine(base, changes):
    assert found(replace(base, **changes)) == set()


def test_refusals_come_first_and_stop():
    bad = replace(
        FLEET,
        client_state=True,
        algorithm="scaffold",
        unequal_steps=True,
        unequal_sizes=True,
        codec="topk",
        codec_memory=True,
    )
    levels = [finding.level for finding in check(bad)]
    assert levels == ["refused", "refused", "warning", "note"]
    with pytest.raises(ValueError, match="setting: scaffold keeps state for each client"):
        require(bad)
    fine = require(replace(bad, kind="cross-silo"))
    assert [finding.level for finding in fine] == ["warning", "note", "note"]
    assert all(len(str(finding).splitlines()) == 1 for finding in check(bad))


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "cross-devices"), ("weighting", "tokens"), ("split", ""), ("tuned_on", "dev")],
)
def test_words_are_checked(name, value):
    with pytest.raises(ValueError, match=f"unknown {name} '{value}'"):
        replace(FLEET, **{name: value})
