"""Class folders in their layouts, plain and zipped."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from featherweight.lab.data import DataError, load

COLOURS = {"cat": (200, 30, 10), "dog": (0, 0, 255)}


def picture(colour: tuple[int, ...] | int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file, "png")
    return file.getvalue()


def simple_files() -> dict[str, bytes]:
    return {
        f"{part}/{label}/{number}.png": picture(colour)
        for part in ("train", "val")
        for label, colour in COLOURS.items()
        for number in range(2)
    }


def original_files() -> dict[str, bytes]:
    """Tiny-ImageNet's own layout, with the test images that have no labels."""
    files = {
        f"train/{label}/images/{label}_{number}.PNG": picture(colour)
        for label, colour in COLOURS.items()
        for number in range(2)
    }
    order = ["dog", "cat", "cat", "dog"]
    rows = [f"val_{number}.png\t{label}\t0\t0\t5\t5" for number, label in enumerate(order)]
    files["val/val_annotations.txt"] = "\n".join(rows).encode()
    for number, label in enumerate(order):
        files[f"val/images/val_{number}.png"] = picture(COLOURS[label])
    files["test/images/test_0.png"] = picture(7)
    files["words.txt"] = b"x"
    return files


def write_tree(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(folder: Path, files: Mapping[str, bytes], top: str = "") -> Path:
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return folder


@pytest.mark.parametrize("files", [simple_files, original_files])
@pytest.mark.parametrize("form", ["tree", "zip", "nested zip", "zip itself"])
def test_every_image_has_the_colour_of_its_class(files, form: str, tmp_path):
    if form == "tree":
        path = write_tree(tmp_path, files())
    else:
        path = write_zip(tmp_path, files(), "tiny/" if form == "nested zip" else "")
        path = path / "images.zip" if form == "zip itself" else path
    data = load("image-folder", path, validation=0.0)
    assert data.classes == 2
    assert data.shape == (3, 4, 6)
    for split in (data.train, data.test):
        assert torch.bincount(split.labels).tolist() == [2, 2]
        for image, label in zip(split.images, split.labels, strict=True):
            colour = COLOURS[sorted(COLOURS)[label]]
            assert torch.equal(
                image, torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1) + 0 * image
            )


def test_test_folder_is_used_where_there_is_no_val(tmp_path):
    files = {name.replace("val/", "test/"): content for name, content in simple_files().items()}
    assert len(load("image-folder", write_tree(tmp_path, files), validation=0.0).test) == 4


def test_grey_images_become_rgb(tmp_path):
    files = simple_files() | {"train/cat/grey.png": picture(99)}
    train = load("image-folder", write_tree(tmp_path, files), validation=0.0).train
    assert (train.images == 99).all((1, 2, 3)).sum() == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/cat/big.png": picture(0, (7, 4))}, r"train/cat/big.png is 7x4 but .* is 6x4"),
        ({"train/cat/bad.png": b"no image"}, r"train/cat/bad.png is no image"),
        ({"train/cat/cut.png": picture(0)[:45]}, r"train/cat/cut.png is no image"),
        (
            {"val/dgo/0.png": picture(0)},
            r"val/dgo/0.png has unknown class 'dgo': did you mean 'dog'",
        ),
    ],
)
@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_a_bad_file_is_named(write, files: dict[str, bytes], message: str, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        load("image-folder", write(tmp_path, simple_files() | files))
    assert "\n" not in str(caught.value)


def test_images_of_more_than_eight_bits_are_refused(tmp_path):
    deep = io.BytesIO()
    Image.new("I;16", (6, 4)).save(deep, "png")
    files = simple_files() | {"train/cat/deep.png": deep.getvalue()}
    with pytest.raises(DataError, match=r"deep\.png has mode 'I;16'"):
        load("image-folder", write_tree(tmp_path, files))


def test_parts_must_not_be_empty(tmp_path):
    files = {name: content for name, content in simple_files().items() if "train" in name}
    with pytest.raises(DataError, match="no image in val/"):
        load("image-folder", write_tree(tmp_path, files))


def test_a_truncated_zip_is_refused(tmp_path):
    path = write_zip(tmp_path, simple_files()) / "images.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"images\.zip is no zip file"):
        load("image-folder", path)
