"""Checkpoints: written atomically, loaded without executing anything."""

from __future__ import annotations

import glob
import os
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bilevel.average import Average
from bilevel.distributed import Ranks
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.problem import Cost
from bilevel.randomness import all_generators, restore_generators
from bilevel.record import Record
from bilevel.rules import Moments

if TYPE_CHECKING:
    from bilevel.method import State

VERSION = 6


def save(path: str | os.PathLike[str], content: dict[str, Any], keep: bool = False) -> None:
    """Write ``content`` (tensors, numbers, strings, lists, dicts) to a temporary file beside
    ``path``, flush it to the disk, and rename: a reader sees the old file or the new one.

    ``keep``: an old file becomes ``<path>.old``.
    """
    path = Path(path)
    handle, name = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, f"{path}.old")
        os.replace(name, path)
    except (OSError, RuntimeError) as error:  # torch's own, where a write falls short
        raise _unwritten(path, error, "make room for it") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _unwritten(path: Path, error: Exception, instead: str) -> OSError:
    return OSError(
        f"cannot write a checkpoint to {path}: {error}; {instead}. What was there before is still "
        f"there"
    )


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _unwritten(path, error, "choose a folder that can be written") from error


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises:
        ValueError: the file is damaged, holds anything but data, or has another version.
    """
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no readable checkpoint ({type(error).__name__}): it is damaged or was not "
            f"written by bilevel; remove it to start afresh."
        ) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else None
        raise ValueError(
            f"{path} has checkpoint version {found!r}, but this version of bilevel reads "
            f"{VERSION}; resume with the version that wrote it, or remove it to start afresh."
        )
    return content


class Saver:
    """Keeps what a checkpoint needs of the last finished iteration, and writes it when asked.

    Rank 0 alone touches the file. It holds the position and the generators of every rank, which
    go on from their own; where a run goes on with another number of ranks, from those of the rank
    modulo the old number.

    Args:
        path: of the file; None: nothing is kept.
        source: of the batches, with ``state_dict`` and ``load_state_dict``.
        ranks: on whose device the generators are saved beside those of the CPU.
    """

    def __init__(self, path: str | os.PathLike[str] | None, source: Any, ranks: Ranks):
        self.path, self.source, self.ranks = path, source, ranks
        self.device = ranks.device
        self._noted: tuple[State, list[Record], int, Any, Any] | None = None
        self._vectors: tuple[torch.Tensor, ...] = ()
        self._continues = False  # whether the file at the path is of this run

    def exists(self) -> bool:
        return self.ranks.first(lambda: self.path is not None and os.path.exists(self.path))

    def prepare(self) -> None:
        """Tell before any work whether the path can be written."""

        def attempt() -> None:
            if self.path is not None:
                path = Path(self.path)
                handle, name = _temporary(path)
                os.close(handle)
                os.unlink(name)
                for left in path.parent.glob(f"{glob.escape(path.name)}.{'?' * 8}.tmp"):
                    left.unlink(missing_ok=True)  # of a run that was killed while it wrote

        self.ranks.first(attempt)

    def note(self, state: State, history: list[Record]) -> None:
        """The point to go on from; before the batches of the next iteration are drawn."""
        self._vectors = state.vectors
        if self.path is not None:
            position, generators = self.source.state_dict(), all_generators(self.device)
            self._noted = state, history, len(history), position, generators

    def write(self) -> None:
        self.ranks.same("the point (x, y)", lambda: self._vectors)
        if self.path is not None and self._noted is not None:
            state, history, count, position, generators = self._noted
            parts = self.ranks.gather({"source": position, "generators": generators})

            def put() -> None:
                assert self.path is not None
                content = pack(state, history[:count]) | parts[0]
                if len(parts) > 1:
                    content["others"] = parts[1:]
                save(self.path, content, keep=not self._continues)  # the checkpoint of another run

            try:
                self.ranks.first(put)
            except OSError as error:  # the work in memory is worth more than its copy
                warnings.warn(f"{error}; the run goes on without it.", RuntimeWarning, stacklevel=3)
                return
            self._continues = True

    def restore(self, state: State) -> tuple[State, list[Record]]:
        assert self.path is not None
        path = self.path
        saved = self.ranks.first(lambda: load(path))
        self._continues = True
        state, history = unpack(saved, state)
        parts = [saved, *saved.get("others", [])]
        mine = parts[self.ranks.rank % len(parts)]
        self.source.load_state_dict(mine["source"])
        restore_generators(mine["generators"], self.device)
        return state, history


def pack(state: State, history: list[Record]) -> dict[str, Any]:
    """State and history as plain data."""
    return {
        "vectors": list(state.vectors),
        "paths": [layout.paths for layout in state.layouts],
        "k": state.k,
        "last": [state.outer_last, state.inner_last],
        "moments": list(state.moments),
        "q": state.q,
        "average": None if state.average is None else list(state.average),
        "solver": state.solver,
        "cost": asdict(state.cost),
        "seconds": state.seconds,
        "failures": state.failures,
        "noise": list(state.noise),
        "agreement": list(state.agreement),
        "learned": list(state.learned),
        "history": [record.asdict() for record in history],
    }


def unpack(content: dict[str, Any], state: State) -> tuple[State, list[Record]]:
    """The saved state on the device of ``state``, which was made from the same x and y."""
    for layout, paths, saved in zip(
        state.layouts, content["paths"], content["vectors"], strict=True
    ):
        if layout.paths != paths or layout.size != saved.numel() or layout.dtype != saved.dtype:
            raise ValueError(
                f"the checkpoint holds {layout.name} with {saved.numel()} numbers of {saved.dtype} "
                f"({', '.join(paths)}), but {layout.name} now has {layout.size} of {layout.dtype}; "
                f"resume with the variables of the interrupted run."
            )
    device = state.vectors[0].device

    def here(t: Any) -> Any:
        return t.to(device) if isinstance(t, torch.Tensor) else t

    m, v, count = content["moments"]
    average = content["average"]
    restored = replace(
        state,
        vectors=tuple(here(t) for t in content["vectors"]),
        k=content["k"],
        outer_last=content["last"][0],
        inner_last=content["last"][1],
        moments=Moments(here(m), here(v), count),
        q=here(content["q"]),
        average=average and Average(here(average[0]), here(average[1]), *average[2:]),
        solver=content["solver"],
        cost=Cost(**content["cost"]),
        seconds=content["seconds"],
        failures=content["failures"],
        noise=Noise(*content["noise"]),
        agreement=Agreement(*content["agreement"]),
        learned=Learned(*content["learned"]),
    )
    return restored, [Record(**record) for record in content["history"]]
