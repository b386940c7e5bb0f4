import numpy as np
import pytest
from PIL import Image

from etflight import plotting
from etflight.callbacks.figures import CollapseFigures
from etflight.utils.errors import UserError
from tests.callbacks.plain import TRAIN, fit, plain_monitor


@pytest.fixture
def sent(monkeypatch):
    """What the callback would send: the step and the figures."""
    found = []
    monkeypatch.setattr(CollapseFigures, "_send", lambda _, trainer, drawn: found.append((trainer.global_step, drawn)))
    return found


def test_figures_lie_in_the_run_folder_as_pictures_and_a_film_of_this_run(tmp_path):
    earlier = tmp_path / "snapshots" / "epoch_007.npz"
    earlier.parent.mkdir()
    earlier.write_text("not even a snapshot")
    fit(tmp_path, CollapseFigures(triangle=(0, 1, 2)), plain_monitor(snapshots=2), val=False)
    names = ["curves", "heat_map", "spectrum", "triangle", "variability"]
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == sorted([*(f"nc_{name}.png" for name in names), "nc_triangle.gif"])
    for file in files:
        with Image.open(file) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(10**7)) > 20
    with Image.open(tmp_path / "figures" / "nc_triangle.gif") as film:
        assert film.n_frames == 3  # before training, and after each epoch


def test_figures_show_what_the_monitor_measured(tmp_path, sent):
    watch = plain_monitor()
    fit(tmp_path, watch, CollapseFigures(every_n_epochs=4), epochs=4, val=False)
    ((_, figures),) = sent
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


@pytest.mark.parametrize(
    ("every", "first", "epochs"), [(1, "monitor", [2, 4, 5]), (1, "figures", [2, 4, 5]), (3, "monitor", [3, 5])]
)
def test_figures_come_every_n_epochs_and_at_the_end_wherever_the_callback_stands(tmp_path, sent, every, first, epochs):
    watch, draw = plain_monitor(every_n_epochs=every), CollapseFigures(every_n_epochs=2)
    fit(tmp_path, *((watch, draw) if first == "monitor" else (draw, watch)), epochs=5, val=False)
    assert [step for step, _ in sent] == [6 * epoch for epoch in epochs]
    for (_, figures), epoch in zip(sent, epochs, strict=True):
        assert max(figures["nc/curves"].axes[0].lines[0].get_xdata()) == epoch


def test_a_second_fit_with_the_same_callbacks_draws_again(tmp_path, sent):
    watch, draw = plain_monitor(), CollapseFigures(every_n_epochs=2)
    for _ in range(2):
        fit(tmp_path, draw, watch, epochs=3, val=False)
    assert [step for step, _ in sent] == [12, 18, 12, 18]


def test_figures_of_two_spaces_have_prefixes_of_their_own(tmp_path, sent):
    fit(tmp_path, plain_monitor(), plain_monitor(space="backbone"), CollapseFigures(), epochs=1, val=False)
    keys = [key for _, figures in sent for key in figures]
    names = ["curves", "heat_map", "variability", "spectrum"]
    assert keys == [f"{prefix}/{name}" for prefix in ("nc", "nc_raw") for name in names]


def test_figures_need_no_sweep_online(tmp_path, sent):
    fit(tmp_path, plain_monitor(online=True), CollapseFigures(), epochs=2, val=False)
    ((_, figures),) = sent
    labels = [line.get_label() for line in figures["nc/curves"].axes[0].lines]
    assert labels == ["nc/train_online/nc1"]
    assert "nc/heat_map" in figures


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
