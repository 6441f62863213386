"""A progress bar on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
import time

from bilevel.record import Record


class Bar:
    """``42/100 [=====>     ] outer 0.123  inner 0.456  12.3 it/s`` on stderr.

    Args:
        total: iterations.   show: None: if stderr is a terminal.   done: already taken.
    """

    def __init__(self, total: int, show: bool | None, done: int = 0) -> None:
        self.show = sys.stderr.isatty() if show is None else show
        self.total, self.first = total, done
        self.start = time.monotonic()
        self.drawn = 0.0

    def update(self, record: Record) -> None:
        now, done = time.monotonic(), record.k + 1
        if not self.show or (now - self.drawn < 0.1 and done < self.total):
            return
        self.drawn = now
        filled = 20 * done // self.total
        rate = (done - self.first) / max(now - self.start, 1e-9)
        sys.stderr.write(
            f"\r{done}/{self.total} [{'=' * filled:<20}] outer {record.outer_loss:.4g}  "
            f"inner {record.inner_loss:.4g}  {rate:.3g} it/s\x1b[K"
        )
        sys.stderr.flush()

    def close(self) -> None:
        if self.show and self.drawn:
            sys.stderr.write("\n")
