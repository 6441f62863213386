"""The run folder: what a task was asked, what happened, and pictures of it.

A task does::

    run = start(options)
    for k in progress(range(options.steps), quiet=options.quiet):
        run.record({"k": k, "outer_loss": loss})
    curves(run.folder / "loss.png", {"bisls-adam": (ks, losses)}, "outer iteration", "loss")
    return run.summarize({"test accuracy": accuracy})
"""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import FolderInUse
from .figures import curves, image_grid
from .files import plain, write_csv, write_json

__all__ = [
    "Run",
    "add_resume",
    "curves",
    "default_folder",
    "device",
    "image_grid",
    "progress",
    "start",
]

Item = TypeVar("Item")

#: Options that say how a run is shown and kept, not what it computes.
MANNERS = ("out", "overwrite", "quiet", "resume")


class Run:
    """A folder with ``config.json``, ``history.csv`` and ``summary.json``.

    Whole files appear at once (a temporary file, flushed to the disk, takes the name), so that
    a run that is killed leaves no half of one; history grows line by line.

    A folder that holds results of other options is refused; of the same options, it is written
    anew. Files under other names are never touched.

    Args:
        folder: made where it does not exist.
        config: all options, by name; tensors, paths and devices are written as plain values.
        overwrite: take the folder over, whatever run it holds.
        resume: go on in the folder of an interrupted run of the same options, ``steps`` apart.
            Its history is kept in :attr:`rows`; :meth:`keep` cuts it back to the checkpoint.

    Raises:
        FolderInUse: a FileExistsError; the folder holds the results of other options.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.config = plain(dict(config), finite=True)
        self.rows: list[dict[str, Any]] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise FolderInUse(f"{self.folder} is a file: choose another folder with --out")
        if not overwrite:
            self._refuse_others(apart=("steps",) if resume else ())
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and self._history.exists():
            with self._history.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        else:
            self._history.unlink(missing_ok=True)
        self._summary.unlink(missing_ok=True)
        environment = surroundings(self.config.get("device"))
        write_json(self._config, {"options": self.config, "environment": environment})

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    @property
    def _history(self) -> Path:
        return self.folder / "history.csv"

    @property
    def _summary(self) -> Path:
        return self.folder / "summary.json"

    def _refuse_others(self, apart: tuple[str, ...]) -> None:
        remedy = "choose another folder with --out, or replace its results with --overwrite"
        if not self._config.exists():
            for path in (self._history, self._summary):
                if path.exists():
                    raise FolderInUse(f"{path} belongs to something else: {remedy}")
            return
        try:
            theirs = json.loads(self._config.read_text(encoding="utf-8"))["options"]
            keys = [key for key in {**theirs, **self.config} if key not in apart]
        except (ValueError, KeyError, TypeError):
            raise FolderInUse(f"{self._config} is of no run of this program: {remedy}") from None
        for key in keys:
            here, there = self.config.get(key), theirs.get(key)
            if here != there:
                raise FolderInUse(
                    f"{self.folder} holds the results of other options "
                    f"({key} {there!r} there, {here!r} now): {remedy}"
                )

    def record(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``history.csv``; the first row's keys are the columns.

        Later rows may leave columns out, not bring new ones. A tensor of one element is written
        as its number, which waits for the device.
        """
        row = plain(dict(row))
        columns = list(self.rows[0]) if self.rows else list(row)
        unknown = [key for key in row if key not in columns]
        if unknown or not columns:
            raise ValueError(
                f"history.csv has the columns {columns}, and a row brings {unknown}: "
                f"give every column in the first row, with None where it has no value"
            )
        write_csv(self._history, columns, [row], append=bool(self.rows))
        self.rows.append({key: row.get(key) for key in columns})

    def keep(self, count: int) -> None:
        """Cut the history back to its first ``count`` rows, those that a checkpoint knows of."""
        if not 0 <= count <= len(self.rows):
            raise ValueError(f"cannot keep {count} rows of {len(self.rows)}")
        del self.rows[count:]
        if self.rows:
            write_csv(self._history, list(self.rows[0]), self.rows)
        else:
            self._history.unlink(missing_ok=True)

    def summarize(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``summary.json``, the sign of a finished run; returns it as plain values."""
        values: dict[str, Any] = plain(dict(summary))
        write_json(self._summary, values)
        return values


def add_resume(parser: ArgumentParser) -> None:
    """The option of every task that can be interrupted."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the interrupted run in --out, of the same options",
    )


def start(options: Namespace) -> Run:
    """The run folder of a task's parsed options; ``options.out`` is set to it."""
    resume = getattr(options, "resume", False)
    if resume and not options.out:
        raise ValueError("--resume without --out: name the folder of the interrupted run by --out")
    options.out = Path(options.out) if options.out else default_folder(options.task)
    config = {key: value for key, value in vars(options).items() if key not in MANNERS}
    return Run(options.out, config, options.overwrite, resume)


def default_folder(task: str) -> Path:
    """``runs/<task>-<timestamp>``, one that does not exist yet."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, copies = Path("runs") / f"{task}-{now}", 1
    while folder.exists():
        copies += 1
        folder = Path("runs") / f"{task}-{now}-{copies}"
    return folder


def device(name: str = "auto") -> torch.device:
    """The device of this name, if tensors can live on it; "auto": a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"the device {name!r} cannot be used ({str(error).splitlines()[0]}); "
            f"choose auto, cpu or another device of this machine"
        ) from error
    return chosen


def surroundings(device_name: str | None = None) -> dict[str, Any]:
    """Versions, machine and commit, as far as they are known."""
    place = str(device_name or "cpu")
    if place.startswith("cuda"):
        hardware = torch.cuda.get_device_name(place)
    else:
        hardware = (
            f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        )
    try:
        version = metadata.version("bilevel")
    except metadata.PackageNotFoundError:
        version = None
    return {
        "bilevel": version,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": place,
        "hardware": hardware,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the checkout that this file lies in, "-dirty" behind it; None elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():  # site-packages may lie in somebody else's checkout
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=40"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def progress(
    iterable: Iterable[Item],
    total: int | None = None,
    desc: str | None = None,
    quiet: bool = False,
) -> Iterable[Item]:
    """The iterable, with a bar where standard error is a terminal and tqdm is installed."""
    if quiet or not sys.stderr.isatty():
        return iterable
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    bar: Iterable[Item] = tqdm(iterable, total=total, desc=desc, dynamic_ncols=True)
    return bar
