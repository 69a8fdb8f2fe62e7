"""Write docs/report-schema.md from the classes that define report.json."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pot_sparsity.report import schema

TARGET = Path(__file__).resolve().parents[1] / "docs" / "report-schema.md"
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", object: "any", type(None): "null"}


def type_text(kind: Any) -> str:
    """A type in the words of JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if origin is typing.Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is list:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"object of {type_text(arguments[1])} by name"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(argument) for argument in arguments)
    return NAMES[kind]


def parts_of(kind: Any) -> Iterator[type[BaseModel]]:
    """Every model class inside a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for argument in typing.get_args(kind):
        yield from parts_of(argument)


def field_row(name: str, info: FieldInfo) -> str:
    return f"| `{name}` | {type_text(info.annotation)} | {info.description or ''} |"


def render() -> str:
    """The whole page."""
    ordered: list[type[BaseModel]] = [schema.Report]
    for model in ordered:  # grows while it is walked: breadth first
        for info in model.model_fields.values():
            ordered.extend(part for part in parts_of(info.annotation) if part not in ordered)
    units = (schema.__doc__ or "").partition("\n\n")[2]
    lines = [
        "# report.json",
        "",
        f"Schema version {schema.SCHEMA_VERSION}: a change of the first number breaks readers, one of the",
        "second adds fields. Every run writes the file into its folder, next to `report.html` with the same",
        "content.",
        "This page is made from `pot_sparsity/report/schema.py` by `tools/make_report_schema.py`; in Python,",
        "`pot_sparsity.report.io.read_report(folder)` gives the same as typed objects.",
        "",
        " ".join(units.split()),
    ]
    for model in ordered:
        lines += ["", f"## {model.__name__}", "", " ".join((model.__doc__ or "").split()), ""]
        lines += ["| field | type | meaning |", "| --- | --- | --- |"]
        lines += [field_row(name, info) for name, info in model.model_fields.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether the page is up to date")
    arguments = parser.parse_args()
    page = render()
    if not arguments.check:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(page, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == page:
        return 0
    print(f"docs/{TARGET.name} is out of date: run python tools/make_report_schema.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
