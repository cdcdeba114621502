"""Claims on routing: the task, the training, and what an effect is, on models of no training."""

import io

import pytest
import torch
from rich.console import Console

from featherweight import depth
from featherweight.lab.claims import CLAIMS, a_mod
from featherweight.lab.claims.claim import Settings
from featherweight.lab.depth_tasks import NOISE, Place, Plan, accuracy, fit, on_canvas, task
from featherweight.lab.models import build


def fresh(classes=10, seed=0):
    options = Place().options
    return build("vit", classes=classes, shape=(1, 24, 24), seed=seed, **options)


@pytest.fixture
def quick(monkeypatch):
    """Models as they were drawn, and measurements that are known."""
    monkeypatch.setattr(a_mod, "dense", lambda place, seed: fresh(len(place.classes), seed))
    return Place()


def test_a_digit_fills_four_patches_of_its_canvas():
    images = torch.ones(50, 1, 8, 8)
    canvas = on_canvas(images, torch.Generator().manual_seed(0))
    patches = canvas.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).mean(-1)[:, 0]
    assert ((patches > 0.75).flatten(1).sum(1) == 4).all()
    assert canvas[canvas < 0.75].std() == pytest.approx(NOISE, rel=0.05)
    assert len({tuple((p > 0.75).flatten().tolist()) for p in patches}) > 10


def test_new_classes_are_the_others():
    old, new = task(Place(classes=a_mod.OLD)), task(Place(classes=a_mod.NEW))
    assert sorted(old.train.labels.unique().tolist()) == list(range(5))
    assert len(old.train) + len(new.train) == len(task(Place()).train) == 900
    assert Place().tokens == 37


def test_training_repeats_and_looks_as_often_as_asked():
    curves = []
    for _ in range(2):
        model = fresh()
        curves.append(fit(model, task(Place()), Plan(4, 1e-3), seed=1, every=2))
    assert curves[0] == curves[1]
    assert len(curves[0]) == 3
    assert curves[0][-1] == accuracy(model, task(Place()).test)


@pytest.mark.parametrize("arm", sorted(a_mod.ARMS))
def test_arms_leave_the_dense_model_alone(arm):
    model = fresh()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = a_mod.ARMS[arm](model, 0.5, 0, 37)
    assert not depth.is_routed(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (depth.flops(other, 37).total < depth.flops(model, 37).total) == (arm != "dense")


def test_the_better_of_several_arms_counts_and_all_are_printed(quick, tmp_path):
    known = {"dense": 0.9, "a-mod": 0.8, "mod unit": 0.5, "mod raw": 0.6, "fewer layers": 0.7}
    experiment = a_mod.Beside(
        lambda _place, arm, _capacity, seeds: [known[arm] + s / 100 for s in seeds],
        0.5, ["a-mod"], a_mod.MOD, seeds=(0, 1),
    )  # fmt: skip
    console = Console(record=True, width=200, file=io.StringIO())
    effects = experiment.effects(Settings(tmp_path, 1, "mini", None, console))
    assert effects == pytest.approx([0.2, 0.2])
    text = console.export_text()
    assert all(f"{arm}: {value + 0.005:.3f}" in text for arm, value in known.items())
    assert "at 1.000 of the dense FLOPs" in text


def test_steps_to_a_goal():
    assert a_mod.steps_to([0.1, 0.5, 0.4, 0.6], 0.5) == 1
    assert a_mod.steps_to([0.1, 0.5], 0.9) == 2


def test_agreement_has_a_coefficient_for_each_layer(monkeypatch, quick):
    monkeypatch.setattr(a_mod, "IMAGES", 2)
    found = a_mod.agreement(fresh().eval(), quick)
    assert len(found) == 6
    assert all(-1 <= number <= 1 for number in found)


def test_every_claim_is_of_the_paper():
    assert len([claim for claim in CLAIMS.values() if claim.paper == a_mod.PAPER]) == 9
