"""What can go wrong outside the program, as errors that a person can act on."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackage(ImportError):
    """An optional package is not installed, or is installed and cannot be imported."""


class MissingData(FileNotFoundError):
    """A data set is in none of the places where it was looked for."""


class BadData(ValueError):
    """A data file is there and cannot be used: unreadable, truncated, of another format."""


class FolderInUse(FileExistsError):
    """A run folder holds another run's results."""


def require(module: str, purpose: str, extra: str = "tasks") -> Any:
    """Import an optional module, or raise :class:`MissingPackage` saying what to install.

    The one place that meets packages which are installed and yet fail on import, whatever they
    raise: a CUDA build of torchvision beside a CPU build of torch, for one, raises RuntimeError
    ("operator torchvision::nms does not exist").

    Args:
        module: dotted name, e.g. "torchvision.datasets".
        purpose: what needs it, the beginning of the sentence: "downloading mnist".
        extra: the extra of this project that brings it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise MissingPackage(
                f"{purpose} needs the package {package}, which is not installed; "
                f"pip install 'bilevel[{extra}]'"
            ) from error
        raise MissingPackage(
            f"{purpose} needs the package {package}, which is installed and cannot be imported "
            f"({type(error).__name__}: {first_line(error)}); install the build of {package} that "
            f"belongs to the installed torch"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a final stop; its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
