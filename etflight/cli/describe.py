"""`etflight describe …`: what a data set holds and what a configuration makes of it, without model or training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from rich.console import Group
from rich.table import Table
from torch import Tensor

from etflight import plotting
from etflight.cli.data_option import data_parser, parse_over_run
from etflight.cli.parser import OneLineParser, add_imports
from etflight.data import ImageDataModule
from etflight.data.facts import other_images
from etflight.data.profiles import positions_by_class
from etflight.data.sources import Split
from etflight.metrics.accuracy import by_frequency, shot_groups
from etflight.runs.folder import ROOT, check_writable, read_record, refuse_other_results, run_of
from etflight.utils.arrays import evenly
from etflight.utils.errors import UserError, warn
from etflight.utils.files import write_json
from etflight.utils.fingerprints import fingerprint_in
from etflight.utils.terminal import as_it_is, console

RECORD = "describe.json"  # marks a folder as one of this command's
HISTOGRAM, SHEET = "class_histogram.png", "contact_sheet.png"
_MOST_LINES = 60  # of the histogram on the terminal; with more classes, neighbours share a line
_MOST_CLASSES = 44  # on the contact sheet: two blocks of rows
_BAR = 40  # characters of the longest bar


def main(argv: Sequence[str]) -> None:
    """Print counts, shot groups and a histogram, and write `describe.json`, a histogram and a contact sheet.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    config = parse_over_run(parser, argv)
    data: ImageDataModule = parser.instantiate(config).data
    data.prepare_data()
    record = describe(data)
    if config.run is not None and (run := run_of(Path(config.run))) is not None:
        trained_on = fingerprint_in(read_record(run).get("data"))
        if differ := other_images((), trained_on, data):
            warn(differ)
    folder = Path(config.output or Path(ROOT, "describe", f"{record['dataset']}_{record['fingerprint']}"))
    check_writable(folder, "output")
    refuse_other_results(folder / RECORD, {"dataset": record["dataset"]}, (HISTOGRAM, SHEET))
    out = console()
    write_json(folder / RECORD, record)
    histogram = plotting.class_histogram(record["class_counts"]["train"], data.class_names, title=str(data))
    plotting.save(histogram, folder / HISTOGRAM)
    plotting.save(sheet(data, config.images_per_class, augmented=config.augmented), folder / SHEET)
    out.print(_text(record, data.describe_ratio(), data.cost_of_validation))
    out.print(as_it_is(f"{folder}: {RECORD}, {HISTOGRAM}, {SHEET}"), style="dim", soft_wrap=True)


def describe(data: ImageDataModule) -> dict[str, Any]:
    """The facts about a set's images, as plain data.

    Args:
        data: A data module, which is read as far as needed.

    Returns:
        `class`, `dataset`, `name`, `image_shape` `[C, H, W]`, `class_names`, `fingerprint`, `imbalance_ratio` and `count_ratio` of the
        training images (`data.ratios`), `validation`, `class_counts` (`[K]` each of `train`, `test` and, if it is held out, `val`) and
        `shot_groups` (the labels in each).
    """
    splits: list[Split] = ["train", "val", "test"] if data.val_is_held_out else ["train", "test"]
    counts = {name: np.bincount(data.split(name).labels.numpy(), minlength=data.num_classes) for name in splits}
    groups = shot_groups(torch.from_numpy(counts["train"]))
    return {
        "class": type(data).__name__,
        "dataset": data.dataset_name,
        "name": str(data),
        "image_shape": list(data.preprocessing.input_size),
        "class_names": data.class_names,
        "fingerprint": data.fingerprint,
        **data.ratios,
        "validation": data.validation,
        "class_counts": {name: own.tolist() for name, own in counts.items()},
        "shot_groups": {group: members.nonzero().flatten().tolist() for group, members in groups.items()},
    }


def sheet(data: ImageDataModule, images_per_class: int, *, augmented: bool = False) -> Any:
    """A contact sheet of training images, evenly chosen from each class.

    If there are many classes, it shows an even choice of them by size.

    Args:
        data: The data module.
        images_per_class: The most images of a class.
        augmented: Show them as a training step gets them, not as they are stored.

    Returns:
        The figure of `plotting.contact_sheet`.

    Raises:
        UserError: No image of the sheet can be read.
    """
    counts, split = data.class_counts, data.split("train")
    order = by_frequency(torch.from_numpy(counts)).numpy()
    shown = order[evenly(len(order), _MOST_CLASSES)]
    by_class = positions_by_class(split.labels.numpy(), len(counts))
    chosen = [by_class[k][evenly(counts[k], images_per_class)] for k in shown]
    # corrupt images are missing here, if they are to be skipped
    images, labels = split.__getitems__(np.concatenate(chosen).tolist())
    split.end_pass()
    if len(images) == 0:
        raise UserError(f"{data}: no image of the contact sheet can be read: replace the files")
    if augmented:
        images = _augmented(data, images, labels)
    row_of = np.zeros(len(order), np.int64)
    row_of[shown] = np.arange(len(shown))
    rows = torch.from_numpy(row_of)[labels]
    names = [data.class_names[k] for k in shown]
    part = "" if len(shown) == len(order) else f", {len(shown)} of {len(order)} classes"
    return plotting.contact_sheet(images, rows, names, counts[shown].tolist(), title=f"{data}{part}")


def _augmented(data: ImageDataModule, images: Tensor, labels: Tensor) -> Tensor:
    """Uint8 images as one training step gets them, before they are normalised."""
    changed, _ = data.train_transform((images, labels), step=0)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    first_views = changed[: len(images)]
    return ((first_views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


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


def _parser() -> OneLineParser:
    parser = data_parser(
        "describe",
        "Show what a data set holds: counts, shot groups, a histogram, a contact sheet; no model, no training.",
    )
    parser.add_argument(
        "run",
        type=str | None,
        nargs="?",
        default=None,
        help="Run folder, or a checkpoint in one, whose data to describe, unless --data or -c say otherwise.",
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"Folder for {RECORD}, {HISTOGRAM} and {SHEET}. Default: runs/describe/<data set>_<fingerprint of its subset>.",
    )
    parser.add_argument(
        "--images_per_class", type=PositiveInt, default=8, help="Images in a row of the contact sheet, at most."
    )
    parser.add_argument(
        "--augmented",
        type=bool,
        default=False,
        help="Whether the contact sheet shows images as a training step gets them, not as they are stored.",
    )
    add_imports(parser)
    return parser
