"""The record that makes a run repeatable: `config.yaml` and `run.json` in its folder."""

import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from etflight.runs.based_on import identity
from etflight.runs.folder import (
    CONFIG,
    PER_CLASS,
    RECORD,
    RESULTS,
    lock,
    read_record,
    run_folder,
    run_of,
    same_folder,
    writing_to,
)
from etflight.runs.wandb import ID, configure_runs, log_checkpoint, recorded_id
from etflight.utils.files import replacing, write_json
from etflight.utils.trainer import data_module

PACKAGES = ("etflight", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy")


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml` and `run.json` into the run folder when training starts, or a test starts that has a folder of its own.

    W&B runs get the same.

    Args:
        parser: The parser of the configuration.
        config: The parsed configuration.
        name: The name of the run.
        arm: The name of the arm that its configuration files describe, or None.
        trained_in: The run folder of the checkpoint that is tested or resumed from, or None; the record of a test takes seed and images
            from it.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Any,
        name: str,
        arm: str | None,
        trained_in: Path | None = None,
    ) -> None:
        super().__init__(parser, config, overwrite=True)
        self.name, self.arm, self.trained_in = name, arm, trained_in
        self._lock: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet, because what comes before the start may refuse the run."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files of a test that has a folder of its own, on the first process only.

        Raises:
            UserError: The folder cannot be written to.
        """
        if not trainer.is_global_zero:
            return
        config, beside = self._plain_config(), same_folder(run_folder(trainer), self.trained_in)
        if not beside:
            known = {} if self.trained_in is None else read_record(self.trained_in)
            further: dict[str, Any] = {name: known[name] for name in ("seed", "data") if name in known}
            if (pattern := pattern_of(Path(config["ckpt_path"]))) is not None:
                further["checkpoint_pattern"] = pattern
            self._write(trainer, config, {**further, "checkpoint": config["ckpt_path"]})
        self._tell_wandb(trainer, config, keeps_config=beside)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files of a training, on the first process only; by now a checkpoint that it cannot go on from has been refused.

        Raises:
            UserError: The folder cannot be written to, or another process trains in it.
        """
        if not trainer.is_global_zero:
            return
        config, data, model = self._plain_config(), data_module(trainer), cast(Any, pl_module)
        cost = model.cost(data.preprocessing.input_size)
        parts = (config["model"]["backbone"], type(model.head).__name__, type(model.loss).__name__)
        rank_zero_info(f"{', '.join(parts)}: {cost}")
        training = training_facts(seed=config["seed_everything"], data=data)
        self._write(trainer, config, {**training, "model": cost._asdict()})
        self._tell_wandb(trainer, config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the results of the checkpoint that this training goes on from: they are not those of its last epoch."""
        if trainer.is_global_zero:
            for name in (RESULTS, PER_CLASS):
                (run_folder(trainer) / name).unlink(missing_ok=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Upload the last checkpoint to W&B if that was asked for; other callbacks have saved it by now."""
        if trainer.is_global_zero:
            log_checkpoint(trainer, self._plain_config()["trainer"]["logger"])

    def _plain_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        return config

    def _tell_wandb(self, trainer: Trainer, config: dict[str, Any], *, keeps_config: bool = False) -> None:
        # W&B can group runs by the arm
        configure_runs(trainer, {**config, "arm": self.arm or self.name}, keeps_config=keeps_config)

    def _write(self, trainer: Trainer, config: dict[str, Any], further: dict[str, Any]) -> None:
        folder = run_folder(trainer)
        resumes = same_folder(folder, self.trained_in)
        based_on = _based_on(config, self.trained_in, resumes=resumes)
        record = {
            "name": self.name,
            "arm": self.arm,
            "command": shlex.join(["etflight", *sys.argv[1:]]),
            "config_sha256": config_sha256(config, based_on),
            "commit": _commit(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
            "hardware": {
                "cpu": _processor(),
                "threads": torch.get_num_threads(),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                "device": trainer.strategy.root_device.type,
                "processes": trainer.world_size,
            },
            **({} if based_on is None else {"based_on": based_on}),
            **further,
        }
        if resumes:  # how it began stays, and `resumed` gets one more entry
            before, again = read_record(folder), {name: record[name] for name in ("command", "commit", "started")}
            record |= {name: before.get(name, value) for name, value in again.items()}
            record["resumed"] = [*before.get("resumed", []), again]
        if (known := recorded_id(folder)) is not None:
            record[ID] = known
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or lock(folder)
            write_json(folder / RECORD, record)
            saved = self.config.clone()
            if "checkpoint" not in further:  # with the one that a training goes on from, the file could not repeat it
                saved.ckpt_path = None
            with replacing(folder / CONFIG) as partial:
                self.parser.save(saved, partial, skip_unset=False, overwrite=True, multifile=False)


def training_facts(*, seed: Any, data: Any) -> dict[str, Any]:
    """What a training is repeated by beside command, configuration and versions: the seed, and the choice of images."""
    return {
        "seed": seed,
        "data": {**data_facts(data), **data.ratios, "validation": data.validation},
    }


def data_facts(data: Any) -> dict[str, Any]:
    """The facts that identify a data module's training images: class, set, fingerprint, and the number of images of each class."""
    return {
        "class": type(data).__name__,
        "dataset": data.dataset_name,
        "fingerprint": data.fingerprint,
        "class_counts": [int(n) for n in data.class_counts],
    }


def test_facts(data: Any) -> dict[str, Any]:
    """The facts that identify a data module's test images: the set, their content, the folder of image files, and how many there are.

    The content of image files covers their names only, so their folder tells apart sets whose files have the same names.
    """
    images = data.split("test")
    return {
        "dataset": data.dataset_name,
        "content": images.source.content,
        "folder": images.source.folder,
        "test_images": len(images.labels),
    }


def config_sha256(config: Mapping[str, Any], based_on: Mapping[str, Any] | None = None) -> str:
    """Hash a configuration without what differs between the runs of one arm: seeds, name, place, loggers, download, paths of checkpoints.

    In place of the path of a checkpoint stands the identity of the run that trained it, which its seeds share.

    Args:
        config: All arguments as plain data.
        based_on: The `etflight.runs.based_on.identity` of the run whose checkpoint it starts from; None if there is none, or it is unknown.

    Returns:
        64 hexadecimal digits, the same for every seed of an arm, and for every seed of its images.
    """
    outer = {"seed_everything", "name", "ckpt_path", "weights_only"}
    content = {key: value for key, value in config.items() if key not in outer}
    trainer = {key: value for key, value in config["trainer"].items() if key not in ("default_root_dir", "logger")}
    data = content.get("data")
    if isinstance(data, Mapping) and "init_args" in data:
        content["data"] = _not_downloaded(
            {**data, "init_args": {k: v for k, v in data["init_args"].items() if k != "seed"}}
        )
    tuning = content.get("fine_tuning")
    if tuning:
        told = {key: value for key, value in tuning.items() if key != "store_features"}  # which changes no number
        content["fine_tuning"] = {**told, "checkpoint": None}
    if based_on is not None:
        content["based_on"] = based_on["config_sha256"]
    text = json.dumps({**content, "trainer": trainer}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _based_on(config: Mapping[str, Any], trained_in: Path | None, *, resumes: bool) -> dict[str, Any] | None:
    """The identity of the run that a run tests, goes on from, or takes weights from; None if there is none, or it is unknown."""
    if trained_in is None:
        first_stage = (config.get("fine_tuning") or {}).get("checkpoint")
        return identity(run_of(Path(first_stage))) if first_stage else None
    based_on = identity(trained_in)
    if based_on is None:
        return None
    further: dict[str, Any] | None = based_on.get("based_on")
    goes_on = resumes or based_on["config_sha256"] == config_sha256(
        config, further
    )  # the same training, perhaps elsewhere
    return further if goes_on else based_on


def pattern_of(checkpoint: Path) -> str | None:
    """The pattern of a checkpoint's name, such as epoch=*-step=*, if its numbers are what the training came to, and no choice.

    They are where Lightning has filled them in (`key=number`), and the run has kept one checkpoint of that pattern: the best by a
    validation measure, or the latest. Of several, such as one of every tenth epoch, the numbers tell which was chosen; so do all others in
    a name, such as top1 and top5.
    """
    pattern = _blank(checkpoint.stem)
    if pattern == checkpoint.stem:
        return None
    same = [path for path in checkpoint.parent.glob("*.ckpt") if _blank(path.stem) == pattern]
    return pattern if len(same) == 1 else None


def _blank(name: str) -> str:
    # -v1 is what Lightning adds to the name of a file that there is already
    return re.sub(r"=-?\d+(\.\d+)?(e[-+]?\d+)?(?=-|_|$)", "=*", re.sub(r"-v\d+$", "", name))


def _not_downloaded(data: Any) -> Any:
    """The same data as if nothing were to be downloaded, in a set within a set too."""
    if not isinstance(data, Mapping) or "init_args" not in data:
        return data
    options = dict(data["init_args"])
    if "download" in options:
        options["download"] = False
    if "images" in options:
        options["images"] = _not_downloaded(options["images"])
    return {**data, "init_args": options}


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return name[1] if name else platform.processor() or platform.machine()
