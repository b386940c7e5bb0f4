"""Tables of arms: for the terminal, in Markdown and LaTeX, and as CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from etflight.reporting.groups import Group, Section, Stat, different
from etflight.reporting.pairs import CONFIDENCE, paired, unpaired
from etflight.utils.errors import argument
from etflight.utils.terminal import as_it_is, plain

MISSING = "–"


class Column(NamedTuple):
    """One metric.

    Attributes:
        title: Its name for people.
        short: The same for narrow places.
        metric: Its log name.
        form: The format of a value.
    """

    title: str
    short: str
    metric: str
    form: str


COLUMNS = (
    Column("test acc.", "test", "test/acc", ".1%"),
    Column("val acc., best epoch", "val, best", "val/acc_best", ".1%"),
    Column("mean of classes", "macro", "test/acc_macro", ".1%"),
    Column("many", "many", "test/acc_many", ".1%"),
    Column("medium", "medium", "test/acc_medium", ".1%"),
    Column("few", "few", "test/acc_few", ".1%"),
    Column("ECE", "ECE", "test/ece_calibrated", ".1%"),
    Column("NC1", "NC1", "nc/train/nc1", ".3f"),
    Column("alignment", "align.", "nc/train/alignment", ".3f"),
)
HEADER = (
    *("arm", "seeds", "checkpoint", *(column.title for column in COLUMNS)),
    *("parameters", "epochs", "time per run", "hardware"),
)
PUBLISHED_HEADER = (
    "published method",
    "backbone",
    "test acc.",
    "parameters",
    "epochs",
    "views",
    "epoch chosen",
    "read in",
)
_CONFIDENCE = f"{100 * CONFIDENCE:.0f} %"
COMPARED = tuple(column for column in COLUMNS if column.metric.startswith("test/"))
PAIRED_HEADER = ("arm", "measure", "seeds", "points", f"{_CONFIDENCE} interval", "by seed", "told apart")
CAPTION = (
    "Mean ± sample standard deviation over seeds, of one seed no ±; – is missing. Accuracies, shot groups (many > 100, medium 20–100, "
    "few < 20 training images) and ECE (with the temperature, where there is one) in per cent, on the test images, of the checkpoint that "
    "was tested; NC1 and alignment of the training images at the end."
)


def rows(section: Section) -> list[list[str]]:
    """A cell per column of `HEADER`, a row per arm; plain text."""
    return [[plain(cell) for cell in _row(group)] for group in section.groups]


def published(section: Section) -> list[list[str]]:
    """A cell per column of `PUBLISHED_HEADER`, a row per published number; plain text."""
    return [
        [
            entry["method"],
            entry["backbone"],
            f"{100 * entry['test/acc']:.2f}".removesuffix("0"),
            millions(entry["params"]),
            *(MISSING if value is None else str(value) for value in (entry["epochs"], entry["views"])),
            entry["selection"],
            entry["read_in"],
        ]
        for entry in section.published
    ]


def comparisons(section: Section) -> list[list[str]]:
    """A cell per column of `PAIRED_HEADER`, a row per arm and measure; plain text, empty if nothing is compared."""
    titles = {column.metric: column.title for column in COMPARED}
    return [
        [
            plain(found.arm),
            titles[found.metric],
            ", ".join(plain(seed) for seed, _ in found.pairs),
            _points(found.mean),
            MISSING if found.low is None or found.high is None else f"{_points(found.low)} … {_points(found.high)}",
            ", ".join(_points(difference) for _, difference in found.pairs),
            found.verdict,
        ]
        for found in paired(section, list(titles))
    ]


def _points(share: float) -> str:
    """A difference of accuracies in points."""
    return f"{100 * share:+.1f}"


def filled_columns(header: Sequence[str], body: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The cells of each column by its heading, without the columns in which all are missing."""
    columns = zip(header, zip(*body, strict=True), strict=True)
    return {heading: cells for heading, cells in columns if set(cells) != {MISSING}}


def _grids(section: Section) -> list[tuple[Sequence[str], list[list[str]]]]:
    """Header and rows of arms, and of comparisons and published numbers if there are any; the first two columns and the last are text."""
    others = [(PAIRED_HEADER, comparisons(section)), (PUBLISHED_HEADER, published(section))]
    return [(HEADER, rows(section)), *(grid for grid in others if grid[1])]


def notes(section: Section) -> list[str]:
    """Sentences that a reader of a section's numbers has to know."""
    said = [
        "Validation images are held out: the best epoch is that of their accuracy."
        if validation == "held out"
        else f"Validation images are {validation}: the best epoch is picked on it, an upper bound and no result."
        for validation in different(section.results, "validation")
    ]
    if section.against is not None:
        alone = ", ".join(unpaired(section))
        said.append(
            f"Differences from {section.against} are paired by seed and choice of images, in points: their mean, its {_CONFIDENCE} "
            "interval by Student's t, and each pair. Arms are not told apart where the interval covers 0, nor by one pair; of arms that do "
            f"not differ, one interval in twenty excludes 0 by chance.{f' Without a pair: {alone}.' if alone else ''}"
        )
    return said


def hardware(section: Section) -> str:
    """The hardware that the runs were trained on, in a sentence."""
    return f"Hardware: {'; '.join(different(section.results, 'hardware')) or MISSING}."


def _row(group: Group) -> list[str]:
    epochs, seconds = sorted(different(group.results, "epochs")), group.seconds()
    return [
        group.arm,
        ", ".join("?" if r.seed is None else str(r.seed) for r in group.results),
        ", ".join(_tested(group)) or MISSING,
        *(_cell(group.stat(column.metric), column.form, len(group.results)) for column in COLUMNS),
        ", ".join(map(millions, different(group.results, "params"))) or MISSING,
        "–".join(map(str, dict.fromkeys(epochs[:1] + epochs[-1:]))) or MISSING,
        MISSING if seconds is None else duration(seconds.mean),
        "; ".join(different(group.results, "hardware")) or MISSING,
    ]


def _tested(group: Group) -> list[str]:
    """The names of the checkpoints that were tested."""
    return different((r for r in group.results if r.tested), "checkpoint")


def _cell(stat: Stat | None, form: str, runs: int) -> str:
    if stat is None:
        return MISSING
    shown = " ± ".join(format(value, form).removesuffix("%") for value in (stat.mean, stat.std) if value is not None)
    return shown + (f" ({stat.runs} of {runs})" if stat.runs < runs else "")


def millions(count: int | None) -> str:
    """A number of parameters for people: 0.46 M."""
    return MISSING if count is None else f"{count / 1e6:.2f} M"


def duration(seconds: float) -> str:
    """A time for people: 8.2 s, 19 min, 2.4 h."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# Formats --------------------------------------------------------------------------------------------------------------


_TEXT = ("seeds", "measure", "by seed", "told apart", "published method", "backbone", "read in")  # columns of words
# what a narrow terminal shows last
_LESS_NEEDED = (
    *("params", "time", "epochs", "val, best", "macro", "ECE", "NC1", "align."),
    *("parameters", "views", "epoch chosen", "by seed", "seeds"),
)


def for_terminal(section: Section, out: Console) -> list[Table]:
    """Tables of rich, without the hardware, without empty columns, and without columns for which the terminal is too narrow."""
    (_, arms), *others = _grids(section)
    header = ("arm", "seeds", "ckpt", *(column.short for column in COLUMNS), "params", "epochs", "time")
    arms = [[cell.replace("± ", "±") for cell in row[:-1]] for row in arms]
    shorter = {column.title: column.short for column in COLUMNS}
    others = [(names, [[shorter.get(cell, cell) for cell in row] for row in body]) for names, body in others]
    tables = [_fitting_table(filled_columns(*grid), out) for grid in [(header, arms), *others]]
    tables[0].title = as_it_is(section.title)
    return tables


def _fitting_table(columns: dict[str, tuple[str, ...]], out: Console) -> Table:
    """Each cell on one line if there is room; otherwise its words below each other, and fewer columns if that is not enough."""
    room = out.options.update(width=10_000)  # rich reports no more than what there is
    table = _table(columns, one_line=True)
    if Measurement.get(out, room, table).maximum <= out.width:
        return table
    table = _table(columns, one_line=False)
    left_out: list[str] = []
    for heading in filter(columns.__contains__, _LESS_NEEDED):
        if Measurement.get(out, room, table).minimum <= out.width:
            break
        left_out.append(heading.replace(",", ""))
        table = _table(columns := {name: cells for name, cells in columns.items() if name != heading}, one_line=False)
    if left_out:
        names = ", ".join(left_out)
        table.caption = as_it_is(f"left out in {out.width} columns, but not by {argument('format', 'md')}: {names}")
    return table


def _table(columns: Mapping[str, Sequence[str]], *, one_line: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading, cells in columns.items():
        longest = max(len(word) for text in (heading, *cells) for word in text.split())
        table.add_column(
            heading,
            justify="left" if heading in ("arm", *_TEXT) else "right",
            no_wrap=one_line,
            width=None if one_line or heading in _TEXT else longest,
            min_width=longest,
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def markdown(sections: Sequence[Section]) -> str:
    """Sections in GitHub's Markdown: a table of arms each, and one of published numbers."""
    parts = []
    for section in sections:
        lines = [f"### {escape_markdown(section.title)}", ""]
        for header, body in _grids(section):
            lines += [
                "| " + " | ".join(header) + " |",
                "|---|---" + "|--:" * (len(header) - 3) + "|---|",
                *("| " + " | ".join(map(escape_markdown, row)) + " |" for row in body),
                "",
            ]
        lines += (escape_markdown(note) for note in notes(section))
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join([*parts, CAPTION]) + "\n"


def latex(sections: Sequence[Section]) -> str:
    r"""One `table` per section, for a document with `\usepackage{booktabs}`."""
    parts = []
    for section in sections:
        caption = " ".join([f"{section.title}.", *notes(section), CAPTION])
        lines = [r"\begin{table}", rf"\caption{{{escape_latex(caption)}}}"]
        for header, body in _grids(section):
            lines += [
                rf"\begin{{tabular}}{{ll{'r' * (len(header) - 3)}l}}",
                r"\toprule",
                " & ".join(map(escape_latex, header)) + r" \\",
                r"\midrule",
                *(" & ".join(map(escape_latex, row)) + r" \\" for row in body),
                r"\bottomrule",
                r"\end{tabular}\par\medskip",
            ]
        lines.append(r"\end{table}")
        parts.append("\n".join(lines) + "\n")
    return "% \\usepackage{booktabs}\n" + "\n".join(parts)


def comma_separated(sections: Sequence[Section]) -> str:
    """One row per arm or published number, in full precision, accuracies from 0 to 1; an empty cell is missing.

    A metric has three columns: mean, `…_std` and `…_n`, how many runs have it. Where arms are compared, further columns have the mean
    difference, `…_diff`, its interval, `…_diff_low` and `…_diff_high`, and each pair's, `…_diff_pairs`, such as 0:0.0125 1:-0.005.
    """
    metrics = [f"{column.metric}{part}" for column in COLUMNS for part in ("", "_std", "_n")]
    compares = any(section.against is not None for section in sections)
    differences = [f"{column.metric}{part}" for column in COMPARED for part in _DIFFERENCE] if compares else []
    columns = [
        "dataset",
        "ratio",
        "arm",
        "seeds",
        "checkpoint",
        *metrics,
        "params",
        "epochs",
        "views",
        "selection",
        "seconds",
        "hardware",
        "source",
        *(["against", *differences] if compares else []),
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for section in sections:
        place = {"dataset": section.dataset, "ratio": None if section.ratio is None else f"{section.ratio:g}"}
        compared = _differences_by_arm(section)
        for group in section.groups:
            stats = [value for column in COLUMNS for value in group.stat(column.metric) or (None, None, None)]
            seconds = group.seconds()
            facts = {
                "arm": plain(group.arm),
                "seeds": " ".join("?" if r.seed is None else str(r.seed) for r in group.results),
                "checkpoint": plain(" ".join(_tested(group))),
                "params": " ".join(map(str, different(group.results, "params"))),
                "epochs": " ".join(map(str, different(group.results, "epochs"))),
                "seconds": None if seconds is None else seconds.mean,
                "hardware": plain("; ".join(different(group.results, "hardware"))),
            }
            writer.writerow(place | dict(zip(metrics, stats, strict=True)) | facts | compared.get(group.arm, {}))
        for entry in section.published:
            facts = {"arm": entry["method"], "source": f"{entry['backbone']}; {entry['read_in']}"}
            writer.writerow(
                place | facts | {name: entry[name] for name in ("test/acc", "params", "epochs", "views", "selection")}
            )
    return out.getvalue()


_DIFFERENCE = ("_diff", "_diff_low", "_diff_high", "_diff_pairs")


def _differences_by_arm(section: Section) -> dict[str, dict[str, object]]:
    """The columns of each arm's differences in CSV."""
    cells: dict[str, dict[str, object]] = {}
    for found in paired(section, [column.metric for column in COMPARED]):
        pairs = " ".join(f"{plain(seed).replace(' ', '_')}:{difference!r}" for seed, difference in found.pairs)
        values = found.mean, found.low, found.high, pairs
        named = {f"{found.metric}{part}": value for part, value in zip(_DIFFERENCE, values, strict=True)}
        cells.setdefault(found.arm, {"against": plain(section.against)}).update(named)
    return cells


_MARKS = re.compile(r"[\\`*_{}\[\]<>#|~&!$@]")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)+")  # Markdown leaves the underscores in it alone
_LATEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "{}$&#%_"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", '"': r"\textquotedbl{}"}
    | {
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "–": "--",
        "…": r"\dots{}",
    }
)


def escape_markdown(text: object) -> str:
    """Text that Markdown shows unchanged, in a table too: possible marks become numeric character references."""
    one_line = plain(text)
    if _PLAIN_NAME.fullmatch(one_line):
        return one_line
    escaped = _MARKS.sub(lambda mark: f"&#{ord(mark.group())};", one_line)
    return re.sub(r"(?i)(https?|ftp|www)(?=[:.])", lambda m: f"&#{ord(m.group()[0])};{m.group()[1:]}", escaped)


def escape_latex(text: object) -> str:
    """Text that LaTeX typesets unchanged."""
    return plain(text).translate(_LATEX)
