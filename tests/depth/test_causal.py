"""Routed causal models: top k in training, the same with and without a cache in evaluation."""

from inspect import signature

import pytest
import torch
from torch.nn import functional as F

from featherweight import depth
from featherweight.depth.convert import ledger_of
from tests.depth.factories import llama, qwen
from tests.oracles import depth as oracle

KINDS = {"llama": llama, "qwen": qwen}
# transformers calls it cache from 5.24 on.
CACHE = "cache" if "cache" in signature(llama().forward).parameters else "past_key_values"
EVERY = pytest.mark.parametrize("kind", sorted(KINDS))
AUXILIARY = pytest.mark.parametrize("auxiliary", ["router", "predictor"])


def ids(batch=3, tokens=12):
    return torch.randint(3, 50, (batch, tokens), generator=torch.Generator().manual_seed(0))


def generated(model, tokens, **options):
    return model.generate(
        tokens, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )


@EVERY
@AUXILIARY
def test_cache_and_whole_sequence_agree(kind, auxiliary):
    model = depth.mod(KINDS[kind](), 0.5, auxiliary=auxiliary, std=0.5).eval()
    tokens = ids()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        counts = [v.sum(1) for v in ledger_of(model).visited if v is not None]
        assert any(len(set(c.tolist())) > 1 for c in counts)
        assert any(0 < int(c.min()) < 12 for c in counts)
        out = model(tokens[:, :5], use_cache=True)
        logits, cache = [out.logits], out[CACHE]
        for t in range(5, 12):
            out = model(tokens[:, t : t + 1], **{CACHE: cache}, use_cache=True)
            logits.append(out.logits)
    assert torch.allclose(torch.cat(logits, 1), whole, atol=1e-4)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths[0] == lengths[2] == 12
    assert int(counts[0].max()) <= lengths[1]
    assert [layer.valid.sum(1).tolist() for layer in cache.layers[1::2]] == [
        c.tolist() for c in counts
    ]


@EVERY
def test_generation_is_the_repeated_forward(kind):
    model = depth.mod(KINDS[kind](), 0.5, auxiliary="router", std=0.5).eval()
    tokens = ids()
    expected = tokens
    for _ in range(5):
        with torch.no_grad():
            last = model(expected, use_cache=False).logits[:, -1:]
        expected = torch.cat([expected, last.argmax(-1)], 1)
    assert torch.equal(generated(model, tokens), expected)
    beams = generated(model, tokens, num_beams=3)
    assert torch.equal(beams, generated(model, tokens, num_beams=3, use_cache=False))


def test_left_padding_changes_nothing():
    model = depth.mod(llama(), 0.5, auxiliary="router", std=0.5).eval()
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    both = generated(model, tokens, attention_mask=mask)
    alone = generated(model, tokens[:1, 4:], attention_mask=torch.ones(1, 8, dtype=torch.long))
    assert torch.equal(both[:1, 4:], alone)


def test_padding_is_not_processed_in_training():
    model = depth.mod(llama(), 0.5, auxiliary="router", std=0.5).train()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    model(ids(), attention_mask=mask, use_cache=False)
    for visited in (v for v in ledger_of(model).visited if v is not None):
        assert visited.sum(1).tolist() == [6] * 3
        assert not (visited & (mask == 0)).any()


def test_evaluation_never_looks_ahead_and_training_does():
    model = depth.mod(llama(), 0.25, auxiliary="router", std=0.5)
    tokens = ids(1, 12)
    changed = tokens.clone()
    changed[0, 8:] = ids(2, 12)[1, 8:]
    with torch.no_grad():
        model.eval()
        a, b = (model(t, use_cache=False).logits[0, :8] for t in (tokens, changed))
        assert torch.allclose(a, b, atol=1e-5)
        model.train()
        a, b = (model(t, use_cache=False).logits[0, :8] for t in (tokens, changed))
        assert not torch.allclose(a, b, atol=1e-3)


def test_positions_are_those_of_the_tokens():
    """A training layer is the dense one, keys masked, with every token where it was."""
    model = depth.mod(llama(), 0.5, layers=[1], gate="unit", auxiliary="router", std=0.0)
    model.train()
    tokens = ids(2)
    seen = {}
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(
        lambda _m, args, kwargs, out: seen.update(x=args[0], kwargs=kwargs, out=out),
        with_kwargs=True,
    )
    model(tokens, use_cache=False)
    hook.remove()
    mask = ledger_of(model).visited[1]
    depth.to_dense(model)
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & mask[:, None, None]
    causal = causal | torch.eye(12, dtype=torch.bool)
    dense = layer(seen["x"], **{**seen["kwargs"], "attention_mask": causal})
    assert torch.allclose(seen["out"], torch.where(mask[..., None], dense, seen["x"]), atol=1e-5)


def test_auxiliary_loss_by_hand():
    model = depth.mod(llama(), 0.5, layers=[1, 3], auxiliary="router", std=0.5).train()
    scores = {}
    for layer in (1, 3):
        model.model.layers[layer].router.register_forward_hook(
            lambda _m, _i, out, layer=layer: scores.update({layer: out[..., 0]})
        )
    model(ids(), use_cache=False)
    losses = []
    for own in scores.values():
        target = torch.zeros_like(own).scatter(1, oracle.choose(own, 6), 1.0)
        losses.append(F.binary_cross_entropy(own.sigmoid(), target))
    assert torch.allclose(depth.auxiliary_loss(model), torch.stack(losses).mean(), atol=1e-6)


def test_predictor_leaves_the_model_alone():
    model = depth.mod(llama(), 0.5, auxiliary="predictor").train()
    model(ids(), use_cache=False)
    depth.auxiliary_loss(model).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {n for n, _ in model.named_parameters() if ".predictor." in n}


def test_auxiliary_loss_learns_the_rule():
    model = depth.mod(llama(2), 0.25, auxiliary="predictor", std=1.0).train()
    trained = [p for n, p in model.named_parameters() if ".predictor." in n]
    optimizer = torch.optim.Adam(trained, 2e-2)
    before = None
    for _ in range(15):
        model(ids(4), use_cache=False)
        loss = depth.auxiliary_loss(model)
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * before


def test_auxiliary_loss_needs_predictions():
    with pytest.raises(ValueError, match="no predictions"):
        depth.auxiliary_loss(llama())


def test_top_k_can_not_continue_from_a_cache():
    model = depth.mod(llama(), 0.5, evaluate="top-k").eval()
    tokens = ids()
    out = model(tokens, use_cache=True)
    assert torch.isfinite(out.logits).all()
    with pytest.raises(ValueError, match="can't continue from a cache"):
        model(tokens[:, :1], **{CACHE: out[CACHE]}, use_cache=True)


def test_caches_that_do_not_grow_are_refused():
    from transformers import StaticCache

    model = depth.mod(llama(), 0.5, auxiliary="router", std=0.5).eval()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="empty DynamicCache"):
        model(ids(), **{CACHE: cache}, use_cache=True)


def test_cache_can_not_be_cropped_and_can_be_reset():
    model = depth.mod(llama(), 0.5, auxiliary="router", std=0.5).eval()
    cache = model(ids(), use_cache=True)[CACHE]
    layer = cache.layers[1]
    with pytest.raises(ValueError, match="can't be cropped"):
        layer.crop(-1)
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert layer.valid.shape[0] == layer.keys.shape[0] == 2
    layer.batch_repeat_interleave(3)
    assert layer.valid.shape[0] == layer.keys.shape[0] == 6
    layer.reset()
    assert layer.valid is None


def test_a_layer_may_process_nothing():
    model = depth.mod(llama(), 0.5, layers=[1], auxiliary="router").eval()
    tokens = ids()
    model.model.layers[1].router.weight.data.zero_()  # no logit is above 0
    found = model(tokens, use_cache=True)
    depth.to_dense(model)
    del model.model.layers[1]
    model.config.num_hidden_layers = 3
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    assert torch.allclose(found.logits, model(tokens).logits, atol=1e-5)


def test_back_to_dense():
    model, tokens = llama(), ids()
    expected, names = model(tokens).logits, list(model.state_dict())
    depth.to_dense(depth.mod(model, 0.5, auxiliary="predictor"))
    assert list(model.state_dict()) == names
    assert torch.equal(model(tokens).logits, expected)
