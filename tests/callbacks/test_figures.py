import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from etflight import Classifier, plotting
from etflight.callbacks import NeuralCollapseMonitor
from etflight.callbacks.figures import CollapseFigures
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from etflight.utils.errors import UserError
from tests.callbacks.plain import TRAIN, fit, plain_monitor, trainer

PICTURES = ["nc_curves", "nc_heat_map", "nc_spectrum", "nc_variability"]


class Recorder:
    """What the callback would send, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[int, dict]] = []
        monkeypatch.setattr(
            CollapseFigures, "_send", lambda _, trainer, figures: self.sent.append((trainer.global_step, figures))
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with all loggers: its folder."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            MetricsCSV(folder),
            TensorBoardLogger(folder, name="tensorboard", version=""),
            WandbLogger(save_dir=folder, project="test"),
        ]
        callbacks = [CollapseFigures(every_n_epochs=1, triangle=(0, 1, 8)), NeuralCollapseMonitor(snapshots=5)]
        runs = trainer(folder / "unused", *callbacks, logger=loggers)
        model = Classifier(10, backbone="resnet20_cifar", in_chans=1, model_kwargs={"width": 1})
        runs.fit(model, datamodule=Digits(max_count=5))
        loggers[2].experiment.finish()
    return folder


def test_figures_lie_in_the_run_folder_as_pictures_and_a_film(run):
    expected = sorted([f"{name}.png" for name in [*PICTURES, "nc_triangle"]] + ["nc_triangle.gif"])
    assert sorted(file.name for file in (run / "figures").iterdir()) == expected
    for file in (run / "figures").glob("*.png"):
        with Image.open(file) as picture:
            assert min(picture.size) > 400
            assert len(picture.getcolors(10**7)) > 20
    with Image.open(run / "figures" / "nc_triangle.gif") as film:
        assert film.n_frames == 3  # before training, and after each epoch


def test_figures_are_in_the_tensorboard_event_file(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    keys = [name.replace("nc_", "nc/") for name in [*PICTURES, "nc_triangle"]]
    assert sorted(events.Tags()["images"]) == sorted(keys)
    for key in keys:
        assert [image.step for image in events.Images(key)] == [1, 2]
    with Image.open(run / "figures" / "nc_curves.png") as picture:
        last = events.Images("nc/curves")[-1]
        assert (last.width, last.height) == picture.size


def test_figures_are_in_the_wandb_run(run):
    (offline,) = (run / "wandb").glob("offline-run-*")
    images = {}
    for file in (offline / "files" / "media" / "images").rglob("*.png"):
        images.setdefault(file.relative_to(offline / "files" / "media" / "images").as_posix().split("_")[0], []).append(
            file
        )
    counted = {key: len(files) for key, files in images.items()}
    assert counted == {f"nc/{key}": 2 for key in ("curves", "heat", "spectrum", "triangle", "variability")}
    with Image.open(run / "figures" / "nc_curves.png") as ours:
        pixels = np.asarray(ours)
    theirs = [np.asarray(Image.open(file).convert("RGB")) for file in images["nc/curves"]]
    assert sum(picture.shape == pixels.shape and (picture == pixels).all() for picture in theirs) == 1


def test_figures_show_what_the_monitor_measured(tmp_path, monkeypatch):
    recorder, watch = Recorder(monkeypatch), plain_monitor()
    fit(tmp_path, watch, CollapseFigures(every_n_epochs=4), epochs=4, val=False)
    ((_, figures),) = recorder.sent
    curve = next(line for line in figures["nc/curves"].axes[0].lines if line.get_label() == "nc/train/nc1")
    assert list(curve.get_xdata()) == watch.epochs == [0, 1, 2, 3, 4]
    assert list(curve.get_ydata()) == watch.history["nc/train/nc1"]
    heat = figures["nc/heat_map"].axes[0].images[0].get_array()
    expected = plotting.cosine_heatmap(watch.latest["train"].means, watch.latest_weight).axes[0].images[0].get_array()
    np.testing.assert_array_equal(heat, expected)
    np.testing.assert_allclose(np.diag(heat).mean(), watch.history["nc/train/alignment"][-1], atol=1e-6)
    dots = figures["nc/variability"].axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(dots[:, 0], TRAIN.tensors[1].bincount())
    np.testing.assert_allclose(dots[:, 1], watch.latest["train"].variances)


@pytest.mark.parametrize("first", ["monitor", "figures"])
def test_figures_come_every_n_epochs_and_at_the_end_wherever_the_callback_stands(tmp_path, monkeypatch, first):
    recorder, watch, draw = Recorder(monkeypatch), plain_monitor(), CollapseFigures(every_n_epochs=2)
    fit(tmp_path, *((watch, draw) if first == "monitor" else (draw, watch)), epochs=5, val=False)
    assert [step for step, _ in recorder.sent] == [12, 24, 30]  # six steps an epoch
    for (_, figures), epochs in zip(recorder.sent, (2, 4, 5), strict=True):
        assert max(figures["nc/curves"].axes[0].lines[0].get_xdata()) == epochs


def test_figures_follow_a_monitor_that_measures_less_often(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    fit(
        tmp_path,
        plain_monitor(every_n_epochs=3),
        CollapseFigures(every_n_epochs=2),
        epochs=7,
        val=False,
    )
    assert [step for step, _ in recorder.sent] == [18, 36, 42]


def test_a_second_fit_with_the_same_callbacks_draws_again(tmp_path, monkeypatch):
    recorder, watch, draw = Recorder(monkeypatch), plain_monitor(), CollapseFigures(every_n_epochs=2)
    for _ in range(2):
        fit(tmp_path, draw, watch, epochs=3, val=False)
    assert [step for step, _ in recorder.sent] == [12, 18, 12, 18]


def test_figures_of_two_spaces_have_prefixes_of_their_own(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    fit(tmp_path, plain_monitor(), plain_monitor(space="backbone"), CollapseFigures(), epochs=1, val=False)
    keys = [key for _, figures in recorder.sent for key in figures]
    names = ["curves", "heat_map", "variability", "spectrum"]
    assert keys == [f"{prefix}/{name}" for prefix in ("nc", "nc_raw") for name in names]


def test_figures_need_no_sweep_online(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    fit(tmp_path, plain_monitor(online=True), CollapseFigures(), epochs=2, val=False)
    ((_, figures),) = recorder.sent
    labels = [line.get_label() for line in figures["nc/curves"].axes[0].lines]
    assert labels == ["nc/train_online/nc1"]
    assert "nc/heat_map" in figures


def test_fast_dev_run_draws_but_leaves_no_file(tmp_path):
    fit(tmp_path, plain_monitor(), CollapseFigures(), fast_dev_run=True)
    assert not (tmp_path / "figures").exists()


def test_snapshots_of_an_earlier_run_do_not_get_into_the_film(tmp_path):
    stale = tmp_path / "snapshots" / "epoch_007.npz"
    stale.parent.mkdir()
    stale.write_text(json.dumps("not even a snapshot"))
    fit(tmp_path, plain_monitor(snapshots=2), CollapseFigures(triangle=(0, 1, 2)), epochs=2, val=False)
    with Image.open(tmp_path / "figures" / "nc_triangle.gif") as film:
        assert film.n_frames == 3


def test_missing_monitor_and_impossible_triangles_are_said_in_one_line(tmp_path):
    for callbacks, message in (
        ([CollapseFigures()], "add NeuralCollapseMonitor to trainer.callbacks"),
        ([plain_monitor(), CollapseFigures(triangle=(0, 1, 2))], "snapshots=50"),
        ([plain_monitor(snapshots=2), CollapseFigures(triangle=(0, 1, 4))], "labels from 0 to 3"),
    ):
        with pytest.raises(UserError, match=message) as error:
            fit(tmp_path, *callbacks)
        assert "\n" not in str(error.value)
    for wrong in ({"every_n_epochs": 0}, {"triangle": (0, 1)}, {"triangle": (0, 1, 1)}, {"triangle": (-1, 0, 1)}):
        with pytest.raises(UserError, match="CollapseFigures: "):
            CollapseFigures(**wrong)
