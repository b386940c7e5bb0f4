"""What goes wrong in front of a user: one clear line, the right exit status, no traceback, nothing half-written."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import etflight.cli
from etflight import Classifier
from tests.training import QUICK, QUIET, read_csv, save_arrays

CONFIGS = Path(__file__).parents[2] / "configs"
FIT = ["fit", *QUICK, "--model.backbone", "resnet20_cifar"]
NO_LOGGER = """
from lightning.pytorch.loggers import CSVLogger

class NoLogger(CSVLogger):
    def __init__(self):
        raise ModuleNotFoundError("No module named 'no_such_package'")
"""


def arrays(path, train=40, classes=4, **more):
    save_arrays(path, train=train, classes=classes, **more)
    return ["--data", "ArrayImages", "--data.path", path.name]


def untrained(tmp_path, num_classes, **more):
    model = Classifier(num_classes, "resnet20_cifar", in_chans=1)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), **more}
    torch.save(content, tmp_path / "c.ckpt")
    return ["test", "--data", "Digits", "--ckpt_path", "c.ckpt", *QUIET]


TWICE = """
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import LRScheduler

class Idle(Callback):
    pass

class WarmupCosine(LRScheduler):
    pass
"""
DIGITS = [*FIT, "--data", "Digits"]
# name: (exit status, what the line must say, what is run)
CASES = {
    "more classes than an ETF has room for": (
        1, ["K = 70", "d = 64", "projection_dim", "sphere"], lambda t: [*FIT, *arrays(t / "a.npz", train=140, classes=70)]),
    "a logger whose package is not installed": (
        1, ["NoLogger", "No module named 'no_such_package'"],
        lambda t: (t / "loggers.py").write_text(NO_LOGGER) and [*DIGITS, "--trainer.logger", "loggers.NoLogger"]),
    "images smaller than a vision transformer's": (
        1, ["vit_tiny_patch16_224 does not take images of 1 x 8 x 8", "--model.model_kwargs '{img_size: 8, patch_size: 2}'"],
        lambda t: [*DIGITS, "--model.backbone", "vit_tiny_patch16_224"]),
    "images that nothing makes a network take": (
        1, ["test_convnext does not take images of 1 x 8 x 8", "give larger ones"],
        lambda t: [*DIGITS, "--model.backbone", "test_convnext"]),
    "a seed beyond 32 bits": (1, ["--seed_everything is 4294967296"], lambda t: [*DIGITS, "--seed_everything", 2**32]),
    "a negative seed": (1, ["--seed_everything is -5: give a whole number from 0 to"], lambda t: [*DIGITS, "--seed_everything", -5]),
    "a name that two classes have": (
        2, ["--model.lr_scheduler", "etflight.optim.WarmupCosine", "mine.WarmupCosine"],
        lambda t: (t / "mine.py").write_text(TWICE)
        and [*DIGITS, "--trainer.callbacks+", "mine.Idle", "--model.lr_scheduler", "WarmupCosine"]),
    "a loss that becomes infinite": (
        1, ["NaN or infinite at step", "epoch 0"],
        lambda t: [*DIGITS, "--model.loss", "CrossEntropyLoss", "--model.head", "LinearHead", "--model.optimizer.lr", "1e30"]),
    "no words at all": (2, ["the command comes first: give one of these"], lambda t: []),
    "a command that does not exist": (2, ["no command 'tset'"], lambda t: ["tset", "-c", "c.yaml"]),
    "an option before the command": (2, ["the command comes first"], lambda t: ["-c", "c.yaml", "fit"]),
    "no checkpoint at all": (1, ["test needs a trained model: give --ckpt_path"], lambda t: ["test", "--data", "Digits"]),
    "no last checkpoint": (1, ["there is no runs/digits/checkpoints/last.ckpt"],
                           lambda t: ["test", "--data", "Digits", "--ckpt_path", "last"]),
    "a checkpoint of another number of classes": (1, ["7 classes", "10"], lambda t: untrained(t, 7)),
    "a checkpoint that no trainer has saved": (1, ["c.ckpt", "pytorch-lightning_version"], lambda t: untrained(t, 10)),
    "a configuration file that does not exist": (
        1, ["no configuration file gone.yaml; etflight configs lists those"], lambda t: ["fit", "-c", "gone.yaml"]),
    "a configuration file of another ending": (
        1, ["no configuration file configs/arms/etf_dr.yml: near matches: ", "arms/etf_dr.yaml"],
        lambda t: ["fit", "--config=configs/arms/etf_dr.yml"]),
    "a logger into the run's own table": (
        1, ["CSVLogger would write into the run's own metrics.csv: give --trainer.logger.name or leave it out"],
        lambda t: [*DIGITS, "--trainer.logger", "CSVLogger", "--trainer.logger.name", "", "--trainer.logger.version", ""]),
    "files of others in the place of a description": (
        1, ["contact_sheet.png has no describe.json beside it, so it is not of this command and stays as it is: give another --output"],
        lambda t: (t / "out").mkdir() or ((t / "out/contact_sheet.png").write_text("mine")
        and ["describe", "--data", "Digits", "--output", t / "out"])),
    "a configuration file that says nothing": (
        1, ["c.yaml is empty: give it options, or leave it out"],
        lambda t: (t / "c.yaml").write_text("# later") and ["fit", "-c", "c.yaml"]),
    "a configuration file with a section twice": (
        1, ["c.yaml cannot be read", "it gives 'model' twice"],
        lambda t: (t / "c.yaml").write_text("model: {head: LinearHead}\nmodel: {loss: FocalLoss}") and ["fit", "-c", "c.yaml"]),
    "a section that a file makes null": (
        1, ["c.yaml: fine_tuning is null"],
        lambda t: (t / "c.yaml").write_text("fine_tuning: null") and [*DIGITS, "-c", "c.yaml"]),
    "a folder in the place of a configuration file": (1, ["arms is a folder"], lambda t: ["fit", "-c", CONFIGS / "arms"]),
    "a wrong flag of a command": (2, ["--dry_run", "study --help"], lambda t: ["study", "s.yaml", "--dry_run"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_clear_line(case, etflight_command, tmp_path):
    status, words, prepare = CASES[case]
    argv = prepare(tmp_path)
    before = set(tmp_path.rglob("*"))
    result = etflight_command(*argv, cwd=tmp_path)
    assert result.status == status, result.err
    assert "Traceback" not in result.err + result.out
    assert len(result.error_lines) == 1, result.err
    for word in words:
        assert word in result.error_lines[0]
    new = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    assert not [p for p in new if p.suffix in (".ckpt", ".partial")]


@pytest.mark.parametrize(("names", "told"), [("abXd", "class 2 is 'c' in the checkpoint, but 'X' in"), ("0123", "")])
def test_classes_of_other_names_are_told_in_one_line_and_tested(names, told, etflight_command, tmp_path):
    """Numbers are what a set gives that knows no names."""
    untrained(tmp_path, 4, class_names=list("abcd"), **{"pytorch-lightning_version": "2.6.6"})
    flags = arrays(tmp_path / "a.npz", class_names=np.array(list(names)))
    result = etflight_command.succeed("test", *flags, "--ckpt_path", "c.ckpt", "--name", "t", *QUIET, cwd=tmp_path)
    lines = [line for line in result.err.splitlines() if "in the checkpoint" in line]
    assert [line.startswith("etflight: warning: ") and told in line for line in lines] == [True] * bool(told)
    assert [row["name"] for row in read_csv(tmp_path / "runs/t/per_class.csv")] == list("abcd")


def test_every_command_has_a_line_in_one_table(etflight_command, tmp_path):
    result = etflight_command("-h", cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line.startswith("  "))
    modules = [path.stem for path in Path(etflight.cli.__file__).parent.glob("[a-z]*.py")]
    commands = {name for name in modules if hasattr(import_module(f"etflight.cli.{name}"), "main")} - {"stages"}
    assert rows.keys() == {"fit", "validate", "test", "predict"} | commands
    assert all(what.endswith(".") for what in rows.values())


def test_debug_shows_the_traceback(etflight_command, tmp_path):
    result = etflight_command("test", "--data", "Digits", "--ckpt_path", "gone.ckpt", cwd=tmp_path, ETFLIGHT_DEBUG="1")
    assert result.status != 0
    assert "Traceback" in result.err
