"""The depth section of recipes: weights of another run, conversions, loss, cost."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from featherweight import depth
from featherweight.lab.depth import RoutedLoss, restart_choices, take_weights, with_auxiliary
from featherweight.lab.errors import BadInput
from featherweight.lab.fit import Loss
from featherweight.lab.identity import identity
from featherweight.lab.parse import build
from featherweight.lab.recipe import DEPTH_METHODS, Recipe, depth_options
from featherweight.lab.runs import run
from featherweight.lab.setup import make_model, read_data
from tests.lab.tiny_runs import VIT, rows, tiny

TOKENS = 17
OPTIONS = {"tome": {"merged": 2}, "fewer-layers": {"layers": 3}}


def routed(method="a-mod", **changes):
    given = {"depth__method": method, "depth__options": OPTIONS.get(method, {})}
    return tiny(**VIT | given | changes)


def model_of(recipe, seed=0):
    return make_model(recipe, read_data(recipe), seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished dense run: its folder, and its weights."""
    folder = run(tiny(**VIT), 0, tmp_path_factory.mktemp("dense"))
    return str(folder.parent), load_file(folder / "level-00" / "model.safetensors")


@pytest.mark.parametrize("method", DEPTH_METHODS)
def test_every_method_starts_from_the_weights_of_a_dense_run(method, finished):
    folder, state = finished
    model = model_of(routed(method, depth__from_run=folder))
    own = model.state_dict()
    shared = {name: value for name, value in own.items() if name in state}
    assert all(torch.equal(value, state[name]) for name, value in shared.items())
    assert len(shared) == (len(state) if method != "fewer-layers" else len(own))
    assert depth.is_routed(model) == (method not in ("dense", "fewer-layers"))


def test_without_a_run_the_weights_are_those_of_the_dense_model():
    dense, converted = model_of(tiny(**VIT)), model_of(routed(depth__capacity=1.0))
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(converted(x), dense(x), atol=1e-5)


def test_capacity_and_layers_arrive():
    model = model_of(routed(depth__capacity=[0.25, 0.5], depth__layers=[1, 3]))
    counts = depth.visited(model, torch.randn(1, 1, 8, 8))[:, 0].sum(-1)
    assert counts.tolist() == [17, 5, 17, 9]


def test_a_head_for_other_classes_stays_as_drawn(finished):
    model = model_of(tiny(**VIT))
    model.classifier = torch.nn.Linear(16, 7)
    before = copy.deepcopy(model.classifier.weight)
    take_weights(model, finished[1], 7)
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.blocks[0].mlp[0].weight, finished[1]["blocks.0.mlp.0.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth__from_run": "no/such-12345678"}, "is no finished run"),
        ({"model__options": VIT["model__options"] | {"depth": 3}}, "is in one of them alone"),
        ({"model__options": VIT["model__options"] | {"width": 24}}, "holds another model"),
        ({"model__name": "mlp", "model__options": {}}, "from_run holds another model"),
        ({"depth__layers": [0]}, "no layer comes before"),
        ({"depth__capacity": [0.5, 0.5, 0.5]}, "capacity must be one number or one for each"),
        ({"depth__options": {"policy": "carri"}}, "did you mean 'carry'"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, said, finished):
    with pytest.raises(BadInput, match=said) as error:
        model_of(routed(**{"depth__from_run": finished[0]} | changes))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("depth: ")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"method": "a-mode"}, "did you mean 'a-mod'"),
        ({"method": "external"}, "unknown method"),
        ({"method": "a-mod", "options": {"capacity": 0.5}}, "unknown option of a-mod"),
        ({"options": {"gate": "unit"}}, "dense has none"),
        ({"method": "fewer-layers"}, "needs layers"),
        ({"method": "a-mod", "capacity": 0}, "capacity"),
        ({"method": "a-mod", "layers": "even"}, "layers"),
        ({"method": "mod", "auxiliary": -1}, "auxiliary"),
    ],
)
def test_bad_sections_are_refused_before_anything_is_read(section, said):
    with pytest.raises(BadInput, match=said):
        build({"depth": section})


def test_options_are_those_of_the_library():
    assert depth_options("a-mod")[:2] == ["policy", "gate"]
    assert depth_options("tome") == ["merged", "proportional"]
    assert depth_options("fewer-layers") == ["layers", "spread"]
    assert depth_options("dense") == []


def test_a_dense_recipe_keeps_its_name():
    assert identity(build({"depth": {"method": "dense"}})) == identity(Recipe())


@pytest.mark.parametrize("method", ["a-mod", "mod", "cls-row", "tome", "fewer-layers"])
def test_the_report_counts_what_is_computed(method, tmp_path):
    recipe = routed(method, fit__length="1it")
    (row,) = rows(run(recipe, 0, tmp_path), "levels")
    cost = depth.flops(model_of(recipe), TOKENS)
    assert row["flops"] == 2 * cost.total
    assert row["dense_flops"] == 2 * cost.dense
    assert json.loads(json.dumps(row))["parameters"] > 0


def test_the_auxiliary_loss_is_added_with_its_weight():
    recipe = routed("mod", depth__options={"auxiliary": "router"}, depth__auxiliary=0.25)
    model, plain = model_of(recipe).train(), Loss()
    images, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    logits = model(images)
    found = with_auxiliary(plain, recipe, model)(images, logits, labels)
    expected = plain(images, logits, labels) + 0.25 * 5 * depth.auxiliary_loss(model)
    assert torch.allclose(found, expected)
    assert isinstance(with_auxiliary(plain, recipe, model), RoutedLoss)
    assert with_auxiliary(plain, routed("mod"), model) is plain


def test_random_choices_follow_from_the_steps_of_the_level():
    x = torch.randn(1, 1, 8, 8)
    model = model_of(routed("random-tokens")).train()
    seen = [depth.visited(model, x) for _ in range(4)]
    assert not torch.equal(seen[2], seen[3])
    restart_choices(model, 2)
    assert torch.equal(depth.visited(model, x), seen[2])
    other = model_of(routed("random-tokens"), seed=1).train()
    assert not torch.equal(depth.visited(other, x), seen[0])
