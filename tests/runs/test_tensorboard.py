"""The overlay of TensorBoard: the same scalars as in metrics.csv, and the pictures of `figures/`."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from etflight.cli.stages import main
from tests.training import read_csv

ROOT = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensorboard")
    files = [ROOT / "data/digits.yaml", ROOT / "arms/etf_dr_balanced.yaml", ROOT / "logger/tensorboard.yaml"]
    common = [
        *(word for file in files for word in ("-c", str(file))), "--data.max_count", "30", "--trainer.max_epochs", "2",
        "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root),
    ]  # fmt: skip
    main(["fit", *common])
    main(["test", *common, "--ckpt_path", "last"])
    return root / "digits/etf_dr_balanced"


@pytest.fixture(scope="module")
def events(run):
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def test_every_scalar_of_metrics_csv_has_its_value_at_its_step(run, events):
    rows = read_csv(run / "metrics.csv")
    names = rows[0].keys() - {"step", "epoch"}
    assert {"train/loss", "val/acc_few", "nc/train/nc1"} <= names
    for name in names:
        written = [(int(row["step"]), float(row[name])) for row in rows if row[name] not in ("", "nan")]
        sent = [(event.step, event.value) for event in events.Scalars(name) if event.value == event.value]
        assert [step for step, _ in sent] == [step for step, _ in written], name
        assert [value for _, value in sent] == pytest.approx([value for _, value in written], rel=1e-6), name


def test_what_a_test_measures_and_the_speed_are_there_too(run, events):
    for name, value in json.loads((run / "test_metrics.json").read_text()).items():
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6, nan_ok=True), name
    for name in ("speed/images_per_s", "speed/epoch_s"):
        rows = read_csv(run / "speed.csv")
        assert [e.value for e in events.Scalars(name)] == pytest.approx([float(row[name]) for row in rows], rel=1e-6)


def test_every_picture_of_the_run_folder_is_there(run, events):
    pictures = {path.stem for path in (run / "figures").glob("*.png")}
    assert {"nc_curves", "nc_heat_map", "nc_triangle", "reliability", "confusion", "per_class"} <= pictures
    tags = {tag.removeprefix("test/").replace("/", "_"): tag for tag in events.Tags()["images"]}
    assert tags.keys() == pictures
    for name, tag in tags.items():
        last = events.Images(tag)[-1]
        with Image.open(run / "figures" / f"{name}.png") as picture:
            assert (last.width, last.height) == picture.size
    steps = int(read_csv(run / "metrics.csv")[-1]["step"]) + 1
    assert events.Images("nc/curves")[-1].step == steps
