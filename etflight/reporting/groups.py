"""Results grouped by data set, imbalance ratio and arm, over seeds."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, NamedTuple

from etflight.reporting.results import Result


class Stat(NamedTuple):
    """One number over the runs of a group.

    Attributes:
        mean: The mean over the runs that have it.
        std: The sample standard deviation (n - 1); None for one run.
        runs: The number of runs that have it.
    """

    mean: float
    std: float | None
    runs: int


@dataclass(frozen=True)
class Group:
    """The runs of one arm, one per seed.

    Attributes:
        arm: The arm's name.
        results: The result of each run.
    """

    arm: str
    results: Sequence[Result]

    def stat(self, metric: str) -> Stat | None:
        """Mean and deviation over the runs that have a metric; None if none has."""
        return _stat(r.metrics.get(metric) for r in self.results)

    def seconds(self) -> Stat | None:
        """Training time over the runs that know it; None if none does."""
        return _stat(r.seconds for r in self.results)


@dataclass(frozen=True)
class Section:
    """The arms on one data set at one imbalance ratio, with published results.

    Attributes:
        dataset: The set's name, with a part of its fingerprint if another set has the same name; None is unknown.
        ratio: The imbalance ratio; None is unknown.
        groups: One per arm, in the order in which they were given.
        published: Entries of `published.json`: `method`, `backbone`, `test/acc`, `read_in`, `selection`, and
            `params`, `epochs` and `views` where they are known.
    """

    dataset: str | None
    ratio: float | None
    groups: Sequence[Group]
    published: Sequence[dict[str, Any]]

    @property
    def title(self) -> str:
        """Data set and ratio, for people."""
        ratio = "unknown imbalance ratio" if self.ratio is None else f"imbalance ratio {self.ratio:g}"
        return f"{self.dataset or 'unknown data set'}, {ratio}"

    @property
    def results(self) -> list[Result]:
        """The results of all arms."""
        return [result for group in self.groups for result in group.results]


def different(results: Iterable[Result], fact: str) -> list[Any]:
    """The different values of a fact over results, in order; unknown ones are left out."""
    values = (getattr(result, fact) for result in results)
    return list(dict.fromkeys(value for value in values if value is not None))


def _stat(values: Iterable[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.mean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def group(results: Iterable[Result]) -> tuple[list[Section], list[str]]:
    """The sections of results, in their order, and remarks on what is doubtful about them.

    Runs of one arm whose names begin with other sets, and whose configurations differ, are arms of their own, called "arm (set)".
    Two sets of one name have a section each. A run whose record does not say which set it used goes into the section of the only set of
    that name, or into one of its own if there are several. A run is left out if its arm already has its seed, or if it has another
    number of classes than the first run of its section.
    """
    remarks: list[str] = []
    published = json.loads((files("etflight.reporting") / "published.json").read_text())
    sections = []
    results = list(results)
    contents = {name: different(members, "content") for name, members in _split(results, lambda r: r.dataset).items()}

    def place(r: Result) -> tuple[str | None, float | None, str | None]:
        return r.dataset, r.ratio, r.content if len(contents[r.dataset]) > 1 else None

    for (dataset, ratio, content), members in _split(results, place).items():
        arms = _split(_apart(_of_same_classes(members, remarks)), lambda r: r.arm)
        groups = [Group(arm, _one_per_seed(same, remarks)) for arm, same in arms.items()]
        beside = [entry for entry in published if (entry["dataset"], entry["ratio"]) == (dataset, ratio)]
        section = Section(f"{dataset} {content}" if content else dataset, ratio, groups, beside)
        sections.append(section)
        for g in groups:
            if len(different(g.results, "config_sha256")) > 1:
                remarks.append(
                    f"{section.title}: the runs of {g.arm} have different configurations, not only seeds: "
                    f"{', '.join(r.source for r in g.results)}"
                )
        for fact, what in (("choice", "trained on different images"), ("epochs", "trained for different epochs")):
            if len(values := different(section.results, fact)) > 1:
                remarks.append(f"{section.title}: runs were {what} ({', '.join(map(str, values))})")
    return sections, remarks


def _split(results: Iterable[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    parts: dict[Any, list[Result]] = {}
    for result in results:
        parts.setdefault(key(result), []).append(result)
    return parts


def _apart(results: list[Result]) -> list[Result]:
    """The results, where those of one arm on sets of other names and configurations (digits_ten, digits_thirty) are called apart."""
    called: dict[int, Result] = {}
    for arm, same in _split(results, lambda r: r.arm).items():
        parts = _split(same, lambda r: r.set_name)
        hashes = [{r.config_sha256 for r in part} for part in parts.values()]
        # a set may go by two names, and a configuration changes when the package gets a new option
        known = None not in parts and not any(None in part for part in hashes)
        if (
            known
            and all(one.isdisjoint(other) for i, one in enumerate(hashes) for other in hashes[:i])
            and len(parts) > 1
        ):
            called |= {id(r): replace(r, arm=f"{arm} ({r.set_name})") for r in same}
    return [called.get(id(result), result) for result in results]


def _of_same_classes(results: list[Result], remarks: list[str]) -> list[Result]:
    known = next((r for r in results if r.num_classes is not None), None)
    if known is None:
        return results
    others = [result for result in results if result.num_classes not in (None, known.num_classes)]
    remarks += [
        f"left out: {result.source} has {result.num_classes} classes, {known.source} of the same data set and ratio has {known.num_classes}"
        for result in others
    ]
    return [result for result in results if result not in others]


def _one_per_seed(results: list[Result], remarks: list[str]) -> list[Result]:
    """The first run of each seed on each choice of images; runs without a seed are all kept."""
    kept: dict[str, Result] = {}
    for i, result in enumerate(results):
        seed = f"unknown {i}" if result.seed is None else repr(result.seed)
        first = kept.setdefault(f"{seed} {result.choice}", result)
        if first is not result:
            remarks.append(
                f"left out: {result.source} is {result.arm} with seed {result.seed}, as {first.source} is: "
                "the same seed is not counted twice; if their options differ, give it an arm of its own, a file in arms/"
            )
    return list(kept.values())
