"""What people expect of a PyTorch optimizer, asked of all of ours and of torch's AdamW."""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.optim.factories import ROWS, batch, loss_of, network, schedule_of, train


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


def weights_after(optimizer_of, steps=5, model=None):
    model = network() if model is None else model
    train(model, optimizer_of(model), range(steps))
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def states(optimizer):
    """State tensors of all parameters, copied, by number of the parameter and key."""
    return {
        (i, key): value.clone()
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_is_an_optimizer_that_learns_and_is_deterministic(row):
    model = network()
    optimizer = row.make(model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ in repr(optimizer)
    first = loss_of(model, 0).item()
    for _ in range(30):
        train(model, optimizer, range(1))
    assert loss_of(model, 0).item() < 0.5 * first
    ends = [weights_after(lambda m: row.make(m.parameters())) for _ in range(2)]
    assert torch.equal(*ends)


def test_nonsense_is_refused(row):
    with pytest.raises(ValueError, match="empty parameter list"):
        row.make([])
    with pytest.raises(TypeError):
        row.make(torch.zeros(2))
    with pytest.raises(ValueError, match=r"learning rate|lr"):
        row.make(network().parameters(), lr=-1.0)
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        row.make([{"params": [weight]}, {"params": [weight]}])


def test_a_sparse_gradient_is_refused_before_anything_moves(row):
    table = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    optimizer = row.make([table.weight, other])
    (table(torch.tensor([1, 2])) * other).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_groups_are_as_good_as_optimizers_of_their_own(row):
    models = [network(), network()]
    heads = [list(model[6].parameters()) for model in models]
    bodies = [[p for i in range(6) for p in model[i].parameters()] for model in models]
    one = row.make([{"params": bodies[0]}, {"params": heads[0], "lr": 0.003}])
    two = [row.make(bodies[1]), row.make(heads[1], lr=0.003)]
    for step in range(4):
        for model, optimizers in zip(models, ([one], two), strict=True):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_a_group_may_be_added_after_training_began(row):
    model = network()
    optimizer = row.make(model[4].parameters())
    train(model, optimizer, range(2))
    head = model[6].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[6].parameters()), "lr": 0.002})
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()
    train(model, optimizer, range(2, 4))
    assert not torch.equal(model[6].weight, head)
    assert optimizer.param_groups[1]["lr"] == 0.002


def test_named_parameters_keep_their_names(row):
    model = network()
    optimizer = row.make(model.named_parameters())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == [name for name, _ in model.named_parameters()]


def test_a_parameter_without_gradient_is_left_alone(row):
    model, idle = network(), nn.Parameter(torch.ones(3))
    optimizer = row.make([*model.parameters(), idle])
    train(model, optimizer, range(3))
    assert torch.equal(idle, torch.ones(3))


def test_zero_grad_both_ways(row):
    model = network()
    optimizer = row.make(model.parameters())
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_runs_with_gradients_and_its_loss_is_returned(row):
    model = network()
    optimizer = row.make(model.parameters())
    for step in range(4):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        expected = loss_of(model, step).item()
        assert optimizer.step(closure).item() == expected
    assert torch.equal(flat(model), weights_after(lambda m: row.make(m.parameters()), 4))


def test_maximize_climbs(row):
    if "maximize" not in row.options:
        pytest.skip("takes no maximize")
    up, down = network(), network()
    ascent, descent = row.make(up.parameters(), maximize=True), row.make(down.parameters())
    for step in range(3):
        for model, optimizer, sign in ((up, ascent, -1.0), (down, descent, 1.0)):
            optimizer.zero_grad()
            (sign * loss_of(model, step)).backward()
            optimizer.step()
    assert torch.equal(flat(up), flat(down))


@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_foreach_and_fused_are_the_loop(row, option):
    if option not in row.options:
        pytest.skip(f"takes no {option}")
    ends = [
        weights_after(lambda m, o=o: row.make(m.parameters(), **o))
        for o in ({"foreach": False, "fused": False}, {option: True})
    ]
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_may_be_a_tensor_that_changes_in_place(row):
    rate = torch.tensor(0.01)
    model, other = network(), network()
    optimizer, control = (
        row.make(model.parameters(), lr=rate),
        row.make(other.parameters(), lr=0.01),
    )
    for step in range(4):
        rate.fill_(0.01 / (step + 1))
        control.param_groups[0]["lr"] = 0.01 / (step + 1)
        train(model, optimizer, range(step, step + 1))
        train(other, control, range(step, step + 1))
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-4, atol=1e-6)


def test_a_learning_rate_of_zero_with_zero_gradients_makes_all_state_and_moves_nothing(row):
    """What torch's distributed checkpoints do before they load."""
    model = network()
    optimizer = row.make(model.parameters(), lr=0.0)
    before = flat(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(flat(model), before)
    trained = row.make(network().parameters())
    for weight in trained.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    trained.step()
    assert states(optimizer).keys() == states(trained).keys()


def test_schedules_reach_the_step(row):
    model = network()
    optimizer = row.make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
    train(model, optimizer, range(2), schedule)
    before = flat(model)
    train(model, optimizer, range(2, 4), schedule)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", ["one cycle", "plateau"])
def test_schedules_that_ask_the_optimizer_for_more(row, kind):
    model = network()
    optimizer = row.make(model.parameters())
    if kind == "one cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=5)
        train(model, optimizer, range(4), schedule)
    else:
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        rate = optimizer.param_groups[0]["lr"]
        for _ in range(3):
            train(model, optimizer, range(1))
            schedule.step(1.0)
        assert optimizer.param_groups[0]["lr"] < rate
    assert flat(model).isfinite().all()


def test_hooks_run_once_a_step_and_may_change_its_arguments(row):
    model = network()
    optimizer = row.make(model.parameters())
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda o, *_: seen.append(o is optimizer)),
    ]
    train(model, optimizer, range(2))
    assert seen == ["pre", True, "pre", True]
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(2))
    assert len(seen) == 4


def test_hooks_of_state_dicts(row):
    model = network()
    optimizer = row.make(model.parameters())
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["extra"]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o is optimizer))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", 1, True]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_as_the_original(row, copier):
    model = network()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(3))
    other, twin = copier((model, optimizer))
    assert type(twin) is type(optimizer)
    for one, its in ((model, optimizer), (other, twin)):
        train(one, its, range(3, 6))
    assert torch.equal(flat(model), flat(other))
    assert_same(states(optimizer), states(twin))


def test_gradients_may_be_accumulated(row):
    model = network()
    optimizer = row.make(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for images, labels in zip(*(part.chunk(3) for part in batch(step)), strict=True):
            (nn.functional.cross_entropy(model(images), labels) / 3).backward()
        optimizer.step()
    whole = weights_after(lambda m: row.make(m.parameters()), 3)
    torch.testing.assert_close(flat(model), whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_changes_nothing_and_skips_infinite_steps(row, clip):
    ends = []
    for scaled in (False, True):
        model = network()
        optimizer = row.make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        ends.append(flat(model))
    assert torch.equal(*ends)
    before = states(optimizer)
    optimizer.zero_grad()
    (scaler.scale(loss_of(model, 4)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), ends[1])
    assert_same(states(optimizer), before)
    assert scaler.get_scale() == 512.0


def test_a_step_for_each_parameter_during_the_backward_pass(row):
    model = network()
    own = {p: row.make([p]) for p in model.parameters()}

    def step(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for number in range(3):
        loss_of(model, number).backward()
    assert torch.equal(flat(model), weights_after(lambda m: row.make(m.parameters()), 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(row, dtype):
    model = network(dtype)
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(4))
    assert flat(model).dtype is dtype
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), flat(network(dtype)))


def test_channels_last_weights_are_the_same_weights(row):
    def last(model):
        return model.to(memory_format=torch.channels_last)

    ends = [
        weights_after(lambda m: row.make(m.parameters()), 4, m)
        for m in (network(), last(network()))
    ]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


def test_gradients_of_another_layout_are_the_same_gradients(row):
    if not row.layouts:
        pytest.skip("the inner optimizer does not")
    model = network().to(memory_format=torch.channels_last)
    optimizer = row.make(model.parameters())
    for step in range(4):
        loss_of(model, step).backward()
        for weight in model.parameters():
            weight.grad = weight.grad.contiguous(memory_format=torch.contiguous_format)
        optimizer.step()
        optimizer.zero_grad()
    plain = weights_after(lambda m: row.make(m.parameters()), 4)
    torch.testing.assert_close(flat(model), plain, rtol=1e-3, atol=1e-5)


RESUMED_AT = (0, 1, 4, 7)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """State dicts after training without a break, and after a break, by optimizer and step."""
    folder = tmp_path_factory.mktemp("resume")
    before, unbroken = {}, {}
    for name, row in ROWS.items():
        for at in RESUMED_AT:
            model = network()
            optimizer = row.make(model.parameters())
            schedule = schedule_of(optimizer)
            train(model, optimizer, range(at), schedule)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            before[name, at] = {k: copy.deepcopy(v.state_dict()) for k, v in parts.items()}
            train(model, optimizer, range(at, at + 5), schedule)
            unbroken[name, at] = {"model": model.state_dict(), "optimizer": optimizer}
    torch.save(before, folder / "before.pt")
    apart("tests.optim.resume", folder)
    return unbroken, torch.load(folder / "after.pt", weights_only=True)


def apart(module, folder):
    """Run a module in a process of its own, on as many threads: rounding depends on them."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("at", RESUMED_AT)
@pytest.mark.parametrize("name", ROWS)
def test_a_new_process_goes_on_to_the_bit(resumed, name, at):
    unbroken, after = (found[name, at] for found in resumed)
    assert_same(unbroken["model"], after["model"])
    state = states(unbroken["optimizer"])
    found = {
        (i, k): v
        for i, s in after["optimizer"]["state"].items()
        for k, v in s.items()
        if isinstance(v, torch.Tensor)
    }
    assert_same(state, found)
    assert {key: value.dtype for key, value in state.items()} == {
        key: value.dtype for key, value in found.items()
    }
    groups = unbroken["optimizer"].state_dict()["param_groups"]
    assert groups == after["optimizer"]["param_groups"]


def test_a_checkpoint_needs_no_pickled_code(row):
    model = network()
    optimizer = row.make(model.parameters())
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = row.make(network().parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(states(optimizer), states(other))


def fed(optimizer, weight, step, numbers):
    for number in numbers:
        weight.grad = (weight.detach() * (number + 1)).sin()
        optimizer.param_groups[0]["lr"].fill_(0.01 / (number + 1))
        step()


def test_a_traced_step_is_the_step_and_a_tensor_rate_is_followed_without_tracing_again(row):
    torch._dynamo.reset()
    ends = []
    for traced in (False, True):
        weight = nn.Parameter(torch.linspace(-1.0, 1.0, 40))
        optimizer = row.make([weight], lr=torch.tensor(0.01))
        step = torch.compile(optimizer.step, backend="eager") if traced else optimizer.step
        fed(optimizer, weight, step, range(2))
        with torch.compiler.set_stance("fail_on_recompile" if traced else "default"):
            fed(optimizer, weight, step, range(2, 5))
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["HamAdamW"])
def test_a_compiled_step_is_the_step(name):
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        weight = nn.Parameter(torch.linspace(-1.0, 1.0, 40))
        optimizer = ROWS[name].make([weight], lr=torch.tensor(0.01))
        fed(
            optimizer, weight, torch.compile(optimizer.step) if compiled else optimizer.step, [0, 1]
        )
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    apart("tests.optim.ranks", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("how", ["replicated", "sharded_and_resumed"])
@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_train_as_one(ranks, name, how):
    if (name, how) not in ranks[0]:
        pytest.skip("does not shard")
    first, second = (found[name, how] for found in ranks)
    assert_same(first, second)
    alone = network()
    train(alone, ROWS[name].make(alone.parameters()), range(6))
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=2e-3, atol=2e-5)
