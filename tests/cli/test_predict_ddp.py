"""`etflight predict` by two processes: the file that one process writes."""

import os
from pathlib import Path

import numpy as np
import pytest

from etflight.cli.stages import main
from tests.cli.test_predict import picture, rgb, table

_ = rgb  # the fixture of a trained checkpoint
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.logger", "false"]
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
UNREADABLE = (0, 3, 4, 10)  # both ranks' images, the first and the last among them


def predict_together(rank: int, folder: Path, argv: list[str]) -> None:
    os.chdir(folder)
    try:
        main([*argv, *QUIET, *TWO])
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eleven files, an odd number also of readable ones, each another picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(11):
        picture().rotate(31 * i).save(folder / f"{i:02}.png")
        if i in UNREADABLE:
            (folder / f"{i:02}.png").write_bytes(b"no image")
    return folder


def contents(path: Path) -> dict[str, np.ndarray]:
    """Columns of a file of predictions."""
    rows = table(path)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_same(path: Path, expected: Path) -> None:
    found, wanted = contents(path), contents(expected)
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        if name.startswith(("probability", "embedding")):
            np.testing.assert_allclose(found[name].astype(float), column.astype(float), atol=2e-6)
        else:
            assert found[name].tolist() == column.tolist(), name


def test_two_processes_write_every_image_once_and_in_order(rgb, pictures, two_ready_processes, tmp_path):
    argv = [
        "predict", "--ckpt_path", str(rgb), "--images", str(pictures), "--top_k", "2", "--embeddings", "true",
        "--data.batch_size", "3", "--output",
    ]  # fmt: skip
    main([*argv, str(tmp_path / "one.csv"), *QUIET])
    two_ready_processes(predict_together, [(tmp_path, [*argv, str(tmp_path / "two.csv")])] * 2)
    names = [str(pictures / f"{i:02}.png") for i in range(11)]
    assert contents(tmp_path / "two.csv")["image"].tolist() == [
        name for i, name in enumerate(names) if i not in UNREADABLE
    ]
    assert_same(tmp_path / "two.csv", tmp_path / "one.csv")
    skipped = table(tmp_path / "two_skipped.csv")
    assert [row["image"] for row in skipped] == [names[i] for i in UNREADABLE]
    assert skipped == table(tmp_path / "one_skipped.csv")


def test_two_processes_predict_a_sets_test_images_as_one_does(rgb, two_ready_processes, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 255, (31, 16, 20, 3), dtype=np.uint8)
    arrays = {f"{split}_images": pixels for split in ("train", "test")}
    np.savez(tmp_path / "set.npz", train_labels=np.arange(31) % 3, test_labels=np.arange(31) % 3, **arrays)
    argv = ["predict", "--ckpt_path", str(rgb), "--data", "ArrayImages", "--data.path", str(tmp_path / "set.npz")]
    argv += ["--data.mean", "[0.3]", "--data.std", "[0.4]", "--data.batch_size", "4", "--name"]
    main([*argv, "one", "--trainer.default_root_dir", str(tmp_path), *QUIET])
    two_ready_processes(predict_together, [(tmp_path, [*argv, "two", "--trainer.default_root_dir", str(tmp_path)])] * 2)
    assert contents(tmp_path / "two" / "predictions.csv")["image"].tolist() == list(map(str, range(31)))
    assert_same(tmp_path / "two" / "predictions.csv", tmp_path / "one" / "predictions.csv")


def refusal_of_both(rank: int, folder: Path, argv: list[str]) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        predict_together(rank, folder, argv)
    return str(raised.value)


def test_images_of_which_none_can_be_read_end_both_processes_alike(rgb, two_ready_processes, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"no image")
    argv = ["predict", "--ckpt_path", str(rgb), "--images", "bad", "--output", "out.csv"]
    first, second = two_ready_processes(refusal_of_both, [(tmp_path, argv)] * 2)
    assert first == second
    assert first.startswith("none of the 3 images can be read")
    assert not (tmp_path / "out.csv").exists()
