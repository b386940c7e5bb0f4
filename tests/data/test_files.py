"""What all sets of image files do: random squares, corrupt images, loader processes."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.data import ClassSubset, FolderImages
from etflight.data.files import Paths, files_below
from etflight.data.sampler import Draw
from etflight.utils.errors import UserError
from tests.training import new_trainer, save_folders, save_pictures

COUNTS = {"train": {"cat": 8, "dog": 4}, "val": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 2}}


@pytest.fixture
def tree(tmp_path):
    """Photographs of noise; `FolderImages` of it by default shows the middle."""
    return save_folders(tmp_path, (32, 24), **COUNTS)


def folder(tree, **options):
    return FolderImages(str(tree), **{"image_size": 16, "batch_size": 5, **options})


def deepen(tree, largest):
    """Let all files be grey ones of 16 bits with values up to `largest`."""
    for number, path in enumerate(sorted(tree.rglob("*.png"))):
        pixels = np.random.default_rng(number).integers(0, largest + 1, (24, 32), dtype=np.uint16)
        pixels[0, 0] = largest
        Image.fromarray(pixels).save(path)


def test_images_of_12_bits_in_files_of_16_are_told_of_once_with_the_largest_value(tree, capsys):
    deepen(tree, 4095)
    for data in (folder(tree), ClassSubset(FolderImages(str(tree), image_size=16), "0-1")):
        data.setup()
        line = (
            f"etflight: warning: {folder(tree)}: the largest value found in images of 16 bits is 4095, of which 8 bits keep 17 levels: "
            "multiply their pixels beforehand, so that white is 65535\n"
        )
        assert capsys.readouterr().err == line


def test_images_of_8_bits_of_all_16_and_broken_ones_are_not_told_of(tree, capsys):
    folder(tree).setup()
    deepen(tree, 65535)
    folder(tree).setup()
    for path in tree.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    folder(tree).setup()
    assert capsys.readouterr().err == ""


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_crop_scale": 0.0}, "min_crop_scale is 0.0"),
        ({"crop_pct": float("nan")}, "crop_pct is nan"),
        ({"image_size": 0}, "image_size is 0: give at least 1 pixel"),
        ({"image_size": 10_000, "crop_pct": 0.5}, "image_size is 10000: .* for image_size / crop_pct at most 16384"),
    ],
)
def test_invalid_sizes_are_refused(options, message):
    with pytest.raises(UserError, match=f"FolderImages: {message}"):
        FolderImages("x", **options)


def test_training_shows_random_squares_and_evaluation_the_middle(tree):
    data = folder(tree, min_crop_scale=0.2)
    train, middle = epoch(data)[0], next(iter(folder(tree).eval_dataloader("train")))[0]
    again = next(iter(data.eval_dataloader("train")))[0]
    assert torch.equal(middle, again)
    assert train.shape == (12, 3, 16, 16)
    assert not any(torch.equal(one, other) for one in train for other in middle)


def test_the_middle_is_a_part_of_the_resized_picture(tree):
    data = folder(tree, crop_pct=0.5)
    image = data.split("test")[0][0]
    resized = folder(tree, image_size=32).split("test")[0][0]
    assert torch.equal(image, resized[:, 8:24, 8:24])


def test_random_squares_follow_from_the_seed_and_the_draw(tree):
    options = {"min_crop_scale": 0.2, "sampler": "balanced", "seed": 3}
    images, labels = epoch(folder(tree, **options))
    for same in ({"num_workers": 2}, {"batch_size": 3}):
        for ours, theirs in zip((images, labels), epoch(folder(tree, **options, **same)), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(images, epoch(folder(tree, **options), 1)[0])
    assert not torch.equal(images, epoch(folder(tree, **{**options, "seed": 4}))[0])
    again, _ = folder(tree, **options).split("train").__getitems__([Draw(0, 0, number) for number in range(9)])
    assert len({image.sum().item() for image in again}) == 9


def test_ranks_together_draw_the_squares_of_one_process_also_in_a_resumed_epoch(tree):
    alone = epoch(folder(tree, min_crop_scale=0.2))[0]
    for served in (0, 1):
        parts = []
        for rank in range(2):
            data = folder(tree, min_crop_scale=0.2, batch_size=3)
            data._world = lambda rank=rank: (2, rank)
            loader = data.train_dataloader()
            loader.load_state_dict({"served": served})
            parts.append(torch.cat([images for images, _ in loader]))
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone[6 * served :])


# --- corrupt images -----------------------------------------------------------------------------------------------------------


def spoil(tree, *names):
    for name in names:
        (tree / name).write_bytes(b"no image")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_training_image_is_replaced_by_the_next_of_its_batch_and_told(tree, capfd, workers):
    expected_images, expected_labels = epoch(folder(tree))
    order = list(folder(tree).train_dataloader().sampler)
    spoil(tree, "train/cat/1.png", "train/cat/2.png", "train/dog/3.png")
    corrupt = [draw.position in (1, 2, 11) for draw in order]
    instead = []
    for slot in range(12):  # batches are of 5, 5 and 2
        batch = range(slot // 5 * 5, min(slot // 5 * 5 + 5, 12))
        later = [i for i in [*range(slot, batch.stop), *batch] if not corrupt[i]]
        instead.append(later[0])
    images, labels = epoch(folder(tree, skip_corrupt=True, num_workers=workers))
    assert torch.equal(images, expected_images[instead])
    assert torch.equal(labels, expected_labels[instead])
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("etflight: warning: 3 images could not be read and were skipped: ")
    assert all(f"{tree}/train/{name}.png" in line for name in ("cat/1", "cat/2", "dog/3"))


def test_each_epoch_tells_its_own_corrupt_images(tree, capfd):
    spoil(tree, *(f"train/cat/{i}.png" for i in range(5)))
    data = folder(tree, skip_corrupt=True, batch_size=12)
    for _ in range(2):
        epoch(data)
        (line,) = capfd.readouterr().err.splitlines()
        assert "5 images could not be read" in line
        assert line.endswith("and 2 more")
    save_pictures(tree, *(f"train/cat/{i}.png" for i in range(4)))
    epoch(data)
    assert "1 image could not be read" in capfd.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_in_evaluation_a_corrupt_image_is_left_out(tree, capfd, split):
    before = list(folder(tree, batch_size=3).eval_dataloader(split))
    spoil(tree, f"{split}/cat/1.png")
    after = list(folder(tree, batch_size=3, skip_corrupt=True).eval_dataloader(split))
    kept = [i for i in range(sum(COUNTS[split].values())) if i != 1]
    for place in (0, 1):
        assert torch.equal(torch.cat([b[place] for b in after]), torch.cat([b[place] for b in before])[kept])
    assert f"1 image could not be read and was skipped: {tree}/{split}/cat/1.png" in capfd.readouterr().err


def test_a_corrupt_test_image_ends_a_test_whatever_was_asked(tree):
    spoil(tree, "test/cat/1.png")
    with pytest.raises(UserError, match=r"test/cat/1\.png cannot be read as an image"):
        list(folder(tree, skip_corrupt=True).test_dataloader())


def test_a_batch_without_a_readable_image_is_left_out_of_evaluation_and_a_run_without_any_ends(tree, capfd):
    spoil(tree, "val/cat/0.png", "val/cat/1.png")
    (batch,) = folder(tree, skip_corrupt=True, batch_size=2).val_dataloader()
    assert batch[1].tolist() == [1, 1]
    assert "2 images could not be read" in capfd.readouterr().err
    spoil(tree, "val/dog/0.png", "val/dog/1.png")
    with pytest.raises(UserError, match=r"no image of a whole pass can be read, the first is .*val/cat/0\.png"):
        list(folder(tree, skip_corrupt=True, batch_size=3).val_dataloader())
    spoil(tree, *(f"train/{name}/{i}.png" for name, count in COUNTS["train"].items() for i in range(count)))
    with pytest.raises(UserError, match=r"no image of a batch of 5 can be read, the first is .*train/"):
        list(folder(tree, skip_corrupt=True).train_dataloader())


def test_loader_processes_stay_from_epoch_to_epoch(tree):
    data = folder(tree, num_workers=2)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        processes = []
        for _ in range(2):
            list(loader)
            processes.append({process.pid for process in multiprocessing.active_children()})
        assert processes[0] == processes[1] != set()


def test_memory_is_pinned_where_there_is_a_gpu(tree, monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert folder(tree).train_dataloader().pin_memory == folder(tree).test_dataloader().pin_memory == there


def fit(data, **options):
    model = Classifier(2, "test_resnet", head=LinearHead, loss=CrossEntropyLoss)
    new_trainer(**{"max_epochs": 2, "num_sanity_val_steps": 0, **options}).fit(model, datamodule=data)


def told(capfd, tree):
    """Folders of the images that were said to be skipped, line by line."""
    lines = [line for line in capfd.readouterr().err.splitlines() if "could not be read" in line]
    return [line.rpartition("/")[0].rpartition(str(tree))[2] for line in lines]


def test_a_run_that_stops_within_an_epoch_tells_what_it_skipped_and_validation_what_it_did_not_show(tree, capfd):
    spoil(tree, *(f"train/cat/{i}.png" for i in range(7)), "val/cat/0.png")
    fit(folder(tree, image_size=32, skip_corrupt=True, batch_size=6), max_steps=1)
    assert told(capfd, tree) == ["/train/cat"]
    fit(folder(tree, image_size=32, skip_corrupt=True, batch_size=6), limit_train_batches=1, limit_val_batches=1)
    assert sorted(told(capfd, tree)) == ["/train/cat"] * 2 + ["/val/cat"] * 2


# --- memory -----------------------------------------------------------------------------------------------------------------


def test_paths_come_back_as_they_were_given():
    names = ["a/one.jpg", "b/two words.jpg", "top.jpg", "b/ä.jpg", os.fsdecode(b"a/\xff.jpg")]
    paths = pickle.loads(pickle.dumps(Paths("root", names)))
    kinds = [type(value) for value in vars(paths).values()]
    assert kinds == [str, torch.Tensor, torch.Tensor]  # no object per path, of which each process would make a copy
    assert [paths.relative(i) for i in range(len(paths))] == paths.all_relative() == names
    assert paths[2] == os.path.join("root", "top.jpg")


def test_missing_files_are_those_that_do_not_exist(tmp_path):
    names = [f"{folder}/{i}.jpg" for folder in ("a", "gone") for i in range(20)] + ["top.jpg", "none.jpg"]
    (tmp_path / "a").mkdir()
    for name in ("a/3.jpg", "a/7.jpg", "top.jpg"):
        (tmp_path / name).touch()
    there = {3, 7, 40}
    assert Paths(str(tmp_path), names).missing() == [i for i in range(42) if i not in there]


def test_files_below_a_folder_are_sorted_part_by_part(tmp_path):
    for name in ("b.png", "a/z.PNG", "a-1.png", "a/.hidden.png", "a/.originals/z.png", "notes.txt", "a/b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert files_below(str(tmp_path), {".png", ".jpg"}) == ["a/b/c.jpg", "a/z.PNG", "a-1.png", "b.png"]
    assert files_below(str(tmp_path / "none"), {".png"}) == []
