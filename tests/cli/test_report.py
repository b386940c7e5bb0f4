import csv
import io
import json
import statistics

import pytest

from tests.reporting.folders import make_run

ACCURACIES = [0.5, 0.625, 0.875]


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / f"ce_{seed}", acc=acc, seed=seed).name for seed, acc in enumerate(ACCURACIES)]


def test_seeds_are_averaged_on_the_terminal(runs, tmp_path, etflight_command):
    result = etflight_command.succeed("report", *runs, cwd=tmp_path)
    assert result.err == ""
    mean, std = 100 * statistics.mean(ACCURACIES), 100 * statistics.stdev(ACCURACIES)
    assert f"{mean:.1f} ±{std:.1f}" in result.out
    assert "Digits, imbalance ratio 16" in result.out
    assert "Abacus, 1 thread" in result.out


@pytest.mark.parametrize("format", ["md", "tex", "csv", "json"])
def test_a_result_file_tells_the_same_as_the_runs(format, runs, tmp_path, etflight_command):
    written = etflight_command.succeed("report", *runs, "--format", "json", cwd=tmp_path)
    (tmp_path / "results.json").write_text(written.out)
    one = etflight_command.succeed("report", *runs, "--format", format, cwd=tmp_path)
    assert etflight_command.succeed("report", "results.json", "--format", format, cwd=tmp_path).out == one.out


def test_what_is_bad_is_named_and_the_others_are_shown(runs, tmp_path, etflight_command):
    wide = make_run(tmp_path / "wide", seed=9, data={"class": "Digits", "imbalance_ratio": 16, "class_counts": [1] * 7})
    again = make_run(tmp_path / "again", seed=0, acc=0.25)
    bad = ["nowhere", wide.name, again.name]
    result = etflight_command.succeed("report", *runs, *bad, "--format", "csv", cwd=tmp_path)
    lines = result.err.splitlines()
    assert len(lines) == len(bad)
    for name, word in zip(bad, ["exist", "7 classes", "seed 0"], strict=True):
        assert any(name in line and word in line for line in lines), (name, lines)
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert float(row["test/acc"]) == pytest.approx(statistics.mean(ACCURACIES))


def test_runs_with_other_flags_and_tests_of_other_checkpoints_have_rows_that_say_so(tmp_path, etflight_command):
    """Also from the result file that a report writes."""
    make_run(
        tmp_path / "x", acc=0.25, config_sha256="d" * 64, command="etflight fit -c ce.yaml --model.loss.smoothing 0.1"
    )
    make_run(tmp_path / "y", acc=0.5)
    make_run(tmp_path / "y_best", acc=0.75, checkpoint=str(tmp_path / "y/checkpoints/best.ckpt"))
    for name, facts in (("again", {}), ("untested", {"config_sha256": "e" * 64})):
        (make_run(tmp_path / name, acc=1.0, **facts) / "test_metrics.json").unlink()
    written = etflight_command("report", "untested", "again", "x", "y", "y_best", "--format", "json", cwd=tmp_path)
    left_out, untested = written.err.splitlines()
    assert untested.startswith("etflight: warning: untested has not been tested")
    assert left_out.startswith("etflight: warning: left out: again is ")
    (tmp_path / "r.json").write_text(written.out)
    result = etflight_command.succeed("report", "r.json", "--format", "csv", cwd=tmp_path)
    assert result.err == ""
    rows = [(row["arm"], row["checkpoint"], float(row["test/acc"])) for row in csv.DictReader(io.StringIO(result.out))]
    assert rows == [("ce (y)", "last", 0.5), ("ce (y_best)", "best", 0.75), ("ce (x)", "last", 0.25)]


def test_nothing_to_show_is_an_error_of_one_line_that_names_everything(tmp_path, etflight_command):
    (tmp_path / "empty").mkdir()
    result = etflight_command("report", "nowhere", "empty", "--format", "md", cwd=tmp_path)
    result.assert_refused("nowhere", "empty")
    assert result.out == ""


def test_an_untested_run_is_shown_without_accuracy_and_is_no_result(tmp_path, etflight_command):
    run = make_run(tmp_path / "r")
    (run / "test_metrics.json").unlink()
    result = etflight_command.succeed("report", "r", "--format", "csv", cwd=tmp_path)
    assert "etflight test" in result.err
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert row["test/acc"] == ""
    assert float(row["val/acc_best"]) == 0.75
    assert json.loads(etflight_command("report", "r", "--format", "json", cwd=tmp_path).out) == []


def test_arms_are_compared_by_seed_where_that_is_asked_for(runs, tmp_path, etflight_command):
    for seed, acc in enumerate((0.625, 0.75, 1.0)):
        make_run(tmp_path / f"etf_{seed}", acc=acc, arm="etf", seed=seed)
    folders = [*runs, *(f"etf_{seed}" for seed in range(3))]
    shown = etflight_command.succeed("report", *folders, "--against", "ce", cwd=tmp_path, COLUMNS="200")
    assert "etf test 0, 1, 2 +12.5 +12.5 … +12.5 +12.5, +12.5, +12.5 higher" in " ".join(shown.out.split())
    etflight_command("report", *folders, "--against", "cee", cwd=tmp_path).assert_refused("--against cee", "ce, etf")
    refused = etflight_command("report", *folders, "--against", "ce", "--format", "json", cwd=tmp_path)
    refused.assert_refused("a result file has a record per run, and no comparisons")
