"""What layers cost is measured once and kept, and decides which backend "auto" means."""

import contextlib
import json

import pytest
import torch
from torch import nn

from featherweight.sparse.execute import (
    Gain,
    SparsePattern,
    backends,
    choose,
    compiled,
    cost,
    machine_gains,
    precision_error,
    probe,
    to_sparse,
)
from featherweight.sparse.execute.choose import choose_linear, shapes_of
from tests.models import mlp


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "costs.json"
    monkeypatch.setenv(cost.VARIABLE, str(path))
    return path


@pytest.fixture
def measured(file, monkeypatch):
    """Costs of a machine of paper: 8 an entry, sparse 10 and 9 a kept one, 1 in a block."""
    calls = []

    def seconds(mask, batch, names, dtype):
        calls.append((tuple(mask.shape), batch))
        kept, size = int(mask.sum()), mask.numel()
        block = int(mask.any(0).sum() * mask.any(1).sum())
        times = {"masked": 8 * size, "bag": 10 * kept, "bag-numba": 9 * kept, "shrunk": block}
        return {name: float(times[name]) for name in names}

    monkeypatch.setattr(choose, "linear_seconds", seconds)
    monkeypatch.setattr(compiled, "available", lambda: True)
    return calls


def pattern(density, shape=(40, 50)):
    generator = torch.Generator().manual_seed(0)
    return SparsePattern.from_mask(torch.rand(shape, generator=generator) < density)


class TestFile:
    def test_a_kind_of_layer_is_measured_once(self, file):
        calls = []
        for _ in range(3):
            found = cost.seconds("a layer", lambda: calls.append(1) or {"bag": 0.5})
            assert found == {"bag": 0.5}
        assert len(calls) == 1
        assert json.loads(file.read_text()) == {cost.machine(): {"a layer": {"bag": 0.5}}}

    def test_other_kinds_and_other_machines_are_kept_beside(self, file, monkeypatch):
        cost.seconds("a layer", lambda: {"bag": 1.0})
        cost.seconds("another", lambda: {"bag": 2.0})
        monkeypatch.setattr(cost, "machine", lambda: "elsewhere")
        assert cost.seconds("a layer", lambda: {"bag": 3.0}) == {"bag": 3.0}
        kept = json.loads(file.read_text())
        assert sorted(len(cells) for cells in kept.values()) == [1, 2]

    def test_what_others_write_meanwhile_is_kept(self, file):
        def measure():
            cost.seconds("another", lambda: {"bag": 2.0})
            return {"bag": 1.0}

        cost.seconds("a layer", measure)
        assert set(json.loads(file.read_text())[cost.machine()]) == {"a layer", "another"}

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"b": {"c": "x"}}}'])
    def test_a_damaged_file_is_measured_anew(self, file, text):
        file.parent.mkdir()
        file.write_text(text)
        assert cost.seconds("a layer", lambda: {"bag": 1.0}) == {"bag": 1.0}
        assert cost.machine() in json.loads(file.read_text())

    def test_a_folder_that_cannot_be_written_stops_nobody(self, file):
        file.parent.write_text("no folder")
        assert cost.seconds("a layer", lambda: {"bag": 1.0}) == {"bag": 1.0}

    def test_where_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv(cost.VARIABLE, raising=False)
        assert cost.path() == tmp_path / "featherweight" / "costs.json"
        monkeypatch.setenv(cost.VARIABLE, "")
        assert cost.path() is None
        assert cost.seconds("a layer", lambda: {"bag": 1.0}) == {"bag": 1.0}
        assert list(tmp_path.iterdir()) == []

    def test_threads_and_precision_are_another_machine(self):
        names = {cost.machine()}
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(before + 1)
            names.add(cost.machine())
        finally:
            torch.set_num_threads(before)
        with probe.matmul_precision("medium"):
            names.add(cost.machine())
        assert len(names) == 3

    @pytest.mark.parametrize(
        ("value", "steps", "expected"),
        [(0.0, 3, 0.0), (100, 1, 128), (1, 1, 1), (0.1, 3, 2 ** (-10 / 3)), (0.25, 3, 0.25)],
    )
    def test_rounding(self, value, steps, expected):
        assert cost.rounded(value, steps) == pytest.approx(expected)


class TestChoice:
    @pytest.mark.parametrize(
        ("density", "expected"), [(0.1, "bag-numba"), (0.8, "bag-numba"), (0.9, "masked")]
    )
    def test_the_fastest_wins_by_a_margin(self, measured, density, expected):
        assert choose_linear(pattern(density), 128, torch.float32) == expected

    @pytest.mark.parametrize(("bag", "expected"), [(0.97, "masked"), (0.9, "bag")])
    def test_what_is_hardly_faster_stays_masked(self, monkeypatch, bag, expected):
        monkeypatch.setattr(choose, "_times", lambda *_: {"masked": 1.0, "bag": bag})
        assert choose_linear(pattern(0.5), 128, torch.float32) == expected

    def test_without_numba_bag_wins(self, measured, monkeypatch):
        monkeypatch.setattr(compiled, "available", lambda: False)
        assert choose_linear(pattern(0.1), 128, torch.float32) == "bag"

    @pytest.mark.parametrize(("living", "expected"), [(20, "shrunk"), (39, "bag-numba")])
    def test_dead_rows_and_columns_are_shrunk_away(self, measured, living, expected):
        mask = torch.zeros(40, 50, dtype=torch.bool)
        mask[:living, :living] = torch.rand(living, living) < 0.7
        mask[:living, 0] = mask[0, :living] = True
        found = SparsePattern.from_mask(mask)
        assert choose_linear(found, 128, torch.float32) == expected
        assert found.derived == {}

    def test_similar_layers_share_one_measurement(self, measured):
        for density, batch in ((0.1, 128), (0.1, 120), (0.101, 140)):
            choose_linear(pattern(density), batch, torch.float32)
        assert len(measured) == 1
        choose_linear(pattern(0.1), 512, torch.float32)
        assert len(measured) == 2

    def test_large_layers_are_measured_at_a_bounded_size(self, measured):
        choose_linear(pattern(0.001, (3000, 4000)), 10**6, torch.float32)
        (call,) = measured
        assert call == ((cost.LARGEST, cost.LARGEST), cost.LARGEST_BATCH)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_masked(self, measured, dtype):
        assert choose_linear(pattern(0.1), 128, dtype) == "masked"
        assert measured == []

    def test_auto_takes_the_batch_from_the_example(self, measured):
        model = mlp()
        mask = {"0.weight": torch.rand(24, 16) < 0.2}
        to_sparse(model, mask, example=torch.randn(32, 16))
        assert backends(model) == {"0": "bag-numba"}
        assert measured == [((24, 16), 32)]

    def test_the_mapping_overrules_auto(self, measured):
        model = mlp()
        masks = {f"{i}.weight": torch.rand(24, n) < 0.2 for i, n in ((0, 16), (3, 24))}
        to_sparse(model, masks, {"3": "csr"})
        assert backends(model) == {"0": "bag-numba", "3": "csr"}

    def test_an_example_leaves_no_trace(self):
        model = mlp()
        model[3].eval()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        shapes = shapes_of(model, (torch.randn(7, 16),), [model[0], model[6]])
        assert shapes == {model[0]: (7, 16), model[6]: (7, 24)}
        assert [m.training for m in model.modules()] == modes
        assert not model[0]._forward_pre_hooks
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        with pytest.raises(RuntimeError, match="shapes"):
            shapes_of(model, torch.randn(7, 17), [model[0]])
        assert not model[0]._forward_pre_hooks


class TestProbe:
    def test_every_backend_is_timed(self):
        names = ["masked", "csr", "bag", "shrunk"]
        found = probe.linear_seconds(probe.random_mask((8, 8), 0.3), 4, names)
        assert list(found) == names
        assert all(0 < seconds < 1 for seconds in found.values())

    def test_the_shortest_time_counts(self, monkeypatch):
        clock = iter(range(10**6))
        spans = iter([1.0, 5.0, 3.0, 4.0] + [9.0] * 100)
        now = [0.0]

        def call():
            now[0] += next(spans)

        monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock) * 0 + now[0])
        assert probe.fastest({"a": call}) == {"a": 3.0}

    def test_gains_of_this_machine(self):
        gains = machine_gains([(32, 32)], (0.5, 0.1), batch=8)
        assert [g.density for g in gains] == [0.5, 0.1]
        for gain in gains:
            assert gain.backend in ("bag", "bag-numba")
            assert gain.gain == min(gain.dense, gain.dense_medium) / gain.sparse
            assert f"32x32, batch 8, density {gain.density:g}" in str(gain)

    def test_a_gain_is_against_the_better_dense_step(self):
        assert Gain((4, 4), 0.1, 1, 4.0, 2.0, 0.5, "bag").gain == 4.0

    def test_precision_is_put_back(self):
        before = torch.get_float32_matmul_precision()
        with contextlib.suppress(KeyError), probe.matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        assert 0 <= precision_error(64) < 0.02


def test_nothing_is_slower_than_masked_by_choice(measured):
    """Whatever the times, the choice is never one that was measured slower than masked."""
    for density in (0.2, 0.3, 0.7, 0.85, 0.95, 1.0):
        found = pattern(density)
        times = choose._times(found.shape, found.density, 128, torch.float32)
        name = choose_linear(found, 128, torch.float32)
        assert times[name] <= times["masked"]


def test_convolutions_and_linear_layers_share_one_name(file):
    pytest.importorskip("numba")
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 4))
    shapes = {"0.weight": (3, 2, 3, 3), "2.weight": (4, 27)}
    masks = {name: torch.rand(shape) < 0.5 for name, shape in shapes.items()}
    to_sparse(model, masks, "masked")
    assert backends(model) == {"0": "masked", "2": "masked"}
    with pytest.raises(ValueError, match="unknown backend 'chw'"):
        to_sparse(mlp(), {}, "chw")
