"""Costs: the guide's arithmetic, and totals that add up."""

import math

import pytest
import torch

from featherweight.federated.ledger import Costs, Ledger
from featherweight.federated.record import RoundRecord
from featherweight.federated.time_model import TimeModel


def record(round, cohort, up, down, examples, steps):
    return RoundRecord(
        round=round,
        cohort=torch.tensor(cohort, dtype=torch.int64),
        train_loss=1.0,
        client_losses=torch.ones(len(cohort)),
        start_losses=torch.ones(len(cohort)),
        steps=torch.tensor(steps, dtype=torch.int64),
        examples=torch.tensor(examples, dtype=torch.int64),
        bytes_up=torch.tensor(up, dtype=torch.int64),
        bytes_down=torch.tensor(down, dtype=torch.int64),
        metrics={},
        seconds=0.0,
    )


class TestTimeModel:
    def test_the_worked_example(self):
        # 4.4 million float32 parameters; figures as rounded in print.
        model, size = TimeModel(), 4.4e6 * 4
        assert size == 17.6e6
        assert model.communication(size, 0) == pytest.approx(23.5, abs=0.05)
        assert model.communication(0, size) == pytest.approx(70.4, abs=0.05)
        assert model.communication(0, 4.4e6 * 3 / 8) == pytest.approx(6.6, abs=0.05)
        seconds = model.round(torch.tensor([size]), torch.tensor([size]), torch.tensor([0]))
        assert seconds == pytest.approx(23.47 + 70.4 + 10, abs=0.01)

    def test_the_guides_example_of_computation(self):
        # GLD-23k, MobileNetV2: 0.127 s an example, up to 64 examples a client.
        assert TimeModel(per_example=0.127).client(64) == pytest.approx(7 * 0.127 * 64 + 10)

    def test_equations_9_and_10(self):
        model = TimeModel(down=2.0, up=3.0, slowdown=5.0, overhead=7.0, server=11.0, per_example=13)
        seconds = model.round(
            torch.tensor([1, 4]), torch.tensor([9, 6]), torch.tensor([2, 1], dtype=torch.int64)
        )
        assert seconds == 4 / 2 + 9 / 3 + 5 * 13 * 2 + 7 + 11

    def test_a_round_without_clients_costs_the_servers_time(self):
        empty = torch.empty(0)
        assert TimeModel(server=3.0).round(empty, empty, empty) == 3.0

    def test_devices(self):
        model, examples = TimeModel(per_example=0.01), torch.full((20000,), 100)
        equal = model.devices(examples, 75e4, 25e4, spread=0.0, seed=0)
        assert torch.equal(equal, torch.full((20000,), 7 * 0.01 * 100 + 10 + 1 + 1.0).double())
        drawn = model.devices(examples, 75e4, 25e4, spread=0.5, seed=0)
        assert float(drawn.median()) == pytest.approx(19.0, rel=0.02)
        assert float(drawn.log().std()) == pytest.approx(0.5, rel=0.02)
        again = model.devices(examples, 75e4, 25e4, spread=0.5, seed=0)
        assert torch.equal(drawn, again)
        assert not torch.equal(drawn, model.devices(examples, 75e4, 25e4, spread=0.5, seed=1))

    @pytest.mark.parametrize("name", ["down", "up", "slowdown", "overhead", "server"])
    @pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
    def test_refuses(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            TimeModel(**{name: value})
        with pytest.raises(ValueError, match="down must be finite and above 0, got 0"):
            TimeModel(down=0.0)


class TestLedger:
    ROUNDS = (
        record(0, [1, 3], [10, 30], [100, 100], [8, 4], [2, 1]),
        record(1, [], [], [], [], []),
        record(2, [3], [20], [100], [6], [2]),
    )

    def test_totals(self):
        ledger = Ledger(5, TimeModel(down=1.0, up=1.0, overhead=0.0, per_example=1.0, slowdown=1.0))
        for row in self.ROUNDS:
            totals = ledger.add(row)
        seconds = (100 + 30 + 8) + 0 + (100 + 20 + 6)
        assert totals == Costs(3, 60, 300, 18, 5, seconds)
        assert totals.bytes == 360
        assert ledger.participation.tolist() == [0, 1, 0, 2, 0]

    def test_bytes_beyond_32_bits(self):
        ledger = Ledger(3)
        huge = record(0, [0, 1, 2], [2**40] * 3, [2**41] * 3, [1] * 3, [1] * 3)
        assert ledger.add(huge).bytes == 9 * 2**40

    def test_rounds_come_in_order_and_once(self):
        ledger = Ledger(5)
        ledger.add(self.ROUNDS[0])
        for wrong in (self.ROUNDS[0], self.ROUNDS[2]):
            with pytest.raises(ValueError, match="round 1 was due, got round"):
                ledger.add(wrong)

    def test_goes_on_from_its_state(self):
        whole, first, second = Ledger(5), Ledger(5), Ledger(5)
        for row in self.ROUNDS:
            whole.add(row)
        first.add(self.ROUNDS[0])
        second.load_state_dict(first.state_dict())
        for row in self.ROUNDS[1:]:
            second.add(row)
        assert second.totals == whole.totals
        assert torch.equal(second.participation, whole.participation)
        assert first.totals.rounds == 1  # its state was copied
        with pytest.raises(ValueError, match="ledger of 4 clients"):
            Ledger(4).load_state_dict(first.state_dict())
