"""Progress: a bar in a terminal, one log line every 10 seconds without one."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

log = logging.getLogger("maxreel")

LOG_SECONDS = 10.0


class Progress:
    """Counts finished items of one stage, on stderr; use as a context manager.

    Parameters
    ----------
    stage
        What is shown.
    total
        Items expected.
    """

    def __init__(self, stage: str, total: int) -> None:
        self._stage, self._total, self._done = stage, total, 0
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_until_stopped, name="progress", daemon=True)
        self._bar: Bar | None = None
        if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
            columns = TaskProgressColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            name = TextColumn("{task.description:>12}")
            self._bar = Bar(name, BarColumn(), *columns, console=Console(stderr=True))
            self._task = self._bar.add_task(stage, total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        else:
            log.info("%s: %d to do", self._stage, self._total)
            self._thread.start()
        return self

    def advance(self, items: int) -> None:
        """Count more items as finished."""
        self._done += items
        if self._bar:
            self._bar.advance(self._task, items)

    def _log_until_stopped(self) -> None:
        while not self._stop.wait(LOG_SECONDS):
            log.info("%s: %d of %d done, %.0f s", self._stage, self._done, self._total, self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            return
        self._stop.set()
        self._thread.join()
        if error is None:
            log.info("%s: done in %.0f s", self._stage, self._seconds())
