"""Converted encoders: equal to loops over tokens, dense at capacity 1, names and gradients kept."""

import copy

import pytest
import torch

from featherweight import depth
from featherweight.depth.convert import ledger_of
from tests.depth.factories import FAMILIES, LAYERS, PREFIX, hugging_vit, images, logits, own
from tests.oracles import depth as oracle

FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.mark.parametrize("capacity", [0.5, 0.125])
def test_a_mod_is_the_loop_over_tokens(capacity):
    model, x = own(), images()
    count = depth.kept_tokens(17, capacity, 1)
    expected, sets = oracle.vit(model, x, (1, 3), count)
    depth.a_mod(model, capacity)
    assert torch.allclose(model(x), expected, atol=1e-5)
    masks = depth.visited(model, x)
    for b, chosen in enumerate(sets):
        for layer, index in chosen.items():
            assert masks[layer, b].nonzero().flatten().tolist() == index


@FAMILY
def test_capacity_one_is_dense(family):
    model, x = FAMILIES[family](), images()
    expected = logits(model(x))
    for source in depth.SOURCES:
        depth.a_mod(model, 1.0, score=source)
        with torch.no_grad():
            assert torch.allclose(logits(model(x)), expected, atol=1e-5)
        depth.to_dense(model)
    depth.mod(model, 1.0, gate="unit", std=0.0)
    assert torch.allclose(logits(model(x)), expected, atol=1e-5)


@FAMILY
def test_names_and_state_are_those_of_the_dense_model(family):
    model, x = FAMILIES[family](), images()
    state = copy.deepcopy(model.state_dict())
    expected = logits(model(x))
    returned = depth.a_mod(model, 0.5)
    assert returned is model
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state, strict=True)
    assert not torch.equal(logits(model(x)), expected)
    depth.to_dense(model)
    assert not depth.is_routed(model)
    assert torch.equal(logits(model(x)), expected)
    assert not [n for m in model.modules() for n in vars(m) if n.startswith("depth_")]
    assert not [type(m).__name__ for m in model.modules() if hasattr(type(m), "depth_worn")]


@FAMILY
def test_prefix_is_kept_and_counted(family):
    model, x = FAMILIES[family](), images()
    prefix = PREFIX[family]
    assert depth.prefix_tokens(model) == prefix
    depth.a_mod(model, 0.3)
    masks = depth.visited(model, x)
    tokens = 16 + prefix
    assert masks.shape == (LAYERS, 3, tokens)
    assert masks[0::2].all()
    assert masks[:, :, :prefix].all()
    assert (masks[1::2].sum(-1) == depth.kept_tokens(tokens, 0.3, prefix)).all()


def test_without_protection_the_class_token_can_be_skipped():
    model, x = own(), images(16)
    depth.a_mod(model, 0.125, keep_prefix=False)
    assert not depth.visited(model, x)[1::2, :, 0].all()


def test_skipped_tokens_are_bit_identical():
    model, x = own(), images()
    seen = {}
    hook = model.blocks[1].register_forward_hook(
        lambda _m, inputs, output: seen.update(before=inputs[0], after=output)
    )
    depth.a_mod(model, 0.5)
    skipped = ~depth.visited(model, x)[1]
    hook.remove()
    assert torch.equal(seen["before"][skipped], seen["after"][skipped])
    assert not (seen["before"] == seen["after"])[~skipped].all(-1).any()


def test_gathered_layer_is_the_dense_layer_with_a_mask():
    model, x = hugging_vit(), images()
    depth.a_mod(model, 0.5, layers=[3])
    hidden = model(x, output_hidden_states=True).hidden_states
    mask = depth.visited(model, x)[3]
    layer = depth.to_dense(model).vit.layers[3]
    dense = layer(hidden[3], attention_mask=mask[:, None, None])
    dense = dense[0] if isinstance(dense, tuple) else dense
    expected = torch.where(mask[..., None], dense, hidden[3])
    assert torch.allclose(hidden[4], expected, atol=1e-5)


def test_learned_router_adds_one_weight_a_channel():
    model = own()
    names, count = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    depth.mod(model, 0.5)
    assert set(model.state_dict()) - names == {"blocks.1.router.weight", "blocks.3.router.weight"}
    assert sum(p.numel() for p in model.parameters()) == count + 2 * 32


def test_zero_raw_router_removes_the_layer_but_learns():
    model, x = own(), images()
    depth.mod(model, 0.5, gate="raw", std=0.0)
    found = model(x)
    found.logsumexp(-1).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "router" in n}
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    depth.to_dense(model)
    model.blocks = torch.nn.Sequential(model.blocks[0], model.blocks[2])
    assert torch.allclose(found, model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "at_zero", "at_one"),
    [("raw", 0, 1), ("unit", 1, 1.4621172), ("sigmoid", 0.5, 0.7310586), ("tanh", 1, 1.1523188)],
)
def test_gates(gate, at_zero, at_one):
    values = depth.GATES[gate].method(torch.tensor([0.0, 1.0]))
    assert torch.allclose(values, torch.tensor([at_zero, at_one], dtype=torch.float32))


@pytest.mark.parametrize("gate", sorted(depth.GATES))
def test_gated_layer_by_hand(gate):
    model, x = own(), images(2)
    depth.mod(model, 0.5, layers=[0], gate=gate, std=1.0, keep_prefix=False)
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.token.expand(2, -1, -1), tokens], 1) + model.positions
    block = model.blocks[0]
    found, scores = block(tokens), (tokens * block.router.weight).sum(-1)
    depth.to_dense(model)
    for b in range(2):
        index = oracle.choose(scores[b : b + 1], 9)[0]
        update = oracle.vit_block(block, tokens[b, index])[0] - tokens[b, index]
        expected = tokens[b].clone()
        expected[index] += depth.GATES[gate].method(scores[b, index])[:, None] * update
        assert torch.allclose(found[b], expected, atol=1e-5)


def test_no_gradient_reaches_the_scores():
    x, grads = images(), []
    for source in ("eager", "second-pass", "striped", "logsumexp"):
        model = depth.a_mod(own(), 0.5, score=source)
        model(x).logsumexp(-1).sum().backward()
        scores = [score for score in ledger_of(model).scores if score is not None]
        assert len(scores) == 2
        assert not any(score.requires_grad for score in scores)
        grads.append([p.grad.clone() for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0], other, strict=True))


def test_gradients_are_those_of_the_same_choice_given_from_outside():
    """The choice is data: giving it from outside changes no gradient."""
    x = images()
    inside = depth.a_mod(own(), 0.5, layers=[1])
    inside(x).logsumexp(-1).sum().backward()
    outside = depth.route(own(), "external", 0.5, layers=[1])
    with depth.given_scores(outside, depth.visited(inside, x)[1].float()):
        outside(x).logsumexp(-1).sum().backward()
    for a, b in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_patches_permuted_with_their_positions_permute_the_choice():
    model, x = own(), images(2)
    depth.a_mod(model, 0.5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    before, masks = model(x), depth.visited(model, x)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]
    shuffled = patches.unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    places = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    model.positions.data = model.positions.data[:, places]
    assert torch.allclose(model(shuffled), before, atol=1e-5)
    assert torch.equal(depth.visited(model, shuffled), masks[:, :, places])


def test_a_batch_is_its_samples():
    model, x = own(), images(4)
    depth.a_mod(model, 0.25)
    together, masks = model(x), depth.visited(model, x)
    for b in range(4):
        assert torch.equal(depth.visited(model, x[b : b + 1])[:, 0], masks[:, b])
        assert torch.allclose(model(x[b : b + 1])[0], together[b], atol=1e-5)
    assert torch.equal(model(x), together)


@pytest.mark.parametrize("policy", ["last_dense", "carry"])
def test_policies_are_the_paper_on_alternating_layers(policy):
    x = images()
    assert torch.equal(depth.a_mod(own(), 0.5, policy=policy)(x), depth.a_mod(own(), 0.5)(x))


def test_last_dense_reads_the_nearest_dense_layer():
    model, x = own(), images()
    depth.a_mod(model, 0.5, layers=[1, 2, 3], policy="last_dense")
    masks = depth.visited(model, x)
    assert torch.equal(masks[1], masks[2])
    assert torch.equal(masks[1], masks[3])


def test_carry_updates_the_scores_of_processed_tokens():
    model, x = own(), images(1)
    depth.a_mod(model, 0.5, layers=[1, 2], policy="carry")
    masks = depth.visited(model, x)
    depth.to_dense(model)
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    tokens = (torch.cat([model.token, tokens], 1) + model.positions)[0]
    tokens, score = oracle.vit_block(model.blocks[0], tokens)
    for layer in (1, 2):
        index = oracle.choose(score[None], 9, 1)[0]
        assert masks[layer, 0].nonzero().flatten().tolist() == index.tolist()
        update, own_score = oracle.vit_block(model.blocks[layer], tokens[index])
        tokens, score = tokens.clone(), score.clone()
        tokens[index], score[index] = update, own_score * 9 / 17


def test_capacity_by_layer():
    model, x = own(), images()
    depth.a_mod(model, [0.25, 0.75])
    counts = depth.visited(model, x).sum(-1)
    assert counts[1].tolist() == [5] * 3
    assert counts[3].tolist() == [13] * 3


def test_last_layer_can_stay_dense():
    assert depth.settings_of(depth.a_mod(own(), keep_last_dense=True)).layers == (1,)


def test_class_row_is_the_first_row_of_the_map():
    model, x = own(), images(1)
    depth.route(model, "cls-row", 0.5, layers=[1])
    mask = depth.visited(model, x)[1, 0]
    depth.to_dense(model)
    block = model.blocks[0]
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.token, tokens], 1) + model.positions
    query, key, _ = block.attention.qkv(block.norm1(tokens)).unflatten(-1, (3, 4, 8)).unbind(2)
    row = torch.einsum("hd,nhd->hn", query[0, 0], key[0]) / 8**0.5
    expected = oracle.choose(row.softmax(-1).mean(0)[None], 9, 1)[0]
    assert mask.nonzero().flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{"queries": "patches"}, {"queries": 5}, {"heads": "max"}])
def test_options_of_the_score_change_the_choice(options):
    x = images(16)
    plain = depth.visited(depth.a_mod(own(), 0.3), x)
    other = depth.visited(depth.a_mod(own(), 0.3, **options), x)
    assert plain.shape == other.shape
    assert not torch.equal(plain, other)


def test_random_tokens_are_fixed_in_evaluation_and_drawn_anew_in_training():
    model, x = depth.route(own(), "random-tokens", 0.5, seed=1), images()
    first = depth.visited(model, x)
    assert torch.equal(first, depth.visited(model, x))
    assert not torch.equal(first, depth.visited(depth.route(own(), "random-tokens", seed=2), x))
    assert not torch.equal(first[1], first[3])
    model.train()
    assert not torch.equal(depth.visited(model, x), depth.visited(model, x))


def test_first_tokens_are_the_first():
    masks = depth.visited(depth.route(own(), "first-tokens", 0.5), images())
    assert masks[1, :, :9].all()
    assert not masks[1, :, 9:].any()


def test_given_scores_choose():
    model, x = depth.route(own(), "external", 0.25), images(2)
    scores = torch.arange(17.0).flip(0).expand(2, -1)
    with depth.given_scores(model, scores):
        assert depth.visited(model, x)[1].nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4] * 2
    with pytest.raises(ValueError, match="routes by external scores"):
        model(x)
    with (
        depth.given_scores(model, scores[:, :5]),
        pytest.raises(ValueError, match="scores must be"),
    ):
        model(x)


def test_a_deep_copy_is_independent():
    model, x = depth.a_mod(own(), 0.5), images()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert ledger_of(twin) is not ledger_of(model)
    assert ledger_of(twin) is twin.blocks[1].depth_ledger
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(x), expected)
    depth.to_dense(twin)
    assert depth.is_routed(model)


def test_bfloat16_runs():
    model = depth.a_mod(own().bfloat16(), 0.5)
    assert model(images().bfloat16()).isfinite().all()
