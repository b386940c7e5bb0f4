import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from etflight.analysis.describe import contact_sheet
from etflight.data import ArrayImages, Digits, FolderImages
from etflight.utils.errors import UserError
from tests.training import image_folder, save_numbered

ROOT = Path(__file__).parents[2] / "configs"
FILES = {"describe.json", "class_histogram.png", "contact_sheet.png"}


@pytest.fixture
def numbered(tmp_path):
    """`numbered(train, **arrays)` writes the file of `save_numbered` and returns its path."""
    return lambda train=(150, 30, 5), **more: save_numbered(tmp_path / "numbered.npz", train, (4, 4, 4), **more)


def run(etflight_command, cwd, *argv):
    """The output folder, the record in it and what was printed."""
    done = etflight_command.succeed("describe", *argv, cwd=cwd)
    found = Path(cwd, done.out.strip().splitlines()[-1].split(":")[0])
    assert {file.name for file in found.iterdir()} == FILES
    assert all((found / name).stat().st_size > 1000 for name in FILES - {"describe.json"})
    return found, json.loads((found / "describe.json").read_text()), done.out


def test_numbers_are_those_of_the_arrays(numbered, etflight_command, tmp_path):
    path = numbered(class_names=np.array(["[red]ox[/red]", "yak", "emu"]))
    found, record, printed = run(etflight_command, tmp_path, "--data", "ArrayImages", "--data.path", path)
    with np.load(path) as arrays:
        labels, pixels = arrays["train_labels"].astype("<i8"), arrays["train_images"].transpose(0, 3, 1, 2)
    parts = (labels.tobytes() + b"[185, 3, 2, 4]" + pixels.tobytes(), np.arange(185).astype("<i8").tobytes())
    fingerprint = "-".join(hashlib.sha256(part).hexdigest()[:12] for part in parts)  # all of the set as it is
    assert found == tmp_path / "runs/describe" / f"numbered_{fingerprint}"
    assert record == {
        "class": "ArrayImages",
        "dataset": "numbered",
        "name": f"ArrayImages {path}",
        "image_shape": [3, 2, 4],
        "class_names": ["[red]ox[/red]", "yak", "emu"],
        "fingerprint": fingerprint,
        "imbalance_ratio": None,
        "count_ratio": 30,
        "validation": "the test set, watched only",
        "class_counts": {"train": [150, 30, 5], "test": [4, 4, 4]},
        "shot_groups": {"many": [0], "medium": [1], "few": [2]},
    }
    for line in (
        "train 185 3 150 5", "test 12 3 4 4", "many 1 150 4", "medium 1 30 4", "few 1 5 4",
        f"[red]ox[/red] 150 many {'█' * 40}", f"yak 30 medium {'█' * 8}", "emu 5 few █",
    ):  # fmt: skip
        assert line in [" ".join(line.split()) for line in printed.splitlines()]


def test_held_out_images_are_counted_and_later_files_win_and_the_command_line_over_all(
    numbered, etflight_command, tmp_path
):
    numbered((100, 100, 100))
    data = "{class_path: ArrayImages, init_args: {path: numbered.npz, imbalance_ratio: 10, val_fraction: 0.5}}"
    (tmp_path / "base.yaml").write_text(f"model: {{head: Nonsense}}\ndata: {data}")
    (tmp_path / "top.yaml").write_text("data: {init_args: {imbalance_ratio: 4}}")
    files = ["-c", "base.yaml", "--config=top.yaml"]
    _, record, _ = run(etflight_command, tmp_path, *files, "--data.val_fraction", 0.2)
    expected = {"train": [int(80 * 4 ** (-k / 2)) for k in range(3)], "val": [20] * 3, "test": [4] * 3}
    assert (record["class_counts"], record["validation"]) == (expected, "held out")
    assert (record["imbalance_ratio"], record["count_ratio"]) == (4, 4)


def test_classes_that_lose_a_third_or_more_of_their_images_to_validation_are_counted(
    numbered, etflight_command, tmp_path
):
    numbered((100, 3, 2))
    words = ["--data", "ArrayImages", "--data.path", "numbered.npz", "--data.val_fraction", 0.01]
    *_, printed = run(etflight_command, tmp_path, *words)
    assert "val_fraction 0.01 takes a third or more of the training images of 2 of 3 classes" in " ".join(
        printed.split()
    )


def test_each_row_of_the_sheet_has_images_of_its_class_from_first_to_last(numbered):
    data = ArrayImages(numbered())
    (axes,) = contact_sheet(data, 4).axes
    sheet = axes.images[0].get_array()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0 (150)", "1 (30)", "2 (5)"]
    cells = sheet.reshape(3, 3, 4, 5, 3)[:, :2, :, :4]  # rows and columns of 2 × 4 images, a white line after each
    assert (cells == cells[:, :1, :, :1]).all()
    places, labels = cells[:, 0, :, 0, 1], cells[:, 0, :, 0, 2]
    np.testing.assert_array_equal(labels, np.repeat(np.arange(3)[:, None], 4, axis=1))
    np.testing.assert_array_equal(places, [[0, 50, 99, 149], [0, 10, 19, 29], [0, 1, 3, 4]])


def test_a_corrupt_image_ends_it_or_is_left_out_of_its_row_and_told(tmp_path, capfd):
    root = tmp_path / "images"
    image_folder(root, {"cat": 3, "dog": 4})
    file = root / "train/cat/1.png"
    file.write_bytes(b"no image")
    data = FolderImages(str(root), image_size=4)
    with pytest.raises(UserError, match=rf"{file} cannot be read as an image"):
        contact_sheet(data, 8)
    (axes,) = contact_sheet(FolderImages(str(root), image_size=4, skip_corrupt=True), 8).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dog (4)", "cat (3)"]
    assert f"1 image could not be read and was skipped: {file}" in capfd.readouterr().err


def test_of_many_classes_an_even_choice_is_shown(numbered, etflight_command, tmp_path):
    path = numbered(tuple(range(210, 0, -1)))
    data = ArrayImages(path)
    figure = contact_sheet(data, 2)
    names = [int(text.get_text().split()[0]) for axes in figure.axes for text in axes.get_yticklabels()]
    assert len(names) == 44
    assert names == [round(i * 209 / 43) for i in range(44)]
    assert figure.get_suptitle().endswith("44 of 210 classes")
    _, record, printed = run(etflight_command, tmp_path, "--data", "ArrayImages", "--data.path", path)
    assert record["class_counts"]["train"] == list(range(210, 0, -1))
    bars = re.findall(r"^\d+ … \((\d+)\) +(\d+) … (\d+) ", printed, flags=re.MULTILINE)
    assert len(bars) == 60
    assert sum(int(classes) for classes, _, _ in bars) == 210
    assert [int(bars[0][1]), int(bars[-1][2])] == [210, 1]


def test_a_configuration_describes_the_images_that_fit_trains_on(etflight_command, tmp_path):
    # with a trainer, a model, stages and a sampler
    files = ["-c", ROOT / "data" / "digits.yaml", "-c", ROOT / "arms" / "crt.yaml"]
    etflight_command.succeed(
        "fit", *files, "--first_stage", "null", "--fine_tuning.load", "null", "--trainer.max_epochs", 1,
        "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 0, "--trainer.accelerator", "cpu", "--name", "one", cwd=tmp_path,
    )  # fmt: skip
    trained = json.loads((tmp_path / "runs/one/run.json").read_text())["data"]
    _, record, _ = run(etflight_command, tmp_path, *files)
    assert record["fingerprint"] == trained["fingerprint"]
    assert record["class_counts"]["train"] == trained["class_counts"]


def test_own_files_are_replaced_and_no_others(numbered, etflight_command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/describe.json").write_text('{"mine": 1}')
    other = etflight_command("describe", "--data", "Digits", "--output", "mine", cwd=tmp_path)
    other.assert_refused("mine/describe.json holds other results")
    argv = ["--data", "ArrayImages", "--data.path", numbered(), "--output", "$out_{^ [b]"]
    for ratio in (1, 2):
        _, record, _ = run(etflight_command, tmp_path, *argv, "--data.imbalance_ratio", ratio, "--data.max_count", 5)
    assert record["class_counts"]["train"] == [5, 3, 2]


def test_bad_input_ends_in_one_line_that_says_the_mend(numbered, etflight_command, tmp_path):
    numbered((5, 0, 5))
    (tmp_path / "model.yaml").write_text("model: {head: ETFHead}")
    (tmp_path / "taken").write_text("a file")
    digits, arrays = ["--data", "Digits"], ["--data", "ArrayImages", "--data.path", "numbered.npz"]
    for argv, status, message in (
        ([], 2, "data"),
        (["-c", "model.yaml"], 2, "data"),
        (["-c", "gone.yaml"], 1, "no configuration file gone.yaml"),
        ([*digits, "--images_per_class", 0], 2, "images_per_class"),
        ([*digits, "--output", "taken"], 1, "give another --output"),
        (arrays, 1, "class 1 .* has no training image"),
    ):
        refused = etflight_command("describe", *argv, cwd=tmp_path)
        assert (refused.status, refused.err.count("\n")) == (status, 1), (argv, refused.err)
        assert re.search(message, refused.error_lines[0]), (message, refused.err)
    assert not (tmp_path / "runs").exists()


def test_the_contact_sheet_shows_images_as_a_training_step_gets_them_if_asked():
    def pixels(augmented, **options):
        figure = contact_sheet(Digits(crop_padding=0, flip=False, **options), 3, augmented=augmented)
        return figure.axes[0].images[0].get_array()

    stored = pixels(False)
    assert np.array_equal(pixels(True), stored)  # nothing is augmented: normalised and back
    assert not np.array_equal(pixels(True, auto_augment="trivialaugment"), stored)
    assert np.array_equal(pixels(True, views=2), stored)  # the first view
