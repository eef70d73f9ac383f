"""Progress: a bar in a terminal, one log line every 10 seconds without one."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

log = logging.getLogger("maxreel")

LOG_SECONDS = 10.0


class Progress:
    """Counts finished items of one stage, on stderr.

    Parameters
    ----------
    stage
        What is shown.
    total
        Items expected; None where it is not known.
    """

    def __init__(self, stage: str, total: int | None) -> None:
        self._stage, self._total, self._done = stage, total, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            self._bar = Bar(
                TextColumn("{task.description:>12}"),
                BarColumn(),
                TaskProgressColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._stage, total=self._total)
        else:
            log.info("%s: %s to do", self._stage, self._total if self._total is not None else "unknown number")
        return self

    def advance(self, items: int) -> None:
        """Count more items as finished."""
        self._done += items
        if self._bar:
            self._bar.advance(self._task, items)
        elif time.monotonic() - self._last_line >= LOG_SECONDS:
            self._last_line = time.monotonic()
            log.info("%s: %d of %s done, %.0f s", self._stage, self._done, self._total, self._last_line - self._started)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif error is None:
            log.info("%s: %d done in %.0f s", self._stage, self._done, time.monotonic() - self._started)
