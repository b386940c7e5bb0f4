"""Writing files completely or not at all."""

import csv
import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replace a file by one that the block writes elsewhere; a reader sees the old file or the new one.

    The new file is on the disk before it gets its name, so that a machine that stops leaves one of the two, complete. Of two that replace a
    file at the same time, one waits for the other.

    Args:
        path: The file to replace or create; its folder is made if it does not exist.

    Yields:
        A hidden path in the same folder with the same suffix, for the block to write to; it is removed if the block fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    with _held(partial):
        try:
            yield partial
            flush_to_disk(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    flush_to_disk(path.parent)


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Make a file and lock it, after those that hold one of this name; without a lock where the file system has none."""
    while True:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(file, descriptor):  # whoever held it may have given it another name, or removed it
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of it; numbers that are not finite become null."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(_finite(content), indent=2, default=str) + "\n", "utf-8")


def _finite(value: Any) -> Any:
    """The value, with None for the numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table so that a reader sees the old file or the new one, never half of it; file names keep bytes that are not UTF-8."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([header, *rows])
