"""Pattern updates: what is kept keeps value and state, what is grown starts as told."""

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse.execute import (
    dense_gradients,
    patterns,
    to_dense,
    to_sparse,
    update_pattern,
)
from tests.models import mlp, train_steps
from tests.oracles import execute as oracle


def started(momentum=0.9, backend="bag"):
    """Return a sparse model with optimizer state, its masks, and others to go to."""
    model = mlp(norm=False)
    masks = sparse.random(model, 0.3, "uniform", seed=0, exclude=["4.weight"])
    others = sparse.random(model, 0.4, "uniform", seed=1, exclude=["4.weight"])
    optimizer = torch.optim.Adam(model.parameters(), 0.01, betas=(momentum, 0.99))
    to_sparse(model, masks, backend, optimizer=optimizer)
    train_steps(model, optimizer)
    return model, optimizer, masks, others


def copied(model, optimizer):
    state = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    tensors = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    return state, tensors


@pytest.mark.parametrize("backend", ["masked", "bag", "shrunk"])
def test_every_tensor_of_a_weight_is_moved(backend):
    model, optimizer, masks, others = started(backend=backend)
    state, tensors = copied(model, optimizer)
    grown = {name: torch.randn(mask.shape) for name, mask in others.items()}
    parameters = dict(model.named_parameters())
    update_pattern(model, others, optimizer, grown)
    assert patterns(model) == others
    for index in (0, 2):
        before, after = masks[f"{index}.weight"], others[f"{index}.weight"]
        values, gradient = tensors[f"{index}.values"]
        start = grown[f"{index}.weight"][after]
        layer = model[index]
        assert layer.values is parameters[f"{index}.values"]
        assert torch.equal(layer.values, oracle.moved(values, before, after, start))
        assert torch.equal(layer.values.grad, oracle.moved(gradient, before, after))
        for key in ("exp_avg", "exp_avg_sq"):
            expected = oracle.moved(state[f"{index}.values"][key], before, after)
            assert torch.equal(optimizer.state[layer.values][key], expected)
        assert optimizer.state[layer.values]["step"] == 5
    for name in ("0.bias", "4.weight"):
        assert torch.equal(parameters[name], tensors[name][0])
    train_steps(model, optimizer)


def test_it_is_what_hold_does_to_the_masked_model():
    model, optimizer, masks, others = started()
    twin = mlp(norm=False)
    other = torch.optim.Adam(twin.parameters(), 0.01, betas=(0.9, 0.99))
    held = sparse.hold(twin, other, masks)
    train_steps(twin, other)
    held.update(others)
    update_pattern(model, others, optimizer)
    losses = [train_steps(m, o, seed=3) for m, o in ((model, optimizer), (twin, other))]
    torch.testing.assert_close(*losses)
    to_dense(model, optimizer=optimizer)
    for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[found][key], other.state[wanted][key])


def test_grown_entries_start_at_zero_unless_told():
    model, optimizer, masks, others = started()
    update_pattern(model, others, optimizer)
    fresh = (others["0.weight"] & ~masks["0.weight"])[others["0.weight"]]
    assert fresh.any()
    assert (model[0].values[fresh] == 0).all()


def test_layers_that_are_not_named_and_equal_masks_leave_everything_alone():
    model, optimizer, masks, others = started()
    pattern, moments = model[0].pattern, optimizer.state[model[0].values]["exp_avg"]
    update_pattern(
        model, {"0.weight": masks["0.weight"], "2.weight": others["2.weight"]}, optimizer
    )
    assert model[0].pattern is pattern
    assert optimizer.state[model[0].values]["exp_avg"] is moments
    assert torch.equal(model[2].pattern.mask(), others["2.weight"])


def test_to_nothing_and_back():
    model, optimizer, masks, _ = started()
    update_pattern(model, {"0.weight": torch.zeros(24, 16, dtype=torch.bool)}, optimizer)
    assert model[0].values.numel() == 0
    train_steps(model, optimizer)
    update_pattern(model, {"0.weight": masks["0.weight"]}, optimizer)
    assert (model[0].values == 0).all()
    train_steps(model, optimizer)


def test_a_model_without_optimizer():
    model, _, _, others = started()
    update_pattern(model, others)
    assert patterns(model) == others


@pytest.mark.parametrize(
    ("masks", "grown", "error", "text"),
    [
        ({"4.weight": (4, 24)}, {}, ValueError, "'4.weight' is the weight of no sparse layer"),
        ({"0.weight": (16, 24)}, {}, ValueError, r"'0.weight' has shape \[24, 16\], got"),
        ({"0.weight": (24, 16)}, {"2.weight": (24, 24)}, ValueError, "'2.weight' is the weight of"),
        ({"0.weight": (24, 16)}, {"0.weight": (2, 2)}, ValueError, r"got \[2, 2\]"),
        ({"2.weight": (24, 24), "0.weight": None}, {}, TypeError, "boolean"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_touched(masks, grown, error, text):
    model, optimizer, before, _ = started()
    wished = {
        name: torch.zeros(24, 16) if shape is None else torch.zeros(shape, dtype=torch.bool)
        for name, shape in masks.items()
    }
    with pytest.raises(error, match=text):
        update_pattern(model, wished, optimizer, {n: torch.zeros(s) for n, s in grown.items()})
    assert patterns(model) == before


def test_state_that_is_not_elementwise_is_refused():
    model, optimizer, before, others = started()
    optimizer.state[model[2].values]["rows"] = torch.zeros(24)
    with pytest.raises(ValueError, match=r"'rows' of '2\.weight'"):
        update_pattern(model, others, optimizer)
    assert patterns(model) == before


class TestDenseGradients:
    def test_they_are_those_of_the_dense_model(self):
        model, _, masks, _ = started()
        x = torch.randn(8, 16)
        model.zero_grad()
        with dense_gradients(model) as gradients:
            for part in x.split(4):
                model(part).square().sum().backward()
        kept = model[0].values.grad.clone()
        model(x)
        assert model[0].on_weight is None
        to_dense(model).zero_grad()
        model(x).square().sum().backward()
        assert set(gradients) == {"0.weight", "2.weight"}
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, model.get_parameter(name).grad)
        torch.testing.assert_close(kept, model[0].weight.grad[masks["0.weight"]])

    def test_convolutions_too(self):
        pytest.importorskip("numba")
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        x = torch.randn(2, 3, 5, 5)
        to_sparse(model, {"0.weight": torch.rand(4, 3, 3, 3) < 0.5}, "chwn")
        with dense_gradients(model) as gradients:
            model(x).square().sum().backward()
        to_dense(model).zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(gradients["0.weight"], model[0].weight.grad)

    def test_without_gradients_nothing_is_recorded(self):
        model, *_ = started()
        model[0].values.requires_grad_(False)
        with dense_gradients(model) as gradients, torch.no_grad():
            model(torch.randn(2, 16))
        assert gradients == {}
        with dense_gradients(model) as gradients:
            model(torch.randn(2, 16)).sum().backward()
        assert set(gradients) == {"2.weight"}


def test_growth_by_hand_follows_rigl():
    """One exchange on the sparse model keeps what `rigl`'s rule keeps on the dense one."""
    model, optimizer, _, _ = started()
    twin = mlp(norm=False)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)
    with dense_gradients(model) as gradients:
        model(x).square().mean().backward()
    now = patterns(model)
    weights = {n: t.detach() for n, t in twin.named_parameters()}
    masks = {n: sparse.dynamic.exchange(m, weights[n], gradients[n], 9) for n, m in now.items()}
    update_pattern(model, masks, optimizer)
    twin(x).square().mean().backward()
    for name, mask in now.items():
        gradient = twin.get_parameter(name).grad
        expected = sparse.dynamic.exchange(mask, weights[name], gradient, 9)
        assert torch.equal(patterns(model)[name], expected)
