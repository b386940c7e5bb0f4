"""Studies: the arms, sets, imbalance ratios, subsets and seeds of a study, and the command of each run."""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etflight.runs.folder import last_checkpoint
from etflight.utils.errors import UserError
from etflight.utils.yaml import read_yaml

ROOT = Path("runs")  # the trainer's root, as `etflight fit` sets it


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
        return (self.folder / "test_metrics.json").is_file()

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


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Args:
        path: A YAML file with `sets`, `seeds`, `arms`, and perhaps `second_stage`, `post_hoc`, `ratios`, `data_seeds` and `configs`.
            `configs` is the folder of the configuration files, relative to this file; the default is "..", because studies lie in
            `configs/studies`.
            `sets` are names of files in `data`, or folders of runs, each with names of files in `data`, `protocols` and `trainer`.
            `arms` are names of files in `arms`, perhaps followed by names in `protocols`: "ce+no_mixup" is called ce_no_mixup.

    Raises:
        UserError: The file is not plain data, has unknown names or lacks some, or names configuration files that do not exist.
    """
    content = read_yaml(path)
    needed, optional = {"sets", "seeds", "arms"}, {"second_stage", "post_hoc", "ratios", "data_seeds", "configs"}
    if not isinstance(content, dict) or set(content) - needed - optional or needed - set(content):
        raise UserError(
            f"{path} is not a study: it must give {', '.join(sorted(needed))}, and may give {', '.join(sorted(optional))}"
        )
    _check(path, content)
    configs = (path.parent / content.get("configs", "..")).resolve()

    def find(name: str, folders: Sequence[str]) -> Path:
        file: Path
        for folder in folders:
            file = configs / folder / f"{name}.yaml"
            if file.is_file():
                return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        there = [file.stem for folder in folders for file in sorted((configs / folder).glob("*.yaml"))]
        near = difflib.get_close_matches(name, there, 1)
        places = " nor ".join(str(configs / folder) for folder in folders)
        raise UserError(f"{path}: {places} has no {name}.yaml{f', did you mean {near[0]}?' if near else ''}")

    sets = content["sets"] if isinstance(content["sets"], dict) else {name: [name] for name in content["sets"]}
    arms: dict[str, list[Path]] = {}

    def named(arm: str) -> str:
        first, *others = arm.split("+")
        name = arm.replace("+", "_")
        arms[name] = [find(first, ["arms"]), *(find(other, ["protocols"]) for other in others)]
        return name

    trained = {named(arm) for arm in content["arms"]}
    later: dict[str, dict[str, str]] = {}
    for stage in ("second_stage", "post_hoc"):
        later[stage] = {named(arm): source.replace("+", "_") for arm, source in (content.get(stage) or {}).items()}
        for arm, source in later[stage].items():
            if source not in trained:
                raise UserError(
                    f"{path}: {arm} starts from {source}, which is not trained before it: put it among the arms"
                )
        trained |= set(later[stage])
    return Study(
        sets={name: [find(file, ["data", "protocols", "trainer"]) for file in files] for name, files in sets.items()},
        seeds=content["seeds"],
        arms=arms,
        ratios=content.get("ratios", ()),
        data_seeds=content.get("data_seeds", ()),
        **later,
    )


# the shape of the value of each name in a study's file (a type, a list of it or a dict of it), and its description for an error
_SHAPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("seeds", "data_seeds"), ([int], "integers")),
    "arms": ([str], "names of configuration files, without .yaml"),
    "ratios": ([int | float], "numbers"),
    "configs": (str, "the folder of the configuration files"),
    "second_stage": ({str: str}, "arm: the arm it starts from"),
    "post_hoc": ({str: str}, "arm: the arm whose checkpoint it tests"),
}


def _check(path: Path, content: Mapping[str, Any]) -> None:
    sets = content["sets"]
    named = _fits(sets, {str: [str]}) and all(name.isidentifier() and files for name, files in sets.items())
    shapes = {name: (_fits(content[name], shape), rule) for name, (shape, rule) in _SHAPES.items() if name in content}
    rule = "names of files in data, or names of letters, digits and _, each with a list of files"
    shapes["sets"] = (bool(sets) and (named or _fits(sets, [str])), rule)
    shapes["seeds"] = (shapes["seeds"][0] and bool(content["seeds"]), shapes["seeds"][1])
    for name, (fits, rule) in shapes.items():
        if not fits:
            raise UserError(f"{path}: {name} is {content[name]!r:.80}: give {rule}")


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(part, shape[0]) for part in value)
    if isinstance(shape, dict):
        ((of_names, of_values),) = shape.items()
        return isinstance(value, dict) and _fits([*value], [of_names]) and _fits([*value.values()], [of_values])
    return isinstance(value, shape) and not isinstance(value, bool)
