"""What the commands that take a trained model share: the checkpoint, its images, and how it wants them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etflight.classifier import Classifier
from etflight.cli.data_option import data_parser, parse
from etflight.data import ImageDataModule
from etflight.data.facts import refuse_other_shape
from etflight.data.preprocessing import Preprocessing
from etflight.data.run_options import prepare_as_trained
from etflight.runs.folder import checkpoint_of, run_of
from etflight.utils.errors import warn


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


def folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, or else the folder that it lies in."""
    return run_of(checkpoint) or checkpoint.parent


def compare_with_training(
    data: ImageDataModule, classifier: Classifier, checkpoint: Path, *, images: bool = False
) -> ImageDataModule:
    """Return data for a checkpoint's model, and say how they differ from those that it was trained on.

    Args:
        data: The data.
        classifier: The classifier in the checkpoint.
        checkpoint: The path of the checkpoint, for the error.
        images: Whether to compare the training images too, which means reading them.

    Raises:
        UserError: The data have another number of classes or channels.
    """
    takes = classifier.head.num_classes, classifier.hparams["in_chans"]
    refuse_other_shape(f"checkpoint {checkpoint}", *takes, data)
    for line in classifier.differences(data, images=images):
        warn(line)
    return data


def data_of_run(run: Path, known: Preprocessing | None, command: str) -> ImageDataModule:
    """The images that the `config.yaml` of a run folder describes, prepared as a model wants them.

    Args:
        run: The run folder, or a checkpoint in one.
        known: What the checkpoint knows of its images, or None.
        command: The command, for errors.

    Raises:
        UserError: They cannot be told, or read.
    """
    parser = data_parser(command, "The images of a run.")
    config = parse(parser, [], str(run))
    prepare_as_trained(config.data, known)
    data: ImageDataModule = parser.instantiate(config).data
    data.prepare_data()
    return data
