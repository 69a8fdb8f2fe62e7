"""All exceptions of the package, and the exit code each one ends a command with.

::

    PotSparsityError                1   something went wrong inside
    +-- UserError                   2   wrong usage or input: one line says what, where and what to do
    |   +-- ModelError              2   the model file cannot be used
    |   +-- DataError               2   calibration or validation data cannot be used
    |   +-- RecipeError             2   a recipe or an option is wrong
    |   +-- OutputError             2   the result cannot be written where it should go
    +-- AccuracyGateError           3   no model respects the accuracy drop that was allowed
"""

from __future__ import annotations


class PotSparsityError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1


class UserError(PotSparsityError):
    """Wrong usage or input; the message is one line that says what to do."""

    exit_code = 2


class ModelError(UserError):
    """The model is missing, damaged, unsafe or holds nothing to compress."""


class DataError(UserError):
    """Calibration or validation data is missing, unreadable or of the wrong shape, type or length."""


class RecipeError(UserError):
    """A recipe or option has an unknown key or an illegal value."""


class OutputError(UserError):
    """The output folder or file cannot be written."""


class AccuracyGateError(PotSparsityError):
    """No iteration of the schedule respects the accuracy drop that was allowed."""

    exit_code = 3
