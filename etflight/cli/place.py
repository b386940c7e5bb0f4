"""The folder of a run and the checkpoint that it starts from, found from a command line and its configuration files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from etflight.analysis.predictions import check_output
from etflight.cli.argv import EarlyOptions, set_and_arm
from etflight.runs.folder import (
    CONFIG,
    PREDICTIONS,
    RESULTS,
    ROOT,
    check_writable,
    claim,
    claim_for_results,
    last_checkpoint,
    read_record,
    run_of,
    same_folder,
)
from etflight.runs.wandb import name_in_sweep
from etflight.utils.errors import UserError
from etflight.utils.yaml import read_yaml


@dataclass
class Place:
    """The place of a run.

    Attributes:
        stage: The command: fit, validate, test or predict.
        root: The folder of all runs.
        name: The run's name.
        is_named: Whether the command line gives the name.
        arm: The arm that the configuration files stand for, or None.
        folder: The folder for the run's files.
        checkpoint: The checkpoint that the run starts from, or None.
        trained_in: The run folder of the checkpoint, or None.
    """

    stage: str
    root: Path
    name: str
    is_named: bool
    arm: str | None
    folder: Path
    checkpoint: Path | None = None
    trained_in: Path | None = None

    @classmethod
    def of(cls, stage: str, options: EarlyOptions) -> "Place":
        """Find the run folder and the checkpoint; `last` means the last checkpoint of the run's own folder.

        Raises:
            UserError: The stage needs a checkpoint, and there is no `last`.
        """
        files, has_arm = options.files, any(file.parent.name == "arms" for file in options.files)
        set_name, arm = set_and_arm(files if has_arm else [_file_of_arm(file) for file in files])
        default = (set_name or (options.value("data") or "run").rpartition(".")[2].lower(), arm)
        name = options.value("name") or "/".join(filter(None, default))
        if stage == "fit":
            name = name_in_sweep(name)
        root = Path(options.value("trainer.default_root_dir") or ROOT).expanduser()
        folder = root / name
        if ".." in folder.parts:  # checkpoints hold Lightning's places of files, and one with ".." in it is refused
            folder = folder.resolve()
        place = cls(stage, root, name, bool(options.given["name"]), arm or set_name, folder)
        asked = options.value("ckpt_path")
        last = last_checkpoint(place.folder)
        if asked not in (None, "last"):
            place.checkpoint, place.trained_in = Path(asked), run_of(Path(asked))
        elif asked == "last" and last.is_file():
            place.checkpoint, place.trained_in = last, place.folder
        elif asked == "last":
            if stage != "fit":
                raise UserError(f"there is no {last}: train first, or give --ckpt_path FILE")
            rank_zero_info(f"there is no {last}: training starts from scratch")
        return place

    def first_stage(self, arm: str) -> str | None:
        """The last checkpoint of another arm's run; its name differs from this run's only in the arm.

        A run that is resumed no longer needs it; None if it was another one.

        Raises:
            UserError: A new run needs it, and there is no such checkpoint.
        """
        run = "/".join(arm if part == self.arm else part for part in self.name.split("/"))
        checkpoint = last_checkpoint(self.root / run)
        if self.checkpoint is not None:
            return None if run == self.name else str(checkpoint)
        if not checkpoint.is_file():
            raise UserError(
                f"{self.arm} starts from the run of {arm}, but there is no {checkpoint}: train that first, or give "
                "--fine_tuning.checkpoint FILE"
            )
        return str(checkpoint)

    def move_to_training(self, *, decides_otherwise: bool) -> None:
        """Put results beside the checkpoint, whatever the configuration is called, unless the run is named or decides otherwise.

        Args:
            decides_otherwise: Whether something decides in place of the trained head.

        Raises:
            UserError: Results of something else would stand beside the checkpoint.
        """
        if decides_otherwise:
            if same_folder(self.folder, self.trained_in):
                raise UserError(
                    f"run folder {self.folder} is that of the trained model, whose own results stay as they are: "
                    "give the checkpoint by its path, and another --name"
                )
        elif self.trained_in is not None and not self.is_named:
            self.folder = self.trained_in

    def claim(self, config: Any) -> None:
        """Refuse places that cannot be written to, or that hold files of another run.

        Raises:
            UserError: The run folder or the file of predictions is such a place.
        """
        if config.get("output") is not None:
            output = Path(config["output"])
            check_output(output)
            check_writable(output.parent, "output")
        elif self.stage != "validate" and not config["trainer"]["fast_dev_run"]:
            check_writable(self.folder)
            if self.stage == "fit":
                claim(self.folder, self.checkpoint)
            else:
                assert self.checkpoint is not None  # parsing has seen to that
                claim_for_results(self.folder, self.trained_in, self.checkpoint)
                if self.stage == "test":
                    _refuse_other_decision(self.folder, config)
                else:
                    check_output(self.folder / PREDICTIONS)


def _refuse_other_decision(folder: Path, config: Any) -> None:
    """Refuse to replace the results of a test of the same model that decides by other logits."""
    if not (folder / RESULTS).is_file() or not (folder / CONFIG).is_file():
        return
    known = read_yaml(folder / CONFIG)
    if isinstance(known, dict) and (before := _decision(known)) != _decision(config):
        tau, adjustment, post_hoc = before
        name = "the trained head" if post_hoc is None else post_hoc["class_path"].rpartition(".")[2]
        raise UserError(
            f"run folder {folder} has the results of a test that decides otherwise ({name}, {adjustment} logit adjustment with "
            f"τ {tau:g}), which stay as they are: give a new --name"
        )


def _decision(config: Any) -> tuple[Any, Any, Any]:
    model, post_hoc = config.get("model") or {}, config.get("post_hoc")
    plain = post_hoc.as_dict() if isinstance(post_hoc, Namespace) else post_hoc
    return model.get("logit_adjustment", 0.0), model.get("adjustment", "additive"), plain


def _file_of_arm(file: Path) -> Path:
    """For the `config.yaml` of a run folder, a file that is called as the arm of that run; any other file is itself."""
    arm = read_record(file.parent).get("arm") if file.name == CONFIG else None
    return Path("arms", f"{arm}.yaml") if isinstance(arm, str) else file
