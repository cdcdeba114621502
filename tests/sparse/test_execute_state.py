"""One checkpoint for both forms: weights, optimizer state, and the bytes they take."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight import sparse
from featherweight.sparse.execute import (
    SparseLinear,
    footprint,
    load_optimizer_state,
    optimizer_state,
    patterns,
    to_dense,
    to_sparse,
)
from tests.models import mlp, train_steps

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


def trained(make=OPTIMIZERS["adam"], norm=True):
    """Return model, optimizer and masks after some held steps; the last layer is whole."""
    model = mlp(norm=norm)
    last = "6.weight" if norm else "4.weight"
    masks = sparse.random(model, 0.3, "uniform", seed=0, exclude=[last])
    optimizer = make(model.parameters())
    with sparse.hold(model, optimizer, masks):
        train_steps(model, optimizer)
    return model, optimizer, masks


def same(a, b):
    """Compare nested states bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class TestWeights:
    def test_the_state_dict_is_that_of_the_dense_model(self, tmp_path):
        model, _, masks = trained()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        to_sparse(model, masks, "bag")
        assert same(model.state_dict(), before)
        assert list(model.state_dict()) == list(before)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        twin = mlp(seed=1)
        twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert same(twin.state_dict(), before)

    def test_a_dense_checkpoint_loads_into_the_same_pattern(self):
        model, _, masks = trained()
        other = mlp(seed=5)
        masks.apply_(other)
        to_sparse(model, masks, "bag")
        values = model[0].values
        model.load_state_dict(other.state_dict())
        assert same(model.state_dict(), dict(other.state_dict()))
        assert model[0].values is values
        assert patterns(model) == masks

    def test_weights_outside_the_pattern_bring_their_own(self):
        model, _, masks = trained()
        to_sparse(model, masks, "masked")
        other = mlp(seed=5)
        wider = sparse.random(other, 0.5, "uniform", seed=9, exclude=["6.weight"])
        wider.apply_(other)
        values = model[0].values
        model.load_state_dict(other.state_dict())
        assert patterns(model) == wider
        assert model[0].values is values
        x = torch.randn(8, 16)
        torch.testing.assert_close(model.eval()(x), other.eval()(x))

    def test_loaded_zeros_inside_the_pattern_stay_kept(self):
        model, _, masks = trained()
        to_sparse(model, masks, "bag")
        whole = {n: t.clone() for n, t in model.state_dict().items()}
        whole["0.weight"].zero_()
        model.load_state_dict(whole)
        assert patterns(model) == masks

    @pytest.mark.parametrize("assign", [False, True])
    def test_assignment_and_prefixes(self, assign):
        model = nn.ModuleDict({"a": nn.Linear(5, 4), "aa": nn.Linear(5, 4)})
        masks = {f"{name}.weight": torch.rand(4, 5) < 0.5 for name in model}
        to_sparse(model, masks, "bag")
        whole = {n: t + 1 for n, t in model.state_dict().items()}
        whole = {n: t * masks[n] if n in masks else t for n, t in whole.items()}
        model.load_state_dict(whole, assign=assign)
        assert same(model.state_dict(), whole)
        assert isinstance(model["a"].values, nn.Parameter)

    def test_what_is_missing_or_does_not_fit_is_named_as_in_the_checkpoint(self):
        layer = SparseLinear.from_dense(nn.Linear(5, 4), torch.rand(4, 5) < 0.5)
        before = layer.state_dict()
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
            layer.load_state_dict({"bias": torch.zeros(4)})
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "values"'):
            layer.load_state_dict({**before, "values": torch.zeros(4)})
        with pytest.raises(RuntimeError, match=r"size mismatch for weight: \[5, 4\]"):
            layer.load_state_dict({**before, "weight": torch.zeros(5, 4)})
        lenient = layer.load_state_dict({}, strict=False)
        assert sorted(lenient.missing_keys) == ["bias", "weight"]
        assert same(layer.state_dict(), before)


class TestOptimizer:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_there_and_back_is_the_same_bit_for_bit(self, name):
        model, optimizer, masks = trained(OPTIMIZERS[name])
        before, groups = optimizer.state_dict(), optimizer.param_groups
        before = {**before, "state": {i: dict(s) for i, s in before["state"].items()}}
        places = groups[0]["params"]  # which other objects may hold
        to_sparse(model, masks, "bag", optimizer=optimizer)
        assert optimizer.param_groups is groups
        assert groups[0]["params"] is places
        state = optimizer.state[model[0].values]
        shapes = {tuple(t.shape) for t in state.values() if t.numel() > 1}
        assert shapes == {(model[0].pattern.nnz,)}
        assert same(optimizer_state(model, optimizer), before)
        to_dense(model, optimizer=optimizer)
        assert same(optimizer.state_dict(), before)
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_goes_on_as_if_nothing_had_happened(self, name):
        # Without batch norms: before one a bias has a gradient of nothing but rounding errors.
        model, optimizer, masks = trained(OPTIMIZERS[name], norm=False)
        twin, other, _ = trained(OPTIMIZERS[name], norm=False)
        to_sparse(model, masks, "bag", optimizer=optimizer)
        with sparse.hold(twin, other, masks):
            expected = train_steps(twin, other, seed=2)
        torch.testing.assert_close(train_steps(model, optimizer, seed=2), expected)
        to_dense(model, optimizer=optimizer)
        for found, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("into", ["sparse", "dense"])
    @pytest.mark.parametrize("start", ["sparse", "dense"])
    def test_checkpoints_load_into_either_form(self, start, into):
        model, optimizer, masks = trained()
        whole = {n: t.clone() for n, t in model.state_dict().items()}
        if start == "sparse":
            to_sparse(model, masks, "bag", optimizer=optimizer)
        saved = optimizer_state(model, optimizer)
        twin = mlp(seed=7)
        twin.load_state_dict(whole)
        if into == "sparse":
            to_sparse(twin, masks, "bag")
        other = OPTIMIZERS["adam"](twin.parameters())
        load_optimizer_state(twin, other, saved)
        assert same(optimizer_state(twin, other), saved)

    def test_state_of_another_model_is_refused(self):
        _, optimizer, _ = trained()
        saved = optimizer.state_dict()
        wide = mlp(width=32)
        to_sparse(wide, sparse.random(wide, 0.3, seed=0), "bag")
        other = OPTIMIZERS["adam"](wide.parameters())
        with pytest.raises(
            ValueError, match=r"'exp_avg' has shape \[24, 16\], the weight \[32, 16"
        ):
            load_optimizer_state(wide, other, saved)
        assert not other.state

    def test_state_that_is_not_elementwise_is_refused_before_anything_is_touched(self):
        model, _, masks = trained()
        optimizer = torch.optim.Adafactor(model.parameters())
        train_steps(model, optimizer)
        places = [id(p) for g in optimizer.param_groups for p in g["params"]]
        with pytest.raises(ValueError, match=r"'row_var' of '0.weight' has shape \[24, 1\]"):
            to_sparse(model, masks, "bag", optimizer=optimizer)
        assert type(model[0]) is nn.Linear
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == places

    def test_groups_and_frozen_weights_keep_their_places(self):
        model, _, masks = trained()
        model[3].weight.requires_grad_(False)
        groups = [
            {"params": [model[0].bias, model[0].weight], "lr": 0.5},
            {"params": [model[6].bias]},
        ]
        optimizer = torch.optim.SGD(groups, 0.1)
        to_sparse(model, masks, "bag", optimizer=optimizer)
        assert optimizer.param_groups[0]["params"][1] is model[0].values
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert len(optimizer.state) == 0


class TestFootprint:
    def test_bytes_of_each_part(self):
        model, optimizer, masks = trained()
        masked = footprint(model, optimizer)
        numbers = sum(p.numel() for p in model.parameters())
        tensors = len(list(model.parameters()))
        assert masked.weights == masked.gradients == 4 * numbers
        assert masked.optimizer == 4 * (3 * numbers + tensors)  # amsgrad, and the count of steps
        assert masked.indices == 0
        to_sparse(model, masks, "bag", optimizer=optimizer)
        found = footprint(model, optimizer)
        numbers -= masks.numel - masks.nonzeros
        assert found.weights == 4 * numbers
        assert found.optimizer == 4 * (3 * numbers + tensors)
        assert found.indices == sum(model[i].pattern.nbytes for i in (0, 3))
        assert found.total == 20 * numbers + 4 * tensors + found.indices
        assert footprint(model).optimizer == 0
        assert str(found).startswith("weights 0.00 MB, gradients")

    def test_frozen_weights_have_no_gradients(self):
        model = mlp()
        model[0].requires_grad_(False)
        found = footprint(model)
        assert found.weights - found.gradients == 4 * 17 * 24

    @pytest.mark.parametrize(("density", "ratio"), [(0.1, 6), (0.05, 12), (0.01, 50)])
    def test_adam_training_shrinks_with_the_density(self, density, ratio):
        sizes = []
        for convert in (lambda m, masks: None, lambda m, masks: to_sparse(m, masks, "bag")):
            model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(2)))
            masks = sparse.random(model, density, "uniform", seed=0)
            convert(model, masks)
            sizes.append(footprint(model).total + 2 * footprint(model).weights)  # two moments
        mask_bytes = 2048 * 2048 * 2 * 4  # float masks, as others ship them
        assert (sizes[0] + mask_bytes) / sizes[1] >= ratio
