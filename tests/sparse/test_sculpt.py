"""SCULPT-ing: one pruning between cycles, inside the start masks, touching nothing it keeps."""

import copy

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import Masks, health
from featherweight.sparse.loops import cycle_lengths, cyclic, iterate, sculpt
from featherweight.sparse.loops.guard import keep_units_
from tests.models import ConvNet, mlp, train_steps


def train_held(model, level, inputs=(8, 16)):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    with sparse.hold(model.train(), optimizer, level.masks):
        train_steps(model, optimizer, 4, seed=level.index, inputs=inputs)


def same(first, second):
    return all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize("scope", ["global", "layer", "start", "balanced"])
@pytest.mark.parametrize("model", [mlp, ConvNet])
def test_one_exact_pruning_that_moves_nothing_it_keeps(model, scope):
    net = model()
    inputs = (8, 16) if model is mlp else (4, 3, 8, 8)
    stages = sculpt(net, density=0.1, start=0.4, cycles=3, scope=scope, seed=0)
    start = sparse.random(net, 0.4, seed=0)
    for index in range(3):
        stage = next(stages)
        assert stage.index == index
        assert stage.masks == start
        train_held(net, stage, inputs)
    before = copy.deepcopy(net.state_dict())
    final = next(stages)
    assert final.final
    assert final.masks <= start
    assert final.masks.nonzeros == round(0.1 * start.numel)
    twin = {"twin.weight": "head.weight"}
    for name, tensor in net.state_dict().items():
        mask = final.masks.get(twin.get(name, name))
        assert torch.equal(tensor, before[name] if mask is None else before[name] * mask)
    assert next(stages, None) is None


def test_random_pruning_stays_inside_the_start():
    first, last = sculpt(mlp(), 0.1, start=0.4, cycles=1, criterion="random", seed=0)
    assert last.masks <= first.masks
    assert last.masks.nonzeros == round(0.1 * first.masks.numel)


def test_the_smallest_go():
    net = mlp()
    stages = sculpt(net, density=0.1, start=0.4, cycles=1, seed=0)
    start = next(stages).masks
    train_held(net, sparse.Level(0, 1, start, None))
    weights = {n: w.detach().abs() for n, w in start.weights(net).items()}
    final = next(stages).masks
    ranked = sorted((float(v) for n, w in weights.items() for v in w[start[n]]), reverse=True)
    kept = sorted((float(v) for n, w in weights.items() for v in w[final[n]]), reverse=True)
    assert kept == ranked[: len(kept)]


def test_scope_start_keeps_the_ratios_of_the_start():
    net = mlp(60)
    final = list(sculpt(net, 0.1, start=0.4, cycles=1, scope="start", seed=0))[-1].masks
    start = sparse.random(net, 0.4, seed=0)
    shapes = {name: mask.shape for name, mask in start.items()}
    shares = {name: count / start.nonzeros for name, count in start.counts().items()}
    for name, count in final.counts().items():
        assert abs(count - shares[name] * final.nonzeros) <= 1
    densities = sparse.allocate(shapes, 0.1, start)
    assert final.counts() == sparse.kept_counts(densities, shapes, final.nonzeros)


def test_start_at_the_target_is_cyclic_with_one_cycle_more():
    nets = mlp(), mlp()
    loops = (
        sculpt(nets[0], density=0.2, start=0.2, cycles=3, seed=4),
        cyclic(nets[1], density=0.2, cycles=4, seed=4),
    )
    for net, loop in zip(nets, loops, strict=True):
        levels = []
        for level in loop:
            train_held(net, level)
            levels.append(level)
        assert len(levels) == 4
        assert levels[-1].masks == levels[0].masks
    assert same(nets[0].state_dict(), nets[1].state_dict())


def test_a_support_is_the_start():
    net = mlp()
    support = sparse.magnitude(net, 0.3, "layer")
    levels = list(sculpt(net, 0.1, cycles=2, support=support))
    assert levels[0].masks == levels[1].masks == support
    assert levels[2].masks <= support
    drawn = list(sculpt(mlp(), 0.1, start=0.2, cycles=2, support=support, seed=0))
    assert drawn[0].masks <= support
    assert drawn[0].masks.nonzeros == round(0.2 * support.numel)


def test_defaults():
    levels = list(sculpt(mlp(60), sparsity=0.9, seed=0))
    assert levels[0].masks == sparse.random(mlp(60), 0.5, seed=0)
    # lrr has 12 levels down to density 0.1
    assert len(levels) == 6
    assert len(list(sculpt(mlp(60), 0.4, seed=0))) == 2 + 1


def test_budget_covers_the_last_cycle():
    levels = sculpt(mlp(), 0.1, cycles=4, budget=33, strategy="linear-decrease", seed=0)
    assert [level.length for level in levels] == cycle_lengths(33, 5, "linear-decrease")


@pytest.mark.parametrize("stop", [0, 2, 3])
@pytest.mark.parametrize("scope", ["global", "start"])
def test_resuming_equals_never_stopping(stop, scope):
    options = {"start": 0.5, "cycles": 3, "seed": 5, "scope": scope, "criterion": "random"}

    def run(model, resume=None, until=None):
        for level in sculpt(model, 0.1, resume=resume, **options):
            if level.index == until:
                return level.resume
            train_held(model, level)
        return level.masks

    whole, stopped = mlp(), mlp()
    masks = run(whole)
    resume = run(stopped, until=stop)
    resumed = mlp(seed=8)
    resumed.load_state_dict(stopped.state_dict())
    assert run(resumed, resume) == masks
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("structure", "size"), [("2:4", None), ("4x4", 16), ("channel", None)])
def test_structure_is_that_of_the_last_masks(structure, size):
    net = mlp()
    levels = list(sculpt(net, 0.3, start=1.0, cycles=2, structure=structure))
    assert levels[1].masks == Masks.dense(net)
    final = levels[2].masks
    assert 0 < final.nonzeros <= round(0.3 * final.numel)
    for mask in final.values():
        if structure == "2:4":
            assert mask.view(mask.shape[0], -1, 4).sum(2).max() <= 2
        elif structure == "channel":
            assert ((mask.sum(1) == 0) | (mask.sum(1) == mask.shape[1])).all()
        else:
            tiles = mask.unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3))
            assert ((tiles == 0) | (tiles == size)).all()


def test_the_first_pruning_goes_to_what_the_pattern_has_room_for():
    plain = [level.masks.nonzeros for level in sparse.lrr(mlp(), 0.25)]
    levels = list(sparse.lrr(mlp(), 0.25, structure="2:4"))
    assert [level.masks.nonzeros for level in levels] == [
        plain[0],
        *(min(n, 528) for n in plain[1:]),
    ]
    assert all(sparse.satisfies(level.masks, "2:4") for level in levels[1:])


def test_a_structure_without_room_is_refused_before_training():
    with pytest.raises(ValueError, match="structure 2:4 allows 528 of 1056 weights"):
        sparse.lrr(mlp(), 0.6, structure="2:4")
    levels = list(iterate(mlp(), densities=[1.0, 0.5, 0.25], structure="2:4", iterations=2))
    assert [level.masks.nonzeros for level in levels] == [1056, 528, 264]


class TestKeepUnits:
    """No unit that had edges loses all of them."""

    @pytest.mark.parametrize("model", [mlp, ConvNet])
    def test_every_unit_keeps_an_edge(self, model):
        net = model()
        with torch.no_grad():  # the classifier would be emptied by a global threshold
            list(Masks.dense(net).weights(net).values())[-1].mul_(1e-4)
        guarded = list(sculpt(copy.deepcopy(net), 0.25, start=1.0, cycles=1, keep_units=True))
        plain = list(sculpt(net, 0.25, start=1.0, cycles=1))
        assert not health(plain[-1].masks, net).ok
        assert health(guarded[-1].masks, net).ok
        assert guarded[-1].masks.nonzeros == plain[-1].masks.nonzeros

    def test_the_best_edge_is_kept(self):
        net = mlp()
        stages = sculpt(net, 0.2, start=0.6, cycles=1, keep_units=True, seed=0)
        start = next(stages).masks
        weights = {n: w.detach().abs() * start[n] for n, w in start.weights(net).items()}
        final = next(stages).masks
        assert final <= start
        for name, weight in weights.items():
            for dim in (0, 1):
                best = weight.max(dim, keepdim=True).values
                had = best > 0
                kept = (final[name] & (weight == best)).any(dim, keepdim=True)
                assert kept[had].all()

    def test_units_without_edges_stay_without(self):
        net = mlp()
        dense = Masks.dense(net)
        cut = dict(dense)
        cut["3.weight"] = cut["3.weight"].clone()
        cut["3.weight"][5] = False
        cut["3.weight"][:, 7] = False
        final = list(sculpt(net, 0.3, cycles=1, support=Masks(cut), keep_units=True))[-1].masks
        assert health(final, net).no_input == {"3.weight": 1}
        assert health(final, net).no_output == {"3.weight": 1}

    def test_what_it_can_not_do_is_refused(self):
        with pytest.raises(ValueError, match="may have to keep 116 edges, the density leaves 106"):
            sculpt(mlp(), 0.1, start=1.0, cycles=1, keep_units=True)
        for options in ({"scope": "layer"}, {"structure": "2:4"}):
            with pytest.raises(ValueError, match="needs scope='global' and structure=None"):
                iterate(mlp(), densities=[1.0, 0.4], keep_units=True, **options)

    def test_negative_scores_and_one_nan(self):
        net = mlp()
        masks = sparse.random(net, 0.5, seed=0)
        scores = {n: -1 - torch.rand(m.shape) for n, m in masks.items()}
        raised = dict(scores)
        keep_units_(raised, masks, net)
        for name, mask in masks.items():
            best = raised[name].isinf() & mask
            assert torch.equal(best.any(0), mask.any(0))
            assert torch.equal(best.any(1), mask.any(1))
            assert torch.equal(raised[name][~best & mask], scores[name][~best & mask])
        scores["3.weight"][masks["3.weight"]] = -5.0
        scores["3.weight"][0, 0] = float("nan")
        keep_units_(scores, Masks.dense(net), net)
        assert scores["3.weight"].isnan().any()  # for select to refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of density= and sparsity="),
        ({"density": 0.1, "levels": 3}, "exactly one of density="),
        ({"density": 0.1, "start": 0.0}, r"start must lie in \(0, 1\], got 0"),
        ({"density": 0.1, "start": float("nan")}, "start must lie in"),
        ({"density": 0.6, "start": 0.5}, "density 0.6 asks for"),
        ({"density": 0.6}, "density 0.6 asks for"),
        ({"density": 1e-9}, "keeps none"),
        ({"density": 0.1, "cycles": 0}, "cycles must be at least 1, got 0"),
        ({"density": 0.1, "cycles": 4, "budget": 4}, "budget 4 is too short for 5"),
        ({"density": 0.1, "per_level": 1.0}, "per_level must lie in"),
        ({"density": 0.1, "criterion": "magnitud"}, "did you mean 'magnitude'"),
        ({"density": 0.1, "criterion": "snip"}, "criterion 'snip' needs batches="),
        ({"density": 0.1, "objective": len}, "unknown argument of criterion 'magnitude'"),
        ({"density": 0.5, "start": 0.5, "structure": "2:4"}, "structure= needs a pruning"),
        ({"density": 0.4, "start": 0.5, "structure": "1:4"}, "structure 1:4 allows"),
        ({"density": 0.4, "start": 0.5, "structure": "4-1"}, "structure must be"),
        ({"density": 0.1, "exclude": ["nothing"]}, "fits no parameter"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(arguments, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sculpt(model, seed=0, **arguments)
    assert same(model.state_dict(), before)


def test_a_draw_needs_a_seed():
    with pytest.raises(ValueError, match="exactly one of seed= and generator="):
        sculpt(mlp(), 0.1)


def test_any_criterion_may_prune():
    batches = [(torch.randn(8, 16), torch.arange(8) % 4)]
    net, twin = mlp(), mlp()
    final = list(sculpt(net, 0.1, start=0.4, cycles=1, seed=0, criterion="snip", batches=batches))
    start = sparse.random(twin, 0.4, seed=0)
    start.apply_(twin)
    expected = sparse.prune(twin, "snip", 0.1, support=start, batches=batches)
    assert final[-1].masks == expected
    assert expected != sparse.prune(twin, "magnitude", 0.1, support=start)
