import json
from pathlib import Path

import pytest

from etflight.reporting.results import ALWAYS, read_results
from tests.reporting.folders import make_run, write_csv, write_json

RESULTS = Path(__file__).parents[2] / "notebooks/results"
RECORD = {
    "dataset": "Digits", "ratio": 16, "arm": "ce", "seed": 0, "test/acc": 0.5, "epochs": 3, "commit": "a" * 40,
    "config_sha256": "c" * 64, "fingerprint": "5db3039069e4", "command": "etflight fit",
}  # fmt: skip


def only(path):
    (result,), problems = read_results([path])
    assert problems == []
    return result


def test_a_run_folder_gives_its_record(tmp_path):
    record = only(make_run(tmp_path / "r", acc=0.5)).record()
    assert record == RECORD | {
        "command": "etflight fit -c configs/data/digits.yaml -c configs/arms/ce.yaml --seed_everything 0",
        "name": "r", "test/ece": 0.125, "test/ece_calibrated": 0.0625, "test/loss": 2.5, "test/acc_macro": 0.5,
        "test/acc_many": 1.0, "test/acc_medium": 0.25, "test/acc_few": 0.25, "val/acc": 0.5, "val/acc_best": 0.75, "val/acc_best_epoch": 2,
        "nc/train/nc1": 1 / 3, "nc/train/alignment": 0.8, "num_classes": 3, "params": 272_000,
        "validation": "the test set, watched only", "seconds": 9.0, "hardware": "Abacus, 1 thread",
    }  # fmt: skip
    assert type(record["ratio"]) is int
    assert set(ALWAYS) <= record.keys()


def test_a_result_says_which_checkpoint_was_tested(tmp_path):
    """A test with a folder of its own records it; records of earlier code have it in their command."""
    assert only(make_run(tmp_path / "r", checkpoint="/runs/x/checkpoints/best.ckpt")).checkpoint == "best"
    said = {
        "etflight fit -c ce.yaml --ckpt_path runs/x/checkpoints/first.ckpt": "last",
        "etflight test --ckpt_path runs/x/checkpoints/best.ckpt --name y": "best",
        "etflight test --name y --ckpt_path=last": "last",
        "etflight test --ckpt_path 'my runs/best.ckpt'": None,
        "python mine.py": None,
    }
    records = [{"dataset": "D", "arm": "ce", "test/acc": 0.5, "command": command} for command in said]
    write_json(tmp_path / "r.json", [*records, records[0] | {"checkpoint": "swa"}])
    found, _ = read_results([tmp_path / "r.json"])
    assert [r.checkpoint for r in found] == [*said.values(), "swa"]
    write_json(tmp_path / "again.json", [r.record() for r in found])
    assert [r.checkpoint for r in read_results([tmp_path / "again.json"])[0]] == [*said.values(), "swa"]


def test_an_epoch_trained_again_after_a_resume_counts_once(tmp_path):
    run = make_run(tmp_path / "r")
    write_csv(run / "speed.csv", [{"epoch": e, "speed/epoch_s": s} for e, s in ((0, 1.0), (1, 50.0), (1, 2.0))])
    assert only(run).seconds == 3.0


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({"cpu": "Abacus", "threads": 2, "gpus": ["H100"], "device": "cuda", "processes": 1}, "H100"),
        ({"cpu": "Abacus", "threads": 2, "gpus": ["H100"] * 2, "device": "cuda", "processes": 2}, "2 × H100"),
        ({"cpu": "Abacus", "threads": 2, "gpus": ["H100"], "device": "cpu", "processes": 1}, "Abacus, 2 threads"),
        ({}, None),
    ],
)
def test_hardware_is_what_was_trained_on(hardware, expected, tmp_path):
    assert only(make_run(tmp_path / "r", hardware=hardware)).hardware == expected


@pytest.mark.parametrize(
    ("ratios", "ratio"),
    [
        ({"imbalance_ratio": 20.0, "count_ratio": 21.33}, 20.0),
        ({"imbalance_ratio": None, "count_ratio": 10.66}, 10.66),
        ({"imbalance_ratio": 10.66}, 10.66),  # of an earlier record
        ({"imbalance_ratio": None, "count_ratio": None}, None),
    ],
)
def test_the_ratio_of_a_result_is_the_one_asked_for_or_that_of_the_images(ratios, ratio, tmp_path):
    assert only(make_run(tmp_path / "r", data={"class": "Digits", **ratios})).ratio == ratio


def test_what_was_not_recorded_is_unknown(tmp_path):
    run = make_run(tmp_path / "r")
    for name in ("metrics.csv", "speed.csv", "test_metrics.json"):
        (run / name).unlink()
    write_json(run / "run.json", {})
    result = only(run)
    assert result.arm == "r"
    assert result.metrics == {}
    assert all(getattr(result, name) is None for name in ("dataset", "ratio", "seed", "epochs", "seconds", "hardware"))


def test_what_is_undefined_or_overflowed_is_missing(tmp_path):
    run = make_run(tmp_path / "r")
    write_csv(run / "metrics.csv", [{"epoch": 0.0, "train/loss": 1.0, "nc/train/nc1": "nan", "val/acc": 0.5}])
    (run / "test_metrics.json").write_text('{"test/acc": 0.5, "test/loss": Infinity, "test/acc_worst": null}')
    assert only(run).metrics == {"test/acc": 0.5, "val/acc": 0.5, "val/acc_best": 0.5, "val/acc_best_epoch": 1}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.csv", "epoch,train/loss\n0,1.0\n1\n"),
        ("metrics.csv", "epoch,train/loss\n0,1.0"),  # perhaps 1.0625
        ("metrics.csv", ""),
        ("metrics.csv", "epoch,train/loss\n0,low\n"),
        ("metrics.csv", "epoch,val/acc\n0,88\n"),
        ("speed.csv", "epoch,speed/epoch_s\n0,2"),
        ("run.json", '{"arm": "ce"'),
        ("run.json", "[]"),
        ("run.json", None),
        ("test_metrics.json", '{"test/acc": NaN}'),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_read(file, content, tmp_path):
    bad, good = make_run(tmp_path / "bad"), make_run(tmp_path / "good", seed=1)
    (bad / file).unlink() if content is None else (bad / file).write_text(content)
    results, (problem,) = read_results([bad, good])
    assert [r.source for r in results] == [str(good)]
    assert str(bad) in problem
    assert file in problem


NESTED: dict = {"config_sha256": "c"}
for _ in range(500):
    NESTED = {"config_sha256": "c", "based_on": NESTED}
BAD_RECORDS = {
    "no record": 3,
    "no accuracy": {k: v for k, v in RECORD.items() if k != "test/acc"},
    "not finite": RECORD | {"nc/train/nc1": float("nan")},
    "a text for a metric": RECORD | {"test/ece": "0.1"},
    "a text for a seed": RECORD | {"seed": "0"},
    "a ratio below 1": RECORD | {"ratio": 0.01},
    "half an epoch": RECORD | {"epochs": 2.5},
    "a list for a command": RECORD | {"command": ["etflight"]},
    "a path for an identity": RECORD | {"based_on": "runs/ce"},
    "an identity of half": RECORD | {"based_on": {"config_sha256": "c", "based_on": {"commit": "a"}}},
    "an identity without end": RECORD | {"based_on": NESTED},
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_by_its_place(name, tmp_path):
    path = tmp_path / "results.json"
    write_json(path, [RECORD, BAD_RECORDS[name]])
    results, (problem,) = read_results([path])
    assert [r.record() for r in results] == [RECORD]
    assert f"{path}[1]" in problem


@pytest.mark.parametrize("content", ["{}", "[" * 100_000])
def test_a_file_of_something_else_is_named(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    results, problems = read_results([path])
    assert results == []
    assert str(path) in problems[0]


def test_the_committed_results_are_read_as_they_were_written():
    files = sorted(RESULTS.glob("*.json"))
    assert len(files) > 3
    for path in files:
        results, problems = read_results([path])
        assert problems == []
        assert [r.record() for r in results] == json.loads(path.read_text())
