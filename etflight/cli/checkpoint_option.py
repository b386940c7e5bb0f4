"""What the commands that take a trained model share: the checkpoint, the device, and how it wants its images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from etflight.classifier import Classifier
from etflight.data import ImageDataModule
from etflight.data.facts import refuse_other_shape
from etflight.loading import prepare_as_trained
from etflight.runs.folder import checkpoint_of, run_of
from etflight.utils.errors import UserError, brief, warn


def add_device(parser: ArgumentParser) -> None:
    """Add the argument `--device`."""
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, cuda:1 …; by default a GPU if there is one."
    )


def device_of(config: Namespace) -> torch.device:
    """The device that `--device` asks for.

    Raises:
        UserError: There is no such device.
    """
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device}: {brief(error)}: give cpu, or a device of this machine") from error
    return device


def load_classifier(run: str, options: Mapping[str, Any] = {}) -> tuple[Path, Classifier]:
    """Load a trained model.

    Args:
        run: A run folder, whose last checkpoint is meant, or a checkpoint.
        options: Arguments of the model that replace those in the checkpoint.

    Returns:
        The path of the checkpoint, and its model.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read.
    """
    checkpoint = checkpoint_of(Path(run))
    return checkpoint, Classifier.load_from_checkpoint(checkpoint, **options)


def class_vectors(classifier: Classifier, checkpoint: Path) -> Tensor:
    """The class vectors `[K, d]` of a classifier, on the CPU.

    Raises:
        UserError: Its head has none.
    """
    weight = getattr(classifier.head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(
            f"the head {type(classifier.head).__name__} of checkpoint {checkpoint} has no class vectors weight [K, d]: "
            "give a model that has"
        )
    vectors: Tensor = classifier.head.class_vectors
    return vectors.detach().cpu()


def folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, or else the folder that it lies in."""
    return run_of(checkpoint) or checkpoint.parent


def data_as_trained(
    parser: ArgumentParser, config: Namespace, classifier: Classifier, checkpoint: str, *, images: bool = False
) -> ImageDataModule:
    """Build the data module for a checkpoint's images, and say how they differ from those that it was trained on.

    Args:
        parser: The parser of the command.
        config: The parsed command line.
        classifier: The classifier in the checkpoint.
        checkpoint: The path of the checkpoint, for the error.
        images: Whether to compare the training images too, which means reading them.

    Raises:
        UserError: The data have another number of classes or channels.
    """
    prepare_as_trained(config.data, classifier.preprocessing)
    data: ImageDataModule = parser.instantiate(config).data
    data.prepare_data()
    takes = classifier.head.num_classes, classifier.hparams["in_chans"]
    refuse_other_shape(f"checkpoint {checkpoint}", *takes, data)
    for line in classifier.differences(data, images=images):
        warn(line)
    return data
