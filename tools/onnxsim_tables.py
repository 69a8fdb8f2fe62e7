"""Tables of the lines that ``compare_onnxsim.py`` writes: for the terminal and for docs/results.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

Record = dict[str, object]

_TEXT = """\
Whole networks in floating point, top-1 in percent, calibrated on the same {images} pictures, judged by ONNX Runtime
on the same validation samples as above. onnxsim prunes every layer to the same sparsity, and so does `pot_sparsity
uniform`; `pot_sparsity` is the default recipe. Behind a value stands the sparsity reached over all layers, in
percent, where it is not the one asked for."""


def read_lines(paths: Iterable[Path]) -> list[Record]:
    """Records of earlier runs; lines that are no JSON objects are passed over."""
    return [
        json.loads(line)
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("{")
    ]


def tables(records: Sequence[Record], metric: str) -> str:
    """Markdown: layer errors, and the label metric of whole networks, methods side by side."""
    parts = [
        _table(
            "layer", [r for r in records if "layer" in r], lambda r: f"{float(str(r['relative_error'])):.5f}"
        ),
        _table("model", [r for r in records if "model" in r], partial(_metric, metric=metric)),
    ]
    return "\n\n".join(part for part in parts if part)


def section(records: Sequence[Record], entries: Collection[str], zoo: str) -> list[str]:
    """Lines of docs/results.md: the networks among ``entries``, and the command; none if there is no record.

    Parameters
    ----------
    records
        Lines of any number of runs.
    entries
        Names of the networks that may show.
    zoo
        What the command calls the folder with the networks.
    """
    shown = [record for record in records if record.get("model") in entries]
    names = list(dict.fromkeys(str(record["model"]) for record in shown))
    if not names:
        return []
    versions = sorted({str(record["version"]) for record in shown if "version" in record})
    counts = list(dict.fromkeys(int(str(record["images"])) for record in shown))
    images = " or ".join(f"{count:,}" for count in counts)
    given = " ".join(f"--entry {name}" for name in names)
    return [
        "",
        f"## onnxsim {', '.join(version.removeprefix('v') for version in versions)}",
        "",
        _TEXT.format(images=images),
        "",
        *tables(shown, "top1").splitlines(),
        "",
        "```sh",
        f"python tools/compare_onnxsim.py --zoo {zoo} {given} --images {max(counts)} "
        "--onnxsim-python onnxsim-env/bin/python --lines onnxsim.jsonl",
        "```",
    ]


def _metric(record: Record, metric: str) -> str:
    metrics = record["metrics"]
    assert isinstance(metrics, dict)
    value = f"{metrics[metric]:.2f}" if metric in metrics else "-"
    reached = f"{100 * float(str(record.get('reached', 0))):.1f}"
    asked = f"{100 * float(str(record.get('sparsity', 0))):.1f}"
    return value if reached == asked else f"{value} ({reached})"


def _table(what: str, records: Sequence[Record], cell: Callable[[Record], str]) -> str:
    """One line per layer or model, pattern and sparsity; a dense value stands in every line of its model."""
    if not records:
        return ""
    dense = {str(r[what]): cell(r) for r in records if r["method"] == "dense"}
    methods = list(dict.fromkeys(str(r["method"]) for r in records if r["method"] != "dense"))
    lines: dict[tuple[str, str, float], dict[str, str]] = {}
    for record in records:
        if record["method"] != "dense":
            key = str(record[what]), str(record["pattern"]), float(str(record["sparsity"]))
            lines.setdefault(key, {})[str(record["method"])] = cell(record)
    head = [what, "pattern", "sparsity", *(["dense"] if dense else []), *methods]
    rows = [
        [name, pattern, f"{sparsity:g}", *([dense.get(name, "-")] if dense else [])]
        + [found.get(method, "-") for method in methods]
        for (name, pattern, sparsity), found in lines.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])
