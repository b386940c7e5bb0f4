"""A study as data: which arms, on which sets, at which imbalance ratios, over which seeds, and the command of each run."""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from etflight.configuration import read_yaml
from etflight.errors import UserError
from etflight.run_folder import last_checkpoint

ROOT = Path("runs")  # of the Trainer, as `etflight fit` sets it


@dataclass(frozen=True)
class Cell:
    """One arm at one ratio with one seed.

    Attributes:
        configs: the arm's configuration file, and what is laid over it.
        seed: of everything but the choice of the images.
        options: what else this run sets.
        folder: of the run.
        source: folder of the run whose last checkpoint this one starts from, or tests.
        trains: False where another's checkpoint is tested as it is.
    """

    configs: tuple[Path, ...]
    seed: int
    options: tuple[str, ...]
    folder: Path
    source: Path | None = None
    trains: bool = True

    def fit(self) -> list[str]:
        """Arguments of `etflight` that train it, or go on where it was stopped."""
        origin = [] if self.source is None else ["--fine_tuning.checkpoint", str(last_checkpoint(self.source))]
        return ["fit", *self._common(), *origin, "--ckpt_path", "last"]

    def test(self) -> list[str]:
        """Arguments of `etflight` that test it."""
        checkpoint = self.folder if self.trains or self.source is None else self.source
        return ["test", *self._common(), "--ckpt_path", str(last_checkpoint(checkpoint))]

    def is_done(self) -> bool:
        """Whether it has been tested."""
        return (self.folder / "test_metrics.json").is_file()

    @property
    def arm(self) -> str:
        """Stem of its configuration file."""
        return self.configs[0].stem

    @property
    def set_name(self) -> str:
        """Folder of all runs of its set."""
        return self.folder.relative_to(ROOT).parts[0]

    def _common(self) -> list[str]:
        return [
            *(word for config in self.configs for word in ("-c", str(config))),
            "--seed_everything",
            str(self.seed),
            *self.options,
            "--name",
            str(self.folder.relative_to(ROOT)),
        ]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sets × arms × ratios × seeds.

    Attributes:
        configs: folder with a configuration file for each arm.
        seeds: of the runs.
        arms: trained from nothing.
        second_stage: arms that start from the last checkpoint of another: cRT, LWS.
        post_hoc: arms that test the last checkpoint of another in their own way, without training.
        ratios: imbalance ratios; empty: that of the configuration files.
        sets: folders in `runs`, and for each the configuration files laid over those of the arms: a data set, a shorter protocol, another
            backbone; empty: nothing is laid over them, and the folder is called as `configs` is.
    """

    configs: Path
    seeds: list[int]
    arms: list[str]
    second_stage: Mapping[str, str] = field(default_factory=dict)
    post_hoc: Mapping[str, str] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    sets: Mapping[str, list[Path]] = field(default_factory=dict)

    def stages(self) -> Iterator[list[Cell]]:
        """All runs, those of a stage after what they start from."""
        yield [cell for arm in self.arms for cell in self._cells(arm, None, True)]
        yield [cell for arm, source in self.second_stage.items() for cell in self._cells(arm, source, True)]
        yield [cell for arm, source in self.post_hoc.items() for cell in self._cells(arm, source, False)]

    def _cells(self, arm: str, source: str | None, trains: bool) -> Iterator[Cell]:
        sets = self.sets or {self.configs.name: []}
        ratios: list[float | None] = [*self.ratios] or [None]
        for (name, overlays), seed, ratio in itertools.product(sets.items(), self.seeds, ratios):
            shift = () if ratio is None else ("--data.imbalance_ratio", f"{ratio:g}")
            place = f"seed{seed}" if ratio is None else f"ratio{ratio:g}-seed{seed}"
            yield Cell(
                (self.configs / f"{arm}.yaml", *overlays),
                seed,
                shift,
                ROOT / name / arm / place,
                None if source is None else ROOT / name / source / place,
                trains,
            )


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Args:
        path: YAML with the attributes of `Study`; `configs` and the files of `sets` are relative to it.

    Raises:
        UserError: what is wrong with it: no plain data, names that are unknown or lacking, arms without a configuration file.
    """
    content = read_yaml(path)
    known, needed = {f.name for f in fields(Study)}, {"configs", "seeds", "arms"}
    if not isinstance(content, dict) or set(content) - known or needed - set(content):
        optional = ", ".join(sorted(known - needed))
        raise UserError(f"{path} is no study: it gives configs, seeds and arms, and may give {optional}")
    _check(path, content)
    configs = (path.parent / content["configs"]).resolve()
    sets = {name: [(path.parent / file).resolve() for file in files] for name, files in content.get("sets", {}).items()}
    for file in itertools.chain(*sets.values()):
        if not file.is_file():
            raise UserError(f"{path} lays {file} over its arms, which does not exist: mend the path in its sets")
    there = sorted(file.stem for file in configs.glob("*.yaml"))
    stages = [content.get("second_stage") or {}, content.get("post_hoc") or {}]
    for arm in [*content["arms"], *stages[0], *stages[1]]:
        if arm not in there:
            near = difflib.get_close_matches(arm, there, 1)
            raise UserError(f"{path}: {configs} has no {arm}.yaml{f', did you mean {near[0]}?' if near else ''}")
    trained = set(content["arms"])
    for stage in stages:
        for arm, source in stage.items():
            if source not in trained:
                raise UserError(
                    f"{path}: {arm} starts from {source}, which is not trained before it: put it among the arms"
                )
        trained |= set(stage)
    laid = {name: [_near(file) for file in files] for name, files in sets.items()}
    return Study(**{**content, "configs": _near(configs), "sets": laid})


def _near(path: Path) -> Path:
    """Relative to the working directory where it lies below: commands are then the same on every machine."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _check(path: Path, content: Mapping[str, Any]) -> None:
    def all_are(name: str, kind: type | tuple[type, ...], container: type) -> bool:
        values = content.get(name, container())
        parts = [*values, *values.values()] if isinstance(values, dict) else values
        return isinstance(values, container) and all(isinstance(v, kind) and not isinstance(v, bool) for v in parts)

    for name, holds, rule in (
        ("configs", isinstance(content["configs"], str), "the folder of the arms' configuration files"),
        ("seeds", all_are("seeds", int, list) and content["seeds"], "integers"),
        ("arms", all_are("arms", str, list) and content["arms"], "names of configuration files, without .yaml"),
        ("ratios", all_are("ratios", (int, float), list), "numbers"),
        (
            "sets",
            _are_sets(content.get("sets", {})),
            "names of letters, digits and _, each with a list of configuration files",
        ),
        ("second_stage", all_are("second_stage", str, dict), "arm: the arm it starts from"),
        ("post_hoc", all_are("post_hoc", str, dict), "arm: the arm whose checkpoint it tests"),
    ):
        if not holds:
            raise UserError(f"{path}: {name} is {content.get(name)!r:.80}: give {rule}")


def _are_sets(value: Any) -> bool:
    return isinstance(value, dict) and all(
        str(name).isidentifier() and isinstance(files, list) and all(isinstance(file, str) for file in files)
        for name, files in value.items()
    )
