"""What the commands that take a trained model share: the checkpoint, the modules it needs, and how it wants its images."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from etflight.classifier import Classifier
from etflight.data import ImageDataModule
from etflight.utils.errors import UserError, brief, warn
from etflight.utils.preprocessing import Preprocessing
from etflight.utils.specs import find
from etflight.utils.training_data import refuse_other_shape


def add_imports(parser: ArgumentParser) -> None:
    """Add the argument `--imports`."""
    parser.add_argument(
        "--imports",
        type=str,
        nargs="*",
        default=[],
        help="Modules with heads or losses of your own that the checkpoint names.",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import the modules that the user has named.

    Raises:
        UserError: Python does not find a module.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"--imports {name}: {brief(error)}: give a module that Python finds from here") from error


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
    takes = classifier.head.num_classes, classifier.hparams["in_chans"]
    refuse_other_shape(f"checkpoint {checkpoint}", *takes, data)
    for line in classifier.differences(data, images=images):
        warn(line)
    return data


def prepare_as_trained(data: Namespace, known: Preprocessing | None) -> None:
    """Let the checkpoint decide how images are sized and normalised wherever the user has not.

    Args:
        data: The parsed option of the data module, changed in place; an option that is null counts as not given.
        known: What the checkpoint knows of its images, or None.
    """
    cls: Any = find({"class_path": data.class_path}, ImageDataModule)
    if cls is None or known is None:
        return
    for name, value in cls.options_for(known).items():
        if name in data.init_args and data.init_args[name] is None:
            data.init_args[name] = value
