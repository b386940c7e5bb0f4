"""The command line: LightningCLI over `Classifier` and the data modules, with run folders and errors for people."""

import logging
import os
import re
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar, StochasticWeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_info

import etflight.data
from etflight.callbacks import FineTuning, LastCheckpoint, NeuralCollapseMonitor, PostHoc, Speed, StepSeed, StopSignals
from etflight.callbacks.balance import DoubleCorrection
from etflight.callbacks.checkpoint import KEY as CHECKPOINT_KEY
from etflight.callbacks.predictions import PredictionTable, check_output
from etflight.callbacks.progress import Progress, StepNotice, is_watched
from etflight.callbacks.results import TestResults
from etflight.classifier import PLUGGABLE, Classifier, plain_hyperparameters
from etflight.cli import STAGES
from etflight.cli.argv import config_files, set_and_arm, value_of, values_of
from etflight.cli.checkpoint_option import prepare_as_trained
from etflight.cli.parser import OneLineParser
from etflight.cli.predict import add_prediction_arguments, over_images
from etflight.cli.unsupported import refuse_unsupported
from etflight.data.base import ImageDataModule
from etflight.heads import codes_from_state_dict
from etflight.optim import PROTOCOL_SGD
from etflight.runs.folder import check_writable, claim, claim_for_results, last_checkpoint, run_of, same_folder
from etflight.runs.loggers import FailSafe, MetricsCSV
from etflight.runs.record import RunRecord
from etflight.runs.wandb import choose_names, name_in_sweep
from etflight.utils.checkpoints import SafeCheckpointIO, read_checkpoint, refuse_others
from etflight.utils.errors import UserError, print_dead_process, user_error_in
from etflight.utils.lightning_private import on_dead_process
from etflight.utils.preprocessing import Preprocessing
from etflight.utils.specs import describe, find, is_known
from etflight.utils.training_data import refuse_other_shape
from etflight.utils.yaml import guard_parser, require_file

_CHECKPOINT_HELP = (
    "The command line beats the configuration files, which beat what the checkpoint says: of the model, and, but for fit, of how its "
    "images are prepared."
)


class Parser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser, with usage errors of one line."""

    bases: ClassVar[Mapping[str, type]] = {
        **OneLineParser.bases,
        **{f"model.{name}": base for name, base in PLUGGABLE.items()},
    }

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        """As always, but a logger that asks for a folder is given the run's, which "." stands for."""
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        if issubclass(class_type, Logger) and "save_dir" in added:
            action = next(action for action in self._actions if action.dest == "save_dir")
            if action.required:
                action.required = False
                self.set_defaults(save_dir=".")
        return added


class EtflightCLI(LightningCLI):
    """Adds to LightningCLI: run folders, checkpoints as defaults of the model, and the linked sizes of the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our arguments, links and defaults, for every stage."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run: its folder is <default_root_dir>/<name>. By default that of its configuration files, "
            "<set>/<arm> for -c configs/data/<set>.yaml -c configs/arms/<arm>.yaml.",
        )
        parser.add_argument(
            "--first_stage",
            type=str | None,
            default=None,
            help="Arm whose run on the same set this one starts from: it gives --fine_tuning.checkpoint.",
        )
        parser.add_argument(
            "--overlays", type=list[str] | None, help=SUPPRESS
        )  # null in config.yaml of earlier versions
        parser.add_class_arguments(LastCheckpoint, "checkpoint")
        parser.add_class_arguments(FineTuning, "fine_tuning")
        parser.add_argument(
            "--monitor",
            type=NeuralCollapseMonitor | None,
            default={"class_path": "etflight.callbacks.NeuralCollapseMonitor", "init_args": {"every_n_epochs": "auto"}},
            help="What measures neural collapse in training (--monitor.every_n_epochs, --monitor.online, …); null: nothing does. "
            "A NeuralCollapseMonitor in trainer.callbacks takes its place.",
        )
        parser.add_argument(
            "--post_hoc",
            type=PostHoc | None,
            default=None,
            help="What decides in place of the trained head, in an evaluation: TauNormalization, NearestClassMean.",
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.num_channels", "model.in_chans", apply_on="instantiate")
        parser.set_defaults(
            {
                "model.optimizer": describe(PROTOCOL_SGD, "optimizer"),
                "trainer.default_root_dir": "runs",
                "trainer.enable_autolog_hparams": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse with the checkpoint's model as the lowest of the three: checkpoint, configuration files, command line."""
        Parser.given = argv = list(sys.argv[1:] if args is None else args)
        for file in config_files(argv):
            if not str(file).lstrip().startswith("{"):  # what a file would hold
                require_file(file)
        self.arm: str | None = None
        self.ckpt_path: Path | None = None
        self.saved_rows = 0
        self.images: list[str] = []  # without labels, to be predicted
        self.saved_shape: tuple[int, int] | None = None  # classes and channels
        self.verbose = True
        self.saved_logit_adjustment = 0.0
        stage = argv[0] if argv and argv[0] in self._subcommand_parsers else None
        if stage == "predict":
            add_prediction_arguments(self._subcommand_parsers[stage])
        if stage is not None and not any(arg in ("-h", "--help") or arg.endswith(".help") for arg in argv):
            self.ckpt_path = self._locate_run(argv, stage)
        if stage is None or self.ckpt_path is None:
            self.config = parser.parse_args(argv)
        else:
            self._parse_over_checkpoint(parser, argv, stage, self.ckpt_path)
        _check_seed(self.config[self.config["subcommand"]]["seed_everything"])

    def _locate_run(self, argv: list[str], stage: str) -> Path | None:
        """Find the run folder, and the checkpoint asked for; `last` is the one of the run's own folder."""
        self.named = bool(values_of(argv, "name"))
        self.trained_in: Path | None = None
        asked = value_of(argv, "ckpt_path")
        self.root = Path(value_of(argv, "trainer.default_root_dir") or "runs").expanduser()
        named_set, named_arm = set_and_arm(config_files(argv))
        self.arm = named_arm or named_set
        named_set = named_set or (value_of(argv, "data") or "run").rpartition(".")[2].lower()
        name = value_of(argv, "name") or "/".join(filter(None, (named_set, named_arm)))
        self.run_name = name_in_sweep(name) if stage == "fit" else name
        self.folder = self.root / self.run_name
        if asked is None:
            if stage != "fit" and "--print_config" not in argv:
                raise UserError(
                    f"{stage} needs a trained model: give --ckpt_path FILE, or --ckpt_path last with the name of its run"
                )
            return None
        if asked != "last":
            self.trained_in = run_of(Path(asked))
            return Path(asked)
        last = last_checkpoint(self.folder)
        if last.is_file():
            self.trained_in = self.folder
            return last
        if stage != "fit":
            raise UserError(f"there is no {last}: train first, or give --ckpt_path FILE")
        rank_zero_info(f"there is no {last}: training starts from scratch")
        return None

    def _parse_over_checkpoint(self, parser: LightningArgumentParser, argv: list[str], stage: str, path: Path) -> None:
        """Parse with the checkpoint's hyper-parameters as the model's defaults; no class is imported because it names it."""
        content = read_checkpoint(path)
        refuse_others(path, content, Classifier)
        if stage == "predict":
            argv, self.images = over_images(argv, path, content)
        self.saved_rows = int(content.get(CHECKPOINT_KEY, {}).get("metrics_rows", 0))
        backbone = value_of(argv, "model.backbone")
        given = {} if backbone is None else {"backbone": backbone}
        saved = plain_hyperparameters(content, given)
        self.saved_shape = saved.pop("num_classes"), saved.pop("in_chans", 3)
        self.saved_logit_adjustment = saved.get("logit_adjustment", 0.0)
        saved.pop("class_counts", None)  # the state dict holds them
        unknown = {
            name: describe(saved.pop(name), name)
            for name, base in PLUGGABLE.items()
            if saved.get(name) is not None and not is_known(describe(saved[name], name), base)
        }
        self._default_model(stage, saved)
        self.config = parser.parse_args(argv)
        if unknown:
            plain_hyperparameters(content, given)  # again: parsing imported what the user named, and only that
            for name, spec in unknown.items():
                if getattr(self.config[stage].get(f"model.{name}"), "class_path", None) == spec["class_path"]:
                    self._default_model(stage, {name: spec})
                elif value_of(argv, f"model.{name}") is None and value_of(argv, f"model.{name}.class_path") is None:
                    raise UserError(
                        f"checkpoint {path} needs {spec['class_path']} as its {name}: "
                        f"name it, so that it is imported (--model.{name} {spec['class_path']})"
                    )
            self.config = parser.parse_args(argv)
        if stage != "fit":
            prepare_as_trained(self.config[stage]["data"], Preprocessing.in_checkpoint(content))

    def _parse_ckpt_path(self) -> None:
        """Nothing: `parse_arguments` has done it, in the order that lets the command line win."""

    def _default_model(self, stage: str, values: dict[str, Any]) -> None:
        self._subcommand_parsers[stage].set_defaults({f"model.{name}": value for name, value in values.items()})

    def before_instantiate_classes(self) -> None:
        """Put the found checkpoint into the configuration, and claim the run folder.

        Raises:
            UserError: the folder is another's, or cannot be written to; no first stage; `overlays` of earlier versions.
        """
        config = self.config[self.subcommand]
        # absolute: Lightning takes "best", "registry:…" or "http…" at the start for something else than a file
        config["ckpt_path"] = None if self.ckpt_path is None else str(self.ckpt_path.absolute())
        config["weights_only"] = True
        if self.subcommand == "test":  # `TestResults` prints; Lightning's table has all numbers in one column
            self.verbose, config["verbose"] = config["verbose"], False
        if config.pop("overlays"):
            raise UserError(
                "overlays is no option any more: give the files one after another, -c data/SET.yaml -c arms/ARM.yaml"
            )
        config["name"] = self.run_name
        if self.subcommand == "fit":
            self._find_first_stage(config)
        else:
            self._choose_place_of_results(config)
        for logger in _as_list(config["trainer"]["logger"]):
            self._put_into_run_folder(logger, config)
        if config.get("output") is not None:
            output = Path(config["output"])
            check_output(output)
            check_writable(output.parent, "--output")
        elif self.subcommand != "validate" and not config["trainer"]["fast_dev_run"]:
            check_writable(self.folder)
            if self.subcommand == "fit":
                claim(self.folder, self.ckpt_path)
            else:
                claim_for_results(self.folder, self.trained_in)

    def _find_first_stage(self, config: Any) -> None:
        """Where the run of the arm that comes before this one has its checkpoint: in the same place, but for the name of the arm."""
        first, tuning = config["first_stage"], config["fine_tuning"]
        if first is None or tuning["checkpoint"] is not None or self.ckpt_path is not None:
            return
        parts = self.run_name.split("/")
        if self.arm not in parts:
            raise UserError(
                f"--first_stage {first}: the run {self.run_name} is not called by its arm {self.arm}, so nobody knows where the other is: "
                "give --fine_tuning.checkpoint FILE"
            )
        run = "/".join(first if part == self.arm else part for part in parts)
        checkpoint = last_checkpoint(self.root / run)
        if not checkpoint.is_file():
            raise UserError(
                f"{self.arm} starts from the run of {first}, but there is no {checkpoint}: train that first, or give "
                "--fine_tuning.checkpoint FILE"
            )
        tuning["checkpoint"] = str(checkpoint)

    def _choose_place_of_results(self, config: Any) -> None:
        """Beside the checkpoint, whatever the configuration is called, unless another name is given or something else decides."""
        post_hoc = config["post_hoc"] is not None
        if post_hoc or config["model"]["logit_adjustment"] != self.saved_logit_adjustment:
            if same_folder(self.folder, self.trained_in):
                raise UserError(
                    f"run folder {self.folder} is that of the trained model, whose own results stay as they are: "
                    "give the checkpoint by its path, and another --name"
                )
        elif self.trained_in is not None and not self.named:
            self.folder = self.trained_in

    def _put_into_run_folder(self, logger: Any, config: Any) -> None:
        """Let a logger without a place of its own write into the run folder, and W&B call the run by its name."""
        arguments = getattr(logger, "init_args", None)
        if arguments is None:
            return
        if arguments.get("save_dir", "elsewhere") in (None, "."):
            arguments["save_dir"] = str(self.folder)
        if logger.class_path.endswith("WandbLogger"):
            choose_names(
                arguments,
                folder=self.folder,
                name=self.run_name,
                seed=config["seed_everything"],
                data=_dataset_name(config["data"]),
            )

    def instantiate_classes(self) -> None:
        """As LightningCLI does, but what the checkpoint brings for an evaluation is not computed before.

        Raises:
            UserError: a class that cannot be made.
        """
        with nullcontext() if self.subcommand == "fit" else codes_from_state_dict():
            try:
                super().instantiate_classes()
            except ValueError as error:  # of the parser, with all that the option would take
                found = re.search(r"Problem with given class_path '[\w.]*?(\w+)':\s+(.+)", str(error))
                if found is None or user_error_in(error):
                    raise
                raise UserError(f"{found[1]} cannot be made: {found[2]}") from error

    def after_instantiate_classes(self) -> None:
        """Tell the data of images without labels; refuse a checkpoint of other shapes before Lightning finds tensors of others.

        Raises:
            UserError: it has another number of classes or channels.
        """
        if self.images:
            self.datamodule.paths = self.images
        if self.saved_shape is not None:
            refuse_other_shape(f"checkpoint {self.ckpt_path}", *self.saved_shape, self.datamodule)

    def before_fit(self) -> None:
        """Refuse what cannot be trained as it is written down."""
        refuse_unsupported(self.trainer, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with what writes the run folder in front of the user's own loggers and callbacks.

        Raises:
            UserError: a logger that would delete `metrics.csv`; a trainer that is to write nothing at all.
        """
        config = self._get(self.config_init, "trainer")
        if config.get("barebones"):
            raise UserError(
                "--trainer.barebones true turns off the files of a run, which this command is for: leave it out"
            )
        self.save_config_kwargs = {"name": self.run_name, "arm": self.arm, "trained_in": self.trained_in}
        fitting = self.subcommand == "fit"
        saves = fitting and config.get("enable_checkpointing") is not False
        last = self._get(self.config_init, "checkpoint") if saves else None
        fine_tuning = self._get(self.config_init, "fine_tuning")
        users = _as_list(config.get("callbacks"))
        # what saves comes first, before anything of the next step has happened, but after what makes the final weights
        callbacks = [
            StopSignals(last),
            *(callback for callback in users if isinstance(callback, StochasticWeightAveraging)),
            *_as_list(last),
            *([StepSeed(), Speed(), Progress(), fine_tuning] if fitting else []),
            *self._monitor(fitting, users),
            *_as_list(self._get(self.config_init, "post_hoc")),
            *(callback for callback in users if not isinstance(callback, StochasticWeightAveraging)),
        ]
        results = TestResults(self.verbose)
        callbacks += [StepNotice(), DoubleCorrection(), results, *self._predicting()]
        # else Lightning would add a checkpoint of its own
        kwargs["enable_checkpointing"] = saves and any(isinstance(callback, Checkpoint) for callback in users)
        if not any(isinstance(c, ProgressBar) for c in users):
            asked = config.get("enable_progress_bar")
            kwargs["enable_progress_bar"] = shown = is_watched() if asked is None else asked
            # Lightning's own redraws 100 times a second
            callbacks += [RichProgressBar(refresh_rate=4)] if shown else []
        if config.get("profiler") in _PROFILERS:
            kwargs["profiler"] = _PROFILERS[config["profiler"]](dirpath=self.folder, filename="profile")
        logger = config.get("logger")
        if logger is not False:
            own = [MetricsCSV(self.folder, self.saved_rows)] if fitting else []
            numbers = self.folder / "metrics.csv" if own else self.folder
            others = [FailSafe(other, numbers) for other in _as_list(None if logger is True else logger)]
            if any(isinstance(other, CSVLogger) and same_folder(self.folder, Path(other.log_dir)) for other in others):
                raise UserError(
                    "CSVLogger would delete the run's own metrics.csv: give --trainer.logger.name or leave it out"
                )
            kwargs["logger"] = [*own, *others] or False
        kwargs["plugins"] = [*_as_list(config.get("plugins")), SafeCheckpointIO()]
        if config.get("sync_batchnorm"):
            from etflight.backbones import SyncBatchNorm  # timm takes a second, which `--help` need not wait for

            kwargs["plugins"].append(SyncBatchNorm())
        # whatever Lightning itself writes belongs to the run, too
        kwargs["default_root_dir"] = str(self.folder)
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _monitor(self, fitting: bool, users: Sequence[Any]) -> list[Any]:
        if not fitting or any(isinstance(callback, NeuralCollapseMonitor) for callback in users):
            return []
        return _as_list(self._get(self.config_init, "monitor"))

    def _predicting(self) -> list[PredictionTable]:
        if self.subcommand != "predict":
            return []
        output, top_k, embeddings = (self._get(self.config_init, name) for name in ("output", "top_k", "embeddings"))
        return [PredictionTable(Path(output or self.folder / "predictions.csv"), top_k, embeddings)]


def main(args: Sequence[str] | None = None) -> EtflightCLI:
    """Run `etflight` with these arguments (those of the process by default); errors are raised.

    Args:
        args: such as `["fit", "-c", "configs/data/digits.yaml", "-c", "configs/arms/ce.yaml"]`.

    Raises:
        UserError: what the user gave cannot work.
        SystemExit: status 2 for a usage error, 0 after help.
    """
    _quieten()
    guard_parser()
    register_type(
        torch.device, fail_already_registered=False
    )  # an argument of StochasticWeightAveraging, which config.yaml has to hold
    return EtflightCLI(
        Classifier,
        ImageDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        parser_class=Parser,
        auto_configure_optimizers=False,
        args=None if args is None else list(args),
        parser_kwargs={
            "prog": "etflight",
            **{stage: {"description": f"{text} {_CHECKPOINT_HELP}"} for stage, text in STAGES.items()},
        },
    )


_PROFILERS: dict[Any, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _dataset_name(data: Any) -> str:
    cls: Any = find({"class_path": data.class_path}, ImageDataModule)
    return str(cls.name_with(data.init_args)) if cls else data.class_path.rpartition(".")[2]


def _check_seed(seed: bool | int) -> None:
    """Refuse what no generator takes; true and false leave it to the environment, where data modules look, too."""
    option, value = ("--seed_everything", str(seed))
    if isinstance(seed, bool):
        option, value = "PL_GLOBAL_SEED", os.environ.get("PL_GLOBAL_SEED", "0")
    if not (value.isdecimal() and int(value) < 2**32):
        raise UserError(f"{option} is {value}: give a whole number from 0 to {2**32 - 1}")


def _quieten() -> None:
    """Silence what is noise for this program: hints about a service we do not use, workers that in-memory sets do not need."""
    for pattern in (
        r".*does not have many workers.*",
        r".*smaller than the logging interval.*",
        r".*is not supported by the model summary.*",
        r".*epoch parameter in `scheduler.step\(\)` was not necessary.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*No seed found.*",
        r".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    warnings.formatwarning = _in_one_line
    on_dead_process(print_dead_process)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())


_format_warning = warnings.formatwarning


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Our own warnings as `etflight.utils.errors.warn` has them; others keep the place they come from."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"etflight: warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


# the data sets are found by name because they are imported here
_ = etflight.data
