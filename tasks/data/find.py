"""Where data are looked for, how they are downloaded, and how files are read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadData, MissingData, MissingPackage, first_line, require

Found = TypeVar("Found")


def cache_folder() -> Path:
    """Where downloads go: ``bilevel`` in $XDG_CACHE_HOME, or in ``.cache`` of the home folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "bilevel"


def places(root: str | Path | None) -> Iterator[tuple[Path, str]]:
    """The folders to look in, in order, and what names each; named ones must exist."""
    named = ((root, "the root"), (os.environ.get("BILEVEL_DATA"), "$BILEVEL_DATA"))
    for value, origin in named:
        if value:
            place = Path(value).expanduser()
            if not exists(place):
                raise MissingData(
                    f"{origin} names {place}, which does not exist: make it and put the data "
                    f"there, or name the folder that has it by --root or $BILEVEL_DATA"
                )
            yield place, origin
    yield cache_folder(), "downloads"


def find(
    name: str,
    root: str | Path | None,
    locate: Callable[[Path, bool], Found | None],
    layout: str,
    *,
    advice: str,
    fetch: Callable[[Any, str], None] | None = None,
) -> Found:
    """What ``locate`` finds in the first place that has it, else after a download.

    Args:
        name: of the data set, for messages.
        root: the user's folder, or None.
        locate: (place, whether the user named this very place) to what is found there, or None.
        layout: the files looked for, in words.
        fetch: downloads into a folder, given ``torchvision.datasets`` and the folder; None: no
            download.
        advice: how to get the data, after "To have it, ".

    Raises:
        MissingData: where it was looked for, why there was no download, how to get it.
    """
    looked = []
    for place, origin in places(root):
        found = locate(place, origin == "the root")
        if found is not None:
            return found
        looked.append(f"{place} ({origin})")
    failure = "nothing was downloaded"
    if fetch is not None:
        failure = _download(name, fetch)
        found = locate(cache_folder(), False)
        if found is not None:
            return found
    raise MissingData(
        f"{name} is missing: looked for {layout} in {', '.join(looked)}; {failure}. "
        f"To have it, {advice}"
    )


def _download(name: str, fetch: Callable[[Any, str], None]) -> str:
    """Download into the cache, whole or not at all; what happened, in words."""
    cache = cache_folder()
    try:
        datasets = require("torchvision.datasets", f"downloading {name}", extra="download")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
            fetch(datasets, scratch)
            for item in Path(scratch).iterdir():
                with suppress(OSError):  # another process was faster
                    item.replace(cache / item.name)
    except MissingPackage as error:
        return f"no download, since {error}"
    except Exception as error:  # torchvision raises many kinds when a server cannot be reached
        return f"the download failed ({type(error).__name__}: {first_line(error)})"
    return f"a download to {cache} did not bring it"


def exists(path: Path) -> bool:
    """Whether the path exists; an error that names it where that cannot be known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def read(path: Path) -> bytes:
    """The bytes of a file, or :class:`BadData` naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> BadData:
    return BadData(f"cannot read {path}: {error.strerror or first_line(error)}")
