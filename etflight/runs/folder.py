"""The run folder `<default_root_dir>/<name>/`: where everything of a run is, the same with every logger."""

import csv
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import IO, TYPE_CHECKING, Any

from etflight.utils.errors import UserError, argument

if TYPE_CHECKING:  # Lightning takes seconds to import, which `study` and `report` need not wait for
    from lightning.pytorch import Trainer

ROOT = Path("runs")  # the folder of all runs, unless another is given

# what lies in a run folder
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
RECORD = "run.json"  # it marks a folder as that of a run
METRICS = "metrics.csv"
SPEED = "speed.csv"
RESULTS = "test_metrics.json"
PER_CLASS = "per_class.csv"
PREDICTIONS = "predictions.csv"
FIGURES = "figures"
FEATURES = "features"


def run_folder(trainer: "Trainer") -> Path:
    """The folder of a run's files: the trainer's root, which `etflight fit` makes the folder of this run."""
    return Path(trainer.default_root_dir)


def last_checkpoint(folder: Path) -> Path:
    """The path of a run's newest checkpoint."""
    return folder / CHECKPOINTS / "last.ckpt"


def run_of(path: Path) -> Path | None:
    """The run folder that a path leads to: the folder itself, or the run folder of a checkpoint; None if it leads to none."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == CHECKPOINTS else None


def checkpoint_of(run: Path) -> Path:
    """The checkpoint that a path means: the last one of a run folder, or the file itself.

    Raises:
        UserError: It is a folder without such a checkpoint.
    """
    if not run.is_dir():
        return run
    if not (last := last_checkpoint(run)).is_file():
        raise UserError(
            f"{run} holds no {last.relative_to(run)}: give a run folder, such as runs/digits/ce, or a checkpoint"
        )
    return last


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run folder's `run.json`; empty if it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def same_folder(one: Path, other: Path | None) -> bool:
    """Whether two paths lead to the same folder, which need not exist; None leads to no folder."""
    return other is not None and one.resolve() == other.resolve()


def is_own_checkpoint(folder: Path, checkpoint: Path | None) -> bool:
    """Whether a checkpoint lies in this run folder."""
    return checkpoint is not None and checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def claim(folder: Path, resume_from: Path | None) -> None:
    """Refuse a folder whose files training would overwrite; a run that was stopped before its first checkpoint may start again.

    It may not with the curves of more than one epoch, which are those of a training whose checkpoint has gone.

    Raises:
        UserError: The folder holds a checkpoint and `resume_from` is not one of its own, or the results or curves of a training whose
            checkpoint has gone, or files of another program.
    """
    if is_own_checkpoint(folder, resume_from):
        return
    resume = argument("ckpt_path", "last")
    if any(not path.name.startswith(".") for path in (folder / CHECKPOINTS).glob("*.ckpt")):
        raise UserError(
            f"run folder {folder} already holds a checkpoint: give {resume} to resume it, or a new {argument('name')}"
        )
    has_curves = _finished_epochs(folder) > 1  # one epoch may have been logged before its checkpoint was saved
    if has_curves or os.path.lexists(folder / RESULTS):
        what = "curves of a training" if has_curves else "results of a test"
        raise UserError(
            f"run folder {folder} has the {what} but no checkpoint: give a new {argument('name')}, or remove it"
        )
    _refuse_files_of_others(folder)


def claim_for_results(folder: Path, trained_in: Path | None, checkpoint: Path) -> None:
    """Refuse a folder in which results would replace those of another training, or be mistaken for them.

    Args:
        folder: The folder for the results.
        trained_in: The run folder of the model they belong to; None if there is none.
        checkpoint: The file of the model.

    Raises:
        UserError: The folder belongs to another training, or has results of another checkpoint.
    """
    if same_folder(folder, trained_in):
        last = last_checkpoint(folder)
        if last.is_file() and checkpoint.is_file() and not last.samefile(checkpoint):
            raise UserError(
                f"{checkpoint} is not the last checkpoint of run folder {folder}, whose results are those of {last.name}: "
                f"give its own results a {argument('name')}"
            )
        return
    known, tested = read_record(folder).get("checkpoint"), str(checkpoint.absolute())
    if known not in (None, tested) and (folder / RESULTS).is_file():
        raise UserError(
            f"run folder {folder} has the results of another checkpoint, {known}, which stay as they are: give a new {argument('name')}"
        )
    if (folder / METRICS).is_file() or any((folder / CHECKPOINTS).glob("*.ckpt")):
        raise UserError(
            f"run folder {folder} holds a training, whose own results stay as they are: give a new {argument('name')}"
        )
    _refuse_files_of_others(folder)


def _finished_epochs(folder: Path) -> int:
    """The number of epochs in a run's `metrics.csv`; 0 without one that can be read."""
    try:
        with (folder / METRICS).open(newline="", encoding="utf-8") as file:
            return sum(1 for row in csv.DictReader(file) if row.get("train/loss"))
    except (OSError, ValueError, csv.Error):
        return 0


def _refuse_files_of_others(folder: Path) -> None:
    for name in (CONFIG, METRICS):
        if os.path.lexists(folder / name) and not (folder / RECORD).is_file():
            raise UserError(
                f"run folder {folder} has a {name} but no {RECORD}, so it is not one of etflight's and stays as it is: "
                f"give a new {argument('name')}"
            )


def refuse_other_results(file: Path, facts: Mapping[str, Any], pictures: Sequence[str] = ()) -> None:
    """Refuse to replace the results of something else.

    Args:
        file: The JSON file that results are to be written to.
        facts: What they are of, by name as in the file.
        pictures: The names of the pictures that are to be written beside it.

    Raises:
        UserError: The file exists, and is of something else; or a picture exists without it.
    """
    if not os.path.lexists(file):
        for picture in pictures:
            if os.path.lexists(file.parent / picture):
                raise UserError(
                    f"{file.parent / picture} has no {file.name} beside it, so it is not of this command and stays as it is: "
                    f"give another {argument('output')}"
                )
        return
    if file.is_dir():
        raise UserError(f"{file} is a folder: give {argument('output')} the name of a file")
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    before, now = (_told(plain, facts) for plain in (known, json.loads(json.dumps(facts))))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            values = (shorten(str(of.get(name)), 80, placeholder=" …") for of in (before, now))
            raise UserError(
                f"{file} holds other results ({name}: {', not '.join(values)}), which stay as they are: give {argument('output')}"
            )


def _told(content: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in the content of a JSON file, with those of a dict by names of their own."""
    found: dict[str, Any] = {}
    for name in facts if isinstance(content, dict) else ():
        value = content.get(name)
        found |= {f"{name} {part}": v for part, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def check_writable(folder: Path, *arguments: str) -> None:
    """Refuse a folder that cannot be made or written to, as far as this can be seen without touching anything.

    Args:
        folder: The folder of a run, or another.
        arguments: The arguments that choose it, for the error; by default those of a run folder.

    Raises:
        UserError: The folder, or the nearest existing path above it, is not a folder or not writable.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    with writing_to(folder, *arguments):
        if not there.is_dir():
            raise NotADirectoryError(0, f"{there} is not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(0, f"{there} is read-only")


@contextmanager
def writing_to(folder: Path, *arguments: str) -> Iterator[None]:
    """Turn an `OSError` of a block that writes into a folder into a `UserError`.

    Args:
        folder: The folder of a run, or another.
        arguments: The arguments that choose it, for the error; by default those of a run folder.

    Raises:
        UserError: The block raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        choices = " or ".join(map(argument, arguments or ("name", "trainer.default_root_dir")))
        raise UserError(
            f"folder {folder} cannot be written to ({error.strerror or error}): mend that, or give another {choices}"
        ) from error


def lock(folder: Path) -> IO[str] | None:
    """Keep other processes from training in a run folder until the returned file is closed or this process ends, in whatever way.

    Returns:
        The open file; None if the file system has no locks.

    Raises:
        UserError: Another process has the lock.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader processes would inherit flock's lock
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"run folder {folder} is in use, another process trains in it: wait for its end, or give a new {argument('name')}"
        ) from None
    except OSError:
        file.close()
        return None
    return file
