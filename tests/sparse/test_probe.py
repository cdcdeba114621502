"""What criteria that run the model have in common: they leave no trace, and say what they want."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from featherweight import sparse
from featherweight.sparse import CRITERIA, Masks, hold, score
from tests.models import mlp

RUNNING = [name for name in CRITERIA if "batches" in CRITERIA[name].needs] + ["synflow"]


class Awkward(nn.Module):
    """Dropout, noise, counters, a tied weight, an unused layer, a frozen weight, mixed modes."""

    def __init__(self, noise=1e-3):
        super().__init__()
        self.noise = noise
        self.first = nn.Linear(16, 12)
        self.norm = nn.BatchNorm1d(12, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.twin = nn.Linear(12, 12)
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.twin.weight
        self.unused = nn.Linear(12, 3)
        self.frozen = nn.Linear(12, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.train()
        self.twin.eval()

    def forward(self, x):
        self.calls += 1
        x = self.drop(self.norm(self.first(x)).relu())
        x = self.tied(self.twin(x).relu()).relu()
        return self.frozen(x + self.noise * torch.rand_like(x))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(2)
    ]


def scores(criterion, model, batches, **options):
    weights = Masks.dense(model).weights(model)
    return score(criterion, weights, model=model, batches=batches, **options)


def trace(model):
    """Return all that scoring must leave as it is."""
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "addresses": [t.data_ptr() for t in model.state_dict(keep_vars=True).values()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "required": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()],
        "enabled": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("criterion", RUNNING)
class TestEveryCriterionThatRunsTheModel:
    def test_leaves_no_trace(self, criterion, batches):
        model = Awkward()
        cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        before = trace(model)
        scores(criterion, model, batches)
        assert same(before, trace(model))

    def test_leaves_no_trace_after_an_error(self, criterion, batches):
        model = Awkward()
        before = trace(model)

        def fail(*_):
            raise RuntimeError("stop")

        handle = model.frozen.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            scores(criterion, model, batches)
        handle.remove()
        assert same(before, trace(model))

    def test_works_where_gradients_are_off(self, criterion, batches):
        model = Awkward()
        with torch.no_grad():
            found = scores(criterion, model, batches)
            assert not torch.is_grad_enabled()
        expected = scores(criterion, model, batches)
        assert same(found, expected)

    def test_unused_layers_get_zero_and_the_frozen_one_does_not(self, criterion, batches):
        found = scores(criterion, Awkward(), batches)
        assert list(found) == ["first.weight", "twin.weight", "unused.weight", "frozen.weight"]
        assert not found["unused.weight"].any()
        assert all(s.any() for n, s in found.items() if n != "unused.weight")
        assert all(not s.requires_grad and s.isfinite().all() for s in found.values())

    def test_dropout_does_not_blur_scores(self, criterion, batches):
        with_dropout, without = Awkward(noise=0.0), Awkward(noise=0.0)
        without.load_state_dict(with_dropout.state_dict())
        without.drop.p = 0.0
        a, b = (scores(criterion, model, batches) for model in (with_dropout, without))
        assert same(a, b)

    def test_wrapped_models_score_like_plain_ones(self, criterion, batches):
        plain = Awkward()
        expected = scores(criterion, plain, batches)
        for wrapped in (nn.DataParallel(plain), torch.compile(plain, backend="eager")):
            assert same(scores(criterion, wrapped, batches), expected)

    def test_a_hold_in_force_does_not_matter(self, criterion, batches):
        model = mlp()
        masks = sparse.random(model, 0.5, seed=0)
        masks.apply_(model)
        expected = scores(criterion, model, batches)
        with hold(model, torch.optim.SGD(model.parameters(), 0.1), masks):
            assert same(scores(criterion, model, batches), expected)

    def test_outputs_with_logits_are_understood(self, criterion, batches):
        model = mlp()
        expected = scores(criterion, model, batches)
        model.register_forward_hook(lambda *args: SimpleNamespace(logits=args[-1]))
        assert same(scores(criterion, model, batches), expected)
        model.register_forward_hook(lambda *args: (args[-1].logits, None))
        with pytest.raises(TypeError, match=r"a tensor or an object with .logits, got tuple"):
            scores(criterion, model, batches)

    def test_attention_can_be_scored(self, criterion, batches):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 16),
            nn.Unflatten(1, (4, 4)),
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        found = scores(criterion, model, batches)
        assert all(s.isfinite().all() for s in found.values())
        assert found["0.weight"].any()

    def test_in_projections_can_be_included(self, criterion, batches):
        model = nn.Sequential(
            nn.Unflatten(1, (4, 4)), SelfAttention(), nn.Flatten(), nn.Linear(16, 4)
        )
        names = {"include": ["1.attention.in_proj_weight", "3.weight"]}
        masks = sparse.prune(model, criterion, 0.5, batches=batches, iterations=1, **names)
        assert list(masks) == names["include"]
        assert masks.nonzeros == round(0.5 * masks.numel)

    def test_narrow_dtypes(self, criterion, batches):
        found = scores(criterion, Awkward().bfloat16(), batches)
        assert all(s.dtype in (torch.float32, torch.float64) for s in found.values())
        assert all(s.isfinite().all() for s in found.values())


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("criterion", RUNNING[:-1])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "at least one pair"),
        (iter([]), TypeError, "must be a list of pairs"),
        ((torch.zeros(2, 16), torch.zeros(2)), TypeError, "must be a pair of tensors"),
        ([(torch.zeros(2, 16),)], TypeError, "must be a pair of tensors"),
        ([(torch.zeros(2, 16), [0, 1])], TypeError, "must be a pair of tensors"),
    ],
)
def test_bad_batches_are_refused(criterion, bad, error, message):
    with pytest.raises(error, match=message):
        scores(criterion, mlp(), bad)


@pytest.mark.parametrize("criterion", RUNNING)
def test_norms_use_the_statistics_of_the_batch_but_for_synflow(criterion, batches):
    model = mlp()
    before = scores(criterion, model.train(), batches)
    assert same(scores(criterion, model.eval(), batches), before)
    model[1].running_mean.fill_(-3.0)
    assert same(scores(criterion, model, batches), before) == (criterion != "synflow")


@pytest.mark.parametrize("criterion", RUNNING[:-1])
def test_bad_objectives_are_refused(criterion, batches):
    with pytest.raises(ValueError, match=r"one number, got shape \[\d\]"):
        scores(criterion, mlp(), batches, objective=lambda output, _: output.sum(1))
    with pytest.raises(ValueError, match=f"{criterion} scores of '0.weight' hold NaN"):
        scores(criterion, mlp(), batches, objective=lambda output, _: output.sum() * torch.nan)


def test_the_model_itself_is_not_copied(batches):
    model = mlp()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module))
    scores("snip", model, batches)
    assert seen == [model] * len(batches)
