"""The result of one run as plain data: read from a run folder or a result file, and checked once, here."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from etflight.reporting.reading import finite, noting, read_json, read_table, series
from etflight.runs.based_on import folder_in, is_identity
from etflight.runs.folder import METRICS, RECORD, RESULTS
from etflight.utils.errors import UserError
from etflight.utils.fingerprints import choice_of, content_of

ALWAYS = ("dataset", "ratio", "arm", "seed", "epochs", "commit", "config_sha256", "fingerprint", "command")
_AT_THE_END = re.compile(r"nc\w*/\w+/(nc1|alignment|etf_distance)|val/acc")
_CHECKPOINT = re.compile(r" --ckpt_path[ =](?:[^\s'\"]*/)?([^\s'\"/]+?)(?:\.ckpt)?(?: |$)")
_ALWAYS_DEFINED = {f"test/{name}" for name in ("acc", "acc_macro", "acc_many", "acc_medium", "acc_few", "ece")}
_SEED = re.compile(r"(^|[/_-])(ratio[\d.]+-)?(subset\d+-)?seed_?\d+$")
_SHARE = re.compile(r"(test|val)/(acc|ece)\w*")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The numbers that one run reached, and the facts that are needed to repeat it; None is unknown.

    Attributes:
        source: The run folder, or the result file and the place in it.
        dataset: Name of the data set.
        ratio: The imbalance ratio that was asked for; if none was, largest over smallest class count.
        arm: Stem of the configuration file.
        name: The run's name, such as digits/ce/seed0.
        seed: The run's seed.
        epochs: The epochs that were trained to their end.
        commit: The code's commit.
        config_sha256: The same for all seeds of an arm (`etflight.runs.record.config_sha256`).
        fingerprint: The fingerprint of the training images: of their set, and of the choice.
        command: The command that trained it.
        based_on: The `etflight.runs.based_on.identity` of the run that it decides for, or takes weights from; None also if there is none.
        checkpoint: The name of the checkpoint that its tests are of, such as last or best.
        checkpoint_pattern: That name without the numbers that its training came to (`etflight.runs.record.pattern_of`).
        num_classes: K.
        params: The number of the network's parameters, without fixed class vectors.
        multiply_adds: Those of the forward pass of one image.
        validation: "held out", or a text that says that the test set was watched.
        seconds: The time of its epochs, validation and measurement included.
        hardware: The hardware, for people.
        metrics: Finite numbers by log name, such as `test/acc` (accuracies from 0 to 1), at the end of training; also
            `val/acc_best`, of the best epoch on the validation images, and its number from 1 on, `val/acc_best_epoch`.
    """

    source: str
    dataset: str | None = None
    ratio: float | None = None
    arm: str
    name: str | None = None
    seed: Any = None
    epochs: int | None = None
    commit: str | None = None
    config_sha256: str | None = None
    fingerprint: str | None = None
    command: str | None = None
    based_on: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    checkpoint_pattern: str | None = None
    num_classes: int | None = None
    params: int | None = None
    multiply_adds: int | None = None
    validation: str | None = None
    seconds: float | None = None
    hardware: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def tested(self) -> bool:
        """Whether there are results of a test."""
        return "test/acc" in self.metrics

    @property
    def set_name(self) -> str | None:
        """The part of the run's name before its arm; None if there is none."""
        before, found, _ = f"/{self.name or ''}/".partition(f"/{self.arm}/")
        return before.strip("/") or None if found else None

    @property
    def origin(self) -> str | None:
        """Set and arm of the run that it decides for, or takes weights from, as its command has them; None is unknown."""
        parts = folder_in(self.command)
        return "/".join(_SEED.sub("", "/".join(parts)).split("/")[-2:]) if parts else None

    @property
    def kind_of_checkpoint(self) -> str | None:
        """What seeds of an arm have in common in the name of their tested checkpoint: all but numbers that training came to."""
        return self.checkpoint_pattern or self.checkpoint

    @property
    def content(self) -> str | None:
        """The part of the fingerprint that tells the set from others of the same name; None is unknown."""
        return content_of(self.fingerprint)

    @property
    def choice(self) -> str | None:
        """The part of the fingerprint that tells which of the set's images were trained on."""
        return choice_of(self.fingerprint)

    def record(self) -> dict[str, Any]:
        """The record for a result file: facts and metrics in one flat dict of plain data."""
        facts = asdict(self)
        del facts["source"], facts["metrics"]
        if self.checkpoint == _named_in(self.command or ""):
            del facts["checkpoint"]
        if self.ratio is not None and self.ratio == int(self.ratio):
            facts["ratio"] = int(self.ratio)
        metrics = {name: int(v) if name.endswith("_epoch") else v for name, v in self.metrics.items()}
        return {name: value for name, value in facts.items() if value is not None or name in ALWAYS} | metrics


def read_results(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Read the results of run folders (one each) and of result files (JSON lists of records).

    Returns:
        The results, and the problems with the folders, files and records that are left out.
    """
    results: list[Result] = []
    problems: list[str] = []
    for path in paths:
        with noting(problems):
            if path.is_dir():
                results.append(_from_run(path))
                continue
            for i, record in enumerate(_records(path)):
                with noting(problems):
                    results.append(_from_record(f"{path}[{i}]", record))
    return results, problems


# Result files ---------------------------------------------------------------------------------------------------------

_FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # the kind of value that belongs there, and a check of a value
    **dict.fromkeys(
        (
            *("dataset", "arm", "name", "commit", "config_sha256"),
            *("fingerprint", "command", "checkpoint", "checkpoint_pattern", "validation", "hardware"),
        ),
        ("a text", lambda value: isinstance(value, str)),
    ),
    "seed": ("an integer", lambda value: type(value) is int),
    "epochs": ("an integer from 0", lambda value: type(value) is int and value >= 0),
    **dict.fromkeys(
        ("num_classes", "params", "multiply_adds"),
        ("an integer from 1", lambda value: type(value) is int and value >= 1),
    ),
    "based_on": ("the identity of a run", is_identity),
    "ratio": ("a number from 1", lambda value: (finite(value) or 0) >= 1),
    "seconds": ("a number from 0", lambda value: finite(value) is not None and value >= 0),
}


def _records(path: Path) -> list[object]:
    if not path.exists():
        raise UserError(f"{path} does not exist: give run folders, such as runs/digits/ce, or result files")
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path} is no result file: it has to hold a list of records")
    return records


def _from_record(where: str, record: object) -> Result:
    if not isinstance(record, dict):
        raise UserError(f"{where} is no record of a result: {record!r:.60}")
    for name in ("dataset", "arm", "test/acc"):
        if record.get(name) is None:
            raise UserError(f"{where} has no {name}")
    metrics = {name: value for name, value in record.items() if "/" in name}
    facts = _checked_facts(where, record)
    facts.setdefault("checkpoint", _named_in(facts.get("command", "")))
    return Result(source=where, metrics=_checked(where, metrics), **facts)


def _named_in(command: str) -> str | None:
    """The name of the checkpoint that was tested, as a command tells it; a training's tests are of its last one."""
    if command.startswith("etflight fit "):
        return "last"
    found = _CHECKPOINT.search(command)
    return found and found[1]


def _checked_facts(where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that are known, each of its kind; anything else is refused."""
    facts = {name: value for name, value in record.items() if name in _FACTS and value is not None}
    for name, value in facts.items():
        belongs, fits = _FACTS[name]
        if not fits(value):
            raise UserError(f"{where} has {value!r:.60} for its {name}, where {belongs} belongs")
    return facts


def _checked(where: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as finite numbers, accuracies and calibration errors from 0 to 1; anything else is refused."""
    numbers = {}
    for name, value in metrics.items():
        number = finite(value)
        share = _SHARE.fullmatch(name) and not name.endswith("_epoch")
        if number is None or (share and not 0 <= number <= 1):
            belongs = "a number from 0 to 1" if share else "a finite number"
            raise UserError(f"{where} has {value!r:.60} for {name} where {belongs} belongs: test the run again")
        numbers[name] = number
    return numbers


# Run folders ----------------------------------------------------------------------------------------------------------


def _from_run(folder: Path) -> Result:
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} has no {RECORD}: it is no run folder, such as runs/digits/ce")
    record = _names(folder / RECORD)
    data = _part(record, "data")
    tested = folder / RESULTS
    metrics: dict[str, float] = {}
    if tested.is_file():
        found = {name: value for name, value in _names(tested).items() if name.startswith("test/")}
        defined = {name: v for name, v in found.items() if name in _ALWAYS_DEFINED or finite(v) is not None}
        metrics = _checked(str(tested), defined)
    epochs, logged = _training(folder / METRICS)
    counts = data.get("class_counts")
    facts = {
        "dataset": data.get("dataset") or data.get("class"),
        # records before there was a `count_ratio` have it as their `imbalance_ratio` if none was asked for
        "ratio": data.get("imbalance_ratio") or data.get("count_ratio"),
        "arm": record.get("arm") or record.get("name") or folder.name,
        "name": record.get("name"),
        "seed": None if record.get("seed") is False else record.get("seed"),
        "epochs": epochs,
        "fingerprint": data.get("fingerprint"),
        # of a training's own checkpoints only the last is tested in its folder
        "checkpoint": Path(str(record.get("checkpoint") or "last")).stem,
        "num_classes": len(counts) if isinstance(counts, list) and counts else None,
        "validation": data.get("validation"),
        "seconds": _seconds(folder / "speed.csv"),
        "hardware": _hardware(_part(record, "hardware")),
        **{name: _part(record, "model").get(name) for name in ("params", "multiply_adds")},
        **{name: record.get(name) for name in ("commit", "config_sha256", "command", "based_on", "checkpoint_pattern")},
    }
    return Result(source=str(folder), metrics=metrics | logged, **_checked_facts(str(folder / RECORD), facts))


def _names(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not whole (it holds no names)")
    return content


def _part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _training(path: Path) -> tuple[int | None, dict[str, float]]:
    """The number of finished epochs, and the metrics at the end and at the best epoch."""
    if not path.is_file():
        return None, {}
    rows = read_table(path)
    losses = series(path, rows, "train/loss")
    epochs = int(losses[-1][0]) + 1 if losses else None
    values = {}
    for name in (name for name in (rows[0] if rows else ()) if _AT_THE_END.fullmatch(name)):
        points = series(path, rows, name)
        number = finite(points[-1][1]) if points else None
        if number is not None:
            values[name] = number
    accuracies = [(epoch, finite(value)) for epoch, value in series(path, rows, "val/acc")]
    best = max((value for _, value in accuracies if value is not None), default=None)
    if best is not None:
        values["val/acc_best"] = best
        values["val/acc_best_epoch"] = next(epoch for epoch, value in accuracies if value == best) + 1
    return epochs, _checked(str(path), values)


def _seconds(path: Path) -> float | None:
    """The time of all epochs, each as it was trained last; None if the time of an epoch is unknown."""
    rows = read_table(path) if path.is_file() else []
    seconds = dict(series(path, rows, "speed/epoch_s"))
    return sum(seconds.values()) if seconds and len(seconds) == len({row.get("epoch") for row in rows}) else None


def _hardware(facts: Mapping[str, Any]) -> Any:
    gpus, processes, threads = facts.get("gpus"), facts.get("processes"), facts.get("threads")
    if facts.get("device", "cuda") == "cuda" and isinstance(gpus, list) and gpus:
        name = gpus[0]
    else:
        name = facts.get("cpu")
        if name is not None and isinstance(threads, int):
            name = f"{name}, {threads} thread{'s' * (threads != 1)}"
    return f"{processes} × {name}" if name is not None and isinstance(processes, int) and processes > 1 else name
