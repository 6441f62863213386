"""``load_text``: a text as tokens, one per character."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadData, MissingData
from .find import exists, find, read

SHAKESPEARE = "tiny-shakespeare"
FILES = ("tiny_shakespeare.txt", "tiny-shakespeare.txt", "tinyshakespeare.txt", "input.txt")
ADDRESS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


@dataclass(frozen=True, eq=False, repr=False)
class Text:
    """Character tokens for training and validation.

    Attributes:
        name: of the data set, or of the file.
        train, validation: int64 tokens on the CPU, shape (n,); validation is the end of the text.
        vocabulary: the characters in order; token i is ``vocabulary[i]``.
    """

    name: str
    train: Tensor
    validation: Tensor
    vocabulary: str

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    def __repr__(self) -> str:
        return (
            f"Text({self.name}: {len(self.train)}/{len(self.validation)} tokens, "
            f"{len(self.vocabulary)} characters)"
        )


def load_text(
    source: str | Path = SHAKESPEARE,
    root: str | Path | None = None,
    *,
    validation: float = 0.1,
) -> Text:
    """The characters of a text file (UTF-8) as tokens.

    Args:
        source: a file; or "tiny-shakespeare", looked for as ``tiny_shakespeare.txt`` in ``root``,
            in $BILEVEL_DATA and among the downloads.
        root: folder to look in first.
        validation: share of the text, at its end, that is kept for validation.

    Raises:
        MissingData: there is no such file, or tiny-shakespeare is in none of the places.
        BadData: the file is unreadable, no UTF-8 text, or too short to be split.
    """
    if not 0 < validation < 1:
        raise ValueError(f"validation is a share of the text between 0 and 1, not {validation}")
    path = _shakespeare(root) if str(source) == SHAKESPEARE else Path(source).expanduser()
    if not exists(path):
        raise MissingData(
            f"there is no text file {path}: name one that there is by --text, or leave it out for "
            f"{SHAKESPEARE}"
        )
    content = read(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from error
    held_out = round(validation * len(text))
    if held_out < 1 or held_out >= len(text):
        raise BadData(f"{path} has {len(text)} characters: too few to be split")
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    distinct, tokens = points.unique(return_inverse=True)
    vocabulary = "".join(map(chr, distinct.tolist()))
    name = SHAKESPEARE if str(source) == SHAKESPEARE else path.name
    return Text(name, tokens[:-held_out], tokens[-held_out:], vocabulary)


def _shakespeare(root: str | Path | None) -> Path:
    def locate(place: Path, named: bool) -> Path | None:
        if named and place.is_file():
            return place
        return next((place / file for file in FILES if exists(place / file)), None)

    return find(
        SHAKESPEARE,
        root,
        locate,
        FILES[0],
        advice=f"save {ADDRESS} under that name in a folder and name the folder by --root or "
        f"$BILEVEL_DATA; or give any text file by --text",
    )
