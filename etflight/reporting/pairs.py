"""Arms compared with one of them, paired by seed: what training order and chance did to both alike drops out of the differences."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from etflight.reporting.groups import Group, Section, different
from etflight.reporting.results import Result
from etflight.utils.errors import UserError, argument

CONFIDENCE = 0.95


class Paired(NamedTuple):
    """How far an arm is from another in one metric, over the seeds that both have.

    Attributes:
        arm: The arm.
        metric: The log name of the metric.
        pairs: What tells each pair, the seed as a rule, and its difference: the arm less the other.
        mean: The mean of the differences.
        low: The lower end of the interval of the mean by Student's t, at `CONFIDENCE`; None for one pair, which has no interval.
        high: Its upper end.
    """

    arm: str
    metric: str
    pairs: Sequence[tuple[str, float]]
    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Higher or lower where the interval excludes 0, and "not told apart" where it does not."""
        if self.low is None or self.high is None:
            return "one pair only"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "not told apart"


def compare_with(arm: str, sections: Iterable[Section]) -> list[Section]:
    """The sections, in which all other arms are to be compared with this one, wherever it is among them.

    Raises:
        UserError: It is in none of them.
    """
    sections = list(sections)
    arms = list(dict.fromkeys(group.arm for section in sections for group in section.groups))
    if arm not in arms:
        raise UserError(
            f"{argument('against', arm)}: there is no such arm among these results: give one of {', '.join(arms)}"
        )
    return [
        replace(section, against=arm if any(group.arm == arm for group in section.groups) else None)
        for section in sections
    ]


def paired(section: Section, metrics: Sequence[str]) -> list[Paired]:
    """Every other arm of a section compared with `section.against`, in each metric that a pair has; empty if nothing is compared."""
    reference, others = _arms(section)
    found = []
    for group in others:
        for metric in metrics:
            pairs = _differences(group, reference, metric) if reference else []
            if pairs:
                found.append(Paired(group.arm, metric, pairs, *_interval([difference for _, difference in pairs])))
    return found


def unpaired(section: Section) -> list[str]:
    """The runs of a section that have no counterpart of their seed and images, as "seed 3 of ce"; empty if nothing is compared."""
    reference, others = _arms(section)
    if reference is None:
        return []
    known = {_pair(result) for result in reference.results if result.seed is not None}
    shared = {_pair(result) for group in others for result in group.results if result.seed is not None}
    alone = [(r, group) for group in others for r in group.results if _pair(r) not in known]
    alone += [(r, reference) for r in reference.results if others and _pair(r) not in shared]
    return [f"seed {'?' if r.seed is None else r.seed} of {group.arm}" for r, group in alone]


def _arms(section: Section) -> tuple[Group | None, list[Group]]:
    """The arm that others are compared with, and the others."""
    reference = next((group for group in section.groups if group.arm == section.against), None)
    return reference, [group for group in section.groups if group is not reference]


def _pair(result: Result) -> tuple[str, str | None]:
    return repr(result.seed), result.choice


def _differences(group: Group, reference: Group, metric: str) -> list[tuple[str, float]]:
    known = {_pair(result): result.metrics.get(metric) for result in reference.results if result.seed is not None}
    several = len(different([*group.results, *reference.results], "choice")) > 1
    pairs = []
    for result in group.results:
        own, other = result.metrics.get(metric), known.get(_pair(result))
        if own is not None and other is not None:
            pairs.append((f"{result.seed} on {result.choice}" if several else str(result.seed), own - other))
    return pairs


def _interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean, and its confidence interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    from scipy.special import stdtrit  # here, since a report without comparisons need not wait for it

    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
