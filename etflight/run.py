"""The run folder `<default_root_dir>/<name>/`: one run, one folder, the same with every logger."""

import csv
import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from etflight.errors import UserError
from etflight.files import flush_to_disk, replacing

_PLACE_OF_RUN = "--name or --trainer.default_root_dir"
RECORD = "run.json"  # marks a folder as a run's
PACKAGES = ("etflight", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy")


def last_checkpoint(folder: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def same_folder(one: Path, other: Path | None) -> bool:
    """Whether two paths lead to one folder, which need not exist; None leads to none."""
    return other is not None and one.resolve() == other.resolve()


def claim(folder: Path, resume_from: Path | None) -> None:
    """Refuse a folder whose files training would overwrite; a run that was stopped before its first checkpoint may start again.

    Raises:
        UserError: the folder holds a checkpoint, and `resume_from` is not one of its own; or files of another program.
    """
    own = folder / "checkpoints"
    if resume_from is not None and resume_from.resolve().parent == own.resolve():
        return
    if any(not path.name.startswith(".") for path in own.glob("*.ckpt")):
        raise UserError(
            f"run folder {folder} already holds a checkpoint: give --ckpt_path last to resume it, or a new --name"
        )
    for name in ("config.yaml", "metrics.csv"):
        if os.path.lexists(folder / name) and not (folder / RECORD).is_file():
            raise UserError(
                f"run folder {folder} has a {name} but no {RECORD}, so it is not one of etflight's and stays as it is: give a new --name"
            )


def claim_for_results(folder: Path, trained_in: Path | None) -> None:
    """Refuse a folder where results would replace those of another training, or be taken for them.

    Args:
        folder: where they are to go.
        trained_in: the one run folder they belong to, too; None if they belong to none.

    Raises:
        UserError: another training has the folder.
    """
    if same_folder(folder, trained_in):
        return
    if (folder / "metrics.csv").is_file() or any((folder / "checkpoints").glob("*.ckpt")):
        raise UserError(f"run folder {folder} holds a training, whose own results stay as they are: give a new --name")


def check_writable(folder: Path, options: str = _PLACE_OF_RUN) -> None:
    """Refuse a folder that cannot be made or written to, as far as that can be seen without touching anything.

    Args:
        folder: that of a run, or another.
        options: what puts it elsewhere, for the error.

    Raises:
        UserError: it, or the nearest folder above it that exists, is none or may not be written to.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    with writing_to(folder, options):
        if not there.is_dir():
            raise NotADirectoryError(0, f"{there} is not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(0, f"{there} is read-only")


@contextmanager
def writing_to(folder: Path, options: str = _PLACE_OF_RUN) -> Iterator[None]:
    """A block that writes into a folder.

    Args:
        folder: that of a run, or another.
        options: what puts it elsewhere, for the error.

    Raises:
        UserError: the block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be written to ({error.strerror or error}): mend that, or give another {options}"
        ) from error


def lock(folder: Path) -> IO[str] | None:
    """Keep other processes from training in a run folder, until this one closes the file or ends, however it ends.

    Returns:
        The open file; None where the file system knows no locks.

    Raises:
        UserError: another process has it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no loader process inherits it
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"run folder {folder} is in use, another process trains in it: wait for its end, or give a new --name"
        ) from None
    except OSError:
        file.close()
        return None
    return file


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table so that a reader sees the old file or the new one, never half of it."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def facts(*, name: str, arm: str | None, config: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What it takes to repeat a run, whatever it does: command, configuration, commit, versions, hardware.

    Args:
        name: of the run.
        arm: stem of the configuration file, or None.
        config: all arguments as plain data.
        trainer: about to run.
    """
    return {
        "name": name,
        "arm": arm,
        "command": shlex.join(["etflight", *sys.argv[1:]]),
        "config_sha256": config_sha256(config),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "cpu": _processor(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "device": trainer.strategy.root_device.type,
            "processes": trainer.world_size,
        },
    }


def training_facts(*, seed: Any, data: object) -> dict[str, Any]:
    """What it takes to repeat a training beside `facts`: the seed, and which images were chosen."""
    counts = [int(n) for n in getattr(data, "class_counts", [])]
    return {
        "seed": seed,
        "data": {
            "class": type(data).__name__,
            "fingerprint": getattr(data, "fingerprint", None),
            "class_counts": counts,
            "imbalance_ratio": _imbalance_ratio(data, counts),
            "validation": "held out" if getattr(data, "val_is_held_out", False) else "the test set, watched only",
        },
    }


def facts_of_training(folder: Path) -> dict[str, Any]:
    """`training_facts` that a training has left in its run folder, as far as they can be read."""
    record = read_record(folder)
    return {name: record[name] for name in ("seed", "data") if name in record}


def resumed_facts(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in a record when its run goes on: nothing of how it began, and one more entry in `resumed`.

    Args:
        folder: the run folder, with the record so far.
        now: `facts` of the process that goes on.
    """
    record, start = read_record(folder), ("command", "commit", "started")
    again = {name: now[name] for name in start}
    return {**{name: record.get(name, now[name]) for name in start}, "resumed": [*record.get("resumed", []), again]}


def read_record(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder, empty where it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def config_sha256(config: Mapping[str, Any]) -> str:
    """The hash of a configuration without what tells the runs of an arm apart: seed, name, place, loggers, first stage.

    Args:
        config: all arguments as plain data.

    Returns:
        64 hexadecimal digits, the same for every seed of an arm.
    """
    outer = {"seed_everything", "name", "overlays", "ckpt_path", "weights_only"}
    content = {key: value for key, value in config.items() if key not in outer}
    trainer = {key: value for key, value in config["trainer"].items() if key not in ("default_root_dir", "logger")}
    tuning = content.get("fine_tuning")
    if tuning:
        content["fine_tuning"] = {**tuning, "checkpoint": None}
    text = json.dumps({**content, "trainer": trainer}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class MetricsCSV(Logger):
    """`metrics.csv`: one row per call, a column per metric, continued when a run is resumed.

    Args:
        folder: the run folder.
        keep_rows: how many rows the file had when the checkpoint being resumed was saved; later ones are written again.

    Attributes:
        rows: how many rows the file has now.
    """

    def __init__(self, folder: Path, keep_rows: int = 0) -> None:
        super().__init__()
        self._path = folder / "metrics.csv"
        self._columns: list[str] = []
        self.rows = keep_rows
        self._opened = False

    @property
    def name(self) -> str:
        """Empty: the folder is the run's own."""
        return ""

    @property
    def version(self) -> str:
        """Empty: a run has no version number."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Append one row."""
        if not self._opened:
            self._open()
        row = {"step": step, **{key: float(value) for key, value in metrics.items()}}
        new = sorted(row.keys() - set(self._columns))
        if new:
            self._rewrite([*self._columns, *new], self._read())
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self.rows += 1

    def flush(self) -> None:
        """Wait until the rows are on the disk, so that no checkpoint counts rows which a power cut could still take."""
        if self._path.is_file():
            flush_to_disk(self._path)

    def _open(self) -> None:
        kept = self._read()[: self.rows] if self.rows and self._path.is_file() else []
        self.rows = len(kept)
        self._rewrite(list(kept[0]) if kept else ["step", "epoch"], kept)
        self._opened = True

    def _read(self) -> list[dict[str, str]]:
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        with replacing(self._path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files: the folder of its `metrics.csv`, or else the trainer's root."""
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV):
            return Path(logger.save_dir)
    return Path(trainer.default_root_dir)


def _imbalance_ratio(data: object, counts: Sequence[int]) -> float | None:
    """The one asked for, which truncated counts only come near; else that of the images as they are."""
    asked = float(getattr(data, "imbalance_ratio", 1.0))
    if asked > 1 and getattr(data, "profile", None) != "none":
        return asked
    return float(f"{max(counts) / min(counts):.4g}") if counts and min(counts) > 0 else None


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
