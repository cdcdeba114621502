"""Batches against slow oracles: augmentation image by image, ranks against one process."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from featherweight.lab.data import Batches, Split
from featherweight.lab.data.augment import crop_flip
from featherweight.lab.data.seeding import derive_seed

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def some_split(count: int = 23, height: int = 6, width: int = 5) -> Split:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator
    )
    return Split(images, torch.arange(count))


def some_batches(split: Split, **changes) -> Batches:
    options = {"batch_size": 8, "seed": 3, "augment": "crop-flip", "shuffle": True, **changes}
    return Batches(split, MEAN, STD, **options)


def slowly_augmented(image: Tensor, offset: list[int], flip: bool) -> Tensor:
    """Crop and flip one image pixel by pixel, as the definition says."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            old_row = row + offset[0] - 4
            old_column = (width - 1 - column if flip else column) + offset[1] - 4
            if 0 <= old_row < height and 0 <= old_column < width:
                out[:, row, column] = image[:, old_row, old_column]
    return out


def test_crop_and_flip_equal_the_slow_loop_for_every_offset():
    offset = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flip = torch.arange(162) >= 81
    images = torch.randint(1, 256, (162, 3, 6, 5), dtype=torch.uint8)
    expected = [
        slowly_augmented(*row) for row in zip(images, offset.tolist(), flip.tolist(), strict=True)
    ]
    assert torch.equal(crop_flip(images, offset, flip), torch.stack(expected))


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_epoch_equals_the_slow_pipeline(augment: str):
    split = some_split()
    batches = some_batches(split, augment=augment)
    order, offset, flip = batches.draws(0, 5)
    served = list(batches.epoch(0, 5))
    position = 0
    for images, labels, whole in served:
        for image, label in zip(images, labels, strict=True):
            start = offset[position].tolist() if augment == "crop-flip" else [4, 4]
            mirrored = bool(flip[position]) and augment != "none"
            pixels = slowly_augmented(split.images[order[position]], start, mirrored)
            expected = (pixels / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
            assert torch.allclose(image, expected, atol=1e-6)
            assert label == order[position]
            position += 1
        assert whole == len(images)
    assert position == 23
    assert [len(images) for images, _, _ in served] == [8, 8, 7]
    assert len(batches) == 3


def test_draws_are_fair():
    split = Split(torch.zeros(20000, 1, 1, 1, dtype=torch.uint8), torch.zeros(20000).long())
    order, offset, flip = some_batches(split).draws("level", 0)
    assert torch.equal(order.sort().values, torch.arange(20000))
    assert abs(flip.double().mean().item() - 0.5) < 5 * 0.5 / 20000**0.5
    counts = torch.bincount(offset[:, 0] * 9 + offset[:, 1], minlength=81).double()
    assert len(counts) == 81
    chi_squared = ((counts - 20000 / 81) ** 2 / (20000 / 81)).sum().item()
    assert chi_squared < 80 + 5 * 160**0.5  # mean 80, variance 160


def test_black_padding_is_normalised_like_any_black_pixel():
    split = Split(torch.full((64, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(64).long())
    images = next(some_batches(split, batch_size=64).epoch(0, 0))[0]
    values = images[:, 0].unique()
    assert torch.allclose(values, torch.tensor([(0 - 0.5) / 0.2, (1 - 0.5) / 0.2]))


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_union_over_ranks_is_the_batch_of_one_process(world: int, drop_last: bool):
    split = some_split()
    alone = list(some_batches(split, drop_last=drop_last).epoch(1, 2))
    ranks = [
        list(some_batches(split, rank=rank, world=world, drop_last=drop_last).epoch(1, 2))
        for rank in range(world)
    ]
    assert {len(rank) for rank in ranks} == {len(alone)} == {2 if drop_last else 3}
    for number, (images, labels, whole) in enumerate(alone):
        for rank in range(world):
            part, part_labels, part_whole = ranks[rank][number]
            assert torch.equal(part, images[rank::world])
            assert torch.equal(part_labels, labels[rank::world])
            assert part_whole == whole == len(images)


def test_same_seed_stage_and_epoch_give_the_same_batches_in_any_order():
    split = some_split()
    batches = some_batches(split)
    later = [images for images, _, _ in batches.epoch("b", 7)]
    list(batches.epoch("a", 0))
    torch.rand(5)
    again = [images for images, _, _ in some_batches(split).epoch("b", 7)]
    assert all(torch.equal(*pair) for pair in zip(later, again, strict=True))


@pytest.mark.parametrize("change", [{"seed": 4}, {"stage": 1}, {"epoch": 1}])
def test_another_seed_stage_or_epoch_gives_other_batches(change: dict):
    def drawn(seed: int = 3, stage: int = 0, epoch: int = 0):
        return some_batches(some_split(), seed=seed).draws(stage, epoch)

    assert not any(torch.equal(*pair) for pair in zip(drawn(), drawn(**change), strict=True))


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(some_batches(some_split()).epoch(0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_derived_seeds_are_the_same_in_another_process():
    code = (
        "from featherweight.lab.data.seeding import derive_seed; print(derive_seed(1, 'level', 2))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(printed.stdout) == derive_seed(1, "level", 2)
    assert derive_seed(1, 12) != derive_seed(11, 2) != derive_seed("1", "12")


def test_unshuffled_float_images_come_in_order_and_in_the_dtype_asked_for():
    split = Split(torch.rand(5, 3, 2, 2), torch.arange(5))
    options = {"shuffle": False, "augment": "none", "dtype": torch.bfloat16, "batch_size": 5}
    images, labels, _ = next(some_batches(split, **options).epoch(0, 0))
    expected = (split.images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    assert images.dtype == torch.bfloat16
    assert torch.allclose(images.float(), expected, atol=0.02)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_empty_split_has_no_batches():
    split = Split(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0).long())
    batches = some_batches(split)
    assert len(batches) == 0
    assert list(batches.epoch(0, 0)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": "crop"}, "'crop': did you mean 'crop-flip'"),
        ({"batch_size": 0}, "batch_size must be at least world=1, got 0"),
        ({"batch_size": 2, "world": 3}, "batch_size must be at least world=3, got 2"),
        ({"rank": 2, "world": 2}, "rank=2 of world=2"),
        ({"rank": -1}, "rank=-1"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        some_batches(some_split(), **change)
