"""Training on the CPU that prints little and saves nothing by itself: in Python, and as words of a command line."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from etflight.data import ImageDataModule

QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip


def fit_digits(folder: Path, *words: object) -> Path:
    """Runs `etflight fit` on the digits with a small network in this process; returns the run folder `folder/r`."""
    from etflight.cli.stages import main  # here, since processes that run no command import this file, too

    own = ["--trainer.default_root_dir", folder, "--name", "r", *QUIET, *words]
    main(["fit", "--data", "Digits", "--model.backbone", "resnet20_cifar", *map(str, own)])
    return folder / "r"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def new_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A trainer with these callbacks; `options` are those of `Trainer`."""
    silent = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    return Trainer(callbacks=list(callbacks), **{"accelerator": "cpu", **silent, **options})


@torch.no_grad()
def seen(data: ImageDataModule, split: str, *functions: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What each function makes of all images of a split as they are evaluated, and at the end their labels."""
    batches = [data.eval_transform(batch) for batch in data.eval_dataloader(split)]
    return *(torch.cat([f(images) for images, _ in batches]) for f in functions), torch.cat([y for _, y in batches])


def save_arrays(
    path: Path, *, train: int = 40, test: int = 40, shape: tuple[int, ...] = (8, 8), classes: int = 10, **more: Any
) -> None:
    """Writes an `.npz` file for `ArrayImages`: noise of this shape, labels in turn, and `more` arrays in place of these or beside them."""
    noise = np.random.default_rng(0)
    content = {}
    for split, size in (("train", train), ("test", test)):
        content[f"{split}_images"] = noise.integers(0, 256, (size, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(size) % classes
    np.savez(path, **content | more)
