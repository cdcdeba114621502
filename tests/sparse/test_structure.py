"""Structures: what a pattern is, and selection under it in every scope and support."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse import DENSITIES, Masks, select
from featherweight.sparse.structure import NM, Block, Channel, Structure, satisfies
from tests.models import ConvNet
from tests.oracles import structure as oracle

SHAPES = [(6, 8), (5, 7), (4, 6, 3, 3), (3, 5, 2), (7,), (2, 1, 3, 3), (4, 3, 1, 2, 2)]
KINDS = ["2:4", "1:3", "3:3", "2:5", "2x2", "1x9", "4x3", "1x1", "channel"]


def random_scores(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("text", "kind"),
    [("2:4", NM(2, 4)), ("4x8", Block(4, 8)), ("channel", Channel()), ("16:32", NM(16, 32))],
)
def test_parse_reads_what_str_writes(text, kind):
    assert Structure.parse(text) == kind
    assert str(kind) == text
    assert Structure.parse(kind) is kind


@given(st.text(alphabet="0123456789:x-. channelNM", max_size=8))
def test_other_text_is_refused_in_one_line(text):
    if fits(text):
        assert Structure.parse(str(Structure.parse(text))) == Structure.parse(text)
    else:
        with pytest.raises(ValueError, match=r"\Astructure .+\Z"):
            Structure.parse(text)


def fits(text):
    if text == "channel":
        return True
    for separator in ":x":
        left, found, right = text.partition(separator)
        if found and left.isdigit() and right.isdigit():
            least, most = int(left), int(right)
            return 1 <= least <= most if separator == ":" else min(least, most) > 0
    return False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5:4", r"structure 5:4: n must lie in \[1, m\], got n=5, m=4"),
        ("0:4", "n must lie"),
        ("0x4", "rows and columns must be positive"),
        ("2/4", "must be 'N:M' such as '2:4', 'RxC' such as '4x4', or 'channel', got '2/4'"),
        ("٢:٤", "must be 'N:M'"),
        ("", "got ''"),
    ],
)
def test_bad_structures(text, words):
    with pytest.raises(ValueError, match=words):
        Structure.parse(text)
    with pytest.raises(ValueError, match=words):
        select({"a": torch.ones(4, 4)}, 0.5, structure=text)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", KINDS)
def test_tiles_are_the_groups_and_come_back(shape, text):
    kind = Structure.parse(text)
    numbers = torch.arange(1, torch.Size(shape).numel() + 1).view(shape)
    tiles = kind.tiles(numbers)
    found = {frozenset(row[row > 0].tolist()) for row in tiles} - {frozenset()}
    wanted = {frozenset(int(numbers[i]) for i in group) for group in oracle.groups(shape, text)}
    assert found == wanted
    assert torch.equal(kind.untile(tiles, numbers.shape), numbers)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", KINDS)
def test_satisfies_against_loops(shape, text):
    generator = torch.Generator().manual_seed(1)
    kind, outcomes = Structure.parse(text), set()
    for seed in range(12):
        support = torch.rand(shape, generator=generator) < 0.7 if seed % 2 else None
        mask = random_scores(shape, seed) < (0.1, 0.5, 1.1)[seed % 3]
        if seed > 5:
            mask = _nearly(kind, mask, support)
        inside = mask if support is None else mask & support
        wanted = oracle.follows(inside, text, support)
        given_support = None if support is None else {"a": support}
        assert satisfies({"a": inside}, text, given_support) == wanted
        outcomes.add(wanted)
    assert True in outcomes


def _nearly(kind, mask, support):
    """Return a mask of whole groups or of the pattern."""
    if isinstance(kind, NM):
        return kind.narrow(mask.float(), support)
    return kind.expand(kind.tiles(mask).float().mean(1) > 0.4, mask.shape)


def test_no_structure_is_followed_by_everything():
    assert satisfies({"a": torch.rand(3, 5) < 0.5}, None)


@pytest.mark.parametrize("text", ["2:4", "1:3", "2:5"])
def test_nm_is_exact_and_best(text):
    scores = {"a": random_scores((4, 6, 3, 3)), "b": random_scores((5, 7), 1)}
    kind = Structure.parse(text)
    size = sum(score.numel() for score in scores.values())
    for density in (kind.max_density, 0.8 * kind.max_density, 0.1):
        masks = select(scores, density, structure=text)
        assert masks.nonzeros == round(density * size)
        assert all(oracle.follows(mask, text) for mask in masks.values())
    alone = select({"b": scores["b"]}, 0.25, structure=text)["b"]
    best = oracle.best_under_nm(scores["b"], text, int(alone.sum()))
    assert scores["b"][alone].sum().item() == pytest.approx(best)


def test_nm_groups_of_a_convolution_run_over_channels():
    """Along the flattened kernel, both large entries of a position would be dropped."""
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :2, 0, 0] = 1
    scores[0, 2:, 0, 1] = 1
    mask = select({"a": scores}, 0.5, structure="2:4")["a"]
    assert torch.equal(mask, scores > 0)


def test_nm_ties_and_infinities():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, -torch.inf, -torch.inf]])
    assert NM(2, 4).narrow(scores).tolist() == [[True, True, False, False, True, True]]
    support = torch.tensor([[False, True, True, True, False, True]])
    found = NM(2, 4).narrow(scores, support)
    assert found.tolist() == [[False, True, True, False, False, True]]
    outside = torch.tensor([[False, True]])
    assert torch.equal(NM(1, 2).narrow(torch.full((1, 2), -torch.inf), outside), outside)
    assert NM(3, 64).narrow(torch.ones(1, 64))[0].nonzero().flatten().tolist() == [0, 1, 2]
    assert NM(1, 2).narrow(torch.tensor([3, 5])[None]).tolist() == [[False, True]]


def test_nm_above_its_density_is_refused():
    scores = {"a": random_scores((8, 16))}
    words = "structure 2:4 allows 64 of 128 weights, 77 are to be kept"
    with pytest.raises(ValueError, match=words):
        select(scores, 0.6, structure="2:4")
    with pytest.raises(ValueError, match=words):
        select(scores, 0.6, "layer", structure="2:4")
    support = Masks({"a": random_scores((8, 16), 5) < 0.3})
    with pytest.raises(ValueError, match="weights inside the support, 64 are to be kept"):
        select(scores, 0.5, structure="2:4", support=support)


def test_tails_keep_up_to_n():
    scores = {"a": random_scores((3, 7))}
    assert select(scores, 12 / 21, structure="2:4").counts() == {"a": 12}
    with pytest.raises(ValueError, match="allows 12 of 21"):
        select(scores, 13 / 21, structure="2:4")


def weights_of(model):
    weights = sparse.Masks.dense(model).weights(model)
    return {name: weight.detach().abs() for name, weight in weights.items()}


@pytest.mark.parametrize("scope", ["global", "layer", *DENSITIES])
@pytest.mark.parametrize("text", ["2:4", "1:4", "2x4", "1x9", "channel"])
def test_every_scope_inside_a_support(scope, text):
    scores = weights_of(ConvNet())
    support = sparse.random(ConvNet(), 0.8, "uniform", seed=1)
    for density in (0.25, 0.1):
        for inside in (None, support):
            if text == "1:4" and inside is not None and density == 0.25:
                continue  # some groups of the support are empty
            masks = select(scores, density, scope, structure=text, support=inside)
            for name, mask in masks.items():
                assert oracle.follows(mask, text, None if inside is None else inside[name])
            assert inside is None or masks <= inside
            wanted = round(density * masks.numel)
            assert masks.nonzeros == wanted if ":" in text else masks.nonzeros <= wanted


@pytest.mark.parametrize("text", ["2x2", "1x9", "3x4", "channel"])
@pytest.mark.parametrize("limited", [False, True])
def test_whole_groups_by_mean_until_one_does_not_fit(text, limited):
    scores = {"a": random_scores((6, 5)), "b": random_scores((4, 2, 3, 3), 1)}
    support = Masks({n: random_scores(s.shape, 7) < 0.6 for n, s in scores.items()})
    inside = support if limited else None
    for keep in (0, 7, 20, 40, 55):
        found = select(scores, 0.5, structure=text, total=keep, support=inside)
        kept = {(n, tuple(i.tolist())) for n, mask in found.items() for i in mask.nonzero()}
        assert kept == oracle.whole_groups(scores, text, keep, inside)


def test_equal_groups_reach_the_largest_number_that_fits():
    scores = {"a": random_scores((8, 8))}
    for density in (0.1, 0.5, 0.77, 1.0):
        kept = select(scores, density, structure="2x4").nonzeros
        assert kept == round(density * 64) // 8 * 8
        assert select(scores, density, structure="channel").nonzeros == kept


def test_layer_scopes_count_by_layer():
    scores = {"a": random_scores((8, 8)), "b": random_scores((8, 4))}
    assert select(scores, 0.4, "layer", structure="channel").counts() == {"a": 24, "b": 12}


def test_a_large_group_is_not_preferred_for_its_size():
    scores = {"a": torch.full((2, 20), 1.0), "b": torch.full((2, 3), 2.0)}
    assert select(scores, 0.25, structure="channel").counts() == {"a": 0, "b": 6}


def test_blocks_nest_as_the_density_falls():
    scores = weights_of(ConvNet())
    levels = [select(scores, d, structure="2x4") for d in (0.8, 0.5, 0.2)]
    assert levels[2] <= levels[1] <= levels[0]


def test_infinite_scores_of_groups_have_an_order():
    scores = torch.tensor([[torch.inf, -torch.inf], [0.0, 0.0], [torch.inf, 1.0]])
    kept = select({"a": scores}, 2 / 3, structure="channel")["a"]
    assert kept.tolist() == [[False] * 2, [True] * 2, [True] * 2]


def test_a_resnet_in_2_to_4():
    net = models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0)
    masks = select(weights_of(net), 0.5, "layer", structure="2:4")
    assert masks.nonzeros == round(0.5 * masks.numel)
    assert satisfies(masks, "2:4")
    assert not satisfies(select(weights_of(net), 0.5, "layer"), "2:4")
