"""What a run remembers about itself while it runs: stages with time and memory, decisions, warnings."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pot_sparsity.report.schema import Decision, Stage

log = logging.getLogger("pot_sparsity")


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@dataclass
class StageNote:
    """Filled in while a stage runs."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Collects stages, decisions and warnings in the order they happen."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.begin = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[StageNote]:
        """Time a stage; stages of the same name add up, the last metrics stand."""
        note = StageNote()
        start = time.perf_counter()
        log.info("%s: started", name)
        yield note
        seconds = time.perf_counter() - start
        earlier = next((stage for stage in self.stages if stage.name == name), None)
        if earlier is None:
            self.stages.append(
                Stage(
                    name=name,
                    seconds=seconds,
                    peak_memory_mib=peak_memory_mib(),
                    metrics_before=note.before,
                    metrics_after=note.after,
                )
            )
        else:
            earlier.seconds += seconds
            earlier.peak_memory_mib = peak_memory_mib()
            earlier.metrics_before = note.before or earlier.metrics_before
            earlier.metrics_after = note.after or earlier.metrics_after
        log.info("%s: %.2f s%s", name, seconds, _show(note.after))

    def measured(self, name: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Metrics before and after a stage that is over, where judging is not part of its time."""
        stage = next(stage for stage in self.stages if stage.name == name)
        stage.metrics_before, stage.metrics_after = dict(before), dict(after)
        log.info("%s: judged%s", name, _show(after))

    def warn(self, text: str) -> None:
        """Keep a warning for the report and the log."""
        self.warnings.append(text)
        log.warning("%s", text)

    def decide(self, decision: Decision) -> None:
        """Keep a decision for the report and the log."""
        self.decisions.append(decision)
        log.info("%s: %s %s", decision.what, "kept" if decision.kept else "left out", decision.reason)

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.begin


def _show(metrics: Mapping[str, float]) -> str:
    return "".join(f", {name} {value:.4g}" for name, value in metrics.items())
