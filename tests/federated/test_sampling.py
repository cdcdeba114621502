"""Samplers: cohorts of the promised law, the same for the same seed and round."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from featherweight.federated.sampling import (
    SAMPLERS,
    BySize,
    Diurnal,
    Everyone,
    Markov,
    OverSelection,
    Poisson,
    Uniform,
    WithReplacement,
    participation,
)

ROUNDS = 3000
SECONDS = torch.arange(1.0, 41.0)
EACH = {
    "all": lambda seed: Everyone(40),
    "uniform": lambda seed: Uniform(40, 8, seed),
    "with-replacement": lambda seed: WithReplacement(40, 8, seed),
    "by-size": lambda seed: BySize(torch.arange(1, 41), 8, seed),
    "poisson": lambda seed: Poisson(40, 8, seed),
    "diurnal": lambda seed: Diurnal(40, 8, seed),
    "markov": lambda seed: Markov(40, 8, seed),
    "over-selection": lambda seed: OverSelection(SECONDS, 8, seed, jitter=0.5),
}


def test_every_sampler_is_here():
    assert set(EACH) == set(SAMPLERS)


@pytest.mark.parametrize("name", EACH)
class TestEverySampler:
    def test_cohorts_are_ascending_ids(self, name):
        for round in range(50):
            cohort = EACH[name](0).cohort(round)
            assert cohort.dtype == torch.int64
            assert torch.equal(cohort, cohort.sort().values)
            assert not len(cohort) or (cohort.min() >= 0 and cohort.max() < 40)
            if name not in ("with-replacement", "by-size"):
                assert len(cohort.unique()) == len(cohort)

    def test_a_cohort_is_a_function_of_seed_and_round(self, name):
        one, other = EACH[name](3), EACH[name](3)
        forth = [one.cohort(round).tolist() for round in range(30)]
        back = [other.cohort(round).tolist() for round in reversed(range(30))]
        assert forth == back[::-1]
        assert [one.cohort(round).tolist() for round in range(30)] == forth
        if name != "all":
            assert len({tuple(cohort) for cohort in forth}) > 20
            assert [EACH[name](4).cohort(round).tolist() for round in range(30)] != forth

    def test_leaves_global_generators_alone(self, name):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        EACH[name](0).cohort(5)
        assert torch.equal(torch.get_rng_state(), before)


def chi_square(counts, expected):
    return stats.chisquare(counts.numpy(), expected).pvalue


class TestFrequencies:
    # A chi-square test of 3000 rounds each; a right sampler fails one of a thousand seeds.
    def test_uniform(self):
        counts = participation(Uniform(40, 8, seed=1), 40, ROUNDS)
        assert int(counts.sum()) == 8 * ROUNDS
        # Without replacement the counts vary less than multinomial ones: by 1 - 8/40.
        expected = np.full(40, 8 * ROUNDS / 40)
        statistic = float(((counts.numpy() - expected) ** 2 / expected).sum() / (1 - 8 / 40))
        assert 0.001 < stats.chi2.sf(statistic, 39) < 0.999

    def test_every_pair_is_as_likely(self):
        sampler = Uniform(5, 2, seed=0)
        pairs = [tuple(sampler.cohort(round).tolist()) for round in range(ROUNDS)]
        counts = torch.tensor([pairs.count(p) for p in itertools.combinations(range(5), 2)])
        assert chi_square(counts, np.full(10, ROUNDS / 10)) > 0.001

    def test_with_replacement(self):
        counts = participation(WithReplacement(40, 8, seed=1), 40, ROUNDS)
        assert chi_square(counts, np.full(40, 8 * ROUNDS / 40)) > 0.001

    def test_by_size(self):
        sizes = torch.arange(40)
        counts = participation(BySize(sizes, 8, seed=1), 40, ROUNDS)
        assert counts[0] == 0
        assert chi_square(counts[1:], 8 * ROUNDS * sizes[1:].numpy() / 780) > 0.001

    def test_poisson(self):
        sampler = Poisson(40, 8, seed=1)
        assert sampler.rate == 0.2
        sizes = [len(sampler.cohort(round)) for round in range(ROUNDS)]
        assert abs(np.mean(sizes) - 8) < 4 * math.sqrt(40 * 0.2 * 0.8 / ROUNDS)
        assert np.isclose(np.var(sizes), 40 * 0.2 * 0.8, rtol=0.1)
        assert min(len(Poisson(3, 0.1).cohort(round)) for round in range(50)) == 0

    def test_unbiased_pairs_of_sampling_and_weights(self):
        # By enumeration over all cohorts of two of four clients of unequal size.
        values, sizes = torch.tensor([8.0, 5.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
        shares = sizes / sizes.sum()
        truth = float(shares @ values)
        cohorts = [list(pair) for pair in itertools.combinations(range(4), 2)]
        ratio = np.mean([float(shares[c] @ values[c] / shares[c].sum()) for c in cohorts])
        horvitz_thompson = np.mean([float(shares[c] @ values[c]) * 4 / 2 for c in cohorts])
        drawn = sum(
            float(shares[i] * shares[j] * values[[i, j]].mean())
            for i, j in itertools.product(range(4), repeat=2)
        )
        assert abs(ratio - truth) > 0.05
        assert horvitz_thompson == pytest.approx(truth, abs=1e-6)
        assert drawn == pytest.approx(truth, abs=1e-6)
        sampler = BySize(sizes.long(), 2, seed=0)
        means = [values[sampler.cohort(round)].mean() for round in range(20000)]
        assert float(torch.stack(means).mean()) == pytest.approx(truth, abs=0.06)


class TestAvailability:
    def test_diurnal_groups_take_turns(self):
        sampler = Diurnal(40, 8, seed=0, period=10, groups=2)
        for round in range(40):
            expected = 0 if round % 10 < 5 else 1
            assert sampler.awake(round) == expected
            assert (sampler.cohort(round) % 2 == expected).all()

    def test_diurnal_groups_share_the_day(self):
        sampler = Diurnal(40, 8, seed=0, period=24, groups=3)
        assert [sampler.awake(r) for r in range(24)] == [0] * 8 + [1] * 8 + [2] * 8

    def test_markov_is_stationary_with_the_right_persistence(self):
        sampler = Markov(2000, 1, seed=0, arrive=0.05, leave=0.15)
        before, on, stay, arrive = None, [], [], []
        for round in range(200):
            present = torch.zeros(2000, dtype=torch.bool)
            present[sampler.on(round)] = True
            on.append(float(present.double().mean()))
            if before is not None:
                stay.append(float(present[before].double().mean()))
                arrive.append(float(present[~before].double().mean()))
            before = present
        assert np.mean(on[:20]) == pytest.approx(0.25, abs=0.03)
        assert np.mean(on) == pytest.approx(0.25, abs=0.02)
        assert np.mean(stay) == pytest.approx(0.85, abs=0.01)
        assert np.mean(arrive) == pytest.approx(0.05, abs=0.005)

    def test_markov_takes_whom_there_is(self):
        sampler = Markov(10, 8, seed=0, arrive=0.05, leave=0.5)
        for round in range(50):
            present, cohort = sampler.on(round).tolist(), sampler.cohort(round).tolist()
            assert set(cohort) <= set(present)
            assert len(cohort) == min(8, len(present))

    def test_markov_resumes_from_its_state(self):
        one, other = Markov(40, 8, seed=2), Markov(40, 8, seed=2)
        [one.cohort(round) for round in range(20)]
        other.load_state_dict(one.state_dict())
        for round in range(20, 30):
            assert torch.equal(one.cohort(round), other.cohort(round))


class TestOverSelection:
    def test_takes_the_first_to_finish_of_those_asked(self):
        sampler = OverSelection(SECONDS, 8, seed=0)
        assert sampler.asked == 11  # 1.3 times 8, rounded up
        for round in range(20):
            asked = sampler.selected(round)
            assert len(asked) == 11
            # Equal seconds a round: the fastest of those asked are those of the lowest ids.
            assert torch.equal(sampler.cohort(round), asked[:8])

    def test_leans_towards_fast_clients(self):
        counts = participation(OverSelection(SECONDS, 8, seed=0, over=2.0), 40, ROUNDS)
        assert counts[:10].sum() > 1.5 * counts[20:30].sum()
        assert counts[-1] < 0.05 * counts[0]

    def test_neutral_is_uniform(self):
        plain, over = Uniform(40, 8, seed=5), OverSelection(SECONDS, 8, seed=5, over=1.0)
        assert all(torch.equal(plain.cohort(r), over.cohort(r)) for r in range(20))

    def test_deadline_and_dropout(self):
        late = OverSelection(SECONDS, 8, seed=0, deadline=20.0)
        assert all((SECONDS[late.cohort(r)] <= 20).all() for r in range(50))
        assert all(len(OverSelection(SECONDS, 8, deadline=0.5).cohort(r)) == 0 for r in range(5))
        silent = OverSelection(SECONDS, 10, seed=0, over=1.0, dropout=0.3)
        present = [len(silent.cohort(round)) for round in range(ROUNDS)]
        assert np.mean(present) == pytest.approx(7, abs=0.15)

    def test_times_do_not_change_who_is_asked(self):
        slow = OverSelection(SECONDS.flip(0), 8, seed=0, jitter=1.0)
        assert torch.equal(slow.selected(3), OverSelection(SECONDS, 8, seed=0).selected(3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Uniform(5, 6), r"size must lie in \[1, 5 clients\], got 6"),
        (lambda: Uniform(5, 0), "size must lie in"),
        (lambda: Everyone(0), "size must lie in"),
        (lambda: WithReplacement(5, 0), "at least 1"),
        (lambda: BySize(torch.tensor([0, 0]), 1), "not all 0"),
        (lambda: BySize(torch.tensor([1, -1]), 1), "not all 0"),
        (lambda: Poisson(5, 0), r"size must lie in \(0, 5"),
        (lambda: Poisson(5, 5.1), r"size must lie in \(0, 5"),
        (lambda: Diurnal(10, 6), r"size must lie in \[1, 5\]"),
        (lambda: Diurnal(10, 1, groups=11), "groups must lie in"),
        (lambda: Markov(10, 11), "size must lie in"),
        (lambda: Markov(10, 1, arrive=0.0), "arrive must lie in"),
        (lambda: Markov(10, 1, leave=1.0), "leave in"),
        (lambda: OverSelection(SECONDS, 40), r"size \* over must lie in"),
        (lambda: OverSelection(SECONDS, 4, over=0.9), "over at least 1"),
        (lambda: OverSelection(SECONDS, 4, deadline=0.0), "deadline must be above 0"),
        (lambda: OverSelection(SECONDS, 4, dropout=1.0), "dropout lie in"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
