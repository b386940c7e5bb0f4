import csv
import io
from itertools import combinations
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import ttest_rel

from etflight.reporting import tables
from etflight.reporting.groups import group
from etflight.reporting.page import write_page
from etflight.reporting.pairs import compare_with, paired, unpaired
from etflight.reporting.results import Result, read_results
from etflight.utils.errors import UserError
from tests.reporting.folders import make_runs

RESULTS = sorted((Path(__file__).parents[2] / "notebooks/results").glob("*.json"))
METRICS = [column.metric for column in tables.COMPARED]


def runs(arm, accuracies, seeds=None, **facts):
    facts = {"dataset": "CIFAR10", "ratio": 100.0, **facts}
    return [
        Result(source=f"{arm}_{seed}", arm=arm, seed=seed, metrics={"test/acc": accuracy}, **facts)
        for seed, accuracy in zip(range(len(accuracies)) if seeds is None else seeds, accuracies, strict=True)
    ]


def compared(*results, against="ce"):
    (section,) = compare_with(against, group([r for runs in results for r in runs])[0])
    return section


@pytest.mark.parametrize("file", RESULTS, ids=lambda path: path.stem)
def test_intervals_are_those_of_a_paired_t_test_on_every_committed_record(file):
    results, _ = read_results([file])
    by_arm = {}
    for result in results:
        by_arm.setdefault(result.arm, {})[result.seed] = result.metrics
    checked = 0
    for reference in by_arm:
        (section,) = compare_with(reference, group(results)[0])
        for found in paired(section, METRICS):
            seeds = sorted(by_arm[found.arm].keys() & by_arm[reference].keys())
            own, other = ([by_arm[arm][seed][found.metric] for seed in seeds] for arm in (found.arm, reference))
            assert dict(found.pairs) == {str(seed): a - b for seed, a, b in zip(seeds, own, other, strict=True)}
            if len(seeds) == 1:
                assert (found.low, found.high, found.verdict) == (None, None, "one pair only")
                continue
            oracle = ttest_rel(own, other)
            if oracle.pvalue == oracle.pvalue:  # equal values have none
                assert (found.low, found.high) == pytest.approx(
                    tuple(oracle.confidence_interval(0.95)), rel=1e-9, abs=1e-12
                )
                assert (found.verdict != "not told apart") == (oracle.pvalue < 0.05)
                checked += 1
    most_in_common = max((len(one.keys() & other.keys()) for one, other in combinations(by_arm.values(), 2)), default=0)
    assert checked >= 4 or most_in_common < 2


def test_what_moves_every_seed_alike_drops_out():
    """The arms scatter by 10 points and differ by 1: as means with deviations they would look alike."""
    section = compared(runs("ce", [0.5, 0.6, 0.7]), runs("etf", [0.51, 0.612, 0.709]), runs("x", [0.6, 0.6, 0.6]))
    etf, x = paired(section, ["test/acc"])
    assert (etf.arm, etf.verdict, round(etf.mean, 4)) == ("etf", "higher", 0.0103)
    assert (x.arm, x.verdict) == ("x", "not told apart")
    assert paired(compared(runs("ce", [0.5, 0.6]), runs("etf", [0.4, 0.5])), ["test/acc"])[0].verdict == "lower"


def test_pairs_are_of_one_seed_and_one_choice_of_images_and_others_are_named():
    ce = [*runs("ce", [0.5], fingerprint="set-a"), *runs("ce", [0.25, 0.5], [0, 3], fingerprint="set-b")]
    etf = [
        *runs("etf", [0.625], fingerprint="set-b"),
        *runs("etf", [0.5, 0.75, 0.5], [2, 0, None], fingerprint="set-a"),
    ]
    section = compared(ce, etf)
    (found,) = paired(section, ["test/acc", "test/ece"])
    assert found.pairs == [("0 on b", 0.375), ("0 on a", 0.25)]
    assert unpaired(section) == ["seed 2 of etf", "seed ? of etf", "seed 3 of ce"]
    assert unpaired(group([*ce, *etf])[0][0]) == paired(group(ce)[0][0], ["test/acc"]) == []


def test_one_pair_has_no_interval_and_tells_nothing_apart():
    section = compared(runs("ce", [0.5]), runs("etf", [0.75, 0.5]))
    (found,) = paired(section, ["test/acc"])
    assert (found.mean, found.low, found.high, found.verdict) == (0.25, None, None, "one pair only")
    ((*_, interval, seeds, verdict),) = tables.comparisons(section)
    assert (interval, seeds, verdict) == ("–", "+25.0", "one pair only")


def test_an_unknown_arm_is_refused_with_the_arms_that_there_are():
    sections, _ = group([*runs("ce", [0.5]), *runs("etf", [0.5]), *runs("crt", [0.5], ratio=50.0)])
    with pytest.raises(UserError, match=r"^against=.cee.: .*: give one of ce, etf, crt$"):
        compare_with("cee", sections)
    assert [section.against for section in compare_with("crt", sections)] == [None, "crt"]


@pytest.mark.parametrize("format", [tables.markdown, tables.latex])
def test_a_comparison_shows_difference_interval_seeds_and_verdict_and_its_rule(format):
    section = compared(runs("ce", [0.5, 0.6, 0.7]), runs("etf", [0.51, 0.612, 0.709], [0, 1, 5]))
    text = format([section]).replace(r"\dots{}", "…").replace(" & ", " | ")
    assert "| 0, 1 | +1.1 | -0.2 … +2.4 | +1.0, +1.2 | not told apart" in text
    assert "Differences from ce are paired by seed" in text
    assert "Without a pair: seed 5 of etf, seed 2 of ce." in text
    assert "paired" not in format(group(section.results)[0])


def test_csv_has_differences_in_full_precision_and_only_where_they_were_asked_for():
    section = compared(runs("ce", [0.5, 0.6]), runs("etf", [0.51, 0.612]))
    ce, etf, *_ = csv.DictReader(io.StringIO(tables.comma_separated([section])))
    assert (ce["against"], ce["test/acc_diff"], etf["against"]) == ("", "", "ce")
    (found,) = paired(section, ["test/acc"])
    numbers = [float(etf[f"test/acc_diff{part}"]) for part in ("", "_low", "_high")]
    assert numbers == [found.mean, found.low, found.high]
    pairs = [pair.split(":") for pair in etf["test/acc_diff_pairs"].split()]
    assert [(seed, float(difference)) for seed, difference in pairs] == found.pairs
    assert "diff" not in tables.comma_separated(group(section.results)[0])


def test_a_narrow_terminal_still_says_what_is_told_apart():
    section = compared(runs("ce_of_a_rather_long_name_for_an_arm", [0.5, 0.6]), runs("ce", [0.51, 0.612]))
    out = Console(width=80, record=True, file=io.StringIO())
    table = tables.for_terminal(section, out)[1]
    assert "told apart" in [str(column.header) for column in table.columns]
    out.print(table)
    shown = out.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for word in ("ce_of_a_rather_long_name_for_an_arm", "-1.1", "not"))


def test_the_page_has_the_comparisons(tmp_path):
    results, _ = read_results(make_runs(tmp_path))
    write_page(tmp_path / "r.html", compare_with("ce", group(results)[0]))
    html = (tmp_path / "r.html").read_text()
    assert '"paired": {"header": ["arm", "measure"' in html
    assert '["etf", "test acc.", "0, 1", "+0.0"' in html
