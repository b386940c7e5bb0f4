"""What a model, a checkpoint or a record knows of the data of a training, compared with the data that it is used with."""

from typing import Any

from etflight.errors import UserError

THE_DATA = "give the data it was trained on"


def refuse_other_shape(model: str, num_classes: int, channels: int, data: Any, mend: str = THE_DATA) -> None:
    """Refuse data of which a model can make nothing.

    Args:
        model: for the error.
        num_classes: that it decides between.
        channels: of its images.
        data: a data module; one that does not tell its `num_classes` or `num_channels` is not refused for them.
        mend: for the error.

    Raises:
        UserError: other numbers.
    """
    images = "takes images of {} channel" + "s" * (channels != 1)
    for takes, own, other in (
        ("decides between {} classes", num_classes, getattr(data, "num_classes", None)),
        (images, channels, getattr(data, "num_channels", None)),
    ):
        if isinstance(other, int) and other != own:
            raise UserError(f"{model} {takes.format(own)}, but {data} has {other}: {mend}")


def content_of(fingerprint: str | None) -> str | None:
    """The part of a data module's fingerprint that tells one set from another; None of one from before fingerprints had it."""
    content, dash, _ = (fingerprint or "").rpartition("-")
    return content if dash else None


def choice_of(fingerprint: str | None) -> str | None:
    """The part that tells one choice of a set's training images from another."""
    return fingerprint and fingerprint.rpartition("-")[2]


def same_images(one: object, other: object) -> bool:
    """Whether two fingerprints are of the same training images; where one does not know its set, whether they are the same choice."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    unknown = None in (content_of(one), content_of(other))
    return choice_of(one) == choice_of(other) if unknown else one == other
