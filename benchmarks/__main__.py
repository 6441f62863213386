"""``python -m benchmarks NAME [options]``: run one benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

SHARED = {"__init__", "__main__", "peers", "problems", "report", "rivals"}


def main(argv: list[str]) -> int:
    names = sorted(
        path.stem.replace("_", "-")
        for path in Path(__file__).parent.glob("*.py")
        if path.stem not in SHARED
    )
    if argv and argv[0] not in names:
        print(f"there is no benchmark {argv[0]!r}; these are:", file=sys.stderr)
    if not argv or argv[0] not in names:
        for name in names:
            module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
            print(f"{name:<20} {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0 if not argv else 2
    importlib.import_module(f"benchmarks.{argv[0].replace('-', '_')}").main(argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
