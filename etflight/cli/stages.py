"""The command line: LightningCLI over `Classifier` and the data modules, with run folders and errors for people."""

import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import register_type
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_info

from etflight.callbacks import (
    FitTemperature,
    PostHoc,
    default_callbacks,
)
from etflight.callbacks.checkpoint import KEY as CHECKPOINT_KEY
from etflight.callbacks.predictions import PredictionTable
from etflight.callbacks.progress import is_watched
from etflight.checkpoint.files import SafeCheckpointIO, read_checkpoint, refuse_others
from etflight.checkpoint.hyperparameters import plain_hyperparameters
from etflight.checkpoint.specs import find_class
from etflight.checkpoint.weights_to_come import weights_come_next
from etflight.classifier import Classifier
from etflight.cli import STAGES
from etflight.cli.argv import EarlyOptions, split_config_files, with_named_data
from etflight.cli.parser import hint_for_run, import_modules
from etflight.cli.place import Place
from etflight.cli.predict import as_data, images_of
from etflight.cli.second_stage import leave_out_first_stage
from etflight.cli.stage_parser import StageParser, refuse_null_sections
from etflight.cli.unsupported import refuse_missing_hardware, refuse_unsupported
from etflight.data.base import ImageDataModule
from etflight.data.facts import refuse_other_shape
from etflight.data.preprocessing import Preprocessing
from etflight.data.run_options import prepare_as_trained
from etflight.loading import images_of_training
from etflight.runs.folder import METRICS, PREDICTIONS, is_own_checkpoint, same_folder
from etflight.runs.loggers import MetricsCSV
from etflight.runs.record import RunRecord
from etflight.runs.wandb import choose_names, fail_safe
from etflight.utils.errors import UserError, options_for_arguments, print_dead_process
from etflight.utils.lightning_private import on_dead_process
from etflight.utils.trainer import callbacks_of, is_trial_run
from etflight.utils.yaml import guard_parser

_CHECKPOINT_HELP = (
    "The command line beats the configuration files, which beat what the checkpoint says of the model and, except in fit, of how its "
    "images are prepared."
)


class EtflightCLI(LightningCLI):
    """LightningCLI with run folders, a checkpoint's model as the default, and sizes linked to the data."""

    def add_arguments_to_parser(self, parser: StageParser) -> None:  # type: ignore[override]
        """Add our arguments, links and defaults for every stage."""
        parser.add_stage_arguments()

    def parse_arguments(self, parser: StageParser, args: Any) -> None:  # type: ignore[override]
        """Parse with three sources, the lowest first: the checkpoint's model, configuration files, command line.

        Raises:
            UserError: No command comes first; or the checkpoint does not exist, cannot be read, or needs a class that nobody has named.
        """
        argv = list(sys.argv[1:] if args is None else args)
        if (
            not argv
            or argv[0] not in STAGES
            or any(word in ("-h", "--help") or word.endswith(".help") for word in argv)
        ):
            parser.parse_args(argv)  # exits after help, or with a usage error
            raise UserError(f"the command comes first: give one of {', '.join(STAGES)} in front of its options")
        stage = argv[0]
        files, words = split_config_files(f"etflight {stage}", argv[1:])
        words = with_named_data(files, words)
        self.options = options = EarlyOptions.of(f"etflight {stage}", files, words)
        self.place = Place.of(stage, options)
        self.saved_model: dict[str, Any] = {}  # the arguments of the checkpoint's model
        self.saved_rows, self.saved_step, self.verbose = 0, -1, True
        self.images = images_of(options) if stage == "predict" else []
        argv = [stage, *(f"--config={file}" for file in files)]
        if self.place.checkpoint is not None:
            self._parse_over_checkpoint(parser, argv, words, options, self.place.checkpoint)
        elif stage == "fit" or "--print_config" in words:
            parser.start_from_own_defaults(stage, options)
            self.config = parser.parse_args([*argv, *words])
        else:
            hint = next(filter(None, map(hint_for_run, words)), "")
            raise UserError(
                f"{stage} needs a trained model: give --ckpt_path FILE, or --ckpt_path last with the name of its run{hint}"
            )
        refuse_null_sections(self.config[stage], options)
        seed = self.config[stage]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything is {seed}: give a whole number from 0 to {2**32 - 1}")
        self.config[stage]["ckpt_path"] = None  # with it, Lightning would let the checkpoint's model win

    def _parse_over_checkpoint(
        self, parser: LightningArgumentParser, files: list[str], words: list[str], options: EarlyOptions, path: Path
    ) -> None:
        """Parse with the checkpoint's hyper-parameters as the model's defaults; import no class because it names it."""
        stage = files[0]
        content = read_checkpoint(path)
        refuse_others(path, content, Classifier)
        if self.images:
            files = [*files, *as_data(options, path, content)]
        backbone = options.value("model.backbone")
        given = {} if backbone is None else {"backbone": backbone}
        model = plain_hyperparameters(content, Classifier, given)
        self.saved_model, self.saved_rows = model, int(content.get(CHECKPOINT_KEY, {}).get("metrics_rows", 0))
        self.saved_step = content.get("global_step", -1)

        # the data decide the sizes, and the state dict holds the counts
        defaults = model.keys() - {"num_classes", "in_chans", "class_counts"}
        for name in Classifier.PLUGGABLE:
            if model.get(name) is None or find_class(model[name], Classifier.PLUGGABLE[name]) is not None:
                continue
            needed, named = model[name]["class_path"], options.value(f"model.{name}", object)
            if named is None:
                raise UserError(
                    f"checkpoint {path} needs {needed} as its {name}: "
                    f"name it, so that it is imported (--model.{name} {needed})"
                )
            if needed in (named, named.get("class_path") if isinstance(named, dict) else None):
                import_modules([needed.rpartition(".")[0]])
            else:
                defaults -= {name}
        self.saved_preprocessing = Preprocessing.in_checkpoint(content)
        plain_hyperparameters(content, Classifier, given)  # by now all that the user has named is imported
        parser.set_defaults({f"{stage}.model.{name}": model[name] for name in defaults})
        self.config = parser.parse_args([*files, *words])
        if stage != "fit":
            prepare_as_trained(self.config[stage]["data"], self.saved_preprocessing)

    def before_instantiate_classes(self) -> None:
        """Put the found checkpoint into the configuration, and claim the run folder.

        Raises:
            UserError: The folder is another run's or cannot be written to, or the first stage is missing.
        """
        config, place = self.config[self.subcommand], self.place
        # absolute, because a path that starts with "best", "registry:" or "http" is no file to Lightning
        config["ckpt_path"] = None if place.checkpoint is None else str(place.checkpoint.absolute())
        config["weights_only"] = True
        config["name"] = place.name
        if self.subcommand == "test":  # `TestResults` prints; Lightning's table has all numbers in one column
            self.verbose, config["verbose"] = config["verbose"], False
        if self.subcommand != "fit":
            before = {"logit_adjustment": 0.0, "adjustment": "additive", **self.saved_model}
            adjusted = any(config["model"][name] != before[name] for name in ("logit_adjustment", "adjustment"))
            self.decides_otherwise = adjusted or config["post_hoc"] is not None
            place.move_to_training(decides_otherwise=self.decides_otherwise)
            if config["fine_tuning"]["checkpoint"] is None:  # only a training starts from another run
                config["fine_tuning"]["load"] = None
        elif config["first_stage"] and config["fine_tuning"]["checkpoint"] is None:
            config["fine_tuning"]["checkpoint"] = place.first_stage(config["first_stage"])
        leave_out_first_stage(config["fine_tuning"], self.options)
        for logger in _as_list(config["trainer"]["logger"]):
            self._put_into_run_folder(logger, config)
        place.claim(config)

    def _put_into_run_folder(self, logger: Any, config: Any) -> None:
        """Let a logger without a place of its own write into the run folder, and W&B call the run by its name."""
        arguments = getattr(logger, "init_args", None)
        if arguments is None:
            return
        folder = self.place.folder
        if arguments.get("save_dir", "elsewhere") in (None, "."):
            arguments["save_dir"] = str(folder)
        if logger.class_path.endswith("WandbLogger"):
            data = _dataset_name(config["data"])
            choose_names(arguments, folder=folder, name=self.place.name, seed=config["seed_everything"], data=data)

    def instantiate_classes(self) -> None:
        """Build them as LightningCLI does, but compute nothing that the checkpoint of an evaluation brings."""
        with nullcontext() if self.subcommand == "fit" else weights_come_next():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Give the data module its images without labels; refuse a checkpoint of other shapes before Lightning fails on its tensors.

        Raises:
            UserError: The checkpoint has another number of classes or channels.
        """
        if self.images:
            self.datamodule.paths = self.images
        if model := self.saved_model:
            name = f"checkpoint {self.place.checkpoint}"
            refuse_other_shape(name, model["num_classes"], model.get("in_chans", 3), self.datamodule)

    def before_predict(self) -> None:
        """Give what decides in place of the trained head the images of its training, which are not those of `--images`."""
        if not (self.images and self.decides_otherwise):
            return
        takers = [each for each in self.trainer.callbacks if isinstance(each, PostHoc | FitTemperature)]  # type: ignore[attr-defined]
        needs = next(
            (type(each).__name__ for each in takers if isinstance(each, PostHoc) and each.needs_training_data), None
        )
        data = images_of_training(self.place.trained_in, self.saved_preprocessing, needs)
        for each in takers:
            each.training_data = data

    def before_fit(self) -> None:
        """Refuse a training that could not be what the run's files say."""
        refuse_unsupported(self.trainer, self.model)

    def after_fit(self) -> None:
        """Say why a training ended before its last epoch, and where everything is."""
        trainer = self.trainer
        over = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch
        if trainer.global_step == self.saved_step:
            more = f": epoch {trainer.current_epoch} was the last (--trainer.max_epochs for more)" if over else ""
            rank_zero_info(f"nothing was left to train{more}")
        elif trainer.should_stop and not over and callbacks_of(trainer, EarlyStopping):
            rank_zero_info(f"EarlyStopping ended the training after epoch {trainer.current_epoch}")
        if not is_trial_run(trainer):
            rank_zero_info(f"run folder: {self.place.folder}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; the loggers and callbacks that write the run folder come before the user's own."""
        options, place = self.config_init[self.subcommand], self.place
        config = options["trainer"]
        refuse_missing_hardware(config["accelerator"])
        self.save_config_kwargs = {"name": place.name, "arm": place.arm, "trained_in": place.trained_in}
        fits = self.subcommand == "fit"
        users = [user for user in _as_list(config["callbacks"]) if fits or not isinstance(user, Checkpoint)]
        saves = fits and config["enable_checkpointing"] is not False
        table = None
        if self.subcommand == "predict":
            output = Path(options["output"] or place.folder / PREDICTIONS)
            table = PredictionTable(output, options["top_k"], options["embeddings"])
        callbacks = default_callbacks(
            users,
            stage=self.subcommand,  # type: ignore[arg-type]  # one of STAGES
            checkpoint=saves and options["checkpoint"],
            monitor=options.get("monitor") or False,
            fine_tuning=options["fine_tuning"],
            post_hoc=options["post_hoc"],
            verbose=self.verbose,
            predictions=table,
        )
        # else Lightning would add a checkpoint of its own
        kwargs["enable_checkpointing"] = saves and any(isinstance(callback, Checkpoint) for callback in users)
        if not any(isinstance(callback, ProgressBar) for callback in users):
            asked = config["enable_progress_bar"]
            kwargs["enable_progress_bar"] = shown = is_watched() if asked is None else asked
            # Lightning's own redraws 100 times a second
            callbacks += [RichProgressBar(refresh_rate=4)] if shown else []
        if config["profiler"] in _PROFILERS:
            kwargs["profiler"] = _PROFILERS[config["profiler"]](dirpath=place.folder, filename="profile")
        if config["logger"] is not False:
            kwargs["logger"] = self._loggers([] if config["logger"] is True else _as_list(config["logger"])) or False
        kwargs["plugins"] = [*_as_list(config["plugins"]), SafeCheckpointIO()]
        if config["sync_batchnorm"]:
            from etflight.backbones import SyncBatchNorm  # timm takes a second, which `--help` need not wait for

            kwargs["plugins"].append(SyncBatchNorm())
        # whatever Lightning itself writes belongs to the run, too
        kwargs["default_root_dir"] = str(place.folder)
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def _loggers(self, users: list[Any]) -> list[Any]:
        """The run's `metrics.csv` in a training, and the user's loggers, which fall silent instead of raising errors."""
        folder = self.place.folder
        if self.subcommand != "fit":
            return [fail_safe(user, folder) for user in users]
        if any(isinstance(user, CSVLogger) and same_folder(folder, Path(user.log_dir)) for user in users):
            raise UserError(
                "CSVLogger would write into the run's own metrics.csv: give --trainer.logger.name or leave it out"
            )
        rows = self.saved_rows if is_own_checkpoint(folder, self.place.checkpoint) else 0
        return [MetricsCSV(folder, rows), *(fail_safe(user, folder / METRICS) for user in users)]


@options_for_arguments()
def main(args: Sequence[str] | None = None) -> EtflightCLI:
    """Run `etflight` with these arguments (those of the process by default); errors are raised.

    Args:
        args: The arguments, such as `["fit", "-c", "configs/data/digits.yaml", "-c", "configs/arms/ce.yaml"]`.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    _silence_warnings()
    guard_parser()
    # an argument of StochasticWeightAveraging, which config.yaml has to hold
    register_type(torch.device, fail_already_registered=False)
    return EtflightCLI(
        Classifier,
        ImageDataModule,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        parser_class=StageParser,
        auto_configure_optimizers=False,
        args=None if args is None else list(args),
        parser_kwargs={
            "prog": "etflight",
            **{stage: {"stage": stage, "description": f"{text} {_CHECKPOINT_HELP}"} for stage, text in STAGES.items()},
        },
    )


_PROFILERS: dict[Any, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _dataset_name(data: Any) -> str:
    cls: Any = find_class({"class_path": data.class_path}, ImageDataModule)
    options = {name: _dataset_name(v) if hasattr(v, "class_path") else v for name, v in vars(data.init_args).items()}
    return str(cls.name_with(options)) if cls else data.class_path.rpartition(".")[2]


def _silence_warnings() -> None:
    """Silence warnings that are noise here: about workers that sets in memory do not need, and the like."""
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
    on_dead_process(print_dead_process)
