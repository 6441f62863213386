"""Checkpoints: written atomically, loaded without executing anything."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bilevel.problem import Cost
from bilevel.record import Record
from bilevel.rules import Moments

if TYPE_CHECKING:
    from bilevel.method import State

VERSION = 1


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, lists, dicts) to a temporary file beside
    ``path``, flush it to the disk, and rename: a reader sees the old file or the new one."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    except OSError as error:
        raise OSError(
            f"cannot write a checkpoint to {path}: {error}; choose a folder that can be written."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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


def pack(state: State, history: list[Record]) -> dict[str, Any]:
    """State and history as plain data."""
    solver = state.solver
    return {
        "vectors": list(state.vectors),
        "paths": [layout.paths for layout in state.layouts],
        "k": state.k,
        "last": [state.outer_last, state.inner_last],
        "moments": list(state.moments),
        "q": state.q,
        "solver": solver.state_dict() if hasattr(solver, "state_dict") else solver,
        "cost": asdict(state.cost),
        "seconds": state.seconds,
        "failures": state.failures,
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
    restored = replace(
        state,
        vectors=tuple(here(t) for t in content["vectors"]),
        k=content["k"],
        outer_last=content["last"][0],
        inner_last=content["last"][1],
        moments=Moments(here(m), here(v), count),
        q=here(content["q"]),
        solver=content["solver"],
        cost=Cost(**content["cost"]),
        seconds=content["seconds"],
        failures=content["failures"],
    )
    return restored, [Record(**record) for record in content["history"]]
