"""The skeleton of the commands that look at a run: what they share of a command line, and where their results go."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from matplotlib.figure import Figure
from rich.console import RenderableType

from etflight import plotting
from etflight.cli.data_option import data_parser, parse, parse_over_run
from etflight.cli.parser import OneLineParser, add_imports
from etflight.cli.unsupported import refuse_missing_hardware
from etflight.data import ImageDataModule
from etflight.data.preprocessing import Preprocessing
from etflight.data.run_options import prepare_as_trained
from etflight.data.sources import Split
from etflight.runs.folder import check_writable, refuse_other_results, writing_to
from etflight.utils.errors import UserError, options_for_arguments
from etflight.utils.files import write_json
from etflight.utils.terminal import as_it_is, console

if TYPE_CHECKING:  # a command without a model need not wait for it
    from etflight.network import Network

Options = TypeVar("Options")


@dataclass
class NoOptions:
    """For a command that has no options of its own."""


class Asked(Generic[Options]):
    """What a command line asks for.

    Args:
        parser: The parser of the command.
        config: What it has parsed.
        options: The dataclass of the command's own options.
        has_own_data: See below.

    Attributes:
        options: The command's own options.
        runs: The runs or checkpoints.
        has_own_data: Whether it names a data set, which replaces that of the run.
        output: What `--output` gives, or None.
        accelerator: What `--accelerator` gives.
        features: The folder that `--features` names, or None.
        config: All that was parsed.
    """

    def __init__(
        self, parser: OneLineParser, config: Namespace, options: type[Options], *, has_own_data: bool = False
    ) -> None:
        self._parser, self.config, self.has_own_data = parser, config, has_own_data
        self.options = options(**{field.name: config[field.name] for field in fields(options)})  # type: ignore[arg-type]
        run = config.run
        self.runs: list[str] = [] if run is None else run if isinstance(run, list) else [run]
        self.output: str | None = config.output
        self.accelerator: str = config.get("accelerator", "auto")
        self.features: Path | None = Path(folder) if (folder := config.get("features")) else None

    @property
    def run(self) -> str:
        """The first run."""
        return self.runs[0]

    @property
    def quiet(self) -> bool:
        """Whether nobody would see a progress bar."""
        return not console().is_terminal

    def device(self) -> torch.device:
        """The device of `--accelerator`.

        Raises:
            UserError: There is no such hardware.
        """
        refuse_missing_hardware(self.accelerator, "--accelerator")
        return Fabric(accelerator=self.accelerator, devices=1).device

    def data(self, known: Preprocessing | None = None) -> ImageDataModule:
        """Make the data module, which prepares images as a model wants them wherever the command line does not say how.

        Args:
            known: What the model's checkpoint knows of its images, or None.
        """
        config = self.config.clone()
        prepare_as_trained(config.data, known)
        data: ImageDataModule = self._parser.instantiate(config).data
        data.prepare_data()
        return data

    def stored(
        self, model: "Network", data: ImageDataModule, splits: Iterable[Split], part: str = ""
    ) -> ImageDataModule:
        """The data module itself or, with `--features`, a copy that gives features from there in place of the images.

        Args:
            model: The model whose backbone computes what is not there yet.
            data: The data module.
            splits: The splits that are needed.
            part: The folder in that of `--features` for these images, beside others of the command.

        Raises:
            UserError: The folder has other features, or cannot be written to.
        """
        if self.features is None:
            return data
        from etflight.analysis.outputs import with_stored_features  # which a command without a model need not import

        return with_stored_features(model, data, splits, self.features / part, self.device(), quiet=self.quiet)


def command(
    name: str,
    does: str,
    options: type[Options],
    run: str,
    output: str,
    *,
    output_required: bool = False,
    runs: Literal["one", "at most one", "several"] = "one",
    data: Literal["of the run", "required", "optional"] = "of the run",
    accelerator: bool = True,
    more: Callable[[OneLineParser], None] = lambda parser: None,
) -> Callable[[Callable[[Asked[Options]], None]], Callable[[Sequence[str]], None]]:
    """Make a function the command `etflight NAME`: it gets what a command line asks for.

    Args:
        name: The command's name.
        does: What it does, for its help.
        options: The dataclass of its own options, whose docstring is their help.
        run: The help of its run.
        output: The help of its `--output`.
        output_required: Whether `--output` must be given.
        runs: How many runs it takes.
        data: Whether `--data` is by default that of the run, must be given, or may be missing.
        accelerator: Whether a model goes over images, so that there are `--accelerator` and `--features`.
        more: Adds options that a dataclass cannot have.

    Raises:
        UserError: By the function that is made: what the user gave cannot work.
    """

    def parsed(argv: Sequence[str]) -> Asked[Options]:
        names = [word.partition("=")[0] for word in argv]
        if accelerator and "--device" in names:
            raise UserError(
                "--device has become --accelerator, as in fit: give --accelerator cpu, gpu or auto; CUDA_VISIBLE_DEVICES=1 chooses a GPU"
            )
        parser = data_parser(name, does, required=data != "optional")
        kinds: dict[str, dict[str, Any]] = {"at most one": {"nargs": "?", "default": None}, "several": {"nargs": "+"}}
        parser.add_argument("run", type=str | None if runs == "at most one" else str, help=run, **kinds.get(runs, {}))
        if fields(options):  # type: ignore[arg-type]
            parser.add_class_arguments(options)
        more(parser)
        parser.add_argument("--output", type=str | None, default=None, required=output_required, help=output)
        if accelerator:
            parser.add_argument(
                "--accelerator", type=str, default="auto", help="cpu, gpu …; by default a GPU if there is one."
            )
            parser.add_argument(
                "--features",
                type=str | None,
                default=None,
                help="Folder for the features of the images: read if they are there, else computed and written.",
            )
        add_imports(parser)
        own = data != "of the run" or (runs == "several" and not {"--data", "-c", "--config"}.isdisjoint(names))
        config = (parse if own else parse_over_run)(parser, argv)
        return Asked(parser, config, options, has_own_data=own)

    def decorate(work: Callable[[Asked[Options]], None]) -> Callable[[Sequence[str]], None]:
        @options_for_arguments()
        def main(argv: Sequence[str]) -> None:
            """Run the command.

            Args:
                argv: Its arguments.

            Raises:
                UserError: What the user gave cannot work.
                SystemExit: With status 2 for a usage error, 0 after help.
            """
            work(parsed(argv))

        return main

    return decorate


class Results:
    """A JSON file and pictures beside it, which never replace those of something else.

    Args:
        file: The JSON file.
        facts: What the results are of, by name as in the file.
        pictures: The names of the pictures.

    Raises:
        UserError: The place cannot be written to, or holds results of something else.
    """

    def __init__(self, file: Path, facts: Mapping[str, Any], pictures: Sequence[str] = ()) -> None:
        check_writable(file.parent, "output")
        refuse_other_results(file, facts, pictures)
        self.file = file

    def write(self, record: Mapping[str, Any], figures: Mapping[str, Figure] = {}) -> None:
        """Write everything.

        Args:
            record: The content of the JSON file.
            figures: The pictures by the names of their files.
        """
        with writing_to(self.file.parent, "output"):
            write_json(self.file, record)
            for name, figure in figures.items():
                plotting.save(figure, self.file.parent / name)


def show(*parts: RenderableType) -> None:
    """Print tables, and lines of text as they are, on lines as long as they need."""
    for part in parts:
        console().print(as_it_is(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def show_place(place: Path, what: str) -> None:
    """Print where results lie."""
    console().print(as_it_is(f"{place}: {what}"), style="dim", soft_wrap=True)
