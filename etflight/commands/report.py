"""`etflight report RUN…`: the test results of runs side by side."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from etflight.errors import UserError

COLUMNS = {
    "acc": "accuracy",
    "acc_macro": "mean of classes",
    "acc_many": "many",
    "acc_medium": "medium",
    "acc_few": "few",
    "ece": "ECE",
}


def main(argv: Sequence[str]) -> None:
    """Print one row per run: accuracies in per cent and where its files lie.

    Args:
        argv: run folders that hold a `test_metrics.json`.

    Raises:
        UserError: a folder without test results.
    """
    parser = argparse.ArgumentParser(prog="etflight report", description="Print the test results of runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/digits/ce")
    runs: list[Path] = parser.parse_args(argv).runs
    table = Table(title="Test results in per cent (many > 100, medium 20-100, few < 20 training images)")
    table.add_column("run")
    table.add_column("seed", justify="right")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for run in runs:
        metrics, facts = _read(run / "test_metrics.json"), _read(run / "run.json")
        cells = [_per_cent(run, metrics.get(f"test/{name}")) for name in COLUMNS]
        table.add_row(_as_it_is(run), _as_it_is(facts.get("seed", "?")), *cells)
    # into a file, where no terminal says how wide it is, nothing may be cut
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(
        "One run, so one seed, per row. Each folder has config.yaml, run.json, metrics.csv, per_class.csv and checkpoints/.",
        style="dim",
    )


def _per_cent(run: Path, value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float | int) or abs(value) > 1:
        raise UserError(
            f"{run / 'test_metrics.json'} has {value!r:.60} where a number from 0 to 1 belongs: test the run again"
        )
    return f"{100 * value:.1f}"


def _as_it_is(value: object) -> Text:
    """Text without what would be markup, or command the terminal."""
    return Text("".join(letter for letter in str(value) if letter.isprintable()))


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: is {path.parent} a run folder, and has it been tested (etflight test)?"
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # among them what is no JSON or no text
        raise UserError(f"{path} is not whole ({error}): test the run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not whole (it holds no names): test the run again")
    return content
