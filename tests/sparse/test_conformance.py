"""What every registered method must do: a new method is tested by being registered."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import (
    CONSTRUCTIONS,
    CRITERIA,
    DENSITIES,
    DYNAMIC,
    FORMS,
    LOOPS,
    RESETS,
    STRATEGIES,
    Masks,
    hold,
    score,
    select,
)
from tests.models import ConvNet, mlp, train_steps

REGISTRIES = {
    "constructions": CONSTRUCTIONS,
    "criteria": CRITERIA,
    "densities": DENSITIES,
    "dynamic": DYNAMIC,
    "forms": FORMS,
    "loops": LOOPS,
    "resets": RESETS,
    "strategies": STRATEGIES,
}
MODELS = {"mlp": mlp, "convnet": ConvNet}


def batches(model, seed=0):
    """Two batches that fit the model: one for each of its classes in turn."""
    shape = (3, 8, 8) if isinstance(model, ConvNet) else (16,)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(8) % 4
    return [(torch.randn(8, *shape, generator=generator), labels) for _ in range(2)]


@pytest.mark.parametrize("kind", REGISTRIES)
def test_rows_are_complete(kind):
    for name, entry in REGISTRIES[kind].items():
        assert entry.name == name
        assert entry.summary
        assert entry.summary[0].islower()
        assert entry.method.__doc__
        with pytest.raises(ValueError, match="registered already"):
            REGISTRIES[kind].register(name, "again")(entry.method)


def scores(criterion, model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = Masks.dense(model).weights(model)
    return score(criterion, weights, generator=generator, model=model, batches=batches(model))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("criterion", CRITERIA)
class TestCriteria:
    def test_scores_fit_the_weights_and_leave_the_model_alone(self, criterion, model):
        net = model()
        before, mode = copy.deepcopy(net.state_dict()), net.training
        random_state = torch.get_rng_state()
        found = scores(criterion, net)
        Masks.dense(net).check(found)
        assert all(s.isfinite().all() and not s.requires_grad for s in found.values())
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
        assert net.training == mode
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_seeds_reproduce(self, criterion, model):
        net = model()
        first, second = scores(criterion, net), scores(criterion, net)
        assert all(torch.equal(first[n], second[n]) for n in first)

    def test_nan_weights_are_named(self, criterion, model):
        net = model()
        name, weight = list(Masks.dense(net).weights(net).items())[1]
        with torch.no_grad():
            weight.view(-1)[3] = float("nan")
        with pytest.raises(ValueError, match=f"weights of '{name}' hold NaN"):
            scores(criterion, net)

    @pytest.mark.parametrize("scope", ["global", "layer", *DENSITIES])
    def test_counts_are_exact_in_every_scope(self, criterion, model, scope):
        net = model()
        found = scores(criterion, net)
        support = sparse.random(net, 0.7, seed=3)
        for density in (1.0, 0.5, 0.1, 0.013):
            masks = select(found, density, scope)
            assert masks.nonzeros == round(density * masks.numel)
            if density < 0.6:
                inside = select(found, density, scope, support=support)
                assert inside <= support
                assert inside.nonzeros == masks.nonzeros


@pytest.mark.parametrize("rule", [*DENSITIES, "global"])
class TestRandomMasks:
    def test_the_seed_decides_not_weights_nor_dtype(self, rule):
        masks = sparse.random(mlp(), 0.1, rule, seed=4)
        assert masks == sparse.random(mlp(seed=9).double(), 0.1, rule, seed=4)
        generator = torch.Generator().manual_seed(4)
        assert masks == sparse.random(mlp(), 0.1, rule, generator=generator)
        assert masks != sparse.random(mlp(), 0.1, rule, seed=5)

    def test_seed_or_generator(self, rule):
        with pytest.raises(ValueError, match="exactly one of seed= and generator="):
            sparse.random(mlp(), 0.1, rule)
        with pytest.raises(ValueError, match="exactly one of seed= and generator="):
            sparse.random(mlp(), 0.1, rule, seed=0, generator=torch.Generator())

    def test_bernoulli_counts_fluctuate_around_the_share(self, rule):
        model = mlp(60)
        drawn = [
            sparse.random(model, 0.2, rule, seed=s, sampling="bernoulli").counts()
            for s in range(40)
        ]
        shapes = {n: m.shape for n, m in Masks.dense(model).items()}
        wanted = sparse.allocate(shapes, 0.2, "uniform" if rule == "global" else rule)
        for name, shape in shapes.items():
            size, p = shape.numel(), wanted[name]
            counts = torch.tensor([float(d[name]) for d in drawn])
            deviation = (size * p * (1 - p)) ** 0.5
            assert (counts - size * p).abs().max() <= 5 * deviation + 1e-6
            assert abs(counts.mean() - size * p) <= 5 * deviation / 40**0.5 + 1e-6
            if 0.01 < p < 0.99:
                assert counts.std() > 0.3 * deviation

    def test_support_is_respected(self, rule):
        model = mlp()
        support = sparse.random(model, 0.5, "balanced", seed=0)
        for sampling in ("exact", "bernoulli"):
            found = sparse.random(model, 0.1, rule, seed=1, support=support, sampling=sampling)
            assert found <= support
        assert sparse.random(model, 0.1, rule, seed=1, support=support).nonzeros == round(
            0.1 * support.numel
        )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("loop", LOOPS)
class TestLoops:
    def levels(self, loop, net, optimizer=None, **options):
        return LOOPS[loop].method(net, 0.1, 0.5, optimizer=optimizer, seed=0, **options)

    def test_a_whole_run(self, loop, model):
        net = model()
        inputs = (8, 16) if model is mlp else (4, 3, 8, 8)
        keys = list(net.state_dict())
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        held, before, prunable = None, None, Masks.dense(net).numel
        for level in self.levels(loop, net, optimizer):
            if held is None:
                held = hold(net, optimizer, level.masks)
            held.update(level.masks)
            assert Masks.nonzero(net) <= level.masks
            assert before is None or level.masks <= before
            if loop in ("imp", "wr", "lrr") and level.index >= 0 and not level.final:
                assert level.masks.nonzeros == round(0.5**level.index * prunable)
            train_steps(net, optimizer, 2, inputs=inputs)
            assert Masks.nonzero(net) <= level.masks
            before = level.masks
        assert level.masks.nonzeros == round(0.1 * prunable)
        assert list(net.state_dict()) == keys

    def test_nothing_happens_before_the_first_level(self, loop, model):
        net = model()
        before = copy.deepcopy(net.state_dict())
        levels = self.levels(loop, net, support=sparse.random(net, 0.5, seed=0))
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
        next(levels)
        assert Masks.nonzero(net).density <= 0.5

    def test_masks_do_not_depend_on_compilation(self, loop, model):
        plain = model()
        net = copy.deepcopy(plain)
        compiled = torch.compile(net, backend="eager")
        for a, b in zip(self.levels(loop, plain), self.levels(loop, compiled), strict=True):
            assert a.masks == b.masks


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
class TestConstructions:
    def masks(self, construction, net, density, **options):
        shape = (3, 8, 8) if isinstance(net, ConvNet) else (16,)
        takes = inspect.signature(CONSTRUCTIONS[construction].method).parameters
        inputs = {"inputs": torch.zeros(2, *shape)} if "inputs" in takes else {}
        options = {"seed": 0, **inputs, **options}
        return CONSTRUCTIONS[construction].method(net, density, **options)

    @pytest.mark.parametrize("density", [0.5, 0.2, 0.05])
    def test_counts_are_exact_and_seeds_decide(self, construction, density):
        net = mlp()
        before = copy.deepcopy(net.state_dict())
        masks = self.masks(construction, net, density)
        assert masks.nonzeros == round(density * masks.numel)
        assert masks == self.masks(construction, net, density)
        assert masks != self.masks(construction, net, density, seed=1)
        assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())

    def test_the_support_is_never_left(self, construction):
        net = mlp()
        support = sparse.random(net, 0.6, "balanced", seed=3)
        masks = self.masks(construction, net, 0.2, support=support)
        assert masks <= support
        assert masks.nonzeros == round(0.2 * masks.numel)

    def test_density_one_keeps_everything(self, construction):
        net = mlp()
        assert self.masks(construction, net, 1.0) == Masks.dense(net)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("form", FORMS)
class TestForms:
    def attach(self, form, net, **options):
        entry = FORMS[form]
        needs = {"density": 0.3, "generator": torch.Generator().manual_seed(0)}
        names = ["head.weight"] if isinstance(net, ConvNet) else []
        options |= {name: needs[name] for name in entry.needs} | {"exclude": names}
        entry.method(net, **options)
        optimizer = torch.optim.SGD(sparse.parameter_groups(net, 1e-3), 0.05, momentum=0.9)
        follow = entry.defaults.get("follow")
        if follow is not None:
            follow(net, optimizer, 6)
        return optimizer

    def inputs(self, model):
        return (4, 3, 8, 8) if model is ConvNet else (8, 16)

    def train(self, form, model, **options):
        torch.manual_seed(0)
        net = model()
        optimizer = self.attach(form, net, **options)
        train_steps(net, optimizer, 6, inputs=self.inputs(model))
        return net

    def test_folding_leaves_keys_shapes_and_zeros(self, form, model):
        plain = model()
        net = self.train(form, model)
        kept = sparse.reparam.nonzero(net)
        sparse.fold(net)
        state = {name: tensor.shape for name, tensor in net.state_dict().items()}
        assert list(state) == list(plain.state_dict())
        assert state == {name: tensor.shape for name, tensor in plain.state_dict().items()}
        assert Masks.nonzero(net, include=list(kept)) == kept
        plain.load_state_dict(net.state_dict())

    def test_the_support_is_never_left(self, form, model):
        names = ["head.weight"] if model is ConvNet else []
        support = sparse.random(model(), 0.5, "uniform", seed=1, exclude=names)
        net = self.train(form, model, support=support)
        assert sparse.reparam.nonzero(net) <= support

    def test_training_repeats_itself(self, form, model):
        first, second = (self.train(form, model).state_dict() for _ in range(2))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    @pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
    def test_a_compiled_model_trains_alike(self, form, model):
        plain = self.train(form, model)
        torch.manual_seed(0)
        net = model()
        optimizer = self.attach(form, net)
        compiled = torch.compile(net, backend="eager")
        train_steps(compiled, optimizer, 6, inputs=self.inputs(model))
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], tensor)


GUARD = """
import importlib.abc, sys

class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in {forbidden}:
            raise ModuleNotFoundError(f"{{name}} is not a core dependency", name=root)

sys.meta_path.insert(0, Guard())
import safetensors.torch
before = set(sys.modules)
import featherweight
from featherweight import sparse
added = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert added <= {{"featherweight", "numpy", *sys.stdlib_module_names}}, added  # nothing slow
model = __import__("torch").nn.Linear(8, 8)
sparse.random(model, 0.5, seed=0).apply_(model)
assert not any(name.startswith("featherweight.lab") for name in sys.modules)
print("ok")
"""


def test_the_rooms_need_nothing_but_the_core():
    lab = {"accelerate", "datasets", "matplotlib", "PIL", "pydantic", "yaml", "rich", "sklearn"}
    code = GUARD.format(forbidden=lab | {"scipy", "tensorboard", "tyro", "transformers"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_the_command_line_says_what_it_needs():
    code = GUARD.format(forbidden={"tyro"}).replace('print("ok")', "")
    code += "\nfrom featherweight.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'featherweight[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_rooms_import_neither_each_other_nor_the_lab():
    from pathlib import Path

    rooms = ["init", "sparse", "optim", "depth", "quant", "federated"]
    root = Path(sparse.__file__).parent.parent
    for room in rooms:
        others = [f"featherweight.{other}" for other in [*rooms, "lab"] if other != room]
        for file in (root / room).rglob("*.py") if (root / room).is_dir() else ():
            text = file.read_text(encoding="utf-8")
            assert not [
                name for name in others if f"from {name}" in text or f"import {name}" in text
            ]
