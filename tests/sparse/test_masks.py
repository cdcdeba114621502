"""Masks as data: which weights by default, algebra, comparison, files, errors."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from featherweight import sparse
from featherweight.common import prunable_weights
from featherweight.sparse import Masks
from featherweight.sparse.masks import pack_bits, unpack_bits
from tests.models import ConvNet, mlp


def test_default_choice():
    names = list(Masks.dense(ConvNet()))
    assert names == ["stem.weight", "depthwise.weight", "grouped.weight", "head.weight"]


def test_a_weight_tied_to_an_embedding_is_left_out():
    model = nn.ModuleDict(
        {"words": nn.Embedding(7, 5), "head": nn.Linear(5, 7), "x": nn.Linear(2, 2)}
    )
    model["head"].weight = model["words"].weight
    assert list(Masks.dense(model)) == ["x.weight"]


def test_include_and_exclude():
    model = ConvNet()
    assert list(Masks.dense(model, exclude=["head*", "stem.*"])) == [
        "depthwise.weight",
        "grouped.weight",
    ]
    assert list(Masks.dense(model, include=["words.weight"])) == ["words.weight"]
    with pytest.raises(ValueError, match=r"pattern 'haed\*' fits no parameter"):
        Masks.dense(model, exclude=["haed*"])


def test_names_do_not_depend_on_wrappers():
    model = mlp()
    names = list(Masks.dense(model))
    assert list(Masks.dense(torch.compile(model))) == names
    assert list(Masks.dense(nn.DataParallel(model))) == names


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.Embedding(3, 3)])
def test_a_model_without_weights_is_refused(model):
    with pytest.raises(ValueError, match="has no prunable weight"):
        Masks.dense(model)


def test_weights_that_cannot_be_masked_are_named():
    model = mlp()
    parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"0\.weight is parametrised"):
        prunable_weights(model)
    with pytest.raises(ValueError, match=r"weight is not materialised"):
        prunable_weights(nn.LazyLinear(3))


def test_algebra():
    a = Masks({"w": torch.tensor([True, True, False, False])})
    b = Masks({"w": torch.tensor([True, False, True, False])})
    assert (a & b)["w"].tolist() == [True, False, False, False]
    assert (a | b)["w"].tolist() == [True, True, True, False]
    assert (a - b)["w"].tolist() == [False, True, False, False]
    assert (a ^ b)["w"].tolist() == [False, True, True, False]
    assert (~a)["w"].tolist() == [False, False, True, True]
    assert (a & b) <= a <= (a | b)
    assert not a <= b
    assert (a | b) >= b
    assert a == Masks(dict(a))
    assert a != b


def test_counting():
    masks = Masks({"a": torch.eye(4).bool(), "b": torch.zeros(2, 3).bool()})
    assert (masks.numel, masks.nonzeros, masks.density) == (22, 4, 4 / 22)
    assert masks.counts() == {"a": 4, "b": 0}
    assert masks.densities() == {"a": 0.25, "b": 0.0}
    rows = str(masks).splitlines()
    assert rows[1].split() == ["a", "4x4", "4", "16", "0.25"]
    assert rows[-1].split() == ["total", "4", "22", "0.1818"]
    assert repr(masks) == "Masks(2 tensors, 4 of 22 kept, density 0.1818)"


def test_overlap():
    a = Masks({"w": torch.tensor([True, True, False, False]), "v": torch.zeros(2).bool()})
    b = Masks({"w": torch.tensor([True, False, True, False]), "v": torch.zeros(2).bool()})
    overlap = a.overlap(b)
    assert overlap.jaccard == 1 / 3
    assert overlap.by_layer() == {"w": 1 / 3, "v": 1.0}
    assert str(overlap).splitlines()[0].split() == ["w", "1", "of", "3", "0.3333"]


def test_sign_flips_count_kept_entries_only():
    masks = Masks({"w": torch.tensor([True, True, True, False])})
    before = {"w": torch.tensor([1.0, -1.0, 2.0, 1.0]), "other": torch.ones(1)}
    after = {"w": torch.tensor([3.0, 1.0, -1.0, -1.0]), "other": torch.ones(1)}
    flips = masks.sign_flips(before, after)
    assert (flips.flipped, flips.kept, flips.fraction) == ({"w": 2}, {"w": 3}, 2 / 3)
    assert masks.sign_flips(before, before).fraction == 0
    negated = {n: -t for n, t in before.items()}
    assert masks.sign_flips(before, negated).fraction == 1


def test_apply_zeroes_exactly_and_nothing_else():
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    masks = sparse.random(model, 0.3, seed=0)
    masks.apply_(model)
    for name, tensor in model.state_dict().items():
        mask = masks.get(name if name != "twin.weight" else "head.weight")
        expected = before[name] if mask is None else torch.where(mask, before[name], 0.0)
        assert torch.equal(tensor, expected)
    assert Masks.nonzero(model) == masks


def test_density_one_changes_no_bit():
    model, inputs = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    before = model(inputs)
    for rule in ("erk", "balanced", "global", "pyramidal"):
        sparse.random(model, 1.0, rule, seed=0).apply_(model)
    sparse.magnitude(model, 1.0).apply_(model)
    assert torch.equal(model(inputs), before)


def test_masks_of_another_model_are_refused_untouched():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"'0.weight' has shape \[8, 16\] in the masks and \[24, 16\]"
    ):
        Masks.dense(mlp(8)).apply_(model)
    with pytest.raises(ValueError, match=r"'stem.weight' is only in the masks"):
        Masks.dense(ConvNet()).apply_(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("tensors", "error"),
    [({}, ValueError), ({"w": torch.ones(2)}, TypeError), ({"w": [True]}, TypeError)],
)
def test_bad_tensors(tensors, error):
    with pytest.raises(error, match=r"masks need|must be a bool tensor"):
        Masks(tensors)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_round_trip(values):
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack_bits(mask)
    assert len(packed) == -(-len(values) // 8)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)
    assert packed.numpy().tobytes() == _reference_bits(values)


def _reference_bits(values):
    padded = values + [False] * (-len(values) % 8)
    groups = [padded[i : i + 8] for i in range(0, len(padded), 8)]
    return bytes(int("".join("01"[bit] for bit in group), 2) for group in groups)


def test_files_round_trip(tmp_path):
    model = ConvNet()
    masks = sparse.random(model, 0.2, seed=0)
    path = tmp_path / "new" / "masks.safetensors"
    masks.save(path)
    assert Masks.load(path, model) == masks
    assert path.stat().st_size < masks.numel / 8 + 1200
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_files_of_another_model(tmp_path):
    path = tmp_path / "masks.safetensors"
    Masks.dense(mlp()).save(path)
    with pytest.raises(ValueError, match=r"'0.weight' is only in the masks"):
        Masks.load(path, ConvNet())
    with pytest.raises(ValueError, match=r"'0.weight' has shape \[24, 16\] in the masks"):
        Masks.load(path, mlp(8))


def test_damaged_files(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(FileNotFoundError, match="no mask file"):
        Masks.load(path)
    Masks.dense(mlp()).save(path)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or no safetensors"):
            Masks.load(path)
    save_file({"w": torch.ones(2)}, path, {"featherweight": "["})
    with pytest.raises(ValueError, match="damaged"):
        Masks.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is no mask file"):
        Masks.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2, "shapes": {"w": [9]}}, "format version 2, this reads 1"),
        ({"version": 1, "shapes": {"w": [90]}}, "do not hold a mask"),
        ({"version": 1, "shapes": {"v": [9]}}, "names and shapes disagree"),
        ({"version": 1, "shapes": 3}, "damaged"),
        ({"version": 1}, "damaged"),
        ({"version": 1, "shapes": {"w": [9]}}, "padding bits"),
    ],
)
def test_files_that_lie(tmp_path, header, message):
    path = tmp_path / "masks.safetensors"
    bits = torch.tensor([255, 255], dtype=torch.uint8)
    header = json.dumps({"format": "featherweight-masks", **header})
    save_file({"w": bits}, path, {"featherweight": header})
    with pytest.raises(ValueError, match=message):
        Masks.load(path)


def test_equal_masks_make_equal_files(tmp_path):
    masks = sparse.random(ConvNet(), 0.2, seed=0)
    for name in "ab":
        masks.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
