"""The run folder `<default_root_dir>/<name>/`: one run, one folder, the same with every logger."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from etflight.utils.errors import UserError

_PLACE_OF_RUN = "--name or --trainer.default_root_dir"
RECORD = "run.json"  # marks a folder as a run's


def last_checkpoint(folder: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def run_of(path: Path) -> Path | None:
    """The run folder that a path belongs to: a folder itself, or the folder of a checkpoint; None if it belongs to none."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def read_record(folder: Path) -> dict[str, Any]:
    """`run.json` of a run folder, empty where it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def same_folder(one: Path, other: Path | None) -> bool:
    """Whether two paths name the same folder, which need not exist; None names no folder."""
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
        folder: Where the results are to go.
        trained_in: The run folder of the model they belong to; None if there is none.

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
        folder: The folder of a run, or another.
        options: The options that choose it, for the error.

    Raises:
        UserError: It, or the nearest path above it that exists, is not a folder or may not be written to.
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
        folder: The folder of a run, or another.
        options: The options that choose it, for the error.

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
