"""A data set of images in three disjoint parts, and the split that makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import generator

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels for training, validation and test.

    Attributes:
        name: as given to :func:`tasks.data.load`.
        train, validation, test: (images, labels) each; images are floating, of shape
            (n, \\*shape), labels int64 of shape (n,), all on one device.
        classes: number of classes; labels lie in 0 ... classes - 1.
        shape: of one image, (channels, height, width).
    """

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int
    shape: tuple[int, int, int]

    def __repr__(self) -> str:
        sizes = "/".join(str(len(part[1])) for part in (self.train, self.validation, self.test))
        images = self.train[0]
        return (
            f"Dataset({self.name}: {sizes} images of shape {self.shape}, {self.classes} classes, "
            f"{images.dtype} on {images.device})"
        )


def assemble(
    name: str,
    parts: Sequence[Part],
    classes: int,
    brightest: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Dataset:
    """A :class:`Dataset` of uint8 pictures (n, height, width), with ``brightest`` scaled to 1.

    Pixels travel to the device as bytes and become floating there.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"images cannot be {dtype}: choose a floating dtype, e.g. torch.float32")

    def finish(images: Tensor, labels: Tensor) -> Part:
        floating = images.to(device)[:, None].to(dtype).div_(brightest)
        return floating, labels.to(device, torch.int64)

    train, validation, test = (finish(*part) for part in parts)
    height, width = train[0].shape[-2:]
    shape = (1, int(height), int(width))
    return Dataset(name, train, validation, test, classes, shape)


def stratified(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Disjoint random index sets of the given sizes, each with its share of every class.

    The shuffled samples of each class are spread evenly over [0, 1] and all are sorted by this
    place: any stretch of the result then holds the classes in the proportions of ``labels``, to
    within two samples.

    Args:
        labels: int64, shape (n,).
        sizes: number of indices in each set; their sum is at most n.
        seed: of the shuffle.

    Example:
        >>> a, b = stratified(torch.tensor([0, 0, 0, 0, 1, 1]), (3, 3), seed=0)
        >>> sorted((a.tolist() + b.tolist()))
        [0, 1, 2, 3, 4, 5]
    """
    n = len(labels)
    if min(sizes) < 1 or sum(sizes) > n:
        raise ValueError(
            f"cannot take parts of {', '.join(map(str, sizes))} from {n} samples: "
            f"every part needs one at least, and together they are at most {n}"
        )
    shuffle = generator(seed)
    order = torch.randperm(n, generator=shuffle)
    order = order[labels[order].argsort(stable=True)]  # grouped by class, shuffled within
    counts = torch.bincount(labels)
    of_class = counts.repeat_interleave(counts)
    rank = torch.arange(n) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = (rank.double() + 0.5) / of_class
    order = order[place.argsort(stable=True)]
    parts = order[: sum(sizes)].split(list(sizes))
    return [part[torch.randperm(len(part), generator=shuffle)] for part in parts]
