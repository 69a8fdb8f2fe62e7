"""Rows in parallel: a pool of threads that keeps the matrix library to one thread per worker.

A solver cuts its rows into parts that depend on the layer alone, never on the number of workers, and the
matrix library runs on one thread however many workers there are: so the result is the same to the last bit.
NumPy lets go of the interpreter inside its products; SciPy's LAPACK wrappers do not, but are several times faster
than NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from types import TracebackType
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _controller() -> ThreadpoolController:
    """The matrix libraries of this process; looking for them is what takes time."""
    return ThreadpoolController()


class RowPool:
    """Context in which parts of a layer run on ``workers`` threads, the matrix library on one each."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._stack = ExitStack()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> RowPool:
        self._stack.enter_context(_controller().limit(limits=1, user_api="blas"))
        if self._workers > 1:
            self._pool = self._stack.enter_context(ThreadPoolExecutor(self._workers))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Results of ``work`` in the order of ``items``; the first error is raised."""
        if self._pool is None:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))


def slices(count: int, size: int) -> list[slice]:
    """``0 .. count`` in parts of ``size``."""
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
