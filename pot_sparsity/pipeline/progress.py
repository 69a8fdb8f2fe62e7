"""How long steps tell the outside that they move, without knowing who looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the life of every long step."""

    def start(self, step: str, total: int | None) -> None:
        """A step begins; ``total`` units of work are expected, if known."""

    def advance(self, units: int = 1) -> None:
        """Some units of the current step are done."""

    def finish(self) -> None:
        """The current step is done."""


class Silent:
    """Shows nothing."""

    def start(self, step: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, units: int = 1) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""


def track(items: Iterable[T], progress: Progress, step: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` and report one unit of ``step`` after each."""
    progress.start(step, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
