"""What an inference engine must offer: compile a (cut of a) model, run batches, return any tapped tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pot_sparsity.algorithms.arrays import AnyArray
from pot_sparsity.graph.model import Runnable


class Executable(Protocol):
    """A compiled model."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Graph tensor names it must be fed with."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Graph tensor names it returns."""

    def run(self, feeds: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """One inference; the arrays returned are the caller's to keep."""


class Engine(Protocol):
    """Compiles runnables for this machine's CPU."""

    @property
    def name(self) -> str:
        """The word used on the command line."""

    def compile(self, runnable: Runnable, *, exact: bool = True) -> Executable:
        """Compile for float32 references (``exact``) or as a deployment would run it (``exact=False``)."""
