"""What the sections of a recipe have in common."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

When = Literal["always", "helps", "never"]


class Section(BaseModel):
    """Settings that cannot be changed, without any key but their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def one_of(value: str, known: Iterable[str], what: str) -> str:
    """The value, if it is among the known ones; ValueError with the nearest of them otherwise."""
    names = sorted(known)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}{hint} (known: {', '.join(names)})")
