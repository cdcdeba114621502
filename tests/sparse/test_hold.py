"""Holding masks: exact zeros under every kind of optimizer and wrapper, state treated as stated."""

import copy

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse import Masks, hold
from featherweight.sparse.hold import KEEPS_ZEROS, MEND_EVERY
from tests.models import ConvNet, mlp, train_steps

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
}


def noisy(model):
    """Return an optimizer that breaks every rule: it moves weights whose gradient is zero."""

    class Noisy(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["noise"] = torch.randn_like(p)
                    p.add_(self.state[p]["noise"])

    return Noisy(model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_and_their_state_stay_zero(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_steps(model, optimizer)  # there is state at masked entries when the hold begins
    masks = sparse.random(model, 0.2, seed=0)
    hold(model, optimizer, masks)
    keys = list(model.state_dict())
    for seed in range(3):
        train_steps(model, optimizer, 2, seed)
        for weight_name, weight in masks.weights(model).items():
            off = ~masks[weight_name]
            assert (weight[off] == 0).all()
            assert (weight[~off] != 0).all()
            for tensor in optimizer.state[weight].values():
                if isinstance(tensor, torch.Tensor) and tensor.shape == weight.shape:
                    assert (tensor[off] == 0).all()
    assert list(model.state_dict()) == keys


def test_even_an_optimizer_that_moves_everything():
    model = mlp()
    optimizer = noisy(model)
    masks = sparse.random(model, 0.2, seed=0)
    hold(model, optimizer, masks)
    train_steps(model, optimizer)
    assert Masks.nonzero(model) == masks
    weight = model[0].weight
    assert (optimizer.state[weight]["noise"][~masks["0.weight"]] == 0).all()


@pytest.mark.parametrize("name", ["nesterov", "adamw-fused"])
def test_equals_masking_in_the_forward_pass(name):
    """Where the optimizer leaves zeros alone, holding is training of ``mask * weight``."""
    held, oracle = mlp(), mlp()
    masks = sparse.random(held, 0.3, seed=0)
    optimizer = OPTIMIZERS[name](held.parameters())
    hold(held, optimizer, masks)
    for module_name, mask in masks.items():
        layer = oracle.get_submodule(module_name.removesuffix(".weight"))
        with torch.no_grad():
            layer.weight.mul_(mask)
        nn.utils.parametrize.register_parametrization(layer, "weight", _Times(mask))
    train_steps(held, optimizer, 10)
    train_steps(oracle, OPTIMIZERS[name](oracle.parameters()), 10)
    for module_name in masks:
        layer = module_name.removesuffix(".weight")
        found, expected = held.get_submodule(layer).weight, oracle.get_submodule(layer).weight
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class _Times(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, weight):
        return weight * self.mask


def test_clipping_sees_the_masked_gradient():
    model = mlp()
    masks = sparse.random(model, 0.1, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold(model, optimizer, masks)
    for _ in range(3):  # gradients that accumulate stay masked
        model(torch.randn(8, 16)).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        weights = masks.weights(model)
        assert all((w.grad[~masks[n]] == 0).all() for n, w in weights.items())
        expected = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        torch.testing.assert_close(norm, expected)
    assert all((w.grad[masks[n]] != 0).any() for n, w in weights.items())


def test_closures_and_gradient_scaling():
    model = mlp()
    masks = sparse.random(model, 0.2, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    hold(model, optimizer, masks)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert Masks.nonzero(model) == masks
    scaler = torch.amp.GradScaler("cpu")
    before = model[0].weight.detach().clone()
    scaler.scale(model(torch.randn(8, 16)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)
    assert Masks.nonzero(model) == masks


@pytest.mark.parametrize("named", [False, True])
def test_a_closure_that_tampers_with_gradients_brings_nothing_back(named):
    """Gradients change inside the step, where no check before it can see them."""
    model = mlp()
    masks = sparse.random(model, 0.2, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    hold(model, optimizer, masks)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        model[0].weight.grad.add_(1.0)
        return loss

    for _ in range(2):
        optimizer.step(closure=closure) if named else optimizer.step(closure)
        assert Masks.nonzero(model) == masks
        momentum = optimizer.state[model[0].weight]["momentum_buffer"]
        assert (momentum[~masks["0.weight"]] == 0).all()


def test_a_compiled_model_trains_held():
    model, plain = mlp(norm=False), mlp(norm=False)
    masks = sparse.random(model, 0.2, seed=0)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (model, plain)]
    compiled = torch.compile(model, backend="aot_eager")
    hold(compiled, optimizers[0], masks)
    hold(plain, optimizers[1], masks)
    train_steps(compiled, optimizers[0], 4)
    train_steps(plain, optimizers[1], 4)
    assert Masks.nonzero(model) == masks
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def test_convolutions_in_channels_last_and_bf16():
    model = ConvNet().to(torch.bfloat16).to(memory_format=torch.channels_last)
    masks = sparse.random(model, 0.3, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    hold(model, optimizer, masks)
    inputs = torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    assert Masks.nonzero(model) <= masks
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_changes_its_dtype_is_still_held():
    model = mlp()
    masks = sparse.random(model, 0.2, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold(model, optimizer, masks)
    model.double()
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(8, 16, generator=generator, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert Masks.nonzero(model) == masks


def test_update_zeroes_the_dropped_and_starts_the_grown():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    old, new = (sparse.random(model, 0.3, seed=seed) for seed in (0, 1))
    held = hold(model, optimizer, old)
    train_steps(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    moments = {n: optimizer.state[w]["exp_avg"].clone() for n, w in old.weights(model).items()}
    held.update(new, grown={"0.weight": torch.full((24, 16), 7.0)})
    assert held.masks == new
    for name, weight in new.weights(model).items():
        stays, grows = old[name] & new[name], new[name] & ~old[name]
        assert torch.equal(weight[stays], before[name][stays])
        assert (weight[grows] == (7.0 if name == "0.weight" else 0.0)).all()
        assert (weight[~new[name]] == 0).all()
        state = optimizer.state[weight]
        assert torch.equal(state["exp_avg"][stays], moments[name][stays])
        assert (state["exp_avg"][~stays] == 0).all()
        assert (state["exp_avg_sq"][~stays] == 0).all()
    train_steps(model, optimizer)
    assert Masks.nonzero(model) <= new
    assert (model[0].weight[new["0.weight"] & ~old["0.weight"]] != 0).any()


def test_update_forgets_grown_state_left_by_others():
    """State at a masked entry that appeared behind the hold's back must not be inherited."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    old, new = (sparse.random(model, 0.3, seed=seed) for seed in (0, 1))
    held = hold(model, optimizer, old)
    train_steps(model, optimizer)
    optimizer.state[model[0].weight]["momentum_buffer"].fill_(1.0)
    held.update(new)
    grown = new["0.weight"] & ~old["0.weight"]
    assert (optimizer.state[model[0].weight]["momentum_buffer"][grown] == 0).all()


def test_an_update_that_does_not_fit_changes_nothing():
    model = mlp()
    masks = sparse.random(model, 0.3, seed=0)
    held = hold(model, torch.optim.SGD(model.parameters(), 0.1), masks)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="masks do not fit"):
        held.update(Masks.dense(mlp(8)))
    for grown in ({"0.weight": torch.ones(3)}, {"0.bias": torch.ones(24)}):
        with pytest.raises(ValueError, match="is no held weight"):
            held.update(Masks.dense(model), grown=grown)
    assert held.masks is masks
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_remove_lets_go():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = sparse.random(model, 0.2, seed=0)
    with hold(model, optimizer, masks):
        train_steps(model, optimizer)
        assert Masks.nonzero(model) == masks
    train_steps(model, optimizer)
    assert Masks.nonzero(model).density > 0.9


def test_a_loaded_state_dict_is_masked():
    model = mlp()
    masks = sparse.random(model, 0.2, seed=0)
    hold(model, torch.optim.SGD(model.parameters(), 0.1), masks)
    model.load_state_dict(mlp(seed=3).state_dict())
    assert Masks.nonzero(model) == masks


@pytest.mark.parametrize("name", ["nesterov", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("how", ["noise", "assigned", "loaded"])
def test_gradients_and_state_that_others_touch_bring_nothing_back(name, how):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_steps(model, optimizer)
    dense = copy.deepcopy(optimizer.state_dict())
    masks = sparse.random(model, 0.2, seed=0)
    hold(model, optimizer, masks)
    weight, off = model[0].weight, ~masks["0.weight"]
    for _ in range(2):
        model(torch.randn(8, 16)).square().mean().backward()
        if how == "noise":
            weight.grad.add_(torch.randn_like(weight))
        elif how == "assigned":
            weight.grad = torch.randn_like(weight)
        else:
            optimizer.load_state_dict(dense)
        optimizer.step()
        optimizer.zero_grad()
        assert Masks.nonzero(model) == masks
        for tensor in optimizer.state[weight].values():
            if tensor is not None and tensor.shape == weight.shape:
                assert (tensor[off] == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_others_edit_are_masked_by_the_next_step(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    masks = sparse.random(model, 0.2, seed=0)
    hold(model, optimizer, masks)
    train_steps(model, optimizer, 2)
    with torch.no_grad():
        model[3].weight.add_(0.1)
    train_steps(model, optimizer, 1)
    assert Masks.nonzero(model) == masks
    model[0].weight.data.add_(0.1)  # leaves no trace: mended in one round over the weights
    train_steps(model, optimizer, MEND_EVERY * len(masks))
    assert Masks.nonzero(model) == masks
    for weight_name, weight in masks.weights(model).items():
        for tensor in optimizer.state[weight].values():
            if torch.is_tensor(tensor) and tensor.shape == weight.shape:
                assert (tensor[~masks[weight_name]] == 0).all()


@pytest.mark.parametrize("kind", KEEPS_ZEROS)
def test_the_optimizers_that_are_said_to_keep_zeros_do(kind):
    weight = nn.Parameter(torch.zeros(5))
    options = {} if kind in (torch.optim.SGD, torch.optim.Adagrad) else {"weight_decay": 0.1}
    optimizer = kind([weight], lr=0.1, **options)
    for _ in range(8):
        weight.grad = torch.zeros(5)
        optimizer.step()
        tensors = [weight, *(t for t in optimizer.state[weight].values() if torch.is_tensor(t))]
        assert all((t == 0).all() for t in tensors if t.shape == weight.shape)


def test_frozen_weights_and_foreign_optimizers():
    model = mlp()
    masks = sparse.random(model, 0.2, seed=0)
    with pytest.raises(ValueError, match="optimizer trains none of the masked weights"):
        hold(model, torch.optim.SGD(mlp().parameters(), 0.1), masks)
    assert Masks.nonzero(model).density == 1
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    hold(model, optimizer, masks)
    train_steps(model, optimizer)
    assert Masks.nonzero(model) == masks
