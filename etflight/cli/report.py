"""`etflight report RUN…`: results of runs side by side, averaged over seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

from etflight.cli.argv import CommandParser
from etflight.reporting import tables
from etflight.reporting.groups import group
from etflight.reporting.pairs import compare_with
from etflight.reporting.results import read_results
from etflight.runs.folder import RESULTS
from etflight.utils.errors import UserError, warn
from etflight.utils.terminal import as_it_is, console

_EPILOG = (
    "A path that is no run folder, or whose files are not whole, is named on stderr and left out; the others are shown. "
    "The exit status is 1 only if nothing could be shown."
)


def main(argv: Sequence[str]) -> None:
    """Print the results by arm, or write them to stdout in another format.

    Args:
        argv: Run folders and result files, and options.

    Raises:
        UserError: Nothing could be shown, or there is no arm to compare with.
    """
    parser = CommandParser(
        prog="etflight report",
        description="Results of runs side by side: mean ± standard deviation over seeds, by data set, imbalance ratio and arm.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/digits/ce, or result file (.json)"
    )
    parser.add_argument(
        "--format",
        choices=("md", "csv", "tex", "json"),
        help="instead of a table in the terminal: Markdown, CSV in full precision, LaTeX, or a result file with a record per run",
    )
    parser.add_argument(
        "--against",
        metavar="ARM",
        help="compare all other arms with this one, paired by seed, and say which are told apart from it",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.html",
        help="write a page with tables, curves, heat maps and triangle views, all inside one file (needs the extra etflight[report])",
    )
    arguments = parser.parse_args(argv)
    if arguments.output is not None and (arguments.format or arguments.output.suffix not in (".html", ".htm")):
        parser.error("-o writes a page: give a name that ends with .html, and no --format")
    if arguments.against is not None and arguments.format == "json":
        parser.error("a result file has a record per run, and no comparisons: give --against with another format")
    results, problems = read_results(arguments.runs)
    if not results:
        raise UserError("; ".join(problems) if problems else "there are no results in what was given")
    sections, remarks = group(results)
    if arguments.against is not None:
        sections = compare_with(arguments.against, sections)
    shown = [r for section in sections for r in section.results]
    remarks += [f"{r.source} has not been tested: etflight test writes its {RESULTS}" for r in shown if not r.tested]
    for line in [*(f"left out: {problem}" for problem in problems), *remarks]:
        warn(line)

    if arguments.output is not None:
        from etflight.reporting.page import write_page

        for remark in write_page(arguments.output, sections):
            warn(f"not shown: {remark}")
        print(arguments.output)
    elif arguments.format == "json":
        print(json.dumps([r.record() for r in shown if r.tested], indent=2, allow_nan=False))
    elif arguments.format is not None:
        formats = {"md": tables.markdown, "csv": tables.comma_separated, "tex": tables.latex}
        print(formats[arguments.format](sections), end="")
    else:
        out = console()
        for section in sections:
            out.print(*tables.for_terminal(section, out), sep="\n")
            for note in [*tables.notes(section), tables.hardware(section)]:
                out.print(as_it_is(note), style="dim")
        out.print(as_it_is(tables.CAPTION), style="dim")
