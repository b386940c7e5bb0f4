"""One HTML page of runs side by side, with all it needs inside: no server, no network."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from etflight.reporting import tables
from etflight.reporting.frames import frames
from etflight.reporting.groups import Section
from etflight.reporting.reading import finite, noting, read_classes, read_json, read_table, series
from etflight.reporting.results import Result
from etflight.runs.folder import CONFIG, METRICS, PER_CLASS, RECORD
from etflight.utils.errors import UserError
from etflight.utils.files import replacing
from etflight.utils.terminal import plain
from etflight.utils.yaml import read_yaml

MARK = '<meta name="generator" content="etflight report">'  # it marks pages of ours
CURVES = {
    "val/acc": "accuracy, validation",
    "val/acc_many": "many-shot classes",
    "val/acc_medium": "medium-shot classes",
    "val/acc_few": "few-shot classes",
    "nc/train/nc1": "NC1, training images",
    "nc/train/alignment": "alignment, training images",
    "nc/train/etf_distance": "distance of the class means to an ETF",
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "train/lr": "learning rate",
}
_MOST_POINTS = 1000  # per curve
_CLASS = ".class_path"


def write_page(path: Path, sections: Sequence[Section]) -> list[str]:
    """Write the page; an existing page of ours is replaced.

    Args:
        path: The page's file.
        sections: The runs, by data set and imbalance ratio.

    Returns:
        The problems with files of the runs; the page shows the rest.

    Raises:
        UserError: Plotly is missing, another program's file is there, or the file cannot be written.
    """
    try:
        plotly = import_module("plotly.offline")  # by name: it has no types, and may be missing
    except ImportError:
        raise UserError("a page needs plotly: pip install 'etflight[report]'") from None
    remarks: list[str] = []
    content = {
        "version": version("etflight"),
        "caption": tables.CAPTION,
        "curves": CURVES,
        "missing": tables.MISSING,
        "sections": [_section(section, remarks) for section in sections],
    }
    parts = {
        "MARK": MARK,
        "STYLE": _part("page.css"),
        # a script ends at the first "</", even within a text of JSON
        "DATA": json.dumps(content, allow_nan=False).replace("<", r"\u003c"),
        # whole, 4.9 MB: its Python package has no smaller bundle, and one of our own would be a copy to keep secure
        "PLOTLY": plotly.get_plotlyjs(),
        "SCRIPT": _part("page.js"),
    }
    html = "".join(parts.get(piece, piece) for piece in _part("page.html").split("@@"))
    try:
        if path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
            raise UserError(f"{path} exists and is no page of etflight report, so it stays as it is: give another name")
        with replacing(path) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): give another name") from error
    return remarks


def _part(name: str) -> str:
    return (files("etflight.reporting") / name).read_text(encoding="utf-8")


# What the page draws, as plain data -----------------------------------------------------------------------------------


def _section(section: Section, remarks: list[str]) -> dict[str, Any]:
    configurations: dict[str, Mapping[str, Any]] = {}
    runs = [_run(result, configurations, remarks) for result in section.results]
    # the hardware stands below, with each run
    columns = tables.filled_columns(tables.HEADER[:-1], [row[:-1] for row in tables.rows(section)])
    return {
        "title": plain(section.title),
        "header": list(columns),
        "rows": list(zip(*columns.values(), strict=True)),
        "paired": {"header": tables.PAIRED_HEADER, "rows": tables.comparisons(section)},
        "published": {"header": tables.PUBLISHED_HEADER, "rows": tables.published(section)},
        "arms": [plain(group.arm) for group in section.groups],
        "notes": tables.notes(section),
        "runs": runs,
        "differences": _differences(configurations),
    }


def _run(result: Result, configurations: dict[str, Mapping[str, Any]], remarks: list[str]) -> dict[str, Any]:
    folder = Path(result.source)
    here = folder.absolute().is_relative_to(Path.cwd())
    name = plain(folder.absolute().relative_to(Path.cwd()) if here else folder)

    def part(read: Callable[[Path], Any]) -> Any:
        if (folder / RECORD).is_file():  # else it is a record of a result file
            with noting(remarks):
                return read(folder)
        return None

    curves, classes, shots, versions, config = map(part, (_curves, _classes, frames, _versions, _config))
    if config is not None:
        configurations[name] = config
    facts = {
        "hardware": result.hardware,
        "time": None if result.seconds is None else tables.duration(result.seconds),
        "epochs": result.epochs,
        "validation images": result.validation,
        "fingerprint of the training images": result.fingerprint,
        "versions": versions,
        "commit": result.commit and result.commit[:12],
        "command": result.command,
    }
    return {
        "name": name,
        "arm": plain(result.arm),
        "seed": plain("?" if result.seed is None else result.seed),
        "facts": {key: tables.MISSING if value is None else plain(value) for key, value in facts.items()},
        "curves": curves or {},
        "classes": classes,
        "frames": shots,
    }


def _curves(folder: Path) -> dict[str, Any]:
    """For each metric, the numbers of finished epochs and the values."""
    path = folder / METRICS
    rows = read_table(path) if path.is_file() else []
    losses, steps = series(path, rows, "train/loss"), series(path, rows, "train/loss", "step")
    per_epoch = (steps[-1][0] + 1) / (losses[-1][0] + 1) if losses and steps else math.nan
    found = {}
    for name in CURVES:
        points = list(zip(series(path, rows, name), series(path, rows, name, "step"), strict=False))
        every = -(-len(points) // _MOST_POINTS) or 1
        x: list[float] = []
        y: list[float | None] = []
        for (epoch, value), (step, _) in points[::-every][::-1]:
            # several in one epoch are told apart by their steps; step 0 is before training
            finished = epoch + 1 if math.isnan(per_epoch) else (step + 1) / per_epoch
            x.append(0.0 if step == 0 and epoch == 0 and per_epoch > 1 else float(f"{finished:.6g}"))
            y.append(None if finite(value) is None else float(f"{value:.5g}"))
        if x:
            found[name] = [x, y]
    return found


def _classes(folder: Path) -> dict[str, Any] | None:
    """The name, number of training images and test accuracy of each class."""
    path = folder / PER_CLASS
    if not path.is_file():
        return None
    rows = read_classes(path)
    return {
        "names": [plain(row.name) for row in rows],
        "counts": [row.train_images for row in rows],
        "acc": [finite(row.acc) for row in rows],
    }


def _versions(folder: Path) -> str | None:
    versions = read_json(folder / RECORD).get("versions")
    return ", ".join(f"{name} {number}" for name, number in versions.items()) if isinstance(versions, dict) else None


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    return dict(_flat(read_yaml(path))) if path.is_file() else None


def _flat(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """The dotted names and the values of a configuration."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _differences(configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options in which runs differ: the names of the runs, and rows of an option and its value in each run.

    Where runs have different classes, the class and its options are one row, because the options of one mean nothing to the other.
    """

    def differ(key: str) -> bool:
        return len({_shown(config.get(key, tables.MISSING)) for config in configurations.values()}) > 1

    keys = [key for key in dict.fromkeys(key for config in configurations.values() for key in config) if differ(key)]
    classes = [key.removesuffix(_CLASS) for key in keys if key.endswith(_CLASS)]
    rows = []
    for key in dict.fromkeys(next((name for name in classes if key.startswith(f"{name}.")), key) for key in keys):
        if key != "name" and not any(key.startswith(f"{name}.") for name in classes):
            values = [
                _made(config, key) if key in classes else config.get(key, tables.MISSING)
                for config in configurations.values()
            ]
            rows.append([plain(key), *(plain(_shown(value))[:200] for value in values)])
    return {"runs": list(configurations), "rows": rows}


def _made(config: Mapping[str, Any], name: str) -> str:
    """The class that a configuration has for an argument, with its options."""
    prefix = f"{name}.init_args."
    options = [f"{key.removeprefix(prefix)}={_shown(value)}" for key, value in config.items() if key.startswith(prefix)]
    path = config.get(f"{name}{_CLASS}")
    return tables.MISSING if path is None else f"{str(path).rpartition('.')[2]}({', '.join(options)})"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
