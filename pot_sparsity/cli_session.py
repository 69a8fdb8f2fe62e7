"""What every command of the command line runs in: progress and log on stderr, one line for what goes wrong."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from pot_sparsity.errors import PotSparsityError

if TYPE_CHECKING:
    from pot_sparsity.pipeline.progress import Progress

INTERRUPTED = 130

# typer's usage errors have one public class, BadParameter; its parents cover unknown options and commands too
UsageError = cast(type[Exception], typer.BadParameter.__mro__[2])


@contextmanager
def session(*, verbose: bool, quiet: bool, folder: Path | None = None) -> Iterator[Progress]:
    """Progress and log on stderr; an unexpected exception becomes one line, its traceback goes to the log."""
    import logging

    from rich.console import Console

    from pot_sparsity.report.console import ConsoleProgress, logging_to

    console = Console(stderr=True, markup=False, highlight=False)
    bars = ConsoleProgress(Console(stderr=True, quiet=True) if quiet else console)
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    try:
        with logging_to(console, level), warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")  # of the libraries; what concerns the user is in the report
            yield bars
    except (PotSparsityError, typer.Exit, UsageError):
        raise
    except KeyboardInterrupt:
        hint = (
            " Run again with --resume to go on." if folder is not None and (folder / "state").is_dir() else ""
        )
        print(f"interrupted.{hint}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        raise PotSparsityError(_internal(error, folder, verbose)) from error
    finally:
        bars.close()


def _internal(error: Exception, folder: Path | None, verbose: bool) -> str:
    """One line about an unexpected exception, whose traceback is in the run's log or goes there."""
    trace = traceback.format_exc()
    where = "run again with --verbose to see where"
    if folder is not None and folder.is_dir():
        log = folder / "run.log"
        try:
            with log.open("a+", encoding="utf-8") as stream:
                stream.seek(0)
                if not stream.read().rstrip().endswith(trace.splitlines()[-1]):
                    stream.write(trace)
            where = f"the traceback is in {log}"
        except OSError as failure:
            where = f"{where} ({log} cannot be written: {failure.strerror})"
    if verbose:
        print(trace, file=sys.stderr, end="")
    return f"internal error: {type(error).__name__}: {error}; {where}"
