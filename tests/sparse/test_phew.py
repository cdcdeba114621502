"""PHEW: the law of its walks, exact counts, paths, and the graph it walks on."""

import copy
import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse import Masks, on_path
from featherweight.sparse.constructions import phew
from featherweight.sparse.constructions.graph import unit_graph
from featherweight.sparse.constructions.union import choose_sum, fill
from featherweight.sparse.constructions.walks import Rows, Walks
from tests.models import ConvNet, mlp
from tests.oracles import phew as oracle


def dense_chain(*widths, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths)))


class Residual(nn.Module):
    """Two convolutions around which a third goes, then a linear layer on the flattened image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(1, 2, 1)
        self.inner = nn.Conv2d(2, 2, (1, 3), padding=(0, 1))
        self.short = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.inner(x) + self.short(x)).relu().flatten(1))


def entries(masks):
    return frozenset((n, *i.tolist()) for n, mask in masks.items() for i in mask.nonzero())


def two_samples(first, second):
    """Return the p-value of both being drawn from one law; rare outcomes are pooled."""
    common = [k for k in first | second if first[k] + second[k] >= 20]
    rest = [sum(c.values()) - sum(c[k] for k in common) for c in (first, second)]
    rows = [[c[k] for k in common] for c in (first, second)]
    if sum(rest) >= 20:
        rows = [[*row, r] for row, r in zip(rows, rest, strict=True)]
    assert len(rows[0]) > 3
    return stats.chi2_contingency(rows).pvalue


def masks_of_many_seeds(model, inputs, keep, runs):
    """Draw masks with the graph looked up once."""
    dense = Masks.dense(model)
    weights = dense.weights(model)
    mass = {name: weight.detach().abs() for name, weight in weights.items()}
    walks = Walks(unit_graph(model, inputs), mass, weights, torch.Generator().manual_seed(0))
    for _ in range(runs):
        walks._number = 0
        yield entries(fill(dense ^ dense, keep, walks, model, inputs))


@pytest.mark.parametrize("keep", [3, 5])
def test_the_law_of_masks_of_a_chain(keep):
    model = dense_chain(2, 2, 2, 2)
    weights = Masks.dense(model).weights(model)
    layers = {n: [[[w] for w in row] for row in t.tolist()] for n, t in weights.items()}
    names = list(layers)
    readers = dict(zip(names, [*([n] for n in names[1:]), ["end"]], strict=True))
    net, rng = oracle.Net(layers, readers, names[:1]), random.Random(0)
    slow = Counter(
        frozenset((n, o, i) for n, o, i, _ in oracle.phew(net, keep, rng)) for _ in range(3000)
    )
    fast = Counter(masks_of_many_seeds(model, torch.ones(1, 2), keep, 300))
    assert two_samples(slow, fast) > 0.001


def test_the_law_of_single_walks_at_branches_and_kernels():
    """The first walk is forward: kernels by their elements, branches alike, copies alike."""
    model, inputs = Residual(), torch.ones(1, 1, 1, 2)
    convolutions = ("stem", "inner", "short")
    layers = {n: model.get_submodule(n).weight.flatten(2).tolist() for n in convolutions}
    layers["head"] = [[[w] for w in model.head.weight[0].tolist()]]
    readers = {"stem": ["inner", "short"], "inner": ["head"], "short": ["head"], "head": ["end"]}
    net, rng = oracle.Net(layers, readers, ["stem"], {"head": 2}), random.Random(0)
    paths = (net.walk("stem", 0, True, rng) for _ in range(4000))
    slow = Counter(frozenset(_names(path, model)) for path in paths if _inside(path))
    fast = Counter(masks_of_many_seeds(model, inputs, 3, 300))
    assert two_samples(slow, fast) > 0.001


def _names(path, model):
    for name, out, into, position in path:
        if name == "head":
            yield "head.weight", out, into
        else:
            width = model.get_submodule(name).kernel_size[1]
            yield f"{name}.weight", out, into, position // width, position % width


def _inside(path):
    """Tell whether a walk stays on the image of two pixels: it does not shift off either end."""
    (*_, (name, _, _, position), (_, _, unit, _)) = path
    return name == "short" or (position, unit % 2) not in {(0, 0), (2, 1)}


def test_layers_that_read_a_unit_are_alike_however_often_they_read_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Linear(8, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(torch.cat([x, self.b(x)], 1).flatten(1))

    model = Net()
    weights = Masks.dense(model).weights(model)
    mass = {name: torch.ones_like(weight) for name, weight in weights.items()}
    calls = unit_graph(model, torch.ones(1, 1, 4))
    walks = Walks(calls, mass, weights, torch.Generator().manual_seed(0))
    walk, entry = walks.draw(4000)
    through = int(((entry == 1) & (walk % 2 == 0)).sum())  # forward walks over the entry of b
    assert stats.binomtest(through, 2000, 0.5).pvalue > 0.001


def test_rows_draw_in_proportion_and_never_what_weighs_nothing():
    mass = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 0.0, 2.0, 2.0])
    rows = Rows.of(mass, torch.tensor([0, 5, 5, 8]))
    assert rows.mass.tolist() == [4, 0, 4]
    generator = torch.Generator().manual_seed(0)
    drawn = rows.draw(torch.tensor([0, 2]).repeat(4000), generator).view(-1, 2)
    for column, places, share in ((0, [1, 3], [0.25, 0.75]), (1, [6, 7], [0.5, 0.5])):
        counts = torch.bincount(drawn[:, column], minlength=8)
        assert int(counts[places].sum()) == 4000
        assert stats.chisquare(counts[places], 4000 * torch.tensor(share)).pvalue > 0.001
    with pytest.raises(RuntimeError, match="nothing leads on"):
        rows.draw(torch.tensor([1]), generator)


CASES = {
    "mlp": (mlp, (2, 16)),
    "convnet": (ConvNet, (2, 3, 8, 8)),
    "resnet20": (
        lambda: models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0),
        (1, 3, 32, 32),
    ),
    "resnet20-B": (
        lambda: models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0, shortcut="B"),
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


@pytest.mark.parametrize("density", [0.03, 0.2, 0.8])
@pytest.mark.parametrize("case", CASES)
def test_exact_and_every_entry_on_a_path(case, density):
    make, shape = CASES[case]
    model, inputs = make(), torch.ones(shape)
    masks = phew(model, density, inputs=inputs, seed=0)
    assert masks.nonzeros == round(density * masks.numel)
    assert on_path(masks, model, inputs) == masks
    assert list(masks) == list(Masks.dense(model))


def test_a_walk_off_the_image_is_replaced():
    """Three shifts to the side leave an image of two pixels; on a channel level they are joined."""
    model = nn.Sequential(*(nn.Conv1d(2, 2, 3, padding=1) for _ in range(4)))
    for seed in range(10):
        masks = phew(model, 8 / 48, inputs=torch.ones(1, 2, 2), seed=seed)
        assert masks.nonzeros == 8
        assert on_path(masks, model, torch.ones(1, 2, 2)) == masks


def test_the_rest_is_met_though_no_single_walk_fits():
    """Hardly a walk of a wide net brings few entries: the last ones are taken back."""
    model = dense_chain(*[30] * 7)
    for keep in range(60, 66):
        masks = phew(model, keep / 5400, inputs=torch.ones(1, 30), seed=0)
        assert masks.nonzeros == keep
        assert on_path(masks, model, torch.ones(1, 30)) == masks


@given(st.lists(st.integers(1, 9), max_size=10), st.integers(1, 40))
def test_choose_sum_against_all_subsets(sizes, total):
    chosen = choose_sum(sizes, total)
    subsets = (s for n in range(len(sizes) + 1) for s in itertools.combinations(sizes, n))
    assert bool(chosen) == any(sum(s) == total for s in subsets)
    assert len(set(chosen)) == len(chosen)
    assert not chosen or sum(sizes[place] for place in chosen) == total


def test_model_and_random_state_are_untouched():
    model = ConvNet().train()
    model.head.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tensors = {n: id(p) for n, p in model.named_parameters()}
    first = phew(model, 0.1, inputs=torch.randn(2, 3, 8, 8, generator=torch.Generator()), seed=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.norm.training
    assert not model.head.weight.requires_grad
    assert "forward" not in vars(model.stem)
    assert first == phew(
        torch.compile(model, backend="eager"),
        0.1,
        inputs=torch.ones(1, 3, 8, 8),
        generator=torch.Generator().manual_seed(3),
    )
    assert first != phew(model, 0.1, inputs=torch.ones(1, 3, 8, 8), seed=4)


def test_support_zeros_and_excluded_layers():
    model, inputs = mlp(), torch.ones(1, 16)
    support = sparse.random(model, 0.4, seed=0)
    masks = phew(model, 0.2, inputs=inputs, support=support, seed=0)
    assert masks <= support
    with torch.no_grad():
        model[0].weight[:, 3] = 0
    masks = phew(model, sparsity=0.8, inputs=inputs, seed=0, exclude=["3.*"])
    assert list(masks) == ["0.weight", "6.weight"]
    assert not masks["0.weight"][:, 3].any()
    assert masks.nonzeros == round(0.2 * masks.numel)


def test_large_weights_attract_walks():
    model, inputs = mlp(), torch.ones(1, 16)
    masks = phew(model, 0.3, inputs=inputs, seed=0)
    for name, weight in masks.weights(model).items():
        size = weight.detach().abs()
        assert size[masks[name]].mean() > 1.2 * size[~masks[name]].mean()


def test_all_that_is_on_a_path():
    model, inputs = mlp(), torch.ones(1, 16)
    assert phew(model, 1.0, inputs=inputs, seed=0) == Masks.dense(model)
    with torch.no_grad():
        model[3].weight[5] = 0  # no way to the unit: its way on is on no path
    with pytest.raises(ValueError, match="1056 weights are to be kept but only 1028 lie on a path"):
        phew(model, 1.0, inputs=inputs, seed=0)
    assert phew(model, 1028 / 1056, inputs=inputs, seed=0).nonzeros == 1028


def test_bad_arguments():
    model, inputs = mlp(), torch.ones(1, 16)
    with pytest.raises(ValueError, match="exactly one of seed= and generator="):
        phew(model, 0.1, inputs=inputs)
    with pytest.raises(ValueError, match="walks in a row found nothing that fits, with 2 weights"):
        phew(model, 2 / 1056, inputs=inputs, seed=0)
    with pytest.raises(ValueError, match=r"'1.weight' is not the weight of a linear"):
        phew(model, 0.1, inputs=inputs, seed=0, include=["0.weight", "1.weight"])
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights of '3\.weight' hold NaN"):
        phew(model, 0.1, inputs=inputs, seed=0)


def test_models_that_walks_cannot_follow_are_refused():
    vit = models.build("vit", classes=10, shape=(3, 32, 32), seed=0)
    with pytest.raises(ValueError, match="paths can't be followed"):
        phew(vit, 0.1, inputs=torch.ones(1, 3, 32, 32), seed=0)

    class Shuffle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x).view(-1, 2, 2).sum(1))

    with pytest.raises(ValueError, match=r"between 'a.weight' and 'b.weight' the model mixes"):
        phew(Shuffle(), 0.1, inputs=torch.ones(1, 4), seed=0)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x), x

    with pytest.raises(ValueError, match="must return a tensor, got tuple"):
        unit_graph(Pair(), torch.ones(1, 2))


def test_the_graph_of_a_residual_net():
    calls = unit_graph(ConvNet(), torch.ones(1, 3, 8, 8))
    assert [call.weight for call in calls] == [
        "stem.weight",
        "depthwise.weight",
        "grouped.weight",
        "head.weight",
        "head.weight",
    ]
    assert [list(call.sources) for call in calls] == [[], [0], [1], [0, 2], [0, 2]]
    assert [call.entry.all().item() for call in calls] == [True, False, False, False, False]
    assert [call.exit.all().item() for call in calls] == [False, False, False, True, True]
    assert all(s.tolist() == list(range(8)) for call in calls for s in call.sources.values())


def test_the_graph_through_padding_flattening_and_concatenation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 5, 1)
            self.c = nn.Linear(16, 1)

        def forward(self, x):
            x = self.a(x)
            padded = F.pad(x, (0, 0, 1, 1)) + self.b(x)
            return self.c(torch.cat([x, padded], 1).flatten(1))

    _, b, c = unit_graph(Net(), torch.ones(1, 2, 2))
    assert b.sources[0].tolist() == [0, 1, 2]
    assert c.sources[0].tolist() == [0, 0, 1, 1, 2, 2, -1, -1, 0, 0, 1, 1, 2, 2, -1, -1]
    assert c.sources[1].tolist() == [-1] * 6 + [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
