"""Data sets that the tests write themselves."""

import gzip
import struct
from pathlib import Path

import torch

TRAIN, TEST = 120, 30


def idx_bytes(tensor):
    header = struct.pack(">BBBB", 0, 0, 8, tensor.ndim)
    sizes = struct.pack(f">{tensor.ndim}I", *tensor.shape)
    return header + sizes + bytes(tensor.flatten().tolist())


def numbered(n, first):
    """Images of 3 x 4 pixels that carry their own number in the first two, and uneven labels."""
    images = torch.full((n, 3, 4), 255, dtype=torch.uint8)
    number = torch.arange(first, first + n)
    images[:, 0, 0], images[:, 0, 1] = number // 256, number % 256
    return images, torch.tensor([0, 0, 0, 1, 1, 2] * (n // 6), dtype=torch.uint8)


def write_mnist(root, folder="MNIST", packed=True):
    raw = Path(root) / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, n, first in (("train", TRAIN, 0), ("t10k", TEST, TRAIN)):
        images, labels = numbered(n, first)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            name, content = f"{prefix}-{kind}-ubyte", idx_bytes(values)
            if packed:
                (raw / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / name).write_bytes(content)
    return raw
