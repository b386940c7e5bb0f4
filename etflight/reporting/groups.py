"""Results grouped by data set, imbalance ratio and arm, over seeds."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

from etflight.reporting.results import Result


class Stat(NamedTuple):
    """Of one number over the runs of a group.

    Attributes:
        mean: over the runs that have it.
        std: sample standard deviation (n - 1), None for one run.
        runs: how many have it.
    """

    mean: float
    std: float | None
    runs: int


@dataclass(frozen=True)
class Group:
    """The runs of one arm, one per seed.

    Attributes:
        arm: its name.
        results: of each run.
    """

    arm: str
    results: Sequence[Result]

    def stat(self, metric: str) -> Stat | None:
        """Over the runs that have a metric; None if none has."""
        return statistics([r.metrics[metric] for r in self.results if metric in r.metrics])

    def seconds(self) -> Stat | None:
        """Training time over the runs that know it."""
        return statistics([r.seconds for r in self.results if r.seconds is not None])

    def different(self, name: str) -> list[Any]:
        """The different values of a fact, in order, without the unknown."""
        return _different(getattr(r, name) for r in self.results)


@dataclass(frozen=True)
class Section:
    """The arms on one data set at one imbalance ratio, beside what was published of it.

    Attributes:
        dataset: its name, with what tells it from another of the same name where there is one; None is unknown.
        ratio: None is unknown.
        groups: one per arm, in the order in which they were given.
        published: entries of `published.json`: `method`, `backbone`, `test/acc`, `read_in`, perhaps `epochs`.
    """

    dataset: str | None
    ratio: float | None
    groups: Sequence[Group]
    published: Sequence[dict[str, Any]]

    @property
    def title(self) -> str:
        """For people."""
        ratio = "unknown imbalance ratio" if self.ratio is None else f"imbalance ratio {self.ratio:g}"
        return f"{self.dataset or 'unknown data set'}, {ratio}"

    def different(self, name: str) -> list[Any]:
        """The different values of a fact over all arms, in order, without the unknown."""
        return _different(getattr(r, name) for group in self.groups for r in group.results)


def statistics(values: Sequence[float]) -> Stat | None:
    """Mean and sample standard deviation; None of nothing."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(value / n for value in values)
    std = math.hypot(*(value - mean for value in values)) / math.sqrt(n - 1) if n > 1 else None
    return Stat(mean, std, n)


def group(results: Iterable[Result]) -> tuple[list[Section], list[str]]:
    """Sections in the order in which they were given, and what is doubtful about them.

    Two sets of one name have a section each; a run whose record does not tell which is in that of the one there is, else in one of its own.
    A run whose seed an arm has already is left out, and so is one of another number of classes than the section's first.
    """
    remarks: list[str] = []
    published = json.loads((files("etflight.reporting") / "published.json").read_text())
    sections = []
    results = list(results)
    contents = {
        name: {r.content for r in members} - {None} for (name,), members in _split(results, lambda r: (r.dataset,))
    }

    def place(r: Result) -> tuple[str | None, float | None, str | None]:
        return r.dataset, r.ratio, r.content if len(contents[r.dataset]) > 1 else None

    for (dataset, ratio, content), members in _split(results, place):
        kept = _of_same_classes(members, remarks)
        groups = [Group(arm, _one_per_seed(same, remarks)) for (arm,), same in _split(kept, lambda r: (r.arm,))]
        beside = [entry for entry in published if (entry["dataset"], entry["ratio"]) == (dataset, ratio)]
        section = Section(f"{dataset} {content}" if content else dataset, ratio, groups, beside)
        sections.append(section)
        for g in groups:
            if len(g.different("config_sha256")) > 1:
                remarks.append(
                    f"{section.title}: the runs of {g.arm} have different configurations, not only seeds: "
                    f"{', '.join(r.source for r in g.results)}"
                )
        for fact, what in (("choice", "trained on different images"), ("epochs", "trained for different epochs")):
            if len(values := section.different(fact)) > 1:
                remarks.append(f"{section.title}: runs were {what} ({', '.join(map(str, values))})")
    return sections, remarks


def _split(results: Iterable[Result], key: Callable[[Result], tuple[Any, ...]]) -> list[tuple[Any, list[Result]]]:
    parts: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        parts.setdefault(key(result), []).append(result)
    return list(parts.items())


def _of_same_classes(results: list[Result], remarks: list[str]) -> list[Result]:
    known = next((r for r in results if r.num_classes is not None), None)
    kept = []
    for result in results:
        if known is None or result.num_classes in (None, known.num_classes):
            kept.append(result)
        else:
            remarks.append(
                f"left out: {result.source} has {result.num_classes} classes, {known.source} of the same data set and ratio "
                f"has {known.num_classes}"
            )
    return kept


def _one_per_seed(results: list[Result], remarks: list[str]) -> list[Result]:
    """The first of each seed; runs without a seed are all different."""
    kept: dict[str, Result] = {}
    for i, result in enumerate(results):
        seed = f"unknown {i}" if result.seed is None else repr(result.seed)
        first = kept.setdefault(seed, result)
        if first is not result:
            remarks.append(
                f"left out: {result.source} is {result.arm} with seed {result.seed}, as {first.source} is: "
                "the same seed is not counted twice"
            )
    return list(kept.values())


def _different(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))
