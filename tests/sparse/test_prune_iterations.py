"""Pruning in rounds: schedule, nesting, exact counts, and what rounds are good for."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from featherweight import sparse
from featherweight.common import Entry
from featherweight.sparse import CRITERIA, Masks, hold, score, select
from featherweight.sparse.structure import satisfies
from tests.models import ConvNet, mlp
from tests.sparse.test_snip import homogeneous

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [(torch.randn(8, 3, 8, 8, generator=GENERATOR), torch.arange(8) % 5)]
VECTORS = [(torch.randn(8, 16, generator=GENERATOR), torch.arange(8) % 4)]


@pytest.fixture
def recorded(monkeypatch):
    """A criterion that notes the weights it is given and scores them by size."""
    calls = []

    def noted(weights, masks=None):
        calls.append({name: weight.detach().clone() for name, weight in weights.items()})
        calls[-1]["masks"] = masks
        return {name: weight.detach().abs() for name, weight in weights.items()}

    entry = Entry("noted", noted, "notes its calls", defaults={"iterations": 5})
    monkeypatch.setitem(CRITERIA._entries, "noted", entry)
    return calls


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("support", [None, 0.6])
def test_the_density_falls_exponentially_and_the_masked_model_is_scored(recorded, rounds, support):
    model = mlp()
    inside = None if support is None else sparse.random(model, support, seed=1)
    masks = sparse.prune(model, "noted", 0.05, iterations=rounds, support=inside)
    size, start = masks.numel, 1.0 if inside is None else inside.density
    assert masks.nonzeros == round(0.05 * size)
    assert len(recorded) == rounds
    before = inside
    for step, call in enumerate(recorded):
        seen = call.pop("masks")
        assert (seen is None) == (step == 0 and inside is None)
        share = start * (0.05 / start) ** (step / rounds)
        count = sum(int(w.count_nonzero()) for w in call.values())
        assert count == (size if seen is None else round(share * size))
        for name, weight in Masks.dense(model).weights(model).items():
            kept = torch.ones_like(weight, dtype=torch.bool) if seen is None else seen[name]
            assert torch.equal(call[name], weight.detach() * kept)
        assert before is None or seen <= before
        before = seen
    assert before is None or masks <= before


def test_rounds_of_magnitude_are_one_shot_since_scores_never_change(recorded):
    model = mlp()
    assert sparse.prune(model, "noted", 0.1, iterations=9) == sparse.magnitude(model, 0.1)


def test_the_row_says_how_many_rounds(recorded):
    sparse.prune(mlp(), "noted", 0.1)
    assert len(recorded) == 5
    assert CRITERIA["synflow"].defaults["iterations"] == 100


def test_nothing_to_remove_takes_one_round(recorded):
    model = mlp()
    assert sparse.prune(model, "noted", 1.0) == Masks.dense(model)
    support = sparse.random(model, 0.25, seed=0)
    assert sparse.prune(model, "noted", support.density, support=support) == support
    assert len(recorded) == 2


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow", "prospr"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_counts_are_exact_and_stay_in_the_support(criterion, scope):
    model = ConvNet()
    support = sparse.random(model, 0.7, seed=0)
    for inside in (None, support):
        masks = sparse.prune(
            model, criterion, 0.1, scope, iterations=4, support=inside, batches=IMAGES
        )
        assert masks.nonzeros == round(0.1 * masks.numel)
        assert inside is None or masks <= inside


@pytest.mark.parametrize("structure", ["2:4", "1:4", "4x4", "channel"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["snip", "synflow"])
def test_structures_go_through_all_rounds(criterion, scope, structure):
    model = mlp()
    masks = sparse.prune(
        model, criterion, 0.2, scope, iterations=5, structure=structure, batches=VECTORS
    )
    assert satisfies(masks, structure)
    wanted = round(0.2 * masks.numel)
    assert masks.nonzeros == wanted if ":" in structure else wanted // 4 < masks.nonzeros <= wanted


def test_whole_groups_may_leave_fewer_than_the_next_round_asks_for():
    model = mlp()
    masks = sparse.prune(model, "snip", 0.2, iterations=60, structure="channel", batches=VECTORS)
    assert satisfies(masks, "channel")
    assert 0.1 < masks.density <= 0.2


def test_what_is_gone_stays_gone_where_removed_weights_score_highest(monkeypatch):
    model, seen = mlp(), []

    def smallest(weights, masks=None):
        seen.append(masks)
        return {name: -weight.detach().abs() for name, weight in weights.items()}

    monkeypatch.setitem(CRITERIA._entries, "smallest", Entry("smallest", smallest, "small first"))
    masks = sparse.prune(model, "smallest", 0.1, iterations=4)
    assert masks.nonzeros == round(0.1 * masks.numel)
    assert masks <= seen[3] <= seen[2] <= seen[1]


def test_one_line_masks_take_structures():
    model = mlp()
    for masks in (
        sparse.magnitude(model, 0.5, structure="2:4"),
        sparse.random(model, 0.5, "uniform", seed=0, structure="2:4"),
    ):
        groups = masks["3.weight"].view(-1, 4).sum(1)
        assert (groups == 2).all()
    with pytest.raises(ValueError, match="needs sampling='exact', got 'bernoulli'"):
        sparse.random(model, 0.5, seed=0, structure="2:4", sampling="bernoulli")


def test_one_round_is_score_and_select():
    model = mlp()
    weights = Masks.dense(model).weights(model)
    scores = score("snip", weights, model=model, batches=VECTORS)
    assert sparse.prune(model, "snip", 0.3, "erk", batches=VECTORS) == select(scores, 0.3, "erk")


@pytest.mark.parametrize(
    ("criterion", "arguments", "message"),
    [
        ("snip", {}, "criterion 'snip' needs batches="),
        ("snip", {"batches": VECTORS, "objektive": abs}, "did you mean 'objective'"),
        ("magnitude", {"temperature": 1.0}, "unknown argument of criterion 'magnitude'"),
        ("snip", {"batches": VECTORS, "iterations": 0}, "iterations must be at least 1, got 0"),
        ("snip", {"batches": VECTORS, "masks": None}, "as support="),
        ("snap", {"batches": VECTORS}, "did you mean 'snip'"),
    ],
)
def test_bad_arguments_are_named(criterion, arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse.prune(mlp(), criterion, 0.1, **arguments)


def test_what_some_criterion_needs_may_be_offered_to_all():
    generator = torch.Generator().manual_seed(0)
    masks = sparse.prune(mlp(), "magnitude", 0.1, batches=VECTORS, generator=generator)
    assert masks == sparse.magnitude(mlp(), 0.1)


def test_options_reach_the_criterion():
    model = mlp()
    weights = Masks.dense(model).weights(model)
    first = score("prospr", weights, model=model, batches=VECTORS, steps=0)
    snip = score("snip", weights, model=model, batches=VECTORS)
    assert all(torch.allclose(first[n], snip[n]) for n in snip)


def test_none_is_no_offer():
    model = mlp()
    weights = Masks.dense(model).weights(model)
    with pytest.raises(ValueError, match="criterion 'snip' needs batches="):
        score("snip", weights, model=model, batches=None)
    offered = {"model": model, "batches": VECTORS}
    default = score("grasp", weights, **offered)
    given = score("grasp", weights, **offered, temperature=None, masks=None)
    assert all(torch.equal(default[n], given[n]) for n in default)


def test_a_support_that_is_too_small_is_refused():
    model = mlp()
    support = sparse.random(model, 0.1, seed=0)
    for rounds in (1, 5):
        with pytest.raises(ValueError, match="support holds"):
            sparse.prune(model, "snip", 0.2, support=support, batches=VECTORS, iterations=rounds)


def test_rounds_leave_more_of_the_weights_on_paths():
    model = homogeneous(64, 300, 300, 10).float()
    batches = [(torch.randn(100, 64), torch.arange(100) % 10)]
    live = {}
    for rounds in (1, 20):
        masks = sparse.prune(model, "snip", 0.005, iterations=rounds, batches=batches)
        live[rounds] = sparse.on_path(masks, model, torch.ones(1, 64)).nonzeros / masks.nonzeros
    assert live[20] > live[1] + 0.05


def digits():
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order]
    x = (x - x[:1300].mean()) / x[:1300].std()
    y = torch.tensor(labels)[order]
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def accuracy(model, masks, train, test, epochs=20):
    masks.apply_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    steps = epochs * math.ceil(len(train[1]) / 100)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with hold(model.train(), optimizer, masks):
        for _ in range(epochs):
            for chosen in torch.randperm(len(train[1]), generator=generator).split(100):
                optimizer.zero_grad()
                cross_entropy(model(train[0][chosen]), train[1][chosen]).backward()
                optimizer.step()
                rate.step()
    with torch.no_grad():
        return (model.eval()(test[0]).argmax(1) == test[1]).float().mean().item()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 300),
        nn.BatchNorm1d(300),
        nn.ReLU(),
        nn.Linear(300, 300),
        nn.BatchNorm1d(300),
        nn.ReLU(),
        nn.Linear(300, 10),
    )


def test_on_digits_rounds_train_to_what_one_shot_cannot_reach():
    train, test = digits()
    batches = [(train[0][:300], train[1][:300])]
    reached = {}
    for case in (("snip", 1), ("snip", 20), ("synflow", 1), ("synflow", 100)):
        criterion, rounds = case
        model = network()
        masks = sparse.prune(model, criterion, 0.005, iterations=rounds, batches=batches)
        reached[case] = accuracy(model, masks, train, test)
    assert reached["snip", 20] > 0.8
    assert reached["snip", 20] > reached["snip", 1] + 0.2
    assert reached["synflow", 100] > 0.88
    assert reached["synflow", 1] < 0.2


@pytest.mark.parametrize("criterion", ["snip", "grasp", "prospr"])
def test_on_digits_one_shot_works_at_two_per_cent(criterion):
    train, test = digits()
    batches = [(train[0][i : i + 100], train[1][i : i + 100]) for i in range(0, 400, 100)]
    model = network()
    masks = sparse.prune(model, criterion, 0.02, batches=batches)
    assert accuracy(model, masks, train, test, epochs=10) > 0.85
