"""What commands that take a trained model share: the checkpoint, and the modules that it needs."""

from collections.abc import Sequence
from importlib import import_module
from textwrap import shorten

from jsonargparse import ArgumentParser

from etflight.checkpoints import read_checkpoint, refuse_others
from etflight.classifier import PLUGGABLE, Classifier, plain_hyperparameters
from etflight.errors import UserError
from etflight.specs import describe, is_known


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


def brief(error: BaseException) -> str:
    """What an error says, in 200 letters."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …")
