"""The driver of methods that change masks: every method under every kind of training."""

import copy
import io

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse import Masks
from featherweight.sparse.dynamic import DYNAMIC
from tests.models import ConvNet, mlp, train_steps

CONSTANT = ["set", "rigl", "mest-em", "mest-ems"]
STEPS = 24


def attach(name, model, optimizer, density=0.2, **options):
    """Attach a method so that it changes masks often in 24 steps."""
    if name != "acdc":
        options.setdefault("interval", 3)
    options.setdefault("seed", 0)
    return DYNAMIC[name].method(model, optimizer, density, steps=STEPS, **options)


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def inputs_of(model):
    return (8, 16) if isinstance(model, nn.Sequential) else (4, 3, 8, 8)


def equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("make", [mlp, ConvNet])
def test_counts_and_zeros_at_every_step(name, make):
    model = make()
    optimizer = momentum(model)
    keys = list(model.state_dict())
    evolving = attach(name, model, optimizer)
    start = evolving.masks
    total = round(0.2 * start.numel)
    for step in range(STEPS):
        before, old = evolving.masks, copy.deepcopy(model.state_dict())
        train_steps(model, optimizer, 1, seed=step, inputs=inputs_of(model))
        assert evolving.step == step + 1
        assert Masks.nonzero(model) <= evolving.masks
        if name in CONSTANT and name != "mest-ems":
            assert evolving.masks.counts() == start.counts()
        for key, weight in evolving.masks.weights(model).items():
            new = evolving.masks[key] & ~before[key]
            buffer = optimizer.state[weight].get("momentum_buffer")
            if name != "gmp-recoverable":
                assert (weight[new] == 0).all()
            if buffer is not None:
                assert (buffer[new] == 0).all()
                assert (buffer[~evolving.masks[key]] == 0).all()
        assert (name == "rigl" and step % 3 == 0) or not all(
            torch.equal(t, old[n]) for n, t in model.state_dict().items()
        )
    assert evolving.masks.nonzeros == total
    assert evolving.masks != start
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", DYNAMIC)
def test_masks_stay_within_a_support(name):
    model = mlp()
    optimizer = momentum(model)
    support = sparse.random(model, 0.6, "uniform", seed=9)
    evolving = attach(name, model, optimizer, support=support)
    seen = evolving.masks
    for step in range(STEPS):
        train_steps(model, optimizer, 1, seed=step)
        assert evolving.masks <= support
        seen = seen | evolving.masks
    assert evolving.masks.nonzeros == round(0.2 * support.numel)
    assert evolving.masks != seen  # they have moved


@pytest.mark.parametrize("name", DYNAMIC)
def test_density_one_changes_no_mask(name):
    model, plain = mlp(), mlp()
    options = {"initial_density": 1.0} if name == "granet" else {}
    optimizers = momentum(model), momentum(plain)
    evolving = attach(name, model, optimizers[0], 1.0, **options)
    for step in range(STEPS):
        train_steps(model, optimizers[0], 1, seed=step)
        train_steps(plain, optimizers[1], 1, seed=step)
        assert evolving.masks.nonzeros == evolving.masks.numel
    assert equal_states(model, plain) == (name != "rigl")  # which leaves steps out


@pytest.mark.parametrize("name", DYNAMIC)
def test_seeds_reproduce(name):
    found = []
    for seed in (3, 3, 4):
        model = mlp()
        optimizer = momentum(model)
        generator = torch.Generator().manual_seed(seed)
        evolving = attach(name, model, optimizer, seed=None, generator=generator)
        train_steps(model, optimizer, STEPS)
        found.append((evolving.masks, model.state_dict()["0.weight"]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] == found[2][0]) == name.startswith(("gmp", "acdc"))


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("masks_first", [True, False], ids=["state first", "masks given"])
def test_a_resumed_training_is_the_uninterrupted_one(name, masks_first):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    evolving = attach(name, model, optimizer)
    saved = {}
    for step in range(STEPS):
        train_steps(model, optimizer, 1, seed=step)
        if step in (1, 2, 7, 13, 20):
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), evolving.state_dict()], file)
            saved[step] = file
    for step, file in saved.items():
        file.seek(0)
        states = torch.load(file, weights_only=True)
        again = mlp(seed=8)
        fresh = torch.optim.AdamW(again.parameters(), 0.01)
        if masks_first:
            resumed = attach(name, again, fresh)
            resumed.load_state_dict(states[2])
            again.load_state_dict(states[0])
            fresh.load_state_dict(states[1])
        else:
            again.load_state_dict(states[0])
            fresh.load_state_dict(states[1])
            density = None if name in CONSTANT else 0.2
            resumed = attach(name, again, fresh, density, masks=Masks(states[2]["masks"]))
            resumed.load_state_dict(states[2])
        for later in range(step + 1, STEPS):
            train_steps(again, fresh, 1, seed=later)
        assert resumed.masks == evolving.masks
        assert equal_states(again, model)


def test_loading_in_the_order_that_loses_weights_is_refused():
    model = mlp()
    optimizer = momentum(model)
    evolving = attach("set", model, optimizer)
    train_steps(model, optimizer, 10)
    saved = evolving.state_dict()
    again = mlp()
    fresh = momentum(again)
    resumed = attach("set", again, fresh)
    resumed.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="load the state of model and optimizer after it"):
        train_steps(again, fresh, 1)
    again.load_state_dict(model.state_dict())
    train_steps(again, fresh, 1)


def test_a_state_that_does_not_fit_changes_nothing():
    model = mlp()
    evolving = attach("set", model, momentum(model))
    state, masks = evolving.state_dict(), evolving.masks
    other = mlp(8)
    foreign = attach("set", other, momentum(other)).state_dict()
    for bad in (
        {n: v for n, v in state.items() if n != "memory"},
        state | {"generator": None},
        foreign,
    ):
        with pytest.raises(ValueError, match=r"lacks 'memory'|generator|do not fit"):
            evolving.load_state_dict(bad)
        assert evolving.masks is masks
    before = masks["0.weight"].clone()
    state["masks"]["0.weight"].fill_(True)  # a copy
    assert torch.equal(evolving.masks["0.weight"], before)


OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_rigl_replaces_moves_nothing(kind):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    evolving = attach("rigl", model, optimizer, interval=4)
    train_steps(model, optimizer, 4)
    old, masks = copy.deepcopy(model.state_dict()), evolving.masks
    state = copy.deepcopy(optimizer.state_dict()["state"])
    model.eval()  # batch norm's statistics would follow the data
    train_steps(model, optimizer, 1)
    stays = {n: masks[n] & m for n, m in evolving.masks.items()}
    assert evolving.masks != masks
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old[name] * stays[name] if name in stays else old[name])
    for index, (name, parameter) in enumerate(model.named_parameters()):
        for key, value in optimizer.state[parameter].items():
            keep = stays[name] if name in stays and value.shape == parameter.shape else 1
            assert torch.equal(value, state[index][key] * keep)
    train_steps(model, optimizer, 1)
    assert not torch.equal(model[0].bias, old["0.bias"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["rigl", "granet", "acdc"])
def test_every_optimizer(kind, name):
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    evolving = attach(name, model, optimizer)
    for step in range(STEPS):
        train_steps(model, optimizer, 1, seed=step)
        assert Masks.nonzero(model) <= evolving.masks
        for key, weight in evolving.masks.weights(model).items():
            for tensor in optimizer.state[weight].values():
                if torch.is_tensor(tensor) and tensor.shape == weight.shape:
                    assert (tensor[~evolving.masks[key]] == 0).all()


@pytest.mark.parametrize("name", ["rigl", "granet", "mest-em"])
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_one_batch(name, parts):
    models = [mlp(norm=False).double() for _ in range(2)]
    optimizers = [momentum(m) for m in models]
    options = {"gradient_weight": 1.0} if name == "mest-em" else {}
    whole, split = (attach(name, m, o, **options) for m, o in zip(models, optimizers, strict=True))
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        inputs = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        models[0](inputs).square().mean().backward()
        for part in inputs.chunk(parts):
            (models[1](part).square().mean() / parts).backward()
        for model, optimizer in zip(models, optimizers, strict=True):
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad()
        assert whole.masks == split.masks
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_are_dense_for_due_steps_only():
    model = mlp()
    optimizer = momentum(model)
    evolving = attach("rigl", model, optimizer)
    for step in range(9):
        before = evolving.masks
        train = model(torch.randn(8, 16)).square().mean()
        train.backward()
        outside = model[0].weight.grad[~before["0.weight"]]
        assert (outside != 0).any() == (step % 3 == 0)
        optimizer.step()
        optimizer.zero_grad()


def test_an_unknown_optimizer_never_steps_with_dense_gradients():
    """Its update may mix entries, so masking weights after the step would not be enough."""

    class Watching(torch.optim.SGD):
        outside = 0.0

        def step(self, closure=None):
            mask = evolving.masks["0.weight"]
            self.outside += model[0].weight.grad[~mask].abs().sum().item()
            super().step()

    model = mlp()
    optimizer = Watching(model.parameters(), 0.1)
    evolving = attach("granet", model, optimizer)
    train_steps(model, optimizer, STEPS)
    assert optimizer.outside == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["rigl", "granet", "set", "mest-em"])
def test_gradient_scaling_counts_no_skipped_step(name, fused):
    """Scaled training with overflows makes the masks and weights of plain training."""
    models = [mlp(norm=False) for _ in range(2)]
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01, fused=fused) for m in models]
    options = {"gradient_weight": 2.0} if name == "mest-em" else {}
    plain, scaled = (attach(name, m, o, **options) for m, o in zip(models, optimizers, strict=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        inputs = torch.randn(8, 16, generator=generator)
        models[0](inputs).square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        for factor in (float("inf"), 1.0) if step % 4 == 3 else (1.0,):
            scaler.scale(models[1](inputs).square().mean() * factor).backward()
            scaler.step(optimizers[1])
            scaler.update()
            optimizers[1].zero_grad()
        assert scaled.step == plain.step == step + 1
        assert scaled.masks == plain.masks
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-4, atol=1e-5)
    assert scaler.get_scale() < 1024


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = mlp()
    prepared, optimizer = accelerator.prepare(model, momentum(model))
    evolving = attach("rigl", prepared, optimizer)
    start = evolving.masks
    for step in range(12):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.randn(8, 16)).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert evolving.step == (step + 1) // 2
    assert evolving.masks != start
    assert Masks.nonzero(model) <= evolving.masks


@pytest.mark.parametrize("name", DYNAMIC)
def test_closures_work_or_are_refused(name):
    model = mlp()
    optimizer = momentum(model)
    evolving = attach(name, model, optimizer)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        return loss

    if name in ("rigl", "granet"):
        with pytest.raises(ValueError, match=f"{name} needs gradients before the step begins"):
            optimizer.step(closure)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        return
    for _ in range(STEPS):
        optimizer.step(closure)
        assert Masks.nonzero(model) <= evolving.masks
    assert evolving.masks.nonzeros == round(0.2 * evolving.masks.numel)


def test_gradients_that_are_not_finite_are_named():
    model = mlp(norm=False)
    optimizer = momentum(model)
    evolving = attach("rigl", model, optimizer)
    masks = evolving.masks
    model(torch.full((8, 16), float("nan"))).square().mean().backward()
    with pytest.raises(ValueError, match=r"rigl at step 0: the gradient of '0\.weight' holds NaN"):
        optimizer.step()
    assert evolving.masks is masks


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_compiled_model(name):
    models = [mlp(norm=False) for _ in range(2)]
    compiled = torch.compile(models[1], backend="aot_eager")
    optimizers = [momentum(m) for m in models]
    plain = attach(name, models[0], optimizers[0])
    evolving = attach(name, compiled, optimizers[1])
    train_steps(models[0], optimizers[0], STEPS)
    train_steps(compiled, optimizers[1], STEPS)
    assert evolving.masks == plain.masks
    torch.testing.assert_close(*(m.state_dict() for m in models), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DYNAMIC)
def test_bf16_in_channels_last(name):
    model = ConvNet().to(torch.bfloat16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    evolving = attach(name, model, optimizer)
    inputs = torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    for _ in range(STEPS):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert Masks.nonzero(model) <= evolving.masks
    assert evolving.masks.nonzeros == round(0.2 * evolving.masks.numel)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_and_those_of_other_optimizers_keep_their_masks(name, frozen):
    model = mlp()
    model[0].weight.requires_grad_(not frozen)
    optimizer = torch.optim.SGD([*model[3].parameters(), *model[6].parameters()], 0.05)
    evolving = attach(name, model, optimizer)
    start = evolving.masks
    old = model[0].weight.clone()
    train_steps(model, optimizer, 10)
    assert torch.equal(evolving.masks["0.weight"], start["0.weight"])
    assert torch.equal(model[0].weight, old)
    assert not torch.equal(evolving.masks["3.weight"], start["3.weight"])


def test_remove_lets_go():
    model = mlp()
    optimizer = momentum(model)
    with attach("rigl", model, optimizer) as evolving:
        train_steps(model, optimizer, 5)
        assert Masks.nonzero(model) <= evolving.masks
    step, masks, old = evolving.step, evolving.masks, model[0].bias.detach().clone()
    train_steps(model, optimizer, 5)
    assert (evolving.step, evolving.masks) == (step, masks)
    assert not torch.equal(model[0].bias, old)
    assert Masks.nonzero(model).density > 0.9
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    assert not any(hooks)
    assert not model._load_state_dict_post_hooks
