"""`etflight dashboard`: a saved workspace and a report that compares arms, in a project of Weights & Biases."""

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from etflight.cli.argv import CommandParser
from etflight.utils.errors import UserError, brief
from etflight.utils.wandb_private import as_sent

_EPOCH = "epoch"

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


def main(argv: Sequence[str]) -> None:
    """Build the workspace and the report, and save or print them.

    Args:
        argv: The entity, the project, and options.

    Raises:
        UserError: `wandb-workspaces` is missing, nobody is logged in, or the server or its project cannot be reached.
    """
    parser = CommandParser(
        prog="etflight dashboard",
        description="Save a workspace (accuracy and shots, collapse, geometry, speed) and a report that compares arms in a W&B project.",
    )
    parser.add_argument("--entity", required=True, help="user or team that owns the project")
    parser.add_argument("--project", required=True, help="such as etflight, that of configs/logger/wandb.yaml")
    parser.add_argument("--group", help="only runs of this group, such as digits, in the report")
    parser.add_argument("--dry-run", action="store_true", help="print both as JSON, ask no server")
    arguments = parser.parse_args(argv)
    reports, workspaces = _import()
    workspace = _workspace(reports, workspaces, arguments.entity, arguments.project)
    report = _report(reports, arguments.entity, arguments.project, arguments.group)
    if arguments.dry_run:
        made = {"workspace": as_sent(workspace), "report": as_sent(report)}
        print(json.dumps(made, indent=2))
        return
    for url in _save(workspace, report):
        print(url)


def _import() -> tuple[ModuleType, ModuleType]:
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise UserError(
            f"etflight dashboard needs the package wandb-workspaces ({error}): pip install 'etflight[dashboard]'"
        ) from error
    return v2, workspaces


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
    return reports.LinePlot(title=title, x=_EPOCH, y=keys, log_y=title in _LOGARITHMIC or None, **options)


def _save(workspace: Any, report: Any) -> list[str]:
    import wandb

    place = f"{workspace.entity}/{workspace.project}"
    try:
        if workspace.project in [project.name for project in wandb.Api().projects(workspace.entity)]:
            return [workspace.save().url, report.save().url]
    except Exception as error:  # the client raises the errors of several libraries
        raise UserError(
            f"W&B's server cannot be reached, or refuses {place} ({brief(error)}): run wandb login, or look at it with --dry-run"
        ) from error
    raise UserError(f"W&B has no project {place}: train with -c configs/logger/wandb.yaml first, or mend the name")
