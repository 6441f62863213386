"""Texts as files of tokens, 16 bits each, that are mapped and not read: any size will do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadData, MissingData, require
from ..files import write, write_json
from .batches import Blocks
from .find import exists
from .text import Text

LARGEST = 2**16


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens for training and validation, mapped from files.

    Attributes:
        train, validation: shape (n,), int16 on the CPU: the bits of unsigned numbers.
        vocabulary: how many tokens there are; all are below it.
    """

    train: Tensor
    validation: Tensor
    vocabulary: int

    def __repr__(self) -> str:
        return (
            f"{len(self.train)}/{len(self.validation)} tokens for training/validation, "
            f"vocabulary of {self.vocabulary}"
        )


class TokenBlocks(Blocks):
    """:class:`Blocks` of mapped tokens, as int64 on a device."""

    def __init__(
        self, tokens: Tensor, length: int, size: int, seed: int, device: torch.device
    ) -> None:
        super().__init__(tokens, length, size, seed)
        self.device = device

    def _start(self, epoch: int) -> Callable[[int], Any]:
        mapped = super()._start(epoch)
        return lambda position: tuple(unsigned(t).to(self.device) for t in mapped(position))


def unsigned(tokens: Tensor) -> Tensor:
    """Mapped tokens as int64."""
    return tokens.long() & 0xFFFF


def write_tokens(folder: Path, train: Tensor, validation: Tensor, vocabulary: int) -> None:
    """Write ``train.bin`` and ``validation.bin`` (uint16, the machine's order) and ``meta.json``.

    Raises:
        BadData: more than 65,536 different tokens.
    """
    if vocabulary > LARGEST:
        raise BadData(f"a vocabulary of {vocabulary} tokens does not fit in 16 bits: {LARGEST}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train", train), ("validation", validation)):
        write(folder / f"{name}.bin", tokens.to("cpu", torch.int16).numpy().tobytes())
    write_json(folder / "meta.json", {"vocabulary": vocabulary})


def write_text(folder: Path, text: Text) -> None:
    """:func:`write_tokens` of a text's characters."""
    write_tokens(folder, text.train, text.validation, len(text.vocabulary))


def map_tokens(folder: str | Path, vocabulary: int | None = None) -> Tokens:
    """The tokens of a folder: ``train.bin`` and ``validation.bin`` (or ``val.bin``), uint16.

    Args:
        vocabulary: None: that of ``meta.json``, else GPT-2's 50,257.

    Raises:
        MissingData: a file is missing.
        BadData: a file is empty or has half a token; a token is not in the vocabulary (looked for
            in the first million of each file).
    """
    numpy = require("numpy", "mapping token files")
    folder = Path(folder).expanduser()
    parts = []
    for names in (("train.bin",), ("validation.bin", "val.bin")):
        path = next((folder / name for name in names if exists(folder / name)), None)
        if path is None:
            raise MissingData(
                f"there is no {' or '.join(names)} in {folder}: put the tokens there as unsigned "
                f"16-bit numbers one after another, or give a text by --text and let it be done"
            )
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise BadData(f"{path} has {size} bytes: that is no file of 16-bit tokens")
        # copy-on-write: torch wants memory it could write to, and the file stays as it is
        parts.append(torch.from_numpy(numpy.memmap(path, dtype=numpy.int16, mode="c")))
    if vocabulary is None:
        meta = folder / "meta.json"
        vocabulary = json.loads(meta.read_text())["vocabulary"] if exists(meta) else 50257
    largest = max(int(unsigned(part[:1_000_000]).max()) for part in parts)
    if largest >= vocabulary:
        raise BadData(
            f"{folder} has the token {largest}, and the vocabulary has {vocabulary}: give the "
            f"right number by --vocabulary"
        )
    return Tokens(parts[0], parts[1], vocabulary)
