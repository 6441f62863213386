"""Files that are whole or absent, and values as JSON and CSV can hold them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bilevel.checkpoint import replacing


def write(path: Path, content: bytes) -> None:
    """Write a file at once: whoever reads the name finds the old content or the new, whole."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON; nan and inf, which JSON lacks, as the strings of that name."""
    text = json.dumps(plain(value, finite=True), indent=2, allow_nan=False, ensure_ascii=False)
    write(path, (text + "\n").encode())


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], append: bool = False
) -> None:
    """Write rows below a header, at once; or append them to a file that has one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if not append:
        writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    if append:
        with path.open("ab") as file:
            file.write(content)
    else:
        write(path, content)


def plain(value: Any, finite: bool = False) -> Any:
    """The value as None, bool, numbers, strings, lists and dicts.

    Tensors and arrays become numbers or lists; anything else unknown (a path, a device, a
    method) the text it prints as. ``finite``: nan and inf become the strings of that name.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, finite) for item in value]
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        return plain(value.tolist(), finite)
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def table(summary: Mapping[str, Any]) -> str:
    """A summary for people: one line per value; a list of dicts becomes a table with a header.

    Example:
        >>> print(table({"steps": 10, "test accuracy": 0.94321}))
        steps          10
        test accuracy  0.9432
    """
    width = max((len(key) for key, value in summary.items() if not _is_rows(value)), default=0)
    lines = []
    for key, value in summary.items():
        if not _is_rows(value):
            lines.append(f"{key:<{width}}  {_short(value)}".rstrip())
            continue
        columns = list(dict.fromkeys(column for row in value for column in row))
        cells = [columns] + [[_short(row.get(column, "")) for column in columns] for row in value]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines += ["", key]
        lines += [
            "  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
    return "\n".join(lines).strip("\n")


def _is_rows(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
