"""Cyclic training: exact budgets, published lengths, and what it is equal to."""

import copy
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight import sparse
from featherweight.sparse import Masks
from featherweight.sparse.loops import (
    STRATEGIES,
    cycle_lengths,
    cyclic,
    iterate,
    ledger,
    level_counts,
    lrr,
)
from tests.models import ConvNet, mlp, train_steps

GOLDEN = [  # printed by the published code
    (360, 4, "constant", [90, 90, 90, 90]),
    (360, 4, "linear-decrease", [144, 108, 72, 36]),
    (360, 4, "exponential-decrease", [123, 97, 77, 61]),
    (360, 4, "peak", [60, 120, 120, 60]),
    (360, 4, "alternating", [120, 60, 120, 60]),
    (360, 4, "plateau", [80, 160, 60, 60]),
    (90, 5, "linear-increase", [6, 12, 18, 24, 30]),
    (90, 5, "exponential-decrease", [24, 20, 17, 14, 12]),
    (90, 5, "exponential-increase", [12, 14, 17, 20, 24]),
    (150, 4, "constant", [37, 37, 37, 37]),
]


@pytest.mark.parametrize(("budget", "cycles", "strategy", "expected"), GOLDEN)
def test_legacy_lengths_are_the_published_ones(budget, cycles, strategy, expected):
    assert cycle_lengths(budget, cycles, strategy, legacy=True) == expected


@pytest.mark.parametrize(("budget", "cycles", "strategy", "published"), GOLDEN)
def test_exact_lengths_only_fill_up(budget, cycles, strategy, published):
    exact = cycle_lengths(budget, cycles, strategy)
    assert sum(exact) == budget
    assert all(0 <= e - p <= 1 for e, p in zip(exact, published, strict=True))


def test_remainders_go_to_the_largest_and_then_the_earliest():
    assert cycle_lengths(150, 4) == [38, 38, 37, 37]
    # Shares 123.132, 97.730, 77.568, 61.566.
    assert cycle_lengths(360, 4, "exponential-decrease") == [123, 98, 78, 61]


@given(st.integers(1, 3000), st.integers(1, 40), st.sampled_from(list(STRATEGIES)))
def test_the_budget_is_met_or_refused(budget, cycles, strategy):
    if budget < cycles:
        with pytest.raises(ValueError, match="is too short for"):
            cycle_lengths(budget, cycles, strategy)
    if budget < 3 * cycles**2:
        return  # a ramp may begin with an empty cycle
    lengths = cycle_lengths(budget, cycles, strategy)
    assert sum(lengths) == budget
    assert len(lengths) == cycles
    assert min(lengths) >= 1
    assert all(isinstance(length, int) for length in lengths)


@given(st.integers(50, 3000), st.integers(1, 6), st.sampled_from(list(STRATEGIES)))
def test_shapes_of_the_strategies(budget, cycles, strategy):
    lengths = cycle_lengths(budget, cycles, strategy)
    up = all(b - a >= -1 for a, b in pairwise(lengths))
    down = all(b - a <= 1 for a, b in pairwise(lengths))
    assert {
        "constant": max(lengths) - min(lengths) <= 1,
        "linear-decrease": down,
        "exponential-decrease": down and lengths[0] <= 2 * lengths[-1] + 3,
        "linear-increase": up,
        "exponential-increase": up and lengths[-1] <= 2 * lengths[0] + 3,
        "peak": abs(sum(lengths[: cycles // 2]) * 2 - budget) <= cycles or cycles == 1,
        "alternating": all(abs(a - 2 * b) <= 3 for a, b in zip(lengths[::2], lengths[1::2])),  # noqa: B905
        "plateau": max(lengths[cycles // 2 :]) - min(lengths[cycles // 2 :]) <= 1,
    }[strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_cycle_gets_all(strategy):
    assert cycle_lengths(97, 1, strategy) == cycle_lengths(97, 1, strategy, legacy=True) == [97]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0), "cycles must be at least 1, got 0"),
        ((3, 4), "budget 3 is too short for 4 constant cycles"),
        ((0, 1), "budget 0 is too short"),
        ((-5, 2), "budget -5 is too short"),
        ((10, 2, "constnat"), "unknown cycle strategy 'constnat': did you mean 'constant'"),
        ((10, 8, "exponential-decrease"), "one would be empty"),
    ],
)
def test_bad_lengths_are_refused(arguments, message):
    legacy = {"legacy": True} if arguments == (10, 8, "exponential-decrease") else {}
    with pytest.raises(ValueError, match=message):
        cycle_lengths(*arguments, **legacy)


def test_ledger_of_the_papers():
    lrr_counts = level_counts(10**6, 0.2, levels=9)
    by_lrr = ledger([count / 10**6 for count in lrr_counts], 90)
    by_sculpt = ledger([0.5] * 4 + [0.1], 90)
    assert by_lrr.length == 900
    assert by_sculpt.length == 450
    assert by_lrr.dense_length == pytest.approx(90 * (1 - 0.8**10) / 0.2, rel=1e-6)
    assert by_sculpt.dense_length == pytest.approx(90 * 2.1)
    assert str(by_sculpt) == "5 levels, length 450, worth 189 dense"
    assert ledger([1.0, 0.5], [10, 20]).dense_length == 20
    for densities, lengths in (([1.0, 0.5], [1]), ([], 3)):
        with pytest.raises(ValueError, match="lengths has"):
            ledger(densities, lengths)


def test_random_masks_are_those_of_sparse_random():
    model = mlp()
    levels = list(cyclic(model, density=0.2, cycles=3, allocation="balanced", seed=7))
    expected = sparse.random(model, 0.2, "balanced", seed=7)
    assert [level.masks for level in levels] == [expected] * 3
    by_sparsity = next(cyclic(mlp(), sparsity=0.8, cycles=1, seed=7))
    assert by_sparsity.masks == sparse.random(model, 0.2, seed=7)
    assert [(level.index, level.last, level.length) for level in levels] == [
        (0, 2, None),
        (1, 2, None),
        (2, 2, None),
    ]


def test_support_is_taken_as_it_is_or_drawn_inside():
    model = mlp()
    support = sparse.random(model, 0.5, "uniform", seed=0)
    assert next(cyclic(model, cycles=2, support=support)).masks == support
    assert next(cyclic(model, support.density, cycles=2, support=support)).masks == support
    inside = next(cyclic(mlp(), 0.1, cycles=2, support=support, seed=1)).masks
    assert inside <= support
    assert inside.nonzeros == round(0.1 * inside.numel)


def test_density_one_is_cyclic_training_of_the_dense_model():
    model = mlp()
    assert next(cyclic(model, density=1.0, cycles=2)).masks == Masks.dense(model)


def test_default_number_of_cycles_is_that_of_lrr():
    model = mlp(60)
    for density in (1.0, 0.5, 0.1):
        number = sum(1 for _ in lrr(mlp(60), density, 0.3))
        assert sum(1 for _ in cyclic(model, density, 0.3, seed=0)) == number


def test_budget_is_shared():
    levels = list(cyclic(mlp(), 0.1, cycles=4, budget=90, strategy="linear-increase", seed=0))
    assert [level.length for level in levels] == cycle_lengths(90, 4, "linear-increase")
    assert next(cyclic(mlp(), 0.1, cycles=1, budget=77, seed=0)).length == 77


def train_held(model, level, optimizer=None, steps=4):
    """Train with the level's masks held; a fresh optimizer unless one is given."""
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    with sparse.hold(model.train(), optimizer, level.masks):
        train_steps(model, optimizer, steps, seed=level.index)


def same(first, second):
    return all(torch.equal(t, second[n]) for n, t in first.items())


def test_one_cycle_is_plain_training_bitwise():
    model, plain = mlp(), mlp()
    for level in cyclic(model, 0.3, cycles=1, seed=0):
        train_held(model, level)
    masks = sparse.random(plain, 0.3, seed=0)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    with sparse.hold(plain, optimizer, masks):
        train_steps(plain, optimizer, 4, seed=0)
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("keep_optimizer", [False, True])
def test_lrr_without_pruning_is_cyclic_bitwise(keep_optimizer):
    results = []
    for method in ("lrr", "cyclic"):
        model = mlp()
        masks = sparse.random(model, 0.3, seed=0)
        options = {"support": masks}
        optimizer = None
        if keep_optimizer:
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            options["optimizer"] = optimizer
        loop = (
            lrr(model, per_level=0.0, levels=3, **options)
            if method == "lrr"
            else cyclic(model, cycles=4, **options)
        )
        number = 0
        for level in loop:
            train_held(model, level, optimizer)
            number += 1
        assert number == 4
        results.append(model.state_dict())
    assert same(*results)


def test_everything_is_carried_from_cycle_to_cycle():
    model = mlp()
    levels = cyclic(model, 0.3, cycles=2, seed=0)
    train_held(model, next(levels))
    before = copy.deepcopy(model.state_dict())
    assert before["1.running_mean"].abs().max() > 0
    next(levels)
    assert same(model.state_dict(), before)


def test_own_optimizer_is_emptied_between_cycles():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    levels = cyclic(model, 0.3, cycles=3, seed=0, optimizer=optimizer)
    train_held(model, next(levels), optimizer)
    assert optimizer.state
    next(levels)
    assert not optimizer.state
    kept = cyclic(model, support=Masks.dense(model), cycles=2, optimizer=optimizer,
                  optimizer_state="carry")  # fmt: skip
    train_held(model, next(kept), optimizer)
    momentum = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    next(kept)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in momentum.items())


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resuming_equals_never_stopping(stop):
    def run(model, resume=None, until=None):
        for level in cyclic(model, 0.3, cycles=4, seed=5, budget=10, resume=resume):
            assert level.length == cycle_lengths(10, 4)[level.index]
            if level.index == until:
                return level.resume
            train_held(model, level)
        return None

    whole, stopped = mlp(), mlp()
    run(whole)
    resume = run(stopped, until=stop)
    resumed = mlp(seed=8)
    resumed.load_state_dict(stopped.state_dict())
    run(resumed, resume)
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of density= and sparsity="),
        ({"density": 0.1, "sparsity": 0.9, "seed": 0}, "exactly one"),
        ({"density": 0.1, "levels": 3, "seed": 0}, "exactly one"),
        ({"density": 1.5, "seed": 0}, "density must lie"),
        ({"density": 1e-9, "seed": 0}, "keeps none"),
        ({"density": 0.1}, "exactly one of seed= and generator="),
        ({"density": 0.1, "seed": 0, "generator": torch.Generator()}, "exactly one of seed="),
        ({"density": 0.1, "seed": 0, "cycles": 0}, "cycles must be at least 1, got 0"),
        ({"density": 0.1, "seed": 0, "per_level": 1.0}, "per_level must lie in"),
        ({"density": 0.1, "seed": 0, "per_level": 0.0}, "per_level must be over 0"),
        ({"density": 0.1, "seed": 0, "cycles": 9, "budget": 3}, "budget 3 is too short"),
        ({"density": 0.1, "seed": 0, "budget": 90, "strategy": "peek"}, "did you mean 'peak'"),
        ({"density": 0.1, "seed": 0, "allocation": "erq"}, "unknown density rule"),
        ({"density": 0.1, "seed": 0, "reset": "weight"}, "did you mean 'weights'"),
        ({"density": 0.1, "seed": 0, "optimizer_state": "keep"}, "optimizer_state must be"),
        ({"density": 0.1, "seed": 0, "exclude": ["nothing"]}, "fits no parameter"),
        ({"density": 0.1, "seed": 0, "lengths": [1]}, "lengths has 1 entries"),
        ({"density": 0.1, "seed": 0, "structure": "2:4"}, "structure= needs a pruning"),
        ({"support": sparse.random(mlp(8), 0.5, seed=0)}, "masks do not fit"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        cyclic(model, **arguments)
    assert same(model.state_dict(), before)


class TestDensities:
    """The driver's own list of densities."""

    def test_levels_keep_what_is_asked(self):
        model = ConvNet()
        wished = [1.0, 0.5, 0.5, 0.07]
        levels = list(iterate(model, densities=wished))
        size = levels[0].masks.numel
        assert [level.masks.nonzeros for level in levels] == [round(d * size) for d in wished]
        assert levels[2].masks == levels[1].masks

    @pytest.mark.parametrize(
        ("densities", "message"),
        [
            ([0.5, 0.1], "densities must begin with 1, as masked, got 0.5"),
            ([], "densities must begin with 1, as masked, got none"),
            ([1.0, 0.1, 0.2], "densities must never rise"),
            ([1.0, 0.0], "density must lie in"),
        ],
    )
    def test_bad_densities(self, densities, message):
        with pytest.raises(ValueError, match=message):
            iterate(mlp(), densities=densities)

    def test_one_wish_only(self):
        with pytest.raises(ValueError, match="exactly one of density="):
            iterate(mlp(), 0.5, densities=[1.0, 0.5])

    def test_no_draw_where_nothing_is_pruned(self):
        model = mlp()
        generator = torch.Generator().manual_seed(3)
        levels = iterate(model, densities=[1.0] * 3, criterion="random", generator=generator)
        before = generator.get_state()
        list(levels)
        assert torch.equal(generator.get_state(), before)


class TestNeeds:
    """Criteria that look at data get it, and what is missing is said before any training."""

    batches = ((torch.ones(2, 16), torch.tensor([0, 3])),)

    def seen(self, batches, **options):
        """Run a loop with a criterion that records what it was given."""
        records = []

        def record(weights, *, model, batches, masks, power=1):
            records.append((batches, masks, power, weights))
            return {name: w.abs() ** power for name, w in weights.items()}

        registry = sparse.CRITERIA
        row = copy.copy(registry["magnitude"])
        object.__setattr__(row, "method", record)
        object.__setattr__(row, "needs", ("model", "batches"))
        registry._entries["recorded"] = row
        try:
            model, levels = mlp(), []
            for level in iterate(model, levels=2, criterion="recorded", batches=batches, **options):
                levels.append(level)
                train_steps(model, torch.optim.SGD(model.parameters(), 0.1))  # masks not held
        finally:
            del registry._entries["recorded"]
        return levels, records

    def test_batches_as_given_or_fresh(self):
        levels, records = self.seen(self.batches, power=2)
        assert [record[0] for record in records] == [self.batches] * 2
        assert [record[1] for record in records] == [level.masks for level in levels[:2]]
        assert all(record[2] == 2 for record in records)
        _, records = self.seen(lambda index: [index])
        assert [record[0] for record in records] == [[1], [2]]

    def test_weights_are_masked_ones(self):
        levels, records = self.seen(self.batches)
        for level, record in zip(levels, records, strict=False):
            assert all(not w[~level.masks[n]].any() for n, w in record[3].items())

    def test_rounds_of_a_pruning(self):
        levels, records = self.seen(self.batches, iterations=3)
        assert len(records) == 6
        sizes = [record[1].nonzeros for record in records]
        for start in (0, 3):
            level = levels[start // 3].masks.nonzeros
            final = levels[start // 3 + 1].masks.nonzeros
            expected = [round(level * (final / level) ** (k / 3)) for k in range(3)]
            assert sizes[start : start + 3] == pytest.approx(expected, abs=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batches": None}, "criterion 'recorded' needs batches="),
            ({"powr": 3}, "did you mean 'power'"),
            ({"iterations": 0}, "iterations must be at least 1"),
        ],
    )
    def test_bad_needs(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.seen(**({"batches": self.batches} | options))


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32).div_(8).sub_(1)
    return inputs[:1400], torch.tensor(data.target)[:1400]


def test_cycles_lower_the_training_loss_on_digits():
    """Eight cycles of 4 epochs against one: the paper's effect at density 0.01."""
    inputs, targets = digits()
    torch.manual_seed(0)
    layers = []
    for fan_in in (64, 300):
        layers += [torch.nn.Linear(fan_in, 300), torch.nn.BatchNorm1d(300), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(300, 10))
    losses = []
    for cycle in cyclic(model, density=0.01, cycles=8, seed=0):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=4 * 14, cycle_momentum=False
        )
        with sparse.hold(model.train(), optimizer, cycle.masks):
            for _ in range(4):
                for rows in torch.randperm(1400).split(100):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                    optimizer.step()
                    rate.step()
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model.eval()(inputs), targets).item())
    assert losses[-1] < 0.7 * losses[0]
    kept = cycle.masks
    assert kept.nonzeros == round(0.01 * sum(prod(m.shape) for m in kept.values()))
