"""Lengths of training, and learning rates against torch's schedulers."""

import pytest
import torch

from featherweight.lab.duration import Duration, parse_duration
from featherweight.lab.parse import build
from featherweight.lab.schedule import Schedule, schedule


class TestDuration:
    @pytest.mark.parametrize(
        ("text", "steps"), [("5ep", 35), ("300it", 300), ("0ep", 0), (" 2ep ", 14)]
    )
    def test_steps(self, text, steps):
        assert parse_duration(text).steps(7) == steps

    def test_is_written_as_it_is_read(self):
        assert str(parse_duration("12ep")) == "12ep"
        assert parse_duration(Duration(3, "it")) == Duration(3, "it")

    @pytest.mark.parametrize(
        "text", ["5", 5, "-1ep", "1.5ep", "ep", "", "5 ep", "5epochs", "5ep3it", None, True, [5]]
    )
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ValueError, match="5ep or optimizer steps such as 300it"):
            parse_duration(text)


def rates(scheduler: type, steps: int, peak: float, **options: object) -> list[float]:
    """Ask one of torch's own schedulers, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    oracle = scheduler(optimizer, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()
    return found


class TestSchedule:
    @pytest.mark.parametrize("steps", [2, 3, 50])
    @pytest.mark.parametrize("final", [0.0, 0.25])
    def test_cosine_is_torchs(self, steps, final):
        ours = Schedule("cosine", steps, peak=0.3, final=final)
        theirs = rates(
            torch.optim.lr_scheduler.CosineAnnealingLR,
            steps,
            0.3,
            T_max=steps - 1,
            eta_min=0.3 * final,
        )
        assert [ours(t) for t in range(steps)] == pytest.approx(theirs, abs=1e-12)

    @pytest.mark.parametrize("final", [0.0, 0.25])
    def test_triangular_falls_as_torchs_linear(self, final):
        ours = Schedule("triangular", 40, peak=0.3, final=final)
        theirs = rates(
            torch.optim.lr_scheduler.LinearLR,
            40,
            0.3,
            start_factor=1.0,
            end_factor=final,
            total_iters=39,
        )
        assert [ours(t) for t in range(40)] == pytest.approx(theirs, abs=1e-12)

    def test_step_is_torchs(self):
        ours = Schedule("step", 30, peak=0.3, milestones=(5, 12, 12, 29), gamma=0.2)
        theirs = rates(
            torch.optim.lr_scheduler.MultiStepLR, 30, 0.3, milestones=[5, 12, 12, 29], gamma=0.2
        )
        assert [ours(t) for t in range(30)] == pytest.approx(theirs, rel=1e-12)

    @pytest.mark.parametrize("shape", ["constant", "cosine", "step", "triangular"])
    @pytest.mark.parametrize("start", [0.0, 0.2, 1.0])
    def test_warmup_is_torchs_and_ends_at_the_peak(self, shape, start):
        ours = Schedule(shape, 30, peak=0.3, warmup=10, start=start, final=0.1)
        if start:  # torch's refuses 0
            theirs = rates(
                torch.optim.lr_scheduler.LinearLR, 10, 0.3, start_factor=start, total_iters=10
            )
            assert [ours(t) for t in range(10)] == pytest.approx(theirs, rel=1e-9)
        assert ours(0) == pytest.approx(0.3 * start)
        assert ours(10) == 0.3
        assert max(ours(t) for t in range(30)) == 0.3

    @pytest.mark.parametrize(
        ("shape", "last"),
        [("constant", 0.3), ("cosine", 0.03), ("triangular", 0.03), ("step", 0.15)],
    )
    @pytest.mark.parametrize("warmup", [0, 10])
    def test_last_value(self, shape, last, warmup):
        ours = Schedule(shape, 30, peak=0.3, warmup=warmup, final=0.1, milestones=(20,), gamma=0.5)
        assert ours(29) == pytest.approx(last)

    @pytest.mark.parametrize("shape", ["constant", "cosine", "step", "triangular"])
    @pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (3, 7)])
    def test_short_levels_have_rates(self, shape, steps, warmup):
        ours = Schedule(shape, steps, peak=0.3, warmup=warmup, start=0.5, milestones=(0,))
        assert all(0 <= ours(t) <= 0.3 for t in range(steps))

    def test_durations_become_steps_of_this_data(self):
        fit = build(
            {"fit": {"schedule": "step", "warmup": "2ep", "milestones": ["3ep", "50it"]}}
        ).fit
        found = schedule(fit, steps=70, steps_per_epoch=7)
        assert (found.steps, found.warmup, found.milestones) == (70, 14, (21, 50))

    @pytest.mark.parametrize(
        ("shape", "warmup"), [("triangular", 14), ("cosine", 0), ("step", 0), ("constant", 0)]
    )
    def test_only_the_triangle_warms_up_by_default(self, shape, warmup):
        fit = build({"fit": {"schedule": shape}}).fit
        assert schedule(fit, 70, 7).warmup == warmup

    def test_no_warmup_on_request(self):
        fit = build({"fit": {"schedule": "triangular", "warmup": "0ep"}}).fit
        assert schedule(fit, 70, 7)(0) == fit.learning_rate
