"""The machine in words, times with their spread, tables."""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tasks import files


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": device or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def seconds(call: Callable[[], Any], repeats: int = 15, warmup: int = 3) -> list[float]:
    """Seconds of each of ``repeats`` calls, the device waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    found = []
    for i in range(repeats + warmup):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if i >= warmup:
            found.append(time.perf_counter() - start)
    return found


def installed(name: str) -> Any:
    """The package, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Minimum, median, maximum."""
    return min(values), statistics.median(values), max(values)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = list(rows[0])
    cells = [
        [f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names]
        for row in rows
    ]
    lines = [names, ["---"] * len(names), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, rows: Sequence[dict[str, Any]], folder: str = "docs/measured") -> None:
    """Print the table, and keep it with the machine as JSON."""
    print(table(rows))
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = ("--out", folder, f"--out={folder}")  # is no part of what was asked
    asked = [argument for argument in sys.argv[1:] if argument not in where]
    content = {"machine": machine(), "arguments": asked, "rows": list(rows)}
    files.write(path, (json.dumps(content, indent=1) + "\n").encode())
    print(f"\n{machine()}\nwritten to {path}")
