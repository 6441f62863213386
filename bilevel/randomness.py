"""Random generators, saved and restored."""

from __future__ import annotations

import random
import sys
from array import array
from typing import Any

import torch
from torch import Tensor


class Randomness:
    """torch's generators of the CPU and of one device: those that a loss may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


def all_generators(device: torch.device) -> dict[str, Any]:
    """The states of every global generator, torch's, Python's and NumPy's, as plain data."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "torch": Randomness(device).state(),
        # by way of a buffer: a fifth of the time, in every iteration that looks ahead
        "python": [version, torch.frombuffer(array("q", words), dtype=torch.int64), gauss],
    }
    if "numpy" in sys.modules:
        name, keys, position, has, cached = sys.modules["numpy"].random.get_state()
        keys = torch.tensor(keys.astype("int64"), device="cpu")
        states["numpy"] = [name, keys, position, has, cached]
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """Undo what happened since :func:`all_generators`."""
    saved = states["torch"]
    if device.type == "cuda" and len(saved) < 2:  # the run goes on on another device
        torch.set_rng_state(saved[0])
    else:
        Randomness(device).restore(saved)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in states and "numpy" in sys.modules:
        name, keys, position, has, cached = states["numpy"]
        sys.modules["numpy"].random.set_state(
            (name, keys.numpy().astype("uint32"), position, has, cached)
        )
