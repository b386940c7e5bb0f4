import csv
import html
import io
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from etflight.reporting import tables
from etflight.reporting.groups import group
from etflight.reporting.results import Result, read_results
from etflight.utils.terminal import plain

RESULTS = Path(__file__).parents[2] / "notebooks/results"
ACCURACIES = [0.914, 0.902, 0.9235]


def run(seed, acc, arm="ce", **more):
    metrics = {"test/acc": acc, "nc/train/nc1": 0.5 + seed}
    return Result(source=f"{arm}_{seed}", dataset="CIFAR10", ratio=100.0, arm=arm, seed=seed, metrics=metrics, **more)


@pytest.fixture
def sections():
    runs = [
        run(seed, acc, epochs=20, seconds=60.0 * (seed + 1), hardware="Abacus") for seed, acc in enumerate(ACCURACIES)
    ]
    return group([*runs, run(0, 0.5, arm="etf_dr")])[0]


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_shows_mean_and_deviation_and_what_is_missing(sections):
    title, _, header, rule, ce, etf, _, *published = tables.markdown(sections).splitlines()
    assert "CIFAR10, imbalance ratio 100" in title
    assert len(cells(header)) == len(cells(rule)) == len(cells(ce)) == len(cells(etf))
    mean, std = 100 * statistics.mean(ACCURACIES), 100 * statistics.stdev(ACCURACIES)
    found = dict(zip(cells(header), cells(ce), strict=True))
    assert found["test acc."] == f"{mean:.1f} ± {std:.1f}"
    assert found["seeds"] == "0, 1, 2"
    assert found["time per run"] == "2 min"
    assert found["alignment"] == "–"
    found = dict(zip(cells(header), cells(etf), strict=True))
    assert found["test acc."] == "50.0"
    assert found["epochs"] == found["hardware"] == "–"
    rows = [dict(zip(cells(published[0]), cells(line), strict=True)) for line in published if line.startswith("|")]
    ldam = next(row for row in rows if row["published method"] == "LDAM-DRW")
    assert (ldam["test acc."], ldam["read in"], ldam["epochs"]) == ("77.73", "BagofTricks-LT gallery", "–")
    glmc = next(row for row in rows if row["published method"] == "GLMC")
    assert (glmc["parameters"], glmc["views"], glmc["epoch chosen"]) == ("7.39 M", "2", "unknown")


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("name", ["digits", "cifar10_lt"])
def test_a_terminal_of_any_usual_width_gets_whole_words_and_is_told_what_it_lacks(name, width):
    sections = group(read_results([RESULTS / f"{name}.json"])[0])[0]
    for section in sections:
        out = Console(width=width, record=True, file=io.StringIO())
        arms = tables.for_terminal(section, out)[0]
        out.print(arms)
        shown = out.export_text()
        assert max(map(len, shown.splitlines())) <= width
        heads = [str(column.header) for column in arms.columns]
        missing = {column.short for column in tables.COLUMNS} - set(heads)
        empty = {c.short for c in tables.COLUMNS if all(g.stat(c.metric) is None for g in section.groups)}
        told = shown.partition("left out")[2]
        assert all(head.replace(",", "") in " ".join(told.split()) for head in missing - empty)
        assert width < 200 or (missing == empty and not told)
        words = {word for g in section.groups for word in (g.arm, f"{100 * g.stat('test/acc').mean:.1f}")}
        assert words <= set(shown.split())


def test_csv_has_full_precision(sections):
    found = list(csv.DictReader(io.StringIO(tables.comma_separated(sections))))
    assert float(found[0]["test/acc"]) == pytest.approx(statistics.mean(ACCURACIES), rel=1e-15)
    assert float(found[0]["test/acc_std"]) == pytest.approx(statistics.stdev(ACCURACIES), rel=1e-12)
    assert found[0]["test/acc_n"] == "3"
    assert found[1]["test/acc_std"] == found[1]["hardware"] == found[0]["source"] == ""
    assert {row["source"] for row in found[2:]} >= {"ResNet-32; MiSLAS README"}


def test_a_mean_over_fewer_runs_than_the_arm_has_says_so():
    bare = Result(source="ce_1", dataset="CIFAR10", ratio=100.0, arm="ce", seed=1, metrics={"test/acc": 0.75})
    ((section,), _) = group([run(0, 0.25), bare])
    row = dict(zip(tables.HEADER, tables.rows(section)[0], strict=True))
    assert row["NC1"] == "0.500 (1 of 2)"


def test_accuracies_stand_beside_the_checkpoint_that_they_are_of():
    untested = Result(source="r", dataset="CIFAR10", ratio=100.0, arm="etf", checkpoint="last")
    ((section,), _) = group([run(0, 0.5, checkpoint="best"), run(0, 0.5, "unknown"), untested])
    found = [dict(zip(tables.HEADER, row, strict=True)) for row in tables.rows(section)]
    assert [row["checkpoint"] for row in found] == ["best", "–", "–"]
    assert not any("last" in column.title for column in tables.COLUMNS)
    csv_rows = csv.DictReader(io.StringIO(tables.comma_separated([section])))
    assert [row["checkpoint"] for row in csv_rows][:3] == ["best", "", ""]


def test_the_best_epoch_says_on_which_images_it_was_picked():
    for validation, word in (("the test set, watched only", "upper bound"), ("held out", "held out")):
        ((section,), _) = group([run(0, 0.5, validation=validation)])
        assert word in tables.notes(section)[0]


def test_durations_for_people():
    said = [tables.duration(seconds) for seconds in (0.0, 8.24, 59, 1140, 8640)]
    assert said == ["0 s", "8.2 s", "59 s", "19 min", "2.4 h"]


# --- text as it stands -------------------------------------------------------------------------------------------------


def test_latex_and_markdown_show_names_as_they_are():
    text = 'a\\b {c} $1 & #2 50% x_y ^~ <|> "q" ±×– `*[!@'
    assert tables.escape_latex(text) == (
        r"a\textbackslash{}b \{c\} \$1 \& \#2 50\% x\_y \textasciicircum{}\textasciitilde{} \textless{}\textbar{}\textgreater{} "
        r"\textquotedbl{}q\textquotedbl{} $\pm$$\times$-- `*[!@"
    )
    text += " http://x \x1b"
    escaped = tables.escape_markdown(text)
    assert html.unescape(escaped) == plain(text)
    assert not set("\\`*{}[]<>|~!$@_\x1b") & set(escaped)
    assert "http:" not in escaped
    assert tables.escape_markdown("etf_dr_balanced") == "etf_dr_balanced"


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_any_name_stays_in_its_cell(name):
    ((section,), _) = group([run(0, 0.5, arm=name)])
    for line in tables.markdown([section]).split("\n\n")[1].splitlines():
        assert len(cells(line)) == len(tables.HEADER)
    body = tables.latex([section]).partition("\\midrule\n")[2].partition("\\bottomrule")[0]
    first = re.sub(r"\\[&\\]", "", body.splitlines()[0].removesuffix(r"\\"))
    assert first.count("&") == len(tables.HEADER) - 1
