"""Handwritten characters: Omniglot, or any zip or folder of alphabet/character/image."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, first_line, require
from .batches import generator
from .dataset import Part
from .find import exists, find, read, unreadable

SIDE = 28
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp"}

#: Omniglot's archives, each a zip or unpacked; the small ones are parts of the background.
STEMS = (
    "images_background",
    "images_evaluation",
    "images_background_small1",
    "images_background_small2",
)

#: (alphabet, character), where the image is, how to read it
Entry = tuple[tuple[str, str], str, Callable[[], bytes]]


def load_characters(
    root: str | Path | None, sizes: Sequence[int] | None, seed: int, download: bool
) -> tuple[list[Part], int]:
    """Three parts with no character in common, (uint8 images, labels) each, and the class count.

    Images are reduced to 28 x 28 by area and inverted, so that ink is 255. Classes are the
    characters, numbered in the order of alphabet and character. A character that several
    archives hold is taken from the first.
    """

    def fetch(datasets: Any, folder: str) -> None:
        for background in (True, False):
            datasets.Omniglot(folder, background=background, download=True)

    sources = find(
        "omniglot",
        root,
        _locate,
        f"omniglot-py/ with {' or '.join(STEMS)} (.zip or unpacked)",
        fetch=fetch if download else None,
        advice=(
            "get images_background.zip and images_evaluation.zip from "
            "https://github.com/brendenlake/omniglot, put them into omniglot-py of a folder and "
            "name that folder by --root or $BILEVEL_DATA; or name by --root any zip or folder of "
            "alphabet/character/image"
        ),
    )
    characters: dict[tuple[str, str], list[Tensor]] = {}
    for source in sources:
        held: dict[tuple[str, str], list[Tensor]] = {}
        with closing(_entries(source)) as entries:
            for key, where, data in entries:
                if key not in characters:
                    held.setdefault(key, []).append(_picture(data, where))
        characters.update(held)
    if not characters:
        raise BadData(
            f"{', '.join(map(str, sources))}: no image at alphabet/character/image "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return _split([characters[key] for key in sorted(characters)], sizes, seed), len(characters)


def _split(characters: list[list[Tensor]], sizes: Sequence[int] | None, seed: int) -> list[Part]:
    n = len(characters)
    sizes = sizes or (n - max(n // 10, 1) - max(n // 5, 1), max(n // 10, 1), max(n // 5, 1))
    if min(sizes) < 1 or sum(sizes) > n:
        raise ValueError(
            f"cannot take parts of {', '.join(map(str, sizes))} from {n} characters: "
            f"every part needs one at least, and together they are at most {n}"
        )
    order = torch.randperm(n, generator=generator(seed))[: sum(sizes)]
    parts = []
    for chosen in order.split(list(sizes)):
        labels = chosen.sort().values.tolist()
        images = torch.stack([image for label in labels for image in characters[label]])
        counts = torch.tensor([len(characters[label]) for label in labels])
        parts.append((images, torch.tensor(labels).repeat_interleave(counts)))
    return parts


def _locate(place: Path, named: bool) -> list[Path] | None:
    if named and place.is_file():
        return [place]
    sources = []
    for stem in STEMS:
        options = (place / "omniglot-py" / f"{stem}.zip", place / "omniglot-py" / stem)
        sources += [path for path in options if exists(path)][:1]
    if sources:
        return sources
    if named:  # a folder that holds the alphabets themselves
        with closing(_entries(place)) as entries:
            return [place] if next(entries, None) else None
    return None


def _entries(source: Path) -> Generator[Entry, None, None]:
    if source.is_dir():
        for path in _listing(source, 3):
            if _is_image(path):
                key = (path.parts[-3], path.parts[-2])
                yield key, str(path), partial(read, path)
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in sorted(archive.namelist()):
                inside = PurePosixPath(name)
                if len(inside.parts) >= 3 and _is_image(inside):
                    key = (inside.parts[-3], inside.parts[-2])
                    yield key, f"{name} in {source}", partial(archive.read, name)
    except OSError as error:
        raise unreadable(source, error) from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise BadData(f"{source} is damaged or no zip archive ({error}); get it anew") from error


def _listing(folder: Path, depth: int) -> Generator[Path, None, None]:
    """The files ``depth`` levels down, in order."""
    try:
        items = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    for item in items:
        if depth > 1 and item.is_dir():
            yield from _listing(item, depth - 1)
        elif depth == 1:
            yield item


def _is_image(path: Path | PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts[-3:])
    return path.suffix.lower() in SUFFIXES and not hidden


def _picture(data: Callable[[], bytes], where: str) -> Tensor:
    pillow = require("PIL.Image", "reading images of characters")
    try:
        with pillow.open(io.BytesIO(data())) as image:
            small = image.convert("L").resize((SIDE, SIDE), pillow.Resampling.BOX)
    except BadData:
        raise
    except Exception as error:  # damaged files make zipfile and Pillow raise many kinds
        raise BadData(f"{where} is no readable image ({first_line(error)})") from error
    return 255 - torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIDE, SIDE)
