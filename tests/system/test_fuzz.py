"""Whatever the arguments of data, head, loss, optimizer and schedule: a step runs, or one clear line says why not."""

import csv
import math
import shlex
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from etflight.data.sampler import POLICIES

FIT = [
    "fit", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
]  # fmt: skip


class Argument(NamedTuple):
    """Values that an argument can have, and of its own type values that most cannot."""

    valid: st.SearchStrategy[str]
    nasty: list[str]

    def __or__(self, other):
        return Argument(self.valid | other.valid, self.nasty + other.nasty)


ANYTHING = ["0", "0.5", "nan", "inf", "null", "true", "''", "x", "[]", "[[1]]", "{}"]


def real(low, high):
    valid = st.floats(low, high, allow_subnormal=False).map(lambda x: f"{x:.6g}")
    return Argument(valid, ["0", "-1", "1.5", "1e-300", "1e300", "1e39", ".nan", ".inf", "-.inf"])


def whole(low, high):
    return Argument(st.integers(low, high).map(str), ["0", "-1", "1", "1" + "0" * 30, str(2**63), str(2**32)])


def several(element, low, high):
    valid = st.lists(element.valid, min_size=low, max_size=high).map(lambda values: f"[{', '.join(values)}]")
    nasty = [f"[{', '.join([value] * length)}]" for value in element.nasty for length in (1, high, 7)]
    return Argument(valid, ["[]", *nasty])


def names(*values):
    return Argument(st.sampled_from(values), ["x", "''", "null"])


def rarely():
    return st.sampled_from([False] * 7 + [True])


SWITCH = names("true", "false")
BALANCE = {
    "class_balance": names("none", "batch", "global", "effective"),
    "exponent": real(0, 2),
    "beta": real(0, 0.99999),
}

# Every argument of every class.
CLASSES = {
    "model.head": {
        "ETFHead": {
            "projection_dim": whole(9, 80), "code": names("simplex", "sphere"), "batch_norm": SWITCH,
            "normalize": SWITCH, "scale": real(0.1, 30), "learn_scale": SWITCH, "seed": whole(0, 2**40),
        },
        "LinearHead": {"use_bias": SWITCH, "feature_batch_norm": SWITCH, "feature_normalize": SWITCH, "frozen": SWITCH},
        "CosineHead": {"cosine_scale": real(0.1, 30), "feature_batch_norm": SWITCH},
    },
    "model.loss": {
        "CrossEntropyLoss": {"label_smoothing": real(0, 0.9), **BALANCE},
        "DotRegressionLoss": {"length": real(0.1, 30), **BALANCE},
        "FocalLoss": {"gamma": real(0, 5), **BALANCE},
        "LDAMLoss": {"max_margin": real(0, 1), "scale": real(0.1, 30), **BALANCE},
        "LogitAdjustedLoss": {"tau": real(0, 2), **BALANCE},
        "LabelAwareSmoothingLoss": {
            "head_smoothing": real(0.2, 0.9), "tail_smoothing": real(0, 0.2), "shape": names("concave", "linear", "convex"), **BALANCE,
        },
    },
    "model.optimizer": {
        "SGD": {
            "lr": real(0, 0.3), "momentum": real(0.1, 0.99), "weight_decay": real(0, 0.1), "dampening": real(0, 0),
            "nesterov": SWITCH, "maximize": SWITCH, "foreach": SWITCH,
        },
        "AdamW": {
            "lr": real(0, 0.01), "betas": several(real(0, 0.999), 2, 2), "eps": real(1e-9, 1e-3),
            "weight_decay": real(0, 0.1), "amsgrad": SWITCH,
        },
        "RMSprop": {
            "lr": real(0, 0.01), "alpha": real(0, 0.99), "eps": real(1e-9, 1e-3), "momentum": real(0, 0.9), "centered": SWITCH,
        },
    },
    "model.lr_scheduler": {
        "WarmupMultiStep": {"milestones": several(whole(6, 200), 0, 3), "gamma": real(0.01, 1), "warmup_epochs": whole(0, 5)},
        "WarmupCosine": {"total_epochs": whole(1, 200), "warmup_epochs": whole(0, 10)},
        "StepLR": {"step_size": whole(1, 30), "gamma": real(0.01, 1)},
        "CosineAnnealingLR": {"T_max": whole(1, 200), "eta_min": real(0, 0.01)},
        "OneCycleLR": {"max_lr": real(0.01, 1), "total_steps": whole(2, 50), "pct_start": real(0.1, 0.9)},
        "torch.optim.lr_scheduler.ReduceLROnPlateau": {
            "mode": names("min", "max"), "factor": real(0.1, 0.9), "patience": whole(0, 5),
        },
    },
}  # fmt: skip


def data_arguments(num_classes, num_channels, images_per_class):
    return {
        "imbalance_ratio": real(1, images_per_class),
        "profile": names("exp", "step", "none") | several(whole(1, images_per_class), num_classes, num_classes),
        "max_count": whole(1, images_per_class),
        "seed": whole(0, 2**32 - 1),
        "sampler": names(*POLICIES) | real(-3, 3),
        "val_fraction": real(0, 0.4),
        "batch_size": whole(1, 16),
        "crop_padding": whole(0, 4),
        "flip": SWITCH,
        "mixup": real(0, 0) | real(0.01, 2),
        "cutmix": real(0, 0) | real(0.01, 2),
        "color_jitter": real(0, 1),
        "mean": several(real(0, 1), 1, 1) | several(real(0, 1), num_channels, num_channels),
        "std": several(real(0.01, 1), 1, 1) | several(real(0.01, 1), num_channels, num_channels),
    }  # fmt: skip


DATA = [
    (["--data=Digits"], data_arguments(10, 1, 90)),
    (["--data=ArrayImages", "--data.path=../grey.npz"], data_arguments(3, 1, 12)),
    (["--data=ArrayImages", "--data.path=../colour.npz"], data_arguments(4, 3, 9)),
    (
        ["--data=FolderImages", "--data.root=../folder"],
        {
            **data_arguments(2, 3, 5),
            "image_size": whole(1, 16),
            "min_crop_scale": real(0.01, 1),
            "crop_pct": real(0.1, 1),
            "skip_corrupt": SWITCH,
        },
    ),
]

REQUIRED = {"step_size", "T_max", "max_lr", "total_steps", "milestones", "image_size"}

EVERY_ARGUMENT = [
    *(f"data.{name}" for name in DATA[-1][1]),
    *(f"{part}.{name}" for part, classes in CLASSES.items() for table in classes.values() for name in table),
]


@st.composite
def command_lines(draw):
    """Valid arguments, of parts that mostly go together, and of all arguments there are up to two with nasty values."""
    data, arguments = draw(st.sampled_from(DATA))
    epochs, backbone = draw(st.sampled_from("12")), draw(st.sampled_from(["resnet20_cifar", "test_resnet"]))
    argv = [*FIT, f"--trainer.max_epochs={epochs}", f"--model.backbone={backbone}", *data]
    arguments = {f"data.{name}": argument for name, argument in arguments.items()}
    chosen = {part: draw(st.sampled_from(sorted(classes))) for part, classes in CLASSES.items()}
    # the loss's argument that equals the scale of the ETF head which the loss needs
    length = {"DotRegressionLoss": "length", "LDAMLoss": "scale"}.get(chosen["model.loss"])
    pulls = length is not None and not draw(rarely())
    if pulls:
        chosen["model.head"] = "ETFHead"
    for part, name in chosen.items():
        argv.append(f"--{part}={name}")
        arguments |= {f"{part}.{key}": argument for key, argument in CLASSES[part][name].items()}
    valid = {key: argument.valid for key, argument in arguments.items()}
    required = {key: valid.pop(key) for key in arguments if key.rpartition(".")[2] in REQUIRED}
    values = draw(st.fixed_dictionaries(required, optional=valid))
    if pulls:
        values |= {"model.head.normalize": "true", "model.head.learn_scale": "false"}
        values["model.head.scale"] = values.setdefault(f"model.loss.{length}", "1")
    if values.get("data.profile", "").startswith("[") and not draw(rarely()):
        values = {key: value for key, value in values.items() if key not in ("data.imbalance_ratio", "data.max_count")}
    for key in draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2, unique=True)):
        values[key] = draw(st.sampled_from(ANYTHING if draw(rarely()) else arguments[key].nasty))
    if draw(rarely()):  # an argument of any class, chosen or not
        values[draw(st.sampled_from(EVERY_ARGUMENT))] = draw(st.sampled_from(ANYTHING))
    return [*argv, *(f"--{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The folder of the image files that `DATA` names."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)

    def arrays(shape, classes, **sizes):
        for split, per_class in sizes.items():
            labels = np.arange(per_class * classes) % classes
            pixels = generator.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
            yield from ((f"{split}_images", pixels), (f"{split}_labels", labels))

    np.savez(folder / "grey.npz", **dict(arrays((8, 8), 3, train=16, test=3)))
    np.savez(folder / "colour.npz", **dict(arrays((9, 7, 3), 4, train=12, val=2, test=2)))
    for split, per_class in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / "folder" / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "folder" / split / name / f"{i}.png")
    return folder


def outcome(result, cwd):
    """ "ran" or "refused"; anything else is an AssertionError."""
    output = result.out + result.err
    assert "Traceback" not in output
    left = {path.relative_to(cwd) for path in cwd.rglob("*") if path.is_file()}
    if result.status == 0:
        assert not result.error_lines
        (metrics,) = cwd.rglob("metrics.csv")
        with metrics.open(newline="") as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert losses
        assert all(map(math.isfinite, losses))
        return "ran"
    assert result.status in (1, 2)
    (line,) = result.error_lines
    assert "ETFLIGHT_DEBUG" not in line, "an exception that nobody wrote for people"
    assert len(line) < 600
    allowed = {".lock", "config.yaml", "run.json", "metrics.csv"} if result.status == 1 else set()
    assert {path.name for path in left if path.suffix != ".ckpt"} <= allowed
    return "refused"


def explore(etflight_command, images, **how):
    """Run random command lines and count how they ended."""
    outcomes = Counter()

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True, **how)
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
    outcomes = explore(etflight_command, images, max_examples=50, derandomize=True)
    assert min(outcomes["ran"], outcomes["refused"]) >= 10, outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_runs_or_one_clear_line_says_why_not_in_a_thousand_cases(etflight_command, images):
    outcomes = explore(etflight_command, images, max_examples=1000)
    print(f"\n{dict(outcomes)}")
    assert min(outcomes["ran"], outcomes["refused"]) >= 200, outcomes
