"""The options of fit, validate, test and predict."""

from argparse import SUPPRESS
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from etflight.callbacks import FineTuning, LastCheckpoint, NeuralCollapseMonitor, PostHoc
from etflight.checkpoint.specs import class_called, to_spec
from etflight.classifier import Classifier
from etflight.cli.argv import EarlyOptions
from etflight.cli.parser import OneLineParser
from etflight.cli.predict import add_prediction_arguments
from etflight.heads import ETFHead
from etflight.losses import DotRegressionLoss
from etflight.optim import PROTOCOL_SGD
from etflight.runs.folder import ROOT
from etflight.utils.errors import UserError


class StageParser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser, with one-line usage errors.

    Args:
        args: Arguments of LightningCLI's parser.
        stage: The command whose options it parses; empty for all of them.
        kwargs: Keyword arguments of LightningCLI's parser.
    """

    bases: ClassVar[Mapping[str, type]] = {
        **OneLineParser.bases,
        **{f"model.{name}": base for name, base in Classifier.PLUGGABLE.items()},
        "post_hoc": PostHoc,
    }

    def __init__(self, *args: Any, stage: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    def add_class_arguments(self, class_type: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add them as LightningCLI does, but give a logger that asks for a folder the run's, which "." stands for."""
        added: list[str] = super().add_class_arguments(class_type, *args, **kwargs)
        if issubclass(class_type, Logger) and "save_dir" in added and self.get_default("save_dir") is None:
            self.set_defaults(save_dir=".")
        return added

    def add_method_arguments(self, *args: Any, skip: set[str | int] | None = None, **kwargs: Any) -> list[str]:
        """Add those of the trainer's method, with our own words for the checkpoint, which `Place` finds and `SafeCheckpointIO` reads."""
        ours = {"ckpt_path", "weights_only"}
        added: list[str] = super().add_method_arguments(*args, skip={*(skip or ()), *ours}, **kwargs)
        what = "to go on from" if self.stage == "fit" else "with the trained model"
        self.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help=f"Checkpoint {what}: a file, or `last` for that of the run's own folder.",
        )
        self.add_argument("--weights_only", type=bool | None, default=None, help=SUPPRESS)  # nothing else is ever read
        return [*added, *ours]

    def add_stage_arguments(self) -> None:
        """Add what LightningCLI does not know of: our arguments, links and defaults."""
        self.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run: its folder is <default_root_dir>/<name>. By default that of its configuration files, "
            "<set>/<arm> for -c configs/data/<set>.yaml -c configs/arms/<arm>.yaml.",
        )
        self.add_argument(
            "--first_stage",
            type=str | None,
            default=None,
            help="For the file of an arm: the arm whose run on the same set it starts from. Any other run is given by "
            "--fine_tuning.checkpoint FILE.",
        )
        self.add_class_arguments(LastCheckpoint, "checkpoint")
        self.add_class_arguments(FineTuning, "fine_tuning")
        self.add_argument(
            "--monitor",
            type=NeuralCollapseMonitor | None,
            default={"class_path": "etflight.callbacks.NeuralCollapseMonitor", "init_args": {"every_n_epochs": "auto"}},
            help="What measures neural collapse in training (--monitor.every_n_epochs, --monitor.online, …); null: nothing does. "
            "A NeuralCollapseMonitor in trainer.callbacks takes its place.",
        )
        self.add_argument(
            "--post_hoc",
            type=PostHoc | None,
            default=None,
            help="What decides in place of the trained head, in an evaluation: TauNormalization, NearestClassMean.",
        )
        if self.stage == "predict":
            add_prediction_arguments(self)
        self.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        self.link_arguments("data.num_channels", "model.in_chans", apply_on="instantiate")
        self.set_defaults(
            {
                "model.optimizer": to_spec(PROTOCOL_SGD, "optimizer"),
                "trainer.default_root_dir": str(ROOT),
                "trainer.enable_autolog_hparams": False,
                "trainer.enable_model_summary": False,  # one line of `RunRecord` says it
            }
        )

    def start_from_own_defaults(self, stage: str, options: EarlyOptions) -> None:
        """Give a part of the model that the user names its own defaults; it would keep those of our default part."""
        for name, ours in (("head", ETFHead), ("loss", DotRegressionLoss), ("optimizer", PROTOCOL_SGD.func)):
            path = options.class_of(f"model.{name}")
            cls = None if path is None else class_called(path, Classifier.PLUGGABLE[name])
            if cls is not None and cls is not ours:
                self.set_defaults({f"{stage}.model.{name}": {"class_path": f"{cls.__module__}.{cls.__qualname__}"}})


def refuse_null_sections(config: Any, options: EarlyOptions) -> None:
    """Refuse a section that a file makes null; `data` and `trainer` the parser looks after.

    Raises:
        UserError: There is one.
    """
    for section in ("model", "checkpoint", "fine_tuning"):
        if config[section] is None:
            named = [path for path, said in zip(options.files, options.contents, strict=True) if section in said]
            raise UserError(
                f"{named[-1] if named else '-c'}: {section} is null: give options below it, or leave it out"
            )
