"""Partitions: disjoint, complete, of the promised sizes and mixes, the same for the same seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.federated.heterogeneity import partition_report
from featherweight.federated.partition import (
    PARTITIONS,
    check_partition,
    dirichlet,
    iid,
    label_dirichlet,
    labels_per_client,
    natural,
    quantity,
    shards,
    shuffled,
    zipf,
)
from featherweight.federated.partition.label_skew import _fill
from featherweight.federated.partition.quantity import proportional

TARGETS = torch.arange(2000) % 10
UNBALANCED = torch.tensor([0] * 900 + [1] * 90 + [2] * 9 + [7])
GROUPS = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))
OWN = {
    "dirichlet": {"alpha": 0.3},
    "label-dirichlet": {"alpha": 0.3},
    "natural": {"groups": GROUPS},
}


def make(name, targets=TARGETS, clients=20, seed=0, **options):
    return PARTITIONS[name].method(targets, clients=clients, seed=seed, **options)


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def mixes(targets, partition):
    return torch.stack([targets[part].bincount(minlength=10) / len(part) for part in partition])


@pytest.mark.parametrize("name", PARTITIONS)
class TestEveryPartition:
    def test_gives_no_example_twice_and_leaves_none_out(self, name):
        found = make(name, **OWN.get(name, {}))
        check_partition(found, len(TARGETS))
        assert len(found) == 20
        if name != "natural":  # which leaves out the groups that are not chosen
            assert torch.equal(torch.cat(found).sort().values, torch.arange(2000))
        assert all(torch.equal(part, part.sort().values) for part in found)
        assert all(part.dtype == torch.int64 for part in found)

    def test_is_a_function_of_the_seed(self, name):
        options = OWN.get(name, {})
        assert same(make(name, **options), make(name, **options))
        assert not same(make(name, **options), make(name, seed=1, **options))

    def test_leaves_global_generators_alone(self, name):
        np.random.seed(7)
        torch.manual_seed(7)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        make(name, **OWN.get(name, {}))
        assert (np.random.get_state()[1] == before[0]).all()
        assert torch.equal(torch.get_rng_state(), before[1])

    @pytest.mark.parametrize("clients", [0, -1, 2001])
    def test_refuses_impossible_numbers_of_clients(self, name, clients):
        with pytest.raises(ValueError, match=r"client"):
            make(name, clients=clients, **OWN.get(name, {}))

    def test_one_client_holds_all(self, name):
        options = OWN.get(name, {})
        if name == "natural":
            options = {"groups": torch.zeros(2000, dtype=torch.int64)}
        if name == "labels-per-client":
            options = {"labels": 10}
        (found,) = make(name, clients=1, **options)
        assert torch.equal(found, torch.arange(2000))


@given(
    name=st.sampled_from([n for n in PARTITIONS if n not in ("natural", "labels-per-client")]),
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    clients=st.integers(1, 20),
    seed=st.integers(0, 5),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e4]),
)
@settings(max_examples=150, deadline=None)
def test_small_and_odd_label_lists(name, labels, clients, seed, alpha):
    targets = torch.tensor(labels)
    options = {"alpha": alpha} if "dirichlet" in name else {}
    options |= {"least": 0} if name == "label-dirichlet" else {}
    options |= {"per_client": 1} if name == "shards" else {}
    if clients > len(labels):
        with pytest.raises(ValueError, match="clients"):
            make(name, targets, clients, seed, **options)
        return
    found = make(name, targets, clients, seed, **options)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(len(labels)))
    assert len(found) == clients


class TestIid:
    @pytest.mark.parametrize("clients", [1, 7, 33, 2000])
    def test_sizes_differ_by_one_at_most(self, clients):
        sizes = [len(part) for part in iid(TARGETS, clients=clients, seed=0)]
        assert max(sizes) - min(sizes) <= 1

    def test_clients_hold_the_common_mix(self):
        report = partition_report(TARGETS, iid(TARGETS, clients=4, seed=0))
        assert report.distance.max() < 0.1


class TestDirichlet:
    @pytest.mark.parametrize("alpha", [0.01, 0.5, 100])
    def test_equal_sizes(self, alpha):
        sizes = {len(part) for part in dirichlet(TARGETS, clients=30, seed=0, alpha=alpha)}
        assert sizes <= {66, 67}

    def test_large_alpha_is_iid_and_small_alpha_one_label(self):
        far = partition_report(TARGETS, dirichlet(TARGETS, clients=20, seed=0, alpha=1e-4))
        near = partition_report(TARGETS, dirichlet(TARGETS, clients=20, seed=0, alpha=1e4))
        # The last clients take what is left; the others see one label, or two at its border.
        assert (far.labels <= 2).double().mean() > 0.8
        assert near.distance.mean() < 0.15
        assert near.distance.median() < 0.15

    def test_mixes_are_dirichlet(self):
        # With far more examples than are handed out, nothing runs dry: variance of a share of the
        # symmetric Dirichlet is (1/C)(1 - 1/C) / (C alpha + 1).
        draws = [
            _fill(
                np.random.default_rng(seed).dirichlet(np.full(10, 0.5)),
                np.full(10, 10**7),
                10**4,
                0.5,
                np.random.default_rng(seed + 10**6),
            )
            for seed in range(3000)
        ]
        shares = np.stack(draws) / 10**4
        assert np.allclose(shares.mean(0), 0.1, atol=0.01)
        assert np.isclose(shares.var(), 0.1 * 0.9 / 6, rtol=0.05)

    def test_counts_are_those_of_drawing_one_after_the_other(self):
        # Independent oracle: draw labels singly, zero what is exhausted. Exact law by enumeration
        # is awkward; the two samples must agree in every count's frequency.
        mix, left, size = np.array([0.7, 0.2, 0.1, 0.0]), np.array([3, 2, 4, 2]), 8
        rng = np.random.default_rng(0)

        def singly():
            counts = np.zeros(4, int)
            for _ in range(size):
                mass = np.where(counts < left, mix, 0.0)
                mass = mass if mass.sum() > 0 else (left - counts).astype(float)
                counts[rng.choice(4, p=mass / mass.sum())] += 1
            return tuple(counts)

        def table(draw, count=6000):
            found = [draw() for _ in range(count)]
            return {key: found.count(key) / count for key in set(found)}

        ours = table(lambda: tuple(_fill(mix, left, size, 1.0, rng).tolist()))
        oracle = table(singly)
        assert set(ours) == set(oracle)
        assert all(abs(ours[key] - oracle[key]) < 0.03 for key in oracle)

    def test_no_mass_left_falls_back_to_what_remains(self):
        mix, left = np.array([1.0, 0.0, 0.0, 0.0]), np.array([2, 30, 30, 30])
        draws = [_fill(mix, left, 12, 0.01, np.random.default_rng(seed)) for seed in range(200)]
        assert all(draw.sum() == 12 and draw[0] == 2 for draw in draws)
        # Dir(0.01) on what remains: one label, each of the three as often.
        assert np.mean([(draw[1:] > 0).sum() == 1 for draw in draws]) > 0.9
        assert np.abs(np.mean(draws, 0)[1:] - 10 / 3).max() < 1

    def test_tiny_alpha_and_rare_labels(self):
        for seed in range(20):
            found = dirichlet(UNBALANCED, clients=50, seed=seed, alpha=1e-3)
            assert sum(map(len, found)) == len(UNBALANCED)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
    def test_alpha_must_be_positive(self, alpha):
        for partition in (dirichlet, label_dirichlet):
            with pytest.raises(ValueError, match="alpha must be positive and finite"):
                partition(TARGETS, clients=3, seed=0, alpha=alpha)


class TestLabelDirichlet:
    def test_heterogeneity_falls_with_alpha(self):
        distances = [
            float(
                partition_report(
                    TARGETS, label_dirichlet(TARGETS, clients=10, seed=0, alpha=alpha)
                ).distance.mean()
            )
            for alpha in (0.1, 1.0, 10.0, 1000.0)
        ]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 0.05

    def test_everyone_gets_the_least(self):
        found = label_dirichlet(TARGETS, clients=20, seed=3, alpha=0.3, least=25)
        assert min(map(len, found)) >= 25

    def test_says_when_no_draw_gives_the_least(self):
        with pytest.raises(ValueError, match=r"no draw of 10 .* alpha=0.01"):
            label_dirichlet(TARGETS, clients=100, seed=0, alpha=0.01, least=15)
        with pytest.raises(ValueError, match=r"least must lie in \[0, .* = 20\], got 21"):
            label_dirichlet(TARGETS, clients=100, seed=0, alpha=1, least=21)

    def test_balanced_evens_the_sizes(self):
        spread = [
            np.std(
                [
                    len(part)
                    for part in label_dirichlet(
                        TARGETS, clients=20, seed=1, alpha=0.2, least=0, balanced=balanced
                    )
                ]
            )
            for balanced in (False, True)
        ]
        assert spread[1] < spread[0]


class TestLabelsOfClients:
    def test_shards_of_sorted_labels(self):
        found = shards(TARGETS, clients=100, seed=0, per_client=2)
        assert {len(part) for part in found} == {20}
        assert partition_report(TARGETS, found).labels.max() <= 2

    def test_shards_that_do_not_divide(self):
        found = shards(UNBALANCED, clients=7, seed=0, per_client=3)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(1000))

    @pytest.mark.parametrize("per_client", [0, 21])
    def test_impossible_shards(self, per_client):
        with pytest.raises(ValueError, match="per_client must lie in"):
            shards(TARGETS, clients=100, seed=0, per_client=per_client)

    @pytest.mark.parametrize(("clients", "labels"), [(10, 1), (20, 3), (7, 2), (3, 10), (33, 4)])
    def test_exactly_so_many_labels(self, clients, labels):
        found = labels_per_client(TARGETS, clients=clients, seed=0, labels=labels)
        report = partition_report(TARGETS, found)
        assert report.labels.tolist() == [labels] * clients
        owners = (mixes(TARGETS, found) > 0).sum(0)
        assert owners.max() - owners.min() <= 1

    @pytest.mark.parametrize(
        ("targets", "clients", "labels", "words"),
        [
            (TARGETS, 5, 11, r"labels must lie in \[1, 10\], got 11"),
            (TARGETS, 5, 0, r"labels must lie in \[1, 10\], got 0"),
            (TARGETS, 4, 2, "4 clients of 2 labels cannot hold 10"),
            (UNBALANCED, 10, 2, "a label has 1 examples"),
        ],
    )
    def test_impossible_labels(self, targets, clients, labels, words):
        with pytest.raises(ValueError, match=words):
            labels_per_client(targets, clients=clients, seed=0, labels=labels)


class TestNatural:
    def test_a_client_is_a_group(self):
        found = natural(TARGETS, groups=GROUPS)
        assert len(found) == 40
        for number, part in enumerate(found):
            assert torch.equal(part, torch.nonzero(number == GROUPS)[:, 0])

    def test_a_choice_of_groups_and_small_ones_left_out(self):
        groups = torch.tensor([5] * 3 + [2] * 1 + [9] * 4 + [4] * 2)
        found = natural(torch.zeros(10, dtype=torch.int64), groups=groups, least=2)
        assert [len(part) for part in found] == [2, 3, 4]  # by id: 4, 5, 9
        few = natural(torch.zeros(10, dtype=torch.int64), groups=groups, least=2, clients=2, seed=0)
        assert {len(part) for part in few} < {2, 3, 4}
        with pytest.raises(ValueError, match=r"clients must lie in \[1, 3\].*got 4"):
            natural(torch.zeros(10, dtype=torch.int64), groups=groups, least=2, clients=4)

    def test_groups_must_fit(self):
        with pytest.raises(ValueError, match="groups must name 2000 examples, got 3"):
            natural(TARGETS, groups=torch.arange(3))

    def test_mnist_writers(self, shared_data):
        writers = torch.from_numpy(np.load(shared_data / "mnist" / "writers.npz")["train"])
        found = natural(torch.zeros(60000, dtype=torch.int64), groups=writers)
        sizes = torch.tensor([len(part) for part in found])
        assert (len(found), int(sizes.min()), int(sizes.max()), int(sizes.median())) == (
            539,
            19,
            131,
            116,
        )


class TestSizes:
    @pytest.mark.parametrize("make", [quantity, zipf])
    def test_neutral_is_equal_sizes(self, make):
        neutral = {"sigma": 0.0} if make is quantity else {"exponent": 0.0}
        assert {len(part) for part in make(TARGETS, clients=40, seed=0, **neutral)} == {50}

    def test_log_normal_spread(self):
        sizes = torch.tensor(
            [len(part) for part in quantity(torch.zeros(10**6), clients=2000, seed=0, sigma=0.8)]
        )
        assert abs(float(sizes.double().log().std()) - 0.8) < 0.05

    def test_zipf_by_rank(self):
        sizes = sorted(
            (len(p) for p in zipf(torch.zeros(10**5), clients=50, seed=0, exponent=1.5)),
            reverse=True,
        )
        assert sizes[0] / sizes[9] == pytest.approx(10**1.5, rel=0.05)

    @pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
    def test_refuses(self, bad):
        with pytest.raises(ValueError, match="sigma must lie in"):
            quantity(TARGETS, clients=4, seed=0, sigma=bad)
        with pytest.raises(ValueError, match="exponent must lie in"):
            zipf(TARGETS, clients=4, seed=0, exponent=bad)

    @given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.integers(0, 100))
    def test_proportional_sums_up_and_stays_near(self, shares, more):
        shares, total = np.array(shares), len(shares) + more
        sizes = proportional(shares, total)
        assert sizes.sum() == total
        assert sizes.min() >= 1
        assert np.abs(sizes - 1 - shares / shares.sum() * more).max() < 1


class TestTwin:
    def test_sizes_stay_and_labels_mix(self):
        skewed = label_dirichlet(TARGETS, clients=10, seed=0, alpha=0.2)
        twin = shuffled(skewed, seed=0)
        assert [len(part) for part in twin] == [len(part) for part in skewed]
        assert torch.equal(torch.cat(twin).sort().values, torch.arange(2000))
        before, after = (partition_report(TARGETS, p).pairwise for p in (skewed, twin))
        assert after < before / 3

    def test_fraction_zero_changes_nothing_and_grows_towards_the_twin(self):
        skewed = shards(TARGETS, clients=20, seed=0)
        assert same(shuffled(skewed, seed=0, fraction=0.0), skewed)
        distances = [
            partition_report(TARGETS, shuffled(skewed, seed=0, fraction=part)).pairwise
            for part in (0.0, 0.3, 0.6, 1.0)
        ]
        assert distances == sorted(distances, reverse=True)

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
    def test_refuses(self, fraction):
        with pytest.raises(ValueError, match="fraction must lie in"):
            shuffled(iid(TARGETS, clients=2, seed=0), seed=0, fraction=fraction)
