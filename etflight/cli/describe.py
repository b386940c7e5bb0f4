"""`etflight describe …`: what a data set holds and what a configuration makes of it, without model or training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from rich.console import Group
from rich.table import Table

from etflight import plotting
from etflight.analysis.describe import contact_sheet, describe
from etflight.cli.command import Asked, Results, command, show, show_place
from etflight.data.facts import other_images
from etflight.metrics.accuracy import by_frequency
from etflight.runs.folder import ROOT, read_record, run_of
from etflight.utils.errors import warn
from etflight.utils.fingerprints import fingerprint_in
from etflight.utils.terminal import as_it_is

RECORD = "describe.json"  # marks a folder as one of this command's
HISTOGRAM, SHEET = "class_histogram.png", "contact_sheet.png"
_MOST_LINES = 60  # of the histogram on the terminal; with more classes, neighbours share a line
_BAR = 40  # characters of the longest bar


@dataclass
class Options:
    """The contact sheet.

    Attributes:
        images_per_class: Images in a row of the contact sheet, at most.
        augmented: Whether the contact sheet shows images as a training step gets them, not as they are stored.
    """

    images_per_class: PositiveInt = 8
    augmented: bool = False


@command(
    "describe",
    "Show what a data set holds: counts, shot groups, a histogram, a contact sheet; no model, no training.",
    Options,
    run="Run folder, or a checkpoint in one, whose data to describe, unless --data or -c say otherwise.",
    output=f"Folder for {RECORD}, {HISTOGRAM} and {SHEET}. Default: runs/describe/<data set>_<fingerprint of its subset>.",
    runs="at most one",
    accelerator=False,
)
def main(asked: Asked[Options]) -> None:
    """Print counts, shot groups and a histogram, and write `describe.json`, a histogram and a contact sheet."""
    data = asked.data()
    record = describe(data)
    if asked.runs and (run := run_of(Path(asked.run))) is not None:
        trained_on = fingerprint_in(read_record(run).get("data"))
        if differ := other_images((), trained_on, data):
            warn(differ)
    folder = Path(asked.output or Path(ROOT, "describe", f"{record['dataset']}_{record['fingerprint']}"))
    results = Results(folder / RECORD, {"dataset": record["dataset"]}, (HISTOGRAM, SHEET))
    histogram = plotting.class_histogram(record["class_counts"]["train"], data.class_names, title=str(data))
    results.write(record, {HISTOGRAM: histogram, SHEET: contact_sheet(data, **vars(asked.options))})
    show(_text(record, data.describe_ratio(), data.cost_of_validation))
    show_place(folder, f"{RECORD}, {HISTOGRAM}, {SHEET}")


# On the terminal ----------------------------------------------------------------------------------------------------


def _text(record: dict[str, Any], ratio: str, cost_of_validation: str | None) -> Group:
    channels, height, width = record["image_shape"]
    shape = f"{height} × {width} pixels and {channels} channel{'s'[: channels > 1]}"
    head = (
        f"{record['name']}: {len(record['class_names'])} classes, images of {shape}",
        f"imbalance ratio {ratio}, subset {record['fingerprint']}, validation: {record['validation']}",
        *filter(None, [cost_of_validation]),
    )
    tables = _splits(record), _groups(record), _histogram(record)
    return Group(*map(as_it_is, head), *(part for table in tables for part in ("", table)), "")


def _splits(record: dict[str, Any]) -> Table:
    table = _table("split", "images", "classes", "largest class", "smallest class")
    for name, counts in record["class_counts"].items():
        own = np.array(counts)
        table.add_row(name, *(f"{n:,}" for n in (own.sum(), (own > 0).sum(), own.max(), own.min())))
    return table


def _groups(record: dict[str, Any]) -> Table:
    table = _table("shot group", "classes", "training images", "test images")
    counts = {name: np.array(own) for name, own in record["class_counts"].items()}
    for group, members in record["shot_groups"].items():
        own = (counts[split][members].sum() for split in ("train", "test"))
        table.add_row(group, *(f"{n:,}" for n in (len(members), *own)))
    return table


def _histogram(record: dict[str, Any]) -> Table:
    """A bar per class, from the most to the fewest training images; with many classes, a bar per group of neighbours, of their mean."""
    counts = np.array(record["class_counts"]["train"])
    order = by_frequency(torch.from_numpy(counts)).numpy()
    group_of = {label: group for group, members in record["shot_groups"].items() for label in members}
    table = _table("classes", "training images", "shot group", "")
    for own in np.array_split(order, min(len(order), _MOST_LINES)):
        first, last = own[0], own[-1]
        alone = first == last
        name = record["class_names"][first] if alone else f"{record['class_names'][first]} … ({len(own)})"
        images = f"{counts[first]:,}" if alone else f"{counts[first]:,} … {counts[last]:,}"
        groups = " … ".join(dict.fromkeys(group_of[int(label)] for label in (first, last)))
        length = max(1, round(_BAR * float(counts[own].mean()) / int(counts.max())))
        table.add_row(as_it_is(name), images, groups, "█" * length)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True, max_width=36)
    for title in others:
        table.add_column(title, justify="right" if "images" in title or "class" in title else "left", no_wrap=True)
    return table
