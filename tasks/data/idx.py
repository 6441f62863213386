"""The idx format of MNIST and its kin: two zeros, type, rank, sizes, then the numbers."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadData
from .find import read

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, rank: int) -> Tensor:
    """The uint8 tensor of an idx file, plain or gzipped (told apart by content).

    Args:
        path: the file.
        rank: dimensions that the tensor must have: 1 for labels, 3 for images.

    Raises:
        BadData: the file is unreadable, is no idx file of bytes, or is not of the length that
            its header promises.
    """
    content = read(path)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise BadData(f"{path} is damaged or cut short (gzip: {error}); get it anew") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:3] != bytes((0, 0, UNSIGNED_BYTE)) or content[3] != rank:
        raise BadData(
            f"{path} is no idx file of {rank}-dimensional bytes: it begins with "
            f"{content[:4].hex(' ') or 'nothing'} instead of 00 00 08 0{rank}"
        )
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    promised, held = math.prod(sizes), len(content) - header
    if promised != held:
        raise BadData(
            f"{path} holds {held} bytes where its header promises {promised} "
            f"({' x '.join(map(str, sizes))}): it is damaged or cut short; get it anew"
        )
    if promised == 0:
        raise BadData(f"{path} is empty: its header promises {' x '.join(map(str, sizes))} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sizes)
