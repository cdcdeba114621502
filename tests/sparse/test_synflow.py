"""SynFlow: conservation, invariances, and collapse without rounds."""

import copy
import itertools

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse import Masks, score
from tests.models import ConvNet, mlp
from tests.oracles.synflow import slow_synflow
from tests.sparse.test_snip import batch, homogeneous, weights_of


def synflow(model, shape, **options):
    return score("synflow", weights_of(model), model=model, input_shape=shape, **options)


def flow(model, shape):
    """Return R of the whole network."""
    net = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.abs_()
        return net(torch.ones(1, *shape, dtype=torch.float64)).sum()


def test_scores_are_the_share_of_all_paths():
    model = homogeneous(3, 4, 5, 2)
    total, flows = slow_synflow([w.detach().tolist() for w in weights_of(model).values()])
    torch.testing.assert_close(flow(model, (3,)).item(), total)
    for found, paths in zip(synflow(model, (3,)).values(), flows, strict=True):
        torch.testing.assert_close(found, torch.tensor(paths, dtype=torch.float64) / total)


def test_flow_is_conserved_by_every_layer_and_every_unit():
    model = homogeneous(16, 12, 10, 4).float()
    scores = list(synflow(model, (16,)).values())
    for found in scores:
        assert found.dtype == torch.float64
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum().item(), 1.0, rtol=1e-13, atol=0)
    for before, after in itertools.pairwise(scores):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-12, atol=0)


def test_convolutions_conserve_flow_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False, groups=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5, bias=False),
    )
    for found in synflow(model, (3, 8, 8)).values():
        assert found.sum().item() == pytest.approx(1.0)


def test_biases_and_buffers_take_part_by_their_absolute_values():
    model = mlp()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2)
        model[1].bias.normal_()
    positive = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in positive.state_dict().values():
            tensor.abs_()
    weights = weights_of(positive.double().eval())
    total = positive(torch.ones(1, 16, dtype=torch.float64)).sum()
    slopes = torch.autograd.grad(total, list(weights.values()))
    scores = synflow(model, (16,))
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        torch.testing.assert_close(scores[name], (weight * slope / total).detach())


def test_masks_follow_the_units_when_they_are_permuted():
    model = homogeneous(16, 12, 10, 4)
    order = torch.randperm(12)
    shuffled = copy.deepcopy(model)
    with torch.no_grad():
        shuffled[0].weight.copy_(model[0].weight[order])
        shuffled[2].weight.copy_(model[2].weight[:, order])
    before = sparse.prune(model, "synflow", 0.1, input_shape=(16,))
    after = sparse.prune(shuffled, "synflow", 0.1, input_shape=(16,))
    assert torch.equal(after["0.weight"], before["0.weight"][order])
    assert torch.equal(after["2.weight"], before["2.weight"][:, order])
    assert torch.equal(after["4.weight"], before["4.weight"])


def test_rescaling_layers_and_flipping_signs_change_nothing():
    model = homogeneous(16, 12, 10, 4)
    before = sparse.prune(model, "synflow", 0.1, input_shape=(16,))
    with torch.no_grad():
        model[0].weight.mul_(-16.0)
        model[2].weight.div_(16.0)
        model[4].weight.mul_(4.0)
    assert sparse.prune(model, "synflow", 0.1, input_shape=(16,)) == before


def test_one_round_collapses_and_a_hundred_do_not():
    torch.manual_seed(0)
    model = nn.Sequential()
    for inputs, outputs in ((64, 256), (256, 256), (256, 256), (256, 10)):
        layer = nn.Linear(inputs, outputs, bias=False)
        nn.init.kaiming_normal_(layer.weight)
        model.extend([layer, nn.ReLU()])
    model = model[:-1]
    once = sparse.prune(model, "synflow", 0.01, input_shape=(64,), iterations=1)
    counts = list(once.counts().values())
    assert counts[1:3] == [0, 0]
    assert counts[3] > 0.98 * once.nonzeros
    rounds = sparse.prune(model, "synflow", 0.01, input_shape=(64,))
    assert rounds.nonzeros == once.nonzeros == round(0.01 * rounds.numel)
    # Counts of an independent run of the published algorithm, for other weights of the same kind.
    for found, known in zip(rounds.counts().values(), (448, 285, 421, 346), strict=True):
        assert found == pytest.approx(known, rel=0.15)
    assert sparse.on_path(rounds, model, torch.ones(1, 64)).nonzeros > 0.99 * rounds.nonzeros
    assert sparse.on_path(once, model, torch.ones(1, 64)).nonzeros == 0
    named = sparse.prune(model, "synflow", 0.01, input_shape=(64,), iterations=100)
    assert named == rounds


def test_deep_networks_need_double_precision():
    model = homogeneous(*[256] * 50).float()
    for found in synflow(model, (256,)).values():
        assert found.sum().item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"synflow scores of '0\.weight' hold NaN or infinity"):
        synflow(model, (256,), dtype=torch.float32)


def test_an_empty_layer_leaves_all_scores_zero():
    model = mlp(norm=False)
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
    nn.init.zeros_(model[4].bias)
    scores = synflow(model, (16,))
    assert all(not found.any() for found in scores.values())


def test_batches_give_the_shape_alone():
    model = ConvNet()
    shape = (3, 8, 8)
    named = synflow(model, shape)
    images = torch.full((5, *shape), float("nan"), dtype=torch.bfloat16)
    given = score("synflow", weights_of(model), model=model, batches=[(images, torch.zeros(5))])
    assert all(torch.equal(named[n], given[n]) for n in named)


def test_token_ids_stay_integers():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 3, bias=False))
    tokens = torch.randint(9, (2, 4))
    scores = score("synflow", weights_of(model), model=model, batches=[(tokens, tokens)])
    expected = model[0].weight[1].detach().abs().repeat(4) * model[2].weight.detach().abs()
    torch.testing.assert_close(scores["2.weight"], (expected / expected.sum()).double())


def test_the_shape_is_asked_for():
    with pytest.raises(ValueError, match="needs input_shape= or batches="):
        sparse.prune(mlp(), "synflow", 0.1)
    assert sparse.prune(mlp(), "synflow", 0.1, batches=[batch()]).nonzeros == round(
        0.1 * Masks.dense(mlp()).numel
    )
