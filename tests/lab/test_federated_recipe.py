"""Federated recipes: from YAML and overrides to checked values; what is shipped works."""

import json
from inspect import signature

import numpy as np
import pytest
import torch

from featherweight.federated.codecs import CODECS
from featherweight.federated.setting import check
from featherweight.lab import parse
from featherweight.lab.errors import BadInput
from featherweight.lab.federated_data import _read_writers, make_clients
from featherweight.lab.federated_parse import build, describe, load, plain, shipped, to_yaml
from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.federated_setup import make_simulation, setting_of
from featherweight.lab.report.collect import flatten

EVERY_KEY = {
    "name": "other",
    "setting.kind": "cross-silo",
    "setting.tuned_on": "test",
    "data.name": "mnist",
    "data.path": "/some/where, with a comma",
    "data.limit": 17,
    "data.split_seed": 3,
    "partition.method": "label-dirichlet",
    "partition.clients": 7,
    "partition.options": {"alpha": 0.5},
    "partition.twin": 0.5,
    "partition.seed": 4,
    "partition.file": "p.safetensors",
    "model.name": "package.module:function",
    "model.options": {"width": 5},
    "model.init": "risotto",
    "model.init_options": {"alpha": 0.5},
    "algorithm.name": "fedadam",
    "algorithm.server_rate": 0.5,
    "algorithm.options": {"betas": [0.5, 0.9]},
    "algorithm.schedule.name": "exponential",
    "algorithm.schedule.decay": 0.9,
    "algorithm.schedule.scale": 3,
    "algorithm.schedule.warmup": 2,
    "local.learning_rate": 0.5,
    "local.epochs": None,
    "local.steps": 3,
    "local.batch_size": 5,
    "local.optimizer": "adam",
    "local.momentum": 0.5,
    "local.weight_decay": 0.1,
    "local.schedule.name": "inverse-linear",
    "local.schedule.decay": 0.8,
    "local.schedule.scale": 5,
    "local.schedule.warmup": 1,
    "sampler.name": "markov",
    "sampler.size": 3,
    "sampler.options": {"arrive": 0.5},
    "weighting": "uniform",
    "codec.name": "rand-k",
    "codec.options": {"k": 0.5},
    "aggregator.name": "trimmed-mean",
    "aggregator.options": {"trim": 0.2},
    "privacy.clip": 1.5,
    "privacy.noise_multiplier": 0.5,
    "privacy.quantile": 0.7,
    "rounds": 3,
    "evaluate.split": "examples",
    "evaluate.fraction": 0.2,
    "evaluate.every": 2,
    "time.down": 1.0,
    "time.up": 2.0,
    "time.slowdown": 3.0,
    "time.overhead": 4.0,
    "time.server": 5.0,
    "time.per_example": 6.0,
    "time.spread": 0.25,
    "execute.backend": "sequential",
    "execute.device": "cuda",
    "execute.threads": 2,
    "execute.checkpoint_seconds": 0.0,
    "seeds": [4, 0],
}
OPTIONS = [key for key in EVERY_KEY if key.endswith("options")]


def flat(recipe):
    found = flatten(plain(recipe))
    for key in OPTIONS:
        inside = {k: found.pop(k) for k in [*found] if k.startswith(f"{key}.")}
        found[key] = {k.removeprefix(f"{key}."): value for k, value in inside.items()}
    return found


class TestRoundTrip:
    def test_the_list_above_names_every_key_and_changes_it(self):
        assert set(EVERY_KEY) == {key for key, _, _ in describe()}
        default = flat(FederatedRecipe())
        assert not [key for key, value in EVERY_KEY.items() if default[key] == value]
        assert all(text for _, _, text in describe())

    def test_every_value_arrives_and_yaml_holds_it(self, tmp_path):
        recipe = build({}, list(EVERY_KEY.items()))
        assert flat(recipe) == EVERY_KEY
        (tmp_path / "again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load(str(tmp_path / "again.yaml")) == [recipe]


class TestShipped:
    def test_names_are_no_other_recipes(self):
        assert shipped()
        assert not set(shipped()) & set(parse.shipped())
        assert all(name.startswith("federated-") for name in shipped())

    @pytest.mark.parametrize("name", shipped())
    def test_begins_with_the_command_that_uses_it(self, name):
        lines = shipped()[name].splitlines()
        assert lines[0].startswith(f"# featherweight federate {name}")
        assert lines[1] == "#"
        assert len(lines[2]) > 20

    @pytest.mark.parametrize("name", [n for n in shipped() if "mnist" not in n])
    def test_fits_its_setting(self, name):
        (recipe,) = load(name)
        clients = make_clients(recipe, 0)
        simulation = make_simulation(recipe, clients, 0)
        findings = check(setting_of(recipe, clients.train, simulation.model))
        assert {finding.level for finding in findings} <= {"note", "warning"}
        (record,) = simulation.rounds(1)
        assert len(record.cohort) > 0

    def test_mnist_by_writer(self, shared_data):
        (recipe,) = load("federated-mnist-writers", [f"data.path={shared_data}"])
        clients = make_clients(recipe, 0)
        assert (len(clients.train), len(clients.validation), len(clients.test)) == (485, 54, 297)
        assert sum(int(part.sizes.sum()) for part in (clients.train, clients.validation)) == 60000
        assert int(clients.test.sizes.sum()) == 10000


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_can_be_named(codec):
    needs = [
        name
        for name, parameter in signature(CODECS[codec].method).parameters.items()
        if parameter.default is parameter.empty
    ]
    options = {name: 0.5 if name == "k" else 2 for name in needs}
    if codec == "error-feedback" or "codec" in needs:
        pytest.skip("takes another codec")
    tree = {
        "setting": {"kind": "cross-silo"},
        "data": {"limit": 100},
        "partition": {"clients": 4},
        "sampler": {"size": 3},
        "codec": {"name": codec, "options": options},
    }
    recipe = build(tree)
    clients = make_clients(recipe, 0)
    simulation = make_simulation(recipe, clients, 0)
    records = list(simulation.rounds(2))
    assert all(int(record.bytes_up.sum()) > 0 for record in records)


class TestHeldOut:
    def clients(self, *changes, seed=0):
        return make_clients(
            load("federated-digits", ["data.limit=400", "partition.clients=20", *changes])[0], seed
        )

    def indices(self, population):
        return set(population.indices.tolist())

    @pytest.mark.parametrize("split", ["pooled", "clients", "examples"])
    def test_nothing_held_out_is_trained_on(self, split):
        found = self.clients(f"evaluate.split={split}", "evaluate.fraction=0.2")
        train, held = self.indices(found.train), self.indices(found.validation)
        assert not train & held
        assert len(train | held) == 400
        assert len(held) == pytest.approx(80, abs=25)

    def test_splits_are_what_they_say(self):
        pooled = self.clients("evaluate.split=pooled")
        assert (len(pooled.train), len(pooled.validation)) == (20, 1)
        clients = self.clients("evaluate.split=clients")
        assert (len(clients.train), len(clients.validation)) == (18, 2)
        examples = self.clients("evaluate.split=examples")
        assert (len(examples.train), len(examples.validation)) == (20, 20)
        assert all(
            set(a.tolist()) | set(b.tolist()) == set(whole.tolist())
            for a, b, whole in zip(
                examples.train.clients, examples.validation.clients, examples.partition, strict=True
            )
        )

    def test_the_pool_is_one_for_all_seeds_and_the_division_is_not(self):
        one, other = (self.clients("evaluate.split=pooled", seed=seed) for seed in (0, 1))
        assert self.indices(one.validation) == self.indices(other.validation)
        assert not all(map(torch.equal, one.train.clients, other.train.clients))
        fixed = [self.clients("partition.seed=7", seed=seed).train.clients for seed in (0, 1)]
        assert all(map(torch.equal, *fixed))

    def test_the_twin_keeps_numbers(self):
        own, twin = self.clients(), self.clients("partition.twin=1")
        assert torch.equal(own.train.sizes, twin.train.sizes)
        assert twin.report.pairwise < own.report.pairwise / 1.3

    def test_images_are_standardised(self):
        images = self.clients().train.inputs
        assert float(images.mean()) == pytest.approx(0, abs=1e-5)
        assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)

    def test_writers_of_another_file_are_refused(self, tmp_path):
        path = tmp_path / "writers.npz"
        for content in (b"", b"no archive"):
            path.write_bytes(content)
            with pytest.raises(BadInput, match="holds no writers"):
                _read_writers(path)
        np.savez(path, train=np.zeros(3), other=np.zeros(3))
        with pytest.raises(BadInput, match="holds no writers"):
            _read_writers(path)
        np.savez(path, train=np.array([{}], dtype=object), test=np.zeros(3))
        with pytest.raises(BadInput, match="holds no writers"):
            _read_writers(path)


def test_options_reach_what_they_are_of():
    changes = [
        "algorithm.name=fedadam",
        "algorithm.options.betas=[0.5, 0.75]",
        "algorithm.server_rate=0.25",
        "algorithm.schedule.name=inverse-sqrt",
        "algorithm.schedule.scale=10",
        "local.schedule.warmup=4",
        "sampler.name=over-selection",
        "sampler.options.over=2",
        "aggregator.name=trimmed-mean",
        "aggregator.options.trim=0.25",
    ]
    (recipe,) = load("federated-digits", changes)
    clients = make_clients(recipe, 0)
    simulation = make_simulation(recipe, clients, 0)
    server = simulation.algorithm.server
    assert server.betas == (0.5, 0.75)
    records = list(simulation.rounds(2))
    assert records[1].server_rate == pytest.approx(0.25 / 1.1**0.5)
    assert [record.client_rate for record in records] == pytest.approx([0.025, 0.05])
    sampler = simulation.options.sampler
    assert (sampler.asked, len(sampler.seconds)) == (20, 50)
    assert len(sampler.seconds.unique()) > 40
    vectors = torch.tensor([[0.0], [1.0], [2.0], [100.0]])
    assert float(simulation.options.aggregator(vectors, torch.ones(4))) == 1.5
    assert json.loads(json.dumps(plain(recipe)))["sampler"]["options"] == {"over": 2}
