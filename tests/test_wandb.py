import csv
from pathlib import Path

import pytest
import yaml

from tests.wandb_file import config_updates, history, step_metrics

ROOT = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    result = etflight_command(
        "fit", "-c", ROOT / "digits/etf_dr_balanced.yaml", "-c", ROOT / "logger/wandb.yaml", "--trainer.max_epochs", 2,
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--name", "watched",
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
