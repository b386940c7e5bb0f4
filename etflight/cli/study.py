"""`etflight study FILE`: runs everything in a study, then prints its table; finished runs are left alone."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from etflight.cli import report
from etflight.cli.argv import CommandParser
from etflight.runs.folder import RESULTS
from etflight.runs.study import Cell, read_study
from etflight.utils.errors import UserError
from etflight.utils.shipped import find_config
from etflight.utils.yaml import read_yaml


def main(argv: Sequence[str]) -> None:
    """Train and test every run that is not finished, each in its own process and folder, and print the table.

    Args:
        argv: The study's file, and options.

    Raises:
        UserError: The file is no study, or a run failed; the others have gone on.
    """
    parser = CommandParser(
        prog="etflight study",
        description="Train and test every set, arm, ratio and seed of a study, and print its table.",
        epilog="Runs that have been tested are left as they are, those that were stopped go on: give the same command again.",
    )
    parser.add_argument("file", type=Path, help="such as configs/studies/digits.yaml")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="only these of its sets")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these of its arms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these of its seeds")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time; each gets its share of the processor"
    )
    parser.add_argument(
        "--data.download", dest="download", choices=("true", "false"), default="false",
        help="true: download what is missing of the sets that can be downloaded",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}: give at least 1")
    arguments.file = find_config(arguments.file)
    whole = list(read_study(arguments.file).stages())
    stages = whole
    for kind, attribute, asked in (
        ("set", "set_name", arguments.sets),
        ("arm", "arm", arguments.arms),
        ("seed", "seed", arguments.seeds),
    ):
        there = sorted({getattr(cell, attribute) for stage in whole for cell in stage})
        if unknown := [name for name in asked or [] if name not in there]:
            raise UserError(
                f"{arguments.file} has no {kind} {unknown[0]}: give some of {', '.join(map(str, there))} to --{kind}s"
            )
        stages = [[cell for cell in stage if getattr(cell, attribute) in (asked or there)] for stage in stages]
    cells = [cell for stage in stages for cell in stage]
    if arguments.download == "true":
        asked = {cell: _download_option(cell) for cell in cells}
        if not any(asked.values()):
            raise UserError(f"{arguments.file}: none of these sets can be downloaded: leave --data.download out")
        stages = [[replace(cell, options=(*cell.options, *asked[cell])) for cell in stage] for stage in stages]
        cells = [cell for stage in stages for cell in stage]
    if arguments.dry_run:
        for cell in cells:
            for words in [*([cell.fit()] if cell.trains else []), cell.test()]:
                print(shlex.join(["etflight", *words]))
        return
    failed: list[str] = []
    running: set[subprocess.Popen[bytes]] = set()
    with _sigterm_reaches(running):
        for stage in stages:
            with ThreadPoolExecutor(arguments.jobs) as pool:
                failed += filter(None, pool.map(lambda cell: _run(cell, arguments.jobs, running), stage))
    done = [cell for cell in cells if cell.is_done()]
    if done:
        report.main([str(cell.folder) for cell in done])
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed, the first: {failed[0]}")


def _download_option(cell: Cell) -> tuple[str, ...]:
    """How the commands of a run ask for the download of its set, or of the set within it; nothing for one of ours without a download."""
    from etflight import data  # torch takes seconds to import, which a study without a download need not wait for

    contents = [read_yaml(find_config(file)) for file in cell.configs]
    specs = [content["data"] for content in contents if isinstance(content, dict) and "data" in content]
    spec = next((spec for spec in reversed(specs) if isinstance(spec, str) or "class_path" in spec), None)
    option = "--data"
    while spec is not None:
        name, inner = (spec, {}) if isinstance(spec, str) else (spec["class_path"], spec.get("init_args") or {})
        known = getattr(data, name.rpartition(".")[2], None)
        if known is None or hasattr(known, "download"):
            return f"{option}.download", "true"
        option, spec = f"{option}.images", inner.get("images")
    return ()


@contextmanager
def _sigterm_reaches(running: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """On SIGTERM, pass it to the processes of the runs, start no further run, and leave when they have saved."""

    def stop(number: int, frame: object) -> None:
        for process in tuple(running):
            process.terminate()
        print("stopped: the same command goes on from what has been saved", file=sys.stderr, flush=True)
        sys.exit(128 + number)  # out of the pool's map, which cancels what has not started and waits for the others

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(cell: Cell, jobs: int, running: set[subprocess.Popen[bytes]]) -> str | None:
    """Train and test one run, with its process among the running ones.

    Returns:
        What went wrong, or None.
    """
    if cell.is_done():
        return None
    if cell.source is not None and not (cell.source / RESULTS).is_file():
        return f"{cell.folder} starts from {cell.source}, which has not been trained and tested to its end"
    cell.folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell.folder} …", flush=True)
    # otherwise each process would take all cores, and they would wait for each other
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    for words in [*([cell.fit()] if cell.trains else []), cell.test()]:
        log = cell.folder / f"{words[0]}.log"
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "etflight", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**threads, **os.environ},
            )
            running.add(process)
            process.wait()
            running.remove(process)
        if process.returncode:
            last = (log.read_text("utf-8", "replace").strip().splitlines() or ["it printed nothing"])[-1]
            return f"{cell.folder}: {last} (see {log})"
    return None
