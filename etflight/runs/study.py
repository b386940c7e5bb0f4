"""Studies: the arms, sets, imbalance ratios, subsets and seeds of a study, and the command of each run."""

import itertools
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser

from etflight.runs.folder import RESULTS, ROOT, last_checkpoint
from etflight.utils.errors import UserError
from etflight.utils.jsonargparse_private import in_one_line
from etflight.utils.shipped import SHIPPED, short_name
from etflight.utils.yaml import read_yaml, require_file


@dataclass(frozen=True)
class Cell:
    """A run of one arm at one ratio with one seed.

    Attributes:
        configs: The configuration files, those of the set before those of the arm.
        arm: The name of the arm.
        seed: The seed of everything but the choice of the images.
        options: Further options of this run.
        folder: The run folder.
        source: The folder of the run whose last checkpoint this one starts from, or tests.
        trains: False if it tests another run's checkpoint unchanged.
    """

    configs: tuple[Path, ...]
    arm: str
    seed: int
    options: tuple[str, ...]
    folder: Path
    source: Path | None = None
    trains: bool = True

    def fit(self) -> list[str]:
        """The `etflight` arguments that train it, or continue a stopped training."""
        origin = [] if self.source is None else ["--fine_tuning.checkpoint", str(last_checkpoint(self.source))]
        return ["fit", *self._common(), *origin, "--ckpt_path", "last"]

    def test(self) -> list[str]:
        """The `etflight` arguments that test it."""
        checkpoint = self.folder if self.trains or self.source is None else self.source
        return ["test", *self._common(), "--ckpt_path", str(last_checkpoint(checkpoint))]

    def is_done(self) -> bool:
        """Whether it has been tested."""
        return (self.folder / RESULTS).is_file()

    @property
    def set_name(self) -> str:
        """The name of the set, which is the folder of all its runs."""
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
    """The runs of every set with every arm, ratio and seed.

    Attributes:
        sets: For each folder in `runs` the configuration files of the set, followed by those that change it.
        seeds: The seeds of the runs.
        arms: For the name of each arm its configuration files, followed by those that change it.
        second_stage: For arms that start from the last checkpoint of another (cRT, LWS) the name of that arm.
        post_hoc: For arms that test the last checkpoint of another in their own way, without training, the name of that arm.
        ratios: The imbalance ratios; if empty, the one of the configuration files.
        data_seeds: The seeds that choose the images (`data.seed`), each with every one of `seeds`; if empty, the one of the configuration
            files.
    """

    sets: Mapping[str, Sequence[Path]]
    seeds: Sequence[int]
    arms: Mapping[str, Sequence[Path]]
    second_stage: Mapping[str, str] = field(default_factory=dict)
    post_hoc: Mapping[str, str] = field(default_factory=dict)
    ratios: Sequence[float] = ()
    data_seeds: Sequence[int] = ()

    def stages(self) -> Iterator[list[Cell]]:
        """Yield all runs, stage by stage, each stage after the one it starts from."""
        built_on = {**self.second_stage, **self.post_hoc}
        yield [cell for arm in self.arms if arm not in built_on for cell in self._cells(arm, None, True)]
        yield [cell for arm, source in self.second_stage.items() for cell in self._cells(arm, source, True)]
        yield [cell for arm, source in self.post_hoc.items() for cell in self._cells(arm, source, False)]

    def _cells(self, arm: str, source: str | None, trains: bool) -> Iterator[Cell]:
        ratios = [[("ratio", "--data.imbalance_ratio", f"{ratio:g}")] for ratio in self.ratios] or [[]]
        subsets = [[("subset", "--data.seed", str(seed))] for seed in self.data_seeds] or [[]]
        for (name, files), seed, of_ratio, of_subset in itertools.product(
            self.sets.items(), self.seeds, ratios, subsets
        ):
            varied = of_ratio + of_subset
            place = "-".join([*(f"{word}{value}" for word, _, value in varied), f"seed{seed}"])
            yield Cell(
                (*files, *self.arms[arm]),
                arm,
                seed,
                tuple(word for _, *words in varied for word in words),
                ROOT / name / arm / place,
                None if source is None else ROOT / name / source / place,
                trains,
            )


@dataclass
class _File:
    """What a study's file gives; see `read_study`."""

    sets: list[str] | dict[str, list[str]]
    seeds: list[int]
    arms: list[str]
    second_stage: dict[str, str] = field(default_factory=dict)
    post_hoc: dict[str, str] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    data_seeds: list[int] = field(default_factory=list)
    configs: str = ".."


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Args:
        path: A YAML file with `sets`, `seeds`, `arms`, and perhaps `second_stage`, `post_hoc`, `ratios`, `data_seeds` and `configs`.
            `configs` is the folder of the configuration files, relative to this file; the default is "..", because studies lie in
            `configs/studies`. Files that are not there are the shipped ones.
            `sets` are names of files in `data`, or folders of runs, each with names of files in `data`, `protocols` and `trainer`.
            `arms` are names of files in `arms`, perhaps followed by names in `protocols`: "ce+no_mixup" is called ce_no_mixup.

    Raises:
        UserError: The file is not plain data, has unknown names or lacks some, or names configuration files that do not exist.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_File)
    try:
        content = parser.parse_object(read_yaml(path) or {})
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{path} is not a study: {in_one_line(str(error), {})}") from error
    configs = (path.parent / content.configs).resolve()

    def find(name: str, folders: Sequence[str]) -> Path:
        files: list[Path] = [
            base / folder / f"{name}.yaml" for base in (configs, SHIPPED.resolve()) for folder in folders
        ]
        file = next(filter(Path.is_file, files), files[0])
        require_file(file)
        return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else short_name(file)

    sets = content.sets if isinstance(content.sets, dict) else {name: [name] for name in content.sets}
    if outside := [name for name in sets if not name.isidentifier()]:
        raise UserError(f"{path}: the set {outside[0]!r} names a folder: give letters, digits and _")
    arms: dict[str, list[Path]] = {}

    def named(arm: str) -> str:
        first, *others = arm.split("+")
        name = arm.replace("+", "_")
        if len(Path(name).parts) != 1 or name == "..":
            raise UserError(f"{path}: the arm {arm!r} names a folder: give the name of a file in arms, without .yaml")
        arms[name] = [find(first, ["arms"]), *(find(other, ["protocols"]) for other in others)]
        return name

    trained = {named(arm) for arm in content.arms}
    later: dict[str, dict[str, str]] = {}
    for stage in ("second_stage", "post_hoc"):
        later[stage] = {named(arm): source.replace("+", "_") for arm, source in content[stage].items()}
        for arm, source in later[stage].items():
            if source not in trained:
                raise UserError(
                    f"{path}: {arm} starts from {source}, which is not trained before it: put it among the arms"
                )
        trained |= set(later[stage])
    return Study(
        sets={name: [find(file, ["data", "protocols", "trainer"]) for file in files] for name, files in sets.items()},
        seeds=content.seeds,
        arms=arms,
        ratios=content.ratios,
        data_seeds=content.data_seeds,
        **later,
    )
