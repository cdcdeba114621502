"""What each method does to masks and weights, step by step, against slow oracles."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight import sparse
from featherweight.sparse import Masks, dynamic, gradual
from tests.models import mlp
from tests.oracles import dynamic as oracle

STEPS = 40


def network():
    return mlp(12, norm=False).double()


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(steps)]


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def compare(make, change, *, instead, masks):
    """Train by a method and by the oracle; weights, velocity and masks must agree at every step.

    Args:
        make: model and optimizer to the method attached to them.
        change: ``(training, steps taken, gradients)`` to whether the oracle changed its masks.
        instead: changes take the place of a step.
        masks: to begin with.
    """
    model = network()
    slow = oracle.Training(model, masks)
    optimizer = optimizer_of(model)
    evolving = make(model, optimizer)
    changes = 0
    for step, inputs in enumerate(batches()):
        before = evolving.masks
        gradients = slow.gradients(inputs)
        if not (instead and change(slow, step, gradients)):
            slow.step(gradients)
            if not instead:
                change(slow, step + 1, gradients)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert evolving.masks == Masks(slow.masks), step
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weight, slow.theta[name], rtol=1e-9, atol=1e-12)
            velocity = optimizer.state[weight].get("momentum_buffer")
            if velocity is not None:
                torch.testing.assert_close(velocity, slow.velocity[name], rtol=1e-9, atol=1e-12)
        changes += evolving.masks != before
    return evolving, changes


@pytest.mark.parametrize("inside", [False, True])
def test_rigl(inside):
    support = sparse.random(network(), 0.5, "uniform", seed=1) if inside else None
    masks = sparse.random(network(), 0.2, seed=0, support=support)

    def make(model, optimizer):
        return dynamic.rigl(
            model, optimizer, steps=STEPS, masks=masks, support=support, interval=4, fraction=0.4
        )

    def change(slow, step, gradients):
        if step % 4 or step >= 30:  # three quarters of 40
            return False
        share = oracle.cosine(step, 30, 0.4, 0)
        slow.put(
            {
                n: oracle.on_lists(
                    oracle.exchange,
                    mask,
                    slow.theta[n],
                    gradients[n],
                    count=int(share * int(mask.sum())),
                    support=None if support is None else support[n],
                )
                for n, mask in slow.masks.items()
            }
        )
        return True

    evolving, changes = compare(make, change, instead=True, masks=masks)
    assert changes >= 6
    assert evolving.masks.counts() == masks.counts()
    assert support is None or evolving.masks <= support


def draws(generator, mask):
    return torch.rand(mask.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_set(schedule):
    masks, draw = sparse.random(network(), 0.2, seed=0), torch.Generator().manual_seed(7)

    def make(model, optimizer):
        return dynamic.set(
            model, optimizer, steps=STEPS, masks=masks, interval=5, schedule=schedule, seed=7
        )

    def change(slow, step, gradients):
        if step % 5 or step >= STEPS:
            return
        share = 0.3 if schedule == "constant" else oracle.cosine(step, STEPS, 0.3, 0)
        slow.put(
            {
                n: oracle.on_lists(
                    oracle.rewire,
                    mask,
                    slow.theta[n].abs(),
                    draws(draw, mask),
                    count=int(share * int(mask.sum())),
                )
                for n, mask in slow.masks.items()
            }
        )

    evolving, changes = compare(make, change, instead=False, masks=masks)
    assert changes >= 6
    assert evolving.masks.counts() == masks.counts()


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_mest_em(weight):
    masks, draw = sparse.random(network(), 0.2, seed=0), torch.Generator().manual_seed(7)

    def make(model, optimizer):
        return dynamic.mest_em(
            model, optimizer, steps=STEPS, masks=masks, interval=3, gradient_weight=weight, seed=7
        )

    def change(slow, step, gradients):
        if step % 3 or step >= 30:  # 120 of 160 epochs
            return
        share = 0.2 if step < 22.5 else 0.1  # until 90 of 160 epochs
        slow.put(
            {
                n: oracle.on_lists(
                    oracle.rewire,
                    mask,
                    slow.theta[n].abs() + weight * gradients[n].abs(),
                    draws(draw, mask),
                    count=int(share * int(mask.sum())),
                )
                for n, mask in slow.masks.items()
            }
        )

    evolving, changes = compare(make, change, instead=False, masks=masks)
    assert changes == 9
    assert evolving.masks.counts() == masks.counts()


def test_mest_ems():
    masks, draw = sparse.random(network(), 0.2, seed=0), torch.Generator().manual_seed(7)
    own = masks.counts()

    def make(model, optimizer):
        return dynamic.mest_ems(model, optimizer, steps=STEPS, masks=masks, interval=3, seed=7)

    def change(slow, step, gradients):
        if (step % 3 or step >= 30) and step != 30:
            return
        share = 0.5 if step < 22.5 else 0.25 if step < 30 else 0
        new = {}
        for n, mask in slow.masks.items():
            flat = mask.flatten().tolist()
            active = [i for i, on in enumerate(flat) if on]
            kept = oracle.best(slow.theta[n].abs().flatten().tolist(), own[n], active)
            free = [i for i, on in enumerate(flat) if not on]
            random = draws(draw, mask).flatten().tolist()
            grown = oracle.best(random, min(int(share * own[n]), len(free)), free)
            new[n] = torch.tensor([i in kept + grown for i in range(len(flat))]).view(mask.shape)
            assert len(kept) == own[n]
        slow.put(new)

    evolving, changes = compare(make, change, instead=False, masks=masks)
    assert changes == 10
    assert evolving.masks.counts() == own


@pytest.mark.parametrize("inside", [False, True])
def test_granet(inside):
    support = sparse.random(network(), 0.7, "uniform", seed=1) if inside else None
    masks = sparse.random(network(), 0.5, seed=0, support=support)
    total = round(0.1 * masks.numel)

    def make(model, optimizer):
        return dynamic.granet(
            model,
            optimizer,
            0.1,
            steps=STEPS,
            masks=masks,
            support=support,
            interval=5,
            begin=5,
            end=28,
        )

    def change(slow, step, gradients):
        if not (step == 28 or (step % 5 == 0 and 5 <= step < STEPS)):
            return
        left = (1 - min(1, (step - 5) / 23)) ** 3
        weights = {n: slow.theta[n] for n in masks}
        slow.put(
            oracle.keep_largest(weights, round(total + (masks.nonzeros - total) * left), slow.masks)
        )
        share = oracle.cosine(step, STEPS, 0.5, 0.005)
        slow.put(
            {
                n: oracle.on_lists(
                    oracle.exchange,
                    mask,
                    slow.theta[n],
                    gradients[n],
                    count=int(share * int(mask.sum())),
                    support=None if support is None else support[n],
                )
                for n, mask in slow.masks.items()
            }
        )

    evolving, changes = compare(make, change, instead=False, masks=masks)
    assert changes >= 6
    assert evolving.masks.nonzeros == total
    assert support is None or evolving.masks <= support


@pytest.mark.parametrize("degree", [3, 1])
def test_gmp(degree):
    dense = Masks.dense(network())
    total = round(0.1 * dense.numel)
    schedule = {3: "cubic", 1: "linear"}[degree]
    counts = {}

    def make(model, optimizer):
        return gradual.gmp(model, optimizer, 0.1, steps=STEPS, interval=5, schedule=schedule)

    def change(slow, step, gradients):
        if not (step == 32 or (step % 5 == 0 and 8 <= step < 32)):  # 0.2 and 0.8 of 40
            return
        left = (1 - (step - 8) / 24) ** degree
        counts[step] = round(total + (dense.numel - total) * left)
        weights = {n: slow.theta[n] for n in dense}
        before = slow.masks
        slow.put(oracle.keep_largest(weights, counts[step], slow.masks))
        assert Masks(slow.masks) <= Masks(before)

    evolving, changes = compare(make, change, instead=False, masks=dense)
    assert len(counts) == 6
    assert changes >= 5
    assert evolving.masks.nonzeros == counts[32] == total


def test_gmp_whose_weights_recover():
    """A pruned weight rests at its value and comes back when kept ones are smaller."""
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    set_(model, [1.0, 2.0, 3.0, 4.0])
    with gradual.gmp_recoverable(
        model, optimizer, 0.5, steps=4, interval=1, begin=0, end=3, schedule="linear"
    ) as evolving:
        assert evolving.masks.nonzeros == 4
        move(model, optimizer, [0, 0, 0, 0])
        assert kept(evolving) == [0, 1, 1, 1]  # round(4 - 2/3) = 3
        move(model, optimizer, [0, 0, -2.5, 0])  # 3 becomes 0.5: under the resting 1
        assert kept(evolving) == [1, 1, 0, 1]
        assert model.weight.flatten().tolist() == [1.0, 2.0, 0.0, 4.0]
        move(model, optimizer, [0, -1.8, 0, 0])  # 2 becomes 0.2: under 0.5, but two are kept
        assert kept(evolving) == [1, 0, 0, 1]
        move(model, optimizer, [0, 0, 0, -3.9])  # pruning has ended
        assert kept(evolving) == [1, 0, 0, 1]


def test_gmp_whose_weights_do_not_recover():
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    set_(model, [1.0, 2.0, 3.0, 4.0])
    evolving = gradual.gmp(
        model, optimizer, 0.5, steps=4, interval=1, begin=0, end=3, schedule="linear"
    )
    move(model, optimizer, [0, 0, 0, 0])
    move(model, optimizer, [0, 0, -2.5, 0])
    assert kept(evolving) == [0, 1, 1, 1]
    move(model, optimizer, [0, 0, 0, 0])
    assert kept(evolving) == [0, 1, 0, 1]


def set_(model, values):
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))


def move(model, optimizer, change):
    model.weight.grad = -torch.tensor([change], dtype=torch.float32)
    optimizer.step()


def kept(evolving):
    return evolving.masks["weight"].flatten().int().tolist()


def test_acdc():
    dense = Masks.dense(network())
    total = round(0.1 * dense.numel)
    turns = {4: "s", 6: "d", 8: "s", 10: "d", 12: "s", 14: "d", 16: "s", 18: "d"}
    turns |= {20: "s", 22: "d", 24: "s", 26: "d", 28: "s", 30: "d", 34: "s"}  # 10, 15, ... of 100

    def make(model, optimizer):
        return gradual.acdc(model, optimizer, 0.1, steps=STEPS)

    def change(slow, step, gradients):
        if turns.get(step) == "s":
            slow.put(oracle.keep_largest({n: slow.theta[n] for n in dense}, total, slow.masks))
        elif turns.get(step) == "d":
            slow.put(dict(dense))

    evolving, changes = compare(make, change, instead=False, masks=dense)
    assert changes == 15
    assert evolving.masks.nonzeros == total


def test_the_published_phases():
    assert gradual.acdc_phases(100) == [
        (0, 10, "dense"),
        *((e, e + 5, "sparse" if e % 10 == 0 else "dense") for e in range(10, 75, 5)),
        (75, 85, "dense"),
        (85, 100, "sparse"),
    ]


@given(st.integers(20, 5000))
def test_phases_of_any_training_leave_no_gap(steps):
    phases = gradual.acdc_phases(steps)
    assert phases[0][0] == 0
    assert phases[-1][1:] == (steps, "sparse")
    for (_, end, kind), (begin, _, following) in itertools.pairwise(phases):
        assert end == begin
        assert {kind, following} == {"dense", "sparse"}
    assert all(begin < end for begin, end, _ in phases)


@given(
    st.floats(0, 1),
    st.floats(1e-3, 1),
    st.floats(1e-3, 1),
    st.sampled_from(sorted(dynamic.SCHEDULES)),
)
def test_schedules_meet_their_ends_and_stay_between(progress, start, end, name):
    shape = dynamic.SCHEDULES[name].method
    assert shape(0.0, start, end) == start
    assert shape(1.0, start, end) == (start if name == "constant" else pytest.approx(end))
    assert min(start, end) - 1e-9 <= shape(progress, start, end) <= max(start, end) + 1e-9


def test_schedules_by_their_formulas():
    assert dynamic.cubic(1.0, 0.9, 0.3) == 0.3
    assert dynamic.cosine(1.0, 0.3, 0.0) == 0.0
    assert dynamic.cubic(0.5, 1.0, 0.2) == pytest.approx(0.2 + 0.8 / 8)
    assert dynamic.cosine(0.5, 0.3, 0.1) == pytest.approx(0.2)
    assert dynamic.cosine(1 / 3, 1.0, 0.0) == pytest.approx(0.75)
    assert dynamic.exponential(0.5, 1.0, 0.01) == pytest.approx(0.1)
    assert dynamic.linear(0.25, 1.0, 0.0) == pytest.approx(0.75)
    assert dynamic.polynomial(0.5, 1.0, 0.0, degree=4) == pytest.approx(1 / 16)
    with pytest.raises(ValueError, match="over 0"):
        dynamic.exponential(0.5, 0.3, 0.0)
    table = ((0, 0.2), (0.5, 0.1), (0.75, 0))
    assert [dynamic.stairs(p, table) for p in (0, 0.49, 0.5, 0.74, 0.75, 1)] == [
        0.2,
        0.2,
        0.1,
        0.1,
        0,
        0,
    ]
    for bad in ((), ((0.1, 1),), ((0, 1), (0, 0.5))):
        with pytest.raises(ValueError, match="must rise from 0"):
            dynamic.stairs(0.5, bad)


@given(st.data())
def test_exchange_and_rewire_with_ties(data):
    """Few different values, so that ties are everywhere."""
    size = data.draw(st.integers(1, 12))
    few = st.lists(st.integers(-2, 2), min_size=size, max_size=size)
    weight, gradient = (torch.tensor(data.draw(few)).float() for _ in range(2))
    support = torch.tensor(data.draw(few)) > -2
    mask = (torch.tensor(data.draw(few)) > 0) & support
    count = data.draw(st.integers(0, int(mask.sum())))
    found = dynamic.exchange(mask, weight, gradient, count, support)
    slow = oracle.on_lists(oracle.exchange, mask, weight, gradient, count=count, support=support)
    assert torch.equal(found, slow)
    assert found.sum() == mask.sum()
    assert not (found & ~support).any()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = dynamic.rewire(mask, weight.abs(), count, generators[0], support)
    slow = oracle.on_lists(
        oracle.rewire,
        mask,
        weight.abs(),
        draws(generators[1], mask),
        count=count,
        support=support,
    )
    assert torch.equal(found, slow)
    assert found.sum() == mask.sum()


def test_drop_and_grow_by_hand():
    mask = torch.tensor([True, True, True, False, False])
    weight = torch.tensor([0.3, -0.1, 2.0, 0.0, 0.0])
    gradient = torch.tensor([0.0, 5.0, 0.0, 1.0, -3.0])
    assert dynamic.drop(mask, weight.abs(), 1).int().tolist() == [1, 0, 1, 0, 0]
    assert dynamic.grow(mask, gradient.abs(), 1).int().tolist() == [1, 1, 1, 0, 1]
    assert dynamic.exchange(mask, weight, gradient, 1).equal(mask)  # dropped and grown again
    gradient[1] = 2.0
    assert dynamic.exchange(mask, weight, gradient, 1).int().tolist() == [1, 0, 1, 0, 1]


def test_random_growth_is_uniform():
    mask = torch.zeros(20, dtype=torch.bool)
    mask[:5] = True
    worth = torch.arange(20.0)
    generator = torch.Generator().manual_seed(0)
    grown = torch.zeros(20)
    for _ in range(1500):
        grown += dynamic.rewire(mask, worth, 2, generator).float()
    assert grown[:2].sum() == 0  # dropped: the two of least worth
    assert (grown[2:5] == 1500).all()
    expected = 1500 * 2 / 15
    assert ((grown[5:] - expected) ** 2 / expected).sum() < 40  # chi-square, 14 degrees of freedom
