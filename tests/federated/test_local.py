import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from featherweight.federated.backends import choose
from featherweight.federated.layout import Layout
from featherweight.federated.local import Adam, Local, Sgd, full_gradients, losses_of_classes
from featherweight.federated.population import Population
from featherweight.federated.schedules import (
    exponential,
    inverse_linear,
    inverse_square_root,
    rate_at,
    warmup,
)
from featherweight.federated.sequential import Sequential
from featherweight.federated.stack import stack_of
from featherweight.federated.streams import mix, shuffles, stream
from featherweight.federated.vectorized import Vectorized, masked_mean
from featherweight.federated.work import plan
from tests.federated.networks import SIZES, digits_like, network

POPULATION = digits_like()
EVERYONE = torch.arange(len(SIZES))


def planned(steps, batch_size, cohort=EVERYONE, round=0, seed=7, limit=100):
    return plan(
        POPULATION, cohort, steps, batch_size=batch_size, round=round, seed=seed, limit=limit
    )


def visited(groups):
    """Return for each client the examples of each of its steps, in ascending order."""
    found = {}
    for work in groups:
        for step, rows in enumerate(work.active):
            indices, mask = work.batch(step, rows)
            for row in range(rows):
                own = indices[row] if mask is None else indices[row][mask[row]]
                found.setdefault(int(work.clients[row]), []).append(sorted(own.tolist()))
    return found


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 12, 50])
@pytest.mark.parametrize("epochs", [1, 3])
def test_each_epoch_visits_each_example_once_and_keeps_the_last_batch(batch_size, epochs):
    local = Local(0.1, epochs=epochs, batch_size=batch_size)
    groups = planned(local.steps_of(0, EVERYONE, POPULATION), batch_size)
    counts = {}
    for work in groups:
        counts.update(zip(work.clients.tolist(), work.counts().tolist(), strict=True))
    for client, batches in visited(groups).items():
        size = SIZES[client]
        width = min(batch_size or size, size)
        per_epoch = -(-size // width)
        assert len(batches) == epochs * per_epoch
        assert counts[client] == epochs * size == sum(map(len, batches))
        for epoch in range(epochs):
            part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
            own = sorted(example for batch in part for example in batch)
            assert own == POPULATION.clients[client].tolist()
            assert [len(batch) for batch in part[:-1]] == [width] * (per_epoch - 1)


def test_each_epoch_is_shuffled_anew():
    batches = visited(planned(torch.full((6,), 6), 4))[3]  # 12 examples, three batches an epoch
    assert sorted(batches[:3]) != sorted(batches[3:])


def test_steps_that_end_within_an_epoch_are_counted_exactly():
    steps = torch.tensor([1, 2, 3, 4, 5, 6])
    groups = planned(steps, 5)
    for work in groups:
        for client, count in zip(work.clients.tolist(), work.counts().tolist(), strict=True):
            assert sum(map(len, visited(groups)[client])) == count


def test_batches_depend_on_seed_round_and_client_alone():
    steps = torch.full((6,), 5)
    together = visited(planned(steps, 4))
    for client in range(6):
        alone = visited(planned(steps[:1], 4, cohort=torch.tensor([client])))
        assert alone[client] == together[client]
    assert visited(planned(steps, 4, limit=2)) == together
    assert visited(planned(steps, 4, round=1)) != together
    assert visited(planned(steps, 4, seed=8)) != together


def test_epochs_and_clients_are_shuffled_differently_and_uniformly():
    found = shuffles(3, 0, torch.arange(3000), torch.full((3000,), 3), 2)
    assert (found[:, 0] != found[:, 1]).any(1).float().mean() > 0.7
    kinds, counts = found.view(-1, 3).unique(dim=0, return_counts=True)
    assert len(kinds) == 6
    expected = 1000.0
    chi_squared = ((counts - expected).square() / expected).sum()
    assert chi_squared < 20.5  # its 0.999 quantile with 5 degrees of freedom


def test_hashes_and_streams_are_pinned():
    # splitmix64 from state 0: the first outputs of the published generator
    import numpy as np

    state = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert stream(0, "batches") != stream(1, "batches") != stream(0, "cohort")
    assert stream(5, "noise", 3) == stream(5, "noise", 3)
    assert 0 <= stream(2**80, "x") < 2**63


@pytest.mark.parametrize("sizes", [(1, 100), (4, 4, 4), (1, 2, 3, 4, 60, 70)])
def test_clients_of_very_unequal_size_are_grouped_and_none_is_lost(sizes):
    population = digits_like(sizes)
    cohort = torch.arange(len(sizes))
    options = {"batch_size": None, "round": 0, "seed": 0, "limit": 2}
    groups = plan(population, cohort, torch.full((len(sizes),), 2), **options)
    places = torch.cat([work.places for work in groups])
    assert places.sort().values.tolist() == cohort.tolist()
    assert max(len(work.clients) for work in groups) <= 2
    for work in groups:
        assert work.width < 2 * int(work.sizes.min()) or work.width * 2 <= 2 * sum(sizes)


def conv_network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize(
    ("model", "shape", "how"),
    [
        (network(), (6,), "batched matrix products"),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False)), (2, 3), "batched"),
        (nn.Linear(6, 3), (6,), "batched"),
        (nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)), (6,), "vmap"),
        (conv_network(), (1, 2, 2), "vmap"),
    ],
)
def test_side_by_side_equals_a_loop_on_padded_batches(model, shape, how):
    population = digits_like(shape=shape)
    fast = choose(model, losses_of_classes, population, "auto")
    assert fast.name == "vectorized"
    assert how in fast.reason
    slow = Sequential(model, losses_of_classes)
    layout = Layout.of(model)
    weights = layout.read(model).expand(6, -1) + 0.1 * torch.randn(6, layout.length)
    work = plan(
        population, EVERYONE, torch.ones(6).long(), batch_size=None, round=0, seed=0, limit=9
    )
    for group in work:
        indices, mask = group.batch(0, len(group.clients))
        rows = weights[group.places]
        batch = (population.inputs[indices], population.targets[indices], mask)
        for mine, theirs in zip(fast.backend(rows, *batch), slow(rows, *batch), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_padding_that_is_not_finite_is_harmless():
    losses = torch.tensor([[1.0, float("inf")], [2.0, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    masked_mean(losses, mask).sum().backward()
    assert losses.grad.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert masked_mean(losses, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_full_gradients_are_those_of_all_examples_whatever_the_batches():
    model = network()
    backend, layout = Vectorized(model, losses_of_classes), Layout.of(model)
    (work,) = plan(
        POPULATION, EVERYONE, torch.ones(6).long(), batch_size=4, round=0, seed=0, limit=9
    )
    for width in (4, 12):
        found = full_gradients(backend, work, layout.read(model), width)
        for row, client in zip(found, work.clients.tolist(), strict=True):
            inputs, targets = POPULATION.client(client)
            loss = cross_entropy(model(inputs), targets)
            expected = torch.autograd.grad(loss, list(model.parameters()))
            flat = torch.cat([g.reshape(-1) for g in expected])
            torch.testing.assert_close(row, flat, rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 3)
        self.out.bias.requires_grad_(False)

    def forward(self, x):
        return self.out(self.second(self.first(x).relu()))


def test_tied_and_frozen_parameters_count_once_and_not_at_all():
    model = Shared()
    layout = Layout.of(model)
    assert layout.length == 36 + 6 + 6 + 18
    fast, slow = (kind(model, losses_of_classes) for kind in (Vectorized, Sequential))
    batch = (POPULATION.inputs[:8].view(2, 4, 6), POPULATION.targets[:8].view(2, 4), None)
    rows = layout.read(model).expand(2, -1)
    torch.testing.assert_close(fast(rows, *batch)[1], slow(rows, *batch)[1], rtol=1e-5, atol=1e-6)
    copied = layout.read(model) + 1
    layout.write_(model, copied)
    assert torch.equal(layout.read(model), copied)


def test_a_stack_is_only_what_it_knows():
    def stacked(model):
        return stack_of(model, Layout.of(model).names) is not None

    hooked = network()
    hooked[0].register_forward_hook(lambda *_: None)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    assert stacked(nn.Sequential(network(), nn.GELU()))
    for model in (
        hooked,
        tied,
        conv_network(),
        Shared(),
        nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)),
    ):
        assert not stacked(model)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_auto_falls_back_to_a_loop_and_says_why():
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    chosen = choose(normed, losses_of_classes, POPULATION, "auto")
    assert chosen.name == "sequential"
    assert chosen.reason == "1 is a BatchNorm1d, which mixes a batch's examples"
    branching = choose(Branching(6, 3), losses_of_classes, POPULATION, "auto")
    assert branching.name == "sequential"
    assert "data-dependent control flow" in branching.reason
    with pytest.raises(ValueError, match="backend='vectorized' can't run Branching"):
        choose(Branching(6, 3), losses_of_classes, POPULATION, "vectorized")
    with pytest.raises(ValueError, match="unknown backend 'loop'"):
        choose(network(), losses_of_classes, POPULATION, "loop")


def test_a_loss_must_be_one_an_example():
    with pytest.raises(ValueError, match=r"one loss an example, .* reduction='none'"):
        choose(network(), cross_entropy, POPULATION, "auto")


def test_layout_refuses_what_is_no_one_vector():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(TypeError, match="one dtype and device"):
        Layout.of(mixed)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Layout.of(nn.ReLU())


def test_learning_rates_follow_the_round():
    assert [exponential(1.0, 0.5, every=2)(r) for r in range(4)] == [1.0, 1.0, 0.5, 0.5]
    assert [inverse_linear(1.0, 2.0)(r) for r in (0, 2, 6)] == [1.0, 0.5, 0.25]
    assert [inverse_square_root(1.0, 1.0)(r) for r in (0, 3)] == [1.0, 0.5]
    assert [warmup(4.0, 4)(r) for r in (0, 1, 3, 9)] == [1.0, 2.0, 4.0, 4.0]
    assert warmup(exponential(4.0, 0.5), 2)(1) == 2.0
    assert rate_at(0.5, 100) == 0.5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Local(0.1), "exactly one of epochs= and steps="),
        (lambda: Local(0.1, epochs=1, steps=2), "exactly one"),
        (lambda: Local(0.1, epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Local(0.1, steps=0), "steps"),
        (lambda: Local(0.1, steps=1, batch_size=0), "batch_size"),
        (lambda: Local(-0.1, steps=1), "learning_rate"),
        (lambda: Local(float("nan"), steps=1), "learning_rate"),
        (lambda: Sgd(momentum=1.0), "momentum"),
        (lambda: Sgd(nesterov=True), "nesterov needs momentum"),
        (lambda: Sgd(weight_decay=-1.0), "weight_decay"),
        (lambda: Adam(betas=(1.0, 0.9)), "betas"),
        (lambda: Adam(epsilon=0.0), "epsilon"),
        (lambda: exponential(1.0, 0.0), "decay"),
        (lambda: inverse_linear(1.0, -1.0), "scale"),
        (lambda: warmup(1.0, 0), "rounds"),
        (lambda: Population(torch.zeros(2), torch.zeros(3), (torch.arange(2),)), "one length"),
        (lambda: Population(torch.zeros(2), torch.zeros(2), ()), "at least one client"),
        (
            lambda: Population(torch.zeros(2), torch.zeros(2), (torch.tensor([2]),)),
            r"clients\[0\] must index \[0, 2\), got 2",
        ),
        (
            lambda: Population(torch.zeros(2), torch.zeros(2), (torch.arange(0),)),
            r"clients\[0\] holds no example",
        ),
    ],
)
def test_refuses_a_bad_argument(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_refuses_indices_that_are_not_int64():
    with pytest.raises(TypeError, match=r"clients\[0\] must be a 1-D int64 tensor"):
        Population(torch.zeros(2), torch.zeros(2), (torch.zeros(1),))


@pytest.mark.parametrize(
    "steps",
    [torch.ones(3).long(), torch.ones(6), torch.zeros(6).long(), lambda r, c: torch.ones(2).long()],
)
def test_refuses_steps_that_are_not_one_a_client(steps):
    with pytest.raises(ValueError, match="steps must"):
        Local(0.1, steps=steps).steps_of(0, torch.arange(6), POPULATION)


def test_steps_by_client_and_by_round():
    steps = Local(0.1, steps=torch.arange(1, 7)).steps_of(0, torch.tensor([4, 1]), POPULATION)
    assert steps.tolist() == [5, 2]
    growing = Local(0.1, steps=lambda round, cohort: cohort + round)
    assert growing.steps_of(3, torch.tensor([4, 1]), POPULATION).tolist() == [7, 4]
