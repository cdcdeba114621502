"""What can't be routed is refused before it is touched, and the message says where and why."""

import copy

import pytest
import torch
from torch import nn

from featherweight import depth
from featherweight.lab import models
from tests.depth.factories import hugging_vit, images, llama, logits, own


def untouched(model, call, message):
    state, x = copy.deepcopy(model.state_dict()), images()
    before = logits(model(x))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert classes == [type(module) for module in model.modules()]
    assert list(model.state_dict()) == list(state)
    assert torch.equal(logits(model(x)), before)
    assert not depth.is_routed(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0]}, r"blocks.0 can't be routed by attention: no layer comes before it"),
        ({"layers": [1, 2]}, r"blocks.2 follows the routed blocks.1"),
        ({"layers": [1, 1]}, "layers must be different numbers"),
        ({"layers": [4]}, r"layers must be different numbers in \[0, 3\]"),
        ({"layers": []}, "layers must be different numbers"),
        ({"layers": "odd"}, "layers must be 'alternate'"),
        ({"layers": [3], "keep_last_dense": True}, "layers must be different numbers"),
        ({"layers": [0, 1], "policy": "last_dense"}, "no layer comes before it"),
        ({"policy": "none"}, "unknown policy 'none'"),
        ({"capacity": 0.0}, "capacity is the fraction processed"),
        ({"capacity": 50}, "capacity is the fraction processed"),
        ({"capacity": [0.5]}, "one for each of the 2 routed layers, got 1"),
        ({"score": "flash"}, "unknown score 'flash'"),
        ({"queries": 0}, "queries must be"),
        ({"queries": "rows"}, "queries must be"),
        ({"heads": "sum"}, "unknown heads 'sum'"),
        ({"rounding": "up"}, "unknown rounding 'up'"),
        ({"gate": "unit"}, "gate must be 'none' for router 'a-mod'"),
        ({"auxiliary": "router"}, "auxiliary losses need router 'mod'"),
        ({"prefix": -1}, "prefix must be at least 0"),
        ({"std": -1.0}, "std must be at least 0"),
    ],
)
def test_bad_options(options, message):
    untouched(own(), lambda model: depth.a_mod(model, **options), message)


def test_unknown_router():
    untouched(own(), lambda model: depth.route(model, "amod"), "unknown router 'amod'")


def test_layers_of_wrong_type():
    with pytest.raises(TypeError, match="layers must be whole numbers"):
        depth.a_mod(own(), layers=[1.5])


def test_twice():
    model = depth.a_mod(own())
    with pytest.raises(ValueError, match="routed already; call to_dense first"):
        depth.mod(model)
    with pytest.raises(ValueError, match="routed already"):
        depth.tome(model, 2)
    depth.to_dense(model)
    with pytest.raises(ValueError, match="Vit isn't routed"):
        depth.to_dense(model)


def test_models_without_blocks():
    mlp = models.build("mlp", classes=10, shape=(3, 16, 16), seed=0)
    untouched(mlp, depth.a_mod, "has no list of transformer blocks")


def test_unknown_attention():
    class Cosine(type(own().blocks[0].attention)):
        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            query = nn.functional.normalize(query, dim=-1)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value)
            return self.projection(mixed.transpose(1, 2).flatten(2))

    model = own()
    model.blocks[2].attention.__class__ = Cosine
    untouched(
        model, depth.a_mod, "blocks.2 can't be listened to: its attention isn't plain softmax"
    )
    untouched(model, lambda m: depth.tome(m, 2), "blocks.2 can't merge tokens: its attention isn't")
    depth.mod(model)


def test_parts_that_are_not_known():
    model = own()
    model.blocks[0].attention.relative_bias = nn.Parameter(torch.zeros(4, 17, 17))
    untouched(model, depth.a_mod, "blocks.0 can't be listened to.*relative_bias")


def test_post_norm_blocks():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**sizes, intermediate_size=32, vocab_size=20))
    with pytest.raises(
        ValueError, match=r"encoder.layer.0 \(BertLayer\) can't be routed: no norms"
    ):
        depth.a_mod(bert)


def test_hierarchical_models():
    from transformers import SwinConfig, SwinModel

    swin = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2],
                                num_heads=[2, 2], window_size=4))  # fmt: skip
    with pytest.raises(ValueError, match="has 2 lists of blocks"):
        depth.a_mod(swin)


def test_attention_implementations():
    model = hugging_vit()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="implementation 'flash_attention_2' can't be routed"):
        depth.a_mod(model)


def test_causal_models_are_refused_by_a_mod():
    model = llama()
    with pytest.raises(ValueError, match="router 'a-mod' is for encoders"):
        depth.a_mod(model)
    with pytest.raises(ValueError, match="router 'cls-row' is for encoders"):
        depth.route(model, "cls-row")
    with pytest.raises(ValueError, match="causal models need router 'mod'"):
        depth.route(model, "random-tokens")
    with pytest.raises(ValueError, match="needs auxiliary="):
        depth.mod(model)
    with pytest.raises(ValueError, match=r"model.layers.0 can't be routed in a causal model"):
        depth.mod(model, layers=[0, 2], auxiliary="router")
    with pytest.raises(ValueError, match="token merging is for encoders"):
        depth.tome(model, 2)
    with pytest.raises(ValueError, match="importance is measured on encoders"):
        depth.attention_scores(model, torch.zeros(1, 4, dtype=torch.long))
    assert not depth.is_routed(model)


def test_sliding_windows_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, intermediate_size=32, vocab_size=20,
                           sliding_window=8)  # fmt: skip
    with pytest.raises(ValueError, match=r"model.layers.1 can't be routed: .*sliding window"):
        depth.mod(MistralForCausalLM(config), auxiliary="router")


def test_no_class_token_no_class_row():
    model = own()
    with pytest.raises(ValueError, match="prefix 0 leaves no class token"):
        depth.route(model, "cls-row", prefix=0)
