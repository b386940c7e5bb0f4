import csv
import json
from pathlib import Path

import pytest
import yaml

from tests.cli.test_bad_input import arrays
from tests.system.test_ddp import finish, start
from tests.wandb_file import artifacts, config_updates, history, run_record, step_metrics, summary

ROOT = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    result = etflight_command(
        "fit", "-c", ROOT / "data/digits.yaml", "-c", ROOT / "arms/etf_dr_balanced.yaml", "-c", ROOT / "logger/wandb.yaml",
        "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--name", "watched",
        cwd=folder, WANDB_MODE="offline", WANDB_SILENT="true",
    )  # fmt: skip
    assert result.status == 0, result.err
    return folder / "runs" / "watched"


@pytest.fixture(scope="module")
def file(run):
    (found,) = (run / "wandb").glob("offline-run-*/*.wandb")
    return found


def test_its_files_lie_in_the_run_folder_and_nowhere_else(run, file):
    assert {path.name for path in run.parent.parent.iterdir()} == {"runs"}


def test_every_scalar_of_metrics_csv_is_in_the_wandb_run_with_the_same_value(run, file):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    sent = {}
    for row in history(file):
        for key, value in row.items():
            sent.setdefault(key, []).append(value)
    for key in rows[0].keys() - {"step", "epoch"}:  # W&B merges the rows of one step
        written = [float(row[key]) for row in rows if row[key] not in ("", "nan")]
        numbers = [float(value) for value in sent.get(key, []) if value not in ("NaN", None)]
        assert numbers == pytest.approx(written), key
    assert "nc/train/nc1" in sent
    assert "val/acc_few" in sent


def test_figures_arrive_as_images(run, file):
    sent = {key for row in history(file) for key, value in row.items() if isinstance(value, dict)}
    sent |= {key.rpartition("/")[0] for row in history(file) for key in row if key.endswith("/_type")}
    assert {"nc/curves", "nc/heat_map", "nc/variability", "nc/spectrum", "nc/triangle"} <= sent
    assert len(list((file.parent / "files" / "media" / "images").rglob("*.png"))) >= 5


def test_the_resolved_configuration_is_there_once(run, file):
    ours = [update for update in config_updates(file) if "model" in update]
    assert len(ours) == 1
    assert ours[0]["model"] == yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert not [key for update in config_updates(file) for key in update if key.startswith("model/") or key == "head"]


def test_epochs_are_the_x_axis(file):
    axes = step_metrics(file)
    assert all(axes[name] == "epoch" for name in ("train/*", "val/*", "nc/*", "test/*"))


def test_the_group_is_the_experiment_and_the_name_arm_and_seed(run, file):
    assert run_record(file).run_group == "digits"
    assert run_record(file).display_name == "watched-seed0"


def test_the_summary_holds_the_best_value_and_the_last(run, file):
    kept = summary(file)
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    for name, best in (("val/acc", max), ("val/acc_worst", max), ("val/loss", min), ("nc/train/nc1", min)):
        values = [float(row[name]) for row in rows if row[name]]
        assert kept[name] == pytest.approx({best.__name__: best(values), "last": values[-1]}), name
    assert len(values) == 3  # before training, and of two epochs


# --- one run folder, one W&B run -----------------------------------------------------------------------------------------

TINY = [
    "-c", ROOT / "logger/wandb.yaml", "--data", "Digits", "--data.max_count", 10, "--data.batch_size", 25,
    "--model.backbone", "resnet20_cifar", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.max_epochs", 2, "--name", "tiny",
]  # fmt: skip
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def offline_files(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture(scope="module")
def parts(etflight_command, tmp_path_factory):
    """The run folder, and the W&B files of a run that was stopped in its second epoch, of its rest and of its test."""
    cwd = tmp_path_factory.mktemp("tiny")
    kill = [
        "--trainer.callbacks+",
        "tests.left_by_runs.Kill",
        "--trainer.callbacks.after",
        5,
        "--trainer.callbacks.signal",
        15,
    ]
    for status, argv in (
        (143, ["fit", *TINY, *kill]),
        (0, ["fit", *TINY, "--ckpt_path", "last", "--trainer.logger.log_model", "true"]),
        (0, ["test", *TINY, "--ckpt_path", "last"]),
    ):
        result = etflight_command(*argv, cwd=cwd, **OFFLINE)
        assert result.status == status, result.err
    folder = cwd / "runs/tiny"
    files = offline_files(folder)
    assert len(files) == 3
    return folder, files


def test_a_resumed_run_and_its_test_go_on_in_the_same_wandb_run(parts):
    folder, files = parts
    ids = [run_record(file).run_id for file in files]
    assert ids == [json.loads((folder / "run.json").read_text())["wandb_id"]] * 3
    losses = [row["train/loss"] for file in files for row in history(file) if "train/loss" in row]
    rows = csv.DictReader((folder / "metrics.csv").open())
    assert losses == pytest.approx([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert len(losses) == 2


def test_a_test_leaves_the_configuration_of_the_training_as_it_is(parts):
    _, (_, resumed, tested) = parts
    assert any("model" in update for update in config_updates(resumed))
    assert not any("model" in update for update in config_updates(tested))


def test_a_test_tells_its_numbers_and_the_classes_as_a_table(parts):
    folder, (*_, tested) = parts
    numbers = json.loads((folder / "test_metrics.json").read_text())
    sent = {key: value for row in history(tested) for key, value in row.items()}
    assert {key: sent[key] for key in numbers if numbers[key] == numbers[key]} == pytest.approx(
        {key: value for key, value in numbers.items() if value == value}
    )
    (path,) = (tested.parent / "files/media/table/test").glob("classes*.table.json")
    table = json.loads(path.read_text())
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert table["columns"] == list(rows[0])
    assert [float(row[3]) for row in table["data"]] == [float(row["acc"]) for row in rows]
    assert len(rows) == 10


def models(file):
    return [artifact for artifact in artifacts(file) if artifact.type == "model"]


def test_the_last_checkpoint_is_an_artifact_when_asked_for(parts):
    folder, (first, resumed, tested) = parts
    (artifact,) = models(resumed)
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("last.ckpt", (folder / "checkpoints/last.ckpt").stat().st_size)
    assert models(first) == models(tested) == []


def test_what_the_user_names_wins(etflight_command, tmp_path):
    own = ["--trainer.logger.group", "mine", "--trainer.logger.id", "abc"]
    result = etflight_command(
        "fit", *TINY, *own, "--trainer.max_epochs", 1, cwd=tmp_path, **OFFLINE, WANDB_NAME="by the environment"
    )
    assert result.status == 0, result.err
    (file,) = offline_files(tmp_path / "runs/tiny")
    record = run_record(file)
    assert (record.run_group, record.run_id, record.display_name) == ("mine", "abc", "by the environment")


def test_the_group_of_a_run_on_a_set_of_ones_own_is_its_name(etflight_command, tmp_path):
    data = arrays(tmp_path / "signs.npz", train=100, classes=10)
    result = etflight_command("fit", *TINY, *data, "--trainer.max_epochs", 1, cwd=tmp_path, **OFFLINE)
    assert result.status == 0, result.err
    (file,) = offline_files(tmp_path / "runs/tiny")
    assert run_record(file).run_group == "signs"
    assert json.loads((tmp_path / "runs/tiny/run.json").read_text())["data"]["dataset"] == "signs"


def test_two_processes_are_one_wandb_run(tmp_path):
    two = ["-c", ROOT / "trainer/ddp_cpu.yaml", "--trainer.logger.offline", "true", "--trainer.max_epochs", 1]
    finish(start("etflight", "fit", *TINY, *two, cwd=tmp_path))
    (file,) = tmp_path.rglob("*.wandb")
    assert offline_files(tmp_path / "runs/tiny") == [file]
    assert [row for row in history(file) if "train/loss" in row]
    assert json.loads((tmp_path / "runs/tiny/run.json").read_text())["hardware"]["processes"] == 2
