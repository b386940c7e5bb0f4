"""What Weights & Biases gets from a run: names and a lasting id, axes, summary, and the checkpoint."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from etflight.runs.folder import RECORD, last_checkpoint, read_record
from etflight.runs.loggers import may_fall_silent, run_folder
from etflight.utils.files import write_json
from etflight.utils.lightning_private import uploads_checkpoints

ID = "wandb_id"  # its name in run.json

# The summary holds the best value of these in addition to the last one.
_HIGHEST = [f"val/acc{part}" for part in ("", *(f"_{name}" for name in (
    "macro", "harmonic", "worst", "many", "medium", "few", "head", "middle", "tail"
)))]  # fmt: skip
_LOWEST = ["train/loss", "val/loss", "val/ece", "val/ece_calibrated"]
_HIGHEST_OF_COLLAPSE = ("alignment", "nc4")
_LOWEST_OF_COLLAPSE = ("nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "etf_distance", "nc3")
_AXES = ("train/*", "val/*", "test/*", "nc/*", "nc_*", "speed/*")  # drawn over epochs


def name_in_sweep(name: str) -> str:
    """Return the name of a run.

    In a W&B sweep all runs share a name; each gets a folder below the one with that name, called by its id.
    """
    own = os.environ.get("WANDB_RUN_ID")
    return f"{name}/{own}" if own and os.environ.get("WANDB_SWEEP_ID") else name


def choose_names(arguments: Any, *, folder: Path, name: str, seed: object, data: str) -> None:
    """Fill in what the user has left open: the run's name (arm and seed), its group (the experiment), and its earlier id.

    Args:
        arguments: The arguments of a `WandbLogger`, changed in place.
        folder: The run folder.
        name: The name of the run; `digits/ce` gives the group `digits` and the name `ce-seed0`.
        seed: The seed of the run; it is used only if it is an integer.
        data: The name of the data set, which is the group if the run's name has none.
    """
    chosen = arguments.get("id") or arguments.get("version") or os.environ.get("WANDB_RUN_ID")
    if not chosen and (known := recorded_id(folder)) is not None:
        arguments["id"] = known  # the run keeps its name and group
        return
    group, _, arm = name.partition("/") if "/" in name else (data.lower(), "", name)
    seeded = isinstance(seed, int) and not isinstance(seed, bool) and not arm.endswith(f"seed{seed}")
    for argument, variable, value in (
        ("name", "WANDB_NAME", f"{arm}-seed{seed}" if seeded else arm),
        ("group", "WANDB_RUN_GROUP", group),
    ):
        if arguments.get(argument) is None and not os.environ.get(variable):
            arguments[argument] = value


def recorded_id(folder: Path) -> str | None:
    """The id of the W&B run that gets a run folder's numbers; None if there is none."""
    found = read_record(folder).get(ID)
    return found if isinstance(found, str) else None


def configure_runs(trainer: Trainer, config: Mapping[str, Any], *, keeps_config: bool = False) -> None:
    """Give W&B the configuration, the axes and the best values for its summary, and write the run's id into `run.json`.

    Args:
        trainer: The trainer, with its loggers.
        config: All arguments as plain data.
        keeps_config: Whether an existing W&B run keeps its configuration.
    """
    folder = run_folder(trainer)
    known = recorded_id(folder)
    for logger in _loggers(trainer):
        with may_fall_silent(logger):
            run = logger.experiment
            if not (keeps_config and run.id == known):
                run.config.update(dict(config), allow_val_change=True)  # only here, because Lightning's own log is off
            for metrics in _AXES:
                run.define_metric(metrics, step_metric="epoch")
            for metric, best in _summary():
                run.define_metric(metric, step_metric="epoch", summary=f"{best},last")
            if isinstance(run.id, str) and run.id != known and (record := read_record(folder)):
                write_json(folder / RECORD, {**record, ID: run.id})


def log_checkpoint(trainer: Trainer) -> None:
    """Upload `last.ckpt` as an artifact of type "model" to each W&B run whose logger has `log_model`.

    Args:
        trainer: The trainer, with its loggers, after training.
    """
    folder = run_folder(trainer)
    path = last_checkpoint(folder)
    for logger in _loggers(trainer):
        if uploads_checkpoints(logger) and path.is_file():
            import wandb  # takes a second, which runs that upload nothing need not wait for

            with may_fall_silent(logger):
                artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata={"run": str(folder)})
                artifact.add_file(str(path), name="last.ckpt")
                logger.experiment.log_artifact(artifact, aliases=["latest", "last"])


def _loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _summary() -> Iterator[tuple[str, str]]:
    """Yield names of metrics, each with "max" or "min" for its best value."""
    for best, metrics, measures in (
        ("max", _HIGHEST, _HIGHEST_OF_COLLAPSE),
        ("min", _LOWEST, _LOWEST_OF_COLLAPSE),
    ):
        yield from ((metric, best) for metric in metrics)
        for prefix in ("nc", "nc_raw"):
            for split in ("train", "train_online", "val"):
                yield from ((f"{prefix}/{split}/{measure}", best) for measure in measures)
