"""One run folder is one W&B run: what an offline run holds of a training that was stopped, of its rest and of its test."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from etflight.runs.wandb import CURVES, PICTURES, TESTED, choose_names
from tests.training import QUIET, read_csv
from tests.wandb_file import artifacts, config_updates, history, run_record, step_metrics, summary

ROOT = Path(__file__).parents[2] / "configs"
ARGV = [
    "-c", ROOT / "data/digits.yaml", "-c", ROOT / "arms/etf_dr_balanced.yaml", "-c", ROOT / "logger/wandb.yaml",
    "--data.max_count", 30, "--data.imbalance_ratio", 1, "--trainer.max_epochs", 2, *QUIET, "--name", "watched",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    """The run folder, and the W&B files of a run that was stopped in its second epoch, of its rest and of its test."""
    cwd = tmp_path_factory.mktemp("wandb")
    kill = [
        "--trainer.callbacks+", "tests.left_by_runs.Kill", "--trainer.callbacks.after", 12, "--trainer.callbacks.signal", 15,
    ]  # fmt: skip
    for status, argv in (
        (143, ["fit", *ARGV, *kill]),
        (0, ["fit", *ARGV, "--ckpt_path", "last", "--trainer.logger.log_model", "true"]),
        (0, ["test", *ARGV, "--ckpt_path", "last"]),
    ):
        result = etflight_command(*argv, cwd=cwd, WANDB_MODE="offline", WANDB_SILENT="true")
        assert result.status == status, result.err
    assert {path.name for path in cwd.iterdir()} == {"runs", "killed.mark"}
    folder = cwd / "runs/watched"
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3
    return folder, files


def test_all_three_go_on_in_one_wandb_run_called_by_experiment_arm_and_seed(run):
    folder, files = run
    records = [run_record(file) for file in files]
    assert {record.run_id for record in records} == {json.loads((folder / "run.json").read_text())["wandb_id"]}
    assert (records[0].run_group, records[0].display_name) == ("digits", "watched-seed0")


def test_every_scalar_of_metrics_csv_is_there_with_the_same_value(run):
    folder, files = run
    rows = read_csv(folder / "metrics.csv")
    sent = {}
    for file in files[:2]:
        for row in history(file):
            for key, value in row.items():
                sent.setdefault(key, []).append(value)
    assert {"nc/train/nc1", "val/acc_medium", "train/loss"} <= rows[0].keys() & sent.keys()
    for key in rows[0].keys() - {"step", "epoch"}:  # W&B merges the rows of one step
        written = [float(row[key]) for row in rows if row[key] not in ("", "nan")]
        numbers = [float(value) for value in sent.get(key, []) if value not in ("NaN", None)]
        assert numbers == pytest.approx(written), key


def test_all_that_the_dashboard_shows_is_there(run):
    keys = {key for file in run[1] for row in history(file) for key in row}
    logged = keys | {key.rpartition("/")[0] for key in keys if key.endswith("/_type")}
    parts = (*CURVES.values(), PICTURES, TESTED)
    missing = {key for part in parts for shown in part.values() for key in shown} - logged
    # no class of this run has so many or so few images
    assert {key.rpartition("_")[2] for key in missing} <= {"many", "few"}
    assert any(update.get("arm") == "etf_dr_balanced" for update in config_updates(run[1][0]))


def test_figures_arrive_as_images(run):
    folder, (_, resumed, _) = run
    sent = {key.rpartition("/")[0] for row in history(resumed) for key in row if key.endswith("/_type")}
    sent |= {key for row in history(resumed) for key, value in row.items() if isinstance(value, dict)}
    assert {"nc/curves", "nc/heat_map", "nc/variability", "nc/spectrum", "nc/triangle"} <= sent
    with Image.open(folder / "figures/nc_curves.png") as curves:
        arrived = (resumed.parent / "files/media/images").rglob("curves*.png")
        assert any(np.array_equal(curves, Image.open(file).convert("RGB")) for file in arrived)


def test_the_configuration_of_a_training_is_there_once_and_a_test_leaves_it_as_it_is(run):
    folder, files = run
    for file, times in zip(files, (1, 1, 0), strict=True):
        ours = [update for update in config_updates(file) if "model" in update]
        assert len(ours) == times
        assert not [key for update in config_updates(file) for key in update if key.startswith(("model/", "head"))]
    last = next(update for update in config_updates(files[1]) if "model" in update)
    assert last["model"] == yaml.safe_load((folder / "config.yaml").read_text())["model"]


def test_epochs_are_the_x_axis_and_the_summary_holds_the_best_value_and_the_last(run):
    _, (_, resumed, _) = run
    axes, kept = step_metrics(resumed), summary(resumed)
    assert all(axes[name] == "epoch" for name in ("train/*", "val/*", "nc/*", "test/*"))
    for name, best in (("val/acc", max), ("val/acc_worst", max), ("val/loss", min), ("nc/train/nc1", min)):
        values = [row[name] for row in history(resumed) if name in row]
        assert kept[name] == pytest.approx({best.__name__: best(values), "last": values[-1]}), name


def test_a_test_tells_its_numbers_and_the_classes_as_a_table(run):
    folder, (*_, tested) = run
    numbers = json.loads((folder / "test_metrics.json").read_text())
    sent = {key: value for row in history(tested) for key, value in row.items()}
    numbers = {key: value for key, value in numbers.items() if value == value}
    assert {key: sent[key] for key in numbers} == pytest.approx(numbers)
    (path,) = (tested.parent / "files/media/table/test").glob("classes*.table.json")
    table = json.loads(path.read_text())
    rows = read_csv(folder / "per_class.csv")
    assert table["columns"] == list(rows[0])
    assert [float(row[3]) for row in table["data"]] == [float(row["acc"]) for row in rows]
    assert len(rows) == 10


def test_the_last_checkpoint_is_an_artifact_when_asked_for(run):
    folder, files = run
    first, resumed, tested = ([a for a in artifacts(file) if a.type == "model"] for file in files)
    (entry,) = resumed[0].manifest.contents
    assert (entry.path, entry.size) == ("last.ckpt", (folder / "checkpoints/last.ckpt").stat().st_size)
    assert first == tested == []


@pytest.mark.parametrize(
    ("given", "env", "name", "expected"),
    [
        ({}, {}, "digits/ce", {"name": "ce-seed3", "group": "digits"}),
        ({}, {}, "digits/ce/ratio50-seed3", {"name": "ce/ratio50-seed3", "group": "digits"}),
        ({}, {}, "mine", {"name": "mine-seed3", "group": "signs"}),  # called after the data set
        ({"group": "own"}, {"WANDB_NAME": "by the environment"}, "digits/ce", {"group": "own"}),
    ],
)
def test_what_the_user_names_wins(given, env, name, expected, tmp_path, monkeypatch):
    for variable in ("WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    choose_names(given, folder=tmp_path, name=name, seed=3, data="Signs")
    assert given == expected


def test_the_id_that_a_run_had_is_kept_unless_the_user_gives_one(tmp_path):
    (tmp_path / "run.json").write_text('{"wandb_id": "before"}')
    for given, chosen in (({}, "before"), ({"id": "mine"}, "mine")):
        choose_names(given, folder=tmp_path, name="digits/ce", seed=0, data="Digits")
        assert given["id"] == chosen
