"""What goes wrong in front of a user: one clear line, the right exit status, no traceback, nothing half-written."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from etflight import Classifier
from tests.cli.test_stages import QUICK

CONFIGS = Path(__file__).parents[2] / "configs"
FIT = ["fit", *QUICK, "--model.backbone", "resnet20_cifar"]
MARKER = "HOSTILE CODE RAN"
NO_LOGGER = """
from lightning.pytorch.loggers import CSVLogger

class NoLogger(CSVLogger):
    def __init__(self):
        raise ModuleNotFoundError("No module named 'no_such_package'")
"""


class Bomb:
    def __reduce__(self):
        return (exec, (f"open('pwned', 'w').write('{MARKER}')",))


def arrays(path, *, train=40, classes=4, **changes):
    generator = np.random.default_rng(0)
    content = {}
    for split, size in (("train", train), ("test", 16)):
        content[f"{split}_images"] = generator.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(size) % classes
    content |= changes
    np.savez(path, **{k: v for k, v in content.items() if v is not None})
    return ["--data", "ArrayImages", "--data.path", path.name]


def folder(root, sizes):
    for split in ("train", "test"):
        for name, size in sizes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(size):
                Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(root / split / name / f"{i}.png")
    return ["--data", "FolderImages", "--data.root", root.name, "--data.image_size", 8]


def corrupt_folder(tmp_path, workers):
    flags = folder(tmp_path / "images", {"cat": 4, "dog": 4})
    (tmp_path / "images/train/dog/2.png").write_bytes(b"no image")
    return [*flags, "--data.num_workers", workers, "--data.batch_size", 4]


def checkpoint(tmp_path, hyper_parameters=None, **more):
    content = {"state_dict": {}, "hyper_parameters": hyper_parameters or {"num_classes": 10}, "global_step": 0, **more}
    torch.save(content, tmp_path / "c.ckpt")
    return ["test", "--data", "Digits", "--ckpt_path", "c.ckpt", *QUICK[2:]]


def truncated(tmp_path):
    argv = checkpoint(tmp_path)
    whole = (tmp_path / "c.ckpt").read_bytes()
    (tmp_path / "c.ckpt").write_bytes(whole[: len(whole) // 2])
    return argv


def hostile_class_path(tmp_path):
    (tmp_path / "evil.py").write_text(f"open('pwned', 'w').write('{MARKER}')\ndef fn(*a, **k): pass\n")
    spec = {"class_path": "evil.fn", "init_args": {}}
    model = {"num_classes": 10, "backbone": "resnet20_cifar", "head": spec, "_instantiator": "evil.fn"}
    return checkpoint(tmp_path, model)


def untrained(tmp_path, num_classes, **more):
    model = Classifier(num_classes, "resnet20_cifar", in_chans=1)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), **more}
    torch.save(content, tmp_path / "c.ckpt")
    return ["test", "--data", "Digits", "--ckpt_path", "c.ckpt", *QUICK[2:]]


TWICE = """
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import LRScheduler

class Idle(Callback):
    pass

class WarmupCosine(LRScheduler):
    pass
"""
# name: (exit status, what the line must say, what is run)
CASES = {
    "more classes than an ETF has room for": (
        1, ["K = 70", "d = 64", "projection_dim", "sphere"], lambda t: [*FIT, *arrays(t / "a.npz", train=140, classes=70)]),
    "fewer than two classes": (
        1, ["two classes"], lambda t: [*FIT, *arrays(t / "a.npz", classes=1)]),
    "a negative label": (
        1, ["label -1", "a.npz"], lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.arange(40) % 4 - 1)]),
    "a label beyond the named classes": (
        1, ["label 4"], lambda t: [*FIT, *arrays(t / "a.npz", classes=5, class_names=np.array(list("abcd")))]),
    "labels beyond the integers": (
        1, ["a.npz", "train_labels", str(2**63)], lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.full(40, 2**63, np.uint64))]),
    "a test label beyond the training classes": (
        1, ["label 4", "test image 4", "0 … 3"], lambda t: [*FIT, *arrays(t / "a.npz", test_labels=np.arange(16))]),
    "class names that are no list": (
        1, ["a.npz", "class_names", "[2, 2]"], lambda t: [*FIT, *arrays(t / "a.npz", class_names=np.array([["a", "b"], ["c", "d"]]))]),
    "no training image": (1, ["a.npz", "train_labels"], lambda t: [*FIT, *arrays(t / "a.npz", train=0)]),
    "no test image": (
        1, ["a.npz", "test holds no image"],
        lambda t: [*FIT, *arrays(t / "a.npz", test_images=np.zeros((0, 8, 8), np.uint8), test_labels=np.zeros(0, int))]),
    "images without pixels": (
        1, ["a.npz", "train_images", "[40, 8, 0]"], lambda t: [*FIT, *arrays(t / "a.npz", train_images=np.zeros((40, 8, 0), np.uint8))]),
    "channels before rows": (
        1, ["a.npz", "[40, 3, 8, 8]", "[N, H, W, C]"],
        lambda t: [*FIT, *arrays(t / "a.npz", train_images=np.zeros((40, 3, 8, 8), np.uint8))]),
    "test images in colour, training images grey": (
        1, ["test_images", "[16, 8, 8, 3]", "1 channels"],
        lambda t: [*FIT, *arrays(t / "a.npz", test_images=np.zeros((16, 8, 8, 3), np.uint8))]),
    "class-balanced sampling of a class without images": (
        1, ["a.npz", "class 3 (d)", "no training image"],
        lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.arange(40) % 3, class_names=np.array(list("abcd"))),
                   "--data.sampler", "balanced"]),
    "LDAM with a class without images": (
        1, ["a.npz", "class 1", "no training image"],
        lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.arange(40) // 20 * 2), "--model.loss", "LDAMLoss",
                   "--model.head", "CosineHead", "--model.head.cosine_scale", 30]),
    "validation images that leave a class without any": (
        1, ["class 0", "val_fraction 0.5"], lambda t: [*FIT, *arrays(t / "a.npz", train=4), "--data.val_fraction", 0.5]),
    "an unknown sampling policy": (
        1, ["balnced", "did you mean balanced"], lambda t: [*FIT, "--data", "Digits", "--data.sampler", "balnced"]),
    "progressive sampling without an end": (
        1, ["progressive", "set trainer.max_epochs"],
        lambda t: [*FIT, "--data", "Digits", "--data.sampler", "progressive", "--trainer.max_epochs", -1, "--trainer.max_steps", 2]),
    "explicit counts for other classes": (
        1, ["3 counts for 10 classes"], lambda t: [*FIT, "--data", "Digits", "--data.profile", "[5, 5, 5]"]),
    "an explicit count of none": (
        1, ["class 9", "0 images", "profile"], lambda t: [*FIT, "--data", "Digits", "--data.profile", "[5, 5, 5, 5, 5, 5, 5, 5, 5, 0]"]),
    "an unknown loss": (2, ["LDAM", "LDAMLoss"], lambda t: [*FIT, "--data", "Digits", "--model.loss", "LDAM"]),
    "LDAM with a head that gives no cosines": (
        1, ["LDAMLoss", "LinearHead", "CosineHead"],
        lambda t: [*FIT, "--data", "Digits", "--model.loss", "LDAMLoss", "--model.head", "LinearHead"]),
    "a class with fewer images than asked": (
        1, ["has 10", "12"], lambda t: [*FIT, *arrays(t / "a.npz"), "--data.max_count", 12]),
    "a class left without any": (
        1, ["class 2", "0 images", "imbalance_ratio"], lambda t: [*FIT, *arrays(t / "a.npz"), "--data.imbalance_ratio", 100]),
    "a missing data folder": (
        1, ["nowhere"], lambda t: [*FIT, "--data", "FolderImages", "--data.root", "nowhere"]),
    "an empty data folder": (
        1, ["train"], lambda t: [*FIT, *folder(t / "images", {})]),
    "a missing npz": (
        1, ["gone.npz"], lambda t: [*FIT, "--data", "ArrayImages", "--data.path", "gone.npz"]),
    "an npz without the arrays": (
        1, ["train_images"], lambda t: [*FIT, *arrays(t / "a.npz", train_images=None)]),
    "an npz of mismatched lengths": (
        1, ["39", "40"], lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.arange(39) % 4)]),
    "an npz with pickled objects": (
        1, ["pickle"], lambda t: [*FIT, *arrays(t / "a.npz", train_labels=np.array([Bomb()] * 40))]),
    "a corrupt image": (1, ["images/train/dog/2.png"], lambda t: [*FIT, *corrupt_folder(t, 0)]),
    "a corrupt image in a data worker": (1, ["images/train/dog/2.png"], lambda t: [*FIT, *corrupt_folder(t, 1)]),
    "an unknown backbone": (
        1, ["resnet32_cifr", "resnet32_cifar"], lambda t: [*FIT, "--data", "Digits", "--model.backbone", "resnet32_cifr"]),
    "a logger whose package is not installed": (
        1, ["NoLogger cannot be made: No module named 'no_such_package'"],
        lambda t: (t / "loggers.py").write_text(NO_LOGGER)
        and [*FIT, "--data", "Digits", "--trainer.logger", "loggers.NoLogger"]),
    "images smaller than a vision transformer's": (
        1, ["vit_tiny_patch16_224 does not take images of 1 x 8 x 8", "--model.model_kwargs '{img_size: 8, patch_size: 2}'"],
        lambda t: [*FIT, "--data", "Digits", "--model.backbone", "vit_tiny_patch16_224"]),
    "images that nothing makes a network take": (
        1, ["test_convnext does not take images of 1 x 8 x 8", "give larger ones"],
        lambda t: [*FIT, "--data", "Digits", "--model.backbone", "test_convnext"]),
    "a negative seed": (
        1, ["--seed_everything is -5: give a whole number from 0 to 4294967295"],
        lambda t: [*FIT, "--data", "Digits", "--seed_everything", -5]),
    "a seed beyond 32 bits": (1, ["--seed_everything is 4294967296"], lambda t: [*FIT, "--data", "Digits", "--seed_everything", 2**32]),
    "a seed that is no number": (
        2, ["--seed_everything: Expected a bool or an int, got abc ("], lambda t: [*FIT, "--data", "Digits", "--seed_everything", "abc"]),
    "no seed": (2, ["--seed_everything: Expected a bool or an int, got null ("],
                lambda t: [*FIT, "--data", "Digits", "--seed_everything", "null"]),
    "an unknown head": (2, ["EFTHead", "ETFHead"], lambda t: [*FIT, "--data", "Digits", "--model.head", "EFTHead"]),
    "an unknown data set": (2, ["CIFAR-10", "CIFAR10"], lambda t: [*FIT, "--data", "CIFAR-10"]),
    "a learning rate that is no number": (
        2, ["--model.optimizer.lr: Expected a float, got fast"], lambda t: [*FIT, "--data", "Digits", "--model.optimizer.lr", "fast"]),
    "a schedule that has to be told what it follows": (
        2, ["--model.lr_scheduler.monitor"],
        lambda t: [*FIT, "--data", "Digits", "--model.lr_scheduler", "ReduceLROnPlateau"]),
    "a name that two classes have": (
        2, ["--model.lr_scheduler", "etflight.optim.WarmupCosine, mine.WarmupCosine"],
        lambda t: (t / "mine.py").write_text(TWICE)
        and [*FIT, "--data", "Digits", "--trainer.callbacks+", "mine.Idle", "--model.lr_scheduler", "WarmupCosine"]),
    "no words at all": (2, ["the command comes first: give one of these"], lambda t: []),
    "a command that does not exist": (2, ["no command 'tset'", "did you mean test"], lambda t: ["tset", "-c", "c.yaml"]),
    "an option before the command": (2, ["the command comes first, before -c"], lambda t: ["-c", "c.yaml", "fit"]),
    "an unknown flag": (2, ["--bogus"], lambda t: [*FIT, "--data", "Digits", "--bogus", 1]),
    "a missing checkpoint": (1, ["gone.ckpt"], lambda t: ["test", "--data", "Digits", "--ckpt_path", "gone.ckpt"]),
    "no checkpoint at all": (1, ["--ckpt_path"], lambda t: ["test", "--data", "Digits"]),
    "no last checkpoint": (1, ["last.ckpt"], lambda t: ["test", "--data", "Digits", "--ckpt_path", "last"]),
    "a truncated checkpoint": (1, ["c.ckpt", "truncated"], truncated),
    "a checkpoint of another number of classes": (1, ["7 classes", "10"], lambda t: untrained(t, 7)),
    "a checkpoint that runs code": (1, ["c.ckpt", "refused"], lambda t: checkpoint(t, bomb=Bomb())),
    "a checkpoint that names a hostile class": (1, ["evil.fn"], hostile_class_path),
    "a checkpoint of another program": (
        1, ["c.ckpt", "no backbone"], lambda t: checkpoint(t, {"num_classes": 10, "hidden_size": 3})),
    "a file that is no checkpoint": (
        1, ["c.ckpt"], lambda t: (t / "c.ckpt").write_text("hello") and ["test", "--data", "Digits", "--ckpt_path", "c.ckpt"]),
    "an imbalance ratio below one": (1, ["imbalance_ratio", "0.5"], lambda t: [*FIT, "--data", "Digits", "--data.imbalance_ratio", 0.5]),
    "a loss that becomes infinite": (
        1, ["NaN or infinite at step", "epoch 0"],
        lambda t: [*FIT, "--data", "Digits", "--model.loss", "CrossEntropyLoss", "--model.head", "LinearHead",
                   "--model.optimizer.lr", "1e30"]),
    "dot regression with a head it cannot train": (
        1, ["DotRegressionLoss", "LinearHead"], lambda t: [*FIT, "--data", "Digits", "--model.head", "LinearHead"]),
    "a configuration file that does not exist": (
        1, ["no configuration file gone.yaml", f"own are in {CONFIGS}"], lambda t: ["fit", "-c", "gone.yaml"]),
    "a configuration file of another ending": (
        1, ["no configuration file configs/arms/etf_dr.yml: near matches: ", f"{CONFIGS}/arms/etf_dr.yaml"],
        lambda t: ["fit", "--config=configs/arms/etf_dr.yml"]),
    "a configuration file from another folder": (
        1, [f"near matches: {CONFIGS}/arms/etf_dr_sqrt_balanced.yaml"], lambda t: ["describe", "-c", "etf_dr_sqrt_balanced.yaml"]),
    "a configuration file beside the one that is there": (
        1, ["near matches: mine.yaml"], lambda t: (t / "mine.yaml").write_text("{}") and ["fit", "-c", "mine.yml"]),
    "a folder in the place of a configuration file": (
        1, ["arms is a folder"], lambda t: ["fit", "-c", CONFIGS / "arms"]),
    "a study that does not exist": (
        1, [f"near matches: {CONFIGS}/studies/digits.yaml"], lambda t: ["study", "configs/studies/digit.yaml"]),
    "a checkpoint that no trainer has saved": (1, ["c.ckpt", "pytorch-lightning_version"], lambda t: untrained(t, 10)),
    "a wrong flag of a command": (2, ["--dry_run", "study --help"], lambda t: ["study", "s.yaml", "--dry_run"]),
    "a report of a folder that is no run": (1, ["nowhere"], lambda t: ["report", "nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case, etflight_command, tmp_path):
    status, words, prepare = CASES[case]
    argv = prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = etflight_command(*argv, cwd=tmp_path)
    assert result.status == status, result.err
    assert "Traceback" not in result.err + result.out
    assert len(result.error_lines) == 1, result.err
    for word in words:
        assert word in result.error_lines[0]
    assert not (tmp_path / "pwned").exists()
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert not [p for p in new if p.suffix in (".ckpt", ".partial")]


@pytest.mark.parametrize(
    ("names", "told"), [("abXd", "class 2 is 'c' in the checkpoint, but 'X' in"), ("abcd", ""), ("0123", "")]
)
def test_classes_of_other_names_are_told_in_one_line_and_tested(names, told, etflight_command, tmp_path):
    """Numbers are what a set gives that knows no names."""
    untrained(tmp_path, 4, class_names=list("abcd"), **{"pytorch-lightning_version": "2.6.6"})
    flags = arrays(tmp_path / "a.npz", class_names=np.array(list(names)))
    result = etflight_command("test", *flags, "--ckpt_path", "c.ckpt", "--name", "t", *QUICK[2:], cwd=tmp_path)
    assert result.status == 0, result.err
    lines = [line for line in result.err.splitlines() if "in the checkpoint" in line]
    assert [line.startswith("etflight: warning: ") and told in line for line in lines] == [True] * bool(told)
    with (tmp_path / "runs/t/per_class.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == list("abcd")


@pytest.mark.parametrize("asked", ["true", "false"])
def test_a_seed_of_the_environment_that_is_none_is_told(asked, etflight_command, tmp_path):
    result = etflight_command(*FIT, "--data", "Digits", "--seed_everything", asked, cwd=tmp_path, PL_GLOBAL_SEED="abc")
    assert result.status == 1
    assert result.error_lines == ["etflight: error: PL_GLOBAL_SEED is abc: give a whole number from 0 to 4294967295"]


def test_debug_shows_the_traceback(etflight_command, tmp_path):
    result = etflight_command("test", "--data", "Digits", "--ckpt_path", "gone.ckpt", cwd=tmp_path, ETFLIGHT_DEBUG="1")
    assert result.status != 0
    assert "Traceback" in result.err
