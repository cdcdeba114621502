"""From masked to sparse and back: all or nothing, and not a bit lost."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from featherweight import sparse
from featherweight.optim.weights import ham_weights
from featherweight.sparse.execute import (
    SparseLinear,
    backends,
    patterns,
    to_dense,
    to_sparse,
)
from tests.models import mlp


def masked(density=0.3):
    """Return a masked model and its masks; the last layer is whole."""
    model = mlp()
    masks = sparse.random(model, density, "uniform", seed=0, exclude=["6.weight"])
    masks.apply_(model)
    return model, masks


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_there_and_back_is_the_same_bit_for_bit():
    model, masks = masked()
    before, x = state(model), torch.randn(8, 16)
    expected = model.eval()(x)
    converted = to_sparse(model, backend="bag")
    assert converted is model
    assert [type(m) for m in model if hasattr(m, "weight")][::2] == [SparseLinear] * 2 + [nn.Linear]
    assert patterns(model) == masks
    torch.testing.assert_close(model(x), expected)
    assert to_dense(model) is model
    assert type(model[0]) is nn.Linear
    assert equal(state(model), before)
    assert torch.equal(model(x), expected)


def test_masks_drop_what_they_mask():
    model = mlp()
    masks = sparse.random(model, 0.3, seed=0)
    expected = copy.deepcopy(model)
    masks.apply_(expected)
    to_dense(to_sparse(model, masks, "masked"))
    assert equal(state(model), state(expected))


def test_kept_zeros_stay_kept():
    model, masks = masked()
    with torch.no_grad():
        model[0].weight.zero_()
    to_sparse(model, masks, "bag")
    assert patterns(model) == masks


def test_layers_of_which_nothing_is_masked_stay_as_they_are():
    model = mlp()
    layers = list(model)
    assert list(to_sparse(model)) == layers
    assert list(to_sparse(model, sparse.Masks.dense(model))) == layers
    with pytest.raises(ValueError, match="no sparse layer"):
        patterns(model)


def test_biases_and_other_parameters_stay_the_same_objects():
    model, _ = masked()
    others = {n: p for n, p in model.named_parameters() if n not in ("0.weight", "3.weight")}
    to_sparse(model, backend="bag")
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in others.items())
    to_dense(model)
    assert dict(model.named_parameters())["0.bias"] is others["0.bias"]


def test_modes_and_hooks_of_modules_are_carried_over():
    model, _ = masked()
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[3].register_full_backward_hook(lambda *_: calls.append("backward"))
    model.eval()
    to_sparse(model, backend="bag")
    assert not model[0].training
    model(torch.randn(2, 16)).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    to_dense(model)
    model(torch.randn(2, 16)).sum().backward()
    assert calls == ["forward", "backward", "backward"]


def test_gradients_come_along():
    model, masks = masked()
    model(torch.randn(8, 16)).sum().backward()
    gradient = model[0].weight.grad.clone()
    to_sparse(model, backend="bag")
    assert torch.equal(model[0].values.grad, gradient[masks["0.weight"]])
    to_dense(model)
    assert torch.equal(model[0].weight.grad, gradient * masks["0.weight"])


def test_a_module_with_two_names_stays_one():
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    to_sparse(model, {"a.weight": torch.rand(6, 6) < 0.5}, "bag")
    assert type(model["a"]) is SparseLinear
    assert model["b"][0] is model["a"]


def test_a_model_of_one_layer_is_returned_anew():
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    mask = torch.rand(4, 6) < 0.5
    model = to_sparse(layer, {"weight": mask}, "bag")
    assert type(model) is SparseLinear
    assert torch.equal(to_dense(model).weight, before * mask)


def test_backends_by_name_and_by_example_of_another_model():
    model, masks = masked()
    to_sparse(model, masks, {"0": "shrunk", "3": "csr"})
    assert backends(model) == {"0": "shrunk", "3": "csr"}
    twin, _ = masked()
    assert backends(to_sparse(twin, masks, backends(model))) == backends(model)


def test_values_carry_the_role_of_weights():
    model, masks = masked()
    to_sparse(model, masks, "bag")
    assert set(ham_weights(model)) == {"0.values", "3.values", "6.weight"}


def tie(model):
    model[6].weight = nn.Parameter(model[6].weight.detach())
    model.twin = nn.Linear(24, 4)
    model.twin.weight = model[6].weight


def replace(kind):
    def change(model):
        model[6] = kind()

    return change


class Other(nn.Linear):
    """A user's layer."""


def parametrised(model):
    parametrize.register_parametrization(model[6], "weight", nn.Tanh())


REFUSED = {
    "tied": (tie, "tied to another module's parameter"),
    "subclass": (replace(lambda: Other(24, 4)), "belongs to Other"),
    "parametrised": (parametrised, "it is parametrised"),
    "pruned": (lambda m: prune.random_unstructured(m[6], "weight", 0.5), "torch.nn.utils.prune"),
    "conv1d": (replace(lambda: nn.Conv1d(24, 4, 1)), "belongs to Conv1d"),
    "backend": (lambda m: None, "module '0': backend '2:4' can't run"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("by", ["masks", "zeros"])
def test_what_cannot_be_converted_is_refused_before_anything_is_touched(case, by):
    model = mlp()
    change, text = REFUSED[case]
    change(model)
    shapes = {"0.weight": (24, 16), "6.weight": tuple(model[6].weight.shape)}
    masks = {name: torch.rand(shape) < 0.5 for name, shape in shapes.items()}
    if by == "zeros":
        with torch.no_grad():
            model[0].weight.mul_(masks["0.weight"])
            for parameter in model[6].parameters():
                parameter.data[:1] = 0
    before, layers = state(model), list(model)
    options = {"backend": "2:4" if case == "backend" else "bag"}
    with pytest.raises(ValueError, match=text):
        to_sparse(model, masks if by == "masks" else None, **options)
    assert list(model) == layers
    assert equal(state(model), before)
    if case != "backend":
        to_sparse(model, masks if by == "masks" else None, "bag", exclude=["6.*", "twin.*"])
        assert type(model[0]) is SparseLinear


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        ({"7.weight": torch.zeros(2, 2, dtype=torch.bool)}, "the model has no '7.weight'"),
        ({"1.weight": torch.zeros(24, dtype=torch.bool)}, "no weight of a Linear or convolution"),
        ({"0.bias": torch.zeros(24, dtype=torch.bool)}, "no weight of a Linear or convolution"),
        ({"0.weight": torch.zeros(16, 24, dtype=torch.bool)}, r"shape \[24, 16\], got \[16, 24\]"),
    ],
)
def test_masks_of_another_model_are_refused(masks, text):
    model = mlp()
    with pytest.raises(ValueError, match=text):
        to_sparse(model, masks)
    assert type(model[0]) is nn.Linear


def test_unknown_modules_and_wrapped_models_are_refused():
    model, masks = masked()
    with pytest.raises(ValueError, match="unknown sparse module '6'"):
        to_sparse(model, masks, {"6": "bag"})
    wrapped = nn.DataParallel(model)
    for convert in (to_sparse, to_dense):
        with pytest.raises(ValueError, match="wrapped in DataParallel"):
            convert(wrapped)
    assert type(model[0]) is nn.Linear


# torch's own tracing of functions with a backward
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["masked", "bag", "shrunk"])
def test_compiled_and_exported_as_one_graph(backend):
    torch._dynamo.reset()
    model, masks = masked()
    model = to_sparse(model.eval(), masks, backend)
    x = torch.randn(20, 16)
    expected = model(x)
    expected.square().sum().backward()
    gradient = model[0].values.grad.clone()
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model[0].values.grad, gradient)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
