"""docs/allocation-tables.md, written from finished sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from allocation_answers import Answers, refined  # type: ignore[import-not-found]

from pot_sparsity.metrics import paired_interval
from pot_sparsity.pipeline.evaluate import distance
from pot_sparsity.recipe import OUTPUT_DISTORTION
from pot_sparsity.report.sweep_page import allocations, best_points
from pot_sparsity.report.sweep_schema import Sweep, SweepPoint

_CORRECTIONS = {
    "none": "nothing is corrected",
    "bias": "biases are corrected in one step",
    "full": "the recipe's corrections follow",
}


@dataclass(frozen=True)
class Network:
    """A classifier: its name in the zoo, its sweep, the command, and what is known picture by picture."""

    name: str
    sweep: Sweep
    command: str
    known: Mapping[str, Answers]


@dataclass(frozen=True)
class Difference:
    """By how many points another allocation is ahead, and what interval the pictures give that, if they are known."""

    points: float
    interval: tuple[float, float, float] | None

    @property
    def verdict(self) -> str:
        """Whether the pictures can tell the two apart."""
        if self.points == 0.0:
            return "equal"
        if self.interval is None:
            return "not compared picture by picture"
        if self.interval[1] <= 0.0 <= self.interval[2]:
            return "within the noise"
        return "behind" if self.points > 0.0 else "ahead"

    def __str__(self) -> str:
        interval = self.interval
        ends = "" if interval is None else f" [{interval[1]:+.2f}, {interval[2]:+.2f}]"
        return f"{self.points:+.2f}{ends}, {self.verdict}"


@dataclass(frozen=True)
class Contest:
    """A point at which another allocation does at least as well as output distortion.

    Attributes
    ----------
    difference
        To output distortion, as the sweep has it.
    refined
        To output distortion with zeros allocated again in the sparse model, where that is known.
    again
        Metrics of that model.
    """

    network: str
    own: SweepPoint
    rival: SweepPoint
    difference: Difference
    refined: Difference | None
    again: Mapping[str, float] | None

    def compared(self, measure: Callable[[Mapping[str, float]], float]) -> tuple[float, float, float | None]:
        """A distance to the dense network: of the other allocation, of output distortion, and of it refined."""
        again = None if self.again is None else measure(self.again)
        return measure(self.rival.metrics), measure(self.own.metrics), again


def pairs(sweep: Sweep) -> list[tuple[SweepPoint, SweepPoint]]:
    """Output distortion's point and another allocation's, of all that were asked for the same."""
    own = {(p.budget, p.bound): p for p in sweep.points if p.allocation == OUTPUT_DISTORTION}
    others = [p for p in sweep.points if p.allocation != OUTPUT_DISTORTION and (p.budget, p.bound) in own]
    others.sort(key=lambda point: (point.budget, point.bound))
    return [(own[point.budget, point.bound], point) for point in others]


def contests(name: str, sweep: Sweep, known: Mapping[str, Answers]) -> list[Contest]:
    """Where output distortion does not win, with the paired interval of the difference where pictures are known."""
    metric = sweep.data.metric
    found = []
    for own, rival in pairs(sweep):
        ahead = rival.metrics[metric] - own.metrics[metric]
        if ahead < 0.0:
            continue
        again = known.get(refined(own.bound))
        found.append(
            Contest(
                name,
                own,
                rival,
                Difference(ahead, _interval(known.get(own.id), known.get(rival.id))),
                None
                if again is None
                else Difference(
                    rival.metrics[metric] - again.metrics[metric], _interval(again, known.get(rival.id))
                ),
                None if again is None else again.metrics,
            )
        )
    return found


def output_error(metrics: Mapping[str, float]) -> float:
    """Energy of the output's error relative to the output's."""
    return distance(dict(metrics))[1]


def logit_kl(metrics: Mapping[str, float]) -> float:
    """Divergence of the class scores."""
    return metrics["logit_kl"]


def _interval(own: Answers | None, rival: Answers | None) -> tuple[float, float, float] | None:
    if own is None or rival is None:
        return None
    difference, low, high = paired_interval(own.right, rival.right)
    return difference, low, high


def page(networks: Sequence[Network]) -> str:
    """The whole page; sweeps of one call share solver and correction."""
    solvers = dict.fromkeys(_solver(network.sweep) for network in networks)
    corrections = dict.fromkeys(_CORRECTIONS[network.sweep.correction] for network in networks)
    lines = [
        "# Allocations compared",
        "",
        "This page is generated by `tools/compare_allocations.py`; do not edit it. `$ZOO` is a folder with the",
        "networks and data, `cache` one that keeps the sweeps:",
        "",
        "```sh",
        "python tools/compare_allocations.py --zoo $ZOO --cache cache",
        "```",
        "",
        "Every allocation ([allocations.md](allocations.md)) divides the same number of zeros among the layers. All",
        f"else is the same in all rows: {' and '.join(f'`{name}`' for name in solvers)} prunes the layers, and",
        f"{' or '.join(corrections)}. These are the points of a sweep ([sweep.md](sweep.md)), which tell allocations",
        "apart: `optimize` also fits every layer to the inputs that the sparse model gives it, and ends higher.",
        "",
        "Top-1 in percent, behind it the agreement with the dense network's answers; the best of a column is bold.",
        *_versions(networks),
    ]
    for network in networks:
        lines += section(network)
    return "\n".join([*lines, *closing(networks)]) + "\n"


def section(network: Network) -> list[str]:
    """One network: its table and its command."""
    sweep, metric = network.sweep, network.sweep.data.metric
    bounds = sorted({point.bound for point in sweep.points})
    best = best_points(sweep)
    found = {(point.allocation, point.bound): point for point in sweep.points}
    rows = [
        [f"`{name}`", *(_cell(found.get((name, bound)), metric, best) for bound in bounds)]
        for name in allocations(sweep)
    ]
    zeros = [
        _span([100.0 * point.sparsity for point in sweep.points if point.bound == bound]) for bound in bounds
    ]
    return [
        "",
        f"## {network.name}",
        "",
        f"Dense: {sweep.dense.metrics[metric]:.2f} on {sweep.data.validation:,} pictures; "
        f"{sweep.data.calibration:,} calibration samples.",
        "",
        *table(["", *(f"{100.0 * bound:g} %" for bound in bounds)], [*rows, ["zeros, %", *zeros]]),
        "",
        "```sh",
        network.command,
        "```",
    ]


def closing(networks: Sequence[Network]) -> list[str]:
    """Where output distortion does not win, by how much, and whether the pictures can tell."""
    lost = [c for network in networks for c in contests(network.name, network.sweep, network.known)]
    total = sum(len(pairs(network.sweep)) for network in networks)
    lines = [
        "",
        "## Where output distortion does not win",
        "",
        f"Compared are a network, a sparsity and another allocation: {total} times. Output distortion has the higher",
        f"top-1 in {total - len(lost)} of them.",
    ]
    if not lost:
        return lines
    return [
        *lines,
        f"In the other {len(lost)}, listed here, the difference is the other allocation's top-1 less output",
        "distortion's, in points, with its 95 % interval (paired: from the pictures that only one of the two gets",
        "right). Where that holds zero the difference is within the noise, else output distortion is behind (or",
        "ahead).",
        "",
        "A sweep measures what layers do to the output of the dense model. `optimize` then measures it again in the",
        "sparse model and allocates once more (`allocation.refine`); *refined* is that, with the same solver and the",
        "same correction as all others.",
        "",
        "The output error (the energy of the error of the network's output, relative to the output's) and logit KL are",
        "measured on the same pictures: the other allocation's / output distortion's / refined.",
        "",
        *table(
            ("network", "zeros", "allocation", "difference", "to refined", "output error", "logit KL"),
            [_contest_row(contest) for contest in lost],
        ),
        "",
        *_summary(lost),
    ]


def _summary(lost: Sequence[Contest]) -> list[str]:
    """What the table says, counted."""
    behind = [contest for contest in lost if contest.difference.verdict == "behind"]
    errors, divergences = (
        sum(own < other for other, own, _ in (contest.compared(measure) for contest in lost))
        for measure in (output_error, logit_kl)
    )
    lines = [
        f"Of these {len(lost)} differences {_count(lost, 'equal')} are none at all, {_count(lost, 'within the noise')} "
        f"are within the noise of the pictures, and output distortion is behind in {len(behind)}{_places(behind)}.",
        f"In {errors} of the {len(lost)} it nevertheless has the smaller output error, in {divergences} the smaller "
        "logit KL.",
        "Where the distance that it minimises is the smaller one, that distance does not rank these models as top-1 "
        "does; elsewhere what single layers do to the output does not add up to what they do together.",
    ]
    if unknown := _count(lost, "not compared picture by picture"):
        lines.insert(1, f"{unknown} are not compared picture by picture yet and count as neither.")
    again = [contest.refined for contest in lost if contest.refined is not None]
    if again:
        still = [c for c in lost if c.refined is not None and c.refined.verdict == "behind"]
        won = sum(each.points < 0.0 for each in again)
        lines.append(
            f"Refined, it has the higher top-1 in {won} of {len(again)}, and is behind by more than the noise in "
            f"{len(still)}{_places(still)}."
        )
    return lines


def _count(lost: Sequence[Contest], verdict: str) -> int:
    return sum(contest.difference.verdict == verdict for contest in lost)


def _places(found: Sequence[Contest]) -> str:
    """Networks and sparsities, in brackets."""
    places: dict[str, dict[str, None]] = {}
    for contest in found:
        places.setdefault(contest.network, {})[f"{100.0 * contest.own.bound:g} %"] = None
    listed = "; ".join(f"{name} at {', '.join(bounds)}" for name, bounds in places.items())
    return f" ({listed})" if listed else ""


def _contest_row(contest: Contest) -> list[str]:
    return [
        contest.network,
        f"{100.0 * contest.own.bound:g} %",
        f"`{contest.rival.allocation}`",
        str(contest.difference),
        "-" if contest.refined is None else str(contest.refined),
        *(
            " / ".join("-" if value is None else f"{value:.3g}" for value in contest.compared(measure))
            for measure in (output_error, logit_kl)
        ),
    ]


def _cell(point: SweepPoint | None, metric: str, best: set[str]) -> str:
    if point is None:
        return "-"
    value = f"{point.metrics[metric]:.2f}"
    return f"{f'**{value}**' if point.id in best else value} ({point.metrics['agreement']:.1f})"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _solver(sweep: Sweep) -> str:
    pruning = sweep.recipe.get("pruning")
    return str(pruning["method"]) if isinstance(pruning, Mapping) else "?"


def _versions(networks: Iterable[Network]) -> list[str]:
    """Machines and versions, once each."""
    found: dict[str, None] = {}
    for network in networks:
        machine, versions = network.sweep.machine, network.sweep.versions
        packages = [
            f"Python {versions.python}",
            *(f"{name} {text}" for name, text in versions.packages.items()),
        ]
        found[f"Measured on {machine.processor}; {', '.join(packages)}."] = None
    return ["", *found] if found else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
