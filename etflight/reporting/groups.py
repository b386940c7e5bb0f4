"""Results grouped by data set, imbalance ratio and arm, over seeds."""

import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from etflight.reporting.results import Result

# options in which the runs of an arm differ, as `etflight.runs.record.config_sha256` has it
_OF_A_RUN = {
    "seed_everything", "name", "ckpt_path", "weights_only", "data.seed", "data.init_args.seed", "fine_tuning.checkpoint",
    "trainer.default_root_dir", "trainer.logger", "data.download", "data.images.download",
}  # fmt: skip
_SEED = re.compile(r"(^|[/_-])seed_?\d+$")
_NUMBERS = re.compile(r"-v\d+$|\d+")


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
    """The runs of one arm with one configuration, one per seed.

    Attributes:
        arm: The arm's name; "arm (run)" if runs of this arm have several configurations, or were tested at several checkpoints.
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

    Runs of one arm whose options or tested checkpoints differ are never averaged: they are groups of their own, called "arm (set)"
    if their names begin with different sets, and "arm (run)" otherwise. Two sets of one name have a section each. A run whose record does
    not say which set it used goes into the section of the only set of that name, or into one of its own if there are several. A run is
    left out if its group already has its seed, the tested one of two being kept, or if it has another number of classes than the first
    run of its section.
    """
    remarks: list[str] = []
    published = json.loads((files("etflight.reporting") / "published.json").read_text("utf-8"))
    sections = []
    results = list(results)
    contents = {name: different(members, "content") for name, members in _split(results, lambda r: r.dataset).items()}

    def place(r: Result) -> tuple[str | None, float | None, str | None]:
        return r.dataset, r.ratio, r.content if len(contents[r.dataset]) > 1 else None

    for (dataset, ratio, content), members in _split(results, place).items():
        arms = _split(_of_same_classes(members, remarks), lambda r: r.arm)
        groups = [Group(part[0].arm, part) for same in arms.values() for part in _apart(same, remarks)]
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


def _split_where_known(results: list[Result], fact: Callable[[Result], str | None]) -> list[list[Result]]:
    """Parts by a fact; where it is unknown, a result goes with all others if they agree, and is in a part of its own otherwise."""
    several = len({fact(r) for r in results} - {None}) > 1
    return list(_split(results, lambda r: fact(r) if several else None).values())


def _apart(same: list[Result], remarks: list[str]) -> list[list[Result]]:
    """The runs of one arm, one per seed, by configuration and kind of checkpoint, and called apart if there is more than one part."""
    trained: list[list[Result]] = []
    for part in _split_where_known(same, lambda r: r.config_sha256):
        if earlier := next((runs for runs in trained if _are_continued(runs, part)), None):
            earlier += part
        else:
            trained.append(part)
    tested = [part for runs in trained for part in _split_where_known(runs, _kind_of_checkpoint)]
    parts = [_one_per_seed(part, remarks) for part in tested]
    if len(parts) == 1:
        return parts
    names: tuple[Callable[[Result], str | None], ...] = (
        lambda r: r.set_name,
        lambda r: r.name and _SEED.sub("", r.name),
        lambda r: r.name,
        lambda r: Path(r.source.partition(".json[")[0]).name,
        lambda r: r.source,
    )
    called = [[name(part[0]) for part in parts] for name in names]
    found = next((labels for labels in called if all(labels) and len(set(labels)) == len(parts)), called[-1])
    return [[replace(r, arm=f"{r.arm} ({label})") for r in part] for label, part in zip(found, parts, strict=True)]


def _are_continued(runs: list[Result], others: list[Result]) -> bool:
    """Whether runs of another configuration are further seeds of the same experiment.

    The hash of a configuration also changes when the package gets a new option, so the same command at other commits, with other seeds,
    counts as the same.
    """
    commits, commands = {r.commit for r in runs + others}, {_options(r.command) for r in runs + others}
    repeated = {(r.seed, r.choice) for r in runs} & {(r.seed, r.choice) for r in others}
    return not repeated and len(commands) == 1 < len(commits) and None not in commands | commits


def _options(command: str | None) -> tuple[str, ...] | None:
    """The words of a command without the options in which runs of an arm may differ; None if they cannot be told."""
    try:
        words = iter(shlex.split(command or ""))
    except ValueError:
        return None
    kept = []
    for word in words:
        option, given, _ = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and option in _OF_A_RUN):
            kept.append(word)
        elif not given:
            next(words, None)
    return tuple(kept) or None


def _kind_of_checkpoint(r: Result) -> str | None:
    """The name of a checkpoint without numbers, which differ from seed to seed: epoch=12-step=900 is epoch=9-step=675 of another."""
    return r.checkpoint and _NUMBERS.sub("", r.checkpoint)


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
    """One run of each seed on each choice of images, the first or the first that was tested; runs without a seed are all kept."""
    kept: dict[str, Result] = {}
    for i, result in enumerate(results):
        seed = f"unknown {i}" if result.seed is None else repr(result.seed)
        key = f"{seed} {result.choice}"
        first = kept.setdefault(key, result)
        if first is not result:
            better, other = (first, result) if first.tested or not result.tested else (result, first)
            kept[key] = better
            remarks.append(
                f"left out: {other.source} is {other.arm} with seed {other.seed}, as {better.source} is"
                f"{', which was tested' if better.tested > other.tested else ''}: the same seed is not counted twice"
            )
    return list(kept.values())
