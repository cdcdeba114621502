"""The machine doctor: its advice follows the numbers, and it leaves no setting behind."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from featherweight.lab import doctor, speed
from featherweight.lab.doctor import Findings, Machine, advice, break_even, examine, render
from featherweight.lab.recipe import ExecuteRecipe
from featherweight.lab.speed import Candidate, Comparison, alternate, compare, settings_kept

CPU = torch.device("cpu")
MACHINE = Machine("3.11.0", "2.13.0 (CPU build)", ("MKL 2024.2",), "a processor", 4, 4)


def comparison(name: str, ratio: float, **more: object) -> Comparison:
    fields: dict[str, object] = {
        "what": name,
        "against": "the other",
        "quartiles": (ratio, ratio),
        "seconds": 1.0,
        "against_seconds": ratio,
    }
    return Comparison(name=name, ratio=ratio, **(fields | more))  # type: ignore[arg-type]


def findings(*comparisons: Comparison) -> Findings:
    return Findings(MACHINE, comparisons)


def layer(sparsity: float, seconds: float, dense: float = 1.0) -> Comparison:
    ratio = dense / seconds
    return comparison("sparse", ratio, sparsity=sparsity, seconds=seconds, against_seconds=dense)


def settings() -> tuple[object, ...]:
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        torch.is_autocast_enabled("cpu"),
    )


@pytest.fixture(scope="module")
def measured() -> Findings:
    before, state = settings(), torch.get_rng_state()
    found = examine(quick=True)
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), state)
    return found


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("matmul-medium", "execute.matmul_precision=medium"),
        ("matmul-bf16", "execute.precision=bf16"),
        ("conv-channels-last", "execute.channels_last=true"),
        ("conv-bf16", "execute.precision=bf16"),
        ("threads", "execute.threads=4"),
        ("adamw-fused", "fused=True"),
    ],
)
def test_a_setting_is_advised_only_above_the_threshold(name: str, setting: str) -> None:
    assert advice(findings(comparison(name, 1.15))) == []
    (line,) = advice(findings(comparison(name, 1.16)))
    assert setting in line
    assert "1.2x faster" in line


def test_a_ratio_on_which_the_rounds_disagree_earns_no_advice() -> None:
    assert advice(findings(comparison("matmul-bf16", 1.5, quartiles=(0.9, 2.0)))) == []


def test_threads_that_slow_down_are_advised_against() -> None:
    (line,) = advice(findings(comparison("threads", 0.5)))
    assert line.startswith("execute.threads=1: 4 threads are 2.0x slower")
    assert advice(findings(comparison("threads", 0.95))) == []
    assert advice(findings(comparison("threads", 0.5, quartiles=(0.4, 1.2)))) == []


def test_the_advice_says_whether_a_product_is_still_full_fp32() -> None:
    (full,) = advice(findings(comparison("matmul-medium", 2.0, difference=4e-7)))
    (reduced,) = advice(findings(comparison("matmul-medium", 2.0, difference=2e-3)))
    assert "still full fp32" in full
    assert "4e-07" in full
    assert "reduced precision" in reduced


def test_every_setting_advised_exists_in_the_recipe() -> None:
    words = " ".join(doctor.SETTINGS.values()).split()
    keys = [word.removeprefix("execute.") for word in words if word.startswith("execute.")]
    assert keys
    for key in keys:
        assert key.partition("=")[0] in ExecuteRecipe.__dataclass_fields__


def test_break_even_is_where_the_straight_line_meets_dense() -> None:
    # time = 0.1 + 2 * density, dense 0.7: they meet at density 0.3.
    line = [layer(s, 0.1 + 2 * (1 - s), dense=0.7) for s in (0.9, 0.95, 0.99)]
    assert break_even(findings(*line)) == pytest.approx(0.7)
    assert "break-even near 70 % zeros" in advice(findings(*line))[-1]


def test_no_break_even_without_data_or_without_a_win() -> None:
    assert break_even(findings()) is None
    assert break_even(findings(layer(0.9, 0.2))) is None
    slow = [layer(s, 3 + 2 * (1 - s), dense=0.7) for s in (0.9, 0.95, 0.99)]
    assert break_even(findings(*slow)) is None
    assert advice(findings(*slow)) == []


def test_break_even_of_sparse_layers_that_always_wins_is_zero() -> None:
    fast = [layer(s, 0.1 + 0.2 * (1 - s), dense=0.7) for s in (0.9, 0.95, 0.99)]
    assert break_even(findings(*fast)) == 0.0


def test_compare_takes_the_median_of_paired_ratios() -> None:
    # Ratios by round: 2, 4, 1. The ratio of the medians would be 4.
    found = compare("x", "new", "old", times=[1.0, 2.0, 1.0], baseline=[2.0, 8.0, 1.0])
    assert found.ratio == 2.0
    assert found.quartiles == (1.5, 3.0)
    assert (found.seconds, found.against_seconds) == (1.0, 2.0)


def test_candidates_run_in_turn_and_inside_their_setting() -> None:
    log: list[str] = []

    @contextmanager
    def setting() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("leave")

    first = Candidate("a", lambda: log.append("a"))
    second = Candidate("b", lambda: log.append("b"), setting)
    times = alternate([first, second], 2, CPU)
    calls = speed.CALLS + 1
    a, b = ["a"] * calls, ["enter", *["b"] * calls, "leave"]
    assert log == [*a, *b, *b, *a]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def fail_inside() -> None:
    with settings_kept():
        flipped = "highest" if torch.get_float32_matmul_precision() == "medium" else "medium"
        torch.set_float32_matmul_precision(flipped)
        torch.set_num_threads(torch.get_num_threads() + 1)
        raise KeyError


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_put_back_after_an_error(precision: str) -> None:
    before = settings()
    with settings_kept():
        torch.set_float32_matmul_precision(precision)
        inner = settings()
        with pytest.raises(KeyError):
            fail_inside()
        assert settings() == inner
    assert settings() == before


def test_settings_of_one_backend_alone_are_put_back_too() -> None:
    with settings_kept():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # torch calls this mixed, and raises
        with pytest.raises(RuntimeError, match="mix"):
            torch.get_float32_matmul_precision()
        with speed._precision("highest"):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_a_kernel_that_is_missing_becomes_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> list[Comparison]:
        torch.set_float32_matmul_precision("medium")
        raise NotImplementedError("no such kernel\nlong trace")

    for name in ("matmul", "sparse", "convolution", "threads", "adamw"):
        monkeypatch.setattr(speed, name, missing)
    before = settings()
    found = examine()
    assert found.comparisons == ()
    assert found.notes[0] == "matmul not measured: no such kernel"
    assert len(found.notes) == 5
    assert settings() == before
    assert advice(found) == []


def test_what_is_measured(measured: Findings) -> None:
    names = {found.name for found in measured.comparisons}
    expected = {"matmul-medium", "matmul-bf16", "conv-channels-last", "conv-bf16", "sparse"}
    assert expected | {"adamw-fused"} <= names
    assert ("threads" in names) == (measured.machine.cores > 1)
    sparsities = [found.sparsity for found in measured.comparisons if found.name == "sparse"]
    assert sparsities == [0.9, 0.95, 0.99]
    for found in measured.comparisons:
        low, high = found.quartiles
        assert 0 < low <= found.ratio <= high
    assert measured.notes == ()


def test_differences_are_those_of_the_number_formats(measured: Findings) -> None:
    by_name = {found.name: found for found in measured.comparisons}
    bf16 = by_name["matmul-bf16"].difference
    medium = by_name["matmul-medium"].difference
    assert bf16 is not None
    assert medium is not None
    assert 1e-4 < bf16 < 2e-2  # bf16 keeps 8 bits: 2**-9 a rounding
    assert medium < 2e-2


def test_the_sparse_layer_has_the_zeros_it_is_measured_for() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = (torch.randn(64, 64, generator=generator) for _ in range(2))
    of_inputs, of_values = speed._sparse_step(inputs, weight, 0.9)()
    kept = weight * (weight.abs() >= weight.abs().flatten().topk(410).values.min())
    assert of_values.shape == (410,)
    torch.testing.assert_close(of_inputs, torch.ones(64, 64) @ kept)


def test_thread_warnings() -> None:
    warn = doctor.thread_warnings
    assert warn({}, cores=4, threads=4, load=0.5) == ()
    assert warn({"OMP_NUM_THREADS": "4"}, 4, 4, 0.5) == ()
    assert warn({"OMP_NUM_THREADS": "not a number"}, 4, 4, 0.5) == ()
    (many,) = warn({"OMP_NUM_THREADS": "8"}, 4, 8, 0.5)
    assert many == "OMP_NUM_THREADS=8 exceeds the 4 cores this process may use"
    (threads,) = warn({}, 4, 6, 0.5)
    assert threads == "torch uses 6 threads on 4 cores"
    (busy,) = warn({}, 4, 4, 7.25)
    assert "load 7.2 on 4 cores" in busy


def test_the_picture_for_the_console_holds_everything() -> None:
    machine = Machine("3.11.0", "2.13.0", ("MKL",), "a [fast] cpu", 4, 8, ("cuda:0 X",), ("hot",))
    found = Findings(machine, (comparison("threads", 2.0),), ("sparse not measured: x",))
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(render(found))
    text = console.export_text()
    parts = ["a [fast] cpu", "cuda:0 X", "warning: hot", "2.00x", "execute.threads=4", "sparse not"]
    for part in parts:
        assert part in text
    console.print(render(findings()))
    assert "nothing measured here is worth a setting" in console.export_text()
