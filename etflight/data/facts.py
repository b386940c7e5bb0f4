"""Compares what a model, checkpoint or record knows of its training data with the data it is used with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from etflight.data.preprocessing import Preprocessing
from etflight.utils.errors import UserError
from etflight.utils.terminal import readable


def refuse_other_shape(
    model: str, num_classes: int, channels: int, data: Any, mend: str = "give the data it was trained on"
) -> None:
    """Refuse data with another number of classes or channels than the model has.

    Args:
        model: The name of the model, for the error.
        num_classes: The model's number of classes.
        channels: The number of channels of its images.
        data: A data module; a number that it does not have is not compared.
        mend: The mend, for the error.

    Raises:
        UserError: The data have another number.
    """
    images = "takes images of {} channel" + "s" * (channels != 1)
    for takes, own, other in (
        ("decides between {} classes", num_classes, getattr(data, "num_classes", None)),
        (images, channels, getattr(data, "num_channels", None)),
    ):
        if isinstance(other, int) and other != own:
            raise UserError(f"{model} {takes.format(own)}, but {_name_of_data(data)} has {other}: {mend}")


def _name_of_data(data: Any) -> str:
    """What errors call a data module: ours say it in a word, Lightning's own in several lines."""
    named_by = getattr(type(data).__str__, "__module__", "") or ""  # of what has no name of its own it is empty
    return type(data).__name__ if named_by.partition(".")[0] in ("", "lightning") else str(data)


def class_names_of(data: Any) -> list[str] | None:
    """The names of the classes of a data module, or None if it has none; a dict has them by label.

    Raises:
        UserError: It has something else under that name.
    """
    names = getattr(data, "class_names", None)
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise UserError(
                f"class_names of {_name_of_data(data)} is a dict of {list(names)[:3]} …: give a list, or a dict by label, from 0"
            )
        names = [names[k] for k in range(len(names))]
    try:
        if isinstance(names, str):
            raise TypeError
        return None if names is None else list(map(readable, names))
    except TypeError:
        raise UserError(f"class_names of {_name_of_data(data)} is {names!r:.80}: give a list of the names") from None


def class_counts_of(given: Any, num_classes: int) -> Tensor:
    """The number of training images of each class, `[K]`, of a list, an array or a tensor.

    Raises:
        UserError: They are something else, or not K numbers.
    """
    try:
        counts = torch.as_tensor(given)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"class_counts is {given!r:.80}: give the number of training images of each class, as a list, an array or a tensor"
        ) from error
    if counts.shape != (num_classes,):
        has = f"{len(counts)} entries" if counts.ndim == 1 else f"the shape {list(counts.shape)}"
        raise UserError(f"class_counts has {has} for {num_classes} classes: give one per class")
    return counts


def refuse_equal_class_names(names: Sequence[str], data: Any) -> None:
    """Refuse two classes of one name, as options and results that go by names would mean either.

    Args:
        names: The names of the classes, as people see them.
        data: The data module that has them.

    Raises:
        UserError: Two names are equal.
    """
    places: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        places.setdefault(name, []).append(k)
    twins = {name: own for name, own in places.items() if len(own) > 1}
    if twins:
        name, (one, other, *_) = next(iter(twins.items()))
        others = f" (and {len(twins) - 1} other name{'s' * (len(twins) > 2)})" if len(twins) > 1 else ""
        raise UserError(
            f"{_name_of_data(data)}: classes {one} and {other} are both called {name!r}{others}: give each class a name of its own"
        )


def preprocessing_of(data: Any) -> Preprocessing | None:
    """What a data module of this package does to images; of another, whose `preprocessing` is its own affair, None."""
    own = getattr(data, "preprocessing", None)
    return own if isinstance(own, Preprocessing) else None


def different_class(one: Sequence[str] | None, other: Sequence[str] | None) -> tuple[int, str, str] | None:
    """Return the first class whose names differ, and both names; None if there is none, or if either has mere numbers or no names."""
    if one is None or other is None or [str(k) for k in range(len(one))] in (list(one), list(other)):
        return None
    pairs = zip(one, other, strict=False)
    return next(((k, own, its) for k, (own, its) in enumerate(pairs) if own != its), None)


def other_names(known: Sequence[str] | None, data: Any) -> str | None:
    """Describe the first class whose name differs between training and data; None if there is none, or if either has mere numbers."""
    differ = different_class(known, class_names_of(data))
    return differ and "class {} is {!r} in the checkpoint, but {!r} in the data".format(*differ)


def other_preprocessing(known: Preprocessing | None, data: Any) -> str | None:
    """Describe how the data size and normalise images differently from the training; None if they do not, or if it is unknown."""
    own = None if known is None else preprocessing_of(data)
    differ = None if known is None or own is None else own.unlike(known)
    return differ and f"{_name_of_data(data)}: images are prepared differently than in training: {differ}"


def other_images(counts: Sequence[int], fingerprint: str | None, data: Any) -> str | None:
    """Describe how the data's training images differ from those of the training; None if they do not, or if it is unknown.

    Args:
        counts: The number of images of each class that were trained on, `[K]`; all 0 if unknown.
        fingerprint: The fingerprint of those images; None if unknown.
        data: A data module.
    """
    known = getattr(data, "class_counts", None) if any(counts) else None
    own = [] if known is None else list(map(int, known))
    k = next((k for k, pair in enumerate(zip(own, counts, strict=False)) if pair[0] != pair[1]), None)
    if k is not None:
        name = (class_names_of(data) or range(len(own)))[k]
        return f"{_name_of_data(data)} has {own[k]} training images of class {name}, but the checkpoint was trained on {counts[k]}"
    other = getattr(data, "fingerprint", None)
    if fingerprint is None or other is None or fingerprint == other:
        return None
    return (
        f"{_name_of_data(data)} has other training images ({other}) than the checkpoint was trained on ({fingerprint})"
    )
