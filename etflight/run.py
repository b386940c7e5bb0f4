"""The run folder `<default_root_dir>/<name>/`: one run, one folder, the same with every logger."""

import csv
import json
import platform
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from etflight.errors import UserError
from etflight.files import flush_to_disk, replacing

PACKAGES = ("etflight", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy")


def last_checkpoint(folder: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def claim(folder: Path, resume_from: Path | None) -> None:
    """Refuse a folder that holds another run's checkpoint, so that no run overwrites one.

    Raises:
        UserError: the folder holds a checkpoint, and `resume_from` is not one of its own.
    """
    own = folder / "checkpoints"
    resumes_itself = resume_from is not None and resume_from.resolve().parent == own.resolve()
    if any(not path.name.startswith(".") for path in own.glob("*.ckpt")) and not resumes_itself:
        raise UserError(
            f"run folder {folder} already holds a checkpoint: give --ckpt_path last to resume it, or a new --name"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


def facts(*, name: str, arm: str | None, seed: Any, data: object) -> dict[str, Any]:
    """What it takes to repeat a run: command, commit, versions, hardware, seed, and which images were chosen."""
    return {
        "name": name,
        "arm": arm,
        "command": " ".join(["etflight", *sys.argv[1:]]),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "cpu": _processor(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "data": {
            "class": type(data).__name__,
            "fingerprint": getattr(data, "fingerprint", None),
            "class_counts": [int(n) for n in getattr(data, "class_counts", [])],
            "validation": "held out" if getattr(data, "val_is_held_out", False) else "the test set, watched only",
        },
    }


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
