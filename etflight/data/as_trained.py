"""Options of a data module that a trained model's checkpoint knows."""

from typing import Any

from jsonargparse import Namespace

from etflight.checkpoint.specs import find_class
from etflight.data.base import ImageDataModule
from etflight.data.preprocessing import Preprocessing


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
