"""Tables for binary classification: features and labels -1 or 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, first_line, require
from .batches import generator
from .dataset import Part, stratified
from .find import exists, find

TABLES = ("breast-cancer", "ijcnn1-like", "ijcnn1")
IJCNN1_FEATURES = 22


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Rows for training, validation and test.

    Attributes:
        train, validation, test: (features, labels) each, float64 of shape (n, p) and (n,); labels
            are -1 or 1.
    """

    name: str
    train: Part
    validation: Part
    test: Part

    def __repr__(self) -> str:
        sizes = "/".join(str(len(part[1])) for part in (self.train, self.validation, self.test))
        return f"Table({self.name}: {sizes} rows of {self.train[0].shape[1]} features)"


def load_table(
    name: str,
    root: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Table:
    """A table by name, split stratified by label.

    =============  ========  =====================================================================
    name           features  rows
    =============  ========  =====================================================================
    breast-cancer  31        569, inside scikit-learn; 343 / 113 / 113; standardised by the
                             training rows, and a column of ones
    ijcnn1-like    22        drawn: normal features scaled from 1 to 10^-1.5, labels by a logistic
                             model in which a third of the features has no part; 20,000 of each
    ijcnn1         22        LIBSVM's files ``ijcnn1`` and ``ijcnn1.t``, each also .bz2, in
                             ``root`` or $BILEVEL_DATA: the first split 70 / 30 %, the second to
                             test
    =============  ========  =====================================================================

    Args:
        sizes: other numbers of training, validation and test rows.
        seed: of the split, and of the rows that are drawn.

    Raises:
        MissingData: a FileNotFoundError; ijcnn1 is in none of the places, with the way to get it.
        BadData: a ValueError; a file of it cannot be read.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}: choose one of {', '.join(TABLES)}")
    if name == "ijcnn1":
        parts = _ijcnn1(root, sizes, seed)
    else:
        make = _breast_cancer if name == "breast-cancer" else _ijcnn1_like
        parts = make(sizes, seed)
    train, validation, test = ((a.to(device), b.to(device)) for a, b in parts)
    return Table(name, train, validation, test)


def _split(rows: Part, sizes: Sequence[int], seed: int) -> list[Part]:
    features, labels = rows
    indices = stratified((labels > 0).long(), sizes, seed)
    return [(features[index], labels[index]) for index in indices]


def _breast_cancer(sizes: Sequence[int] | None, seed: int) -> list[Part]:
    bunch = require("sklearn.datasets", "the table breast-cancer").load_breast_cancer()
    features, labels = torch.from_numpy(bunch.data), 2.0 * torch.from_numpy(bunch.target) - 1
    n = len(labels)
    parts = _split((features, labels.double()), sizes or (n - 2 * (n // 5), n // 5, n // 5), seed)
    spread, centre = torch.std_mean(parts[0][0], dim=0, correction=0)

    def finish(features: Tensor) -> Tensor:
        return torch.cat([(features - centre) / spread, torch.ones_like(features[:, :1])], 1)

    return [(finish(features), labels) for features, labels in parts]


def _ijcnn1_like(sizes: Sequence[int] | None, seed: int) -> list[Part]:
    sizes, p, draw = sizes or (20_000,) * 3, IJCNN1_FEATURES, generator(seed, 0)
    scales = torch.logspace(0, -1.5, p, dtype=torch.float64)
    weights = 2 * torch.randn(p, generator=draw, dtype=torch.float64) / scales.sqrt()
    weights[::3] = 0
    features = scales * torch.randn(sum(sizes), p, generator=draw, dtype=torch.float64)
    chance = torch.rand(sum(sizes), generator=draw, dtype=torch.float64)
    labels = torch.where(chance < torch.sigmoid(features @ weights), 1.0, -1.0).double()
    return _split((features, labels), sizes, seed)


def _ijcnn1(root: str | Path | None, sizes: Sequence[int] | None, seed: int) -> list[Part]:
    def locate(place: Path, _: bool) -> list[Path] | None:
        found = []
        for stem in ("ijcnn1", "ijcnn1.t"):
            options = [place / stem, place / f"{stem}.bz2"]
            found += [path for path in options if exists(path)][:1]
        return found if len(found) == 2 else None

    paths = find(
        "ijcnn1",
        root,
        locate,
        "ijcnn1 and ijcnn1.t (or each .bz2)",
        advice=(
            "get both from https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html "
            "and name their folder by --root or $BILEVEL_DATA; or take --data ijcnn1-like, which "
            "needs no files"
        ),
    )
    rows, test = (_libsvm(path) for path in paths)
    n = len(rows[1])
    sizes = sizes or (n - 3 * n // 10, 3 * n // 10, len(test[1]))
    return [*_split(rows, sizes[:2], seed), *_split(test, sizes[2:], seed)]


def _libsvm(path: Path) -> Part:
    read: Any = require("sklearn.datasets", "reading LIBSVM's files").load_svmlight_file
    try:
        features, labels = read(str(path), n_features=IJCNN1_FEATURES)
    except Exception as error:  # damaged files raise many kinds
        raise BadData(f"{path} is no file of ijcnn1 ({first_line(error)})") from error
    signs = torch.from_numpy(labels).double()
    if not bool((signs.abs() == 1).all()):
        raise BadData(f"{path} holds labels other than -1 and 1")
    return torch.from_numpy(features.toarray()).double(), signs
