"""Iterative loops: exact densities, nested masks, and what each method resets."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight import sparse
from featherweight.sparse import LOOPS, RESETS, Masks, level_counts, signs_from, snapshot
from tests.models import ConvNet, mlp, train_steps
from tests.oracles.prune import slow_levels


def flat(model):
    return torch.cat([w.detach().flatten() for w in Masks.dense(model).weights(model).values()])


def train(model, seed=0):
    train_steps(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 3, seed)


def weights_of(model):
    return {n: w.detach().clone() for n, w in Masks.dense(model).weights(model).items()}


@pytest.mark.parametrize(("sparsity", "prunings"), [(0.9, 11), (0.95, 14), (0.98, 18), (0.99, 21)])
def test_number_of_levels(sparsity, prunings):
    assert len(level_counts(10**6, 0.2, density=1 - sparsity)) == prunings + 1


@given(st.integers(2, 10**6), st.floats(0.01, 0.9), st.floats(1e-4, 1))
def test_counts_follow_the_formula(size, per_level, density):
    if round(density * size) < 1:
        return
    counts = level_counts(size, per_level, density=density)
    formula = [round((1 - per_level) ** t * size) for t in range(len(counts))]
    assert counts[:-1] == formula[:-1]
    assert counts[-1] == max(round(density * size), formula[-1])


def test_counts_by_level_number_are_the_formula():
    assert level_counts(1000, 0.2, levels=4) == [1000, 800, 640, 512, 410]
    assert level_counts(1000, 0.2, levels=2, start=300) == [300, 240, 192]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.1, "levels": 3}, "exactly one"),
        ({}, "exactly one"),
        ({"density": 0.0}, "density must lie"),
        ({"density": 1.5}, "density must lie"),
        ({"sparsity": 1.0}, "density must lie"),
        ({"density": 0.1, "sparsity": 0.9}, "exactly one"),
        ({"density": 0.1, "per_level": 1.0}, "per_level must lie in"),
        ({"density": 0.1, "per_level": 0.0}, "per_level must be over 0"),
        ({"levels": -1}, "levels must be at least 0"),
        ({"density": 1e-9}, "keeps none"),
        ({"density": 0.1, "criterion": "magnitud"}, "did you mean 'magnitude'"),
        ({"density": 0.1, "reset": "weight"}, "did you mean 'weights'"),
        ({"density": 0.1, "criterion": "random"}, "exactly one of seed= and generator="),
        ({"density": 0.1, "optimizer_state": "keep"}, "optimizer_state must be"),
        ({"density": 0.1, "exclude": ["nothing"]}, "fits no parameter"),
    ],
)
@pytest.mark.parametrize("loop", ["imp", "wr", "lrr"])
def test_bad_arguments_are_refused_at_the_call(loop, arguments, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        LOOPS[loop].method(model, **arguments)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_nan_weights_are_named():
    model = mlp()
    levels = sparse.lrr(model, 0.1)
    next(levels)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights of '3.weight' hold NaN"):
        next(levels)


def test_pruning_against_plain_sorting():
    model = mlp()
    values = flat(model).tolist()
    for level, oracle in zip(
        sparse.lrr(model, levels=5, per_level=0.3), slow_levels(values, 0.3, 5), strict=True
    ):
        kept = torch.cat([m.flatten() for m in level.masks.values()]).nonzero().flatten().tolist()
        assert set(kept) == oracle


def test_survivors_are_the_largest_and_masks_nested():
    model = ConvNet()
    before = None
    for level in sparse.lrr(model, 0.1, 0.4):
        if before is not None:
            old_masks, old = before
            assert level.masks <= old_masks
            kept = torch.cat([old[n][m].abs() for n, m in level.masks.items()])
            dropped = torch.cat([old[n][old_masks[n] & ~m].abs() for n, m in level.masks.items()])
            assert kept.min() >= dropped.max()
        with torch.no_grad():
            for weight in level.masks.weights(model).values():
                weight.add_(torch.randn_like(weight))
        level.masks.apply_(model)
        before = level.masks, weights_of(model)
    assert level.final
    assert level.masks.nonzeros == round(0.1 * level.masks.numel)


def test_lrr_leaves_kept_weights_bitwise_alone():
    model = mlp()
    levels = sparse.lrr(model, levels=1)
    next(levels)
    train(model)
    before = copy.deepcopy(model.state_dict())
    level = next(levels)
    for name, tensor in model.state_dict().items():
        mask = level.masks.get(name)
        assert torch.equal(tensor, before[name] if mask is None else before[name] * mask)


@pytest.mark.parametrize("loop", ["imp", "wr"])
def test_imp_and_wr_go_back_bitwise(loop):
    model = mlp()
    levels = LOOPS[loop].method(model, levels=2)
    if loop == "wr":
        assert next(levels).warmup
        train(model, seed=9)
    rewind = copy.deepcopy(model.state_dict())
    next(levels)
    for seed in (0, 1):
        train(model, seed)
        level = next(levels)
        for name, tensor in model.state_dict().items():
            mask = level.masks.get(name)
            assert torch.equal(tensor, rewind[name] if mask is None else rewind[name] * mask)


def reset_once(reset, **options):
    """Train, prune once with a reset; return the states start, trained and after, and the masks."""
    model = mlp()
    start = snapshot(model)
    levels = sparse.iterate(model, levels=1, reset=reset, **options)
    next(levels)
    train(model)
    trained = snapshot(model)
    level = next(levels)
    return start, trained, snapshot(model), level.masks


NORM_KEYS = [f"{i}.{k}" for i in (1, 4) for k in ("weight", "bias", "running_mean", "running_var")]


def test_reset_parameters_leaves_statistics():
    start, trained, after, masks = reset_once("parameters")
    for name in after:
        source = trained if "running" in name or "tracked" in name else start
        assert torch.equal(after[name], source[name] * masks.get(name, torch.tensor(1))), name


def test_reset_weights_not_norms():
    start, trained, after, masks = reset_once("weights-not-norms")
    for name in after:
        norm = name.split(".")[0] in ("1", "4")
        source = trained if norm else start
        assert torch.equal(after[name], source[name] * masks.get(name, torch.tensor(1))), name


def test_reset_norms_touches_norms_only():
    start, trained, after, masks = reset_once("norms")
    for name in after:
        norm = name.split(".")[0] in ("1", "4")
        source = start if norm else trained
        assert torch.equal(after[name], source[name] * masks.get(name, torch.tensor(1))), name


def test_reset_norm_magnitudes_keeps_signs():
    model = mlp()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, 24))
    start = snapshot(model)
    levels = sparse.iterate(model, levels=1, reset="norm-magnitudes")
    next(levels)
    with torch.no_grad():
        model[1].weight.mul_(-3)
    next(levels)
    assert torch.equal(model[1].weight, -start["1.weight"])


def test_magnitudes_and_signs_are_opposite():
    start, trained, magnitudes, masks = reset_once("magnitudes")
    *_, signs, _ = reset_once("signs")
    assert (start["0.weight"].sign() != trained["0.weight"].sign()).any()
    for name, mask in masks.items():
        assert torch.equal(magnitudes[name][mask].abs(), start[name][mask].abs())
        assert torch.equal(magnitudes[name][mask].sign(), trained[name][mask].sign())
        assert torch.equal(signs[name][mask].abs(), trained[name][mask].abs())
        assert torch.equal(signs[name][mask].sign(), start[name][mask].sign())


def test_both_together_are_the_weights():
    start, _, after, masks = reset_once(["magnitudes", "signs"])
    for name, mask in masks.items():
        assert torch.equal(after[name], start[name] * mask)


def test_shuffled_magnitudes_are_a_permutation_of_each_layer():
    model = mlp()
    start = snapshot(model)
    generator = torch.Generator().manual_seed(0)
    trained = {n: -w for n, w in weights_of(model).items()}
    with torch.no_grad():
        for name, weight in Masks.dense(model).weights(model).items():
            weight.copy_(trained[name])
    RESETS["shuffled-magnitudes"].method(model, start, generator=generator)
    for name, weight in weights_of(model).items():
        assert torch.equal(
            weight.abs().flatten().sort().values, start[name].abs().flatten().sort().values
        )
        assert not torch.equal(weight.abs(), start[name].abs())
        assert torch.equal(weight.sign(), trained[name].sign())


def test_signs_of_another_run():
    other = mlp(seed=5).state_dict()
    start, _, after, masks = reset_once(signs_from(other))
    for name in after:
        if name in masks:
            expected = start[name].abs().copysign(other[name]) * masks[name]
            assert torch.equal(after[name], expected)
        else:
            assert torch.equal(after[name], start[name])


def test_masks_of_another_run_are_used():
    model, twin = mlp(), mlp(seed=3)
    given_masks = [level.masks for level in sparse.lrr(twin, levels=3, per_level=0.5)]
    for source in (given_masks, lambda index: given_masks[index]):
        found = [
            level.masks for level in sparse.imp(copy.deepcopy(model), levels=3, masks_from=source)
        ]
        assert found == given_masks
    with pytest.raises(ValueError, match="masks do not fit"):
        list(sparse.lrr(mlp(8), levels=3, masks_from=given_masks))


def test_sparse_to_sparse_never_leaves_its_support():
    model = mlp()
    support = sparse.random(model, 0.5, "balanced", seed=0)
    levels = list(sparse.lrr(model, 0.1, 0.5, support=support))
    assert levels[0].masks == support
    assert all(level.masks <= support for level in levels)
    assert levels[-1].masks.nonzeros == round(0.1 * support.numel)
    with pytest.raises(ValueError, match="the support holds"):
        sparse.lrr(model, 0.6, support=support)


def test_per_level_zero_trains_a_fixed_mask_in_cycles():
    model = mlp()
    support = sparse.random(model, 0.5, seed=0)
    masks = [level.masks for level in sparse.lrr(model, levels=3, per_level=0.0, support=support)]
    assert masks == [support] * 4


def test_no_pruning_is_plain_training():
    model, plain = mlp(), mlp()
    for level in sparse.lrr(model, density=1.0):
        assert level.final
        train(model)
    train(plain)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.parametrize("policy", ["reset", "carry", "rewind"])
def test_optimizer_state_follows_its_policy(policy):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train_steps(model, optimizer, 2)
    start = copy.deepcopy(optimizer.state_dict()["state"])
    levels = sparse.lrr(model, levels=1, optimizer=optimizer, optimizer_state=policy)
    next(levels)
    train_steps(model, optimizer, 3, seed=7)
    trained = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = 0.123
    masks = next(levels).masks
    after = optimizer.state_dict()["state"]
    assert optimizer.param_groups[0]["lr"] == 0.123
    if policy == "reset":
        assert after == {}
        return
    source = trained if policy == "carry" else start
    for index, (name, _) in enumerate(model.named_parameters()):
        expected = source[index]["exp_avg"] * masks.get(name, torch.tensor(1))
        assert torch.equal(after[index]["exp_avg"], expected)
        assert torch.equal(after[index]["step"], source[index]["step"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reset": "weights", "warmup": True},
        {"reset": "shuffled-magnitudes", "seed": 0},
        {"criterion": "random", "scope": "erk", "seed": 0},
    ],
)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resuming_equals_never_stopping(options, stop):
    def run(model, resume=None, until=None):
        for level in sparse.iterate(model, levels=3, per_level=0.5, resume=resume, **options):
            if level.index == until:
                return level.resume
            train(model, level.index)
            level.masks.apply_(model)
        return None

    whole, stopped = mlp(), mlp()
    run(whole)
    resume = run(stopped, until=stop)
    resumed = mlp(seed=8)  # another process: only the saved state comes along
    resumed.load_state_dict(stopped.state_dict())
    run(resumed, resume)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


def test_resume_beyond_the_end_is_refused():
    model = mlp()
    *_, last = sparse.lrr(model, levels=3)
    with pytest.raises(ValueError, match="resume is at level 3, the loop has 2 levels"):
        sparse.lrr(model, levels=1, resume=last.resume)


def test_levels_say_what_they_are():
    texts = [str(level) for level in sparse.wr(mlp(norm=False), levels=1, per_level=0.5)]
    assert texts == [
        "warm-up, density 1",
        "level 0 of 1, density 1",
        "level 1 of 1, density 0.5",
    ]
