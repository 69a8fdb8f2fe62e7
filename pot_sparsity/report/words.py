"""How numbers and names of a report are put into words, the same on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pot_sparsity.report.schema import Variant

ABSENT = "–"
VARIANT_TITLES = {"dense_int8": "dense INT8", "sparse_int8": "sparse INT8", "mixed": "few-bit"}
METRIC_TITLES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "agreement": "agreement %",
    "detection_agreement": "detection agreement %",
    "detection_overlap": "detection overlap %",
    "logit_kl": "logit KL",
    "sqnr": "SQNR dB",
    "output_mse": "output MSE",
}
_DECIMALS = {
    "top1": 2,
    "top5": 2,
    "agreement": 2,
    "detection_agreement": 2,
    "detection_overlap": 2,
    "logit_kl": 4,
    "sqnr": 1,
}


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def variant_title(name: str) -> str:
    """Name of a variant as people read it."""
    return VARIANT_TITLES.get(name, name)


def metric_title(name: str) -> str:
    """Name of a metric with its unit."""
    return METRIC_TITLES.get(name, name)


def metric_value(name: str, value: float | None) -> str:
    """A metric with the decimals that mean something."""
    if value is None:
        return ABSENT
    decimals = _DECIMALS.get(name)
    return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"


def metric_names(metrics: Iterable[dict[str, float]]) -> list[str]:
    """Every metric that occurs, those known in their usual order first."""
    found = {name: None for values in metrics for name in values}
    known = [name for name in METRIC_TITLES if name in found]
    return known + [name for name in found if name not in METRIC_TITLES]


def main_metrics(metrics: Iterable[dict[str, float]], watched: str) -> list[str]:
    """What fits on a terminal: the watched metric and the agreement with the dense model."""
    names = metric_names(metrics)
    return [name for name in dict.fromkeys((watched, "agreement")) if name in names] or names[:2]


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics on one line."""
    values = ((metric_title(name), metric_value(name, metrics[name])) for name in metric_names([metrics]))
    return ", ".join(f"{title.removesuffix(' %')} {value}" for title, value in values) or ABSENT


def paired_metric(variants: Sequence[Variant], watched: str) -> str | None:
    """The metric whose paired difference to the dense model is shown; None where none was taken."""
    known = [name for variant in variants for name in variant.interval]
    return watched if watched in known else next(iter(known), None)


def interval(variant: Variant, metric: str) -> str:
    """Paired difference to the dense model with its interval, in points of the metric."""
    if metric not in variant.interval:
        return ABSENT
    difference, low, high = variant.interval[metric]
    return f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"


def percent(part: float, whole: float = 1.0) -> str:
    """A fraction as percent."""
    return f"{100.0 * part / whole:.1f} %" if whole else ABSENT


def size(number: int | None) -> str:
    """Bytes in the unit that reads best (1 kB = 1000 bytes)."""
    if number is None:
        return ABSENT
    if number < 1000:
        return f"{number} B"
    if number < 1_000_000:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e6:.2f} MB"


def amount(number: float) -> str:
    """A cost of any unit: whole from a thousand on, with thousands separated, else four digits."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def milliseconds(value: float | None) -> str:
    """A latency."""
    return ABSENT if value is None else f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def seconds(value: float) -> str:
    """A duration."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def small(value: float | None) -> str:
    """A number of unknown magnitude, such as a layer error."""
    return ABSENT if value is None else f"{value:.3g}"


def shape(extents: list[int | None] | None) -> str:
    """A tensor's shape; free extents are question marks."""
    if extents is None:
        return "of unknown rank"
    return "[" + ", ".join("?" if extent is None else str(extent) for extent in extents) + "]"
