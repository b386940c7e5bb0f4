"""What a run is based on: the trained run that it tests or decides for, or whose weights it starts from."""

import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from etflight.runs.folder import CHECKPOINTS, read_record

# options in which the runs of an arm differ, as `etflight.runs.record.config_sha256` has it
_OF_A_RUN = {
    "seed_everything", "name", "ckpt_path", "weights_only", "data.seed", "data.init_args.seed", "fine_tuning.checkpoint",
    "trainer.default_root_dir", "trainer.logger", "data.download", "data.images.download",
}  # fmt: skip
_MOST_STAGES = 10  # one based on the other


def identity(folder: Path | None) -> dict[str, Any] | None:
    """The identity of a trained run, the same for every seed of it; it holds no seed, no name and no path of a run.

    Args:
        folder: The run folder, or None.

    Returns:
        Plain data: `config_sha256`, `commit`, `options` (of its command, without those of a single run) and, if it is itself based on
        another run, `based_on`. None if the folder has no record that says so much.
    """
    record = {} if folder is None else read_record(folder)
    facts = {
        "config_sha256": record.get("config_sha256"),
        "commit": record.get("commit"),
        "options": list(options_of(record.get("command")) or ()) or None,
        "based_on": record.get("based_on"),
    }
    known = {name: value for name, value in facts.items() if value is not None}
    return known if is_identity(known) else None


def is_identity(value: Any) -> bool:
    """Whether a value is an `identity`."""
    for _ in range(_MOST_STAGES):
        if not isinstance(value, dict) or not isinstance(value.get("config_sha256"), str):
            return False
        options, commit = value.get("options", []), value.get("commit", "")
        whole = value.keys() <= {"config_sha256", "commit", "options", "based_on"} and isinstance(commit, str)
        if not (whole and isinstance(options, list) and all(isinstance(option, str) for option in options)):
            return False
        value = value.get("based_on")
        if value is None:
            return True
    return False


def chain(based_on: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The run that another is based on, then the one that this is based on, and so on."""
    while based_on is not None:
        yield based_on
        based_on = based_on.get("based_on")


def options_of(command: Any) -> tuple[str, ...] | None:
    """The words of a command without the options in which runs of an arm may differ; None if they cannot be told."""
    words = iter(_words(command))
    kept = []
    for word in words:
        option, given, _ = word.removeprefix("--").partition("=")
        if not (word.startswith("--") and option in _OF_A_RUN):
            kept.append(word)
        elif not given:
            next(words, None)
    return tuple(kept) or None


def folder_in(command: Any) -> tuple[str, ...] | None:
    """The parts of the path of the run folder whose checkpoint a test or a second stage was given; None if the command has none."""
    words = _words(command)
    option = "--fine_tuning.checkpoint" if words[1:2] == ["fit"] else "--ckpt_path"
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    values += [value for word, value in pairwise(words) if word == option]
    path = Path(values[-1]) if values else Path()
    return path.parent.parent.parts if path.parent.name == CHECKPOINTS else None


def _words(command: Any) -> list[str]:
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []
