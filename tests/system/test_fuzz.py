"""Whatever the arguments of data, head, loss, optimizer and schedule: a step runs, or one clear line says why not."""

import inspect
import math
import shlex
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from etflight import heads, losses, optim
from etflight.data import ArrayImages, Digits, FolderImages
from etflight.data.sampler import POLICIES
from tests.training import QUIET, read_csv, save_arrays, save_folders

FIT = ["fit", *QUIET, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
PARTS = {
    "model.head": [heads.ETFHead, heads.LinearHead, heads.CosineHead],
    "model.loss": [
        losses.CrossEntropyLoss, losses.DotRegressionLoss, losses.FocalLoss, losses.LDAMLoss, losses.LogitAdjustedLoss,
        losses.LabelAwareSmoothingLoss, losses.NTCELoss, losses.NONLLoss, losses.BinaryCrossEntropyLoss,
    ],
    "model.optimizer": [SGD, AdamW],
    "model.lr_scheduler": [optim.WarmupMultiStep, optim.WarmupCosine, StepLR, ReduceLROnPlateau],
}  # fmt: skip
DATA = [  # the class, its files, and its numbers of classes and channels
    (Digits, [], 10, 1),
    (ArrayImages, ["--data.path=../colour.npz"], 4, 3),
    (FolderImages, ["--data.root=../folder", "--data.image_size=8"], 2, 3),
]
# arguments that nobody gives on the command line, or that are given above
LEFT_OUT = {
    "in_features", "num_classes", "params", "optimizer", "last_epoch", "root", "path", "num_workers", "differentiable",
    "capturable", "fused", "maximize",
}  # fmt: skip
RANGES = {  # of numbers that are not from 0 to 1
    "projection_dim": (9, 80), "seed": (0, 2**32 - 1), "exponent": (0, 2), "gamma": (0.01, 1), "tau": (0, 2), "temperature": (0.01, 2),
    **dict.fromkeys(("scale", "length"), (0.1, 30)), "head_smoothing": (0.2, 0.9), "tail_smoothing": (0, 0.2),
    "lr": (0, 0.1), "eps": (1e-9, 1e-3), "milestones": (6, 200), "warmup_epochs": (0, 10), "total_epochs": (1, 200),
    "step_size": (1, 30), "patience": (0, 5), "cooldown": (0, 5), "min_lr": (0, 0.01), "factor": (0.1, 0.9),
    "imbalance_ratio": (1, 5), "profile": (1, 5), "max_count": (1, 5), "sampler": (-3, 3), "val_fraction": (0, 0.4),
    "batch_size": (1, 16), "eval_batch_size": (1, 16), "crop_padding": (0, 4), "std": (0.01, 1), "image_size": (1, 16),
    "min_crop_scale": (0.01, 1), "crop_pct": (0.1, 1),
}  # fmt: skip
ANYTHING = ["0", "0.5", "nan", "inf", "null", "true", "''", "x", "[]", "[[1]]", "{}"]
REALS = ["0", "-1", "1.5", "1e-300", "1e300", "1e39", ".nan", ".inf", "-.inf"]
WHOLES = ["0", "-1", "1", "1" + "0" * 30, str(2**63), str(2**32)]


class Argument(NamedTuple):
    """Values that an argument can have, and of its own type values that most cannot."""

    valid: st.SearchStrategy[str]
    nasty: list[str]

    def __or__(self, other):
        return Argument(self.valid | other.valid, self.nasty + other.nasty)


def argument(name, annotation, length):
    """An argument of a type, or None where the type is none of those that are tried."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [found for part in get_args(annotation) if (found := argument(name, part, length))]
        return None if not kinds else kinds[0] if len(kinds) == 1 else kinds[0] | kinds[1]
    low, high = RANGES.get(name, (0, 1))
    if get_origin(annotation) is Literal or annotation in (bool, str):
        choices = {bool: ("true", "false"), str: POLICIES}.get(annotation) or get_args(annotation)
        return Argument(st.sampled_from(sorted(choices)), ["x", "''", "null"])
    if annotation is int:
        return Argument(st.integers(low, high).map(str), WHOLES)
    if annotation is float:
        return Argument(st.floats(low, high, allow_subnormal=False).map(lambda x: f"{x:.6g}"), REALS)
    if get_origin(annotation) in (list, tuple, Sequence):
        element = argument(name, get_args(annotation)[0], length)
        valid = st.lists(element.valid, min_size=length, max_size=length).map(lambda values: f"[{', '.join(values)}]")
        nasty = [f"[{', '.join([value] * times)}]" for value in element.nasty for times in (1, length, 7)]
        return Argument(valid, ["[]", *nasty])
    return None


def arguments(cls, prefix, **lengths):
    """By option, and the options that have to be given."""
    found, required = {}, set()
    for parameter in inspect.signature(cls, eval_str=True).parameters.values():
        made = argument(parameter.name, parameter.annotation, lengths.get(parameter.name, 2))
        if made and parameter.name not in LEFT_OUT:
            found[f"{prefix}.{parameter.name}"] = made
            required |= {f"{prefix}.{parameter.name}"} if parameter.default is parameter.empty else set()
    return found, required


def rarely():
    return st.sampled_from([False] * 7 + [True])


CLASSES = [("data", cls) for cls, *_ in DATA] + [(part, cls) for part, classes in PARTS.items() for cls in classes]
EVERY_OPTION = sorted({option for prefix, cls in CLASSES for option in arguments(cls, prefix)[0]})


@st.composite
def command_lines(draw):
    """Valid arguments, of parts that mostly go together, and of all arguments there are up to two with nasty values."""
    data, files, num_classes, channels = draw(st.sampled_from(DATA))
    epochs, backbone = draw(st.sampled_from("12")), draw(st.sampled_from(["resnet20_cifar", "test_resnet"]))
    argv = [*FIT, f"--trainer.max_epochs={epochs}", f"--model.backbone={backbone}", f"--data={data.__name__}", *files]
    options, required = arguments(data, "data", profile=num_classes, mean=channels, std=channels)
    chosen = {part: draw(st.sampled_from(classes)) for part, classes in PARTS.items()}
    # the loss's argument that equals the scale of the ETF head which the loss needs
    length = {losses.DotRegressionLoss: "length", losses.LDAMLoss: "scale"}.get(chosen["model.loss"])
    pulls = length is not None and not draw(rarely())
    if pulls:
        chosen["model.head"] = heads.ETFHead
    for part, cls in chosen.items():
        argv.append(f"--{part}={f'{cls.__module__}.{cls.__name__}' if cls is ReduceLROnPlateau else cls.__name__}")
        more, needed = arguments(cls, part)
        options, required = options | more, required | needed
    valid = {option: argument.valid for option, argument in options.items()}
    # of many options only a few at a time, so that most command lines train
    optional = draw(st.lists(st.sampled_from(sorted(valid.keys() - required)), max_size=6, unique=True))
    values = {option: draw(valid[option]) for option in [*sorted(required), *optional]}
    if pulls:
        values |= {"model.head.normalize": "true", "model.head.learn_scale": "false"}
        values["model.head.scale"] = values.setdefault(f"model.loss.{length}", "1")
    if values.get("data.profile", "").startswith("[") and not draw(rarely()):
        values = {key: value for key, value in values.items() if key not in ("data.imbalance_ratio", "data.max_count")}
    for key in draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True)):
        values[key] = draw(st.sampled_from(ANYTHING if draw(rarely()) else options[key].nasty))
    if draw(rarely()):  # an argument of any class, chosen or not
        values[draw(st.sampled_from(EVERY_OPTION))] = draw(st.sampled_from(ANYTHING))
    return [*argv, *(f"--{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The folder of the image files that `DATA` names."""
    folder = tmp_path_factory.mktemp("images")
    val = {"val_images": np.zeros((8, 9, 7, 3), np.uint8), "val_labels": np.arange(8) % 4}
    save_arrays(folder / "colour.npz", train=48, test=8, shape=(9, 7, 3), classes=4, **val)
    save_folders(folder / "folder", (12, 10), train={"cat": 8, "dog": 8}, test={"cat": 2, "dog": 2})
    return folder


def outcome(result, cwd):
    """ "ran" or "refused"; anything else is an AssertionError."""
    output = result.out + result.err
    assert "Traceback" not in output
    left = {path.relative_to(cwd) for path in cwd.rglob("*") if path.is_file()}
    if result.status == 0:
        assert not result.error_lines
        (metrics,) = cwd.rglob("metrics.csv")
        losses = [float(row["train/loss"]) for row in read_csv(metrics) if row["train/loss"]]
        assert losses
        assert all(map(math.isfinite, losses))
        return "ran"
    assert result.status in (1, 2)
    (line,) = result.error_lines
    assert "ETFLIGHT_DEBUG" not in line, "an exception that nobody wrote for people"
    assert len(line) < 600
    # the monitor measures, and keeps what a film needs, before the first step, which may be what fails; so may the checkpoint at the end
    # of an epoch, after which the epoch's speed and measures stand in their files
    of_epochs = {"speed.csv", *(f"epoch_{epoch:03}.npz" for epoch in range(3))}
    allowed = {".lock", "config.yaml", "run.json", "metrics.csv", *of_epochs} if result.status == 1 else set()
    assert {path.name for path in left if path.suffix != ".ckpt"} <= allowed
    return "refused"


def explore(etflight_command, images, **how):
    """Run random command lines and count how they ended."""
    outcomes = Counter()

    @settings(database=None, suppress_health_check=list(HealthCheck), print_blob=True, **how)
    @given(command_lines())
    def a_step_runs_or_one_clear_line(argv):
        with tempfile.TemporaryDirectory(dir=images) as folder:
            result = etflight_command(*argv, cwd=Path(folder))
            try:
                outcomes[outcome(result, Path(folder))] += 1
            except AssertionError as error:
                error.add_note(f"{shlex.join(['etflight', *argv])}\n{result.err}")
                raise

    a_step_runs_or_one_clear_line()
    return outcomes


def test_a_step_runs_or_one_clear_line_says_why_not(etflight_command, images):
    outcomes = explore(etflight_command, images, max_examples=30, derandomize=True)
    assert min(outcomes["ran"], outcomes["refused"]) >= 6, outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_runs_or_one_clear_line_says_why_not_in_a_thousand_cases(etflight_command, images):
    outcomes = explore(etflight_command, images, max_examples=1000)
    print(f"\n{dict(outcomes)}")
    assert min(outcomes["ran"], outcomes["refused"]) >= 200, outcomes
