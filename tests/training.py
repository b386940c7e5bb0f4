"""Training on the CPU that prints little and saves nothing by itself: in Python, and as words of a command line."""

import csv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from etflight import Classifier, ETFHead
from etflight.data import ImageDataModule

QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
QUICK = ["--trainer.max_epochs", 1, *QUIET]
ONE_BATCH = [word for what in ("train", "val", "test", "predict") for word in (f"--trainer.limit_{what}_batches", 1)]
DIGITS = ["--data", "Digits", "--data.imbalance_ratio", 20, "--model.backbone", "resnet20_cifar", *QUICK]
VIT = [  # no batch normalisation anywhere
    "--model.backbone", "test_vit", "--model.model_kwargs", '{"img_size": 8, "patch_size": 4}', "--model.head.batch_norm", "false",
]  # fmt: skip
GLOBAL_BATCH = 60  # divided alike by one, two and three processes


def small_resnet(model: Callable[..., Classifier] = Classifier, **options: Any) -> Classifier:
    """Ten classes of digits, with the same first weights each time; `options` are those of the model."""
    torch.manual_seed(0)
    return model(10, "resnet20_cifar", in_chans=1, **options)


def save_untrained(path: Path, model: Classifier, **more: Any) -> Path:
    """Saves a model as a trainer would that has not trained it, with `more` entries."""
    checkpoint = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.6",
    }
    model.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | more, path)
    return path


def small_vit(model: Callable[..., Classifier] = Classifier, seed: int = 0) -> Classifier:
    """Ten classes of digits, without batch normalisation anywhere."""
    head = partial(ETFHead, batch_norm=False, seed=seed)
    return model(10, "test_vit", head, in_chans=1, model_kwargs={"img_size": 8, "patch_size": 4})


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
    return Trainer(**{"callbacks": list(callbacks), "accelerator": "cpu", **silent, **options})


def save_trained(path: Path, model: LightningModule, data: ImageDataModule, **options: Any) -> Path:
    """Trains a model for an epoch without validation and saves its checkpoint; `options` are those of `Trainer`."""
    trainer = new_trainer(**{"max_epochs": 1, "limit_val_batches": 0, **options})
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(path)
    return path


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


def save_pictures(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    """Writes an image of noise, as wide and high as `size`, to each of these files below a folder, which it returns."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def save_folders(root: Path, size: tuple[int, int] = (8, 8), **splits: dict[str, int]) -> Path:
    """Writes so many images for each class of each split, `split/class/number.png`, below a folder, which it returns."""
    sizes = [(f"{split}/{name}", number) for split, classes in splits.items() for name, number in classes.items()]
    return save_pictures(root, *(f"{place}/{i}.png" for place, number in sizes for i in range(number)), size=size)


def image_folder(root: Path, sizes: dict[str, int]) -> list[Any]:
    """Writes so many training and test images for each class, and returns the words of a command line that is run beside the folder."""
    save_folders(root, train=sizes, test=sizes)
    return ["--data", "FolderImages", "--data.root", root.name, "--data.image_size", 8]


def save_numbered(
    path: Path, train: Sequence[int] = (40, 20, 10), test: Sequence[int] = (5, 5, 3), **changes: Any
) -> str:
    """Writes an `.npz` in MedMNIST's layout and returns its path: so many images of each class, 2×4 pixels, RGB.

    The three values of an image's pixels are its position in the split, that in its class, and its class, modulo 256. `changes`
    replace arrays or come beside them, None leaves one out.
    """
    members: dict[str, Any] = {}
    for split, counts in (("train", train), ("test", test)):
        labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
        positions = np.arange(len(labels))
        places = (labels[:, None] == np.arange(len(counts))).cumsum(0)[positions, labels] - 1
        pixels = np.stack([positions, places, labels], axis=1).astype(np.uint8)
        members[f"{split}_images"] = np.broadcast_to(pixels[:, None, None], (len(labels), 2, 4, 3))
        members[f"{split}_labels"] = labels
    np.savez(path, **{name: array for name, array in (members | changes).items() if array is not None})
    return str(path)


def written(folder: Path) -> dict[str, int]:
    """The files below a folder, with the times at which they were written last."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}
