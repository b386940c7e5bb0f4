"""`etflight dashboard`: a saved workspace and a report that compares arms, in a project of Weights & Biases."""

import json
from collections.abc import Sequence

from etflight.cli.argv import CommandParser
from etflight.runs.wandb import as_sent, dashboard, save


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
    workspace, report = dashboard(arguments.entity, arguments.project, arguments.group)
    if arguments.dry_run:
        made = {"workspace": as_sent(workspace), "report": as_sent(report)}
        print(json.dumps(made, indent=2))
        return
    for url in save(workspace, report):
        print(url)
