import csv
import json
import time

import pytest
from lightning.pytorch import Callback, Trainer

from etflight import Classifier
from etflight.callbacks import LastCheckpoint, Speed
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from tests.left_by_runs import differences, read

FIT = [
    "fit", "--data", "Digits", "--model.backbone", "resnet20_cifar", "--trainer.accelerator", "cpu", "--trainer.max_epochs", 2,
    "--trainer.limit_train_batches", 4, "--data.batch_size", 32, "--name", "r", "--trainer.enable_model_summary", "false",
]  # fmt: skip
NAMES = ["speed/images_per_s", "speed/data_wait", "speed/peak_memory_gb", "speed/epoch_s"]


def rows(folder):
    return list(csv.DictReader((folder / "speed.csv").open()))


def test_fit_tells_its_speed_in_a_file_and_the_loggers(etflight_command, tmp_path):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "other", "--trainer.log_every_n_steps", 2]
    result = etflight_command(*FIT, *logger, cwd=tmp_path)
    assert result.status == 0, result.err
    found = rows(tmp_path / "runs/r")
    assert [row["epoch"] for row in found] == ["0", "1"]
    assert all(float(row["speed/images_per_s"]) > 0 for row in found)
    assert all(0 < float(row["speed/data_wait"]) < 1 for row in found)
    assert all(0.05 < float(row["speed/peak_memory_gb"]) < 50 for row in found)
    logged = next((tmp_path / "other").rglob("metrics.csv"))
    assert set(NAMES) <= set(next(csv.reader(logged.open())))
    assert "speed" not in (tmp_path / "runs/r/metrics.csv").read_text()


class Sleepy(Digits):
    """Its images come slowly."""

    pause = 0.0

    def train_dataloader(self):
        loader = super().train_dataloader()
        fetch, pause = loader.dataset.__getitems__, self.pause

        class Slow(type(loader.dataset)):
            def __getitems__(self, positions):
                time.sleep(pause)
                return fetch(positions)

        loader.dataset.__class__ = Slow
        return loader


class Pause(Callback):
    """Takes time in validation, which is none of training's."""

    def on_validation_epoch_end(self, *_):
        time.sleep(1.5)


def fit(folder, pause):
    data = Sleepy(batch_size=16)
    data.pause = pause
    runs = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=5, limit_val_batches=1, default_root_dir=folder,
        callbacks=[LastCheckpoint(), Speed(), Pause()], logger=MetricsCSV(folder), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=3,
    )  # fmt: skip
    runs.fit(Classifier(10, "resnet20_cifar", in_chans=1), datamodule=data)
    return {name: float(value) for name, value in rows(folder)[0].items()}


def test_the_share_of_waiting_is_the_loaders_and_validation_does_not_count(tmp_path):
    quick, slow = fit(tmp_path / "quick", 0.0), fit(tmp_path / "slow", 0.3)
    assert quick["speed/data_wait"] < slow["speed/data_wait"]
    seconds = 5 * 16 / slow["speed/images_per_s"]
    assert seconds * slow["speed/data_wait"] >= 5 * 0.3
    seconds = 5 * 16 / quick["speed/images_per_s"]
    assert quick["speed/data_wait"] * seconds < 1.5
    assert quick["speed/epoch_s"] >= seconds + 1.5
    # two runs at different speeds: nothing that depends on time is in the checkpoint
    assert [
        line for line in differences(read(tmp_path / "quick"), read(tmp_path / "slow")) if "speed" in line.lower()
    ] == []
    assert "Speed" not in read(tmp_path / "quick")["callbacks"]


@pytest.mark.parametrize(("profiler", "files"), [("simple", "fit-profile.txt"), ("pytorch", "fit-profile*.json")])
def test_a_profile_lies_in_the_run_folder(profiler, files, etflight_command, tmp_path):
    result = etflight_command(
        *FIT, "--trainer.profiler", profiler, "--trainer.enable_progress_bar", "false", cwd=tmp_path
    )
    assert result.status == 0, result.err
    (path,) = (tmp_path / "runs/r").glob(files)
    if path.suffix == ".txt":
        assert "run_training_batch" in path.read_text()
    else:
        names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        assert any("convolution" in name for name in names)
