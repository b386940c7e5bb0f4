"""What commands that take a trained model share: the checkpoint, the modules that it needs, the images that it wants."""

from collections.abc import Sequence
from importlib import import_module
from textwrap import shorten
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from etflight.classifier import PLUGGABLE, Classifier, plain_hyperparameters
from etflight.data import ImageDataModule
from etflight.utils.checkpoints import read_checkpoint, refuse_others
from etflight.utils.errors import UserError
from etflight.utils.preprocessing import Preprocessing
from etflight.utils.specs import describe, find, is_known


def add_imports(parser: ArgumentParser) -> None:
    """The argument `--imports`."""
    parser.add_argument(
        "--imports",
        type=str,
        nargs="*",
        default=[],
        help="Modules with heads or losses of your own that the checkpoint names.",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import what the user has named.

    Raises:
        UserError: a module that Python does not find.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise UserError(f"--imports {name}: {brief(error)}: give a module that Python finds from here") from error


def load_classifier(path: str) -> Classifier:
    """A classifier from its checkpoint, on the CPU.

    Raises:
        UserError: a file that cannot be read, or that names a class which is not imported.
    """
    checkpoint = read_checkpoint(path)
    refuse_others(path, checkpoint, Classifier)
    for argument, value in plain_hyperparameters(checkpoint).items():
        if argument in PLUGGABLE and value is not None and not is_known(describe(value, argument), PLUGGABLE[argument]):
            module = value["class_path"].rpartition(".")[0]
            raise UserError(
                f"checkpoint {path} needs {value['class_path']} as its {argument}: import its module (--imports {module})"
            )
    return Classifier.load_from_checkpoint(path)


def prepare_as_trained(data: Namespace, known: Preprocessing | None) -> None:
    """Let a checkpoint say how images are sized and normalised where the user has not.

    Args:
        data: the parsed option of the data module, changed in place; an option that is null has not been given.
        known: from the checkpoint, if it does.
    """
    cls: Any = find({"class_path": data.class_path}, ImageDataModule)
    if cls is None or known is None:
        return
    for name, value in cls.options_for(known).items():
        if name in data.init_args and data.init_args[name] is None:
            data.init_args[name] = value


def brief(error: BaseException) -> str:
    """What an error says, in 200 letters."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …")
