"""Parameter groups: what is selected from and what is trained whole, by module and role."""

import pytest
import torch
from torch import nn

from featherweight.optim.groups import groups
from featherweight.optim.nanoadam import NanoAdam


class Values(nn.Module):
    """A truly sparse layer: its weights are one-dimensional, and it says so."""

    parameter_roles = {"values": "weight", "shift": "bias", "gain": "norm"}  # noqa: RUF012

    def __init__(self, size=5000):
        super().__init__()
        self.values = nn.Parameter(torch.randn(size))
        self.shift = nn.Parameter(torch.zeros(size))
        self.gain = nn.Parameter(torch.ones(size))


class StrangeRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class NormalizedLinear(nn.Linear):
    pass


class PreNorm(nn.Module):
    """Named like a norm, but what it holds is not one."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 80)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.position = nn.Parameter(torch.zeros(1, 80, 64))
        self.conv = nn.Conv2d(16, 32, 3)
        self.bn = nn.BatchNorm2d(5000)
        self.ln = nn.LayerNorm((80, 64))
        self.rms = StrangeRMSNorm(5000)
        self.linear = NormalizedLinear(64, 5000)
        self.attention = nn.MultiheadAttention(64, 2)
        self.sparse = Values()
        self.block = PreNorm()
        self.small = nn.Linear(8, 8)
        self.frozen = nn.Linear(100, 100).requires_grad_(False)
        self.fc = nn.Linear(64, 80)


def kinds(model, **options):
    found = {}
    for group in groups(model, **options):
        kind = "whole" if group.get("density") == 1.0 else "selected"
        for name, _ in group["params"]:
            found.setdefault(kind, set()).add(name)
    return found


def test_each_kind_of_module():
    found = kinds(Network())
    assert found["selected"] == {
        "embedding.weight", "position", "conv.weight", "linear.weight", "attention.in_proj_weight",
        "attention.out_proj.weight", "sparse.values", "block.inner.weight",
    }  # fmt: skip
    trained = {name for name, p in Network().named_parameters() if p.requires_grad}
    assert found["whole"] == trained - found["selected"]


def test_what_optimizers_do_with_them():
    model = Network()
    optimizer = NanoAdam(groups(model), 1e-3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {p: n for n, p in model.named_parameters()}
    compact = {names[p] for p, state in optimizer.state.items() if "index" in state}
    assert compact == kinds(model)["selected"]
    assert [len(g["param_names"]) for g in optimizer.param_groups] == [8, 16]
    torch.optim.AdamW(groups(model), 1e-3)  # any optimizer takes them


def test_the_head_may_be_named_or_absent():
    assert "fc.weight" in kinds(Network(), head=None)["selected"]
    named = kinds(Network(), head="linear")
    assert "linear.weight" in named["whole"]
    assert "fc.weight" in named["selected"]
    with pytest.raises(ValueError, match="head='classifier' fits no module of Network"):
        groups(Network(), head="classifier")


def test_patterns_exclude():
    assert "conv.weight" in kinds(Network(), exclude=["conv.*"])["whole"]
    assert "conv.weight" in kinds(Network(), exclude="conv.*")["whole"]
    with pytest.raises(ValueError, match="pattern 'convolution' fits no parameter"):
        groups(Network(), exclude=["convolution"])


def test_sizes():
    assert "small.weight" in kinds(Network(), min_size=64)["selected"]
    assert "conv.weight" in kinds(Network(), min_size=4609)["whole"]
    model = Network()
    optimizer = NanoAdam(groups(model, min_size=64), 1e-3)
    model.small.weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert "index" in optimizer.state[model.small.weight]


def test_decay_spares_norms_and_biases():
    decays = {
        name: group["weight_decay"]
        for group in groups(Network(), weight_decay=0.1)
        for name, _ in group["params"]
    }
    assert decays["linear.weight"] == decays["fc.weight"] == decays["small.weight"] == 0.1
    assert decays["linear.bias"] == decays["bn.weight"] == decays["rms.weight"] == 0.0
    assert decays["sparse.values"] == 0.1
    assert decays["sparse.shift"] == decays["sparse.gain"] == 0.0
    assert all("weight_decay" not in group for group in groups(Network()))


def test_tied_weights_are_in_once_and_a_tied_head_is_told():
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match="weight is tied to an embedding"):
        found = groups(model)
    assert [name for g in found for name, _ in g["params"]] == ["0.weight", "1.bias"]
    assert found[0]["density"] == 1.0
    assert kinds(model, head=None)["selected"] == {"0.weight"}


def test_a_wrong_role_is_refused():
    layer = Values()
    layer.parameter_roles = {"values": "weights"}
    with pytest.raises(ValueError, match="must say weight, bias or norm, got 'weights'"):
        groups(nn.Sequential(layer))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="Linear has no parameter to train"):
        groups(nn.Linear(3, 3).requires_grad_(False))


def test_wrapped_models_give_the_names_of_the_model():
    names = [n for g in groups(torch.compile(Network())) for n, _ in g["params"]]
    assert "conv.weight" in names


def test_transformers_models_name_their_head():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip
    found = kinds(model, min_size=1)
    assert "lm_head.weight" in found["whole"]
    assert "model.embed_tokens.weight" in found["selected"]
    assert {n for n in found["whole"] if "norm" in n} == {
        "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip
