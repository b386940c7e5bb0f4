"""A training that reads features which are computed once, where neither the backbone nor the images change."""

import shutil
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from etflight.analysis.outputs import split_features
from etflight.analysis.store import PRECISIONS, Precision, store_of
from etflight.analysis.sweep import KEEP_BYTES, plain_tensors, undisturbed
from etflight.callbacks.collapse import NeuralCollapseMonitor
from etflight.callbacks.progress import is_watched
from etflight.classifier import Classifier
from etflight.data.base import ImageDataModule
from etflight.data.sources import Split
from etflight.runs.folder import FEATURES, run_folder
from etflight.runs.record import RunRecord
from etflight.utils.errors import argument
from etflight.utils.trainer import callbacks_of, data_module, is_trial_run

_PRECISIONS: dict[str, Precision] = {"32-true": "float32", "16-mixed": "float32", "bf16-mixed": "bfloat16"}
# what a class of the user's own may change so that features no longer do in place of images
_OF_MODEL = ("features", "forward", "training_step", "validation_step")
_OF_DATA = ("on_after_batch_transfer", "train_transform", "eval_transform", "train_dataloader", "val_dataloader")


def train_on_features(trainer: Trainer, model: LightningModule) -> ImageDataModule | None:
    """Let a training with a backbone that never changes read features in place of images, if its images never change either.

    They are computed with the trainer's precision and kept in the run folder, or in memory where there is none. A line says so, or which
    options of the images stand in the way. All processes call this together.

    Args:
        trainer: The trainer, about to train.
        model: Its module, with the weights that the backbone keeps.

    Returns:
        The data module that now gives features, until its `use_images`; None if it gives images.
    """
    data = data_module(trainer)
    if not isinstance(model, Classifier) or not isinstance(data, ImageDataModule):
        return None
    if not (_keeps(model, Classifier, _OF_MODEL) and _keeps(data, ImageDataModule, _OF_DATA)):
        return None
    if not _fits(trainer) or not _pays(trainer, data):
        return None
    if off := data.changing:
        options = " ".join(argument(name, value) for name, value in off.items())
        rank_zero_info(
            f"the frozen backbone goes over the training images in every epoch, since they change; with {options} it would do so only once"
        )
        return None
    splits: tuple[Split, ...] = ("train", "val") if trainer.limit_val_batches == 1 else ("train",)
    precision = _PRECISIONS[trainer.precision]
    folder = run_folder(trainer) / FEATURES
    on_disk = bool(callbacks_of(trainer, RunRecord)) and trainer.num_nodes == 1  # nodes may not see each other's files
    to_come = [split for split in splits if not (on_disk and store_of(folder, split).is_file())]
    size = sum(map(len, map(data.split, to_come))) * model.head.in_features * PRECISIONS[precision].itemsize
    room = _free(folder) // 3 if on_disk else KEEP_BYTES
    if not trainer.strategy.broadcast(size <= room):
        rank_zero_info(
            f"the frozen backbone goes over the images in every epoch: their features take {size / 1e9:.1f} GB"
        )
        return None
    where = folder if on_disk else "memory"
    rank_zero_info(f"the frozen backbone goes over the images once: the training reads their features, kept in {where}")
    with plain_tensors(), undisturbed(trainer, model):
        features = {
            split: split_features(
                model, data, split, folder=folder if on_disk else None, precision=precision,
                quiet=not (is_watched() and trainer.is_global_zero),
            ).features
            for split in splits
        }  # fmt: skip
    data.use_features(features)
    return data


def _keeps(thing: object, kind: type, methods: tuple[str, ...]) -> bool:
    return all(getattr(type(thing), name) is getattr(kind, name) for name in methods)


def _free(folder: Path) -> int:
    there = next(path for path in folder.absolute().parents if path.is_dir())
    return shutil.disk_usage(there).free


def _fits(trainer: Trainer) -> bool:
    """Whether trainer and callbacks ask for nothing that a stored feature cannot give."""
    strategy, monitors = trainer.strategy, callbacks_of(trainer, NeuralCollapseMonitor)
    alone = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not strategy.restore_checkpoint_after_setup
    return alone and trainer.precision in _PRECISIONS and not any(monitor.layers for monitor in monitors)


def _pays(trainer: Trainer, data: ImageDataModule) -> bool:
    """Whether each image would be gone over at least twice."""
    whole = trainer.limit_train_batches == 1 and not trainer.overfit_batches  # type: ignore[attr-defined]
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    seen = steps * trainer.accumulate_grad_batches * data.batch_size * trainer.world_size
    return bool(whole) and not is_trial_run(trainer) and epochs != 1 and not 0 <= seen < 2 * len(data.split("train"))
