"""What a run is based on: the trained run that it tests or decides for, or whose weights it starts from."""

import shlex
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from etflight.runs.folder import CHECKPOINTS, read_record
from etflight.utils.limits import fits

# options in which the runs of an arm differ, as `etflight.runs.record.config_sha256` has it
_OF_A_RUN = {
    "seed_everything", "name", "ckpt_path", "weights_only", "data.seed", "data.init_args.seed", "fine_tuning.checkpoint",
    "trainer.default_root_dir", "trainer.logger", "data.download", "data.images.download",
}  # fmt: skip
_MOST_STAGES = 10  # one based on the other
_SHAPES = {"config_sha256": str, "commit": str, "options": [str], "based_on": object}


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


def is_identity(value: Any, most_stages: int = _MOST_STAGES) -> bool:
    """Whether a value is an `identity`."""
    return (
        most_stages > 0
        and isinstance(value, dict)
        and {"config_sha256"} <= value.keys() <= _SHAPES.keys()
        and all(fits(part, _SHAPES[name]) for name, part in value.items())
        and (value.get("based_on") is None or is_identity(value["based_on"], most_stages - 1))
    )


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
