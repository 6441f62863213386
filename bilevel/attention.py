"""The only attention of torch that can be differentiated twice."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Shared(AbstractContextManager[None]):
    """``sdpa_kernel(MATH)``, of any number of threads at once.

    Which kernels are allowed is a setting of the process: of two threads that each put back what
    they found, the later one may put back what the earlier had set. So the first of them sets it,
    and the last puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._found = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._found.close()


_SHARED = _Shared()


def twice_differentiable() -> AbstractContextManager[None]:
    """A context in which attention runs through the math kernel."""
    if torch.compiler.is_compiling():  # which knows the one, and no locks
        return sdpa_kernel(SDPBackend.MATH)
    return _SHARED
