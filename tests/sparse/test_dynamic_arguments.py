"""What dynamic and gradual methods take, and what they refuse."""

import copy

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import Masks
from featherweight.sparse.dynamic import DYNAMIC
from tests.models import mlp, train_steps
from tests.sparse.test_dynamic import CONSTANT, STEPS, attach, momentum

BAD = [
    ("set", {"density": 0.2, "interval": 0}, "interval must be at least 1"),
    ("set", {"density": 0.2, "fraction": 1.5}, "must lie in"),
    ("set", {"density": 0.2, "seed": None}, "exactly one of seed= and generator="),
    ("rigl", {"density": 0.2, "begin": 30}, "0 <= begin < end"),
    ("rigl", {"density": 0.2, "end": 30}, "end must be at most steps=24"),
    ("rigl", {"density": 0.2, "schedule": "cosin"}, "did you mean 'cosine'"),
    ("rigl", {"density": 1.2}, "density must lie in"),
    ("rigl", {"density": 0.2, "sparsity": 0.8}, "exactly one of density= and sparsity="),
    ("mest-em", {"density": 0.2, "fractions": ((0.5, 1),)}, "must rise from 0"),
    ("mest-em", {"density": 0.2, "gradient_weight": -1.0}, "gradient_weight must be at least 0"),
    ("mest-ems", {"density": 0.2, "fractions": ((0, 0.1),)}, "fractions must end with 0"),
    ("granet", {"density": 0.6}, "no more than they"),
    ("granet", {"density": 1e-5}, "at least 1"),
    ("gmp", {"density": 0.2, "criterion": "magnitud"}, "did you mean 'magnitude'"),
    ("gmp", {"density": 0.2, "criterion": "random", "seed": None}, "needs seed= or generator="),
    ("gmp", {"density": 0.6, "structure": "2:4"}, "keeps at most"),
    ("acdc", {"density": 0.2, "phases": [(0, 24, "dense")]}, "with a sparse one"),
    ("acdc", {"density": 0.2, "phases": [(0, 5, "dense"), (6, 24, "sparse")]}, "must begin at 5"),
    ("acdc", {"density": 0.2, "phases": [(0, 24, "thin")]}, "be 'dense' or 'sparse'"),
    ("acdc", {"density": 0.2, "exclude": ["nothing"]}, "fits no parameter"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_arguments_touch_nothing(name, options, message):
    model = mlp()
    optimizer = momentum(model)
    before = copy.deepcopy(model.state_dict())
    options = {"seed": 0} | options
    with pytest.raises(ValueError, match=message):
        DYNAMIC[name].method(model, optimizer, steps=STEPS, **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("name", DYNAMIC)
def test_models_optimizers_and_masks_that_do_not_fit(name):
    model = mlp()
    inside, outside = (sparse.random(model, 0.4, seed=s) for s in (0, 1))
    density = None if name in CONSTANT else 0.2
    with pytest.raises(ValueError, match="outside support="):
        attach(name, model, momentum(model), density, masks=inside, support=outside)
    with pytest.raises(ValueError, match="masks do not fit"):
        attach(name, model, momentum(model), density, masks=Masks.dense(mlp(8)))
    foreign = momentum(mlp())
    with pytest.raises(ValueError, match="optimizer trains none"):
        attach(name, model, foreign)
    assert not foreign._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="steps must be at least"):
        DYNAMIC[name].method(model, momentum(model), 0.2, steps=0, seed=0)
    if name in CONSTANT:
        with pytest.raises(ValueError, match="not both"):
            attach(name, model, momentum(model), 0.2, masks=inside)
    assert Masks.nonzero(model).density == 1


@pytest.mark.parametrize("name", ["gmp", "gmp-recoverable", "acdc"])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_gradual_methods_take_scopes_and_criteria(name, scope):
    model = mlp()
    optimizer = momentum(model)
    evolving = attach(name, model, optimizer, scope=scope, criterion="random")
    for _ in range(STEPS):
        before = evolving.masks
        train_steps(model, optimizer, 1)
        assert name != "gmp" or evolving.masks <= before
    assert evolving.masks.nonzeros == round(0.2 * evolving.masks.numel)
    if scope == "layer":
        assert all(abs(d - 0.2) < 0.01 for d in evolving.masks.densities().values())


@pytest.mark.parametrize("name", ["gmp", "acdc"])
def test_gradual_methods_take_structure(name):
    model = mlp()
    optimizer = momentum(model)
    evolving = attach(name, model, optimizer, structure="2:4")
    train_steps(model, optimizer, STEPS)
    assert evolving.masks.nonzeros == round(0.2 * evolving.masks.numel)
    for mask in evolving.masks.values():
        assert (mask.view(-1, 4).sum(1) <= 2).all()


def test_acdc_that_begins_sparse_and_with_masks():
    model = mlp()
    size = Masks.dense(model).numel
    phases = [(0, 4, "sparse"), (4, 8, "dense"), (8, STEPS, "sparse")]
    evolving = attach("acdc", model, momentum(model), phases=phases)
    assert evolving.masks == sparse.magnitude(mlp(), 0.2)
    evolving.remove()
    optimizer = momentum(model)
    masks = sparse.random(model, 0.3, seed=0)
    evolving = attach("acdc", model, optimizer, phases=phases, masks=masks)
    assert evolving.masks is masks
    train_steps(model, optimizer, 4)
    assert evolving.masks.nonzeros == size
    train_steps(model, optimizer, 4)
    assert evolving.masks.nonzeros == round(0.2 * size)
    assert not evolving.masks <= masks  # the dense phase came between
