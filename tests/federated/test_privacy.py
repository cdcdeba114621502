import math

import pytest
import torch

from featherweight.federated.algorithms import FedAvg
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.local import Local
from featherweight.federated.privacy import Mechanism, Privacy, noise_multiplier_for
from featherweight.federated.sampling import Everyone, Poisson, Uniform
from featherweight.federated.simulate import simulate
from tests.federated.networks import SIZES, digits_like, network


class Some:
    """A Poisson sampler that says who comes."""

    rate = 0.5

    def __init__(self, *ids):
        self.ids = ids

    def cohort(self, round):
        return torch.tensor(self.ids, dtype=torch.int64)


def federation(privacy, sampler, **options):
    return simulate(
        network(),
        digits_like(),
        FedAvg(),
        sampler=sampler,
        local=Local(0.5, steps=4),
        weighting="uniform",
        privacy=privacy,
        **options,
    )


def moved(privacy, *ids):
    simulation = federation(privacy, Some(*ids))
    before = simulation.weights
    for _ in simulation.rounds(1):
        pass
    return simulation.weights - before


def alone(client):
    """Return the unclipped update of one client."""
    simulation = simulate(
        network(), digits_like(), FedAvg(), sampler=Some(client), local=Local(0.5, steps=4)
    )
    before = simulation.weights
    for _ in simulation.rounds(1):
        pass
    return simulation.weights - before


def test_clips_each_client_and_divides_by_the_expected_cohort():
    updates = [alone(client) for client in (0, 1, 4)]
    clip = float(sorted(update.norm() for update in updates)[1])
    expected = sum(update * min(1.0, clip / float(update.norm())) for update in updates)
    # 6 clients at a rate of 0.5: the denominator is 3, however many come
    torch.testing.assert_close(moved(Privacy(clip, 0.0), 0, 1, 4), expected / 3)
    one = updates[0] * min(1.0, clip / float(updates[0].norm()))
    torch.testing.assert_close(moved(Privacy(clip, 0.0), 0), one / 3)


def test_one_client_more_changes_the_sum_by_the_clip_at_most():
    privacy = Privacy(0.01, 0.0)
    change = 3 * (moved(privacy, 0, 1, 2) - moved(privacy, 0, 1))
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-4)


def test_noise_has_the_promised_size_and_comes_without_clients_too():
    privacy = Privacy(2.0, 3.0)
    noise = [Mechanism(privacy, 5.0, 1).noised(torch.zeros(4000), round) for round in range(10)]
    sample = torch.cat(noise)
    assert float(sample.std()) == pytest.approx(2.0 * 3.0 / 5.0, rel=0.02)
    assert float(sample.mean()) == pytest.approx(0.0, abs=0.03)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], Mechanism(privacy, 5.0, 1).noised(torch.zeros(4000), 0))
    assert moved(privacy).norm() > 0


def test_adaptive_clip_follows_the_quantile():
    privacy = Privacy(50.0, 0.0, quantile=0.3)
    mechanism = Mechanism(privacy, 40.0, 0)
    norms = torch.linspace(1, 10, 40)
    for round in range(200):
        mechanism.clipped(torch.diag(norms))
        mechanism.noised(torch.zeros(1), round)
    assert mechanism.clip == pytest.approx(float(norms.quantile(0.3)), rel=0.1)


def test_adaptive_clip_moves_by_its_formula():
    privacy = Privacy(2.0, 0.0, quantile=0.5, clip_rate=0.2)
    mechanism = Mechanism(privacy, 4.0, 0)
    clipped = mechanism.clipped(torch.diag(torch.tensor([1.0, 1.5, 1.9, 7.0])))
    assert clipped.norm(dim=1).tolist() == pytest.approx([1.0, 1.5, 1.9, 2.0])
    mechanism.noised(torch.zeros(4), 0)
    assert mechanism.clip == pytest.approx(2.0 * math.exp(-0.2 * (0.75 - 0.5)))
    mechanism.noised(torch.zeros(4), 1)
    assert mechanism.clip == pytest.approx(2.0 * math.exp(-0.2 * (0.25 - 0.5)))


def test_noise_is_shared_between_sum_and_count():
    privacy = Privacy(1.0, 1.2, quantile=0.5, count_noise=5.0)
    found = privacy.sum_multiplier(100.0)
    assert found == pytest.approx((1.2**-2 - 10.0**-2) ** -0.5)
    assert found > 1.2
    assert Privacy(1.0, 1.2, quantile=0.5).sum_multiplier(100.0) == found
    assert Privacy(1.0, 1.2).sum_multiplier(100.0) == 1.2
    with pytest.raises(ValueError, match=r"count_noise must be above noise_multiplier / 2 = 0\.6"):
        Privacy(1.0, 1.2, quantile=0.5).sum_multiplier(10.0)


def gaussian_delta(epsilon, multiplier):
    """Return the exact delta of a Gaussian mechanism of sensitivity 1 (Balle, Wang 2018)."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def cdf(x):
        return float(normal.cdf(torch.tensor(x, dtype=torch.float64)))

    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return cdf(a - b) - math.exp(epsilon) * cdf(-a - b)


def sampled_renyi(rate, multiplier, alpha):
    """Return the Renyi divergence of order alpha of a sampled Gaussian (Mironov et al. 2019)."""
    terms = [
        math.comb(alpha, k)
        * (1 - rate) ** (alpha - k)
        * rate**k
        * math.exp(k * (k - 1) / (2 * multiplier**2))
        for k in range(alpha + 1)
    ]
    return math.log(sum(terms)) / (alpha - 1)


def test_epsilon_without_sampling_is_the_exact_one():
    pytest.importorskip("dp_accounting")
    for rounds, multiplier in ((1, 1.0), (25, 6.0)):
        found = Privacy(1.0, multiplier).epsilon(rounds=rounds, delta=1e-5, rate=1.0)
        exact = gaussian_delta(found, multiplier / math.sqrt(rounds))
        assert exact == pytest.approx(1e-5, rel=0.05)


def test_epsilon_with_sampling_is_near_the_renyi_bound():
    pytest.importorskip("dp_accounting")
    rate, multiplier, rounds, delta = 0.02, 1.1, 500, 1e-5
    bounds = [
        rounds * sampled_renyi(rate, multiplier, alpha)
        + math.log1p(-1 / alpha)
        - (math.log(delta) + math.log(alpha)) / (alpha - 1)
        for alpha in range(2, 40)
    ]
    options = {"rounds": rounds, "delta": delta, "rate": rate}
    renyi = Privacy(1.0, multiplier).epsilon(accountant="rdp", **options)
    tight = Privacy(1.0, multiplier).epsilon(**options)
    assert renyi == pytest.approx(min(bounds), rel=0.02)
    assert 0.7 * renyi < tight < renyi
    assert Privacy(1.0, 0.0).epsilon(**options) == math.inf


def test_noise_for_an_epsilon_and_back():
    pytest.importorskip("dp_accounting")
    options = {"rounds": 100, "delta": 1e-5, "rate": 0.1}
    multiplier = noise_multiplier_for(2.0, accountant="rdp", **options)
    spent = Privacy(1.0, multiplier).epsilon(accountant="rdp", **options)
    assert 1.97 < spent <= 2.0


def test_simulation_tells_what_it_has_spent():
    pytest.importorskip("dp_accounting")
    privacy = Privacy(1.0, 2.0)
    simulation = federation(privacy, Poisson(6, 3.0))
    for _ in simulation.rounds(4):
        pass
    expected = privacy.epsilon(rounds=4, delta=1e-3, rate=0.5)
    assert simulation.epsilon(1e-3) == pytest.approx(expected)
    assert federation(privacy, Poisson(6, 3.0)).epsilon(1e-3) == pytest.approx(0.0, abs=1e-6)
    plain = federation(None, Uniform(len(SIZES), 2))
    with pytest.raises(ValueError, match="no privacy="):
        plain.epsilon(1e-3)


@pytest.mark.parametrize(
    ("options", "sampler", "named"),
    [
        ({}, Everyone(6), "needs a sampler that draws each client by itself"),
        ({"aggregator": "median"}, Poisson(6, 3.0), "aggregator must be None"),
    ],
)
def test_refuses_what_breaks_the_guarantee(options, sampler, named):
    with pytest.raises(ValueError, match=named):
        federation(Privacy(1.0, 1.0), sampler, **options)


def test_refuses_codecs_that_lengthen_updates_and_takes_identity():
    class Longer(Identity):
        name = "longer"

    federation(Privacy(1.0, 1.0), Poisson(6, 3.0), codec=Identity())
    with pytest.raises(ValueError, match="codec=None or Identity"):
        federation(Privacy(1.0, 1.0), Poisson(6, 3.0), codec=Longer())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"quantile": 1.0}, "quantile"),
        ({"clip_rate": 0.0}, "clip_rate"),
        ({"count_noise": -1.0}, "count_noise"),
    ],
)
def test_refuses_a_bad_argument(options, named):
    with pytest.raises(ValueError, match=named):
        Privacy(**{"clip": 1.0, "noise_multiplier": 1.0, **options})


def test_refuses_bad_accounting():
    pytest.importorskip("dp_accounting")
    privacy = Privacy(1.0, 1.0)
    with pytest.raises(ValueError, match="accountant must be 'pld' or 'rdp', got 'prv'"):
        privacy.epsilon(rounds=1, delta=1e-5, rate=0.1, accountant="prv")
    with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\], got 0"):
        privacy.epsilon(rounds=1, delta=1e-5, rate=0.0)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        noise_multiplier_for(0.0, delta=1e-5, rounds=1, rate=0.1)
