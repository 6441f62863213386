"""``load``: images of digits, clothes and characters by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, require
from .dataset import Dataset, Part, assemble, stratified
from .find import exists, find
from .idx import read_idx
from .omniglot import load_characters

#: What ``load`` knows; "digits" ships inside scikit-learn.
NAMES = ("digits", "mnist", "fashion-mnist", "omniglot")

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load(
    name: str,
    root: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    download: bool = True,
) -> Dataset:
    """A data set of images, whole on the device, split into training, validation and test.

    ==============  ======  ========  ==========================================================
    name            images  shape     split
    ==============  ======  ========  ==========================================================
    digits           1,797  1, 8, 8   1,079 / 359 / 359, stratified
    mnist           70,000  1, 28, 28 50,000 / 10,000 / 10,000: a stratified sixth of the 60,000
                                      training images validates; the test set is its own
    fashion-mnist   70,000  1, 28, 28 as mnist
    omniglot        32,460  1, 28, 28 by character: about 70 / 10 / 20 % of the 1,623, so that
                                      the parts have no class in common; see ``episodes``
    ==============  ======  ========  ==========================================================

    All but digits are looked for in ``root``, in $BILEVEL_DATA and among earlier downloads, then
    downloaded by torchvision, if that is installed, into the user's cache folder. The first two
    have torchvision's layout, e.g. ``MNIST/raw/train-images-idx3-ubyte``, gzipped or not;
    ``root`` may also be a zip or a folder of alphabet/character/image for omniglot.

    Args:
        name: one of the table.
        root: folder to look in first.
        device, dtype: of the images; dtype is floating. Pixels lie in [0, 1]: 0 is the background,
            1 full ink. Labels are int64.
        sizes: other numbers of training, validation and test images (for omniglot: of
            characters), drawn stratified; those of mnist respect its own test set.
        seed: of the split alone; the parts of one seed are always the same.
        download: whether to download what is missing.

    Raises:
        MissingData: a FileNotFoundError; in none of the places, with the way to get it.
        BadData: a ValueError; a file is unreadable or damaged.
        MissingPackage: an optional package is needed and missing.

    Example:
        >>> load("digits")
        Dataset(digits: 1079/359/359 images of shape (1, 8, 8), 10 classes, torch.float32 on cpu)
    """
    if name not in NAMES:
        raise ValueError(_unknown(name))
    if sizes is not None and len(sizes) != 3:
        raise ValueError(
            f"sizes are three: of training, validation and test images, not {list(sizes)}"
        )
    classes, brightest = 10, 255
    if name == "digits":
        parts, brightest = _digits(sizes, seed), 16
    elif name == "omniglot":
        parts, classes = load_characters(root, sizes, seed, download)
    else:
        parts = _mnist(name, root, sizes, seed, download)
    return assemble(name, parts, classes, brightest, device=device, dtype=dtype)


def _unknown(name: str) -> str:
    if name == "tiny-shakespeare":
        return "tiny-shakespeare is a text: use load_text"
    near = difflib.get_close_matches(str(name), NAMES, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no data set {name!r}: choose one of {', '.join(NAMES)}{hint}"


def _digits(sizes: Sequence[int] | None, seed: int) -> list[Part]:
    bunch = require("sklearn.datasets", "the data set digits").load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8)  # whole numbers, 0 to 16
    labels = torch.from_numpy(bunch.target).long()
    fifth = len(labels) // 5
    indices = stratified(labels, sizes or (len(labels) - 2 * fifth, fifth, fifth), seed)
    return [(images[index], labels[index]) for index in indices]


def _mnist(
    name: str, root: str | Path | None, sizes: Sequence[int] | None, seed: int, download: bool
) -> list[Part]:
    kin = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]

    def locate(place: Path, _: bool) -> list[Path] | None:
        paths = []
        for file in IDX_FILES:
            plain = place / kin / "raw" / file
            present = [path for path in (plain, plain.with_name(f"{file}.gz")) if exists(path)]
            if not present:
                return None
            paths.append(present[0])
        return paths

    def fetch(datasets: Any, folder: str) -> None:
        getattr(datasets, kin)(folder, download=True)

    paths = find(
        name,
        root,
        locate,
        f"{kin}/raw/ with {', '.join(IDX_FILES)} (or each .gz)",
        fetch=fetch if download else None,
        advice=(
            f"install torchvision (pip install 'bilevel[download]') where there is a network, or "
            f"put the four files into {kin}/raw of a folder and name that folder by --root or "
            f"$BILEVEL_DATA"
        ),
    )
    train = _pair(paths[0], paths[1])
    test = _pair(paths[2], paths[3])
    n = len(train[1])
    sizes = sizes or (n - n // 6, n // 6, len(test[1]))
    fit = stratified(train[1], sizes[:2], seed)
    parts = [(train[0][index], train[1][index]) for index in fit]
    (index,) = stratified(test[1], sizes[2:], seed)
    return [*parts, (test[0][index], test[1][index])]


def _pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1).long()
    if len(images) != len(labels):
        raise BadData(
            f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels: "
            f"they do not belong together"
        )
    if int(labels.max()) > 9:
        raise BadData(f"{labels_path} holds the label {int(labels.max())}: labels are 0 to 9")
    return images, labels
