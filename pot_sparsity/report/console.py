"""The terminal: progress of long steps and log messages on stderr, results on stdout."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pot_sparsity.report import words

PIPE_WIDTH = 160  # columns of a table that goes into a file or a pipe


class ConsoleProgress:
    """Shows a bar for every running step; without a terminal, one line for every finished step.

    Implements :class:`pot_sparsity.pipeline.progress.Progress`. Steps may nest: ``advance`` and ``finish``
    mean the one started last.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: list[tuple[TaskID, str, float]] = []
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def start(self, step: str, total: int | None) -> None:
        """Show a new bar; without ``total`` it only pulses."""
        self._bars.start()
        self._steps.append((self._bars.add_task(step, total=total), step, time.perf_counter()))

    def advance(self, units: int = 1) -> None:
        """Move the current bar."""
        if self._steps:
            self._bars.advance(self._steps[-1][0], units)

    def finish(self) -> None:
        """Replace the current bar by one line with its time."""
        if not self._steps:
            return
        task, step, started = self._steps.pop()
        self._bars.remove_task(task)
        duration = words.seconds(time.perf_counter() - started)
        self._console.print(f"{step}: {duration}", markup=False, highlight=False, soft_wrap=True)
        if not self._steps:
            self._bars.stop()

    def close(self) -> None:
        """Take all bars away, also after an error."""
        self._steps.clear()
        self._bars.stop()


@contextmanager
def logging_to(console: Console, level: int) -> Iterator[None]:
    """Show the package's log messages of at least ``level`` on ``console`` while the context lasts.

    Tracebacks are for the log file: whoever handles the exception decides whether to show it.
    """
    logger = logging.getLogger("pot_sparsity")
    handler = RichHandler(console=console, level=level, show_time=False, show_path=False, markup=False)
    handler.addFilter(lambda record: record.exc_info is None)
    before = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > level:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def print_results(*parts: RenderableType) -> None:
    """Print tables and lines on stdout; wide enough for whole tables where that is not a terminal."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=PIPE_WIDTH)
    for part in parts:
        console.print(part)
