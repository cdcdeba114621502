"""Images in class folders, as Tiny-ImageNet and ImageNet lie on the disk, or the same in a zip."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from featherweight.common import unknown
from featherweight.lab.data.base import DATA, DataError, Parts, Split, existing
from featherweight.lab.data.images import decode_images

IMAGE = re.compile(
    r"(train|val|test)/([^/]+)/(?:images/)?([^/]+\.(?:jpe?g|png|webp|bmp))", re.IGNORECASE
)
ANNOTATIONS = "val/val_annotations.txt"


class Source(NamedTuple):
    """A folder or an archive: its files by relative name, and how one is read."""

    where: str
    names: list[str]
    read: Callable[[str], bytes]


class Picture(NamedTuple):
    """One image file: its part (train, val, test), the name of its class, its name."""

    part: str
    label: str
    name: str


@DATA.register(
    "image-folder",
    "your own images: train/CLASS/*.JPEG and val/CLASS/*.JPEG, or images.zip with them inside",
    needs=["path"],
)
def load_image_folder(path: str) -> Parts:
    """Read 8-bit images of one size; grey ones become RGB.

    The test part is ``val/``, or ``test/`` where there is no ``val/``. Classes are numbered in the
    order of their sorted folder names. Tiny-ImageNet's own layout (``train/CLASS/images/``,
    ``val/images/`` with ``val_annotations.txt``) is understood too.

    Args:
        path: the folder that holds ``train/`` or ``images.zip``, or a zip file.

    Raises:
        DataError: a part is missing, a file cannot be decoded or has another size, or a class
            appears in the test part alone.
    """
    wanted = "train/CLASS/*.JPEG or images.zip"
    with _open(existing(path, "image-folder", wanted)) as source:
        pictures = _pictures(source)
        classes = sorted({picture.label for picture in pictures if picture.part == "train"})
        tests = next((part for part in ("val", "test") if _of(pictures, part)), "val")
        for part in ("train", tests):
            if not _of(pictures, part):
                raise DataError(f"{source.where}: no image in {part}/CLASS/; wanted {wanted}")
        train, test = (_decode(source, _of(pictures, part), classes) for part in ("train", tests))
    return Parts(train, test, len(classes))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Source]:
    if path.is_dir() and (path / "images.zip").is_file() and not (path / "train").is_dir():
        path = path / "images.zip"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        names = [file.relative_to(path).as_posix() for file in files]
        yield Source(str(path), names, lambda name: (path / name).read_bytes())
        return
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no zip file, or a damaged one: {error}") from error
    with archive:
        yield Source(str(path), sorted(archive.namelist()), _reader(archive))


def _reader(archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{archive.filename}: {name} is damaged: {error}") from error

    return read


def _pictures(source: Source) -> list[Picture]:
    """List the image files, below the one top folder that archives often have."""
    inside = next((name for name in source.names if re.match(r"(?:[^/]+/)?train/", name)), "")
    top = inside.partition("train/")[0]
    matches = [(IMAGE.fullmatch(name.removeprefix(top)), name) for name in source.names]
    pictures = [Picture(match[1].lower(), match[2], name) for match, name in matches if match]
    if top + ANNOTATIONS not in source.names:
        return pictures
    rows = source.read(top + ANNOTATIONS).decode().splitlines()
    labels = dict(row.split("\t")[:2] for row in rows)
    return [
        picture._replace(label=labels.get(Path(picture.name).name, ""))
        if picture.part == "val"
        else picture
        for picture in pictures
    ]


def _of(pictures: list[Picture], part: str) -> list[Picture]:
    return [picture for picture in pictures if picture.part == part]


def _decode(source: Source, pictures: list[Picture], classes: list[str]) -> Split:
    numbers = {label: number for number, label in enumerate(classes)}
    for picture in pictures:
        if picture.label not in numbers:
            reason = unknown("class", picture.label, classes[:10])
            raise DataError(f"{source.where}: {picture.name} has {reason}")
    names = [picture.name for picture in pictures]
    images, _ = decode_images(names, lambda position: source.read(names[position]))
    return Split(images, torch.tensor([numbers[picture.label] for picture in pictures]))
