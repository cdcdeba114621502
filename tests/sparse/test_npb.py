"""Node-path balancing: optimal in each layer, exact counts, every entry on a path."""

import copy

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse import Masks, on_path
from featherweight.sparse.constructions import npb
from featherweight.sparse.constructions.balance import kernel_counts
from featherweight.sparse.constructions.reconnect import reconnect
from featherweight.sparse.density import allocate, kept_counts
from tests.models import ConvNet, mlp
from tests.oracles import npb as oracle


def solve(paths, room, count, alpha, beta, seed=0):
    """Return the table of one group as nested lists."""
    table = kernel_counts(
        torch.tensor([paths], dtype=torch.float64),
        torch.tensor([room]),
        count,
        alpha=alpha,
        beta=beta,
        generator=torch.Generator().manual_seed(seed),
    )
    assert int(table.sum()) == count
    assert (table >= 0).all()
    assert (table <= torch.tensor([room])).all()
    return table[0].tolist()


def draw(generator, below):
    return int(torch.randint(below, (), generator=generator))


SETTINGS = [(0.01, 1.0), (0.0, 1.0), (0.5, 0.0), (0.9, 0.3), (1.0, 2.0), (0.01, 0.0)]


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_the_optimum_of_all_tables(alpha, beta):
    generator = torch.Generator().manual_seed(0)
    for outs, ins, limit in ((2, 2, 2), (3, 2, 2), (2, 3, 1), (1, 3, 3), (2, 4, 1)):
        room = [[limit] * ins for _ in range(outs)]
        for _ in range(3):
            paths = [draw(generator, 5) for _ in range(ins)]
            for count in range(1, outs * ins * limit + 1, 2):
                best = oracle.brute_force(paths, room, count, alpha, beta)
                table = solve(paths, room, count, alpha, beta)
                found = oracle.objective(table, paths, room, count, alpha, beta)
                assert found == pytest.approx(best, abs=1e-12)
                relaxed = oracle.linear_program(paths, room, count, alpha, beta)
                assert relaxed == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_the_optimum_of_the_linear_program(alpha, beta):
    generator = torch.Generator().manual_seed(1)
    for outs, ins, limit in ((16, 12, 9), (10, 30, 1), (24, 8, 4)):
        room = [[limit] * ins for _ in range(outs)]
        paths = [float(draw(generator, 40) ** 2) for _ in range(ins)]
        for density in (0.02, 0.1, 0.3, 0.9):
            count = round(density * outs * ins * limit)
            table = solve(paths, room, count, alpha, beta)
            found = oracle.objective(table, paths, room, count, alpha, beta)
            best = oracle.linear_program(paths, room, count, alpha, beta)
            assert found == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_the_bound_inside_a_support(alpha, beta):
    generator = torch.Generator().manual_seed(2)
    for trial in range(12):
        outs, ins = 3 + trial % 4, 5
        room = (torch.rand(outs, ins, generator=generator) < 0.4).long() * (1 + trial % 2)
        paths = [float(draw(generator, 9)) for _ in range(ins)]
        count = int(room.sum()) * 2 // 3
        table = solve(paths, room.tolist(), count, alpha, beta)
        found = oracle.objective(table, paths, room.tolist(), count, alpha, beta)
        best = oracle.linear_program(paths, room.tolist(), count, alpha, beta)
        unused = sum(any(r) and not any(t) for r, t in zip(room.tolist(), table, strict=True))
        assert best - alpha / (outs + ins) * unused - 1e-9 <= found <= best + 1e-9


def test_groups_share_the_count_at_best():
    """Two groups are one layer whose kernels between groups hold nothing."""
    generator = torch.Generator().manual_seed(3)
    for alpha, beta in SETTINGS:
        paths = torch.randint(5, (2, 3), generator=generator).double()
        for count in (2, 5, 9, 20):
            rooms = torch.full((2, 2, 3), 2)
            table = kernel_counts(paths, rooms, count, alpha=alpha, beta=beta, generator=generator)
            assert int(table.sum()) == count
            whole, room = torch.block_diag(*table), torch.block_diag(*rooms).long().tolist()
            arguments = (paths.flatten().tolist(), room, count, alpha, beta)
            found = oracle.objective(whole.tolist(), *arguments)
            assert found == pytest.approx(oracle.linear_program(*arguments), abs=1e-7)


def test_equal_inputs_are_served_evenly():
    table = torch.tensor(solve([1.0] * 6, [[9] * 6 for _ in range(4)], 30, 0.01, 1.0))
    assert table.sum(0).tolist() == [5] * 6
    assert table.max() - table.min() <= 1
    assert table.sum(1).max() - table.sum(1).min() <= 1


CASES = {
    "mlp": (mlp, (2, 16)),
    "convnet": (ConvNet, (2, 3, 8, 8)),
    "resnet20": (
        lambda: models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0),
        (1, 3, 32, 32),
    ),
    "vgg-thin": (
        lambda: models.build("vgg16", classes=10, shape=(3, 32, 32), seed=0, width=8),
        (1, 3, 32, 32),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 6, 3, groups=3)
        ),
        (1, 6, 5, 5),
    ),
}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.03])
@pytest.mark.parametrize("case", CASES)
def test_exact_and_every_entry_on_a_path(case, density):
    make, shape = CASES[case]
    model, inputs = make(), torch.ones(shape)
    masks = npb(model, density, inputs=inputs, seed=0)
    assert masks.nonzeros == round(density * masks.numel)
    assert on_path(masks, model, inputs) == masks
    assert list(masks) == list(Masks.dense(model))


@pytest.mark.parametrize("rule", ["uniform", "er", "erk", "balanced"])
def test_layers_keep_what_the_rule_gives_them(rule):
    model, inputs = mlp(60), torch.ones(1, 16)
    masks = npb(model, 0.2, rule, inputs=inputs, alpha=0.9, seed=0)
    shapes = {name: mask.shape for name, mask in masks.items()}
    wanted = kept_counts(allocate(shapes, 0.2, rule), shapes, round(0.2 * masks.numel))
    assert masks.counts() == wanted


def test_paths_are_counted_through_the_layers_before():
    """The hidden unit with three in-edges is the one to lead on."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 4, bias=False))
    support = Masks(
        {
            "0.weight": torch.tensor([[True, False, False], [True, True, True]]),
            "2.weight": torch.ones(4, 2).bool(),
        }
    )
    shares = {"0.weight": 4 / 6, "2.weight": 5 / 8}
    masks = npb(model, 9 / 14, shares, inputs=torch.ones(1, 3), alpha=0.0, support=support, seed=0)
    assert masks["2.weight"][:, 1].all()


def test_spread_and_limit_of_kernels():
    """The first channel is reached by nine paths, the three others by one each."""
    model, inputs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 16, 3)), torch.ones(1, 1, 5, 5)
    first = torch.zeros(4, 1, 3, 3).bool()
    first[0], first[1:, :, 1, 1] = True, True
    support = Masks({"0.weight": first, "1.weight": torch.ones(16, 4, 3, 3).bool()})

    def kernels(count, **options):
        shares = {"0.weight": 12 / 36, "1.weight": count / 576}
        options |= {"inputs": inputs, "support": support, "alpha": 0.5, "seed": 0}
        masks = npb(model, (12 + count) / 612, shares, **options)
        return masks["1.weight"].sum((2, 3))

    assert (kernels(60, beta=10.0) > 0).sum() == 60
    assert kernels(60, beta=0.0).sum(0).tolist() == [57, 1, 1, 1]  # all but what the units ask
    assert kernels(60, beta=0.0, max_kernel=3).sum(0).tolist()[0] == 48
    assert kernels(60, beta=0.0, max_kernel=3).max() == 3
    assert kernels(288, max_kernel=3).max() == 5  # the least that is enough for 288 in 64


def test_lost_entries_go_to_the_fullest_used_kernels():
    model, inputs = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 1, 1)), torch.ones(1, 2, 3, 3)
    first = torch.zeros(2, 2, 9).bool()
    first[0, 0, :3] = first[0, 1, 0] = first[1, 0, 0] = True  # output 1 leads nowhere
    second = torch.tensor([True, False]).view(1, 2, 1, 1)
    masks = Masks({"0.weight": first.view(2, 2, 3, 3), "1.weight": second})
    generator = torch.Generator().manual_seed(0)
    found = reconnect(masks, Masks.dense(model), model, inputs, generator)
    assert found["0.weight"].sum((2, 3)).tolist() == [[4, 1], [0, 0]]
    assert torch.equal(found["1.weight"], second)


def test_units_against_paths():
    """A support of one well-reached input and many others: alpha decides."""
    paths, room = [100.0] + [1.0] * 7, [[1] * 8 for _ in range(8)]
    narrow, wide = (torch.tensor(solve(paths, room, 8, a, 0.0)) for a in (0.0, 0.99))
    assert (narrow.sum(0) > 0).sum() == 1
    assert (wide.sum(0) > 0).sum() == 8


def test_model_and_random_state_are_untouched():
    model = ConvNet().train()
    model.head.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tensors = {n: id(p) for n, p in model.named_parameters()}
    inputs = torch.ones(2, 3, 8, 8)
    first = npb(model, 0.1, inputs=inputs, seed=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(t.dtype == before[n].dtype for n, t in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.norm.training
    assert not model.head.weight.requires_grad
    assert not model.stem._forward_pre_hooks
    compiled = torch.compile(model, backend="eager")
    generator = torch.Generator().manual_seed(3)
    assert first == npb(compiled, 0.1, inputs=inputs, generator=generator)
    assert first != npb(model, 0.1, inputs=inputs, seed=4)


def test_weights_do_not_matter():
    inputs = torch.ones(1, 16)
    assert npb(mlp(), 0.1, inputs=inputs, seed=0) == npb(mlp(seed=5), 0.1, inputs=inputs, seed=0)


def test_support_and_excluded_layers():
    model, inputs = mlp(), torch.ones(1, 16)
    support = sparse.random(model, 0.5, seed=0)
    masks = npb(model, 0.2, inputs=inputs, support=support, seed=0)
    assert masks <= support
    assert masks.nonzeros == round(0.2 * masks.numel)
    part = npb(model, sparsity=0.8, inputs=inputs, seed=0, exclude=["3.*"])
    assert list(part) == ["0.weight", "6.weight"]
    assert part.nonzeros == round(0.2 * part.numel)
    with pytest.raises(ValueError, match="are to be kept but only"):
        npb(model, 0.8, inputs=inputs, support=support, seed=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1.1"),
        ({"alpha": float("nan")}, "alpha must lie"),
        ({"beta": -1.0}, "beta must be at least 0, got -1"),
        ({"max_kernel": 0}, "max_kernel must be at least 1, got 0"),
        ({"allocation": "none"}, "unknown density rule 'none'"),
        ({"include": ["0.weight", "1.weight"]}, "'1.weight' is not the weight of a linear"),
        ({"density": 2 / 1056}, "nothing that fits|make no path"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        npb(mlp(), **{"density": 0.1, "inputs": torch.ones(1, 16), "seed": 0, **options})


def test_a_layer_without_part_is_refused():
    model = mlp()
    model[0].spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"'0.spare.weight' takes no part in the forward pass"):
        npb(model, 0.1, inputs=torch.ones(1, 16), seed=0)
