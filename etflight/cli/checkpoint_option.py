"""What the commands that take a trained model share: the checkpoint, its images, and how it wants them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from etflight.checkpoint.specs import find_class
from etflight.classifier import Classifier
from etflight.cli.data_option import data_parser, parse
from etflight.data import ImageDataModule
from etflight.data.facts import refuse_other_shape
from etflight.data.preprocessing import Preprocessing
from etflight.runs.folder import last_checkpoint, run_of
from etflight.utils.errors import UserError, warn


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
    path = Path(run)
    checkpoint = last_checkpoint(path) if path.is_dir() else path
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


def images_of_training(
    run: Path | None, known: Preprocessing | None, command: str, needed_by: str | None
) -> ImageDataModule | None:
    """The images of the training in a run folder, as its `config.yaml` describes them; None if they cannot be told and nothing needs them.

    Args:
        run: The run folder of the checkpoint, or None.
        known: What the checkpoint knows of its images, or None.
        command: The command, for errors.
        needed_by: The name of what decides in place of the trained head and needs them, or None.

    Raises:
        UserError: They are needed, and cannot be told.
    """
    try:
        if run is None:
            raise UserError("the checkpoint is not in a run folder, whose config.yaml tells them")
        return data_of_run(run, known, command)
    except UserError as error:
        if needed_by is None:
            return None
        raise UserError(f"{needed_by} needs the images of the training: {error}") from error


def prepare_as_trained(data: Namespace, known: Preprocessing | None) -> None:
    """Let the checkpoint decide how images are sized and normalised wherever the user has not.

    Args:
        data: The parsed option of the data module, changed in place; an option that is null counts as not given.
        known: What the checkpoint knows of its images, or None.
    """
    cls: Any = find_class({"class_path": data.class_path}, ImageDataModule)
    if cls is None or known is None:
        return
    for name, value in cls.options_for(known).items():
        if name in data.init_args and data.init_args[name] is None:
            data.init_args[name] = value
    for inner in vars(data.init_args).values():
        if isinstance(inner, Namespace) and "class_path" in inner and "init_args" in inner:
            prepare_as_trained(inner, known)  # the set that a ClassSubset takes its images from
