"""Weights & Biases: the start and the end of its runs, what they get of a run, and a dashboard that compares arms."""

import atexit
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from etflight.runs.folder import RECORD, last_checkpoint, read_record, run_folder
from etflight.runs.loggers import FailSafe, may_fall_silent
from etflight.utils.errors import UserError, argument, brief, warn
from etflight.utils.files import write_json
from etflight.utils.lightning_private import leave_out_anonymous

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
    for option, variable, value in (
        ("name", "WANDB_NAME", f"{arm}-seed{seed}" if seeded else arm),
        ("group", "WANDB_RUN_GROUP", group),
    ):
        if arguments.get(option) is None and not os.environ.get(variable):
            arguments[option] = value


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


def log_checkpoint(trainer: Trainer, loggers: Any) -> None:
    """Upload `last.ckpt` as an artifact of type "model" to each W&B run whose logger has `log_model`.

    Args:
        trainer: The trainer, with its loggers, after training.
        loggers: What the configuration says of them, as plain data.
    """
    folder = run_folder(trainer)
    path = last_checkpoint(folder)
    specs = [spec for spec in (loggers if isinstance(loggers, list) else [loggers]) if is_wandb(spec)]
    for logger, spec in zip(_loggers(trainer), specs, strict=False):
        if spec["init_args"].get("log_model") and path.is_file():
            import wandb

            with may_fall_silent(logger):
                artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata={"run": str(folder)})
                artifact.add_file(str(path), name=path.name)
                logger.experiment.log_artifact(artifact, aliases=["latest", "last"])


def is_wandb(spec: Any) -> bool:
    """Whether the plain data of a logger are those of W&B's."""
    return isinstance(spec, Mapping) and str(spec.get("class_path")).endswith("WandbLogger")


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


# Start and end ------------------------------------------------------------------------------------------------------


def fail_safe(logger: Logger, numbers: Path) -> FailSafe:
    """Make a logger fall silent instead of raising errors.

    A W&B run whose server cannot be reached at the start is kept on disk, for `wandb sync`; so is whatever the server has not received at
    the end.

    Args:
        logger: Any logger.
        numbers: The place where all numbers are written in any case, for the warning.
    """
    return FailSafe(logger, numbers, partial(_started, logger, numbers) if isinstance(logger, WandbLogger) else None)


# by default W&B waits 90 seconds for its server at the start, and for ever at the end; variables that the user has set are kept
_PATIENCE = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "120", "WANDB_FINISH_TIMEOUT_RAISES": "true"}


def _started(logger: Any, numbers: Path) -> Any:
    """Start the logger's W&B run; keep it on disk if the server does not answer."""
    if getattr(rank_zero_only, "rank", 0) != 0:
        return logger.experiment
    import wandb  # takes a second, which runs without it need not wait for

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    if logger.save_dir is not None:  # wandb would use a temporary folder if this one were missing
        Path(logger.save_dir).mkdir(parents=True, exist_ok=True)
    leave_out_anonymous(logger)
    try:
        run = logger.experiment
    except wandb.errors.UsageError as error:
        raise UserError(f"W&B cannot start ({brief(error)}): run wandb login, or set WANDB_MODE=offline") from error
    except wandb.errors.CommError as error:
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # it reads the environment when it starts
        run = logger.experiment
        warn(
            f"W&B's server cannot be reached ({brief(error)}): this run is kept on disk, all numbers are in {numbers}; "
            f"upload it later: wandb sync {run.settings.sync_dir}"
        )
    atexit.register(_finish, run)
    return run


def _finish(run: Any) -> None:
    """Wait for the server, but not for ever."""
    try:
        run.finish()
    except Exception as error:
        warn(
            f"W&B's server has not received everything ({brief(error)}): upload the rest: wandb sync {run.settings.sync_dir}"
        )


# The dashboard ------------------------------------------------------------------------------------------------------

# The log keys that a panel draws over epochs, by section and title.
CURVES: dict[str, dict[str, list[str]]] = {
    "Accuracy and shots": {
        "Accuracy": ["val/acc"],
        "Balanced accuracy": ["val/acc_macro"],
        "Worst class": ["val/acc_worst"],
        "Many": ["val/acc_many"],
        "Medium": ["val/acc_medium"],
        "Few": ["val/acc_few"],
        "Loss": ["train/loss", "val/loss"],
        "Calibration error": ["val/ece", "val/ece_calibrated"],
        "Learning rate": ["train/lr"],
    },
    "Collapse": {
        "Variability within classes (NC1)": ["nc/train/nc1", "nc/val/nc1"],
        "Alignment of means with class vectors": ["nc/train/alignment", "nc/val/alignment"],
        "Self-duality (NC3)": ["nc/train/nc3", "nc/val/nc3"],
        "Agreement with the nearest centre (NC4)": ["nc/train/nc4", "nc/val/nc4"],
    },
    "Geometry": {
        "Distance to the nearest ETF": ["nc/train/etf_distance", "nc/val/etf_distance"],
        "Spread of norms": ["nc/train/nc2_equinorm", "nc/val/nc2_equinorm"],
        "Spread of angles": ["nc/train/nc2_equiangularity", "nc/val/nc2_equiangularity"],
        "Cosines between classes": ["nc/train/cos_means", "nc/train/cos_weights", "nc/train/cos_cross"],
        "Effective rank": ["nc/train/effective_rank", "nc/train/effective_rank_within"],
    },
    "Speed": {
        "Images per second": ["speed/images_per_s"],
        "Waiting for data": ["speed/data_wait"],
        "Peak memory (GB)": ["speed/peak_memory_gb"],
        "Seconds of an epoch": ["speed/epoch_s"],
    },
}
PICTURES = {"Collapse": ["nc/curves"], "Geometry": ["nc/heat_map"]}
TESTED = {
    "Test accuracy": ["test/acc"],
    "Test accuracy, mean of classes": ["test/acc_macro"],
    "Test accuracy by shots": ["test/acc_many", "test/acc_medium", "test/acc_few"],
}
ARM = "config.arm"  # the report groups runs by it: mean and deviation over seeds
_LOGARITHMIC = {"Variability within classes (NC1)"}
_IN_REPORT = ("Accuracy", "Few", "Variability within classes (NC1)", "Alignment of means with class vectors")


def dashboard(entity: str, project: str, group: str | None) -> tuple[Any, Any]:
    """Make a saved workspace (accuracy and shots, collapse, geometry, speed), and a report that compares arms.

    Args:
        entity: The user or team that owns the project.
        project: The project.
        group: The group of the runs in the report; None for all.

    Raises:
        UserError: `wandb-workspaces` is missing.
    """
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2 as reports
    except ImportError as error:
        raise UserError(
            f"etflight dashboard needs the package wandb-workspaces ({error}): pip install 'etflight[dashboard]'"
        ) from error
    return _workspace(reports, workspaces, entity, project), _report(reports, entity, project, group)


def as_sent(made: Any) -> Any:
    """A workspace or report as the plain data that would be sent to the server; touches the private `_to_model`."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def _workspace(reports: Any, workspaces: Any, entity: str, project: str) -> Any:
    sections = [
        workspaces.Section(
            name=name,
            panels=[
                *(_curve(reports, title, keys) for title, keys in panels.items()),
                *(reports.MediaBrowser(media_keys=[key]) for key in PICTURES.get(name, [])),
            ],
            is_open=True,
        )
        for name, panels in CURVES.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name="Neural collapse", sections=sections)


def _report(reports: Any, entity: str, project: str, group: str | None) -> Any:
    chosen = {"filters": f"Group = '{group}'"} if group else {}
    runs = reports.Runset(name="Arms", groupby=[ARM], **chosen)  # without a project of its own it takes the report's
    curves = {title: keys for panels in CURVES.values() for title, keys in panels.items()}
    panels = [
        *(reports.BarPlot(title=title, metrics=keys) for title, keys in TESTED.items()),
        *(
            _curve(reports, title, curves[title], groupby_aggfunc="mean", groupby_rangefunc="stddev")
            for title in _IN_REPORT
        ),
    ]
    return reports.Report(
        entity=entity,
        project=project,
        title=f"Arms of {group}" if group else "Arms",
        description="Mean and standard deviation over the seeds of each arm.",
        blocks=[reports.PanelGrid(runsets=[runs], panels=panels)],
    )


def _curve(reports: Any, title: str, keys: list[str], **options: str) -> Any:
    return reports.LinePlot(title=title, x="epoch", y=keys, log_y=title in _LOGARITHMIC or None, **options)


def save(workspace: Any, report: Any) -> list[str]:
    """Save both, and return their addresses.

    Raises:
        UserError: Nobody is logged in, or the server or its project cannot be reached.
    """
    import wandb

    place = f"{workspace.entity}/{workspace.project}"
    try:
        if workspace.project in [project.name for project in wandb.Api().projects(workspace.entity)]:
            return [workspace.save().url, report.save().url]
    except Exception as error:  # the client raises the errors of several libraries
        raise UserError(
            f"W&B's server cannot be reached, or refuses {place} ({brief(error)}): run wandb login, "
            f"or look at it with {argument('dry-run')}"
        ) from error
    raise UserError(f"W&B has no project {place}: train with -c configs/logger/wandb.yaml first, or mend the name")
