"""Checkpoints: written atomically, loaded without executing anything."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import zip_longest
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from bilevel.average import Average
from bilevel.distributed import Ranks
from bilevel.inner_solver import kind_of, refuse_other
from bilevel.layout import Layout
from bilevel.lengths import Lengths
from bilevel.linear import Learned
from bilevel.noise import Agreement, Noise
from bilevel.problem import Cost
from bilevel.randomness import all_generators, restore_generators
from bilevel.record import Record
from bilevel.reuse import Habit
from bilevel.rules import Moments
from bilevel.secants import Secants
from bilevel.state import State, Training

if TYPE_CHECKING:
    from bilevel.method import Method

VERSION = 13


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` where the block ends well.

    It lies beside ``path``, is flushed to the disk and then renamed: a reader sees the old file or
    the new one, whole, and a failure leaves the old one alone. A missing folder is made.

    Args:
        path: of the file to replace, if there is one.
        keep: whether the old file becomes ``<path>.old``.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = _scratch(path)
    file = open(name, "xb")  # one of tempfile's would have the rights of the user alone
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            _keep(path)
        os.replace(name, path)
    finally:
        name.unlink(missing_ok=True)


def _keep(path: Path) -> None:
    """Make the file ``<path>.old`` as well; at every moment it is still there at ``path``."""
    name = _scratch(path)
    try:
        try:
            os.link(path, name)
        except OSError:  # not every file system has links
            shutil.copyfile(path, name)
        os.replace(name, f"{path}.old")
    finally:
        name.unlink(missing_ok=True)


def _scratch(path: Path) -> Path:
    """A name beside ``path`` that no file has."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def save(path: str | os.PathLike[str], content: dict[str, Any], keep: bool = False) -> None:
    """Write ``content`` (tensors, numbers, strings, lists, dicts) by :func:`replacing`.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    try:
        with replacing(Path(path), keep) as file:
            torch.save({"version": VERSION, **content}, file)
    except (OSError, RuntimeError) as error:  # torch's own, where a write falls short
        raise _unwritten(path, error) from error


def _unwritten(path: str | os.PathLike[str], error: Exception) -> OSError:
    return OSError(
        f"cannot write a checkpoint to {path}: {error}; make room for it, or choose a folder that "
        f"can be written. What was there before is still there"
    )


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
        method: that takes the iterations.   habit: of the problem.
        source: of the batches, with ``state_dict`` and ``load_state_dict``.
        ranks: on whose device the generators are saved beside those of the CPU.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        method: Method,
        habit: Habit,
        source: Any,
        ranks: Ranks,
    ) -> None:
        self.path, self.method, self.habit = path, method, habit
        self.source, self.ranks = source, ranks
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
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _scratch(path).touch(exist_ok=False)
                except OSError as error:
                    raise _unwritten(path, error) from error
                # that one, and those of runs that were killed while they wrote
                for left in path.parent.glob(f"{glob.escape(path.name)}.{'?' * 8}.tmp"):
                    left.unlink(missing_ok=True)

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
                content = pack(self.method, self.habit, state, history[:count]) | parts[0]
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
        state, history = unpack(saved, self.method, state)
        self.habit.largest, self.habit.recorded = saved["largest"], saved["recorded"]
        self.habit.random.update(saved["random"])
        self.habit.stacks.update(saved["stacks"])
        parts = [saved, *saved.get("others", [])]
        mine = parts[self.ranks.rank % len(parts)]
        self.source.load_state_dict(mine["source"])
        restore_generators(mine["generators"], self.device)
        return state, history


def pack(method: Method, habit: Habit, state: State, history: list[Record]) -> dict[str, Any]:
    """State and history as plain data."""
    content = {
        "method": method.name,
        "largest": habit.largest,
        "random": sorted(habit.random),
        "stacks": dict(habit.stacks),
        "recorded": habit.recorded,
        "inner_solver": kind_of(method.inner_solver, state.solver),
        "vectors": list(state.vectors),
        "paths": [layout.paths for layout in state.layouts],
        "shapes": [list(map(list, layout.shapes)) for layout in state.layouts],
        "k": state.k,
        "last": [state.outer_last, state.inner_last],
        "lengths": list(state.lengths),
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
        "training": [list(state.training.moments), *state.training[1:]],
        "secants": list(state.secants),
        "kinks": None if state.kinks is None else list(state.kinks),
        "history": [record.asdict() for record in history],
    }
    return _plain(content)


def _plain(value: Any) -> Any:
    """With Python's own numbers for NumPy's, which are no plain data."""
    if type(value) is dict:  # a scheduler's Counter stays one
        return {key: _plain(part) for key, part in value.items()}
    if type(value) is list:
        return [_plain(part) for part in value]
    of_numpy = type(value).__module__ == "numpy" and isinstance(value, Number)
    return value.item() if of_numpy else value


def _refuse_other(layout: Layout, paths: list[str], shapes: Any, saved: torch.Tensor) -> None:
    """Refuse a variable of another structure, naming the first leaf that is not the same."""

    def named(paths: list[str], of: Any) -> list[str]:
        return [f"{p} {tuple(s)}" for p, s in zip(paths, of, strict=True)]

    held, here = named(paths, shapes), named(layout.paths, layout.shapes)
    same = layout.dtype == saved.dtype and layout.size == saved.numel()
    if same and held == here:
        return
    pairs = zip_longest(held, here, fillvalue="nothing")
    differ = next((f": {a} is now {b}" for a, b in pairs if a != b), "")
    raise ValueError(
        f"the checkpoint holds {layout.name} with {saved.numel()} numbers of {saved.dtype}, but "
        f"{layout.name} now has {layout.size} of {layout.dtype}{differ}; resume with the variables "
        f"of the interrupted run."
    )


def unpack(content: dict[str, Any], method: Method, state: State) -> tuple[State, list[Record]]:
    """The saved state on the device of ``state``, which was made from the same x and y.

    Raises:
        ValueError: they are others, or another method goes on.
    """
    held = zip(content["paths"], content["shapes"], content["vectors"], strict=True)
    for layout, parts in zip(state.layouts, held, strict=True):
        _refuse_other(layout, *parts)
    name = content["method"]
    if name != method.name:
        raise ValueError(
            f"the checkpoint was written by the method {name!r}, but {method.name!r} would go on "
            f"from it; resume with the method of the interrupted run, or start a new run at its x "
            f"and y."
        )
    solver = content["solver"]
    refuse_other(method.inner_solver, state.layouts[1], content["inner_solver"], solver)
    device = state.vectors[0].device

    def here(t: Any) -> Any:
        return t.to(device) if isinstance(t, torch.Tensor) else t

    def moments(held: list[Any]) -> Moments:
        return Moments(here(held[0]), here(held[1]), *held[2:])

    first, *rest = content["training"]
    average = content["average"]
    restored = replace(
        state,
        vectors=tuple(here(t) for t in content["vectors"]),
        k=content["k"],
        outer_last=content["last"][0],
        inner_last=content["last"][1],
        lengths=Lengths(*content["lengths"]),
        moments=moments(content["moments"]),
        q=here(content["q"]),
        average=average and Average(here(average[0]), here(average[1]), *average[2:]),
        solver=content["solver"],
        cost=Cost(**content["cost"]),
        seconds=content["seconds"],
        failures=content["failures"],
        noise=Noise(*content["noise"]),
        agreement=Agreement(*content["agreement"]),
        learned=Learned(*content["learned"]),
        training=Training(moments(first), *rest),
        secants=Secants(*(here(part) for part in content["secants"])),
        kinks=None if content["kinks"] is None else tuple(content["kinks"]),
    )
    return restored, [Record(**record) for record in content["history"]]
